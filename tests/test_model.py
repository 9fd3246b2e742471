"The models against golden outputs of the reference implementation, and what the notebooks do not show"
import copy, json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from kronos_nb.core import ConfigError, KronosError, ModelError
from kronos_nb.model import kernels
from kronos_nb.model.layers import PUBLISHED, KVCache, Rotary
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer

golden = Path(__file__).parent/'golden'
tol = dict(rtol=1e-4, atol=1e-5)
torch.set_num_threads(1)

@pytest.fixture(scope='module', params=['tiny', 'bits10'])
def gold(request):
    d = golden/request.param
    return load_file(d/'expected.safetensors'), KronosTokenizer.from_pretrained(d/'tokenizer'), Kronos.from_pretrained(d/'predictor')

def close(got, want):
    "Some golden tensors hold the first sequence only"
    assert_close(got[:len(want)], want, **tol)

def teacher_forced(e): return e['s1'][:, :-1], e['s2'][:, :-1], e['stamp'][:, :-1]

def fresh(kind, **kw):
    tok = dict(d_in=6, d_model=32, n_heads=8, ff_dim=48, n_enc_layers=3, n_dec_layers=3, s1_bits=3, s2_bits=5, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=4)
    pred = dict(s1_bits=3, s2_bits=5, n_layers=3, d_model=32, n_heads=8, ff_dim=48, token_dropout_p=0., learn_te=True)
    torch.manual_seed(0)
    cls = KronosTokenizer if kind == 'tokenizer' else Kronos
    return cls(**(tok if kind == 'tokenizer' else pred) | dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.) | kw)

# Golden

@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_tokenizer_forward(gold, mode):
    e, tok, _ = gold
    tok = copy.deepcopy(tok).train(mode == 'train')
    (z_pre, z), loss, q, ids = tok(e['x'])
    for name, got in dict(z_pre=z_pre, z=z, quantized=q).items(): close(got.detach(), e[f'tok_{mode}_{name}'])
    close(loss.detach().view(1), e[f'tok_{mode}_bsq_loss'])
    assert torch.equal(ids, e[f'tok_{mode}_indices'])

def test_tokenizer_tokens(gold):
    e, tok, _ = gold
    s1, s2 = tok.encode(e['x'], half=True)
    assert torch.equal(s1, e['s1']) and torch.equal(s2, e['s2']) and torch.equal(tok.encode(e['x']), e['full_indices'])
    with torch.no_grad():
        close(tok.decode((s1, s2), half=True), e['decode_half'])
        close(tok.decode(e['full_indices']), e['decode_full'])

def grad_norms(model): return {k: p.grad.norm() for k, p in model.named_parameters() if p.requires_grad}

