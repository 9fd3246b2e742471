"""Windows as views against pickled windows and per-item pandas slices: speed, memory, build time.

    OMP_NUM_THREADS=1 python benchmarks/data.py BARS [--rows 1000000 10000000]

BARS is a file of at least 30,000 bars (the committed figures: 31,973 hourly bars of DOGEUSDT). Without it, as many
synthetic bars are used. The ways are compared for equality first, then timed in turn on the same windows, repeat by
repeat. Prints Markdown.
"""
import argparse
import gc
import importlib.util
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kronos_nb.core import FEATURES, STAMPS
from kronos_nb.display import md_table
from kronos_nb.data.normalize import COMPILE_FROM, MedianMAD, ZScore, compiles
from kronos_nb.data.read import read_klines
from kronos_nb.data.window import WindowDataset

L, H = 400, 120
T = L + H
BATCH = 64  # windows a repeat
NORMALIZERS = dict(zscore=ZScore(), median_mad=MedianMAD())
WAYS = [(kind, how) for kind in NORMALIZERS for how in ('on the fly', 'rolling')]


def synthetic(n, symbols):
    "Return random walks as one float block without spare copies, so that the peak before building is the frame itself"
    r, m = np.random.default_rng(0), n // symbols
    x = np.empty((6, m * symbols))
    for s in range(symbols):
        o, h, l, c, v, a = x[:, s * m:(s + 1) * m]
        c[:] = np.exp(r.normal(0, .002, m).cumsum()) * 100
        o[:] = np.r_[c[0], c[:-1]]
        h[:] = np.maximum(o, c) * 1.001
        l[:] = np.minimum(o, c) * .999
        v[:] = r.lognormal(8, 1, m)
        a[:] = v * c
    bars = pd.DataFrame(x.T, columns=list(FEATURES), copy=False)
    minutes = np.datetime64('2000-01-01', 'ns') + np.arange(m) * np.timedelta64(60, 's')
    bars.insert(0, 'timestamps', np.tile(minutes, symbols))
    names = pd.Index([f'S{i:03d}' for i in range(symbols)])
    bars.insert(0, 'symbol', names.take(np.repeat(np.arange(symbols), m)))
    return bars


class PandasItems:
    "One window at a time, sliced from a DataFrame: how such a dataset is commonly written"
    def __init__(self, bars):
        t = bars.timestamps.dt
        parts = (t.minute, t.hour, t.day_of_week, t.day, t.month)
        self.df = bars.reset_index(drop=True).assign(**dict(zip(STAMPS, parts)))

    def __getitem__(self, i):
        w = self.df.iloc[i:i + T]
        x, stamps = (w[list(names)].values.astype(np.float32) for names in (FEATURES, STAMPS))
        past = x[:L]
        std = past.std(0)
        x = np.clip((x - past.mean(0)) / (std + np.minimum(1e-5, .01 * std)), -5, 5)
        return torch.from_numpy(x), torch.from_numpy(stamps)


def floor(med, mad):
    "Return the scale of features, of which some may not move"
    level = abs(med)
    size = np.where(level > 0, np.minimum(1e-5, 1e-5 * level), 1e-5)
    return np.where(mad <= 1e-9 * level, size, mad)


def loop_mad(x, starts):
    "Return median and scaled MAD of each lookback by a NumPy loop"
    out = []
    for s in starts:
        past = x[s:s + L]
        med = np.median(past, 0)
        out.append((med, 1.4826 * np.median(np.abs(past - med), 0)))
    return out


def loop_windows(x, starts):
    "Return normalised windows by the same loop"
    out = []
    for s, (med, mad) in zip(starts, loop_mad(x, starts)):
        z = (x[s:s + T] - med) / floor(med, mad)
        out.append(np.clip(z, -5, 5).astype(np.float32))
    return out


def timed(f):
    "Return what `f()` returns, and the seconds it took"
    t = time.perf_counter()
    out = f()
    return out, time.perf_counter() - t


