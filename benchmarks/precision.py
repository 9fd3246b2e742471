"""Both stages of a whole training in float32 and in bfloat16: the same bars, windows and start, several seeds.

python benchmarks/precision.py --seeds 0 1 2        # writes precision.csv, prints the table
"""

import argparse, shutil, tempfile, time
from pathlib import Path
import pandas as pd
from kronos_nb.config import Config
from kronos_nb.train import fit
from kronos_nb.training.run import Run

SETTINGS = {
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.symbols': ('AAPL', 'GOOG', 'IBM', 'MSFT'),
    'data.lookback_window': 90,
    'data.windows_per_epoch': 1024,
    'data.val_windows': 512,
    'data.train': 0.8,
    'data.val': 0.2,
    'data.test': 0.0,
    'tokenizer.epochs': 12,
    'predictor.epochs': 12,
    'tokenizer.lr': 1e-3,
    'predictor.lr': 1e-3,
    'tokenizer.patience': None,
    'predictor.patience': None,
    'runtime.log_every': 1,
    'runtime.progress': False,
    'runtime.plots': False,
}


def one(seed, precision, tokenizer=None):
    "Rows of one run: every step's loss and every validation"
    out = Path(tempfile.mkdtemp()) / 'run'
    more = {} if tokenizer is None else {'runtime.only': 'predictor', 'predictor.tokenizer': str(tokenizer)}
    fit(
        'sample',
        Config.preset('quickstart', **SETTINGS, **more, **{'runtime.seed': seed, 'runtime.precision': precision}),
        out,
    )
    rows = []
    for stage in ('tokenizer', 'predictor')[tokenizer is not None :]:
        for kind, key in (('steps', 'loss'), ('validations', 'val_loss')):
            rows += [
                dict(
                    seed=seed,
                    precision=precision,
                    stage=stage,
                    step=o['step'],
                    what=key,
                    value=o[key],
                    **({'ce_s1': o['val_ce_s1'], 'ce_s2': o['val_ce_s2']} if 'val_ce_s1' in o else {}),
                )
                for o in getattr(Run(out).stage(stage).history, kind)
            ]
    return rows, out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--out', default=Path(__file__).with_suffix('.csv'))
    a, rows, began = p.parse_args(), [], time.time()
    for seed in a.seeds:
        full, out = one(seed, 'fp32')
        rows += full
        half, there = one(seed, 'bf16')
        rows += [r for r in half if r['stage'] == 'tokenizer']
        rows += one(seed, 'bf16', Run(out).tokenizer())[
            0
        ]  # the predictors speak the same tokens, so that their losses compare
        for o in (out, there):
            shutil.rmtree(o.parent)
        pd.DataFrame(rows).to_csv(a.out, index=False, float_format='%.6g')
        print(f'seed {seed}: {time.time() - began:.0f} s', flush=True)
    t = pd.DataFrame(rows)
    last = t[t.what == 'val_loss'].groupby(['stage', 'seed', 'precision']).value.last().unstack()
    print(
        (last.assign(difference=last.bf16 - last.fp32, percent=100 * (last.bf16 / last.fp32 - 1))).round(5).to_string()
    )
    print(
        t[t.what == 'val_loss'].dropna().groupby(['precision', 'seed'])[['ce_s1', 'ce_s2']].last().round(4).to_string()
    )


if __name__ == '__main__':
    main()
