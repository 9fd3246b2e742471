"Everything that a run can be asked for, each by its effect"
import copy
import dataclasses
import itertools
import json
import math
import shutil
import time

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from kronos_nb.cli import config_of, main, parser
from kronos_nb.config import PRESETS, SCHEDULES, VARIANTS, Config
from kronos_nb.core import ConfigError, RunError
from kronos_nb.fitting import stage as stage_page
from kronos_nb.fitting.prepare import prepare
from kronos_nb.hashes import SUMS
from kronos_nb.machine import COMPILE_MODES
from kronos_nb.model import layers
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import fit, load
from kronos_nb.training.checkpoint import Checkpoint, read_checkpoint, split_tensors
from kronos_nb.training.guard import ResourceGuard
from kronos_nb.training.learner import Backend, Callback, Learner
from kronos_nb.training.optim import Clip, FiniteCheck, adamw, lr_factor
from kronos_nb.training.run import RunStage
from kronos_nb.training.task import CLASSES, PredictorTask, TokenizerTask, WindowSource, build_model
from tests.conftest import fit_once
from tests.helpers import assert_close, bars, cfg, choice, equal, final, four_steps, notes, one_epoch, rows


def run(out, callbacks=(), **changes):
    "Train four steps of a tokenizer, with changes"
    return fit(bars, cfg.replace(**four_steps | changes), out, callbacks=callbacks)


def run_predictor(out, tokenizer_run, **changes):
    "Train one epoch of a predictor on the tokenizer of another run"
    made = str(tokenizer_run/'tokenizer'/'best_model')
    only = {'runtime.only': 'predictor', 'predictor.tokenizer': made}
    return fit(bars, cfg.replace(**one_epoch | only | changes), out)


def first_loss(out, stage='predictor'):
    "Return the validation loss of the best step, read back"
    return choice(out, stage)['table'][0]['val_loss']


def losses(out):
    return [o['val_loss'] for o in rows(out, 'validations')]


def halvings(found):
    return [(n['where'], n['size'], n['half']) for n in found]


def tokenizer_task(**settings):
    return TokenizerTask(build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model | settings))


@pytest.fixture(scope='module')
def data():
    return prepare(bars, cfg.replace(**one_epoch))


# presets
BTC = {'data.lookback_window': 90, 'data.predict_window': 10, 'tokenizer.epochs': 30, 'predictor.epochs': 30,
       'tokenizer.beta1': .9, 'tokenizer.beta2': .95, 'predictor.lr': 4e-5, 'runtime.log_every': 100}
PRESET_VALUES = dict(
    btc_original=BTC | {
        'tokenizer.lr': 2e-4, 'tokenizer.batch_size': 50, 'tokenizer.weight_decay': .1, 'tokenizer.clip_norm': 2.,
        'tokenizer.schedule': 'onecycle', 'tokenizer.warmup': .03, 'tokenizer.div_factor': 10.,
        'tokenizer.patience': None, 'augment.noise_std': 0.},
    btc_optimized=BTC | {
        'tokenizer.lr': 1e-4, 'tokenizer.batch_size': 64, 'tokenizer.weight_decay': .05, 'tokenizer.clip_norm': 1.,
        'predictor.clip_norm': 1., 'tokenizer.warmup': .1, 'tokenizer.div_factor': 25.,
        'tokenizer.final_div_factor': 100., 'tokenizer.patience': 5, 'tokenizer.min_delta': 1e-5,
        'augment.noise_std': .01, 'augment.feature_dropout': .1, 'augment.time_shift_max': 2,
        'augment.scale_low': .95, 'augment.scale_high': 1.05},
    doge={
        'data.lookback_window': 400, 'data.predict_window': 120, 'data.normalizer': 'median_mad', 'data.clip': 5.,
        'data.train': .7, 'data.val': .15, 'data.test': .15, 'tokenizer.lr': 5e-6, 'tokenizer.epochs': 5,
        'predictor.lr': 2e-6, 'predictor.epochs': 15, 'tokenizer.clip_norm': 3., 'predictor.clip_norm': 3.,
        'tokenizer.weight_decay': .01, 'predictor.weight_decay': .01, 'predictor.schedule': 'cosine',
        'predictor.model': dict(ffn_dropout_p=.1, attn_dropout_p=.1, resid_dropout_p=.1),
        'runtime.precision': 'mixed', 'predictor.batch_size': 32, 'tokenizer.patience': 5, 'predictor.patience': 5},
    kaggle_stock={
        'data.lookback_window': 256, 'data.predict_window': 1, 'data.max_context': 512, 'data.train': .9,
        'data.val': .1, 'data.test': 0., 'data.clip': 5., 'tokenizer.lr': 2e-4, 'tokenizer.epochs': 20,
        'predictor.lr': 4e-5, 'predictor.epochs': 15, 'tokenizer.batch_size': 32, 'predictor.weight_decay': .1,
        'tokenizer.accumulation_steps': 1, 'runtime.workers': 4})
