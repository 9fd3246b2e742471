"""How fast a training step is, beside the reference implementation's, with the same weights and windows.

usage: python benchmarks/train.py [--reference PATH] [--stage predictor] [--size Kronos-mini] [--precision fp32]
[--compile] [--batch 32] [--bars 512] [--steps 5] [--threads 2]

PATH is a checkout of the reference. First the loss and the gradient norm of one batch are compared (dropout off,
teacher forcing on both sides, float32). Then the two
sides take steps in turn, each in a process of its own, so that neither has the other's settings or memory. A step is
what a fine-tuning script does: encode (predictor),
forward, backward, clip, AdamW. Ours takes tokens that were encoded once, since the tokenizer is frozen, and does what
`fit` does with the settings named. The matrix rate
is that of one large product in the same precision on the same threads. Without PATH our side runs alone.
"""

import argparse, contextlib, multiprocessing, re, statistics, sys, time
from pathlib import Path
import torch
from torch import nn
from kronos_nb.training.optim import adamw
from kronos_nb.kernels.parallel import heap_kept
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.task import PredictorTask, TokenizerTask, matmul_precision


def options():
    a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    a.add_argument('--reference')
    a.add_argument('--stage', choices=('tokenizer', 'predictor'), default='predictor')
    a.add_argument('--size', default='Kronos-mini')
    a.add_argument('--batch', type=int, default=32)
    a.add_argument('--bars', type=int, default=512)
    a.add_argument('--steps', type=int, default=5)
    a.add_argument('--threads', type=int, default=2)
    a.add_argument('--compile', action='store_true')
    a.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32')
    a.add_argument('--matmul', choices=('highest', 'medium'), default='medium', help="ours in float32")
    return a.parse_args()


def inputs(a):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(a.batch, a.bars, 6, generator=g).cumsum(1).mul(0.1).clamp(-5, 5)
    spans = ((0, 60), (0, 24), (0, 7), (1, 32), (1, 13))
    return x, torch.stack([torch.randint(lo, hi, (a.batch, a.bars), generator=g) for lo, hi in spans], -1)


def our_models(a):
    torch.manual_seed(0)
    tokenizer = KronosTokenizer.from_size('Kronos-Tokenizer-base')
    return tokenizer, tokenizer if a.stage == 'tokenizer' else Kronos.from_size(a.size)


def reference_models(a, ours):
    sys.path.insert(0, a.reference)
    from model import Kronos as RefKronos, KronosTokenizer as RefTokenizer

    made = (
        [cls(**o.config) for cls, o in zip((RefTokenizer, RefKronos), ours)]
        if a.stage == 'predictor'
        else [RefTokenizer(**ours[0].config)] * 2
    )
    for m, o in zip(made, ours):
        m.load_state_dict(o.state_dict())
    return made[0] if a.stage == 'tokenizer' else made[0].eval(), made[1].train()


def update(loss, model, opt, clip):
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if opt is not None:
        opt.step()
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), float(norm)


def our_step(task, batch, opt=None, clip=1e9, precision='fp32'):
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
        loss = task(**batch)['loss']
    return update(loss, task, opt, clip)


def reference_step(models, x, stamp, opt=None, clip=1e9, teacher=False):
    tokenizer, model = models
    if model is tokenizer:
        (z_pre, z), bsq, _, _ = model(x)
        loss = (nn.functional.mse_loss(z_pre, x) + nn.functional.mse_loss(z, x) + bsq) / 2
    else:
        with torch.no_grad():
            t1, t2 = tokenizer.encode(x, half=True)
        logits = model(
            t1[:, :-1],
            t2[:, :-1],
            stamp[:, :-1],
            **(dict(use_teacher_forcing=True, s1_targets=t1[:, 1:]) if teacher else {}),
        )
        loss = model.head.compute_loss(logits[0], logits[1], t1[:, 1:], t2[:, 1:])[0]
    return update(loss, model, opt, clip)


def our_batch(a, tokenizer, x, stamp):
    if a.stage == 'tokenizer':
        return dict(x=x)
    with torch.no_grad():
        s1, s2 = tokenizer.eval().encode(x, half=True)
    return dict(stamp=stamp, s1=s1, s2=s2)


