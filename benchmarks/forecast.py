"""Time and memory of a forecast, beside the reference implementation's where a checkout of it is given.

    python benchmarks/forecast.py                                   our side alone
    python benchmarks/forecast.py --reference PATH                  both, interleaved, after an equality check
    python benchmarks/forecast.py --reference PATH --threads 2 --sizes mini --cases 1x1 1x5 1x30 --horizons 112

PATH is a checkout of https://github.com/shiyu-coder/Kronos. Both sides get the same random weights of a published
size, the same frames of
bars and the same stamps, and do the whole call: normalise, encode, draw, decode, back to prices. A reference call
that is expected to take
longer than --limit seconds (by the cost of a smaller one) is not made, and the table says so.
"""

import argparse, contextlib, json, platform, resource, statistics, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kronos_nb.core import FEATURES, threads
from kronos_nb.display import md_table
from kronos_nb.forecast import Forecaster
from kronos_nb.speed import shortest
from kronos_nb.decode.sample import uniforms
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer


def models(size):
    "Random weights of a published size, float32, the tokenizer beside them"
    torch.manual_seed(0)
    return KronosTokenizer.from_size('Kronos-Tokenizer-base').eval(), Kronos.from_size(f'Kronos-{size}').eval()


def bars(i, n):
    "A geometric random walk of hourly bars"
    rng = np.random.default_rng(i)
    c = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    o = np.concatenate(([100], c[:-1]))
    v = rng.lognormal(3, 1, n)
    x = dict(open=o, high=np.maximum(o, c) * 1.002, low=np.minimum(o, c) * 0.998, close=c, volume=v, amount=v * c)
    return pd.DataFrame(dict(symbol=f'S{i}', timestamps=pd.date_range('2024-01-01', periods=n, freq='h'), **x))


class Reference:
    "The reference's predictor with our weights"

    def __init__(self, path, tok, model, max_context):
        if path not in sys.path:
            sys.path.insert(0, path)
        from model import Kronos as K, KronosPredictor, KronosTokenizer as T

        t, m = T(**tok.config), K(**model.config)
        t.load_state_dict(tok.state_dict())
        m.load_state_dict(model.state_dict())
        self.p = KronosPredictor(m.eval(), t.eval(), device='cpu', max_context=max_context)

    def __call__(self, frames, future, paths, **how):
        how = dict(T=1.0, top_p=0.9) | how
        xs, ts, ys = (
            [f[list(FEATURES)] for f in frames],
            [f['timestamps'] for f in frames],
            [pd.Series(future)] * len(frames),
        )
        if len(frames) == 1:
            return [self.p.predict(xs[0], ts[0], ys[0], len(future), sample_count=paths, verbose=False, **how)]
        return self.p.predict_batch(xs, ts, ys, len(future), sample_count=paths, verbose=False, **how)


class Ours:
    def __init__(self, tok, model, max_context, precision='float32'):
        "Begin where the decoder begins, as the reference does, and not at the last close"
        self.f = Forecaster(tok, model, max_context=max_context, precision=precision, anchor=False)

    def __call__(self, frames, future, paths, **how):
        how = dict(temperature=1.0, top_p=0.9, lookback_window=len(frames[0]), coherent_candles=False) | how
        return self.f.predict_many(
            frames, len(future), futures=[future] * len(frames), paths=paths, progress=False, **how
        )


@contextlib.contextmanager
def same_randomness(u):
    "The reference's draws by our rule, from the numbers `u` (rows, H, 2), in the order in which it draws"
    real, at = torch.multinomial, iter(np.moveaxis(u, 0, -1).reshape(-1, len(u)))

    def pick(p, num_samples):
        c = p.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(c, torch.from_numpy(next(at)).unsqueeze(1) * c[:, -1:], right=True)

    torch.multinomial = pick
    try:
        yield
    finally:
        torch.multinomial = real


def check(path, size, lookback=400, context=512):
    "Greedy and nucleus tokens of both sides, within the context and past it"
    tok, model = models(size)
    ref, ours, seen = Reference(path, tok, model, context), Ours(tok, model, context), []
    decode = ref.p.tokenizer.decode
    ref.p.tokenizer.decode = lambda ids, half: seen.append(ids) or decode(ids, half=half)
    for L, H in ((60, 12), (context - 6, 12)):
        frames = [bars(0, L + H)]
        frames, future = [frames[0][:L]], pd.DatetimeIndex(frames[0]['timestamps'][L:])
        for name, a, b in (('greedy', dict(top_k=1, top_p=1.0), dict(temperature=0)), ('top-p .9', {}, {})):
            with same_randomness(uniforms(0, 'S0', range(2), H)) if name != 'greedy' else contextlib.nullcontext():
                want = ref(frames, future, 1 if name == 'greedy' else 2, **a)[0]
            got = ours(frames, future, 1 if name == 'greedy' else 2, **b)[0].paths.mean(0)
            error = np.abs(got / want - 1).max().max()
            tokens, mine = torch.stack([o[:, -H:] for o in seen[-1]]), retoken(ours.f, frames, future, name)
            same = int((tokens == mine).all(0).all(-1).sum())
            print(
                f'check {size}: {name}, history {L} + {H} bars, context {context}: {same} of {tokens.shape[1]} '
                f'paths have equal tokens, largest relative difference of a price '
                f'{error:.1e}'
            )
            assert same == tokens.shape[1] and error < 1e-4


