"""How long until the predictor is as good as the reference's training makes it, from the same start on the same bars.

usage: python benchmarks/time_to_loss.py BARS --reference PATH [--steps 800] [--seeds 3]

BARS is a file that `read_klines` takes, PATH a checkout of the reference. A small predictor (width 64, three blocks)
learns the tokens of one tokenizer, which was trained
before the clock starts and is the same for both. The reference's side does what its fine-tuning script does at every
step: slice and normalise frames window by window, encode,
forward (s2 learns behind an s1 that is drawn from the model), backward, clip, AdamW, OneCycle. Ours does what `fit`
does: tokens once, teacher forcing, the same optimiser and
schedule over fewer steps. What counts is the next-bar cross-entropy on later windows, the mean of both token levels,
each s2 behind the true s1, for both sides. Validation is not timed; time is that of the processor, with one thread,
which other work on the machine does not disturb much.
"""

import argparse, random, statistics, sys, time
import numpy as np, torch
from torch import nn
from kronos_nb.training.optim import adamw
from kronos_nb.core import FEATURES, threads
from kronos_nb.data.read import read_klines
from kronos_nb.data.window import WindowDataset, split_by_time
from kronos_nb.kernels.parallel import heap_kept
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.task import (
    TINY,
    PredictorTask,
    TokenizerTask,
    TokenSource,
    WindowSource,
    encode_windows,
    matmul_precision,
)