def same_work(a):
    "Loss and gradient norm of both on one batch, without dropout"
    x, stamp = inputs(a)
    ours = our_models(a)
    refs = reference_models(a, ours)
    batch = our_batch(a, ours[0], x, stamp)
    for m in [*ours[1].modules(), *refs[1].modules()]:
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        for k in ('attn_dropout_p', 'dropout_p'):
            if hasattr(m, k):
                setattr(m, k, 0.0)
    task = TokenizerTask(ours[1].train()) if a.stage == 'tokenizer' else PredictorTask(ours[1].train())
    mine, theirs = our_step(task, batch), reference_step(refs, x, stamp, teacher=True)
    print(
        f"first step, dropout off: loss {mine[0]:.6f} and {theirs[0]:.6f}, gradient norm {mine[1]:.6f} and "
        f"{theirs[1]:.6f}"
    )
    for m, t in zip(mine, theirs):
        assert abs(m - t) < 1e-3 * abs(t), 'the two sides do different work'


def matrix_rate(dtype):
    "GFLOP/s of one large product"
    p, q, times = torch.randn(16384, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype), []
    for _ in range(15):
        t = time.perf_counter()
        p @ q
        times.append(time.perf_counter() - t)
    return 2 * 16384 * 512 * 512 / statistics.median(times[3:]) / 1e9


def flops(a, model, task, batch):
    "Of all matrices (counted as they are used) and of causal attention, forward and backward"
    n, hooks = [0], []
    for m in task.modules():
        if isinstance(m, nn.Linear):
            hooks.append(
                m.register_forward_hook(lambda m, i, o: n.__setitem__(0, n[0] + 6 * o.numel() * m.in_features))
            )
        if type(m).__name__ == 'Attention':
            hooks.append(m.register_forward_hook(lambda m, i, o: n.__setitem__(0, n[0] + 6 * o.numel() * o.shape[1])))
    with torch.no_grad():
        task(**batch)
    for h in hooks:
        h.remove()
    return n[0]


def peak():
    "GiB of this process; getrusage's figure would begin with the parent's"
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 2**20


def side(name, a, pipe):
    "One side in its own process: answers 'step' with seconds, and 'end' with its rate, work and peak memory"
    torch.set_num_threads(a.threads)
    x, stamp = inputs(a)
    ours, rate, work = our_models(a), None, None
    settings = contextlib.ExitStack()
    if name == 'ours':
        settings.enter_context(matmul_precision(a.matmul))
        settings.enter_context(heap_kept())
        rate = matrix_rate(torch.bfloat16 if a.precision == 'bf16' else torch.float32)
        batch, model = our_batch(a, ours[0], x, stamp), ours[1].train()
        task = TokenizerTask(model) if a.stage == 'tokenizer' else PredictorTask(model)
        work, opt = flops(a, model, task, batch), adamw(task, 1e-4)
        if a.compile:
            task.compile()
        step = lambda: our_step(task, batch, opt, 3.0, a.precision)
    else:
        refs = reference_models(a, ours)
        opt = torch.optim.AdamW(refs[1].parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        step = lambda: reference_step(refs, x, stamp, opt, 3.0)
    del ours
    pipe.send('ready')
    while pipe.recv() == 'step':
        t = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - t)
    pipe.send((rate, work, peak()))


def main():
    a = options()
    torch.set_num_threads(a.threads)
    print(
        f"torch {torch.__version__}, {a.threads} threads, {a.stage} "
        f"{a.size if a.stage == 'predictor' else 'Kronos-Tokenizer-base'}, batch {a.batch}, {a.bars} bars, "
        f"{a.precision}{f' (matrix products: {a.matmul})' if a.precision == 'fp32' else ''}"
        f"{', compiled' if a.compile else ''}"
    )
    if a.reference:
        same_work(a)
    spawn, sides = multiprocessing.get_context('spawn'), {}
    for name in ['ours'] + ['reference'] * bool(a.reference):
        here, there = spawn.Pipe()
        spawn.Process(target=side, args=(name, a, there), daemon=True).start()
        sides[name] = here
        here.recv()  # one after the other: the matrix rate is measured alone
    times = {k: [] for k in sides}
    for _ in range(a.steps + 1):
        for k, pipe in sides.items():
            pipe.send('step')
            times[k].append(pipe.recv())
    ends = {}
    for k, pipe in sides.items():
        pipe.send('end')
        ends[k] = pipe.recv()
    (rate, work, _), first = ends['ours'], {k: v.pop(0) for k, v in times.items()}
    for k, v in times.items():
        m = statistics.median(v)
        print(
            f"{k:10} {m:7.3f} s a step ({min(v):.3f} to {max(v):.3f}; the first {first[k]:.1f}), "
            f"{a.batch / m:6.1f} windows/s, {work / m / 1e9:5.0f} GFLOP/s, "
            f"{work / m / 1e9 / rate:4.0%} of the matrix rate ({rate:.0f}), peak {ends[k][2]:.2f} GiB"
        )
    if a.reference:
        print(f"ratio {statistics.median(times['reference']) / statistics.median(times['ours']):.2f}x")


if __name__ == '__main__':
    main()
