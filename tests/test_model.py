"The models against golden outputs of the reference implementation, and what the notebooks do not show"
import copy, json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from kronos_nb.core import ConfigError, KronosError, ModelError
from kronos_nb.decode.engine import Decoder, Detokenizer
from kronos_nb.kernels import autograd, parallel
from kronos_nb.model.layers import Rotary
from kronos_nb.model.predictor import CROSS_ROPE, Kronos
from kronos_nb.model.pretrained import PUBLISHED
from kronos_nb.model.tokenizer import KronosTokenizer

golden = Path(__file__).parent/'golden'
tol = dict(rtol=1e-4, atol=1e-5)
classes = dict(tokenizer=KronosTokenizer, predictor=Kronos)
kinds = pytest.mark.parametrize('kind', classes)
torch.set_num_threads(1)

@pytest.fixture(scope='module', params=['tiny', 'bits10'])
def gold(request):
    d = golden/request.param
    models = KronosTokenizer.from_pretrained(d/'tokenizer'), Kronos.from_pretrained(d/'predictor')
    return load_file(d/'expected.safetensors'), *models

def close(got, want):
    "Some golden tensors hold the first sequence only"
    assert_close(got[:len(want)], want, **tol)

def teacher_forced(e): return e['s1'][:, :-1], e['s2'][:, :-1], e['stamp'][:, :-1]

def dropouts(p): return dict(ffn_dropout_p=p, attn_dropout_p=p, resid_dropout_p=p)

both = dict(s1_bits=3, s2_bits=5, d_model=32, n_heads=8, ff_dim=48)
settings = dict(
    tokenizer=dict(d_in=6, n_enc_layers=3, n_dec_layers=3, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=4),
    predictor=dict(n_layers=3, token_dropout_p=0., learn_te=True))

def fresh(kind, **kw):
    torch.manual_seed(0)
    return classes[kind](**both | settings[kind] | dropouts(0.) | kw)

def ids(*shape, rng=None):
    "Tokens of both levels and stamps for `fresh` models"
    draw = lambda a, n, s: torch.randint(a, n, s, generator=rng)
    return draw(0, 8, shape), draw(0, 32, shape), draw(1, 7, (*shape, 5))

def some_input(kind): return [torch.randn(2, 7, 6)] if kind == 'tokenizer' else [torch.zeros(2, 7, dtype=torch.long)]*2

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
    assert torch.equal(s1, e['s1']) and torch.equal(s2, e['s2'])
    assert torch.equal(tok.encode(e['x']), e['full_indices'])
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
        close(model.decode_s2(context, e['s1'][:, 1:]), e['pred_train_s2_logits'])

# Kernels and workers

def pieces_input(kind): return [torch.randn(7, 20, 6)] if kind == 'tokenizer' else ids(7, 20)