def pickled(ds):
    "Return every window pickled and loaded again, the seconds to make, write and load them, and the bytes of the file"
    def make():
        batches = (ds.arrays(np.arange(i, min(i + 256, len(ds))))[:2] for i in range(0, len(ds), 256))
        return [(x.numpy().copy(), s.numpy().astype(np.float32)) for xs, stamps in batches for x, s in zip(xs, stamps)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'w.pkl'
        items, made = timed(make)
        with open(path, 'wb') as f: _, wrote = timed(lambda: pickle.dump(items, f, protocol=5))
        del items
        with open(path, 'rb') as f: items, loaded = timed(lambda: pickle.load(f))
        return items, (made, wrote, loaded), path.stat().st_size


def rate(ways, repeats, rng, n):
    "Return the median microseconds a window of each of `ways`: {name: function of starts}, timed in turn"
    took = {k: [] for k in ways}
    for _ in range(repeats):
        for k, f in ways.items():
            starts = rng.integers(0, n, BATCH)
            took[k].append(timed(lambda: f(starts))[1] / BATCH * 1e6)
    return {k: float(np.median(v)) for k, v in took.items()}


def table(rows, columns):
    "Print a Markdown table"
    cells = [[f'{o:.3g}' if isinstance(o, float) else o for o in r] for r in rows]
    print(md_table(pd.DataFrame(cells, columns=columns, dtype=object)) + '\n', flush=True)


def same_windows(items, sets, starts):
    "Raise unless pandas, the NumPy loop and the datasets agree on the windows at `starts`"
    x = sets[WAYS[0]].x
    for i in starts:
        med, mad = loop_mad(x, [i])[0]
        for how in ('on the fly', 'rolling'):
            np.testing.assert_allclose(sets['zscore', how].arrays([i])[0][0], items[i][0].numpy(), atol=2e-3)
            scale = sets['median_mad', how].arrays([i])[2]
            np.testing.assert_allclose(scale.loc[0], med, rtol=1e-6)
            np.testing.assert_allclose(scale.scale[0], floor(med, mad), rtol=1e-6)


def compiled_rate(x):
    "Return the microseconds a bar of compiled medians, without compiling; None where numba is absent"
    if not compiles(10**9): return None
    norm = MedianMAD()
    next(norm.rolling(np.ones((500, 1)), 9, compiled=True))
    return timed(lambda: list(norm.rolling(x, L, compiled=True)))[1] / len(x) * 1e6


def kept_bytes(ds):
    "Return the bytes of the statistics that `ds` keeps"
    return sum(getattr(ds, k).nbytes for k in ('_loc', '_scale') if hasattr(ds, k))


def small(bars, repeats):
    "Print all ways on one file of bars"
    sets, build = {}, {}
    for way in WAYS:
        make = lambda: WindowDataset(bars, L, H, NORMALIZERS[way[0]], max_gap=None, statistics=way[1])
        sets[way], build[way] = timed(make)
    ds, rng = sets[WAYS[0]], np.random.default_rng(0)
    compiled = compiled_rate(ds.x)
    items, build_items = timed(lambda: PandasItems(bars))
    same_windows(items, sets, rng.integers(0, len(ds), 20))
    pkl, seconds, size = pickled(ds)
    ways = {'pandas': lambda at: [items[i] for i in at],
            'pickled': lambda at: [torch.stack(o) for o in zip(*[map(torch.from_numpy, pkl[i]) for i in at])],
            'loop': lambda at: loop_mad(ds.x, at)}
    us = rate(ways | {k: o.arrays for k, o in sets.items()}, repeats, rng, len(ds))
    ref = us['pandas']
    rows = [['per-item pandas', build_items, 0., ref, 1.],
            ['pickled windows (in memory)', sum(seconds), size / ds.x.nbytes, us['pickled'], ref / us['pickled']]]
    for k, o in sets.items():
        beside = kept_bytes(o) / (o.x.nbytes + o.stamps.nbytes)
        rows.append([f'views, {k[0]}, {k[1]}', build[k], beside, us[k], ref / us[k]])
    print(f'## {len(bars):,} bars, {len(ds):,} windows of {L}+{H}\n')
    table(rows, ['way', 'build, s', 'kept beside the bars, x', 'us a window', 'x per-item pandas'])
    describe_pickles(seconds, size, size / len(ds))
    describe_medians(us['loop'], build['median_mad', 'rolling'] / len(bars) * 1e6, compiled)


def describe_pickles(seconds, size, a_window):
    "Print what pickled windows cost"
    made, wrote, loaded = seconds
    print(f'Pickles: {made:.1f} s to make, {wrote:.1f} s to write, {loaded:.1f} s to load, {size/1e9:.2f} GB. '
          f'Computed from that, not measured: {a_window*1e6/1e9:.0f} GB for 1M windows, '
          f'{a_window*1e7/1e9:.0f} GB for 10M.\n')


def describe_medians(loop, sorting, compiled):
    "Print what median and MAD cost, in microseconds"
    numba = 'numba is absent'
    if compiled is not None:
        numba = (f'compiled code takes {compiled:.2f} us a bar, {loop/compiled:.0f}x the loop '
                 '(without the second or two of compiling)')
    print(f'Median and MAD: the NumPy loop takes {loop:.1f} us a window for the statistics alone. To keep them, '
          f'sorting (the choice below {COMPILE_FROM:,} bars) takes {sorting:.2f} us a bar; {numba}.\n')


def memory():
    "Return this process's memory now and its peak since the last call, in bytes, where the kernel's mark can be reset"
    status = dict(o.split(':', 1) for o in Path('/proc/self/status').read_text().splitlines())
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass
    return tuple(int(status[k].split()[0]) * 1024 for k in ('VmRSS', 'VmHWM'))


def warm_up(kind, how, n):
    "Load libraries and compile loops, before the clock and the memory are read"
    ds = WindowDataset(synthetic(3000, 2), L, H, NORMALIZERS[kind], statistics=how)
    ds.compiled = how == 'rolling' and compiles(n)
    if ds.compiled: next(ds.normalizer.rolling(np.ones((500, 1)), 9, compiled=True))
    ds.arrays(range(BATCH))


def same_medians(ds, numbers):
    "Raise unless the dataset's medians are those of the NumPy loop"
    for i, (med, mad) in zip(numbers, loop_mad(ds.x, ds.rows(numbers))):
        row = int(ds.rows([i])[0])
        median_mad = ds.normalizer.kind == 'median_mad'
        scale = ds.arrays([i])[2] if median_mad else MedianMAD().fit(ds.x[row:row + L], L)
        np.testing.assert_allclose(np.ravel(scale.loc), med, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(scale.scale), floor(med, mad), rtol=1e-6)


def large(kind, n, how, repeats):
    "Print one configuration, in a process of its own: build seconds, peak and kept memory, then the ways in turn"
    bars, rng = synthetic(n, 20), np.random.default_rng(0)
    warm_up(kind, how, n)
    gc.collect()
    before, _ = memory()
    ds, build = timed(lambda: WindowDataset(bars, L, H, NORMALIZERS[kind], statistics=how))
    for _ in range(3): ds.arrays(rng.integers(0, len(ds), BATCH))
    after, peak = memory()
    raw = ds.x.nbytes + ds.stamps.nbytes
    items = PandasItems(bars)
    same_medians(ds, rng.integers(0, len(ds), 20))
    ways = dict(views=ds.arrays, pandas=lambda at: [items[i] for i in ds.rows(at)],
                loop=lambda at: loop_mad(ds.x, ds.rows(at)), whole=lambda at: loop_windows(ds.x, ds.rows(at)))
    us = rate(ways, repeats, rng, len(ds))
    print(*(f'{o:.6f}' for o in (build, (peak - before) / raw, (after - before) / raw, *us.values())))


def large_row(kind, n, how, repeats):
    "Return a row of the table of `n` synthetic bars"
    command = [sys.executable, __file__, '--repeats', str(repeats), '--child', kind, str(n), how]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    build, peak, kept, us, pandas, loop, whole = map(float, out.split())
    a_bar, mad = build / n * 1e6, kind == 'median_mad'
    return [f'views, {kind}, {how}', build, peak - 1, kept - 1, us, pandas, pandas / us,
            loop / a_bar if mad and how == 'rolling' else '', whole / (us + a_bar) if mad else '']


def versions():
    "Return the machine and the versions of what was measured"
    numba = 'present' if importlib.util.find_spec('numba') else 'absent'
    return (f'{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, '
            f'numpy {np.__version__}, pandas {pd.__version__}, numba {numba}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('bars', nargs='?')
    p.add_argument('--rows', type=float, nargs='*', default=[1e6, 1e7])
    p.add_argument('--repeats', type=int, default=41)
    p.add_argument('--child', nargs=3, help='used by the script itself')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.child: return large(a.child[0], int(a.child[1]), a.child[2], a.repeats)
    print(f'{versions()}\n')
    small(read_klines(a.bars) if a.bars else synthetic(31_973, 1), a.repeats)
    for n in map(int, a.rows):
        print(f'## {n:,} synthetic bars of 20 symbols, every window of {L}+{H}\n')
        table([large_row(kind, n, how, a.repeats) for kind, how in WAYS],
              ['way', 'build, s', 'peak beside the raw arrays, x', 'kept beside them, x', 'us a window',
               'per-item pandas, us', 'x per-item pandas', 'statistics alone, x NumPy loop',
               'windows with build, x NumPy loop'])


if __name__ == '__main__': main()
