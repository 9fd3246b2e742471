"""Windows as views against pickled windows and per-item pandas slices: speed, memory, build time.

    OMP_NUM_THREADS=1 python benchmarks/data.py BARS [--rows 1000000 10000000]

BARS is a file of at least 30,000 bars (the committed figures: 31,973 hourly bars of DOGEUSDT); without it, as many synthetic ones.
Ways are timed in turn, repeat by repeat, on the same windows, and compared for equality first. Prints Markdown.
"""
import argparse, gc, os, pickle, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from kronos_nb.core import FEATURES
from kronos_nb.data.kline import read_klines
from kronos_nb.data.normalize import COMPILE_FROM, MedianMAD, ZScore, compiles
from kronos_nb.data.window import WindowDataset

L, H = 400, 120
T = L + H

def synthetic(n, symbols):
    "Random walks, one float block and no spare copies, so that the peak before building is the frame itself"
    r, m = np.random.default_rng(0), n // symbols
    x = np.empty((6, m * symbols))
    for s in range(symbols):
        at = slice(s * m, (s + 1) * m)
        c = np.exp(r.normal(0, .002, m).cumsum()) * 100
        x[0, at], x[3, at] = np.r_[c[0], c[:-1]], c
        x[1, at], x[2, at] = np.maximum(x[0, at], c) * 1.001, np.minimum(x[0, at], c) * .999
        x[4, at] = r.lognormal(8, 1, m); x[5, at] = x[4, at] * c
    bars = pd.DataFrame(x.T, columns=list(FEATURES), copy=False)
    bars.insert(0, 'timestamps', np.tile(np.datetime64('2000-01-01', 'ns') + np.arange(m) * np.timedelta64(60, 's'), symbols))
    names = pd.Index([f'S{i:03d}' for i in range(symbols)])
    bars.insert(0, 'symbol', names.take(np.repeat(np.arange(symbols), m)))
    return bars

class PandasItems:
    "One window at a time, sliced from a DataFrame: how such a dataset is plainly written"
    def __init__(self, bars):
        self.df = bars.reset_index(drop=True)
        t = self.df.timestamps.dt
        for name, o in (('minute', t.minute), ('hour', t.hour), ('weekday', t.day_of_week), ('day', t.day), ('month', t.month)): self.df[name] = o
        self.features, self.stamps = list(FEATURES), ['minute', 'hour', 'weekday', 'day', 'month']
    def __getitem__(self, i):
        w = self.df.iloc[i:i + T]
        x, s = w[self.features].values.astype(np.float32), w[self.stamps].values.astype(np.float32)
        past = x[:L]
        x = np.clip((x - past.mean(0)) / (past.std(0) + 1e-5), -5, 5)
        return torch.from_numpy(x), torch.from_numpy(s)

def loop_mad(x, starts):
    "Median and MAD of each lookback by a NumPy loop"
    out = []
    for s in starts:
        past = x[s:s + L]
        med = np.median(past, 0)
        out.append((med, 1.4826 * np.median(np.abs(past - med), 0)))
    return out

def loop_windows(x, starts):
    "Normalised windows by the same loop"
    return [np.clip((x[s:s + T] - med) / np.maximum(mad, 1e-5), -5, 5).astype(np.float32) for s, (med, mad) in zip(starts, loop_mad(x, starts))]

def pickled(ds, folder, n_symbols=1):
    "Every window normalised, stacked in a list of arrays and pickled; seconds to build, write and load, bytes"
    t0 = time.perf_counter()
    items = [(x.numpy().copy(), s.numpy().astype(np.float32)) for i in range(0, len(ds), 256) for x, s in zip(*ds.arrays(np.arange(i, min(i + 256, len(ds))))[:2])]
    t1 = time.perf_counter()
    with open(folder/'w.pkl', 'wb') as f: pickle.dump(items, f, protocol=5)
    t2 = time.perf_counter()
    with open(folder/'w.pkl', 'rb') as f: items = pickle.load(f)
    t3 = time.perf_counter()
    return items, (t1 - t0, t2 - t1, t3 - t2), (folder/'w.pkl').stat().st_size