VARIANT_VALUES = dict(
    strict_stopping={'tokenizer.patience': 3, 'tokenizer.min_delta': 1e-4},
    lenient_stopping={'tokenizer.patience': 8, 'tokenizer.min_delta': 1e-6},
    light_augmentation={'augment.noise_std': .005, 'augment.scale_low': .98, 'augment.scale_high': 1.02},
    strong_augmentation={'augment.noise_std': .02, 'augment.scale_low': .9, 'augment.scale_high': 1.1},
    conservative_schedule={'tokenizer.lr': 5e-5, 'tokenizer.warmup': .15, 'tokenizer.div_factor': 50.},
    aggressive_schedule={'tokenizer.lr': 2e-4, 'tokenizer.warmup': .05, 'tokenizer.div_factor': 10.})


def values_of(config, like):
    flat = config.flat()
    return {name: flat[name] for name in like}


def test_presets_and_variants_hold_the_numbers_of_the_guides():
    for name, values in PRESET_VALUES.items():
        assert values_of(Config.preset(name), values) == values, name
    assert set(VARIANT_VALUES) == set(VARIANTS)
    for name, values in VARIANT_VALUES.items():
        assert values_of(Config.preset('btc_optimized', name), values) == values, name


def test_any_two_presets_are_one_diff_apart():
    for a, b in itertools.permutations(PRESETS, 2):
        diff = Config.preset(a).diff(Config.preset(b), names=(a, b))
        assert len(diff) and Config.preset(a).replace(**diff[b].to_dict()) == Config.preset(b)


def test_dry_run_shows_a_preset_beside_another(capsys, tmp_path):
    bars.to_csv(tmp_path/'GOOG.csv', index=False)
    tiny = {f'{stage}.{name}': value for stage in ('tokenizer', 'predictor')
            for name, value in dict(init='scratch', size='tiny', model='{}').items()}
    sets = [word for name, value in tiny.items() for word in ('--set', f'{name}={value}')]
    how = ['--preset', 'btc_optimized', '--variant', 'strict_stopping', '--test', '--beside', 'btc_original']
    assert main(['fit', str(tmp_path/'GOOG.csv'), *how, *sets, '--out', str(tmp_path/'run')]) == 0
    said = capsys.readouterr().out
    for text in ('btc_original', 'tokenizer.lr', '0.0001', '0.0002', 'Machine (cpu)'):
        assert text in said
    assert not (tmp_path/'run').exists()


