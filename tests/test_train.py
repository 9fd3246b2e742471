"A run as a whole: killed and resumed, on two processes, on targets without meaning, in folders of other runs"
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kronos_nb.config import Config
from kronos_nb.core import ModelError, RunError
from kronos_nb.data.read import sample_klines
from kronos_nb.fitting import claim
from kronos_nb.fitting.prepare import prepare
from kronos_nb.train import FitResult, fit, load
from kronos_nb.training.checkpoint import read_checkpoint, split_tensors
from kronos_nb.training.learner import Learner
from kronos_nb.training.optim import adamw
from kronos_nb.training.run import STAGES, Run
from kronos_nb.training.task import (
    PredictorTask, TokenizerTask, TokenSource, WindowSource, build_model, encode_windows)
from tests.conftest import once
from tests.helpers import (
    SETTINGS, assert_close, bars, cfg, choice, equal, final, finish, last_checkpoint, no_entropy, no_test, notes,
    popen, root, rows, start)

ONLY_TOKENIZER = {'runtime.only': 'tokenizer'}
BY_CLOCK = ('step_seconds', 'data_seconds', 'memory_gb', 'log_bytes')


def timeless(tree):
    "Return a state or a row without what a clock, the operating system or the length of a log says"
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if k not in BY_CLOCK}
    return [timeless(o) for o in tree] if isinstance(tree, list) else tree


def metrics(out, stage) -> dict:
    "Return one list per metric, one value per epoch"
    return json.loads((out/stage/'training_metrics.json').read_text())


def status(out, stage='tokenizer') -> dict:
    return json.loads((out/stage/'status.json').read_text())


def wait_for(process, *marks):
    "Wait until all files are there"
    while not all(mark.exists() for mark in marks):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(.02)


def held(out, at):
    "Return a process that waits after a step, such as 'TokenizerTask 6'"
    process, mark = start(out, HOLD=at), Path(f'{out}.held')
    wait_for(process, mark)
    mark.unlink()
    return process


# one process
@pytest.fixture(scope='session')
def early_run(tmp_path_factory):
    "Return a tokenizer that stopped early, in the second of six epochs"
    stop = {'tokenizer.epochs': 6, 'tokenizer.patience': 1, 'tokenizer.min_delta': 1e3}
    return once(tmp_path_factory, 'early_run',
                lambda folder: fit(bars, cfg.replace(**no_test, **ONLY_TOKENIZER, **stop), folder))


def test_a_killed_run_that_goes_on_ends_with_the_same_bits(whole_run, tmp_path):
    "SIGKILL in the middle of each stage; later processes end with the weights, rows and state of an unbroken run"
    out = tmp_path/'run'
    for stage in STAGES:
        process = held(out, f'{stage.title()}Task 6')   # between the checkpoints of steps 4 and 8
        process.kill()
        process.communicate()
        assert [p.name for p in (out/stage/'checkpoints').glob('step_*')] == ['step_000004']
        assert not (out/stage/'final_model').exists()
    finish(start(out))
    for stage in STAGES:
        assert equal(final(whole_run, stage), final(out, stage))
        assert timeless(metrics(whole_run, stage)) == timeless(metrics(out, stage))
        assert 'gradient_norm' in metrics(out, stage)
        assert timeless(rows(whole_run, 'steps', stage)) == timeless(rows(out, 'steps', stage))
        (tree, tensors), (other, others) = [
            split_tensors(read_checkpoint(last_checkpoint(o, stage))) for o in (whole_run, out)]
        assert equal(tensors, others) and any('exp_avg' in k for k in tensors)
        assert timeless(tree) == timeless(other)


def test_sigterm_keeps_a_checkpoint_and_says_so(tmp_path):
    process = held(tmp_path/'run', 'TokenizerTask 6')
    process.send_signal(signal.SIGTERM)
    assert 'SIGTERM' in finish(process)
    last = last_checkpoint(tmp_path/'run')
    assert last.name == 'step_000006' and (last/'manifest.json').is_file()
    assert not (tmp_path/'run'/'tokenizer'/'final_model').exists()