def rate(ways, repeats, rng, n):
    "Median microseconds a window of each way, in turn; {name: (function of starts, windows a repeat)}"
    took = {k: [] for k in ways}
    for _ in range(repeats):
        for k, (f, size) in ways.items():
            at = rng.integers(0, n, size)
            t = time.perf_counter(); f(at); took[k].append((time.perf_counter() - t) / size * 1e6)
    return {k: float(np.median(v)) for k, v in took.items()}

def table(rows, cols):
    print('| ' + ' | '.join(cols) + ' |\n|' + ' --- |' * len(cols))
    for r in rows: print('| ' + ' | '.join(f'{o:.3g}' if isinstance(o, float) else f'{o:,}' if isinstance(o, int) else str(o) for o in r) + ' |')
    print(flush=True)

def small(bars, repeats):
    rng, rows = np.random.default_rng(0), []
    build, sets = {}, {}
    for norm in (ZScore(), MedianMAD()):
        for how in ('on the fly', 'rolling'):
            t = time.perf_counter(); sets[norm.kind, how] = WindowDataset(bars, L, H, norm, max_gap=None, statistics=how); build[norm.kind, how] = time.perf_counter() - t
    quick = MedianMAD()
    if compiles(10**9): next(quick.rolling(np.ones((500, 1)), 9, compiled=True)); t = time.perf_counter(); list(quick.rolling(sets['zscore', 'on the fly'].x, L, compiled=True)); build['compiled'] = time.perf_counter() - t
    t = time.perf_counter(); items = PandasItems(bars); build['pandas'] = time.perf_counter() - t
    fly = sets['zscore', 'on the fly']
    n, x = len(fly), fly.x
    for i in rng.integers(0, n, 20):                                        # equal first, fast second
        want = items[i][0].numpy()
        for how in ('on the fly', 'rolling'): np.testing.assert_allclose(sets['zscore', how].arrays([i])[0][0], want, atol=2e-3)
        med, mad = loop_mad(x, [i])[0]
        for how in ('on the fly', 'rolling'):
            s = sets['median_mad', how].arrays([i])[2]
            np.testing.assert_allclose(s.loc[0], med, rtol=1e-6); np.testing.assert_allclose(s.scale[0], np.maximum(mad, 1e-5), rtol=1e-6)
    with tempfile.TemporaryDirectory() as d: pkl, (made, wrote, loaded), size = pickled(fly, Path(d))
    ways = {'per-item pandas': (lambda at: [items[i] for i in at], 64), 'pickled windows': (lambda at: [torch.stack(o) for o in zip(*[map(torch.from_numpy, pkl[i]) for i in at])], 64),
            'NumPy loop, median and MAD only': (lambda at: loop_mad(x, at), 64)}
    ways |= {k: ((lambda at, o=o: o.arrays(at)), 64) for k, o in sets.items()}
    us = rate(ways, repeats, rng, n)
    ref = us['per-item pandas']
    rows = [['per-item pandas', build['pandas'], 0., us['per-item pandas'], 1.], ['pickled windows (in memory)', made + wrote + loaded, size / x.nbytes, us['pickled windows'], ref / us['pickled windows']]]
    for k, o in sets.items():
        kept = sum(a.nbytes for a in (getattr(o, '_loc', None), getattr(o, '_scale', None)) if a is not None)
        rows.append([f'views, {k[0]}, {k[1]}', build[k], kept / (o.x.nbytes + o.stamps.nbytes), us[k], ref / us[k]])
    print(f'## {len(bars):,} bars, {n:,} windows of {L}+{H}\n')
    table(rows, ['way', 'build, s', 'kept beside the bars, x', 'us a window', 'x per-item pandas'])
    loop = us['NumPy loop, median and MAD only']
    print(f'Pickles: {made:.1f} s to make, {wrote:.1f} s to write, {loaded:.1f} s to load, {size/1e9:.2f} GB; computed from that, not measured: '
          f'{size/n*1e6/1e9:.0f} GB for 1M windows, {size/n*1e7/1e9:.0f} GB for 10M.\n')
    print(f'Median and MAD: the NumPy loop takes {loop:.1f} us a window for the statistics alone; building the kept ones by sorting, which is the choice below {COMPILE_FROM:,} bars, took {build["median_mad", "rolling"]/len(bars)*1e6:.2f} us a bar'
          + (f', and compiled {build["compiled"]/len(bars)*1e6:.2f} us a bar, {loop/(build["compiled"]/len(bars)*1e6):.0f}x the loop (without the second or two of compiling).\n' if 'compiled' in build else '; numba is absent.\n'))