# optimizer, accumulation, schedules
class Gradients(Callback):
    "Keep the gradients of the last step"
    def before_step(self, learn):
        self.grads = {n: p.grad.clone() for n, p in learn.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('stage', CLASSES)
def test_eight_of_one_are_one_of_eight(data, stage):
    "Gradients before the step, with a remainder (3 + 3 + 2) too"
    torch.manual_seed(0)
    made = tokenizer_task(zeta=0.)
    if stage == 'predictor':
        no_dropout = cfg.predictor.model | dict(ffn_dropout_p=0., resid_dropout_p=0.)
        made = PredictorTask(build_model('predictor', 'scratch', 'tiny', no_dropout), made.model)

    def gradients(micro_batch):
        task, look = copy.deepcopy(made), Gradients()
        source = WindowSource(data.train, 8, seed=0)
        Learner(task, source, None, adamw(task, 1e-3), callbacks=[look], micro_batch=micro_batch).fit(1, max_steps=1)
        return look.grads

    whole = gradients(8)
    for micro_batch in (1, 3):
        assert_close(gradients(micro_batch), whole, rtol=1e-4, atol=1e-6)


def test_accumulation_steps_are_a_bigger_batch(four_steps_run, tmp_path):
    run(tmp_path, **{'tokenizer.batch_size': 4, 'tokenizer.accumulation_steps': 4})
    assert_close(final(tmp_path), final(four_steps_run), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('stage', CLASSES)
def test_matrices_decay_and_nothing_else(stage):
    model = build_model(stage, 'scratch', 'tiny')
    opt = adamw(model, 1e-3, (.8, .9), .3)
    decay = {id(p) for p in opt.param_groups[0]['params']}
    for name, p in model.named_parameters():
        plain = name.endswith('bias') or 'norm' in name or '.emb_s' in name or name.startswith('time_emb')
        assert (id(p) in decay) != plain, name
    assert [g['weight_decay'] for g in opt.param_groups] == [.3, 0.] and opt.param_groups[0]['betas'] == (.8, .9)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_each_schedule_is_what_the_optimizer_gets(tmp_path, schedule):
    settings = dict(warmup=.25, div_factor=25., final_div_factor=100.)
    changes = dict(schedule=schedule, max_steps=6) | settings
    run(tmp_path, **{f'tokenizer.{name}': value for name, value in changes.items()})
    rates = [o['learning_rate'] for o in rows(tmp_path, 'steps')]
    factors = [lr_factor(i, 6, schedule, *settings.values()) for i in range(6)]
    np.testing.assert_allclose(rates, cfg.tokenizer.lr*np.array(factors), rtol=1e-9)


def test_the_rate_falls_when_validation_does_not(tmp_path):
    run(tmp_path, **{
        'tokenizer.schedule': 'plateau', 'tokenizer.warmup': 0., 'tokenizer.plateau_patience': 0,
        'tokenizer.plateau_factor': .1, 'tokenizer.val_every': 1, 'tokenizer.lr': 1e-12, 'tokenizer.max_steps': 6})
    rates = [o['learning_rate'] for o in rows(tmp_path, 'steps')]
    assert rates[0] == 1e-12 and rates[-1] <= 1e-13 and notes(tmp_path, 'lr_reduced')[0]['scale'] == .1


def test_rates_are_tried_and_nothing_changes(four_steps_run, tmp_path):
    run(tmp_path, **{'runtime.find_lr': True})
    table = pd.read_csv(tmp_path/'tokenizer'/'lr_find.csv')
    assert table.lr.is_monotonic_increasing
    assert (tmp_path/'tokenizer'/'plots'/'lr_find.png').stat().st_size > 5000
    assert notes(tmp_path, 'lr_find') and equal(final(tmp_path), final(four_steps_run))
    assert config_of(parser().parse_args(['fit', '--find-lr'])).runtime.find_lr


OTHER_VALUES = {
    'tokenizer.lr': 3e-3, 'tokenizer.beta1': .5, 'tokenizer.beta2': .5, 'tokenizer.weight_decay': .9,
    'tokenizer.clip_norm': .01, 'tokenizer.batch_size': 8, 'tokenizer.accumulation_steps': 2, 'tokenizer.max_steps': 3,
    'tokenizer.warmup': .9, 'tokenizer.div_factor': 2., 'tokenizer.final_div_factor': 2.,
    'tokenizer.schedule': 'constant', 'tokenizer.trainable': 'last_1',
    'tokenizer.model': cfg.tokenizer.model | dict(zeta=0., ffn_dropout_p=.5), 'data.stride': 3, 'data.clip': 1.,
    'data.windows_per_epoch': 40, 'data.normalizer': 'median_mad', 'augment.noise_std': .05,
    'augment.feature_dropout': .3, 'augment.time_shift_max': 2, 'augment.scale_high': 1.3, 'runtime.seed': 5,
    'runtime.precision': 'bf16'}


@pytest.mark.parametrize('setting', OTHER_VALUES)
def test_each_setting_reaches_the_weights(four_steps_run, tmp_path, setting):
    "The same four steps but for one setting end elsewhere; in bfloat16 with float32 weights and nearly the same loss"
    done = run(tmp_path, **{setting: OTHER_VALUES[setting]})
    assert not equal(final(tmp_path), final(four_steps_run))
    if setting == 'runtime.precision':
        assert all(v.dtype in (torch.float32, torch.int64) for v in final(tmp_path).values())
        np.testing.assert_allclose(done.history.val_loss, losses(four_steps_run), rtol=.02)


def test_half_precision_needs_cuda(tmp_path):
    with pytest.raises(ConfigError, match='fp16'):
        run(tmp_path, **{'runtime.precision': 'fp16', 'runtime.device': 'cpu'})


def test_what_is_written_how_often_and_how_much_is_kept(four_steps_run, tmp_path):
    "Rows, validations, checkpoints and windows of a validation; the weights stay"
    run(tmp_path, **{'runtime.log_every': 2, 'runtime.save_steps': 1, 'runtime.keep_last': 2,
                     'tokenizer.val_every': 1, 'data.val_windows': 20})
    assert [o['step'] for o in rows(tmp_path, 'steps')] == [2, 4]
    assert [o['step'] for o in rows(tmp_path, 'validations')] == [1, 2, 3, 4]
    kept = sorted(p.name for p in (tmp_path/'tokenizer'/'checkpoints').glob('step_*'))
    assert kept == ['step_000003', 'step_000004']
    assert json.loads((tmp_path/'run.json').read_text())['windows']['val'] <= 20
    assert equal(final(tmp_path), final(four_steps_run))


class Norms(Callback):
    "Record the norms that the optimizer sees"
    order = Clip.order + 5

    def __init__(self):
        self.norms = []

    def before_step(self, learn):
        grads = [p.grad.norm() for p in learn.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(grads).norm()))


def test_no_update_is_longer_than_the_clip(tmp_path):
    "The norm in the record is the one before clipping"
    run(tmp_path, [look := Norms()], **{'tokenizer.clip_norm': .05})
    assert all(o['clipped'] == 1 and o['gradient_norm'] > .05 for o in rows(tmp_path, 'steps'))
    np.testing.assert_allclose(look.norms, .05, rtol=1e-3)


# choosing and keeping
def test_monitor_and_mode_choose_the_weights_and_stop(tmp_path):
    name = 'val_codebook_entropy'
    run(tmp_path, **{
        'tokenizer.monitor': name, 'tokenizer.mode': 'max', 'tokenizer.patience': 1, 'tokenizer.min_delta': 1e3,
        'tokenizer.epochs': 20, 'tokenizer.max_steps': None, 'tokenizer.val_every': 2})
    validations = rows(tmp_path, 'validations')
    assert len(validations) <= 3 and notes(tmp_path, 'early_stopping')[-1]['monitor'] == name
    table = pd.DataFrame(choice(tmp_path)['table']).set_index('candidate')
    assert table[name].idxmax() == choice(tmp_path)['chosen'] and 'val_loss' in table
    np.testing.assert_allclose(table[name]['best'], max(o[name] for o in validations), rtol=1e-5)
    with pytest.raises(ConfigError, match='predictor.monitor'):
        cfg.replace(**{'predictor.monitor': 'val_mse'})
    with pytest.raises(ConfigError, match='tokenizer.schedule'):
        cfg.replace(**{'tokenizer.schedule': 'plateau', 'tokenizer.mode': 'max'})


def test_a_model_that_is_not_what_was_trained_is_found(tmp_path, monkeypatch):
    "One weight of best_model changes after it was chosen, as by a second run in the same folder"
    check = stage_page._check_reload

    def spoil_and_check(stage, learn, weights):
        file = stage.files.best_model/'model.safetensors'
        spoilt = {k: v.clone() for k, v in weights.items()}
        spoilt[next(k for k in spoilt if k.endswith('head.bias'))] += .01
        file.unlink()   # older versions of safetensors read a file only when a weight is looked at
        (file.parent/SUMS).unlink()   # whoever wrote it wrote no hashes
        save_file(spoilt, file)
        return check(stage, learn, weights)

    monkeypatch.setattr(stage_page, '_check_reload', spoil_and_check)
    with pytest.raises(RunError, match=r'best_model.*differ by up to 0\.0'):
        run(tmp_path)
    assert not (tmp_path/'tokenizer'/'final_model').exists()


# stages and where weights come from
def test_the_predictor_uses_the_tokenizer_of_the_first_stage(one_epoch_run):
    made = KronosTokenizer.from_pretrained(one_epoch_run/'tokenizer'/'best_model').weights_hash()
    config = json.loads((one_epoch_run/'predictor'/'best_model'/'config.json').read_text())
    torch.manual_seed(0)
    assert config['tokenizer_hash'] == made != tokenizer_task().model.weights_hash()


def test_finished_stages_are_skipped(one_epoch_run, tmp_path):
    out = shutil.copytree(one_epoch_run, tmp_path/'run')
    shutil.rmtree(out/'predictor')

    def stamps():   # cards are written anew at each end
        files = [p for p in (out/'tokenizer').rglob('*') if p.is_file() and p.name != 'README.md']
        return {p: p.stat().st_mtime_ns for p in files}

    before = stamps()
    done = fit(bars, cfg.replace(**one_epoch, **{'runtime.skip_existing': True}), out)
    assert stamps() == before and set(done.history.stage) == {'predictor'}
    assert equal(final(out, 'predictor'), final(one_epoch_run, 'predictor'))


def test_weights_from_a_folder_and_from_the_hub(four_steps_run, tmp_path, monkeypatch):
    "The first validation is that of the weights given, before a step is made"
    best = four_steps_run/'tokenizer'/'best_model'
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, name, revision=None: str(best/name))
    outs = dict(folder=str(best), hub='somebody/goog-tokenizer')
    for name, init in outs.items():
        run(tmp_path/name, **{'tokenizer.init': init, 'tokenizer.size': None, 'tokenizer.model': {}})
        first = rows(tmp_path/name, 'validations')[0]
        expected = choice(four_steps_run)['table'][0]['val_loss']
        np.testing.assert_allclose((first['step'], first['val_loss']), (0, expected), rtol=1e-5)
    assert equal(*(final(tmp_path/name) for name in outs))