def test_weights_are_chosen_by_validation(whole_run):
    names = dict(tokenizer={'best', 'last', 'average'}, predictor={'best', 'last', 'average', 'ema', 'lawa'})
    for stage, candidates in names.items():
        kept = choice(whole_run, stage)
        table = pd.DataFrame(kept['table']).set_index('candidate')
        assert set(table.index) == candidates and table.val_loss.idxmin() == kept['chosen']
        config = json.loads((whole_run/stage/'best_model'/'config.json').read_text())
        assert (kept['chosen'] == 'best') == ('weights_origin' not in config)


def test_a_run_is_loaded_as_fit_returned_it(whole_run, tmp_path):
    "The same models, history and settings; what there is of a run without its last model; no folder is an error"
    run = shutil.copytree(whole_run, tmp_path/'run')
    fitted, back = fit(bars, cfg.replace(**no_test), run), load(run/'predictor'/'best_model')
    pd.testing.assert_frame_equal(back.history, fitted.history)
    paths = [r.forecaster().predict(bars.tail(16), 4, paths=3).paths for r in (fitted, back)]
    np.testing.assert_array_equal(*paths)
    assert not back.interrupted and back.stop_reason is None and back.evaluation is None
    assert back.config == fitted.config and not back.predictor.training
    shutil.rmtree(run/'predictor'/'final_model')
    half = FitResult.load(run)
    assert half.interrupted and half.stop_reason and half.predictor is None
    assert half.tokenizer.weights_hash() == back.tokenizer.weights_hash()
    with pytest.raises(RunError, match='nowhere'):
        load(tmp_path/'nowhere')


def test_a_folder_belongs_to_one_run(whole_run, tmp_path):
    same = cfg.replace(**no_test)
    with pytest.raises(RunError, match=r'(?s)tokenizer.lr.*runtime.init_from'):
        fit(bars, same.replace(**{'tokenizer.lr': 1e-3}), whole_run)
    with pytest.raises(RunError, match='600'):
        fit(bars.head(600), same, whole_run)
    with pytest.raises(RunError, match='resume'):
        fit(bars, same, whole_run, resume=False)
    (tmp_path/'thesis.txt').write_text('mine')
    with pytest.raises(RunError, match='not empty'):
        fit(bars, same, tmp_path)
    assert (tmp_path/'thesis.txt').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('written', [0, 1])
def test_a_run_killed_while_it_claimed_its_folder_begins_again(tmp_path, monkeypatch, written):
    "Nothing was trained yet; `written` files were there"
    same = cfg.replace(**no_test)
    data, run = prepare(bars, same), Run(tmp_path/'run')

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        if written:
            m.setattr(Config, 'save', die)
        else:
            m.setattr(claim, 'write_json', die)
        with pytest.raises(KeyboardInterrupt):
            fit(bars, same, run)
    assert len([p for p in run.folder.glob('*') if p.name != '.lock']) == written
    claim.claim_folder(run, same, data, resume=True)
    assert run.config == same and run.facts['data'] == data.hash


def test_the_status_names_the_epoch_that_was_the_last(whole_run, early_run):
    "Not the one after it: of two epochs that were all, and of six stopped after the second"
    assert [status(whole_run, stage)['epoch'] for stage in STAGES] == [2, 2]
    s = status(early_run)
    assert (s['state'], s['epoch'], s['epochs']) == ('finished', 2, 6)
    assert 'early stopping' in s['why'] and len(rows(early_run, 'validations')) == 2


def test_one_stage_alone(whole_run, early_run, tmp_path):
    with pytest.raises(RunError, match='predictor.tokenizer'):
        fit(bars, cfg.replace(**no_test, **{'runtime.only': 'predictor'}), tmp_path/'a')
    made = str(whole_run/'tokenizer'/'best_model')
    only = {'runtime.only': 'predictor', 'predictor.tokenizer': made, 'predictor.epochs': 1}
    alone = fit(bars, cfg.replace(**no_test, **only), tmp_path/'b')
    assert alone.predictor is not None and not (tmp_path/'b'/'tokenizer').exists()
    assert alone.predictor.extra['tokenizer_hash'] == alone.tokenizer.weights_hash()
    tokenizer = load(early_run)
    assert tokenizer.predictor is None and not tokenizer.interrupted
    assert (early_run/'tokenizer'/'best_model'/'model.safetensors').is_file()
    with pytest.raises(RunError, match='predictor'):
        tokenizer.forecaster()


