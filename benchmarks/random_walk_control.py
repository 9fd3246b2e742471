"""Fine-tune Kronos itself on random walks, where nothing can be learnt, and on walks with a planted signal, where
something can.

    OMP_NUM_THREADS=1 python benchmarks/random_walk_control.py --out runs/control --walks 20
    OMP_NUM_THREADS=1 python benchmarks/random_walk_control.py --out runs/control --walks 8 --signal 0.8 --lookback 20
    --horizon 1 --bars 6000 --base-bars 6000 --epochs 6 --base-epochs 6 --origins 300

A small base is trained on other walks; each walk fine-tunes both stages from it on its first half and is judged on
its second. What is finished is kept: the same command goes on.
"""

import argparse, time
from pathlib import Path
import pandas as pd
from kronos_nb.judging.baselines import GeometricBrownian, LastValue, random_walks
from kronos_nb.config import Config
from kronos_nb.evaluate import control
from kronos_nb.forecast import Forecaster
from kronos_nb.train import fit

p = argparse.ArgumentParser()
p.add_argument('--out', default='runs/control')
p.add_argument('--walks', type=int, default=20)
p.add_argument('--signal', type=float, default=0.0)
p.add_argument('--epochs', type=int, default=3)
p.add_argument('--windows', type=int, help='windows of an epoch; none: all')
p.add_argument('--base-epochs', type=int, default=4)
p.add_argument('--bars', type=int, default=2000)
p.add_argument('--lookback', type=int, default=60)
p.add_argument('--horizon', type=int, default=2)
p.add_argument('--base-bars', type=int, default=3000)
p.add_argument('--origins', type=int, default=150)
a = p.parse_args()
out, L, H = Path(a.out), a.lookback, a.horizon
cfg = Config.preset('quickstart').replace(
    base=dict(symbols=None),
    evaluate=dict(calibrate='off'),
    data=dict(symbols=None, lookback_window=L, predict_window=H, embargo=0, train=0.85, val=0.15, test=0.0),
    runtime=dict(progress=False, plots=False, log_every=1000, save_steps=1000),
    **{
        f'{s}.{k}': v
        for s in ('tokenizer', 'predictor')
        for k, v in dict(init='scratch', size='tiny', epochs=a.epochs, lr=1e-3, patience=None).items()
    },
)


def trained(bars, cfg, folder):
    if not (folder / 'report.md').exists() and fit(bars, cfg, folder).interrupted:
        raise SystemExit(f'{folder} was interrupted; run the same command again to go on')
    return Forecaster.from_pretrained(folder)


base = trained(
    random_walks(a.base_bars, ('X', 'Y'), seed=10**6),
    cfg.replace(**{'tokenizer.epochs': a.base_epochs, 'predictor.epochs': a.base_epochs}),
    out / 'base',
)


def judged(i):
    "Verdict of walk `i`: fine-tuned on its first half, judged on its second"
    folder = out / f'signal_{a.signal:g}' / f'walk_{i}'
    if (folder / 'verdict.csv').exists():
        return pd.read_csv(folder / 'verdict.csv')
    recipe = lambda train: (
        trained(
            train, cfg.replace(**{'runtime.init_from': str(out / 'base'), 'data.windows_per_epoch': a.windows}), folder
        ),
        base,
    )
    d = control(
        recipe,
        1,
        a.signal,
        a.bars,
        L,
        H,
        seed=500 + i,
        origins=a.origins,
        paths=50,
        baselines=[LastValue(), GeometricBrownian()],
        top_p=1.0,
    ).assign(walk=i)
    d.to_csv(folder / 'verdict.csv', index=False)
    print(d.round(4).to_string(header=not i, index=False), flush=True)
    return d


t = time.time()
d = pd.concat([judged(i) for i in range(a.walks)], ignore_index=True)
print(d.round(4).to_string(index=False))
print(d.verdict.value_counts().to_string())
print(f'{time.time() - t:.0f} s in this session')
