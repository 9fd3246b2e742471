"""What a GPU makes of the work: steps, precision, compiler, forecasts and memory, in one table.

    python benchmarks/gpu.py                        on the first GPU, ten minutes or less
    python benchmarks/gpu.py --sizes Kronos-mini --batch 8 --repeats 3
    python benchmarks/gpu.py --memory               estimates alone, for a card of 16 GB; needs no GPU
    python benchmarks/gpu.py --device cpu --sizes Kronos-mini --batch 2 --bars 64 --repeats 1      tries the script

Before timing, the losses of a batch in float32 are compared with the CPU's. Times are medians between
synchronisations. Random weights of the published sizes; the tokenizer is Kronos-Tokenizer-base.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kronos_nb.decode.engine import Decoder, Detokenizer
from kronos_nb.decode.sample import Prefill, decode_tail, generate
from kronos_nb.display import md_table
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.optim import adamw
from kronos_nb.training.task import PredictorTask, TokenizerTask

T4 = 15.0  # GB that a card of 16 GB leaves
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
    row = dict(what=f'step, {name}{", compiled" if compiled else ""}', size=size, ms='', per_s='', peak_GB='')
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
            row['peak_GB'] = f'{torch.cuda.max_memory_allocated()/1e9:.2f}'
    except (RuntimeError, torch.OutOfMemoryError) as e:
        row['ms'] = f'{type(e).__name__}: {str(e).splitlines()[0][:60]}'
    return row


def forecast_row(size, a, paths):
    "Return the row of a forecast: 400 bars of history and 64 drawn, decoded to bars"
    tokenizer, predictor = model_of('Kronos-Tokenizer-base', a.device).eval(), model_of(size, a.device).eval()
    L, H = min(400, a.bars), 64
    x, stamp = torch.randn(1, L, 6, device=a.device), torch.ones(1, L + H, 5, dtype=torch.long, device=a.device)
    u = torch.rand(1, paths, H, 2, dtype=torch.float64).to(a.device)

    def call():
        with torch.inference_mode():
            history = detokenizer.encode(x)
            made = generate(Prefill(decoder, *history, stamp, 512), u, 1., 0, .9)
            decode_tail(detokenizer, history, made, 512)

    with torch.no_grad():
        decoder, detokenizer = Decoder(predictor), Detokenizer(tokenizer)
    ms = median_ms(call, a.device, max(1, a.repeats//3))
    return dict(what=f'forecast, {paths} paths', size=size, ms=f'{ms:.0f}', per_s=f'{1000*H/ms:.0f} bars', peak_GB='')


def kept_bytes(size, batch, bars):
    "Return the bytes of activations kept for the backward pass, counted on the meta device in float32"
    (task, x), kept = work(size, batch, bars, 'meta'), {}

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage()._cdata for p in task.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        task.train()(**x)['loss']
    return sum(n for at, n in kept.items() if at not in own)


def memory(a):
    "Print weights, gradients, optimizer and activations of each size, and the batch that fits"
    rows = []
    for size in ['Kronos-Tokenizer-base', *a.sizes]:
        n = sum(p.numel() for p in model_of(size, 'meta').parameters())
        one, two = (kept_bytes(size, b, a.bars) for b in (1, 3))
        each, fixed = (two - one)/2, 16*n
        fits = int((T4*1e9 - fixed)/each)
        whole = dict(fixed_GB=f'{fixed/1e9:.2f}', window_MB=f'{each/1e6:.0f}')
        whole |= dict(batch_GB=f'{(fixed + a.batch*each)/1e9:.1f}', windows_that_fit=fits)
        rows.append(dict(size=size, parameters=f'{n/1e6:.1f} M') | whole)
    print(f'float32, {a.bars} bars, batch {a.batch}; a card that leaves {T4:.0f} GB. Fixed: weights, gradients, both\n'
          'moments. Counted on the meta device, not measured on a card.')
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
    rows += [forecast_row(size, a, paths) for size in a.sizes for paths in (1, 30)]
    print(md_table(pd.DataFrame(rows)))
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
