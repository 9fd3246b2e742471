"What is chosen by a timing changes no bit, is kept, survives damage, and can be switched off"
import json

import pytest
import torch

from kronos_nb import speed
from kronos_nb.core import threads
from kronos_nb.decode.engine import Decoder, arranged
from kronos_nb.forecast import Forecaster
from kronos_nb.kernels.autograd import machine_code
from kronos_nb.kernels.choice import NOT_MEASURED, Linear, by_library, product, rows_won
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.data.read import sample_klines

compiled = pytest.mark.skipif(machine_code('kernels.rows') is None, reason='needs numba')


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "A cache folder that nobody has written, and nothing in memory"
    monkeypatch.setenv('KRONOS_NB_CACHE', str(tmp_path))
    monkeypatch.setattr(speed, '_tables', {})
    return tmp_path


def models():
    "A small pair with random weights"
    torch.manual_seed(0)
    size = dict(s1_bits=4, s2_bits=5, d_model=96, n_heads=4, ff_dim=160)
    size |= dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
    tokenizer = dict(d_in=6, n_enc_layers=2, n_dec_layers=2, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=3)
    predictor = Kronos(**size, n_layers=3, token_dropout_p=0., learn_te=True)
    return KronosTokenizer(**size, **tokenizer).eval(), predictor.eval()


def paths(pair, n, horizon=12, context=64):
    bars = sample_klines('GOOG')[-100:]
    return Forecaster(*pair, max_context=context, lookback_window=58).predict(bars, horizon, paths=n, seed=1).paths


@compiled
@pytest.mark.parametrize('horizon, n_threads', [(5, 1), (9, 2)])   # inside the context, and past it
def test_a_path_has_the_same_bits_chosen_or_not_and_in_any_company(horizon, n_threads):
    pair = models()
    with threads(n_threads):
        with speed.not_measuring():
            want = paths(pair, 40, horizon)
        for n in (1, 2, 5, 9, 40):
            assert (paths(pair, n, horizon) == want[:n]).all(), n
        assert arranged(Decoder, pair[1]).stack.most > 0, 'the kernel was never used'


@compiled
@pytest.mark.parametrize('n_in, n_out', [(256, 768), (1024, 96), (832, 200), (2048, 832), (52, 100), (6, 32)])
def test_a_row_has_the_bits_that_it_has_among_many(n_in, n_out):
    if not product(n_in, n_out).block:
        pytest.skip('no loop of ours has the bits of this library')
    w, b, x = torch.randn(n_out, n_in), torch.randn(n_out), torch.randn(200, n_in)
    with torch.inference_mode():
        layer, want = Linear(w, b), by_library(w, b)(x)
        layer.most = max(layer.most, 5)
        for n in (1, 3, 4, 5, 6, 40):
            assert torch.equal(layer(x[:n]), want[:n]), n


def test_answers_are_kept_and_damage_is_noticed(own_cache):
    asked = []
    def answer():
        asked.append(1)
        return {'a': [1, 2.5]}
    def again():
        speed._tables.clear()
        return speed.measured('question', answer)
    assert again() == again() == {'a': [1, 2.5]} and len(asked) == 1
    file, = own_cache.rglob('*.json')
    whole = file.read_text()
    for damaged in (whole[:40], '', '[]', whole.replace('2.5', '3.5'), '{"measured": {}}'):
        file.write_text(damaged)
        assert again() == {'a': [1, 2.5]}
    assert len(asked) == 6 and json.loads(file.read_text())['machine'] == speed.speed_key()


def test_a_folder_that_cannot_be_written_costs_only_the_memory(own_cache, monkeypatch):
    (own_cache/'file').write_text('')
    monkeypatch.setenv('KRONOS_NB_CACHE', str(own_cache/'file'))
    assert speed.measured('question', lambda: 1) == speed.measured('question', lambda: 2) == 1


def test_one_switch(monkeypatch):
    with speed.not_measuring():
        assert product(64, 64) == NOT_MEASURED and speed.matrix_rates() == {}
    monkeypatch.setenv('KRONOS_NB_MEASURE', '0')
    assert product(64, 64) == NOT_MEASURED and speed.rates_in_words() == ''


def test_a_lower_matrix_precision_is_not_measured_as_float32(monkeypatch):
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'medium')
    assert product(64, 64) == NOT_MEASURED


@pytest.mark.parametrize('rates, found', [
    (dict(highest=105, medium=210, bf16=420), {'runtime.matmul_precision': 'medium', 'runtime.precision': 'bf16'}),
    (dict(highest=73, medium=73, bf16=24), {}), ({}, {})])
def test_a_precision_is_advised_only_where_it_is_faster(rates, found):
    assert speed.worthwhile(rates) == found


def test_rows_won_is_the_number_with_the_largest_gain():
    assert rows_won({1: (1, 2), 2: (3, 2), 4: (5, 9), 8: (9, 5)}) == 4
    assert rows_won({1: (2, 1)}) == rows_won({}) == 0


@pytest.mark.parametrize('how', [{}, dict(foreach=True), dict(fused=True)])
def test_a_step_of_an_optimizer_is_noticed(how):
    model = models()[1]
    first, opt = arranged(Decoder, model), torch.optim.AdamW(model.parameters(), lr=1e-3, **how)
    assert arranged(Decoder, model) is first
    sum(p.square().sum() for p in model.parameters()).backward()
    opt.step()
    assert arranged(Decoder, model) is not first


@pytest.mark.parametrize('bf16, advised', [(24, {}), (420, {'runtime.precision': ('fp32', 'bf16')})])
def test_advice_for_a_cpu_follows_what_was_measured(monkeypatch, bf16, advised):
    from kronos_nb.config import Config
    from kronos_nb.training import diagnose
    monkeypatch.setattr(diagnose, 'matrix_rates', lambda: dict(highest=73, medium=73, bf16=bf16))
    cfg = Config.preset('quickstart')
    changes = diagnose._faster_here(diagnose.suggest('too_slow', cfg, 'predictor'), cfg)
    assert {k: v for k, v in changes.items() if k in ('runtime.precision', 'runtime.compile')} == advised
    assert 'data.stride' in changes