@kinds
def test_workers_change_no_gradient(kind, monkeypatch):
    "Seven windows in one piece, in pieces and by two workers; in bfloat16, with frozen parts, and the same bits again"
    def grown(piece, n, p=0., bf16=False, frozen=False):
        "Loss and gradients"
        monkeypatch.setattr(parallel, 'PIECE', piece)
        monkeypatch.setattr(parallel, 'MIN_PIECE', 1)
        model = fresh(kind, **dropouts(p))
        for k, q in model.named_parameters(): q.requires_grad_(not (frozen and ('.0.' in k or 'emb' in k)))
        torch.manual_seed(1)
        args = pieces_input(kind)
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
    whole = grown(1 << 20, 1, bf16=True)
    assert_close(grown(2*20*32, 2, bf16=True), whole, rtol=.1, atol=2e-3)
    assert sum(q.abs().sum() for q in whole) > 1
    a, b = (grown(2*20*32, 2, p=.3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert_close(a, grown(2*20*32, 1, p=.3), rtol=1e-5, atol=1e-6)

def loss_and_gradient(kind, precision):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(6, 40, 6, generator=g)]
    if kind == 'predictor': args = ids(6, 40, rng=g)[:2]
    model = fresh(kind, **dropouts(.2)).train()
    torch.manual_seed(1)   # both ways drop the same values
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'): loss = model.loss(*args)['loss']
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

@pytest.mark.parametrize('kind, precision, loss_tol, grad_tol', [
    ('tokenizer', 'float32', 1e-6, 2e-6), ('predictor', 'float32', 1e-6, 2e-6), ('predictor', 'bfloat16', 1e-3, 2e-2)])
def test_machine_code_and_tensor_operations_train_alike(kind, precision, loss_tol, grad_tol, monkeypatch):
    pytest.importorskip('numba')
    a, da = loss_and_gradient(kind, precision)
    monkeypatch.setattr(autograd, 'machine_code', lambda name: None)
    b, db = loss_and_gradient(kind, precision)
    assert_close(a, b, rtol=loss_tol, atol=0)
    assert (da - db).norm()/db.norm() < grad_tol
    assert not torch.equal(da, db)   # so there were two ways

# Causality, padding, bits and heads beyond the golden ones

def mixed(old, new, t): return torch.cat((old[:, :t], new[:, t:]), 1)

@pytest.mark.parametrize('t', [1, 13, 29])
def test_future_moves_no_token_and_no_bar(t):
    tok = fresh('tokenizer').eval()
    x, other = torch.randn(2, 4, 30, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): (a, _, _, a_ids), (b, _, _, b_ids) = tok(x), tok(mixed(x, other*1e3, t))
    assert torch.equal(a_ids[:, :t], b_ids[:, :t])
    for p, q in zip(a, b): assert_close(p[:, :t], q[:, :t], rtol=0, atol=1e-5)

@pytest.mark.parametrize('t', [1, 13, 29])
def test_future_moves_no_logit(t):
    model, rng = fresh('predictor').eval(), torch.Generator().manual_seed(0)
    old, new = ([*ids(4, 30, rng=rng), ids(4, 30, rng=rng)[0]] for _ in range(2))
    with torch.no_grad(): a, b = (model(*o[:3], s1_targets=o[3]) for o in (old, [mixed(*o, t) for o in zip(old, new)]))
    for p, q in zip(a, b): assert_close(p[:, :t], q[:, :t], rtol=0, atol=1e-5)

def test_unequal_bits_and_eight_heads_round_trip():
    tok, x = fresh('tokenizer').eval(), torch.randn(3, 20, 6)
    s1, s2 = tok.encode(x, half=True)
    full = tok.encode(x)
    assert s1.max() < 8 and s2.max() < 32 and torch.equal(full, s1 + (s2 << 3))
    with torch.no_grad():
        (_, z), _, _, same = tok(x)
        assert torch.equal(same, full)
        for got in (tok.decode((s1, s2), half=True), tok.decode(full)): assert_close(got, z, **tol)
    a, b = fresh('predictor')(s1, s2, s1_targets=s1)
    assert a.shape == (3, 20, 8) and b.shape == (3, 20, 32)

def test_padding_is_invisible_and_carries_no_loss():
    model, pad = fresh('predictor').eval(), (torch.arange(20) < 6).expand(3, -1)
    s1, s2, _ = ids(3, 20)
    losses = model.loss(s1, s2, padding_mask=pad)
    assert_close(losses, model.loss(s1[:, 6:], s2[:, 6:]), **tol)
    losses['loss'].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_sampling_s1_must_be_asked_for():
    model, s = fresh('predictor'), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ModelError, match='s1_targets'): model(s, s)
    with pytest.raises(ModelError, match='sample_s1'): model(s, s, s1_targets=s, sample_s1=True)
    def sampled():
        torch.manual_seed(0)
        return model(s, s, sample_s1=True)[1]
    assert torch.equal(sampled(), sampled())

# Which rotation

@pytest.mark.parametrize('apart, kept', [(2e-4, 'trained'), (-2e-4, 'trained'), (.01, 'reference'),
                                         (-.01, 'trained')])
def test_runs_that_differ_by_a_rounding_keep_one_rotation(monkeypatch, apart, kept):
    "Two runs of a family chose differently by 1e-4 nats, and could not be averaged"
    model = fresh('predictor')
    monkeypatch.setattr(Kronos, '_ce_by_rope', lambda self, start=0: dict(reference=2., trained=2. + apart))
    assert model.pick_cross_rope([()]) == dict(reference=2., trained=2. + apart)
    assert model.cross_rope == kept

# The cached decoder against uncached logits

BLOCKS = ((0, 5), (0, 1, 2, 3, 4, 5), (0, 3, 4, 5))   # how a tail of five bars is read

def random_vectors(model):
    "Biases and norms that are neither zero nor one, so that folding them into other weights shows"
    for p in model.parameters():
        if p.ndim == 1: torch.nn.init.normal_(p, std=.3)
    return model

