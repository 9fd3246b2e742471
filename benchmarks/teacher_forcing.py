"""Teacher forcing against an s1 that the model samples: same start, same windows, real bars, the quickstart's size.

    OMP_NUM_THREADS=1 python benchmarks/teacher_forcing.py

The second token of a bar (s2) is conditioned on the first (s1). `forced` conditions it on the s1 that the bar has.
`sampled` conditions it on one drawn from the model's own distribution, as the reference's fine-tuning scripts do.
Both
models are judged in both ways.
"""
import argparse
import copy
import time

import numpy as np
import pandas as pd
import torch

from kronos_nb.config import Config
from kronos_nb.fitting.prepare import prepare
from kronos_nb.training.learner import Learner
from kronos_nb.training.optim import Clip, Schedule, adamw
from kronos_nb.training.task import PredictorTask, TokenizerTask, TokenSource, WindowSource, build_model, encode_windows

LOSSES = ['ce_s1', 'ce_s2', 'ce_s2_sampled']


class Task(PredictorTask):
    "Train one way; in validation report s2 given the true s1, and given a sampled one"
    def __init__(self, model, sampled):
        super().__init__(model)
        self.sampled = sampled

    def forward(self, s1, s2, stamp):
        s1, s2 = s1.long(), s2.long()
        if self.training: return self.model.loss(s1, s2, stamp, sample_s1=self.sampled)
        forced, drawn = self.model.loss(s1, s2, stamp), self.model.loss(s1, s2, stamp, sample_s1=True)
        return forced | dict(ce_s2_sampled=drawn['ce_s2'])


def frequencies(train, val, bits):
    "Return the cross-entropy of knowing only how often each token occurs"
    out = {}
    for i, name in enumerate(('ce_s1', 'ce_s2')):
        p = np.bincount(train[..., i].ravel(), minlength=2**bits[i]) + 1.
        out[name] = float(-np.log(p/p.sum())[val[:, 1:, i].ravel()].mean())
    return out


def train_tokenizer(windows):
    "Return the tokenizer that both models share"
    torch.manual_seed(0)
    task = TokenizerTask(build_model('tokenizer', 'scratch', 'tiny'))
    callbacks = [Schedule('onecycle', .1), Clip(2.)]
    Learner(task, WindowSource(windows, 64, seed=0), None, adamw(task, 2e-3), callbacks=callbacks).fit(4)
    return task.model


def train_predictor(model, data, train, val, sampled, seed, epochs):
    "Return the losses of every validation of one model"
    task = Task(model, sampled)
    sources = TokenSource(data.train, train, 64, seed=seed), TokenSource(data.val, val, 64, mode='sequential')
    learner = Learner(task, *sources, adamw(task, 2e-3, weight_decay=.05), seed=seed, log_every=50,
                      callbacks=[Schedule('onecycle', .1), Clip(3.)])
    seen = learner.fit(epochs).history.validations
    return [dict(epoch=v['epoch'], step=v['step']) | {k: v[f'val_{k}'] for k in LOSSES} for v in seen]


def report(rows, epochs):
    "Print the mean over the seeds by epoch, and every model at the end"
    df = pd.DataFrame(rows)
    by_epoch = df[df.s1 != 'frequencies'].pivot_table(index='epoch', columns='s1', values=LOSSES)
    print('\nValidation cross-entropy per token level (nats), by epoch, mean of the seeds:')
    print(by_epoch.round(3).to_string())
    last = df[df.epoch.isin((0, epochs))]
    print(f'\nAfter {epochs} epochs:')
    print(last.drop(columns=['epoch', 'step']).round(4).to_string(index=False))
    print(last.groupby('s1', sort=False)[LOSSES].agg(['mean', 'std']).round(4).to_string())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--symbols', nargs='+', default=['GOOG'], help='of the bundled daily bars')
    a = p.parse_args()
    data = prepare('sample', Config.preset('quickstart', **{'data.symbols': tuple(a.symbols)}))
    print(f'torch {torch.__version__}, {torch.get_num_threads()} thread(s); {data.train}; '
          f'{len(data.val):,} validation windows', flush=True)
    tokenizer = train_tokenizer(data.train)
    train, val = encode_windows(tokenizer, data.train), encode_windows(tokenizer, data.val)
    rows = [dict(seed='', s1='frequencies', epoch=0, step=0) | frequencies(train, val, (7, 7))]
    print(rows[-1], flush=True)
    for seed in range(a.seeds):
        torch.manual_seed(seed)
        start = build_model('predictor', 'scratch', 'tiny')
        for name in ('forced', 'sampled'):
            began = time.time()
            found = train_predictor(copy.deepcopy(start), data, train, val, name == 'sampled', seed, a.epochs)
            rows += [dict(seed=seed, s1=name) | o for o in found]
            print(f'seed {seed}, {name}: {rows[-1]}, {time.time() - began:.0f} s', flush=True)
    report(rows, a.epochs)


if __name__ == '__main__': main()
