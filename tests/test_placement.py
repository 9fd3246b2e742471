"""The whole work runs on the `meta` device, which has shapes and no values: a tensor left on the CPU, or a value that
the work waits for, is found without a GPU"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kronos_nb.decode.engine import Decoder, Detokenizer
from kronos_nb.decode.sample import Prefill, decode_tail, generate
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.optim import adamw
from kronos_nb.training.task import PredictorTask, TokenizerTask

WAITS = ('_local_scalar_dense', 'is_nonzero', 'nonzero', 'masked_select', 'unique', 'equal')
SIZE = dict(s1_bits=5, s2_bits=6, d_model=32, n_heads=4, ff_dim=48, ffn_dropout_p=.1, attn_dropout_p=.1,
            resid_dropout_p=.1)


class Placement(TorchDispatchMode):
    "Raise where an operation mixes devices, and list what would make a GPU wait"
    def __init__(self):
        super().__init__()
        self.waits, self.operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
        kinds = {t.device.type for t in tensors if t.dim()}
        name = func._schema.name.removeprefix('aten::')
        if len(kinds) > 1 and name not in ('copy_', '_to_copy'):
            raise AssertionError(f'{name} of tensors on {sorted(kinds)}')
        self.operations += 1
        if name in WAITS and tensors[0].device.type == 'meta':
            self.waits.append(name)
        out = func(*args, **kwargs)
        made = [o for o in tree_leaves(out) if isinstance(o, torch.Tensor)]
        if 'meta' in kinds and any(o.device.type == 'cpu' for o in made):
            self.waits.append(name)
        return out


def on_meta(*shape, high=None):
    "Return values or, below `high`, numbers of tokens"
    return torch.empty(shape, device='meta') if high is None else torch.zeros(shape, dtype=torch.int64, device='meta')


@pytest.fixture
def pair():
    tokenizer = dict(d_in=6, n_enc_layers=2, n_dec_layers=2, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=11)
    made = KronosTokenizer(**SIZE, **tokenizer), Kronos(**SIZE, n_layers=2, token_dropout_p=.1, learn_te=True)
    return [m.to('meta') for m in made]


def batches(pair):
    "Return both tasks, each with a batch"
    tokens = dict(s1=on_meta(4, 40, high=32), s2=on_meta(4, 40, high=64), stamp=on_meta(4, 40, 5, high=7))
    bars = dict(x=on_meta(4, 40, 6))
    return dict(tokenizer=(TokenizerTask(pair[0]), bars), predictor=(PredictorTask(pair[1]), tokens))


def update(task, batch, opt):
    "The work of one update: forward, backward, clipping, optimizer"
    task(**batch)['loss'].backward()
    torch.nn.utils.clip_grad_norm_(task.parameters(), 1.)
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize('stage', ['tokenizer', 'predictor'])
def test_an_update_runs_on_the_device_and_waits_for_nothing(pair, stage):
    task, batch = batches(pair)[stage]
    opt = adamw(task.train(), 1e-3)
    with Placement() as seen:
        update(task, batch, opt)
        update(task, batch, opt)
    assert seen.operations > 500 and not seen.waits
    assert all(v.device.type == 'meta' for s in opt.state.values() for v in s.values() if v.dim())


@pytest.mark.parametrize('stage', ['tokenizer', 'predictor'])
def test_validation_and_encoding_run_on_the_device(pair, stage):
    task, batch = batches(pair)[stage]
    with Placement() as seen, torch.no_grad():
        loss = task.eval()(**batch)['loss']
        s1, s2 = pair[0].eval().encode(on_meta(4, 40, 6), half=True)
    assert not seen.waits and {o.device.type for o in (loss, s1, s2)} == {'meta'}


@pytest.mark.parametrize('horizon', [5, 12])   # inside the context, and past it
def test_generation_runs_on_the_device_and_its_steps_wait_for_nothing(pair, horizon):
    tokenizer, predictor = (m.eval() for m in pair)
    with Placement() as seen, torch.no_grad():
        detokenizer = Detokenizer(tokenizer)
        history = detokenizer.encode(on_meta(2, 30, 6))
        prefill = Prefill(Decoder(predictor), *history, on_meta(2, 30 + horizon, 5, high=7), 36)
        u = torch.empty(2, 3, horizon, 2, dtype=torch.float64, device='meta')
        made = generate(prefill, u, 1., 0, .9)
        bars = decode_tail(detokenizer, history, made, 36)
    assert bars.shape == (6, horizon, 6) and bars.device.type == 'meta' and not seen.waits


def test_what_the_other_tests_would_find():
    "A tensor on the CPU, a value that is read, and a result that leaves the device"
    x = on_meta(3)
    with Placement(), pytest.raises(AssertionError, match='cpu'):
        x + torch.ones(3)
    with Placement() as seen, pytest.raises(RuntimeError):
        float(x.sum())
    assert seen.waits


@pytest.mark.parametrize('more', [{}, {'runtime.precision': 'bf16', 'tokenizer.ema_decay': .9, 'tokenizer.lawa': .5}])
def test_a_fit_waits_once_an_update_and_once_a_logged_row(tmp_path, monkeypatch, more):
    "The one wait is the check that loss and gradient are finite, which decides whether weights may change"
    from kronos_nb.train import fit
    from kronos_nb.training.learner import Callback
    from tests.helpers import bars, cfg, four_steps
    waits, counting = [], []
    for name in ('item', 'tolist', '__float__', '__bool__', '__int__'):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name, real=real: (
            waits.append(name) if counting else None, real(self))[1])

    class Count(Callback):
        "Count between the first batch and the end of the updates"
        order, steps = 1000, 0
        def before_train(self, learn): counting.append(1)
        def before_step(self, learn): self.steps += 1
        def after_train(self, learn): counting.clear()

    count = Count()
    rare = {'runtime.log_every': 100, 'runtime.save_steps': 100}
    fit(bars, cfg.replace(**four_steps, **rare, **more), tmp_path/'run', callbacks=[count])
    assert count.steps == 4 and waits.count('__bool__') == 4 and len(waits) <= 5
