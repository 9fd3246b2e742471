"""What does a side channel cost: seconds of the processor for a training step and a forecast, and memory

    OMP_NUM_THREADS=1 python benchmarks/side_cost.py [--repeats 15] [--covariates 4]

Two sizes: the bundled tiny model with windows of 60 + 10 bars, and the architecture of Kronos-mini with 200 + 20. Each
variant takes its turn in every round, on the processor's clock, so that other work on the machine meets all of them:
ratios of medians are the result. `step` trains all weights; `step, channel alone` trains the channel of a frozen
predictor, whose gradients pass through every block on their way. Windows are cut, covariates joined and dropped as in a
run. Memory is the peak of a process of its own for each variant, beside one without a channel.
"""
import argparse
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch

from forecast import peak_memory
from kronos_nb.covariate import parse_covariates
from kronos_nb.data.covariates import covariate_table
from kronos_nb.data.window import WindowDataset
from kronos_nb.display import md_table
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import random_walks
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.side import side_spec
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.optim import adamw
from kronos_nb.training.task import PredictorTask, WindowSource, set_trainable

MINI = dict(s1_bits=10, s2_bits=10, n_layers=4, d_model=256, n_heads=4, ff_dim=512, ffn_dropout_p=.2, attn_dropout_p=0.,
            resid_dropout_p=.2, token_dropout_p=0., learn_te=True)
TOKENIZER = dict(d_in=6, d_model=256, n_heads=4, ff_dim=512, n_enc_layers=4, n_dec_layers=4, ffn_dropout_p=0.,
                 attn_dropout_p=0., resid_dropout_p=0., s1_bits=10, s2_bits=10, beta=.05, gamma0=1., gamma=1.1,
                 zeta=.05, group_size=5)
SIZES = dict(tiny=(60, 10, 32), mini=(200, 20, 8))   # lookback, horizon, batch
VARIANTS = 'without', 'all', 'side'


def pair(size):
    torch.manual_seed(0)
    if size == 'tiny': return KronosTokenizer.from_pretrained('bundled'), Kronos.from_pretrained('bundled')
    return KronosTokenizer(**TOKENIZER).eval(), Kronos(**MINI).eval()


def covariates_of(bars, n):
    g, L = np.random.default_rng(0), len(bars)
    values = {f'x{i}': g.normal(size=L).clip(-4, 4) for i in range(n)}
    kinds = {name: 'past' if i % 2 else 'future' for i, name in enumerate(values)}
    return covariate_table(parse_covariates(kinds), [bars[['timestamps']].assign(**values)])


class Trial:
    "A predictor with or without a channel, ready for steps and forecasts"
    def __init__(self, size, variant, n):
        bars, (L, H, batch) = random_walks(1500), SIZES[size]
        tokenizer, model = pair(size)
        self.table = covariates_of(bars, n) if variant != 'without' else None
        if self.table is not None: set_trainable(model.add_side(side_spec(self.table)), variant)
        self.bars, self.H, self.forecaster = bars, H, Forecaster(tokenizer, model, lookback_window=L)
        if self.table is not None: self.forecaster = self.forecaster.with_covariates(self.table)
        self.task, self.at = PredictorTask(model, tokenizer), 0
        data = WindowDataset(bars, L, H, covariates=self.table)
        self.source = WindowSource(data, batch, side=.1 if self.table is not None else None)
        own = dict(apart=list(model.side.parameters()), apart_lr=1e-3) if self.table is not None else {}
        self.opt = adamw(self.task, 1e-5, **own)

    def step(self):
        self.task.train()
        self.task(**self.source.load(0, self.at % len(self.source)).tensors)['loss'].backward()
        self.opt.step()
        self.opt.zero_grad()
        self.at += 1

    def forecast(self):
        past, future = self.bars.iloc[-self.H - 300:-self.H], self.bars.timestamps.iloc[-self.H:]
        self.forecaster.predict_many([past], self.H, futures=[future], paths=50, progress=False)


def seconds(action):
    begun = time.process_time()
    action()
    return time.process_time() - begun


def timed(size, repeats, n):
    "Return the medians of each variant, in seconds"
    trials, found = {v: Trial(size, v, n) for v in VARIANTS}, {}
    for i in range(repeats + 3):
        for v, t in trials.items():
            for what in ('step', 'forecast'):
                if what == 'forecast' and v == 'side': continue   # it forecasts as `all` does
                took = seconds(getattr(t, what))
                if i >= 3: found.setdefault((what, v), []).append(took)
    return {k: float(np.median(v)) for k, v in found.items()}


def peak(size, variant, n):
    "Return the peak memory of a process that trains five steps, in MB"
    call = [sys.executable, __file__, '--covariates', str(n), '--one', size, variant]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def one(size, variant, n):
    trial = Trial(size, variant, n)
    for _ in range(5): trial.step()
    print(json.dumps(peak_memory()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=15)
    p.add_argument('--covariates', type=int, default=4)
    p.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES))
    p.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.one: return one(*a.one, a.covariates)
    for size in a.sizes:
        t, n = timed(size, a.repeats, a.covariates), a.covariates
        model = Trial(size, 'all', n).forecaster.predictor
        row = dict(model=size, weights=f'{model.n_params:,}',
                   channel=f'{sum(o.numel() for o in model.side.parameters()):,}')
        for name, v in (('step', 'all'), ('step, channel alone', 'side')):
            row[name] = f"{1000*t['step', v]:.1f} ms, {t['step', v]/t['step', 'without']:.2f}x"
        row['forecast'] = f"{1000*t['forecast', 'all']:.1f} ms, {t['forecast', 'all']/t['forecast', 'without']:.2f}x"
        print(md_table(pd.DataFrame([row])), flush=True)
        memory = {v: peak(size, v, n) for v in VARIANTS}
        more = ', '.join(f"{v} {memory[v] - memory['without']:+.0f} MB" for v in VARIANTS[1:])
        print(f"\nmemory: without {memory['without']:.0f} MB, {more}\n", flush=True)


if __name__ == '__main__': main()