def test_other_bits_and_other_normalisers_are_errors(whole_run, tmp_path):
    made = str(whole_run/'tokenizer'/'best_model')
    only = cfg.replace(**no_test, **{'runtime.only': 'predictor', 'predictor.tokenizer': made})
    with pytest.raises(ModelError, match='s1_bits=4'):
        fit(bars, only.replace(**{'predictor.model': cfg.predictor.model | dict(s1_bits=5)}), tmp_path/'a')
    with pytest.raises(ModelError, match='data.normalizer=zscore'):
        fit(bars, only.replace(**{'data.normalizer': 'median_mad'}), tmp_path/'b')


def moved(before, after) -> set:
    "Return the names of the weights that training changed"
    a, b = (load_file(folder/'model.safetensors') for folder in (before, after))
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


@pytest.mark.parametrize('what', ['heads', 'last_1'])
def test_only_what_is_asked_for_is_trained(whole_run, tmp_path, what):
    "From the best weights of another run, whose loss the first validation gives"
    out, made = tmp_path/'run', str(whole_run/'tokenizer'/'best_model')
    changes = {'runtime.init_from': str(whole_run), 'runtime.only': 'predictor', 'predictor.tokenizer': made,
               'predictor.trainable': what, 'predictor.epochs': 1}
    fit(bars, cfg.replace(**no_test, **changes), out)
    first, *_, last = rows(out, 'validations', 'predictor')
    best = min(o['val_loss'] for o in choice(whole_run, 'predictor')['table'])
    np.testing.assert_allclose((first['step'], first['val_loss']), (0, best), rtol=1e-5)
    assert last['val_loss'] < metrics(whole_run, 'predictor')['val_loss'][0]
    names = moved(whole_run/'predictor'/'best_model', out/'predictor'/'final_model')
    blocks = ('transformer.1.',) if what == 'last_1' else ()
    assert names and all(k.startswith(('head.', 'norm.', 'dep_layer.') + blocks) for k in names)
    assert any(k.startswith('transformer.1.') for k in names) == (what == 'last_1')


def test_lora_merges_into_an_ordinary_model(whole_run, tmp_path):
    pytest.importorskip('peft')
    both = dict(trainable='lora', epochs=1)
    fit(bars, cfg.replace(**no_test, tokenizer=both, predictor=both, runtime=dict(init_from=str(whole_run))), tmp_path)
    names = moved(whole_run/'predictor'/'best_model', tmp_path/'predictor'/'final_model')
    assert names and all(k.endswith('_proj.weight') or '.ffn.w' in k for k in names)


# several processes
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
ACCELERATE = [   # --multi_gpu names several processes, on the CPU too; with --cpu it starts one
    '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
    '--mixed_precision', 'no', '--dynamo_backend', 'no']
NO_DROPOUT = {'predictor.model': cfg.predictor.model | dict(ffn_dropout_p=0., resid_dropout_p=0.)}
EXACT = no_entropy | NO_DROPOUT | {'tokenizer.epochs': 1, 'predictor.epochs': 1}


def batches_of(n) -> dict: return {'tokenizer.batch_size': n, 'predictor.batch_size': n}


def ranks(out, stage) -> list:
    "Return weights and end of each process"
    files = sorted(Path(f'{out}_ranks').glob(f'{stage}_*.safetensors'))
    return [(load_file(f), json.loads(f.with_suffix('.json').read_text())) for f in files]


@pytest.fixture(scope='session')
def one_process_run(tmp_path_factory):
    "Return a run of one process with the global batch"
    return once(tmp_path_factory, 'one_process_run',
                lambda folder: finish(start(folder, changes=EXACT | batches_of(32))))


@pytest.mark.parametrize('launcher, workers', [(TORCHRUN, 2), (ACCELERATE, 1)],
                         ids=['torchrun, two workers each', 'accelerate'])
