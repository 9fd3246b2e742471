"""How the settings for one's own file were chosen: steps, learning rate, history and start, scored on validation bars.

    OMP_NUM_THREADS=1 python benchmarks/own.py DOGE.parquet STOCKS.csv.gz EURUSD.csv

Each arm trains both stages on the first 70 % of a file and forecasts the validation part (the next 15 %) from 64 dates
at most. The last 15 % are never read. The score is the CRPS of the close in units of the mean absolute one-bar move,
beside that of a geometric Brownian motion on the same forecasts. Writes own.csv beside this file, a row per file and
arm; rows that are there are not run again.
"""
import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from kronos_nb.config import Config
from kronos_nb.data.read import read_klines
from kronos_nb.data.repair import repair_klines
from kronos_nb.evaluate import evaluate
from kronos_nb.fitting.prepare import prepare
from kronos_nb.judging.baselines import GeometricBrownian
from kronos_nb.train import fit

WINDOWS = dict(hourly=(96, 24), daily=(60, 10))   # lookback, horizon
START = dict(scratch=dict(init='scratch', size='tiny'), bundled=dict(init='bundled'))
ARMS = [   # start, tokenizer steps (0: the start's own), predictor steps, learning rate, lookback (0: as in WINDOWS)
    ('bundled', 0, 1, 1e-8, 0), ('bundled', 0, 200, 5e-4, 0), ('bundled', 100, 200, 5e-4, 0),
    ('bundled', 100, 400, 5e-4, 0), ('bundled', 0, 400, 5e-4, 0), ('bundled', 0, 200, 1e-3, 0),
    ('bundled', 0, 200, 5e-4, 168),
    ('scratch', 100, 200, 1e-3, 0), ('scratch', 200, 400, 1e-3, 0), ('scratch', 400, 800, 1e-3, 0),
]
OUT = Path(__file__).with_suffix('.csv')


def settings(bars, start, tokenizer_steps, predictor_steps, lr, lookback) -> Config:
    "Return the configuration of an arm"
    kind = 'daily' if bars.timestamps.diff().median() >= pd.Timedelta('1D') else 'hourly'
    window = dict(zip(('lookback_window', 'predict_window'), WINDOWS[kind]))
    if lookback: window['lookback_window'] = lookback
    both = dict(START[start], lr=lr, batch_size=32, epochs=10_000, weight_decay=.05, warmup=.1)
    only = dict(only='predictor') if not tokenizer_steps else {}
    return Config().replace(
        data=dict(window, embargo=window['predict_window'], windows_per_epoch=1600, val_windows=200),
        tokenizer=dict(both, max_steps=tokenizer_steps or None),
        predictor=dict(both, max_steps=predictor_steps, tokenizer=start if only else None),
        evaluate=dict(paths=50, calibrate='off'),
        runtime=dict(progress=False, plots=False, device='cpu', threads=1, **only))


def score(result, bars, cfg) -> dict:
    "Return the CRPS of the model and of the baseline on the validation part"
    prepared, d = prepare(bars, cfg), cfg.data
    val = prepared.split.summary.query("part == 'val'").set_index('symbol')
    known = bars[bars.timestamps <= bars.symbol.astype(str).map(dict(val['last']))].reset_index(drop=True)
    origins = min(max(16, 256//bars.symbol.nunique()), 64)
    e = evaluate(result.forecaster(), known, d.lookback_window, d.predict_window, baselines=[GeometricBrownian()],
                 origins=origins, start=dict(val['first']), used=prepared.split.train,
                 sampling=cfg.sampling, progress=False)
    model, baseline = (e.losses[k]['crps'].mean() for k in ('model', 'GeometricBrownian'))
    return dict(crps=round(model, 4), brownian=round(baseline, 4), skill=round(1 - model/baseline, 4))


def run(path, arm) -> dict:
    "Train one arm on a file and score it"
    bars, _ = repair_klines(read_klines(path))
    cfg, began = settings(bars, *arm), time.time()
    with tempfile.TemporaryDirectory() as out:
        result = fit(bars, cfg, f'{out}/run', judge=False)
        seconds = round(time.time() - began)
        losses = {f'{s}_loss': round(g.val_loss.min(), 4) for s, g in result.history.groupby('stage')}
        return losses | score(result, bars, cfg) | dict(seconds=seconds)


def main():
    files = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files.add_argument('files', nargs='+')
    columns = ['file', 'start', 'tokenizer_steps', 'predictor_steps', 'lr', 'lookback']
    done = pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    key = lambda row: tuple(str(row[c]) for c in columns)
    known = {key(o) for o in done}
    for arm in ARMS:
        for path in files.parse_args().files:
            row = dict(zip(columns, (Path(path).name, *arm)))
            if key(row) in known: continue
            done.append(row | run(path, arm))
            pd.DataFrame(done).to_csv(OUT, index=False)
            print(done[-1], flush=True)


if __name__ == '__main__': main()
