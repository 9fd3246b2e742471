"A step of generation that a CUDA graph could record: the same operations, shapes, numbers and addresses every time"
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kronos_nb.core import ConfigError
from kronos_nb.decode import engine, sample
from kronos_nb.decode.engine import Decoder
from kronos_nb.decode.sample import Prefill, generate
from kronos_nb.decode.static import StaticStep, can_be_static, generate_static
from kronos_nb.model.predictor import Kronos
from tests.test_placement import Placement

HOW = [(0, 0, 1.), (1., 0, .9), (1.3, 5, .7), (1., 0, None)]   # at .8 two logits tie at the edge of one draw


def prefill(device='cpu', context=64, H=14, dtype=torch.float32):
    torch.manual_seed(0)
    model = Kronos(s1_bits=4, s2_bits=5, n_layers=2, d_model=32, n_heads=4, ff_dim=64, ffn_dropout_p=.1,
                   attn_dropout_p=.1, resid_dropout_p=.1, token_dropout_p=.1, learn_te=True).eval().to(device)
    s1, s2, stamp = torch.randint(16, (2, 20)), torch.randint(32, (2, 20)), torch.randint(1, 7, (2, 20 + H, 5))
    return Prefill(Decoder(model, dtype=dtype), *(o.to(device) for o in (s1, s2, stamp)), context)


@pytest.fixture(autouse=True)
def tensor_operations(monkeypatch):
    "As on a GPU"
    for module in (engine, sample):
        monkeypatch.setattr(module, 'machine_code', lambda name: None)
    monkeypatch.setattr(sample, '_descending', lambda z: z.sort(-1, descending=True).values)
    with torch.no_grad():
        yield


def numbers(paths=3, H=14):
    return torch.rand(2, paths, H, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('context, H', [(64, 14), (33, 14), (34, 14), (24, 5), (64, 1)])
def test_tokens_are_those_of_generate(how, context, H):
    p, u = prefill(context=context, H=H), numbers(H=H)
    for want, got in zip(generate(p, u, *how), generate_static(p, u, *how)):
        assert torch.equal(want, got)


def test_bfloat16_products():
    p, u = prefill(dtype=torch.bfloat16), numbers()
    for want, got in zip(generate(p, u), generate_static(p, u)):
        assert (want == got).float().mean() > .9   # two orders of adding in eight bits


def test_past_the_context_there_is_no_static_step():
    assert can_be_static(prefill(context=33)) and not can_be_static(prefill(context=32))
    with pytest.raises(ConfigError, match='max_context'):
        generate_static(prefill(context=25), numbers())


class Frozen(TorchDispatchMode):
    "What a graph would freeze: operations, shapes, plain numbers, and addresses of tensors that were there before"
    def __init__(self):
        super().__init__()
        self.seen, self.made = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def frozen(o):
            if not isinstance(o, torch.Tensor):
                return o
            at = o.untyped_storage()._cdata
            return tuple(o.shape), o.dtype, None if at in self.made else at
        self.seen.append((str(func), str(tree_map(frozen, (args, kwargs or {})))))
        out = func(*args, **kwargs or {})
        there = {o.untyped_storage()._cdata for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)}
        new = {o.untyped_storage()._cdata for o in tree_leaves(out) if isinstance(o, torch.Tensor)}
        self.made |= new - there
        return out


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('how', HOW)
def test_every_step_is_the_same(device, how):
    step, steps = StaticStep(prefill(device), numbers().to(device), how), []
    step()   # as before a recording: libraries arrange their weights at the first call
    for _ in range(3):
        with Frozen() as f:
            step()
        steps.append(f.seen)
    assert len(steps[0]) > 100 and steps[0] == steps[1] == steps[2]


def test_a_step_waits_for_nothing():
    with Placement() as seen:
        made = generate_static(prefill('meta'), numbers().to('meta'))
    assert not seen.waits and made[0].shape == (6, 14)


def test_what_the_test_would_find():
    "A position that is a plain number"
    x, steps = torch.zeros(3, 5), []
    for i in (1, 2):
        with Frozen() as f:
            x[:, i] = 1
        steps.append(f.seen)
    assert steps[0] != steps[1]


def test_it_begins_again_as_after_a_recording():
    "Warm-up and recording run steps whose bars are drawn again"
    p, u = prefill(), numbers()
    want, step = generate_static(p, u), StaticStep(p, u, (1., 0, 1.))
    for _ in range(4):
        step()
    step.begin()
    for _ in range(u.shape[2] - 1):
        step()
    assert all(torch.equal(a, b) for a, b in zip(step.made, want))