def test_two_processes_are_one_with_the_global_batch(one_process_run, tmp_path, launcher, workers):
    """Ranks share the windows of a step, end with equal bits, and with one process's weights to 1e-6

    The predictor gets the tokenizer of the one process, since a bit of a weight may turn a token.
    """
    two, predictor, env = tmp_path/'two', tmp_path/'predictor', dict(WORKERS=str(workers))
    changes = EXACT | batches_of(16) | {'runtime.threads': workers}
    made = str(one_process_run/'tokenizer'/'best_model')
    finish(start(two, launcher, changes, **env))
    finish(start(predictor, launcher, changes | {'runtime.only': 'predictor', 'predictor.tokenizer': made}, **env))
    for stage, out in dict(tokenizer=two, predictor=predictor).items():
        (one, _), = ranks(one_process_run, stage)
        (a, _), (b, _) = ranks(out, stage)
        assert equal(a, b)
        assert_close(a, one, rtol=1e-5, atol=1e-6)
        for name in ('val_loss', 'train_loss', 'gradient_norm'):
            expected = metrics(one_process_run, stage)[name]
            np.testing.assert_allclose(metrics(out, stage)[name], expected, rtol=1e-5, err_msg=name)
    assert len(list((two/'logs').glob('*.log'))) == 2   # rank 0 wrote, once
    assert (two/'predictor'/'final_model').is_dir()
    assert not list(two.rglob('*.tmp'))