a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
a.add_argument('bars')
a.add_argument('--reference', required=True)
a.add_argument('--steps', type=int, default=800)
a.add_argument('--seeds', type=int, default=3)
a.add_argument('--batch', type=int, default=32)
a.add_argument('--lookback', type=int, default=90)
a.add_argument('--predict', type=int, default=10)
a.add_argument('--lr', type=float, default=1e-3)
a.add_argument('--shares', type=float, nargs='+', default=[1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
a = a.parse_args()
sys.path.insert(0, a.reference)
from model import Kronos as RefKronos, KronosTokenizer as RefTokenizer

bars = read_klines(a.bars, 'BARS')
split = split_by_time(bars, 0.8, 0.1, 0.1)
data = WindowDataset(split.train, a.lookback, a.predict)


def cycle(opt, steps):
    return torch.optim.lr_scheduler.OneCycleLR(opt, a.lr, total_steps=steps, pct_start=0.03, div_factor=10)


def tokenizer():
    torch.manual_seed(0)
    model = KronosTokenizer(**TINY['tokenizer'])
    task, source = TokenizerTask(model).train(), WindowSource(data, a.batch, 0)
    opt = adamw(task, 1e-3)
    for s in range(300):
        task(source.load(0, s).tensors['x'])['loss'].backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


def quality(model, held_out):
    "Mean cross-entropy of both levels on held-out windows"
    with torch.no_grad():
        rows = [PredictorTask(model.eval())(**held_out.load(0, i).tensors) for i in range(len(held_out))]
    return [float(torch.stack([r[k] for r in rows]).mean()) for k in ('loss', 'ce_s1', 'ce_s2')]


class Frames:
    "Windows cut from a frame one by one, as the reference's dataset does"

    def __init__(self, frame, seed):
        t = frame['timestamps']
        self.frame = frame[list(FEATURES)].assign(
            minute=t.dt.minute, hour=t.dt.hour, weekday=t.dt.dayofweek, day=t.dt.day, month=t.dt.month
        )
        self.rng, self.window = random.Random(seed), a.lookback + a.predict

    def one(self):
        i = self.rng.randint(0, len(self.frame) - self.window)
        w = self.frame.iloc[i : i + self.window]
        x, stamp = (
            w[list(FEATURES)].values.astype(np.float32),
            w[['minute', 'hour', 'weekday', 'day', 'month']].values.astype(np.float32),
        )
        past = x[: a.lookback]
        return torch.from_numpy(np.clip((x - past.mean(0)) / (past.std(0) + 1e-5), -5, 5)), torch.from_numpy(stamp)

    def batch(self):
        return [torch.stack(o) for o in zip(*(self.one() for _ in range(a.batch)))]


def reference(tok, start, seed):
    "Seconds and the weights after `a.steps` steps of the reference's loop"
    t, m = RefTokenizer(**tok.config), RefKronos(**start.config)
    t.load_state_dict(tok.state_dict())
    m.load_state_dict(start.state_dict())
    t.eval()
    m.train()
    torch.manual_seed(seed)
    frames = Frames(split.train, seed)
    opt = torch.optim.AdamW(m.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule, began = cycle(opt, a.steps), time.process_time()
    for _ in range(a.steps):
        x, stamp = frames.batch()
        with torch.no_grad():
            s1, s2 = t.encode(x, half=True)
        logits = m(s1[:, :-1], s2[:, :-1], stamp[:, :-1])
        loss = m.head.compute_loss(logits[0], logits[1], s1[:, 1:], s2[:, 1:])[0]
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 3.0)
        opt.step()
        schedule.step()
    seconds = time.process_time() - began
    out = Kronos(**start.config)
    out.load_state_dict(m.state_dict())
    return seconds, out


def ours(tok, start, seed, steps):
    "Seconds and the model after `steps` steps of ours, encoding included"
    model = Kronos(**start.config)
    model.load_state_dict(start.state_dict())
    torch.manual_seed(seed)
    with matmul_precision('medium'), heap_kept():
        began = time.process_time()
        part = (
            data
            if steps * a.batch >= len(data)
            else WindowDataset(split.train, a.lookback, a.predict, stride=max(1, len(data) // (steps * a.batch)))
        )
        source = TokenSource(part, encode_windows(tok, part), a.batch, seed)
        task = PredictorTask(model).train()
        opt = adamw(task, a.lr)
        schedule = cycle(opt, steps)
        for s in range(steps):
            task(**source.load(*divmod(s, len(source))).tensors)['loss'].backward()
            nn.utils.clip_grad_norm_(task.parameters(), 3.0)
            opt.step()
            schedule.step()
            opt.zero_grad(set_to_none=True)
        return time.process_time() - began, model


with threads(1):
    tok = tokenizer()
    held = WindowDataset(split.val, a.lookback, a.predict, stride=16)
    held = TokenSource(held, encode_windows(tok, held), 64, mode='sequential')
    print(
        f"torch {torch.__version__}, one thread, {len(bars)} bars, {len(data)} windows of {a.lookback} + "
        f"{a.predict} to learn from, {len(held.dataset)} to measure, batch {a.batch}, lr {a.lr:g}"
    )
    rows = []
    for seed in range(a.seeds):
        torch.manual_seed(seed)
        start = Kronos(**TINY['predictor'])
        seconds, model = reference(tok, start, seed)
        goal = quality(model, held)
        print(
            f"seed {seed}: start {quality(start, held)[0]:.4f}; reference, {a.steps} steps, {seconds:.1f} s: "
            f"{goal[0]:.4f} (s1 {goal[1]:.4f}, s2 {goal[2]:.4f})"
        )
        for share in a.shares:
            t, model = ours(tok, start, seed, max(20, round(a.steps * share)))
            q = quality(model, held)
            print(
                f"    ours, {max(20, round(a.steps * share)):4} steps, {t:6.1f} s: {q[0]:.4f} (s1 {q[1]:.4f}, s2 "
                f"{q[2]:.4f}){'  <- as good' if q[0] <= goal[0] else ''}"
            )
            if q[0] <= goal[0]:
                rows.append(seconds / t)
                break
        else:
            rows.append(float('nan'))
    print(
        f"time to the reference's final cross-entropy: {', '.join(f'{o:.1f}x' for o in rows)} less; median "
        f"{statistics.median(rows):.1f}x"
    )
