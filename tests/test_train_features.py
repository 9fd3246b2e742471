"Everything that a run can be asked for, each by its effect"
import copy, itertools, json, math, shutil, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from kronos_nb.callback.checkpoint import Checkpoint, read_checkpoint, split_tensors
from kronos_nb.callback.react import ResourceGuard
from kronos_nb.callback.train import adamw, lr_factor
from kronos_nb.cli import config_of, main, parser
from kronos_nb.config import PRESETS, SCHEDULES, VARIANTS, Config
from kronos_nb.core import ConfigError, RunError
from kronos_nb.data.kline import sample_klines
from kronos_nb.learner import Callback, Engine, Learner
from kronos_nb.machine import COMPILE_MODES
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.task import CLASSES, PredictorTask, TokenizerTask, WindowSource, build_model
from kronos_nb.train import fit, prepare
from tests.test_train import bars, cfg, no_test

quick = {**no_test, 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'tokenizer.average_last': 0, 'predictor.average_last': 0, 'predictor.ema_decay': None, 'predictor.lawa': None, 'data.stride': 4}
tok = quick | {'runtime.only': 'tokenizer', 'tokenizer.max_steps': 4}
def run(out, callbacks=(), **changes): return fit(bars, cfg.replace(**tok | changes), out, callbacks=callbacks)
def notes(out, stage='tokenizer'): return [json.loads(l)['text'] for l in (out/stage/'notes.jsonl').read_text().splitlines()]
def final(out, stage='tokenizer'): return load_file(out/stage/'final_model'/'model.safetensors')
def equal(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "Both stages, one epoch each"
    out = tmp_path_factory.mktemp('plain')/'run'
    fit(bars, cfg.replace(**quick), out)
    return out

# presets
SAID = dict(
    btc_original={'data.lookback_window': 90, 'data.predict_window': 10, 'tokenizer.epochs': 30, 'predictor.epochs': 30, 'tokenizer.lr': 2e-4, 'predictor.lr': 4e-5, 'tokenizer.batch_size': 50, 'tokenizer.weight_decay': .1,
        'tokenizer.clip_norm': 2., 'tokenizer.beta1': .9, 'tokenizer.beta2': .95, 'tokenizer.schedule': 'onecycle', 'tokenizer.warmup': .03, 'tokenizer.div_factor': 10., 'tokenizer.patience': None, 'augment.noise_std': 0., 'runtime.log_every': 100},
    btc_optimized={'data.lookback_window': 90, 'data.predict_window': 10, 'tokenizer.epochs': 30, 'predictor.epochs': 30, 'tokenizer.lr': 1e-4, 'predictor.lr': 4e-5, 'tokenizer.batch_size': 64, 'tokenizer.weight_decay': .05,
        'tokenizer.clip_norm': 1., 'predictor.clip_norm': 1., 'tokenizer.beta1': .9, 'tokenizer.beta2': .95, 'tokenizer.warmup': .1, 'tokenizer.div_factor': 25., 'tokenizer.final_div_factor': 100., 'tokenizer.patience': 5, 'tokenizer.min_delta': 1e-5,
        'augment.noise_std': .01, 'augment.feature_dropout': .1, 'augment.time_shift_max': 2, 'augment.scale_low': .95, 'augment.scale_high': 1.05, 'runtime.log_every': 100},
    doge={'data.lookback_window': 400, 'data.predict_window': 120, 'data.normalizer': 'median_mad', 'data.clip': 5., 'data.train': .7, 'data.val': .15, 'data.test': .15, 'tokenizer.lr': 5e-6, 'tokenizer.epochs': 5, 'predictor.lr': 2e-6, 'predictor.epochs': 15,
        'tokenizer.clip_norm': 3., 'predictor.clip_norm': 3., 'tokenizer.weight_decay': .01, 'predictor.weight_decay': .01, 'predictor.model': dict(ffn_dropout_p=.1, attn_dropout_p=.1, resid_dropout_p=.1), 'predictor.schedule': 'cosine',
        'runtime.precision': 'mixed', 'predictor.batch_size': 32, 'tokenizer.patience': 5, 'predictor.patience': 5},
    kaggle_stock={'data.lookback_window': 256, 'data.predict_window': 1, 'data.max_context': 512, 'data.train': .9, 'data.val': .1, 'data.test': 0., 'data.clip': 5., 'tokenizer.lr': 2e-4, 'tokenizer.epochs': 20, 'predictor.lr': 4e-5, 'predictor.epochs': 15,
        'tokenizer.batch_size': 32, 'predictor.weight_decay': .1, 'tokenizer.accumulation_steps': 1, 'runtime.workers': 4})
CHANGES = dict(
    strict_stopping={'tokenizer.patience': 3, 'tokenizer.min_delta': 1e-4}, lenient_stopping={'tokenizer.patience': 8, 'tokenizer.min_delta': 1e-6}, light_augmentation={'augment.noise_std': .005, 'augment.scale_low': .98, 'augment.scale_high': 1.02},
    strong_augmentation={'augment.noise_std': .02, 'augment.scale_low': .9, 'augment.scale_high': 1.1}, conservative_schedule={'tokenizer.lr': 5e-5, 'tokenizer.warmup': .15, 'tokenizer.div_factor': 50.},
    aggressive_schedule={'tokenizer.lr': 2e-4, 'tokenizer.warmup': .05, 'tokenizer.div_factor': 10.})

def test_presets_and_variants_hold_the_numbers_of_the_guides():
    for name, said in SAID.items():
        has = Config.preset(name).flat()
        assert {k: has[k] for k in said}==said, name
    assert set(CHANGES)==set(VARIANTS)
    for name, said in CHANGES.items():
        has = Config.preset('btc_optimized', name).flat()
        assert {k: has[k] for k in said}==said, name

def test_any_two_presets_side_by_side_are_one_diff_apart():
    for a, b in itertools.permutations(PRESETS, 2):
        d = Config.preset(a).diff(Config.preset(b), names=(a, b))
        assert len(d) and Config.preset(a).replace(**d[b].to_dict())==Config.preset(b)

def test_dry_run_shows_a_preset_beside_another(capsys, tmp_path):
    bars.to_csv(tmp_path/'GOOG.csv', index=False)
    small = [o for k, v in {'tokenizer.init': 'scratch', 'predictor.init': 'scratch', 'tokenizer.size': 'tiny', 'predictor.size': 'tiny', 'tokenizer.model': '{}', 'predictor.model': '{}'}.items() for o in ('--set', f'{k}={v}')]
    assert main(['fit', str(tmp_path/'GOOG.csv'), '--preset', 'btc_optimized', '--variant', 'strict_stopping', *small, '--out', str(tmp_path/'run'), '--test', '--beside', 'btc_original'])==0
    said = capsys.readouterr().out
    assert 'beside' not in said and 'btc_original' in said and 'tokenizer.lr' in said and '0.0001' in said and '0.0002' in said and 'Machine (cpu)' in said
    assert not (tmp_path/'run').exists()

# optimizer, accumulation, schedules
@pytest.mark.parametrize('stage', ['tokenizer', 'predictor'])
def test_eight_of_one_are_one_of_eight(stage):
    "Gradients before the step, with a remainder (3+3+2) too; zeta=0, since the codebook's entropy is a function of the batch mean"
    d, model = prepare(bars, cfg.replace(**quick)), dict(cfg.flat()[f'{stage}.model'])
    torch.manual_seed(0)
    models = dict(tokenizer=build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model | dict(zeta=0.)), predictor=build_model('predictor', 'scratch', 'tiny', cfg.predictor.model | dict(ffn_dropout_p=0., resid_dropout_p=0.)))
    got = {}
    class Look(Callback):
        def before_step(self, learn): self.grads = {n: p.grad.clone() for n, p in learn.model.named_parameters() if p.grad is not None}
    for micro in (8, 1, 3):
        m = copy.deepcopy(models)
        task = TokenizerTask(m['tokenizer']) if stage=='tokenizer' else PredictorTask(m['predictor'], m['tokenizer'])
        Learner(task, WindowSource(d.train, 8, seed=0), None, adamw(task, 1e-3), callbacks=[look := Look()], micro_batch=micro).fit(1, max_steps=1)
        got[micro] = look.grads
    for micro in (1, 3):
        for k, v in got[8].items(): torch.testing.assert_close(got[micro][k], v, rtol=1e-4, atol=1e-6, msg=f'{micro} {k}')

