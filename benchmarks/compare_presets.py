"""The two BTC presets side by side, and the DOGE workflow, from a base trained on other bars, at a reduced size.

    OMP_NUM_THREADS=1 python benchmarks/compare_presets.py BTC_FILE DOGE_FILE --out runs/presets

BTC_FILE and DOGE_FILE are hourly bars in anything `read_klines` takes. Reduced, and equal for both presets: the model
(tiny instead of small), the windows of an epoch and of a validation. Everything else, the epochs
too, is the preset's. Interrupt it when you like: the same command goes on.
"""

import argparse, json, time
from pathlib import Path
import numpy as np, pandas as pd
from kronos_nb.config import Config
from kronos_nb.judging.compare import compare
from kronos_nb.data.read import read_klines
from kronos_nb.train import fit
from kronos_nb.training.history import numbers
from kronos_nb.training.run import Run, RunStage

p = argparse.ArgumentParser()
p.add_argument('btc')
p.add_argument('doge')
p.add_argument('--out', default='runs/presets')
p.add_argument('--windows', type=int, default=320, help='windows of an epoch')
p.add_argument('--seeds', type=int, default=3)
p.add_argument('--origins', type=int, default=240)
p.add_argument('--only', choices=('btc', 'doge'))
p.add_argument(
    '--same-tokens',
    action='store_true',
    help='also train the predictor alone on the tokens of the base: the same task for both presets',
)
a = p.parse_args()
out = Path(a.out)
btc, doge = read_klines(a.btc, 'BTCUSDT'), read_klines(a.doge, 'DOGEUSDT')
PRESETS = 'btc_original', 'btc_optimized'
small = lambda windows, val: (
    {f'{s}.{k}': v for s in ('tokenizer', 'predictor') for k, v in dict(init='scratch', size='tiny', model={}).items()}
    | {
        'data.windows_per_epoch': windows,
        'data.val_windows': val,
        'runtime.plots': False,
        'runtime.progress': False,
        'runtime.precision': 'fp32',
        'runtime.log_every': 1,
    }
)


def run(data, cfg, folder):
    "Train unless that is done, and keep the seconds of this process that it took"
    if (folder / 'cpu_seconds.json').exists():
        return
    t = time.process_time()
    if fit(data, cfg, folder).interrupted:
        raise SystemExit(f'{folder} was interrupted; run the same command again to go on')
    (folder / 'cpu_seconds.json').write_text(json.dumps(time.process_time() - t))


def base(preset, bars, others, windows, epochs):
    "A model from scratch on other bars, all of them before the first bar that chooses or judges"
    cfg, folder = Config.preset(preset), out / f'base_of_{others.symbol.iloc[0]}'
    cut = bars.timestamps.iloc[int(len(bars) * cfg.data.train)]
    cfg = cfg.replace(
        **small(windows, 160),
        **{
            f'{s}.{k}': v
            for s in ('tokenizer', 'predictor')
            for k, v in dict(lr=1e-3, epochs=epochs, patience=None).items()
        },
        **{'data.test': 0.0, 'data.train': 0.9, 'data.val': 0.1},
        augment=dict(noise_std=0.0, feature_dropout=0.0, time_shift_max=0, scale_low=1.0, scale_high=1.0),
    )
    run(others[others.timestamps < cut], cfg, folder)
    return folder


def epochs_to(losses, level):
    "First epoch whose validation loss is at most `level`"
    return next((i + 1 for i, v in enumerate(losses) if v <= level), np.nan)


def spread(stage):
    "Standard deviation of the step losses about their mean in each epoch, over the last half of the epochs"
    rows = pd.DataFrame(stage.history.steps)
    rows = rows[rows.epoch > rows.epoch.max() / 2]
    return (rows.loss - rows.groupby('epoch').loss.transform('mean')).std()


def facts(preset, stage, goal):
    "What the guide makes claims about, of one stage; `goal`: the validation loss to be reached"
    h, seconds = stage.history, stage.folder.parent / 'cpu_seconds.json'
    start, *v = numbers(h.validations, 'val_loss')[1]  # the first is of the base
    return dict(
        stage=stage.name,
        preset=preset,
        start=start,
        best=min(v),
        at_epoch=int(np.argmin(v)) + 1,
        last=v[-1],
        epochs=len(v),
        epochs_to_goal=epochs_to(v, goal),
        spread=spread(stage),
        updates=stage.status['step'],
        cpu_seconds=round(json.loads(seconds.read_text())) if stage.name == 'predictor' and seconds.exists() else None,
    )


def claims(seeds):
    "A row for every stage, preset and seed that is there; predictors on the tokens of the base, so that both "
    "have the same task"
    rows = []
    for stage, name in (('tokenizer', ''), ('predictor', '_same_tokens')):
        for seed in range(seeds):
            at = {k: RunStage(out / f'{k}{name}_{seed}' / stage) for k in PRESETS}
            if not all(o.finished for o in at.values()):
                continue
            goal = min(numbers(at['btc_original'].history.validations, 'val_loss')[1][1:])
            rows += [dict(seed=seed) | facts(k, o, goal) for k, o in at.items()]
    return pd.DataFrame(rows)


if a.only != 'doge':
    start = base('btc_original', btc, doge, 3200, 5)
    for seed in range(a.seeds):
        cfgs = {
            k: Config.preset(k).replace(
                **small(a.windows, 160),
                **{'evaluate.origins': a.origins, 'runtime.seed': seed, 'runtime.init_from': str(start)},
            )
            for k in PRESETS
        }
        for k, cfg in cfgs.items():
            if (
                not Run(out / f'{k}_{seed}').stage('tokenizer').finished
                and fit(btc, cfg, out / f'{k}_{seed}', **{'runtime.only': 'tokenizer'}).interrupted
            ):
                raise SystemExit('interrupted; run the same command again to go on')
        print(claims(seed + 1).round(5).T.to_string(), flush=True)
        for k, cfg in cfgs.items():
            run(btc, cfg, out / f'{k}_{seed}')
            if a.same_tokens:
                run(
                    btc,
                    cfg.replace(**{'runtime.only': 'predictor', 'predictor.tokenizer': Run(start).tokenizer()}),
                    out / f'{k}_same_tokens_{seed}',
                )  # the predictor alone, on the base's tokens: the same task for both
    claims(a.seeds).to_csv(out / 'claims.csv', index=False, float_format='%.5g')
    print(claims(a.seeds).round(5).T.to_string())
    print(
        'processor seconds',
        {o.parent.name: round(json.loads(o.read_text())) for o in sorted(out.glob('*/cpu_seconds.json'))},
    )
    for seed in range(a.seeds):
        print(compare([out / f'{k}_{seed}' for k in PRESETS]).to_markdown(), flush=True)
if a.only != 'btc':
    start = base('doge', doge, btc, 3200, 5)
    run(
        doge,
        Config.preset('doge').replace(
            **small(a.windows, 160), **{'evaluate.origins': 32, 'runtime.init_from': str(start)}
        ),
        out / 'doge',
    )
    from kronos_nb.judging.evaluation import Evaluation

    print(Evaluation.load(out / 'doge').to_markdown())