def retoken(f, frames, future, name):
    "The tokens that our side drew, caught on their way to the decoder"
    import kronos_nb.forecast as module

    kept, real = [], module.decode_tail
    module.decode_tail = lambda t, hist, made, *rest: kept.append(made) or real(t, hist, made, *rest)
    try:
        f.predict_many(
            frames,
            len(future),
            futures=[future],
            paths=2,
            temperature=float(name != 'greedy'),
            top_p=0.9,
            lookback_window=len(frames[0]),
            progress=False,
        )
    finally:
        module.decode_tail = real
    return torch.stack(kept[0])


now = time.perf_counter  # or the processor's time, by --clock cpu


def clock(f):
    t = now()
    f()
    return now() - t


REFERENCE_SECONDS = {}   # (size, horizon, context) -> seconds per path, of the cases already timed


def case(path, size, symbols, paths, horizon, context, limit, repeats, precision='float32', unequal=False):
    "Seconds of both sides, interleaved medians; the reference's is None where it would take too long"
    tok, model = models(size)
    ours, ref = Ours(tok, model, context, precision), Reference(path, tok, model, context) if path else None
    frames, future = (
        [bars(i, 400 - i * unequal) for i in range(symbols)],
        pd.date_range('2024-01-01', periods=400 + horizon, freq='h')[400:],
    )
    ours(frames, future, paths)
    rate = REFERENCE_SECONDS.get((size, horizon, context))
    expected = None if rate is None else rate * symbols * paths
    skip = ref is None or (expected is not None and expected > limit)
    a, b = [], []
    for i in range(repeats):
        if not skip and (i == 0 or sum(a) / len(a) < 60):
            a.append(clock(lambda: ref(frames, future, paths)))
        b.append(clock(lambda: ours(frames, future, paths)))
    a = statistics.median(a) if a else None
    if a:
        REFERENCE_SECONDS[size, horizon, context] = a / (symbols * paths)
    return dict(
        size=size,
        symbols=symbols,
        paths=paths,
        horizon=horizon,
        context=context,
        precision=precision,
        reference=a,
        expected=expected,
        ours=statistics.median(b),
    )


def read_rate(floats, seconds=0.05):
    "GB/s of the fastest of three plain operations on arrays of `floats` numbers: sum, dot product, and STREAM's triad"
    x, y, z = torch.ones(3, floats)
    ways = {
        'sum': (4, lambda: x.sum()),
        'dot': (8, lambda: torch.dot(x, y)),
        'triad': (12, lambda: torch.add(x, y, alpha=2.0, out=z)),
    }
    took = shortest({k: f for k, (_, f) in ways.items()}, seconds)
    return max(ways[k][0] * floats / us / 1e3 for k, us in took.items())


def bandwidth(size, repeats, few=12, many=112):
    "Rate at which a step of one path reads the weights, beside plain reads of as many bytes and of half a GB"
    tok, model = models(size)
    ours, frames = Ours(tok, model, 512), [bars(0, 400)]
    stamps = pd.date_range('2024-01-01', periods=400 + many, freq='h')[400:]
    layers = (model.transformer, model.dep_layer.cross_attn, model.head)   # the rest are rows of tables
    floats = sum(p.numel() for layer in layers for p in layer.parameters())
    ours(frames, stamps, 1)
    steps, same, large = [], [], []
    for _ in range(2 * repeats):
        seconds = [clock(lambda: ours(frames, stamps[:n], 1)) for n in (few, many)]
        steps.append((seconds[1] - seconds[0]) / (many - few))
        same.append(read_rate(floats))
        large.append(read_rate(1 << 27))
    rate = 4 * floats / statistics.median(steps) / 1e9
    found = dict(size=size, weights_mb=4 * floats / 1e6, step_ms=1e3 * statistics.median(steps), gb_s=rate)
    found |= dict(read_as_many_gb_s=max(same), read_half_a_gb_gb_s=max(large))
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()} | {
        'share of as many': f'{rate / max(same):.0%}',
        'share of memory': f'{rate / max(large):.0%}',
    }


def peak(args, side, size, paths, horizon):
    "Peak memory of one call in a fresh process, MiB, above that of the loaded models"
    cmd = [
        sys.executable,
        __file__,
        '--peak',
        side,
        '--sizes',
        size,
        '--cases',
        f'1x{paths}',
        '--horizons',
        str(horizon),
    ] + (['--reference', args.reference] if args.reference else [])
    return json.loads(subprocess.run(cmd, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])