def check_grads(model, e, prefix):
    "Every gradient norm that the reference has, and no other parameter"
    want = {k.removeprefix(prefix): v for k, v in e.items() if k.startswith(prefix)}
    got = grad_norms(model)
    assert set(got) == set(want)
    for k in want: assert_close(got[k].view(-1), want[k].view(-1), **tol, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('checkpointing', [False, True])
def test_tokenizer_gradients(gold, checkpointing):
    e, tok, _ = gold
    tok = copy.deepcopy(tok).train()
    tok.gradient_checkpointing = checkpointing
    parts = tok.loss(e['x'])
    parts['loss'].backward()
    close(parts['loss'].detach().view(1), e['tok_loss'])
    close(parts['bsq_loss'].view(1), e['tok_train_bsq_loss'])
    check_grads(tok, e, 'tok_grad.')
    close(torch.stack(list(grad_norms(tok).values())).norm().view(1), e['tok_grad_norm'])

@pytest.mark.parametrize('checkpointing', [False, True])
def test_predictor_loss_and_gradients(gold, checkpointing):
    e, _, model = gold
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing = checkpointing
    parts = model.loss(e['s1'], e['s2'], e['stamp'])
    parts['loss'].backward()
    for k in ('loss', 'ce_s1', 'ce_s2'): close(parts[k].detach().view(1), e[f'pred_{k}'])
    check_grads(model, e, 'pred_grad.')

@pytest.mark.parametrize('train', [True, False])
def test_predictor_logits_are_causal_in_either_mode(gold, train):
    e, _, model = gold
    model = copy.deepcopy(model).train(train)
    with torch.no_grad(): s1_logits, s2_logits = model(*teacher_forced(e), s1_targets=e['s1'][:, 1:])
    close(s1_logits, e['pred_train_s1_logits'])
    close(s2_logits, e['pred_train_s2_logits'])
    close(s1_logits, e['pred_eval_s1_logits'])
    leaky = e['pred_eval_s2_logits_upstream_noncausal']
    assert (s2_logits[:len(leaky)] - leaky).abs().max() > 1e-3

def test_predictor_in_two_steps(gold):
    e, _, model = gold
    s1, s2, stamp = teacher_forced(e)
    with torch.no_grad():
        close(model.decode_s1(s1, s2)[0], e['pred_eval_s1_logits_nostamp'])
        logits, context = model.decode_s1(s1, s2, stamp)
        close(logits, e['decode_s1_logits'])
        close(context, e['decode_s1_context'])
        close(model.decode_s2(context, e['s1'][:, -1:]), e['decode_s2_logits_len1'])

@pytest.mark.parametrize('kind', ['tokenizer', 'predictor'])
def test_workers_change_no_gradient(kind, monkeypatch):
    "Seven windows in one piece, in pieces, and in pieces by two workers; also in bfloat16, with frozen parts, and bit by bit the same again with dropout"
    def grown(piece, n, p=0., bf16=False, frozen=False):
        monkeypatch.setattr(kernels, 'PIECE', piece); monkeypatch.setattr(kernels, 'LEAST', 1)
        model = fresh(kind, ffn_dropout_p=p, attn_dropout_p=p, resid_dropout_p=p)
        for k, q in model.named_parameters(): q.requires_grad_(not (frozen and ('.0.' in k or 'emb' in k)))
        torch.manual_seed(1)
        args = [torch.randn(7, 20, 6)] if kind == 'tokenizer' else [torch.randint(8, (7, 20)), torch.randint(32, (7, 20)), torch.randint(1, 7, (7, 20, 5))]
        try:
            torch.set_num_threads(n)
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = model.loss(*args)['loss']
            loss.backward()
            assert torch.get_num_threads() == n
        finally: torch.set_num_threads(1)
        return [loss.detach(), *(torch.zeros(()) if q.grad is None else q.grad for q in model.parameters())]
    for how in (dict(), dict(frozen=True)):
        whole = grown(1 << 20, 1, **how)
        for n in (1, 2): assert_close(grown(2*20*32, n, **how), whole, rtol=1e-5, atol=1e-6)
    assert_close(grown(2*20*32, 2, bf16=True), whole := grown(1 << 20, 1, bf16=True), rtol=.1, atol=2e-3)
    assert sum(q.abs().sum() for q in whole) > 1
    a, b = (grown(2*20*32, 2, p=.3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert_close(a, grown(2*20*32, 1, p=.3), rtol=1e-5, atol=1e-6)

# Causality, padding, bits and heads beyond the golden ones

@pytest.mark.parametrize('kind, precision', [('tokenizer', 'float32'), ('predictor', 'float32'), ('predictor', 'bfloat16')])
def test_machine_code_and_tensor_operations_train_alike(kind, precision, monkeypatch):
    pytest.importorskip('numba')
    g = torch.Generator().manual_seed(0)
    x, s1, s2 = torch.randn(6, 40, 6, generator=g), *(torch.randint(2**b, (6, 40), generator=g) for b in (3, 5))
    sides = []
    for name in ('machine code', 'tensor operations'):
        if name == 'tensor operations': monkeypatch.setattr(kernels, 'machine_code', lambda name: None)
        model = fresh(kind, **{k: .2 for k in ('ffn_dropout_p', 'attn_dropout_p', 'resid_dropout_p')}).train()
        torch.manual_seed(1)   # both drop the same values
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'): loss = model.loss(x)['loss'] if kind == 'tokenizer' else model.loss(s1, s2)['loss']
        loss.backward()
        sides.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (a, da), (b, db) = sides
    assert_close(a, b, rtol=1e-6 if precision == 'float32' else 1e-3, atol=0)
    assert (da - db).norm()/db.norm() < (2e-6 if precision == 'float32' else 2e-2)
    assert not torch.equal(da, db)   # so there were two ways

@pytest.mark.parametrize('kind', ['tokenizer', 'predictor'])
def test_future_moves_nothing_in_eval_mode(kind):
    model, rng = fresh(kind).eval(), torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(n, (4, 30), generator=rng)
    x = torch.randn(4, 30, 6, generator=rng) if kind == 'tokenizer' else [ids(8), ids(32), ids(7), ids(8)]
    for t in (1, 13, 29):
        tail = lambda o, new: torch.cat((o[:, :t], new[:, t:]), 1)
        with torch.no_grad():
            if kind == 'tokenizer':
                a, b = (model(o) for o in (x, tail(x, torch.randn(4, 30, 6, generator=rng)*1e3)))
                assert torch.equal(a[3][:, :t], b[3][:, :t])
                a, b = a[0], b[0]
            else:
                y = [tail(o, ids(n)) for o, n in zip(x, (8, 32, 7, 8))]
                a, b = (model(o[0], o[1], o[2][..., None].expand(-1, -1, 5), s1_targets=o[3]) for o in (x, y))
        for p, q in zip(a, b): assert_close(p[:, :t], q[:, :t], rtol=0, atol=1e-5)

def test_unequal_bits_and_eight_heads_round_trip():
    tok, x = fresh('tokenizer').eval(), torch.randn(3, 20, 6)
    s1, s2 = tok.encode(x, half=True)
    ids = tok.encode(x)
    assert s1.max() < 8 and s2.max() < 32 and torch.equal(ids, s1 + (s2 << 3))
    with torch.no_grad():
        (_, z), _, _, same = tok(x)
        assert torch.equal(same, ids)
        for got in (tok.decode((s1, s2), half=True), tok.decode(ids)): assert_close(got, z, **tol)
    model = fresh('predictor')
    a, b = model(s1, s2, s1_targets=s1)
    assert a.shape == (3, 20, 8) and b.shape == (3, 20, 32)

def test_padding_is_invisible_and_carries_no_loss():
    model, pad = fresh('predictor').eval(), (torch.arange(20) < 6).expand(3, -1)
    s1, s2 = torch.randint(8, (3, 20)), torch.randint(32, (3, 20))
    l = model.loss(s1, s2, padding_mask=pad)
    assert_close(l, model.loss(s1[:, 6:], s2[:, 6:]), **tol)
    l['loss'].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_sampling_s1_must_be_asked_for():
    model, s = fresh('predictor'), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ModelError, match='pass s1_targets'): model(s, s)
    with pytest.raises(ModelError, match='not both'): model(s, s, s1_targets=s, sample_s1=True)
    torch.manual_seed(0); a = model(s, s, sample_s1=True)
    torch.manual_seed(0); b = model(s, s, sample_s1=True)
    assert torch.equal(a[1], b[1])

# Cache

@pytest.mark.parametrize('cross_rope', ['reference', 'trained'])
def test_cache_equals_whole_sequences(cross_rope):
    "Two symbols, three paths each, a history of 9 bars and tails of 5 read in blocks of any size"
    model, rng = fresh('predictor').eval(), torch.Generator().manual_seed(1)
    ids = lambda *shape: (torch.randint(8, shape, generator=rng), torch.randint(32, shape, generator=rng), torch.randint(1, 7, (*shape, 5), generator=rng))
    hist, tails = ids(2, 9), ids(6, 5)
    whole = [torch.cat((h.repeat_interleave(3, 0), t), 1) for h, t in zip(hist, tails)]
    drawn = torch.randint(8, (6, 1), generator=rng)
    with torch.no_grad():
        want, context = model.decode_s1(*whole, cross_rope=cross_rope)
        want_s2 = model.decode_s2(context, drawn, cross_rope=cross_rope)[:, -1]
        for cuts in ((0, 5), (0, 1, 2, 3, 4, 5), (0, 3, 4, 5)):
            cache = model.new_cache()
            first, _ = model.decode_s1(*hist, cache=cache, cross_rope=cross_rope)
            parts = [model.decode_s1(*(o[:, i:j] for o in tails), cache=cache, cross_rope=cross_rope) for i, j in zip(cuts, cuts[1:])]
            assert_close(first, want[::3, :9], **tol)
            assert_close(torch.cat([o for o, _ in parts], 1), want[:, 9:], **tol)
            assert_close(model.decode_s2(parts[-1][1][:, -1:], drawn, cache=cache, cross_rope=cross_rope)[:, -1], want_s2, **tol)
            assert cache.n == 14

def test_decoder_cache_draws_only_the_tail():
    tok = fresh('tokenizer').eval()
    ids = torch.randint(256, (6, 14))
    ids[:, :9] = ids[::3, :9].repeat_interleave(3, 0)
    with torch.no_grad():
        caches = [KVCache() for _ in tok.decoder]
        tok.decode(ids[::3, :9], caches=caches)
        assert_close(tok.decode(ids[:, 9:], caches=caches), tok.decode(ids)[:, 9:], **tol)

# Rotary positions

def test_rope_is_exact_after_a_cast():
    model = fresh('predictor')
    want = {k: v.clone() for k, v in model.state_dict().items() if 'inv_freq' in k}
    model.to(torch.bfloat16)
    for k, v in model.state_dict().items():
        if 'inv_freq' in k: assert v.dtype == torch.float32 and torch.equal(v, want[k])
        elif v.is_floating_point(): assert v.dtype == torch.bfloat16
    rotary, x = model.transformer[0].self_attn.rotary, torch.randn(1, 600, 4)
    fine = Rotary(4)(x.bfloat16().float())
    assert_close(rotary(x.bfloat16()).float(), fine, rtol=2**-8, atol=0)
    s = torch.zeros(1, 5, dtype=torch.long)
    assert model(s, s, torch.ones(1, 5, 5), s1_targets=s)[1].dtype == torch.bfloat16

def test_rope_ignores_a_rounded_buffer_in_a_file(tmp_path):
    model = fresh('predictor')
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path/'model.safetensors')
    save_file({k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}, tmp_path/'model.safetensors')
    again = Kronos.from_pretrained(tmp_path)
    x = torch.randn(1, 300, 4)
    assert torch.equal(again.transformer[1].self_attn.rotary(x), model.transformer[1].self_attn.rotary(x))
    assert next(again.parameters()).dtype == torch.float32

def test_training_after_a_forecast_in_inference_mode():
    "Tables made under inference mode are used by autograd later"
    for model, args in ((fresh('tokenizer'), [torch.randn(2, 7, 6)]), (fresh('predictor'), [torch.zeros(2, 7, dtype=torch.long)]*2)):
        with torch.inference_mode(): model.loss(*args)
        model.loss(*args)['loss'].backward()
        assert not any(t.is_inference() for m in model.modules() if isinstance(m, Rotary) for ts in m._tables.values() for t in ts)

def test_compiles_with_a_break_at_attention_alone():
    "Tracing only: the compiler's back end is not run; on a CPU attention is no business of the compiler's, elsewhere it is"
    for model, args in ((fresh('tokenizer'), [torch.randn(2, 7, 6)]), (fresh('predictor'), [torch.zeros(2, 7, dtype=torch.long)]*2)):
        want = model.loss(*args)['loss']
        assert_close(torch.compile(model.loss, backend='eager')(*args)['loss'], want)
        torch._dynamo.reset()
        breaks = torch._dynamo.explain(model.loss)(*args).break_reasons
        assert breaks and all('_blocks' in o.reason for o in breaks), [o.reason for o in breaks]
    torch._dynamo.reset()

# Files

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name, tmp_path):
    "Parameters, bytes of the weights and the bytes of config.json are those published"
    o, cls = PUBLISHED[name], KronosTokenizer if 'Tokenizer' in name else Kronos
    with torch.device('meta'): model = cls.from_size(name)
    assert model.n_params == o['n_params'] and model.config == o['config']
    header = {k: dict(dtype={torch.float32: 'F32', torch.int64: 'I64'}[t.dtype], shape=list(t.shape)) for k, t in model.state_dict().items()}
    if o['n_params'] < 5e6:
        model = cls.from_size(name)
        model.extra.clear()
        model.save_pretrained(tmp_path)
        assert (tmp_path/'model.safetensors').stat().st_size == o['weights_bytes']
        with safe_open(tmp_path/'model.safetensors', 'pt') as f: assert f.metadata() is None and set(f.keys()) == set(header)
        assert json.loads((tmp_path/'config.json').read_text()) == o['config']
    else:
        sizes = sorted(((v['dtype'] != 'I64', k), np.prod(v['shape'], dtype=int)*(8 if v['dtype'] == 'I64' else 4)) for k, v in header.items())
        at = 0
        for (_, k), n in sizes: header[k]['data_offsets'] = [at, at := at + int(n)]
        text = json.dumps({k: header[k] for (_, k), _ in sizes}, separators=(',', ':'))
        assert 8 + -(-len(text)//8)*8 + at == o['weights_bytes']

@pytest.mark.parametrize('size', ['tiny', 'bits10'])
@pytest.mark.parametrize('kind', ['tokenizer', 'predictor'])
def test_saved_files_are_those_loaded(size, kind, tmp_path):
    "Byte for byte, from float32 and from a model cast to bfloat16 and back in structure"
    cls, source = KronosTokenizer if kind == 'tokenizer' else Kronos, golden/size/kind
    cls.from_pretrained(source).save_pretrained(tmp_path)
    assert (tmp_path/'model.safetensors').read_bytes() == (source/'model.safetensors').read_bytes()
    assert json.loads((tmp_path/'config.json').read_text()) == json.loads((source/'config.json').read_text())
    cls.from_pretrained(source).to(torch.bfloat16).save_pretrained(tmp_path/'half')
    a, b = load_file(source/'model.safetensors'), load_file(tmp_path/'half'/'model.safetensors')
    assert {k: (v.dtype, v.shape) for k, v in a.items()} == {k: (v.dtype, v.shape) for k, v in b.items()}
    assert all(torch.equal(a[k], b[k]) for k in a if 'inv_freq' in k)

def test_loading_draws_no_random_number():
    state = torch.get_rng_state()
    Kronos.from_pretrained(golden/'tiny'/'predictor')
    assert torch.equal(state, torch.get_rng_state())

def test_fixed_time_embedding_stays_as_loaded_and_fresh_ones_are_waves():
    loaded = Kronos.from_pretrained(golden/'bits10'/'predictor')
    assert not loaded.time_emb.hour_embed.emb.weight.requires_grad
    assert torch.equal(loaded.time_emb.hour_embed.emb.weight, load_file(golden/'bits10'/'predictor'/'model.safetensors')['time_emb.hour_embed.emb.weight'])
    assert_close(fresh('predictor', learn_te=False).time_emb.hour_embed.emb.weight[:, 0], torch.arange(24.).sin())

@pytest.mark.parametrize('change, message', [
    (lambda t, c: t.pop('norm.weight'), r'missing norm\.weight \(32,\)'),
    (lambda t, c: t.update(stray=torch.ones(2)), r'unexpected stray \(2,\)'),
    (lambda t, c: c.update(d_model=64), r'cross_attn.k_proj.weight: file \(32, 32\), model \(64, 64\)'),
    (lambda t, c: c.pop('n_heads'), 'lacks n_heads'),
    (lambda t, c: c.update(cross_rope='other'), "must be one of reference, trained; got 'other'"),
    (lambda t, c: c.update(n_heads=5), 'multiple of 2 x n_heads = 10, got 32')])
def test_files_that_do_not_fit(change, message, tmp_path):
    tensors, config = load_file(golden/'tiny'/'predictor'/'model.safetensors'), json.loads((golden/'tiny'/'predictor'/'config.json').read_text())
    change(tensors, config)
    save_file(tensors, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(config))
    with pytest.raises(KronosError, match=message): Kronos.from_pretrained(tmp_path)

def test_wrong_places(tmp_path):
    with pytest.raises(ModelError, match='holds no config.json and no model.safetensors'): Kronos.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match='no model folder'): Kronos.from_pretrained(tmp_path/'absent')
    with pytest.raises(ModelError, match='lacks n_layers'): Kronos.from_pretrained(golden/'tiny'/'tokenizer')
    with pytest.raises(ConfigError, match="did you mean 'Kronos-mini'"): Kronos.from_size('Kronos-mimi')
    with pytest.raises(ConfigError, match='group_size must divide'): fresh('tokenizer', group_size=3)

def test_hub_id_offline_names_the_remedy(monkeypatch):
    import huggingface_hub
    def gone(*a, **kw): raise OSError('no network')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', gone)
    with pytest.raises(ModelError, match="did you mean 'NeoQuasar/Kronos-mini'"): Kronos.from_pretrained('NeoQuasar/Kronos-mimi')

def test_hub_id_is_asked_for_the_two_files(monkeypatch):
    import huggingface_hub
    asked = []
    def give(repo, name, revision=None): asked.append((repo, name, revision)); return str(golden/'tiny'/'predictor'/name)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', give)
    Kronos.from_pretrained('somebody/model', revision='abc')
    assert asked == [('somebody/model', 'config.json', 'abc'), ('somebody/model', 'model.safetensors', 'abc')]
