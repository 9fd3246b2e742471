"""Augmentation on real bars: a model trained under each effect and under none, kept where validation says, and scored once on bars that chose nothing.

    OMP_NUM_THREADS=1 python benchmarks/augment.py

AAPL, GOOG, IBM and MSFT, split by time 70/15/15. A small tokenizer is trained once on plain windows; a small predictor is then trained on its tokens for 300 steps of 32 windows, per arm and seed. Every 50 steps it looks at the
validation bars, and the look with the lowest loss is what is kept (early stopping). The score is the cross-entropy of the next bar on the test bars at that look. Twice: *scarce*, every eighth window (each seen about nine
times), and *plenty*, every window (each seen about once; three arms and at most four seeds of it). Writes augment.csv beside this file, a row per trial; rows that are there already are not run again.
"""
import argparse, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from kronos_nb.core import seed_everything
from kronos_nb.data.augment import Augment
from kronos_nb.data.kline import sample_klines
from kronos_nb.data.window import BatchSampler, WindowDataset, split_by_time
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer

p = argparse.ArgumentParser()
p.add_argument('--seeds', type=int, default=6)
p.add_argument('--data', nargs='+', default=['scarce', 'plenty'])
p.add_argument('--out', default=str(Path(__file__).with_name('augment.csv')))
a = p.parse_args()
ARMS = dict(none=None, noise=Augment(noise_std=.05), scale=Augment(scale_range=(.8, 1.25)), dropout=Augment(feature_dropout=.1), shift=Augment(time_shift_max=4), all=Augment(.05, (.8, 1.25), .1, 4))

split = split_by_time(sample_klines(['AAPL', 'GOOG', 'IBM', 'MSFT']))
train = dict(scarce=WindowDataset(split.train, 56, 8, stride=8), plenty=WindowDataset(split.train, 56, 8))
parts = dict(val=WindowDataset(split.val, 56, 8, stride=5), test=WindowDataset(split.test, 56, 8, stride=5))
no_dropout = dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)

def fit(model, data, loss, seed, lr, look=lambda: None, steps=300, batch_size=32):
    "Train, and collect what `look` sees every 50 steps"
    sampler, opt, seen = BatchSampler(data, batch_size, seed), torch.optim.AdamW(model.parameters(), lr=lr), []
    for step in range(steps):
        epoch, k = divmod(step, len(sampler))
        loss(model, sampler.batch(epoch, k), epoch).backward(); opt.step(); opt.zero_grad()
        if step % 50 == 49: seen.append(look())
    return seen

def tokens(data, rows, aug=None, seed=0, epoch=0):
    "Tokens and stamps of windows, augmented where `aug` is given"
    x, stamp, _ = data.arrays(rows, aug and aug.shifts(seed, epoch, rows))
    with torch.no_grad(): return *tok.encode(x if aug is None else aug.values(x, seed, epoch, rows), half=True), stamp

def trial(data, aug, seed):
    "Losses at the look that validation chose, and after the last step"
    seed_everything(seed)
    model = Kronos(s1_bits=5, s2_bits=5, n_layers=3, d_model=64, n_heads=4, ff_dim=128, **no_dropout, token_dropout_p=0., learn_te=True)
    def look():
        with torch.no_grad(): return [float(model.loss(*o)['loss']) for o in held_out.values()]
    seen = fit(model, data, lambda m, rows, e: m.loss(*tokens(data, rows, aug, seed, e))['loss'], seed, 2e-3, look)
    kept = min(range(len(seen)), key=lambda i: seen[i][0])
    return dict(step=50*kept+50, val=seen[kept][0], test=seen[kept][1], last_val=seen[-1][0], last_test=seen[-1][1])

began, out = time.time(), Path(a.out)
seed_everything(0)
tok = KronosTokenizer(d_in=6, d_model=48, n_heads=4, ff_dim=96, n_enc_layers=3, n_dec_layers=3, **no_dropout, s1_bits=5, s2_bits=5, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=5)
fit(tok, train['plenty'], lambda m, rows, e: m.loss(train['plenty'].arrays(rows)[0])['loss'], 0, 3e-3)
tok.eval()
held_out = {k: tokens(o, np.arange(len(o))) for k, o in parts.items()}
print(f'{time.time()-began:.0f} s; windows:', {k: len(o) for k, o in {**train, **parts}.items()}, flush=True)

rows = pd.read_csv(out).to_dict('records') if out.exists() else []
done = {(o['data'], o['arm'], o['seed']) for o in rows}
for d in a.data:
    for seed in range(a.seeds if d == 'scarce' else min(a.seeds, 4)):
        for arm in ARMS if d == 'scarce' else ('none', 'scale', 'all'):
            if (d, arm, seed) in done: continue
            rows.append(dict(data=d, arm=arm, seed=seed) | trial(train[d], ARMS[arm], seed))
            pd.DataFrame(rows).to_csv(out, index=False, float_format='%.6f')
        print(f'{time.time()-began:.0f} s ({time.process_time():.0f} s of processor); {d}, seed {seed}', flush=True)
found = pd.DataFrame(rows)
plain = found[found.arm == 'none'].set_index(['data', 'seed']).test
found['gain'] = plain.loc[list(zip(found.data, found.seed))].to_numpy() - found.test
print(found.groupby(['data', 'arm'], sort=False).agg(step=('step', 'median'), val=('val', 'mean'), test=('test', 'mean'), gain=('gain', 'mean'), sem=('gain', 'sem'), least=('gain', 'min'), most=('gain', 'max')).round(4).to_string())