OWN_SIZE = dict(d_model=24, n_heads=3, s1_bits=3, s2_bits=6, group_size=9)


@pytest.mark.parametrize('size, model, expected', [('Kronos-Tokenizer-2k', {}, (256, 10)), ('tiny', OWN_SIZE, (24, 3))])
def test_from_scratch_in_a_published_and_in_an_own_size(tmp_path, size, model, expected):
    done = run(tmp_path, **{
        'tokenizer.size': size, 'tokenizer.model': model, 'tokenizer.batch_size': 2, 'tokenizer.max_steps': 1,
        'data.val_windows': 4})
    assert (done.tokenizer.config['d_model'], done.tokenizer.s1_bits) == expected


# memory
def test_gradient_checkpointing_computes_blocks_again_and_changes_no_gradient(
        four_steps_run, data, tmp_path, monkeypatch):
    forward, calls = layers.Block.forward, []

    def counted(self, *args, **kwargs):
        if torch.is_grad_enabled() and self.training:
            calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layers.Block, 'forward', counted)
    tokenizer_task().train()(**WindowSource(data.train, 16).load(0, 0).tensors)
    one_pass = len(calls)
    calls.clear()
    run(tmp_path, **{'runtime.gradient_checkpointing': True})
    assert len(calls) == 2*4*one_pass > 0   # twice in each of four steps
    assert_close(final(tmp_path), final(four_steps_run), rtol=1e-5, atol=1e-7)