def memory():
    "(now, peak since the last call) of this process in bytes; the kernel's peak mark is set back where that is possible"
    s = dict(o.split(':') for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(('VmHWM', 'VmRSS')))
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass
    return tuple(int(s[k].split()[0]) * 1024 for k in ('VmRSS', 'VmHWM'))

def large(n, kind, how, repeats):
    "One configuration in a process of its own: build seconds, peak and kept memory, then the ways in turn"
    bars, rng = synthetic(n, 20), np.random.default_rng(0)
    norm = dict(zscore=ZScore(), median_mad=MedianMAD())[kind]
    small = WindowDataset(synthetic(3000, 2), L, H, norm, statistics=how)
    small.compiled = how == 'rolling' and compiles(n)
    if small.compiled: next(norm.rolling(np.ones((500, 1)), 9, compiled=True))
    small.arrays(range(64))                                                # libraries are loaded and loops compiled before the clock and the memory are read
    gc.collect(); before, _ = memory()
    t = time.perf_counter(); ds = WindowDataset(bars, L, H, norm, statistics=how); build = time.perf_counter() - t
    for _ in range(3): ds.arrays(rng.integers(0, len(ds), 64))
    after, peak = memory()
    raw = ds.x.nbytes + ds.stamps.nbytes
    items, at = PandasItems(bars), rng.integers(0, len(ds), 20)
    for i, (med, mad) in zip(at, loop_mad(ds.x, ds.rows(at))):                # equal first, fast second
        s = ds.arrays([i])[2] if kind == 'median_mad' else MedianMAD().fit(ds.x[ds.rows([i])[0]:][:L], L)
        np.testing.assert_allclose(np.ravel(s.loc), med, rtol=1e-6); np.testing.assert_allclose(np.ravel(s.scale), np.maximum(mad, 1e-5), rtol=1e-6)
    us = rate({'views': (ds.arrays, 64), 'pandas': (lambda at: [items[i] for i in ds.rows(at)], 64), 'loop': (lambda at: loop_mad(ds.x, ds.rows(at)), 64),
               'whole': (lambda at: loop_windows(ds.x, ds.rows(at)), 64)}, repeats, rng, len(ds))
    print(f'{build:.6f} {(peak - before) / raw:.6f} {(after - before) / raw:.6f}', *(f'{us[k]:.6f}' for k in ('views', 'pandas', 'loop', 'whole')))

def child(*a): return [float(o) for o in subprocess.run([sys.executable, __file__, '--child', *map(str, a)], check=True, stdout=subprocess.PIPE, text=True).stdout.split()]

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('bars', nargs='?'); p.add_argument('--rows', type=float, nargs='*', default=[1e6, 1e7]); p.add_argument('--repeats', type=int, default=41); p.add_argument('--child', nargs='*')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.child:
        large(int(a.child[1]), a.child[0], a.child[2], a.repeats)
        sys.exit()
    import importlib.util
    print(f'{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, pandas {pd.__version__}, numba {"present" if importlib.util.find_spec("numba") else "absent"}\n')
    small(read_klines(a.bars) if a.bars else synthetic(31_973, 1), a.repeats)
    for n in map(int, a.rows):
        rows = []
        for kind, how in (('zscore', 'on the fly'), ('zscore', 'rolling'), ('median_mad', 'on the fly'), ('median_mad', 'rolling')):
            build, peak, kept, us, pandas, loop, whole = child(kind, n, how)
            mad = kind == 'median_mad'
            rows.append([f'views, {kind}, {how}', build, peak - 1, kept - 1, us, pandas, pandas / us, loop / (build / n * 1e6) if mad and how == 'rolling' else '', whole / (us + build / n * 1e6) if mad else ''])
        print(f'## {n:,} synthetic bars of 20 symbols, every window of {L}+{H}\n')
        table(rows, ['way', 'build, s', 'peak beside the raw arrays, x', 'kept beside them, x', 'us a window', 'per-item pandas, us', 'x per-item pandas', 'statistics alone, x NumPy loop', 'windows with build, x NumPy loop'])
