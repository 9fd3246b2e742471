"""Averages of weights on real bars, over seeds: what the choice by validation is worth on bars that chose nothing.

    OMP_NUM_THREADS=1 python benchmarks/averaging.py

A tokenizer and a predictor trained on AAPL, IBM and MSFT (before GOOG's validation begins) are the base. The
predictor is then trained on GOOG with several seeds in three ways. Candidates are validated on GOOG's
validation part; what they are worth is read from its test part. Writes averaging.csv and averaging_soups.csv beside
this file.
"""

import argparse, copy, math, time
from pathlib import Path
import pandas as pd, torch
from kronos_nb.average import (
    EMA,
    LAWA,
    choose_weights,
    greedy_soup,
    inner_model,
    mean_weights,
    on_validation,
    weights_of,
)
from kronos_nb.training.optim import Best, Clip, Schedule, adamw
from kronos_nb.data.read import sample_klines
from kronos_nb.data.normalize import ZScore
from kronos_nb.data.window import WindowDataset, split_by_time
from kronos_nb.training.learner import Callback, Learner
from kronos_nb.training.task import PredictorTask, TokenizerTask, TokenSource, WindowSource, build_model, encode_windows

p = argparse.ArgumentParser()
p.add_argument('--seeds', type=int, default=6)
p.add_argument('--out', default=str(Path(__file__).parent))
a = p.parse_args()
WAYS = {
    'from the base, OneCycle to 3e-4': ('base', 60, 3e-4, 'onecycle'),
    'from the base, constant 1e-3': ('base', 60, 1e-3, 'constant'),
    'from scratch, constant 3e-3': ('scratch', 120, 3e-3, 'constant'),
}

bars, began = sample_klines(), time.time()
goog = split_by_time(bars[bars.symbol == 'GOOG'], 0.7, 0.15, 0.15, embargo=10)
others = split_by_time(
    bars[bars.symbol.isin(('AAPL', 'IBM', 'MSFT')) & (bars.timestamps < goog.val.timestamps.min())], 0.9, 0.1, 0.0
)
windows = lambda b, stride=1: WindowDataset(b, 60, 10, ZScore(), stride)
base_train, parts = (
    windows(others.train, 5),
    {k: windows(getattr(goog, k), 1 if k == 'train' else 2) for k in ('train', 'val', 'test')},
)


def train(task, source, valid, steps, lr, *callbacks, schedule='onecycle', seed=0):
    learn = Learner(
        task,
        source,
        valid,
        adamw(task, lr),
        callbacks=[Schedule(schedule, 0.1), Clip(1.0), *callbacks],
        seed=seed,
        val_every=10 if callbacks else None,
    )
    return learn.fit(-(-steps // len(source)), steps)


class Keep(Callback):
    "Weights in memory: of the best validation, and of every tenth step"

    order = Best.order

    def before_fit(self, learn):
        self.best, self.all = (math.inf, None), []

    def after_validate(self, learn):
        now = weights_of(inner_model(learn))
        self.all.append(now)
        if learn.metrics['val_loss'] < self.best[0]:
            self.best = learn.metrics['val_loss'], now


torch.manual_seed(0)
tokenizer = build_model('tokenizer', 'scratch', 'tiny')
train(TokenizerTask(tokenizer), WindowSource(base_train, 32), None, 150, 3e-3)
tokenizer.eval()
tokens = lambda ds, size=32, **kw: TokenSource(ds, encode_windows(tokenizer, ds), size, **kw)
base, sources = (
    build_model('predictor', 'scratch', 'tiny'),
    {k: tokens(ds, 64, mode='sequential') for k, ds in parts.items() if k != 'train'},
)
learn = train(PredictorTask(base), tokens(base_train), sources['val'], 250, 3e-3)
print(f'{time.time() - began:.0f} s; the base on validation: {learn.metrics}', flush=True)


def one_run(way, seed):
    start, steps, lr, schedule = WAYS[way]
    torch.manual_seed(seed)
    model = copy.deepcopy(base) if start == 'base' else build_model('predictor', 'scratch', 'tiny')
    keep, ema, lawa = Keep(), EMA(), LAWA(0.3)
    learn = train(
        PredictorTask(model),
        tokens(parts['train'], seed=seed),
        sources['val'],
        steps,
        lr,
        keep,
        ema,
        lawa,
        schedule=schedule,
        seed=seed,
    )
    given = dict(
        last=weights_of(model),
        best=keep.best[1],
        ema=ema.weights,
        lawa=lawa.weights,
        mean_of_5=mean_weights(keep.all[-5:]),
    )
    val = choose_weights(given, on_validation(learn))
    learn.valid = sources['test']
    test, table = (
        {k: on_validation(learn)(w) for k, w in given.items()},
        dict(zip(val.table.candidate, val.table.val_loss)),
    )
    return [
        dict(way=way, seed=seed, candidate=k, val=table[o], test=test[o])
        for k, o in [*((o, o) for o in given), ('chosen', val.name)]
    ], val.weights


rows, soups = [], []
for way in WAYS:
    winners = {}
    for seed in range(a.seeds):
        got, winners[f'seed {seed}'] = one_run(way, seed)
        rows += got
    learn = Learner(PredictorTask(copy.deepcopy(base)), sources['val'], sources['val'])
    soup, table = greedy_soup(winners, on_validation(learn))
    first_two = mean_weights([winners[o] for o in table.run[:2]])
    val = dict(
        val_best_run=table.val_loss.min(),
        val_first_two=on_validation(learn)(first_two),
        val_soup=on_validation(learn)(soup),
    )
    learn.valid = sources['test']
    soups.append(
        dict(way=way, runs_in_the_soup=int(table.kept.sum()))
        | val
        | dict(test_best_run=on_validation(learn)(winners[table.run[0]]), test_soup=on_validation(learn)(soup))
    )
    print(f'{time.time() - began:.0f} s; {way}', flush=True)
measured, soups = pd.DataFrame(rows), pd.DataFrame(soups)
measured.to_csv(Path(a.out) / 'averaging.csv', index=False, float_format='%.6f')
soups.to_csv(Path(a.out) / 'averaging_soups.csv', index=False, float_format='%.6f')
print(
    measured.groupby(['way', 'candidate'], sort=False)[['val', 'test']].agg(['mean', 'std']).round(4).to_string(),
    soups.round(4).to_string(),
    sep='\n',
)