@pytest.mark.parametrize('blocks', BLOCKS)
@pytest.mark.parametrize('cross_rope', CROSS_ROPE)
def test_decoder_equals_uncached_logits(cross_rope, blocks):
    "Two symbols with three paths each, a shared history of 9 bars and tails of 5"
    model, rng = random_vectors(fresh('predictor').eval()), torch.Generator().manual_seed(1)
    hist, tails = ids(2, 9, rng=rng), ids(6, 5, rng=rng)
    whole = [torch.cat((h.repeat_interleave(3, 0), t), 1) for h, t in zip(hist, tails)]
    drawn = torch.randint(8, (6,), generator=rng)
    decoder = Decoder(model, cross_rope)
    session = decoder.session(5)
    def read(s1, s2, stamp): return decoder.read(s1, s2, decoder.embed_stamps(stamp), session)
    with torch.inference_mode():
        logits, context = model.decode_s1(*whole)
        assert_close(decoder.s1_logits(read(*hist)), logits[::3, 8], **tol)
        for i, j in zip(blocks, blocks[1:]):
            last = read(*(o[:, i:j] for o in tails))
            assert_close(decoder.s1_logits(last), logits[:, 8+j], **tol)
        want = model.decode_s2(context, drawn[:, None], cross_rope=cross_rope)[:, -1]
        assert_close(decoder.s2_logits(last, drawn, session), want, **tol)
    assert session.n == 14

def test_detokenizer_decodes_only_the_tail():
    tok = random_vectors(fresh('tokenizer').eval())
    s1, s2, _ = ids(6, 14)
    for o in (s1, s2): o[:, :9] = o[::3, :9].repeat_interleave(3, 0)
    with torch.inference_mode():
        detokenizer = Detokenizer(tok)
        caches = detokenizer.decoder.caches(5)
        hist = detokenizer.decode((s1[::3, :9], s2[::3, :9]), caches)
        tail = detokenizer.decode((s1[:, 9:], s2[:, 9:]), caches)
        want = tok.decode((s1, s2), half=True)
    assert_close(hist, want[::3, :9], **tol)
    assert_close(tail, want[:, 9:], **tol)

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
    rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(rounded, tmp_path/'model.safetensors')
    (tmp_path/'SHA256SUMS').unlink()   # changed on purpose
    again = Kronos.from_pretrained(tmp_path)
    a, b = (m.transformer[1].self_attn.rotary for m in (again, model))
    x = torch.randn(1, 300, 4)
    assert torch.equal(a(x), b(x))
    assert next(again.parameters()).dtype == torch.float32

@kinds
def test_training_after_a_forecast_in_inference_mode(kind):
    "Tables made under inference mode are used by autograd later"
    model, args = fresh(kind), some_input(kind)
    with torch.inference_mode(): model.loss(*args)
    model.loss(*args)['loss'].backward()
    rotaries = [m for m in model.modules() if isinstance(m, Rotary)]
    tables = [t for m in rotaries for pair in m._tables.values() for t in pair]
    assert tables and not any(t.is_inference() for t in tables)

@kinds
def test_compiles_with_a_break_at_attention_alone(kind):
    "Tracing only, without the compiler's back end. On a CPU attention is left out of the graph, elsewhere it is in it"
    model, args = fresh(kind), some_input(kind)
    want = model.loss(*args)['loss']
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_close(torch.compile(model.loss, backend='eager')(*args)['loss'], want)
    breaks = list(torch._dynamo.utils.counters['graph_break'])
    torch._dynamo.reset()
    assert breaks and all('_blocks' in o for o in breaks), breaks

# Files

DTYPES = {torch.float32: ('F32', 4), torch.int64: ('I64', 8)}