def test_a_process_without_a_window_to_validate_keeps_in_step(tmp_path):
    "One window for two processes: the numbers are those of one process"
    few = ONLY_TOKENIZER | {'data.val_windows': 1, 'tokenizer.epochs': 1, 'tokenizer.average_last': 0}
    for n, launcher in ((1, []), (2, TORCHRUN)):
        finish(start(tmp_path/f'{n}', launcher, few | {'tokenizer.batch_size': 32//n}))
    one, two = (rows(tmp_path/f'{n}', 'validations')[0] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)


def test_ranks_stop_together_and_another_number_of_them_is_refused(tmp_path):
    "Early stopping is decided once; the checkpoints of two processes are not for one"
    out = tmp_path/'two'
    stop = ONLY_TOKENIZER | {'tokenizer.epochs': 6, 'tokenizer.patience': 1, 'tokenizer.min_delta': 1e3}
    finish(start(out, TORCHRUN, stop))
    (a, end), (b, other_end) = ranks(out, 'tokenizer')
    assert equal(a, b) and end == other_end and 'early stopping' in end['stop']
    shutil.rmtree(out/'tokenizer'/'final_model')   # as if it had died before its end
    with pytest.raises(RunError, match=r'2 processes.*--num-gpus 2'):
        fit(bars, cfg.replace(**no_test, **stop), out)


HOOKS = """
import os, time
if 'RANK' in os.environ and os.environ.get('PAUSE'):
    from kronos_nb.training.checkpoint import Interrupts
    def after_step(self, learn):
        if learn.step != 6: return
        open(os.environ['PAUSE'] + os.environ['RANK'], 'w').close()
        while not learn.interrupted: time.sleep(.01)   # until the signal is there, on each process
    Interrupts.after_step = after_step
if os.environ.get('RANK') == os.environ.get('SHORT', 'none'):
    from kronos_nb.training.task import TokenizerTask
    forward = TokenizerTask.forward
    def short(self, x, stamp=None):
        if len(x) > 5: raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(self, x, stamp)
    TokenizerTask.forward = short
"""


def start_cli(where, **env):
    "Start `kronos-nb fit --num-gpus 2` on a file of bars, one epoch; each process imports HOOKS"
    bars.to_csv(where/'GOOG.csv', index=False)
    (where/'sitecustomize.py').write_text(HOOKS)
    changes = ONLY_TOKENIZER | no_entropy | {'tokenizer.epochs': 1, 'tokenizer.batch_size': 16}
    cfg.replace(**no_test, **changes).save(where/'mine.yaml')
    argv = ['-m', 'kronos_nb.cli', 'fit', where/'GOOG.csv', '--config', where/'mine.yaml', '--out', where/'run']
    return popen([*argv, '--num-gpus', '2'], path=[where], **env)


@pytest.fixture(scope='session')
def pair(tmp_path_factory):
    "Return a run by --num-gpus 2 that was not interrupted; rank 0 alone speaks"
    def make(folder):
        folder.mkdir(exist_ok=True)
        assert finish(start_cli(folder)).count('Report:') == 1
    return once(tmp_path_factory, 'pair', make)/'run'


def test_num_gpus_starts_the_same_command_on_several_processes(pair):
    assert json.loads((last_checkpoint(pair)/'training.json').read_text())['tree']['world'] == 2


def test_sigterm_to_several_processes_finishes_the_step_and_going_on_is_the_same(pair, tmp_path):
    "All ranks finish step 6, rank 0 saves it, the command exits with 130; the same command ends with the same bits"
    out, marks = tmp_path/'run', [tmp_path/f'ready{rank}' for rank in (0, 1)]
    process = start_cli(tmp_path, PAUSE=str(tmp_path/'ready'))
    wait_for(process, *marks)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and said.count('SIGTERM: ') == 2, said
    assert last_checkpoint(out).name == 'step_000006' and not (out/'tokenizer'/'final_model').exists()
    s = status(out)
    assert (s['state'], s['why'], s['step'], s['epoch']) == ('interrupted', 'SIGTERM', 6, 1)
    finish(start_cli(tmp_path))
    assert equal(final(pair), final(out))
    assert timeless(rows(pair, 'steps')) == timeless(rows(out, 'steps'))


def test_memory_that_runs_out_on_one_process_halves_on_all(pair, tmp_path):
    "Process 1 cannot hold more than five windows: both train with four, and it alone validates in pieces"
    finish(start_cli(tmp_path, SHORT='1'))
    halved = [(n['where'], n.get('size')) for n in notes(tmp_path/'run', 'out_of_memory')]
    assert halved == [('training', 16), ('training', 8), ('validation', None)]
    assert_close(final(tmp_path/'run'), final(pair), rtol=1e-4, atol=1e-6)
    losses = [[o['val_loss'] for o in rows(out, 'validations')] for out in (pair, tmp_path/'run')]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_inside_a_ray_trainer(tmp_path):
    "examples/ray_fit.py, two workers on the CPU"
    pytest.importorskip('ray')
    settings = {'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
                'tokenizer.epochs': 1, 'predictor.epochs': 1, 'data.windows_per_epoch': 256,
                'data.val_windows': 64, 'evaluate.paths': 4, 'runtime.plots': 'false'}
    argv = [root/'examples'/'ray_fit.py', '--out', tmp_path/'run', '--workers', '2']
    sets = [f'--set={k}={v}' for k, v in settings.items()]
    finish(popen([*argv, *sets], cwd=tmp_path, RAY_USAGE_STATS_ENABLED='0'))
    run = tmp_path/'run'
    assert (run/'report.md').is_file() and (run/'predictor'/'final_model').is_dir()
    saved = json.loads((last_checkpoint(run, 'predictor')/'training.json').read_text())
    assert saved['tree']['world'] == 2


# leaks
class Shuffled(PredictorTask):
    "Next-bar targets dealt out at random over the batch: their distribution stays, their meaning goes"
    def forward(self, stamp, s1, s2):
        generator = torch.Generator().manual_seed(int(s1.sum()))
        order = torch.randperm(s1[:, 1:].numel(), generator=generator)
        t1, t2 = (o[:, 1:].flatten()[order].view(o[:, 1:].shape) for o in (s1, s2))
        logits = self.model(s1[:, :-1], s2[:, :-1], stamp[:, :-1], s1_targets=t1)
        a, b = (torch.nn.functional.cross_entropy(o.flatten(0, 1), t.flatten()) for o, t in zip(logits, (t1, t2)))
        return dict(loss=(a + b)/2, ce_s1=a.detach(), ce_s2=b.detach())


def test_nothing_is_learnt_from_shuffled_targets():
    "Real targets bring the loss below what the tokens' frequencies give; shuffled ones do not, so there is no leak"
    torch.manual_seed(0)
    data = prepare(sample_klines('GOOG'), Config.preset('quickstart', **SETTINGS | {'data.stride': 1}))
    tokenizer = TokenizerTask(build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model))
    Learner(tokenizer, WindowSource(data.train, 64, seed=0), None, adamw(tokenizer, 3e-3)).fit(3)
    train, val = (encode_windows(tokenizer.model, windows) for windows in (data.train, data.val))
    counts = np.bincount(train[..., 0].ravel(), minlength=16) + 1.
    frequencies = float(-np.log(counts/counts.sum())[val[:, 1:, 0].ravel()].mean())

    def loss_of(cls):
        torch.manual_seed(0)
        task = cls(build_model('predictor', 'scratch', 'tiny', cfg.predictor.model))
        source, valid = TokenSource(data.train, train, 64, seed=0), TokenSource(data.val, val, 64, mode='sequential')
        return Learner(task, source, valid, adamw(task, 3e-3)).fit(3).metrics['val_ce_s1']

    assert loss_of(PredictorTask) < .8*frequencies
    assert loss_of(Shuffled) > .98*frequencies