def test_accumulation_steps_are_a_bigger_batch(tmp_path):
    zero = {'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.)}
    run(tmp_path/'big', **zero, **{'tokenizer.batch_size': 16}); run(tmp_path/'acc', **zero, **{'tokenizer.batch_size': 4, 'tokenizer.accumulation_steps': 4})
    a, b = final(tmp_path/'big'), final(tmp_path/'acc')
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-6, msg=k)

@pytest.mark.parametrize('stage', CLASSES)
def test_matrices_decay_and_nothing_else(stage):
    model = build_model(stage, 'scratch', 'tiny')
    opt = adamw(model, 1e-3, (.8, .9), .3)
    decay = {id(p) for p in opt.param_groups[0]['params']}
    for n, p in model.named_parameters():
        kind = 'bias' if n.endswith('bias') else 'norm' if 'norm' in n else 'embedding' if '.emb_s' in n or n.startswith('time_emb') else 'matrix'
        assert (id(p) in decay)==(kind=='matrix'), n
    assert [g['weight_decay'] for g in opt.param_groups]==[.3, 0.] and opt.param_groups[0]['betas']==(.8, .9)

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_each_schedule_is_what_the_optimizer_gets(tmp_path, schedule):
    run(tmp_path/'run', **{'tokenizer.schedule': schedule, 'tokenizer.warmup': .25, 'tokenizer.max_steps': 6, 'tokenizer.epochs': 6, 'tokenizer.div_factor': 25., 'tokenizer.final_div_factor': 100.})
    rows = [json.loads(l)['learning_rate'] for l in (tmp_path/'run'/'tokenizer'/'steps.jsonl').read_text().splitlines()]
    np.testing.assert_allclose(rows, [cfg.tokenizer.lr*lr_factor(i, 6, schedule, .25, 25., 100.) for i in range(6)], rtol=1e-9)

