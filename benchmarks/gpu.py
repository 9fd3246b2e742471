"""What a GPU makes of the work: steps, precision, compiler, forecasts, graphs, waits and memory, in one table.

    python benchmarks/gpu.py                        on the first GPU, ten minutes or less
    python benchmarks/gpu.py --sizes Kronos-mini --batch 8 --repeats 3
    python benchmarks/gpu.py --memory               estimates alone, for a card of 16 GB; needs no GPU
    python benchmarks/gpu.py --device cpu --sizes Kronos-mini --batch 2 --bars 64 --repeats 1      tries the script

Before timing, the losses of a batch in float32 are compared with the CPU's. Times are medians between
synchronisations. Random weights of the published sizes; the tokenizer is Kronos-Tokenizer-base.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kronos_nb.decode import engine
from kronos_nb.decode.engine import Decoder, Detokenizer
from kronos_nb.decode.sample import Prefill, decode_tail, generate
from kronos_nb.decode.static import generate_static
from kronos_nb.display import md_table
from kronos_nb.kernels import autograd, parallel
from kronos_nb.model import layers
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.optim import adamw
from kronos_nb.training.task import PredictorTask, TokenizerTask

G = 2**30
T4 = 14.5  # GiB that a card of 15 GiB leaves
SIZES = ('Kronos-mini', 'Kronos-small', 'Kronos-base')


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda')
    p.add_argument('--sizes', nargs='+', default=list(SIZES))
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--bars', type=int, default=512)
    p.add_argument('--repeats', type=int, default=10)
    p.add_argument('--memory', action='store_true', help='estimates for a card of 16 GB, on the meta device')
    p.add_argument('--no-compile', action='store_true')
    p.add_argument('--cells', action='store_true', help='run the notebook cells marked gpu afterwards')
    return p.parse_args()


def model_of(size, device):
    torch.manual_seed(0)
    made = KronosTokenizer if 'Tokenizer' in size else Kronos
    with torch.device('meta' if device == 'meta' else 'cpu'):
        return made.from_size(size).to(device)


def work(size, batch, bars, device):
    "Return the task of a size and a batch"
    rng = torch.Generator().manual_seed(0)
    model = model_of(size, device)
    if isinstance(model, KronosTokenizer):
        return TokenizerTask(model), dict(x=torch.randn(batch, bars, 6, generator=rng).to(device))
    tokens = [torch.randint(2**b, (batch, bars), generator=rng).to(device) for b in (model.s1_bits, model.s2_bits)]
    stamp = torch.randint(1, 7, (batch, bars, 5), generator=rng).to(device)
    return PredictorTask(model), dict(s1=tokens[0], s2=tokens[1], stamp=stamp)


def wait(device):
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def median_ms(f, device, repeats):
    "Return the median of some calls, after two that are not counted"
    times = []
    for i in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        f()
        wait(device)
        times.append(1000*(time.perf_counter() - start))
    return statistics.median(times[2:])


def same_loss(size, a):
    "Compare the loss of a batch in float32 with the CPU's"
    if a.device == 'cpu':
        return
    losses = []
    for device in (a.device, 'cpu'):
        task, batch = work(size, 2, min(a.bars, 128), device)
        with torch.no_grad():
            losses.append(float(task.eval()(**batch)['loss']))
    print(f'check {size}: loss {losses[0]:.6f} on {a.device}, {losses[1]:.6f} on the CPU')
    assert abs(losses[0] - losses[1]) < 1e-3*abs(losses[1]), 'the two devices do different work'


def step(task, batch, opt, scaler, device, dtype):
    with torch.autocast(device.split(':')[0], dtype or torch.bfloat16, dtype is not None):
        loss = task(**batch)['loss']
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(task.parameters(), 3.)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def train_row(size, a, name, dtype, compiled):
    "Return the row of one way to train"
    row = dict(what=f'step, {name}{", compiled" if compiled else ""}', size=size)
    row |= dict(ms='', per_s='', peak_GiB='', waits='')
    try:
        if a.device.startswith('cuda'):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        task, batch = work(size, a.batch, a.bars, a.device)
        opt = adamw(task.train(), 1e-4)
        scaler = torch.amp.GradScaler(a.device.split(':')[0], enabled=dtype == torch.float16)
        if compiled:
            task.compile()
        ms = median_ms(lambda: step(task, batch, opt, scaler, a.device, dtype), a.device, a.repeats)
        row |= dict(ms=f'{ms:.1f}', per_s=f'{1000*a.batch/ms:.0f} windows')
        if a.device.startswith('cuda'):
            row['peak_GiB'] = f'{torch.cuda.max_memory_allocated()/G:.2f}'
            row['waits'] = waits(task, batch, opt, scaler, a.device, dtype)
    except (RuntimeError, torch.OutOfMemoryError) as e:
        row['ms'] = f'{type(e).__name__}: {str(e).splitlines()[0][:60]}'
    return row


def waits(task, batch, opt, scaler, device, dtype):
    "Return how often the processor waited for the GPU in a step, as PyTorch counts it"
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            step(task, batch, opt, scaler, device, dtype)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchroniz' in str(w.message).lower() for w in seen)


def forecast_rows(size, a, paths):
    "Yield a row for each way to forecast: 400 bars of history and 64 drawn, decoded to bars; the tokens must be equal"
    tokenizer, predictor = model_of('Kronos-Tokenizer-base', a.device).eval(), model_of(size, a.device).eval()
    L, H = min(400, a.bars), 64
    x, stamp = torch.randn(1, L, 6, device=a.device), torch.ones(1, L + H, 5, dtype=torch.long, device=a.device)
    u, tokens = torch.rand(1, paths, H, 2, dtype=torch.float64).to(a.device), {}

    def call(draw_all):
        with torch.inference_mode():
            history = detokenizer.encode(x)
            made = draw_all(Prefill(decoder, *history, stamp, 512), u, 1., 0, .9)
            decode_tail(detokenizer, history, made, 512)
        tokens[draw_all] = torch.stack(made)

    for draw_all, name in ((generate, ''), (generate_static, ', a graph')):
        # on a CPU, caches of machine code are no tensors
        with torch.no_grad(), mock.patch.object(engine, 'machine_code', lambda name: None):
            decoder, detokenizer = Decoder(predictor), Detokenizer(tokenizer)
            ms = median_ms(lambda: call(draw_all), a.device, max(1, a.repeats//3))
        row = dict(what=f'forecast, {paths} paths{name}', size=size, ms=f'{ms:.0f}', per_s=f'{1000*H/ms:.0f} bars')
        yield row | dict(peak_GiB='', waits='')
    same = (tokens[generate] == tokens[generate_static]).float().mean()
    print(f'check {size}, {paths} paths: {same:.1%} of the tokens of static steps are those of the usual ones')


@contextlib.contextmanager
def as_on_a_gpu(efficient=False):
    """Let any device do the operations of a GPU: no machine code, no pieces, attention in one call

    `efficient`: attention keeps queries, keys, values, output and one number a row (the fused kernels of a GPU; on
    `meta` only); otherwise it keeps its weights, too (the plain way, which needs the most)."""
    def attention(q, k, v, mask=None, dropout_p=0.):
        if efficient:
            return Efficient.apply(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None)

    def change(module, name, new):
        return mock.patch.object(module, name, new)

    with change(autograd, '_has_kernels', lambda *tensors: False), change(parallel, 'training', lambda x: False), \
         change(autograd.Dropout, 'forward', nn.Dropout.forward), change(layers, 'causal_attention', attention), \
         sdpa_kernel(SDPBackend.MATH):
        yield


class Efficient(torch.autograd.Function):
    "Stand for a fused attention: what it keeps, not what it computes"
    @staticmethod
    def forward(ctx, q, k, v):
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(o) for o in ctx.saved_tensors[:3])


def kept_bytes(size, batch, bars, device='meta', dtype=None, efficient=False):
    "Return the bytes of activations kept for the backward pass"
    (task, x), kept = work(size, batch, bars, device), {}

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage()._cdata for p in task.parameters()}
    half = torch.autocast('cpu', dtype) if dtype else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with as_on_a_gpu(efficient), hooks, half:
        loss = task.train()(**x)['loss']
    del loss
    return sum(n for at, n in kept.items() if at not in own)


def per_window(size, bars, dtype=None):
    "Return the bytes that the CPU keeps of one more window; copies of the weights are no part of it"
    one, three = (kept_bytes(size, batch, bars, 'cpu', dtype) for batch in (1, 3))
    return (three - one)/2


def peak_bytes(size, batch, bars, device='meta', efficient=False):
    "Return the most bytes that live at once in a forward and a backward pass: weights, gradients, kept, temporary"
    task, x = work(size, batch, bars, device)
    tracker = MemTracker()
    tracker.track_external(task.train())
    with as_on_a_gpu(efficient), tracker:
        task(**x)['loss'].backward()
    return max(v['Total'] for v in tracker.get_tracker_snapshot('peak').values())


def memory(a):
    "Print weights, gradients, optimizer and activations of each size, and the batch that fits"
    small, rows = (2, min(a.bars, 128)), []
    for size in ['Kronos-Tokenizer-base', *a.sizes]:
        n = sum(p.numel() for p in model_of(size, 'meta').parameters())
        row = dict(size=size, parameters=f'{n/1e6:.1f} M', **{'weights, gradients, moments, GiB': f'{16*n/G:.2f}'})
        half = per_window(size, small[1], torch.bfloat16)/per_window(size, small[1])
        ways = {'float32': (16*n, 1., False), 'float32, fused': (16*n, 1., True), 'half, fused': (18*n, half, True)}
        for name, (fixed, share, efficient) in ways.items():
            one, three = (peak_bytes(size, b, a.bars, efficient=efficient) for b in (1, 3))
            each = share*(three - one)/2
            row[f'{name}: a window, MiB'] = f'{each/2**20:.0f}'
            row[f'{name}: batch of {a.batch}, GiB'] = f'{(fixed + a.batch*each)/G:.1f}'
            row[f'{name}: windows that fit'] = int((T4*G - fixed)/each)
        rows.append(row)
    print(f'{a.bars} bars; a card that leaves {T4} GiB. Fixed: weights, gradients, both moments; half precision has\n'
          'a copy of the weights. The most that lives at once, counted on the meta device; not measured on a card.\n')
    print(md_table(pd.DataFrame(rows).set_index('size').T.rename_axis('').reset_index()))
    check_memory(a, *small)


def check_memory(a, batch, bars):
    "Print what the CPU keeps and holds in the same operations, beside the meta device"
    rows = []
    for size in ['Kronos-Tokenizer-base', *a.sizes]:
        found = {d: (kept_bytes(size, batch, bars, d), peak_bytes(size, batch, bars, d)) for d in ('meta', 'cpu')}
        rows.append(dict(size=size) | {f'{what}, {d}': f'{o[i]/2**20:.1f}' for i, what in enumerate(('kept', 'peak'))
                                      for d, o in found.items()})
    print(f'\nThe same, {batch} windows of {bars} bars, MiB, beside what the CPU keeps and holds:\n')
    print(md_table(pd.DataFrame(rows)))


def main():
    a = options()
    if a.memory:
        return memory(a)
    if a.device.startswith('cuda') and not torch.cuda.is_available():
        sys.exit('no CUDA device is there; --memory estimates without one, --device cpu tries the script')
    card = torch.cuda.get_device_name(a.device) if a.device.startswith('cuda') else a.device
    print(f'torch {torch.__version__}, {card}, batch {a.batch}, {a.bars} bars, medians of {a.repeats}')
    bf16 = not a.device.startswith('cuda') or torch.cuda.get_device_capability(a.device)[0] >= 8
    half = dict(bf16=torch.bfloat16) if bf16 else dict(fp16=torch.float16)
    rows = []
    for size in ['Kronos-Tokenizer-base', *a.sizes]:
        same_loss(size, a)
        for name, dtype in {'fp32': None, **half}.items():
            for compiled in (False, True)[:2 - a.no_compile]:
                rows.append(train_row(size, a, name, dtype, compiled))
    rows += [row for size in a.sizes for paths in (1, 30) for row in forecast_rows(size, a, paths)]
    print(md_table(pd.DataFrame(rows)))
    memory(a)
    root = Path(__file__).resolve().parents[1]
    if a.device.startswith('cuda') and torch.cuda.device_count() > 1:
        subprocess.run([sys.executable, '-m', 'kronos_nb.cli', 'fit', '--preset', 'quickstart', '--num-gpus', '2',
                        '--out', 'runs/gpu-two-processes'], cwd=root, check=True)
    if a.cells:
        pages = [p for p in (root/'nbs').rglob('*.ipynb') if '#| gpu' in p.read_text(encoding='utf-8')]
        for page in pages:
            command = ['nbdev_test', '--path', str(page), '--flags', 'gpu', '--n_workers', '0']
            subprocess.run(command, cwd=root, check=True)


if __name__ == '__main__':
    main()
