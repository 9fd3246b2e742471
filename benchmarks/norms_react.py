"""Early stopping and a schedule that also read gradient norms, each with and without, on real bars, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/norms_react.py

A small predictor on the tokens of a small trained tokenizer, windows of 24 daily bars of three shares, validation on
later bars; at a sensible rate, and at rates a hundred and a thousand times as high. Writes
norms_react.csv beside this file.
"""

import argparse, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch import nn
from kronos_nb.training.guard import NormSchedule, NormStopping
from kronos_nb.training.optim import Clip, EarlyStopping, Schedule, adamw
from kronos_nb.data.read import sample_klines
from kronos_nb.data.normalize import ZScore
from kronos_nb.data.window import WindowDataset, split_by_time
from kronos_nb.training.learner import Learner, TensorSource
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.task import TokenizerTask

p = argparse.ArgumentParser()
p.add_argument('--seeds', type=int, default=6)
p.add_argument('--out', default=str(Path(__file__).parent))
a = p.parse_args()
bars, began = sample_klines(), time.time()
split = split_by_time(bars[bars.symbol.isin(('AAPL', 'IBM', 'MSFT'))], 0.7, 0.3, 0.0)
none = dict(ffn_dropout_p=0.0, attn_dropout_p=0.0, resid_dropout_p=0.0)


def arrays(part, stride):
    values, stamp, _ = (ds := WindowDataset(part, 20, 4, ZScore(), stride)).arrays(np.arange(len(ds)))
    return values, stamp


torch.manual_seed(0)
tokenizer = KronosTokenizer(
    d_in=6,
    d_model=16,
    n_heads=2,
    ff_dim=16,
    n_enc_layers=2,
    n_dec_layers=2,
    s1_bits=5,
    s2_bits=4,
    beta=0.05,
    gamma0=1.0,
    gamma=1.1,
    zeta=0.05,
    group_size=3,
    **none,
)
task, source = TokenizerTask(tokenizer), TensorSource(dict(x=arrays(split.train, 6)[0]), 32, seed=0)
Learner(task, source, None, adamw(task, 3e-3), callbacks=[Schedule('onecycle', 0.1), Clip(2.0)]).fit(10)
tokenizer.eval()


def encoded(part, stride):
    values, stamp = arrays(part, stride)
    with torch.no_grad():
        s1, s2 = tokenizer.encode(values, half=True)
    return dict(s1=s1, s2=s2, stamp=stamp)


train, val = encoded(split.train, 6), encoded(split.val, 30)


class Task(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.model = Kronos(
            s1_bits=5,
            s2_bits=4,
            n_layers=1,
            d_model=32,
            n_heads=2,
            ff_dim=64,
            token_dropout_p=0.0,
            learn_te=True,
            **none,
        )

    def forward(self, s1, s2, stamp):
        return self.model.loss(s1, s2, stamp)


def run(seed, lr, schedule, *callbacks, steps=160):
    task = Task(seed)
    learn = Learner(
        task,
        TensorSource(train, 16, seed=seed),
        TensorSource(val, 256),
        adamw(task, lr),
        callbacks=[Schedule(schedule, 0.1), Clip(3.0), *callbacks],
        val_every=20,
    )
    learn.fit(-(-steps // len(learn.source)), steps)
    lowered = any(r.get('lr_scale', 1) < 1 for r in learn.history.steps)
    acted = lowered or any(n['kind'] == 'norm_stopping' for n in learn.history.notes)
    return dict(val_loss=min(v['val_loss'] for v in learn.history.validations), steps=learn.step, acted=int(acted))


WAYS = {
    'stopping': (lambda: [EarlyStopping(3)], lambda: [NormStopping(3)], 'constant'),
    'constant rate': (lambda: [], lambda: [NormSchedule()], 'constant'),
    'OneCycle': (lambda: [], lambda: [NormSchedule()], 'onecycle'),
}
rows = []
for lr in (3e-3, 0.3, 3.0):
    for name, (without, with_norms, schedule) in WAYS.items():
        for seed in range(a.seeds):
            for norms, make in enumerate((without, with_norms)):
                rows.append(dict(lr=lr, added_to=name, seed=seed, norms=norms) | run(seed, lr, schedule, *make()))
    print(f'{time.time() - began:.0f} s; lr {lr:g}', flush=True)
ab = pd.DataFrame(rows)
ab.to_csv(Path(a.out) / 'norms_react.csv', index=False, float_format='%.6f')
print(ab.groupby(['lr', 'added_to', 'norms'], sort=False)[['val_loss', 'steps', 'acted']].mean().round(4).to_string())