def test_rates_are_tried_and_nothing_changes(tmp_path, plain):
    with_, without = tmp_path/'a', tmp_path/'b'
    run(with_, **{'runtime.find_lr': True}); run(without)
    table = pd.read_csv(with_/'tokenizer'/'lr_find.csv')
    assert table.lr.is_monotonic_increasing and (with_/'tokenizer'/'plots'/'lr_find.png').stat().st_size>5000
    assert any('the loss falls fastest near' in n for n in notes(with_)) and equal(final(with_), final(without))
    assert config_of(parser().parse_args(['fit', '--find-lr'])).runtime.find_lr

KNOBS = {'tokenizer.lr': 3e-3, 'tokenizer.beta1': .5, 'tokenizer.beta2': .5, 'tokenizer.weight_decay': .9, 'tokenizer.clip_norm': .01, 'tokenizer.batch_size': 8, 'tokenizer.accumulation_steps': 2, 'tokenizer.max_steps': 3, 'tokenizer.warmup': .9,
    'tokenizer.div_factor': 2., 'tokenizer.final_div_factor': 2., 'tokenizer.schedule': 'constant', 'tokenizer.trainable': 'last_1', 'tokenizer.model': cfg.tokenizer.model | dict(ffn_dropout_p=.5), 'data.stride': 3, 'data.clip': 1., 'data.windows_per_epoch': 40,
    'data.normalizer': 'median_mad', 'augment.noise_std': .05, 'augment.feature_dropout': .3, 'augment.time_shift_max': 2, 'augment.scale_high': 1.3, 'runtime.seed': 5, 'runtime.precision': 'bf16'}

@pytest.fixture(scope='module')
def four_steps(tmp_path_factory):
    out = tmp_path_factory.mktemp('four')/'run'
    run(out, **{'tokenizer.batch_size': 16})
    return final(out)

@pytest.mark.parametrize('knob', KNOBS)
def test_each_knob_reaches_the_weights(four_steps, tmp_path, knob):
    "The same four steps but for one setting end elsewhere"
    run(tmp_path/'run', **{'tokenizer.batch_size': 16} | {knob: KNOBS[knob]})
    assert not equal(final(tmp_path/'run'), four_steps)

def test_what_is_written_how_often_and_how_much_is_kept(four_steps, tmp_path):
    "Rows, validations, checkpoints and windows of a validation; the weights stay"
    out = tmp_path/'run'
    run(out, **{'tokenizer.batch_size': 16, 'runtime.log_every': 2, 'runtime.save_steps': 1, 'runtime.keep_last': 2, 'tokenizer.val_every': 1, 'data.val_windows': 20})
    lines = lambda name: [json.loads(l) for l in (out/'tokenizer'/f'{name}.jsonl').read_text().splitlines()]
    assert [o['step'] for o in lines('steps')]==[2, 4] and [o['step'] for o in lines('validations')]==[1, 2, 3, 4]
    assert sorted(o.name for o in (out/'tokenizer'/'checkpoints').glob('step_*'))==['step_000003', 'step_000004']
    assert json.loads((out/'run.json').read_text())['windows']['val']<=20 and equal(final(out), four_steps)

def test_no_update_is_longer_than_the_clip(tmp_path):
    "The norm that is logged is the one before; the one that the optimizer sees is cut"
    seen = []
    class Look(Callback):
        order = 25   # behind the clipping
        def before_step(self, learn): seen.append(float(torch.stack([p.grad.norm() for p in learn.model.parameters() if p.grad is not None]).norm()))
    run(tmp_path/'run', [Look()], **{'tokenizer.clip_norm': .05})
    rows = [json.loads(l) for l in (tmp_path/'run'/'tokenizer'/'steps.jsonl').read_text().splitlines()]
    assert all(o['clipped']==1 and o['gradient_norm']>.05 for o in rows)
    np.testing.assert_allclose(seen, .05, rtol=1e-3)

