"""What the clock of the market is worth: a model trained on local stamps, asked with the same bars in UTC.

    OMP_NUM_THREADS=1 python benchmarks/clock.py

Five-minute bars of a Chinese share (bundled), split by time. Per seed one tokenizer and two predictors of the size
`tiny` from scratch: one reads the clock of Shanghai, the other UTC. Each is judged on the last bars by the
cross-entropy of the next token, with its own stamps and with those of the other clock. Prints and writes clock.md.
"""

import argparse, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from kronos_nb.core import seed_everything
from kronos_nb.data.normalize import ZScore
from kronos_nb.data.read import sample_klines
from kronos_nb.data.window import WindowDataset, split_by_time
from kronos_nb.display import md_table
from kronos_nb.training.learner import Learner
from kronos_nb.training.optim import Clip, Schedule, adamw
from kronos_nb.training.task import PredictorTask, TokenizerTask, TokenSource, WindowSource, build_model, encode_windows

p = argparse.ArgumentParser()
p.add_argument('--seeds', type=int, default=5)
p.add_argument('--epochs', type=int, default=8)
p.add_argument('--lookback', type=int, default=96)
p.add_argument('--horizon', type=int, default=24)
p.add_argument('--out', default=str(Path(__file__).parent))
a = p.parse_args()
CLOCKS = {'Shanghai': 'Asia/Shanghai', 'UTC': None}
split, began = split_by_time(sample_klines('ASHARE_5MIN'), .7, .0, .3), time.time()


def windows(part, clock, stride):
    return WindowDataset(part, a.lookback, a.horizon, ZScore(), stride, market_tz=CLOCKS[clock])


def trained(task, source, lr):
    Learner(task, source, None, adamw(task, lr), callbacks=[Schedule('onecycle', .1), Clip(2.)]).fit(a.epochs)
    return task.model.eval()


def loss(model, tokens, data):
    "Return the cross-entropy of the tokens of the horizon's bars, per bar"
    stamps = data.stamps[data.rows(range(len(data)))[:, None] + np.arange(data.window)]
    s1, s2 = (torch.from_numpy(tokens[..., i].astype(np.int64)) for i in (0, 1))
    with torch.no_grad():
        return float(model.loss(s1, s2, torch.from_numpy(stamps.astype(np.int64)))['loss'])


rows = []
for seed in range(a.seeds):
    seed_everything(seed)
    data = windows(split.train, 'UTC', 2)
    source = WindowSource(data, 32, seed=seed)
    tokenizer = trained(TokenizerTask(build_model('tokenizer', 'scratch', 'tiny')), source, 1e-3)
    learn = encode_windows(tokenizer, windows(split.train, 'UTC', 2))
    judge = encode_windows(tokenizer, windows(split.test, 'UTC', 12))
    for clock in CLOCKS:
        seed_everything(seed)
        task = PredictorTask(build_model('predictor', 'scratch', 'tiny'), tokenizer)
        model = trained(task, TokenSource(windows(split.train, clock, 2), learn, 32, seed=seed), 1e-3)
        for asked in CLOCKS:
            value = loss(model, judge, windows(split.test, asked, 12))
            rows.append(dict(seed=seed, trained=clock, asked=asked, loss=value))
    print(f'seed {seed}: {time.time() - began:.0f} s', flush=True)

table = pd.DataFrame(rows).pivot_table(index='seed', columns=['trained', 'asked'], values='loss')
own = {clock: table[clock, clock] for clock in CLOCKS}
shown = [('Shanghai, asked with UTC, against its own clock', table['Shanghai', 'UTC'] / own['Shanghai'] - 1),
         ('UTC, asked with Shanghai, against its own clock', table['UTC', 'Shanghai'] / own['UTC'] - 1),
         ('trained and asked in UTC, against both on the clock of Shanghai', own['UTC'] / own['Shanghai'] - 1)]
out = pd.DataFrame([dict(trained=name, change=f'{100 * c.mean():+.2f} %', standard_error=f'{100 * c.sem():.2f} %',
                         worse=f'{int((c > 0).sum())} of {len(c)}') for name, c in shown])
text = ("# The clock of the market\n\nCross-entropy of the next token on the last 30 % of the five-minute bars of a "
        f"Chinese share, {a.seeds} seeds, `{Path(__file__).name}`. Models are `tiny`, trained from scratch for "
        f"{a.epochs} epochs on windows of {a.lookback} + {a.horizon} bars.\n\n{md_table(out)}\n")
print(text)
Path(a.out, 'clock.md').write_text(text)
