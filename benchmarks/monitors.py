"""What every monitor together costs in a long training: processor time, memory and open files

    OMP_NUM_THREADS=1 python benchmarks/monitors.py --minutes 60 [--small]

The tokenizer and then the predictor of the quickstart train, each for half of the time, with every monitor on: norms
of blocks, update ratios, TensorBoard, the resource guard, pictures in files and a live picture, early stopping and
schedule by gradient norms, progress. An epoch has 20,000 windows, and pictures stay every 1,000 steps. `--small` takes
models whose step costs next to nothing, so that the same time holds many more steps: it shows whether memory grows with
them. The processor time of a callback is taken around its events; memory is the resident set.
"""
import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil

from kronos_nb.data.read import sample_klines
from kronos_nb.speed import processor
from kronos_nb.train import fit
from kronos_nb.training.learner import Callback, Learner

TRAINING = {'Schedule', 'Clip', 'FiniteCheck', 'Best', 'Checkpoint', 'Interrupts', 'Probe'}   # everything else watches
SETTINGS = {
    'runtime.monitor_blocks': True, 'runtime.trackers': ['tensorboard'], 'runtime.live_plot': True,
    'runtime.max_cpu': 100., 'runtime.max_memory': 100., 'runtime.threads': 1, 'runtime.workers': 0,
    'runtime.device': 'cpu', 'runtime.save_steps': 1000, 'predictor.tokenizer': 'bundled',
    'data.windows_per_epoch': 20_000}
TINY = dict(d_model=8, n_heads=2, ff_dim=16)
SMALL = {
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch', 'predictor.batch_size': 2, 'tokenizer.batch_size': 2,
    'tokenizer.model': TINY | dict(n_enc_layers=2, n_dec_layers=2), 'predictor.model': TINY | dict(n_layers=2),
    'data.lookback_window': 12, 'data.predict_window': 4, 'data.val_windows': 64}
ENDLESS = dict(epochs=10_000, patience=1000, norm_stopping=True, norm_schedule=True)


class Probe(Callback):
    "Note the processor time of each callback, and memory and open files every so many seconds"
    order = 1000

    def __init__(self, every):
        self.every, self.spent, self.seen, self.process = every, {}, [], psutil.Process()

    def event(self, learn, name):
        "Do what `Learner.event` does, with the clock in hand"
        for c in learn.callbacks:
            f = getattr(c, name, None)
            if f is None:
                continue
            began = time.process_time()
            try:
                f(learn)
            finally:
                kind = c.name.split('(')[0]
                self.spent[kind] = self.spent.get(kind, 0.) + time.process_time() - began

    def before_fit(self, learn):
        self.began, self.due = (time.monotonic(), time.process_time()), 0.

    def after_step(self, learn):
        self.last = learn.step
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + self.every
        self.seen.append((learn.step, self.process.memory_info().rss/2**20, self.process.num_fds()))

    def cleanup_fit(self, learn):
        self.seconds, self.cpu = time.monotonic() - self.began[0], time.process_time() - self.began[1]


def train(stage, minutes, out, every, small) -> Probe:
    "Train one stage for so many minutes"
    probe = Probe(every)
    more = {'runtime.only': stage, 'runtime.max_time': f'{round(60*minutes)}s'}
    more |= {f'{stage}.{k}': v for k, v in ENDLESS.items()} | (SMALL if small else {})
    with mock.patch.object(Learner, 'event', lambda learn, name: probe.event(learn, name)), \
            mock.patch('kronos_nb.training.monitor._in_notebook', lambda: True), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fit(sample_klines('GOOG'), 'quickstart', out, callbacks=[probe], **SETTINGS | more)
    return probe


def row(stage, probe) -> dict:
    "Return the line of a stage: memory and files after the first tenth of its time, and at its end"
    first, last = probe.seen[len(probe.seen)//10], probe.seen[-1]
    watching = sum(v for k, v in probe.spent.items() if k not in TRAINING)
    return {
        'stage': stage, 'minutes': f'{probe.seconds/60:.1f}', 'steps': f'{probe.last:,}',
        'CPU seconds': f'{probe.cpu:.0f}', 'monitors': f'{watching/probe.cpu:.2%}',
        'MiB': f'{first[1]:.0f}, {last[1]:.0f}', 'growth': f'{last[1]/first[1] - 1:.2%}',
        'open files': f'{first[2]}, {last[2]}'}


def table(rows) -> str:
    lines = [list(rows[0]), ['---']*len(rows[0]), *(list(map(str, r.values())) for r in rows)]
    return '\n'.join('| ' + ' | '.join(o) + ' |' for o in lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, default=60, help='of both stages together')
    p.add_argument('--every', type=float, default=10, help='seconds between looks at memory and files')
    p.add_argument('--small', action='store_true', help='models whose step costs next to nothing')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        probes = {s: train(s, a.minutes/2, Path(d)/s, a.every, a.small) for s in ('tokenizer', 'predictor')}
    print(processor(), '\n')
    print(table([row(s, p) for s, p in probes.items()]), '\n')
    names = sorted({k for p in probes.values() for k in p.spent})
    share = {s: {k: v/p.cpu for k, v in p.spent.items()} for s, p in probes.items()}
    print(table([dict(callback=k) | {s: f'{share[s].get(k, 0):.3%}' for s in probes} for k in names]))


if __name__ == '__main__':
    main()