def no_memory_for(monkeypatch, too_many):
    "Let a tokenizer task run out of memory where `too_many(task, windows)`"
    forward = TokenizerTask.forward

    def short(self, x, stamp=None):
        if too_many(self, len(x)):
            raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(self, x, stamp)

    monkeypatch.setattr(TokenizerTask, 'forward', short)


def test_memory_that_runs_out_halves_the_micro_batch(four_steps_run, tmp_path, monkeypatch, capsys):
    no_memory_for(monkeypatch, lambda task, n: task.training and n > 5)
    run(tmp_path, **{'runtime.progress': True})
    assert_close(final(tmp_path), final(four_steps_run), rtol=1e-4, atol=1e-6)
    assert halvings(notes(tmp_path, 'out_of_memory')) == [('training', n, n//2) for n in (16, 8)]
    assert 'runtime.gradient_checkpointing=True' in capsys.readouterr().out
    assert [n['finding'] for n in notes(tmp_path, 'advice')].count('out_of_memory') == 1


def test_memory_that_runs_out_in_a_validation_changes_no_mean(four_steps_run, tmp_path, monkeypatch):
    "Validation, the codebook's count and the choice of weights go on in pieces; training does not notice"
    no_memory_for(monkeypatch, lambda task, n: not task.training and n > 5)
    run(tmp_path)
    assert halvings(notes(tmp_path, 'out_of_memory')) == [('validation', n, n//2) for n in (16, 8)]
    assert equal(final(tmp_path), final(four_steps_run))
    np.testing.assert_allclose(losses(tmp_path), losses(four_steps_run), rtol=1e-6)
    np.testing.assert_allclose(*(first_loss(o, 'tokenizer') for o in (tmp_path, four_steps_run)), rtol=1e-6)


def test_memory_that_runs_out_while_windows_are_encoded(one_epoch_run, tmp_path, monkeypatch):
    encode = KronosTokenizer.encode

    def short(self, x, half=False):
        if len(x) > 20 and x.shape[1] == 20:   # windows; forecasts have 16 bars
            raise MemoryError
        return encode(self, x, half)

    monkeypatch.setattr(KronosTokenizer, 'encode', short)
    run_predictor(tmp_path, one_epoch_run)
    found = halvings(notes(tmp_path, 'out_of_memory', 'predictor'))
    assert found == [('encoding', n, n//2) for n in (64, 32)]*2   # training, then validation
    np.testing.assert_allclose(first_loss(tmp_path), first_loss(one_epoch_run), rtol=1e-3)


# tokens
@pytest.mark.parametrize('place, folder', [('memory', None), ('disk', 'tokens'), ('off', 'never encoded')])
def test_where_tokens_are_kept_changes_little(one_epoch_run, tmp_path, monkeypatch, place, folder):
    "Encoded once, or in the loop: up to a token in a thousand falls to the other side of a border"
    folders, encode = [], stage_page.encode_windows

    def recorded(tokenizer, windows, device, where, *args):
        folders.append(where and where.name)
        return encode(tokenizer, windows, device, where, *args)

    monkeypatch.setattr(stage_page, 'encode_windows', recorded)
    run_predictor(tmp_path, one_epoch_run, **{'runtime.cache_tokens': place})
    assert folders == ([] if place == 'off' else [folder]*2)   # training and validation
    assert not list(tmp_path.rglob('tokens/*'))                # gone with the source
    if place != 'off':
        assert equal(final(one_epoch_run, 'predictor'), final(tmp_path, 'predictor'))
    np.testing.assert_allclose(first_loss(tmp_path), first_loss(one_epoch_run), rtol=1e-3)


def test_tokens_are_kept_in_memory_within_a_bound(data, tmp_path):
    class Many:   # a billion windows would be eighty gigabytes
        window = 20
        def __len__(self): return 10**9

    stage = stage_page.Stage(RunStage(tmp_path/'predictor'), cfg.replace(**one_epoch), data, Backend('cpu'), Many())
    assert stage.token_place == 'memory'
    stage.data = dataclasses.replace(data, train=Many())
    assert stage.token_place == 'off'


def test_augmented_windows_cannot_be_encoded_once(one_epoch_run, tmp_path):
    with pytest.raises(ConfigError, match='runtime.cache_tokens'):
        run_predictor(tmp_path, one_epoch_run, **{'runtime.cache_tokens': 'disk', 'augment.noise_std': .1})


# the machine
def test_compile_falls_back_and_says_so(four_steps_run, tmp_path, monkeypatch):
    modes = []

    def broken(self, mode):
        modes.append(mode)
        raise RuntimeError('no compiler')

    monkeypatch.setattr(torch.nn.Module, 'compile', broken)
    run(tmp_path, **{'runtime.compile': True})
    assert 'RuntimeError: no compiler' in notes(tmp_path, 'compile')[0]['text']
    assert equal(final(tmp_path), final(four_steps_run))
    assert modes == ['default'] and (COMPILE_MODES['cuda'], COMPILE_MODES['mps']) == ('max-autotune', 'reduce-overhead')


def test_a_compiler_whose_gradients_do_not_add_up_is_not_used(four_steps_run, tmp_path, monkeypatch):
    "As CUDA graphs without buffers for the gradients: each pass overwrites the one before it"
    def forgetful(self, mode):
        def call(*args, **kwargs):
            for p in self.parameters():
                p.grad = None
            return self.forward(*args, **kwargs)
        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, 'compile', forgetful)
    run(tmp_path, **{'runtime.compile': True})
    assert 'three passes' in notes(tmp_path, 'compile')[0]['text']
    assert equal(final(tmp_path), final(four_steps_run))


def test_what_is_compiled_trains_the_same_in_micro_batches_too(tmp_path, monkeypatch):
    "A compiler that does nothing; memory that runs out while it is tried is no failure of it"
    sizes = []

    def eager(self, mode):
        def call(*args, **kwargs):
            sizes.append(len(kwargs['x']))
            if len(sizes) == 1:
                raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
            return self.forward(*args, **kwargs)
        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, 'compile', eager)
    run(tmp_path/'compiled', **{'runtime.micro_batch': 8, 'runtime.compile': True})
    run(tmp_path/'plain', **{'runtime.micro_batch': 8})
    assert sizes[:4] == [8, 4, 4, 4] and not notes(tmp_path/'compiled', 'compile')
    assert equal(final(tmp_path/'compiled'), final(tmp_path/'plain'))


def test_optimizations_off_is_said_and_trains_the_same(four_steps_run, tmp_path):
    run(tmp_path, **{'runtime.optimizations': False, 'runtime.workers': 3, 'runtime.compile': True})
    assert 'runtime.workers=3, runtime.compile=True' in notes(tmp_path, 'machine')[0]['text']
    assert notes(four_steps_run, 'machine')
    if torch.get_num_threads() == 1:
        assert equal(final(tmp_path), final(four_steps_run))


TWO_EPOCHS = {'tokenizer.epochs': 2, 'tokenizer.batch_size': 64}   # of three steps, so that the loader begins again


@pytest.fixture(scope='session')
def two_epochs_run(tmp_path_factory):
    return fit_once(tmp_path_factory, 'two_epochs_run', four_steps | TWO_EPOCHS)


@pytest.mark.parametrize('loader', [{}, {'runtime.persistent_workers': False, 'runtime.prefetch': 2}])
def test_loader_processes_change_nothing(two_epochs_run, tmp_path, loader):
    run(tmp_path, **TWO_EPOCHS, **{'runtime.workers': 1}, **loader)
    assert equal(final(tmp_path), final(two_epochs_run))


class Threads(Callback):
    def before_fit(self, learn):
        self.n = torch.get_num_threads()


def test_threads_and_loaders_are_those_asked_for(tmp_path, monkeypatch):
    "By what torch is told; with optimizations off it is told nothing"
    loaders, names = [], ('num_workers', 'prefetch_factor', 'persistent_workers')

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            loaders.append(tuple(kwargs[name] for name in names))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(torch.utils.data, 'DataLoader', Loader)
    before, look = torch.get_num_threads(), Threads()
    asked = {'runtime.threads': 2, 'runtime.workers': 1, 'runtime.prefetch': 3, 'runtime.persistent_workers': False}
    run(tmp_path/'a', [look], **asked)
    assert look.n == 2 and set(loaders) == {(1, 3, False)} and torch.get_num_threads() == before
    loaders.clear()
    off = config_of(parser().parse_args(['fit', '--disable-optimizations'])).runtime
    run(tmp_path/'b', [look], **asked, **{'runtime.optimizations': off.optimizations})
    assert look.n == before and not loaders and not off.optimizations


def test_the_guard_takes_its_four_limits_from_the_settings(data, tmp_path):
    limits = dict(cpu=100., memory=99.9, gpu=98., gpu_memory=97.)

    def guards(**changes):
        config = cfg.replace(**four_steps | changes)
        stage = stage_page.Stage(RunStage(tmp_path/'tokenizer'), config, data, Backend('cpu'))
        return [c.limits for c in stage_page._measuring_callbacks(stage) if isinstance(c, ResourceGuard)]

    assert guards(**{f'runtime.max_{k}': v for k, v in limits.items()}) == [limits]
    assert guards() == []


# stopping and going on
class Slow(Callback):
    "Every step takes a quarter of an hour, on a clock of its own: how fast a machine is must not decide a test"
    def __init__(self, monkeypatch):
        self.spent, real = 0., time.monotonic
        monkeypatch.setattr(time, 'monotonic', lambda: real() + self.spent)

    def after_step(self, learn):
        self.spent += 900


def test_a_time_limit_stops_in_time_and_the_rest_is_the_same(two_epochs_run, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    part = run(tmp_path, [slow], **TWO_EPOCHS, **{'runtime.max_time': '50m'})
    assert part.interrupted and part.stop_reason == 'the time limit is near'
    assert not (tmp_path/'tokenizer'/'final_model').exists()
    assert 900 <= slow.spent < 3000   # before the limit, not after
    assert load(tmp_path).interrupted and not run(tmp_path, **TWO_EPOCHS).interrupted
    assert equal(final(tmp_path), final(two_epochs_run))


def test_the_scaler_goes_into_a_checkpoint_and_back(data, tmp_path):
    "As with fp16 on CUDA: the loss scale is part of the state"
    task, checkpoint = tokenizer_task(), Checkpoint(tmp_path, 100)
    learn = Learner(task, WindowSource(data.train, 16), None, adamw(task, 1e-3), callbacks=[checkpoint]).fit(1, 1)
    accelerator = learn.backend.accelerator
    try:
        accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=1234.)
        accelerator.scaler.scale(torch.ones(1))
        checkpoint.save(learn)
        accelerator.scaler = torch.amp.GradScaler('cpu')
        checkpoint.resume(learn)
        assert accelerator.scaler.get_scale() == 1234.
    finally:
        accelerator.scaler = None


class Half(Backend):
    "fp16 with its loss scaler, on the CPU: what CUDA does, slower"
    def __init__(self, scale=2.**40):
        super().__init__('cpu')
        a = self.accelerator
        a.native_amp, a.state._mixed_precision = True, 'fp16'
        a.scaler = torch.amp.GradScaler('cpu', init_scale=scale)


class StopAt(Callback):
    def __init__(self, step):
        self.at = step

    def after_step(self, learn):
        if learn.step == self.at:
            learn.stop('enough', interrupted=True)


def test_fp16_finds_its_scale_and_goes_on_with_the_same_bits(data, tmp_path):
    """The scale is far too high at first: more than five updates are refused, and that is no reason to stop

    Norms are those of the gradients, not of the scaled ones.
    """
    def learner(name, backend, stop_at=99):
        torch.manual_seed(0)
        task, checkpoint = tokenizer_task(), Checkpoint(tmp_path/name, 4)
        callbacks = [Clip(2.), FiniteCheck(5), checkpoint, StopAt(stop_at)]
        source = WindowSource(data.train, 16, seed=0)
        return Learner(task, source, None, adamw(task, 1e-3), backend=backend, callbacks=callbacks), checkpoint

    try:
        whole = learner('whole', Half())[0].fit(9, 40)
        learner('part', Half(), stop_at=30)[0].fit(9, 40)
        rest, checkpoint = learner('part', Half())
        checkpoint.resume(rest)
        rest.fit(9, 40)
    finally:
        AcceleratorState._reset_state()
    full = learner('full', Backend('cpu'))[0].fit(9, 40)
    refused = [n for n in whole.history.notes if n['kind'] == 'update_skipped']
    scale, same = (o.backend.accelerator.scaler.get_scale() for o in (whole, rest))
    assert 5 < len(refused) < 35 and scale == same == 2.**(40-len(refused))
    assert equal(whole.model.state_dict(), rest.model.state_dict())
    late, expected = (np.mean([o['gradient_norm'] for o in h.history.steps[-5:]]) for h in (whole, full))
    assert .3 < late/expected < 3 and whole.history.steps[-1]['loss'] < whole.history.steps[0]['loss']


class Infinite(Callback):
    "Losses are infinite from the second step on"
    def after_loss(self, learn):
        if learn.step >= 1:
            learn.losses['loss'] = learn.losses['loss']*math.inf


def test_windows_that_give_no_numbers_are_named(tmp_path):
    "Five updates in a row: the weights never see them, the fit stops and says which windows"
    with pytest.raises(RunError, match=r'5 updates.*windows \[\d+'):
        run(tmp_path, [Infinite()], **{'tokenizer.max_steps': 9, 'runtime.save_steps': 1})
    saved = [split_tensors(read_checkpoint(p))[1] for p in (tmp_path/'tokenizer'/'checkpoints').glob('step_*')]
    assert saved and all(torch.isfinite(v).all() for s in saved for v in s.values() if v.is_floating_point())