def test_the_rate_falls_when_validation_does_not(tmp_path):
    run(tmp_path/'run', **{'tokenizer.schedule': 'plateau', 'tokenizer.warmup': 0., 'tokenizer.plateau_patience': 0, 'tokenizer.plateau_factor': .1, 'tokenizer.val_every': 1, 'tokenizer.lr': 1e-12, 'tokenizer.max_steps': 6})
    rates = [json.loads(l)['learning_rate'] for l in (tmp_path/'run'/'tokenizer'/'steps.jsonl').read_text().splitlines()]
    assert rates[0]==1e-12 and rates[-1]<=1e-13 and any('learning rate times 0.1' in n for n in notes(tmp_path/'run'))

# stopping and keeping
def test_what_is_monitored_and_whether_more_is_better_is_said(tmp_path):
    out = tmp_path/'run'
    run(out, **{'tokenizer.monitor': 'val_codebook_entropy', 'tokenizer.mode': 'max', 'tokenizer.patience': 1, 'tokenizer.min_delta': 1e3, 'tokenizer.epochs': 20, 'tokenizer.max_steps': None, 'tokenizer.val_every': 2})
    rows = [json.loads(l) for l in (out/'tokenizer'/'validations.jsonl').read_text().splitlines()]
    assert len(rows)<=3 and any('early stopping: val_codebook_entropy did not improve' in n for n in notes(out))
    table = pd.DataFrame(json.loads((out/'tokenizer'/'weights.json').read_text())['table'])
    assert table.val_codebook_entropy.max()==table.val_codebook_entropy[table.chosen.to_numpy()].item() and 'val_loss' in table
    np.testing.assert_allclose(table.set_index('candidate').val_codebook_entropy['best'], max(r['val_codebook_entropy'] for r in rows), rtol=1e-5)
    with pytest.raises(ConfigError, match='predictor.monitor must be one of'): cfg.replace(**{'predictor.monitor': 'val_mse'})
    with pytest.raises(ConfigError, match='waits for a number that falls'): cfg.replace(**{'tokenizer.schedule': 'plateau', 'tokenizer.mode': 'max'})

def test_a_model_that_is_not_what_was_trained_is_found(tmp_path, monkeypatch):
    "One weight of best_model changes after it was chosen, as by a second run in the same folder"
    import kronos_nb.train as train
    real = train.check_reload
    def spoilt(stage, learn, weights):
        f = stage.out/'best_model'/'model.safetensors'
        t = load_file(f); k = next(o for o in t if o.endswith('head.bias') or o.endswith('proj_s1.bias'))
        t = {n: v.clone() for n, v in t.items()}; f.unlink()   # older versions of safetensors read a file only when a weight is looked at
        save_file(t | {k: t[k]+.01}, f)
        return real(stage, learn, weights)
    monkeypatch.setattr(train, 'check_reload', spoilt)
    with pytest.raises(RunError, match='does not compute what was trained: read back, its outputs differ by up to 0.0'): run(tmp_path/'run')
    assert not (tmp_path/'run'/'tokenizer'/'final_model').exists()

# stages
def test_the_predictor_uses_the_tokenizer_that_the_first_stage_made(plain):
    made = KronosTokenizer.from_pretrained(plain/'tokenizer'/'best_model').weights_hash()
    assert json.loads((plain/'predictor'/'best_model'/'config.json').read_text())['tokenizer_hash']==made
    torch.manual_seed(0)
    assert made!=build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model).weights_hash()

def test_finished_stages_are_skipped(plain, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(plain, out); shutil.rmtree(out/'predictor')
    at = lambda: {p: p.stat().st_mtime_ns for p in (out/'tokenizer').rglob('*') if p.is_file() and p.name!='README.md'}   # cards are written anew at each end
    before = at()
    r = fit(bars, cfg.replace(**quick, **{'runtime.skip_existing': True}), out)
    assert at()==before and set(r.history.stage)=={'predictor'}
    assert equal(final(out, 'predictor'), final(plain, 'predictor'))

def test_weights_from_a_folder_and_from_the_hub(plain, tmp_path, monkeypatch):
    "A folder, and the same files behind a hub id: the first validation is that of the weights given, before a step is made"
    import huggingface_hub
    said = pd.DataFrame(json.loads((plain/'tokenizer'/'weights.json').read_text())['table'])
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, name, revision=None: str(plain/repo.rpartition('-')[2]/'best_model'/name))
    outs = []
    for where in (str(plain/'tokenizer'/'best_model'), 'somebody/goog-tokenizer'):
        outs.append(tmp_path/str(len(outs)))
        run(outs[-1], **{'tokenizer.init': where, 'tokenizer.size': None, 'tokenizer.model': {}})
        first = json.loads((outs[-1]/'tokenizer'/'validations.jsonl').read_text().splitlines()[0])
        np.testing.assert_allclose((first['step'], first['val_loss']), (0, said.val_loss.min()), rtol=1e-5)
    assert equal(*map(final, outs))

