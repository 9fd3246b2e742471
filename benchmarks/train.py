"""How fast a training step is, beside the reference implementation's, with the same weights and windows.

usage: python benchmarks/train.py [--reference PATH] [--stage predictor] [--size Kronos-mini] [--batch 32] [--bars 512] [--steps 5] [--threads 2] [--compile]

PATH is a checkout of the reference. First the same loss and gradient norm on the same batch are shown (dropout off, teacher forcing on both sides); then steps of
both are timed in turn, medians. A step is what a fine-tuning script does: encode (predictor), forward, backward, clip, AdamW. Ours takes tokens that were encoded
once, since the tokenizer is frozen. Without PATH our side runs alone.
"""
import argparse, resource, statistics, sys, time
import torch
from torch import nn
from kronos_nb.callback.train import adamw
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.task import PredictorTask, TokenizerTask

a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
a.add_argument('--reference'); a.add_argument('--stage', choices=('tokenizer', 'predictor'), default='predictor'); a.add_argument('--size', default='Kronos-mini')
a.add_argument('--batch', type=int, default=32); a.add_argument('--bars', type=int, default=512); a.add_argument('--steps', type=int, default=5)
a.add_argument('--threads', type=int, default=2); a.add_argument('--compile', action='store_true'); a.add_argument('--matmul', default='highest')
a = a.parse_args()
torch.set_num_threads(a.threads)
g = torch.Generator().manual_seed(0)
x = torch.randn(a.batch, a.bars, 6, generator=g).cumsum(1).mul(.1).clamp(-5, 5)
stamp = torch.stack([torch.randint(0, n, (a.batch, a.bars), generator=g) for n in (60, 24, 7)] + [torch.randint(1, n, (a.batch, a.bars), generator=g) for n in (32, 13)], -1)
still = {k: 0. for k in ('attn_dropout_p', 'ffn_dropout_p', 'resid_dropout_p')}

def norm(model): return torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))

def flops(n_params, layers, d):
    "Forward and backward of all matrices and of causal attention, per step"
    return a.batch*a.bars*(6*n_params + 6*layers*d*a.bars)

def matmul_rate():
    "GFLOP/s of a matrix product of the sizes that training has"
    m, n = torch.randn(a.batch*a.bars, 256), torch.randn(256, 512)
    times = []
    for _ in range(7): t = time.perf_counter(); m @ n; times.append(time.perf_counter()-t)
    return 2*m.shape[0]*256*512/statistics.median(times)/1e9

torch.manual_seed(0)
tokenizer = KronosTokenizer.from_size('Kronos-Tokenizer-base')
model = tokenizer if a.stage == 'tokenizer' else Kronos.from_size(a.size)
with torch.no_grad(): s1, s2 = tokenizer.eval().encode(x, half=True)

def our_step(task, opt, clip):
    loss = (task(x) if a.stage == 'tokenizer' else task(stamp, s1=s1, s2=s2))['loss']
    loss.backward()
    n = nn.utils.clip_grad_norm_(task.parameters(), clip)
    opt.step(); opt.zero_grad(set_to_none=True)
    return loss, n

def reference_models():
    sys.path.insert(0, a.reference)
    from model import Kronos as RefKronos, KronosTokenizer as RefTokenizer
    ref_tok = RefTokenizer(**tokenizer.config); ref_tok.load_state_dict(tokenizer.state_dict())
    if a.stage == 'tokenizer': return ref_tok, ref_tok
    ref = RefKronos(**model.config); ref.load_state_dict(model.state_dict())
    return ref_tok, ref

def reference_step(ref_tok, ref, opt, clip, teacher=False):
    if a.stage == 'tokenizer':
        (z_pre, z), bsq, _, _ = ref(x)
        loss = (nn.functional.mse_loss(z_pre, x) + nn.functional.mse_loss(z, x) + bsq)/2
    else:
        with torch.no_grad(): t1, t2 = ref_tok.encode(x, half=True)
        logits = ref(t1[:, :-1], t2[:, :-1], stamp[:, :-1], **(dict(use_teacher_forcing=True, s1_targets=t1[:, 1:]) if teacher else {}))
        loss = ref.head.compute_loss(logits[0], logits[1], t1[:, 1:], t2[:, 1:])[0]
    loss.backward()
    n = nn.utils.clip_grad_norm_(ref.parameters(), clip)
    if opt is not None: opt.step()
    ref.zero_grad(set_to_none=True)
    return loss, n

def same_work():
    "Loss and gradient norm of both on one batch, without dropout"
    calm = type(model)(**model.config | still); calm.load_state_dict(model.state_dict()); calm.train()
    task = TokenizerTask(calm) if a.stage == 'tokenizer' else PredictorTask(calm)
    ours = our_step(task, torch.optim.SGD(task.parameters(), lr=0.), 1e9)
    ref_tok, ref = reference_models()
    for m in ref.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        for k in ('attn_dropout_p', 'dropout_p'):
            if hasattr(m, k): setattr(m, k, 0.)
    theirs = reference_step(ref_tok.eval() if ref_tok is not ref else ref_tok, ref.train(), None, 1e9, teacher=True)
    print(f"first step, dropout off: loss {ours[0]:.6f} and {theirs[0]:.6f}, gradient norm {ours[1]:.6f} and {theirs[1]:.6f}")
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5); torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-5)

print(f"torch {torch.__version__}, {a.threads} threads, {a.stage} {a.size if a.stage == 'predictor' else 'Kronos-Tokenizer-base'}, batch {a.batch}, {a.bars} bars, matmul precision {a.matmul}, compile {a.compile}")
if a.reference: same_work()
rate = matmul_rate()
torch.set_float32_matmul_precision(a.matmul)
task = (TokenizerTask(model) if a.stage == 'tokenizer' else PredictorTask(model)).train()
if a.compile: task.compile()
sides = dict(ours=lambda o=adamw(task, 1e-4): our_step(task, o, 3.))
if a.reference:
    ref_tok, ref = reference_models()
    sides['reference'] = lambda o=torch.optim.AdamW(ref.parameters(), lr=1e-4, betas=(.9, .95), weight_decay=.1): reference_step(ref_tok.eval() if ref_tok is not ref else ref_tok, ref.train(), o, 3.)
times = {k: [] for k in sides}
for f in sides.values(): f()                       # warm up, and compile
for _ in range(a.steps):
    for k, f in sides.items(): t = time.perf_counter(); f(); times[k].append(time.perf_counter()-t)
config = model.config
work = flops(model.n_params, config.get('n_layers', config.get('n_enc_layers', 0) + 2*config.get('n_dec_layers', 0) - 3), config['d_model'])
for k, v in times.items():
    m = statistics.median(v)
    print(f"{k:10} {m:7.3f} s a step ({min(v):.3f} to {max(v):.3f}), {a.batch/m:7.1f} windows/s, {work/m/1e9:6.0f} GFLOP/s, {work/m/1e9/rate:.0%} of the matrix rate ({rate:.0f} GFLOP/s)")
if a.reference: print(f"ratio {statistics.median(times['reference'])/statistics.median(times['ours']):.2f}x; peak memory of both {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20:.2f} GiB")
