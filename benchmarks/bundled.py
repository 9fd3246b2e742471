"""Which small base should ship, and how the presets should train it, by validation bars alone

    OMP_NUM_THREADS=1 python benchmarks/bundled.py SOLUSDT.parquet EURUSD.csv --bases old=FOLDER new=FOLDER
        [--seeds 0 1] [--arms 0 1]

A base is a folder with `tokenizer` and `predictor`, as `tools/make_base.py` writes it. Each arm fine-tunes a base with
the quickstart on the bundled share, and with `own` on the last 6,000 bars of every file. Columns beside the settings
are skills in CRPS of the close against the best naive forecast, on the validation dates that the model was calibrated
on: as drawn by the reference, with anchor and spread, and as delivered. Rows go to bundled.csv beside this file; rows
that are there are not made again. Bars that judge are not looked at.
"""
import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from gain import on_validation
from kronos_nb.data.read import read_klines, sample_klines
from kronos_nb.fitting.prepare import prepare
from kronos_nb.own import config_for
from kronos_nb.train import _chosen, fit

OUT = Path(__file__).with_suffix('.csv')
ARMS = [   # difference weight, factor on the epochs, factor on the learning rate
    (0., 1., 1.), (4., 1., 1.), (4., .5, 1.), (4., .5, 2.), (0., .5, 1.)]


def settings(data, preset, base, weight, epochs, lr, seed):
    "Return the configuration of an arm"
    cfg = config_for(data, preset)
    changes = {'tokenizer.init': str(base/'tokenizer'), 'predictor.init': str(base/'predictor'),
               'tokenizer.difference_weight': weight, 'runtime.seed': seed, 'runtime.progress': False,
               'runtime.plots': False, 'runtime.threads': 1, 'runtime.device': 'cpu'}
    for stage in ('tokenizer', 'predictor'):
        given = getattr(cfg, stage)
        changes |= {f'{stage}.epochs': max(1, round(given.epochs*epochs)), f'{stage}.lr': given.lr*lr}
    return cfg.replace(**changes)


def run(data, preset, base, arm, seed) -> dict:
    "Train an arm and return what its calibration saw"
    cfg, began = settings(data, preset, base, *arm, seed), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        result = fit(data, cfg, f'{out}/run', judge=False)
        calibration = _chosen(result.forecaster(), prepare(data, cfg), cfg)
    found = dict(zip(('drawn', 'alone', 'delivered'), on_validation(calibration).values()))
    return {k: round(v, 4) for k, v in found.items()} | dict(seconds=round(time.process_time() - began))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='*')
    parser.add_argument('--bases', nargs='+', required=True)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--arms', nargs='+', type=int, default=range(len(ARMS)), help='which rows of ARMS')
    args = parser.parse_args()
    bases = dict(o.split('=', 1) for o in args.bases)
    columns = ['file', 'base', 'difference', 'epochs', 'lr', 'seed']
    done = pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    for seed in args.seeds:
        for arm in (ARMS[i] for i in args.arms):
            for path in (None, *args.files):
                data = read_klines(path).groupby('symbol').tail(6000) if path else sample_klines('GOOG')
                for name, folder in bases.items():
                    row = dict(zip(columns, (Path(path).name if path else 'quickstart', name, *arm, seed)))
                    if any(all(o[k] == v for k, v in row.items()) for o in done): continue
                    done.append(row | run(data, 'own' if path else 'quickstart', Path(folder), arm, seed))
                    pd.DataFrame(done).to_csv(OUT, index=False)
                    print(done[-1], flush=True)


if __name__ == '__main__': main()