@pytest.mark.parametrize('size', ['Kronos-Tokenizer-2k', 'tiny'])
def test_from_scratch_in_a_published_and_in_an_own_size(tmp_path, size):
    own = {} if size!='tiny' else dict(d_model=24, n_heads=3, s1_bits=3, s2_bits=6, group_size=9)
    r = run(tmp_path/'run', **{'tokenizer.size': size, 'tokenizer.model': own, 'tokenizer.batch_size': 2, 'tokenizer.max_steps': 1, 'data.val_windows': 4})
    assert (r.tokenizer.config['d_model'], r.tokenizer.s1_bits)==((256, 10) if size!='tiny' else (24, 3)), r.tokenizer.config

# numbers and memory
def test_bfloat16_trains_and_keeps_float32_weights(tmp_path):
    a, b = run(tmp_path/'a'), run(tmp_path/'b', **{'runtime.precision': 'bf16'})
    assert all(v.dtype in (torch.float32, torch.int64) for v in final(tmp_path/'b').values()) and not equal(final(tmp_path/'a'), final(tmp_path/'b'))
    np.testing.assert_allclose(b.history.val_loss, a.history.val_loss, rtol=.02)
    with pytest.raises(ConfigError, match="'fp16' needs CUDA"): run(tmp_path/'c', **{'runtime.precision': 'fp16', 'runtime.device': 'cpu'})

def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    run(tmp_path/'a'); run(tmp_path/'b', **{'runtime.gradient_checkpointing': True})
    a, b = final(tmp_path/'a'), final(tmp_path/'b')
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-7)

def test_gradient_checkpointing_computes_blocks_again(tmp_path, monkeypatch):
    "That is its price, and the sign that it is on"
    from kronos_nb.model import layers
    block, calls = next(o for o in vars(layers).values() if isinstance(o, type) and o.__name__=='Block'), []
    forward = block.forward
    monkeypatch.setattr(block, 'forward', lambda self, *a, **k: (calls.append(torch.is_grad_enabled() and self.training), forward(self, *a, **k))[1])
    count = {}
    for on in (False, True):
        calls.clear(); run(tmp_path/f'{on}', **{'runtime.gradient_checkpointing': on}); count[on] = sum(calls)
    assert count[True]==2*count[False]>0, count

def test_memory_that_runs_out_halves_the_micro_batch(tmp_path, monkeypatch, capsys):
    zero = {'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.), 'tokenizer.batch_size': 16}
    run(tmp_path/'a', **zero)
    forward = TokenizerTask.forward
    def small(self, x, stamp=None):
        if self.training and len(x)>5: raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(self, x, stamp)
    monkeypatch.setattr(TokenizerTask, 'forward', small)
    run(tmp_path/'b', **zero, **{'runtime.progress': True})
    a, b, said = final(tmp_path/'a'), final(tmp_path/'b'), notes(tmp_path/'b')
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-6, msg=k)
    assert [n for n in said if n.startswith('out of memory at')]==[f'out of memory at {n} windows per forward pass: going on with {n//2}, accumulated to the same step' for n in (16, 8)]
    assert 'runtime.gradient_checkpointing=True (now False)' in capsys.readouterr().out and any('runtime.micro_batch set to that number' in n for n in said)