def peak_memory() -> float:
    "Return the peak memory of this process in MiB; `ru_maxrss` of a child begins with what its parent held"
    status = Path('/proc/self/status')
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    return next(int(o.split()[1]) for o in status.read_text().splitlines() if o.startswith('VmHWM'))/1024


def peak_here(args):
    size, paths, horizon = args.sizes[0], int(args.cases[0].split('x')[1]), args.horizons[0]
    tok, model = models(size)
    f = Ours(tok, model, 512) if args.peak == 'ours' else Reference(args.reference, tok, model, 512)
    future = pd.date_range('2024-01-01', periods=400 + horizon, freq='h')[400:]
    before = peak_memory()
    f([bars(0, 400)], future if args.peak == 'ours' else future[: min(horizon, 114)], paths)
    print(json.dumps(dict(before=before, peak=peak_memory())))


def show(rows):
    t = pd.DataFrame(rows)
    ref = [
        f'{r.reference:.2f}'
        if r.reference == r.reference and r.reference is not None
        else f'not run (about {r.expected:.0f})'
        if r.expected == r.expected and r.expected is not None
        else 'not run'
        for r in t.itertuples()
    ]
    out = pd.DataFrame(
        dict(
            size=t['size'],
            precision=t['precision'],
            context=t['context'],
            horizon=t['horizon'],
            symbols=t['symbols'],
            paths=t['paths'],
            reference_s=ref,
            ours_s=t['ours'].round(3),
            ratio=(t['reference'].astype(float) / t['ours']).round(1),
        )
    )
    print(md_table(out.astype(object).where(out.notna(), '')))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--reference', help='checkout of the reference implementation')
    p.add_argument('--sizes', nargs='+', default=['mini', 'small'])
    p.add_argument(
        '--cases', nargs='+', default=['1x1', '1x5', '1x30', '1x100', '8x1', '8x5', '8x30'], help='symbols x paths'
    )
    p.add_argument(
        '--horizons',
        nargs='+',
        type=int,
        default=[112, 120],
        help='with 400 bars of history and a context of 512, 112 is inside and 120 past it',
    )
    p.add_argument('--context', type=int, default=512)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument(
        '--clock',
        choices=['wall', 'cpu'],
        default='wall',
        help="cpu counts this process's processor time, which on a busy machine is the steadier measure for one thread",
    )
    p.add_argument('--limit', type=float, default=1200, help='longest reference call, seconds')
    p.add_argument('--precisions', nargs='+', default=['float32'])
    p.add_argument('--memory', action='store_true', help='peak memory instead of time')
    p.add_argument('--growth', action='store_true', help='how our time grows with horizon and paths')
    p.add_argument('--bandwidth', action='store_true', help='share of the memory bandwidth that one path reaches')
    p.add_argument(
        '--unequal', action='store_true', help='histories of 400, 399, 398 ... bars instead of 400 each; ours alone'
    )
    p.add_argument('--no-check', action='store_true')
    p.add_argument('--peak', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peak:
        return peak_here(a)
    if a.clock == 'cpu':
        globals()['now'] = time.process_time
    cpu = (
        next(
            (
                l.split(':')[1].strip()
                for l in Path('/proc/cpuinfo').read_text().splitlines()
                if l.startswith('model name')
            ),
            platform.processor(),
        )
        if Path('/proc/cpuinfo').exists()
        else platform.processor()
    )
    print(
        f'torch {torch.__version__}, numpy {np.__version__}, python {platform.python_version()}, {cpu}, '
        f'{a.threads} thread{"s" * (a.threads > 1)}, {a.clock} time'
    )
    with threads(a.threads):
        if a.memory:
            for size in a.sizes:
                for side in (['reference'] if a.reference else []) + ['ours']:
                    o = peak(a, side, size, 30, a.horizons[0])
                    print(
                        f'{size}, 30 paths, horizon {a.horizons[0]}: {side} {o["peak"]:.0f} MiB at its peak, '
                        f'{o["peak"] - o["before"]:.0f} more than with the models loaded'
                    )
            return
        if a.bandwidth:
            print(md_table(pd.DataFrame([bandwidth(s, a.repeats) for s in a.sizes])))
            return
        if a.growth:
            rows = [
                case(None, s, 1, n, h, a.context, a.limit, a.repeats)
                for s in a.sizes
                for n, h in (
                    (1, 28),
                    (1, 56),
                    (1, 112),
                    (30, 28),
                    (30, 56),
                    (30, 112),
                    (100, 112),
                    (300, 112),
                    (1000, 112),
                )
            ]
            return show(rows)
        if a.reference and not a.no_check:
            for s in a.sizes:
                check(a.reference, s)
        show(
            [
                case(
                    a.reference if q == 'float32' and not a.unequal else None,
                    s,
                    *map(int, c.split('x')),
                    h,
                    a.context,
                    a.limit,
                    a.repeats,
                    q,
                    a.unequal,
                )
                for s in a.sizes
                for h in a.horizons
                for c in a.cases
                for q in a.precisions
            ]
        )


if __name__ == '__main__':
    main()