def file_size(model):
    "Bytes of the safetensors file of a model on the meta device"
    header, at = {}, 0
    for k, t in sorted(model.state_dict().items(), key=lambda o: (o[1].dtype != torch.int64, o[0])):
        dtype, width = DTYPES[t.dtype]
        end = at + width*t.numel()
        header[k] = dict(dtype=dtype, shape=list(t.shape), data_offsets=[at, end])
        at = end
    text = json.dumps(header, separators=(',', ':'))
    return 8 + -(-len(text)//8)*8 + at

def published(name): return KronosTokenizer if 'Tokenizer' in name else Kronos

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
    with torch.device('meta'): model = published(name).from_size(name)
    want = PUBLISHED[name]
    assert model.n_params == want['n_params'] and model.config == want['config']
    assert file_size(model) == want['weights_bytes']

@pytest.mark.parametrize('name', [k for k, o in PUBLISHED.items() if o['n_params'] < 5e6])
def test_saved_files_have_the_published_size(name, tmp_path):
    model = published(name).from_size(name)
    model.extra.clear()
    model.save_pretrained(tmp_path)
    weights = tmp_path/'model.safetensors'
    assert weights.stat().st_size == PUBLISHED[name]['weights_bytes']
    with safe_open(weights, 'pt') as f: assert f.metadata() is None and set(f.keys()) == set(model.state_dict())
    assert json.loads((tmp_path/'config.json').read_text()) == PUBLISHED[name]['config']

def read_config(folder): return json.loads((folder/'config.json').read_text())

@pytest.mark.parametrize('size', ['tiny', 'bits10'])
@kinds
def test_saved_files_are_those_loaded(size, kind, tmp_path):
    "Byte for byte in float32; from a model that was cast to bfloat16 the same keys, types and shapes"
    cls, source = classes[kind], golden/size/kind
    cls.from_pretrained(source).save_pretrained(tmp_path)
    assert (tmp_path/'model.safetensors').read_bytes() == (source/'model.safetensors').read_bytes()
    assert read_config(tmp_path) == read_config(source)
    cls.from_pretrained(source).to(torch.bfloat16).save_pretrained(tmp_path/'half')
    a, b = (load_file(o/'model.safetensors') for o in (source, tmp_path/'half'))
    assert {k: (v.dtype, v.shape) for k, v in a.items()} == {k: (v.dtype, v.shape) for k, v in b.items()}
    assert all(torch.equal(a[k], b[k]) for k in a if 'inv_freq' in k)

def test_loading_draws_no_random_number():
    state = torch.get_rng_state()
    Kronos.from_pretrained(golden/'tiny'/'predictor')
    assert torch.equal(state, torch.get_rng_state())

def test_fixed_time_embedding_stays_as_loaded_and_fresh_ones_are_sinusoids():
    folder, key = golden/'bits10'/'predictor', 'time_emb.hour_embed.emb.weight'
    loaded = Kronos.from_pretrained(folder).get_parameter(key)
    assert not loaded.requires_grad and torch.equal(loaded, load_file(folder/'model.safetensors')[key])
    assert_close(fresh('predictor', learn_te=False).get_parameter(key)[:, 0], torch.arange(24.).sin())

@pytest.mark.parametrize('change, name', [
    (lambda t, c: t.pop('norm.weight'), r'norm\.weight \(32,\)'),
    (lambda t, c: t.update(stray=torch.ones(2)), r'stray \(2,\)'),
    (lambda t, c: c.update(d_model=64), r'cross_attn.k_proj.weight: file \(32, 32\), model \(64, 64\)'),
    (lambda t, c: c.pop('n_heads'), 'n_heads'),
    (lambda t, c: c.update(cross_rope='other'), 'cross_rope'),
    (lambda t, c: c.update(n_heads=5), 'd_model')])
def test_files_that_do_not_fit(change, name, tmp_path):
    source = golden/'tiny'/'predictor'
    tensors, config = load_file(source/'model.safetensors'), read_config(source)
    change(tensors, config)
    save_file(tensors, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(config))
    with pytest.raises(KronosError, match=name): Kronos.from_pretrained(tmp_path)

def test_wrong_places(tmp_path):
    with pytest.raises(ModelError, match='config.json and model.safetensors'): Kronos.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match='absent'): Kronos.from_pretrained(tmp_path/'absent')
    with pytest.raises(ModelError, match='n_layers'): Kronos.from_pretrained(golden/'tiny'/'tokenizer')
    with pytest.raises(ConfigError, match='Kronos-mini'): Kronos.from_size('Kronos-mimi')
    with pytest.raises(ConfigError, match='group_size'): fresh('tokenizer', group_size=3)

def test_hub_id_offline_names_the_nearest(monkeypatch):
    def unreachable(*args, **kw): raise OSError('no network')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', unreachable)
    with pytest.raises(ModelError, match='NeoQuasar/Kronos-mini'): Kronos.from_pretrained('NeoQuasar/Kronos-mimi')

def test_hub_is_asked_for_the_two_files(monkeypatch):
    asked = []
    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(golden/'tiny'/'predictor'/name)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    Kronos.from_pretrained('somebody/model', revision='abc')
    assert set(asked) == {('somebody/model', o, 'abc') for o in ('config.json', 'model.safetensors', 'SHA256SUMS')}