def test_memory_that_runs_out_in_a_validation_changes_no_mean(plain, tmp_path, monkeypatch):
    "Validation, the codebook's count and the choice of weights go on in pieces; training does not notice"
    zero = {'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.), 'tokenizer.batch_size': 16}
    run(tmp_path/'a', **zero)
    forward = TokenizerTask.forward
    def small(self, x, stamp=None):
        if not self.training and len(x)>5: raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(self, x, stamp)
    monkeypatch.setattr(TokenizerTask, 'forward', small)
    run(tmp_path/'b', **zero)
    assert [n for n in notes(tmp_path/'b') if n.startswith('out of memory at')]==[f'out of memory at {n} windows of a validation: going on with {n//2}, which gives the same mean' for n in (16, 8)]
    assert equal(final(tmp_path/'a'), final(tmp_path/'b'))
    rows = [json.loads((tmp_path/o/'tokenizer'/'weights.json').read_text())['table'][0]['val_loss'] for o in 'ab']
    np.testing.assert_allclose(*[[json.loads(l)['val_loss'] for l in (tmp_path/o/'tokenizer'/'validations.jsonl').read_text().splitlines()] + [r] for o, r in zip('ab', rows)], rtol=1e-6)

def test_memory_that_runs_out_while_windows_are_encoded(plain, tmp_path, monkeypatch):
    encode = KronosTokenizer.encode
    def small(self, x, half=False):
        if len(x)>20 and x.shape[1]==20: raise MemoryError   # windows; forecasts have 16 bars
        return encode(self, x, half)
    monkeypatch.setattr(KronosTokenizer, 'encode', small)
    fit(bars, cfg.replace(**quick, **{'runtime.only': 'predictor', 'predictor.tokenizer': str(plain/'tokenizer'/'best_model')}), tmp_path/'run')
    said = [n for n in notes(tmp_path/'run', 'predictor') if n.startswith('out of memory')]
    assert said==[f'out of memory while {n} windows were encoded into tokens: going on with {n//2} at a time' for n in (64, 32)]*2   # of training, then of validation
    got = [json.loads((o/'predictor'/'weights.json').read_text())['table'][0]['val_loss'] for o in (plain, tmp_path/'run')]
    np.testing.assert_allclose(got[1], got[0], rtol=1e-3)

# the machine
def test_compile_falls_back_and_says_so(tmp_path, monkeypatch):
    modes = []
    def broken(self, **kw): modes.append(kw); raise RuntimeError('no compiler')
    monkeypatch.setattr(torch.nn.Module, 'compile', broken)
    run(tmp_path/'a', **{'runtime.compile': True}); run(tmp_path/'b')
    assert any('torch.compile does not work here (RuntimeError: no compiler): going on without it' in n for n in notes(tmp_path/'a')) and equal(final(tmp_path/'a'), final(tmp_path/'b'))
    assert modes==[dict(mode='default')] and (COMPILE_MODES['cuda'], COMPILE_MODES['mps'])==('max-autotune', 'reduce-overhead')

def test_a_compiler_whose_gradients_do_not_add_up_is_not_used(tmp_path, monkeypatch):
    "As CUDA graphs without buffers for the gradients: each pass overwrites the one before it"
    def forgetful(self, **kw):
        def call(*a, **k):
            for p in self.parameters(): p.grad = None
            return self.forward(*a, **k)
        self._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, 'compile', forgetful)
    run(tmp_path/'a', **{'runtime.compile': True}); run(tmp_path/'b')
    assert any('torch.compile does not work here (the gradients of three passes over a batch add up to 1 times those of one): going on without it' in n for n in notes(tmp_path/'a')) and equal(final(tmp_path/'a'), final(tmp_path/'b'))

def test_what_is_compiled_trains_the_same_in_micro_batches_too(tmp_path, monkeypatch):
    "With a compiler that does nothing: gradients in buffers of their own; memory that runs out while it is tried is no failure of it"
    tried, said = [], {'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.), 'tokenizer.batch_size': 16, 'runtime.micro_batch': 8}
    def eager(self, **kw): self._compiled_call_impl = lambda *a, **k: tried.append(len(k['x'])) or short(self, k) or self.forward(*a, **k)
    def short(self, k):
        if len(tried)==1: raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
    monkeypatch.setattr(torch.nn.Module, 'compile', eager)
    run(tmp_path/'a', **said, **{'runtime.compile': True}); run(tmp_path/'b', **said)
    assert tried[:4]==[8, 4, 4, 4] and not any('does not work here' in n for n in notes(tmp_path/'a')) and equal(final(tmp_path/'a'), final(tmp_path/'b'))

def test_optimizations_off_is_said_and_trains_the_same(tmp_path):
    run(tmp_path/'a'); run(tmp_path/'b', **{'runtime.optimizations': False, 'runtime.workers': 3, 'runtime.compile': True})
    assert any('optimizations are off' in n and 'not used: runtime.workers=3, runtime.compile=True' in n for n in notes(tmp_path/'b')) and any(n.startswith('machine (cpu)') for n in notes(tmp_path/'a'))
    if torch.get_num_threads()==1: assert equal(final(tmp_path/'a'), final(tmp_path/'b'))

@pytest.mark.parametrize('loader', [{'runtime.workers': 1}, {'runtime.workers': 1, 'runtime.persistent_workers': False, 'runtime.prefetch': 2}])
def test_loader_processes_change_nothing(tmp_path, loader):
    run(tmp_path/'a', **{'tokenizer.epochs': 2}); run(tmp_path/'b', **loader, **{'tokenizer.epochs': 2})
    assert equal(final(tmp_path/'a'), final(tmp_path/'b'))

def test_threads_and_loaders_are_those_asked_for(tmp_path, monkeypatch):
    "By what torch is told; with optimizations off it is told nothing"
    loaders, seen = [], []
    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *a, **k): loaders.append({o: k[o] for o in ('num_workers', 'prefetch_factor', 'persistent_workers')}); super().__init__(*a, **k)
    monkeypatch.setattr(torch.utils.data, 'DataLoader', Loader)
    class Look(Callback):
        def before_fit(self, learn): seen.append(torch.get_num_threads())
    before = torch.get_num_threads()
    asked = {'runtime.threads': 2, 'runtime.workers': 1, 'runtime.prefetch': 3, 'runtime.persistent_workers': False}
    run(tmp_path/'a', [Look()], **asked)
    assert seen==[2] and loaders and all(o==dict(num_workers=1, prefetch_factor=3, persistent_workers=False) for o in loaders) and torch.get_num_threads()==before
    loaders.clear()
    off = config_of(parser().parse_args(['fit', '--disable-optimizations'])).runtime
    assert not off.optimizations
    run(tmp_path/'b', [Look()], **asked, **{'runtime.optimizations': off.optimizations})
    assert seen==[2, before] and not loaders

