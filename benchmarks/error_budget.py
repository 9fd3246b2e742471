"""Where the error of a forecast comes from: each part is taken away in turn, and the CRPS of every bar ahead measured

    OMP_NUM_THREADS=1 python benchmarks/error_budget.py RUN --data BARS.parquet --symbols BTCUSDT --start 2023-01-01

RUN is a run or a saved forecaster, e.g. one of benchmarks/gain.py. Steps, each on the paths of the one before:

- reference: temperature 1, top-p 0.9, as decoded
- anchored: prices shifted by what the tokenizer misses of the last close
- all tokens: top-p 1 instead of 0.9
- no drift: the median of each bar set to the last close
- right width: distances to the median multiplied so that the 80 % bands of each bar hold 80 % (in hindsight)

Beside them, the error of the tokenizer alone: the distance between each close and its decoded tokens, when it reads the
bars that came. Scores are in mean one-bar moves of the lookback. Writes error_budget.csv beside this file, a row per
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
from kronos_nb.judging.calibrate import _band_scores, _conformal_quantile
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
    "Return the distance of decoded closes from the true ones on the bars that came, (N, H), and on the last bar (N,)"
    H, found = windows.y.shape[1], []
    groups = {s: g.reset_index(drop=True) for s, g in bars.groupby('symbol')}
    for history, (symbol, row) in zip(windows.histories, windows.origins[['symbol', 'row']].to_numpy()):
        x = groups[symbol].iloc[row - len(history) + 1:row + 1 + H][list(f.features)].to_numpy(np.float64)
        scale = f.normalizer.fit(x, len(history))
        with torch.no_grad():
            tokens = f.tokenizer.encode(torch.from_numpy(scale.encode(x))[None], half=True)
            z = f.tokenizer.decode(tokens, half=True).double().numpy()[0]
        found.append(scale.decode(z)[len(history) - 1:, 3] - x[len(history) - 1:, 3])
    found = np.stack(found)
    return abs(found[:, 1:]), abs(found[:, 0])


def budget(f, windows, bars) -> pd.DataFrame:
    "Return the score of each step at each bar ahead"
    y, unit = windows.y, windows.origins['scale'].to_numpy()[:, None]
    last = np.array([h.close.iloc[-1] for h in windows.histories])[:, None, None]
    steps = {'reference': closes(f, windows, .9, True), 'anchored': closes(f, windows, .9, False),
             'all tokens': closes(f, windows, 1., False)}
    x = steps['all tokens']
    steps['no drift'] = x*last/np.median(x, 1, keepdims=True)
    n = windows.origins['date'].nunique()
    factors = [_conformal_quantile(s, .8, n) for s in _band_scores(steps['no drift'], y).T]
    steps['right width'] = stretched(steps['no drift'], np.array(factors))
    made = EWMA().predict_many(windows.histories, y.shape[1], keys=windows.keys, futures=windows.futures, paths=100)
    steps['EWMA'] = np.stack([o.paths[..., 3] for o in made])
    table = {k: (crps(v, y)/unit).mean(0) for k, v in steps.items()}
    error, at_origin = tokenizer_error(f, windows, bars)
    table['tokenizer alone'] = (error/unit).mean(0)
    out = pd.DataFrame(table, index=pd.RangeIndex(1, y.shape[1] + 1, name='h')).stack().rename('score').reset_index()
    out.columns = ['h', 'step', 'score']
    covers = {k: float((_band_scores(v, y) <= 1).mean()) for k, v in steps.items()}
    drift = float((abs(np.median(x, 1) - last[:, 0])/unit).mean())
    return out.assign(cover_80=out.step.map(covers), drift=drift, at_origin=float((at_origin/unit[:, 0]).mean()))


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
    print(made.pivot_table(index='step', values=['score', 'cover_80']).sort_values('score', ascending=False).round(3))
    print(made[['drift', 'at_origin']].iloc[0].round(3).to_dict())


if __name__ == '__main__': main()
