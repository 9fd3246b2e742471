"""Where the error of a forecast comes from: each part is taken away in turn, and the CRPS of every bar ahead measured

    OMP_NUM_THREADS=1 python benchmarks/error_budget.py RUN --data BARS.parquet --symbols BTCUSDT --start 2023-01-01

RUN is a run or a saved forecaster, e.g. one of benchmarks/gain.py. Steps, each on the paths of the one before:

- reference: temperature 1, top-p 0.9, as decoded
- anchored: prices shifted by what the tokenizer misses of the last close
- all tokens: top-p 1 instead of 0.9
- no drift: the median of each bar set to the last close
- right width: distances to the median multiplied so that the 80 % bands of each bar hold 80 % (in hindsight)

Beside them, the error of the tokenizer alone: the distance between each close and its decoded tokens, when it reads the
bars that came. `move` is the mean distance between the closes of two neighbouring bars, of paths, of decoded bars and
of the bars that came: a tokenizer that errs on every bar anew makes closes jump that did not. Scores and moves are in
mean one-bar moves of the lookback. Writes error_budget.csv beside this file, a row per
run, step and bar ahead; rows of the same name are replaced.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kronos_nb.data.read import read_klines
from kronos_nb.data.repair import repair_klines
from kronos_nb.decode.calibration import stretched
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import EWMA
from kronos_nb.judging.calibrate import _band_scores
from kronos_nb.judging.metrics import crps
from kronos_nb.judging.origins import pick_origins, slice_windows
from kronos_nb.settings import Sampling

OUT = Path(__file__).with_suffix('.csv')


def closes(f, windows, top_p, raw):
    "Return the closes of all paths, (N, S, H)"
    made = f.predict_many(windows.histories, windows.y.shape[1], keys=windows.keys, futures=windows.futures,
                          sampling=Sampling(100, top_p=top_p, temperature=1.), raw=raw, progress=False)
    return np.stack([o.paths[..., 3] for o in made])


def tokenizer_error(f, windows, bars):
    "Return by how much decoded closes miss the true ones, (N, 1 + H), from the last bar of the history on"
    H, found = windows.y.shape[1], []
    groups = {s: g.reset_index(drop=True) for s, g in bars.groupby('symbol')}
    for history, (symbol, row) in zip(windows.histories, windows.origins[['symbol', 'row']].to_numpy()):
        x = groups[symbol].iloc[row - len(history) + 1:row + 1 + H][list(f.features)].to_numpy(np.float64)
        scale = f.normalizer.fit(x, len(history))
        with torch.no_grad():
            tokens = f.tokenizer.encode(torch.from_numpy(scale.encode(x))[None], half=True)
            z = f.tokenizer.decode(tokens, half=True).double().numpy()[0]
        found.append(scale.decode(z)[len(history) - 1:, 3] - x[len(history) - 1:, 3])
    return np.stack(found)


def moves(closes, last):
    "Return the mean distance between closes and those before them at each bar, (..., H) -> (H,)"
    before = np.concatenate([np.broadcast_to(last, closes[..., :1].shape), closes[..., :-1]], -1)
    return abs(closes - before).reshape(-1, closes.shape[-1]).mean(0)


def budget(f, windows, bars) -> pd.DataFrame:
    "Return the score of each step at each bar ahead"
    y, unit = windows.y, windows.origins['scale'].to_numpy()[:, None]
    last = np.array([h.close.iloc[-1] for h in windows.histories])[:, None, None]
    steps = {'reference': closes(f, windows, .9, True), 'anchored': closes(f, windows, .9, False),
             'all tokens': closes(f, windows, 1., False)}
    x = steps['all tokens']
    steps['no drift'] = x*last/np.median(x, 1, keepdims=True)
    steps['right width'] = stretched(steps['no drift'], np.quantile(_band_scores(steps['no drift'], y), .8, 0))
    made = EWMA().predict_many(windows.histories, y.shape[1], keys=windows.keys, futures=windows.futures, paths=100)
    steps['EWMA'] = np.stack([o.paths[..., 3] for o in made])
    table = {k: (crps(v, y)/unit).mean(0) for k, v in steps.items()}
    miss = tokenizer_error(f, windows, bars)
    table['tokenizer alone'] = (abs(miss[:, 1:])/unit).mean(0)
    table['what came'] = np.zeros(y.shape[1])
    out = pd.DataFrame(table, index=pd.RangeIndex(1, y.shape[1] + 1, name='h')).stack().rename('score').reset_index()
    out.columns = ['h', 'step', 'score']
    one = unit[:, :, None]
    jumps = {k: moves(v/one, last/one) for k, v in steps.items()}
    jumps['tokenizer alone'] = moves((y + miss[:, 1:])/unit, (last[:, 0] + miss[:, :1])/unit)
    jumps['what came'] = moves(y/unit, last[:, 0]/unit)
    out['move'] = [jumps[step][h - 1] for h, step in out[['h', 'step']].to_numpy()]
    covers = {k: float((_band_scores(v, y) <= 1).mean()) for k, v in steps.items()}
    drift = float((abs(np.median(x, 1) - last[:, 0])/unit).mean())
    return out.assign(cover_80=out.step.map(covers), drift=drift, at_origin=float((abs(miss[:, 0])/unit[:, 0]).mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run')
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--symbols', nargs='+')
    parser.add_argument('--start', required=True)
    parser.add_argument('--end')
    parser.add_argument('--name')
    parser.add_argument('--origins', type=int, default=48)
    args = parser.parse_args()
    f = Forecaster.from_pretrained(args.run, calibration=None)
    bars, _ = repair_klines(read_klines(args.data, symbols=args.symbols, end=args.end))
    L, H = f.lookback_window, f.predict_window
    origins, _ = pick_origins(bars, L, H, args.origins, start=pd.Timestamp(args.start))
    made = budget(f, slice_windows(bars, origins, L, H), bars).assign(run=args.name or Path(args.run).name)
    kept = [o for o in [pd.read_csv(OUT)] if len(o)] if OUT.exists() else []
    whole = pd.concat([*(o[o.run != made.run.iloc[0]] for o in kept), made], ignore_index=True)
    whole.round(5).to_csv(OUT, index=False)
    table = made.pivot_table(index='step', values=['score', 'move', 'cover_80'])
    print(table.sort_values('score', ascending=False).round(3))
    print(made[['drift', 'at_origin']].iloc[0].round(3).to_dict())


if __name__ == '__main__': main()