def test_tokens_are_kept_where_asked_and_within_a_bound(plain, tmp_path, monkeypatch):
    import kronos_nb.train as train
    d, asked, real = prepare(bars, cfg.replace(**quick)), [], train.encode_windows
    monkeypatch.setattr(train, 'encode_windows', lambda tok, ds, device, folder, *a: asked.append(folder and Path(folder).name) or real(tok, ds, device, folder, *a))
    for where, said in dict(memory=[None, None], disk=['tokens', 'tokens'], off=[]).items():
        asked.clear()
        fit(bars, cfg.replace(**quick, **{'predictor.max_steps': 1, 'runtime.only': 'predictor', 'runtime.cache_tokens': where, 'predictor.tokenizer': str(plain/'tokenizer'/'best_model')}), tmp_path/where)
        assert asked==said and not list((tmp_path/where).rglob('tokens/*'))   # gone with the source
    class Many:   # a billion windows would be eighty gigabytes
        window = 20
        def __len__(self): return 10**9
    stage = train.Stage('predictor', cfg.replace(**quick), tmp_path, d, Engine('cpu'))
    assert train._where_tokens(stage, train.Augment())=='memory'
    stage.data = type('Prepared', (), dict(train=Many()))
    assert train._where_tokens(stage, train.Augment())=='off'
    with pytest.raises(ConfigError, match='augment is on'): fit(bars, cfg.replace(**quick, **{'runtime.cache_tokens': 'disk', 'augment.noise_std': .1}), tmp_path/'no')

@pytest.mark.parametrize('where', ['memory', 'disk', 'off'])
def test_where_tokens_are_kept_changes_little(plain, tmp_path, where):
    "Encoded once (memory, disk) or in the loop: up to a token in a thousand that falls to the other side of a border"
    fit(bars, cfg.replace(**quick, **{'runtime.only': 'predictor', 'runtime.cache_tokens': where, 'predictor.tokenizer': str(plain/'tokenizer'/'best_model')}), tmp_path/'run')
    if where!='off': assert equal(final(plain, 'predictor'), final(tmp_path/'run', 'predictor'))
    got = [json.loads((o/'predictor'/'weights.json').read_text())['table'][0]['val_loss'] for o in (plain, tmp_path/'run')]
    np.testing.assert_allclose(got[1], got[0], rtol=1e-3)

# stopping and going on
class Seen(Callback):
    def before_fit(self, learn): self.limits = next((c.limits for c in learn.callbacks if isinstance(c, ResourceGuard)), None)

def test_the_guard_takes_its_four_limits_from_the_settings(tmp_path):
    seen, limits = Seen(), dict(cpu=100., memory=99.9, gpu=98., gpu_memory=97.)
    run(tmp_path/'a', [seen], **{f'runtime.max_{k}': v for k, v in limits.items()})
    assert seen.limits==limits
    run(tmp_path/'b', [seen])
    assert seen.limits is None

class Slow(Callback):
    "Every step takes a quarter of an hour, on a clock of its own: how fast a machine is must not decide a test"
    def __init__(self, monkeypatch):
        self.spent, real = 0., time.monotonic
        monkeypatch.setattr(time, 'monotonic', lambda: real() + self.spent)
    def after_step(self, learn): self.spent += 900

def test_a_time_limit_stops_in_time_and_the_rest_is_the_same(tmp_path, monkeypatch):
    long, slow = {'tokenizer.epochs': 3, 'tokenizer.max_steps': None}, Slow(monkeypatch)
    part = run(tmp_path/'a', [slow], **long, **{'runtime.max_time': '1h30m'})
    assert part.interrupted and part.stop_reason=='the time limit is near' and not (tmp_path/'a'/'tokenizer'/'final_model').exists()
    assert 900 <= slow.spent < 5400   # before the limit, not after
    run(tmp_path/'a', **long); run(tmp_path/'b', **long)
    assert equal(final(tmp_path/'a'), final(tmp_path/'b'))

