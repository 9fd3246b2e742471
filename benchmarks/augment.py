"""Augmentation on real bars: train with and without each effect, let validation choose, score once on other bars.

    OMP_NUM_THREADS=1 python benchmarks/augment.py

AAPL, GOOG, IBM and MSFT, split by time 70/15/15. A small tokenizer is trained once on plain windows. A small
predictor
is then trained on its tokens for 300 steps of 32 windows, per arm and seed. Every 50 steps it looks at the validation
bars, and the look with the lowest loss is kept (early stopping). The score is the cross-entropy of the next bar on
the
test bars at that look.

*Scarce* takes every eighth window, each seen about nine times. *Plenty* takes every window, each seen about once
(three
arms, at most four seeds). Writes augment.csv beside this file, a row per trial. Rows that are there are not run
again.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kronos_nb.core import seed_everything
from kronos_nb.data.augment import Augment
from kronos_nb.data.read import sample_klines
from kronos_nb.data.window import BatchSampler, WindowDataset, split_by_time
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer

ARMS = dict(none=None, noise=Augment(noise_std=.05), scale=Augment(scale_range=(.8, 1.25)),
            dropout=Augment(feature_dropout=.1), shift=Augment(time_shift_max=4), all=Augment(.05, (.8, 1.25), .1, 4))
PLENTY_ARMS = ('none', 'scale', 'all')
NO_DROPOUT = dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
LOOK_EVERY = 50  # steps


def datasets():
    "Return the training windows by name, and the validation and test windows"
    split = split_by_time(sample_klines(['AAPL', 'GOOG', 'IBM', 'MSFT']))
    train = dict(scarce=WindowDataset(split.train, 56, 8, stride=8), plenty=WindowDataset(split.train, 56, 8))
    held_out = dict(val=WindowDataset(split.val, 56, 8, stride=5), test=WindowDataset(split.test, 56, 8, stride=5))
    return train, held_out


def train_model(model, data, loss, seed, lr, look=lambda: None):
    "Train for 300 steps of 32 windows, and return what `look` gave every 50 steps"
    sampler, opt, seen = BatchSampler(data, 32, seed), torch.optim.AdamW(model.parameters(), lr=lr), []
    for step in range(300):
        epoch, k = divmod(step, len(sampler))
        loss(sampler.batch(epoch, k), epoch).backward()
        opt.step()
        opt.zero_grad()
        if step % LOOK_EVERY == LOOK_EVERY - 1: seen.append(look())
    return seen


def train_tokenizer(data):
    "Return a small tokenizer trained on plain windows"
    seed_everything(0)
    tokenizer = KronosTokenizer(d_in=6, d_model=48, n_heads=4, ff_dim=96, n_enc_layers=3, n_dec_layers=3, **NO_DROPOUT,
                                s1_bits=5, s2_bits=5, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=5)
    train_model(tokenizer, data, lambda rows, epoch: tokenizer.loss(data.arrays(rows)[0])['loss'], 0, 3e-3)
    return tokenizer.eval()


@torch.no_grad()
def tokens(tokenizer, data, rows, augment=None, seed=0, epoch=0):
    "Return tokens and stamps of windows, augmented where `augment` is given"
    x, stamp, _ = data.arrays(rows, augment and augment.shifts(seed, epoch, rows))
    if augment is not None: x = augment.values(x, seed, epoch, rows)
    return *tokenizer.encode(x, half=True), stamp


def trial(tokenizer, data, held_out, augment, seed):
    "Return the losses at the look that validation chose, and after the last step"
    seed_everything(seed)
    model = Kronos(s1_bits=5, s2_bits=5, n_layers=3, d_model=64, n_heads=4, ff_dim=128, **NO_DROPOUT,
                   token_dropout_p=0., learn_te=True)
    @torch.no_grad()
    def look(): return [float(model.loss(*o)['loss']) for o in held_out.values()]
    def loss(rows, epoch): return model.loss(*tokens(tokenizer, data, rows, augment, seed, epoch))['loss']
    seen = train_model(model, data, loss, seed, 2e-3, look)
    kept = min(range(len(seen)), key=lambda i: seen[i][0])
    (val, test), (last_val, last_test) = seen[kept], seen[-1]
    return dict(step=LOOK_EVERY * (kept + 1), val=val, test=test, last_val=last_val, last_test=last_test)


def trials(seeds, data):
    "Yield (data, arm, seed) of every trial"
    for name in data:
        for seed in range(seeds if name == 'scarce' else min(seeds, 4)):
            for arm in ARMS if name == 'scarce' else PLENTY_ARMS: yield name, arm, seed


def summary(found):
    "Return a row per arm: losses, and the gain over the same seed without augmentation"
    plain = found[found.arm == 'none'].set_index(['data', 'seed']).test
    gain = plain.loc[list(zip(found.data, found.seed))].to_numpy() - found.test
    return found.assign(gain=gain).groupby(['data', 'arm'], sort=False).agg(
        step=('step', 'median'), val=('val', 'mean'), test=('test', 'mean'), gain=('gain', 'mean'), sem=('gain', 'sem'),
        least=('gain', 'min'), most=('gain', 'max')).round(4)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=6)
    p.add_argument('--data', nargs='+', default=['scarce', 'plenty'])
    p.add_argument('--out', type=Path, default=Path(__file__).with_name('augment.csv'))
    a = p.parse_args()
    train, parts = datasets()
    tokenizer = train_tokenizer(train['plenty'])
    held_out = {k: tokens(tokenizer, o, np.arange(len(o))) for k, o in parts.items()}
    print('windows:', {k: len(o) for k, o in {**train, **parts}.items()}, flush=True)
    rows = pd.read_csv(a.out).to_dict('records') if a.out.exists() else []
    done = {(o['data'], o['arm'], o['seed']) for o in rows}
    for name, arm, seed in trials(a.seeds, a.data):
        if (name, arm, seed) in done: continue
        began = time.time()
        rows.append(dict(data=name, arm=arm, seed=seed) | trial(tokenizer, train[name], held_out, ARMS[arm], seed))
        pd.DataFrame(rows).to_csv(a.out, index=False, float_format='%.6f')
        print(f'{name}, {arm}, seed {seed}: {time.time() - began:.0f} s', flush=True)
    print(summary(pd.DataFrame(rows)).to_string())


if __name__ == '__main__': main()