def test_a_checkpoint_of_two_processes_is_not_for_one(tmp_path, monkeypatch):
    out = tmp_path/'run'
    assert run(out, [Slow(monkeypatch)], **{'tokenizer.epochs': 3, 'tokenizer.max_steps': None, 'runtime.max_time': '1h30m'}).interrupted
    last = max((out/'tokenizer'/'checkpoints').glob('step_*'))
    saved = json.loads((last/'training.json').read_text()); saved['tree']['world'] = 2
    (last/'training.json').write_text(json.dumps(saved))
    import hashlib
    m = json.loads((last/'manifest.json').read_text()); m['files']['training.json'] = hashlib.sha256((last/'training.json').read_bytes()).hexdigest()
    (last/'manifest.json').write_text(json.dumps(m))
    with pytest.raises(RunError, match='written by 2 processes, and there is 1 now'): run(out, **{'tokenizer.epochs': 3, 'tokenizer.max_steps': None})

def test_the_scaler_goes_into_a_checkpoint_and_back(tmp_path):
    "As with fp16 on CUDA: the loss scale is part of the state"
    task = TokenizerTask(build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model))
    d = prepare(bars, cfg.replace(**quick))
    learn = Learner(task, WindowSource(d.train, 16), None, adamw(task, 1e-3), callbacks=[c := Checkpoint(tmp_path, 100)]).fit(1, 1)
    learn.engine.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=1234.)
    learn.engine.accelerator.scaler.scale(torch.ones(1))
    c.save(learn)
    learn.engine.accelerator.scaler = torch.amp.GradScaler('cpu')
    c.resume(learn)
    assert learn.engine.accelerator.scaler.get_scale()==1234.
    learn.engine.accelerator.scaler = None

class Half(Engine):
    "fp16 with its loss scaler, on the CPU: what CUDA does, slower"
    def __init__(self, scale=2.**40):
        super().__init__('cpu')
        a = self.accelerator
        a.native_amp, a.state._mixed_precision, a.scaler = True, 'fp16', torch.amp.GradScaler('cpu', init_scale=scale)

def test_fp16_finds_its_scale_clips_what_it_scaled_and_goes_on_with_the_same_bits(tmp_path):
    "The scale is far too high at first: more than five updates are refused, and that is no reason to stop. Norms are those of the gradients, not of the scaled ones"
    from accelerate.state import AcceleratorState
    from kronos_nb.callback.train import Clip, FiniteCheck
    d, ends = prepare(bars, cfg.replace(**quick)), {}
    class Stop(Callback):
        def after_step(self, learn):
            if learn.step==self.at: learn.stop('enough', interrupted=True)
    def learner(name, engine, at=99):
        torch.manual_seed(0)
        task, stop = TokenizerTask(build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model)), Stop()
        stop.at = at
        return Learner(task, WindowSource(d.train, 16, seed=0), None, adamw(task, 1e-3), engine=engine, callbacks=[Clip(2.), FiniteCheck(5), Checkpoint(tmp_path/name, 4), stop])
    try:
        whole = learner('a', Half()).fit(9, 40)
        learner('b', Half(), at=30).fit(9, 40)
        rest = learner('b', Half())
        next(c for c in rest.callbacks if isinstance(c, Checkpoint)).resume(rest)
        rest.fit(9, 40)
    finally: AcceleratorState._reset_state()
    full = learner('c', Engine('cpu')).fit(9, 40)
    refused = [n for n in whole.history.notes if 'update skipped' in n['text']]
    scale = whole.engine.accelerator.scaler.get_scale()
    assert 5 < len(refused) < 35 and scale==2.**(40-len(refused)), (len(refused), scale)
    assert equal(whole.model.state_dict(), rest.model.state_dict()) and rest.engine.accelerator.scaler.get_scale()==scale
    late = lambda h: np.mean([r['gradient_norm'] for r in h.steps[-5:]])
    assert .3 < late(whole.history)/late(full.history) < 3 and whole.history.steps[-1]['loss'] < whole.history.steps[0]['loss']

def test_windows_that_give_no_numbers_are_named(tmp_path):
    "Infinite losses, five in a row: the weights never see them, the fit stops and says which windows"
    from kronos_nb.callback.train import FiniteCheck
    class Bad(Callback):
        def after_loss(self, learn):
            if learn.step>=1: learn.losses['loss'] = learn.losses['loss']*math.inf
    with pytest.raises(RunError, match=r'5 updates in a row had a loss or gradient that is not finite .*epoch 2, step 5, windows \[\d+'): run(tmp_path/'run', [Bad()], **{'tokenizer.max_steps': 9, 'tokenizer.epochs': 9})
    saved = [split_tensors(read_checkpoint(p))[1] for p in (tmp_path/'run'/'tokenizer'/'checkpoints').glob('step_*')]
    assert all(torch.isfinite(v).all() for s in saved for v in s.values() if v.is_floating_point())
