"Training as a whole: killed and gone on with, on two processes, on targets without meaning, in folders that are somebody else's"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, DataError, ModelError, RunError
from kronos_nb.data.kline import sample_klines
from kronos_nb.data.window import WindowDataset
from kronos_nb.learner import Learner
from kronos_nb.callback.checkpoint import read_checkpoint, split_tensors
from kronos_nb.callback.train import adamw
from kronos_nb.task import PredictorTask, TokenizerTask, TokenSource, WindowSource, build_model, encode_windows
from kronos_nb.train import fit, prepare
from kronos_nb.watch import read_lines

root = Path(__file__).resolve().parents[1]
small = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4)
SETTINGS = {'base.symbols': None, 'data.lookback_window': 16, 'data.predict_window': 4, 'data.stride': 2, 'runtime.save_steps': 4, 'runtime.log_every': 1, 'runtime.progress': False,
    'runtime.plots': False, 'tokenizer.model': small | dict(n_enc_layers=2, n_dec_layers=2, group_size=4), 'predictor.model': small | dict(n_layers=2), 'evaluate.paths': 4,
    'tokenizer.epochs': 2, 'predictor.epochs': 2, 'tokenizer.patience': None, 'predictor.patience': None,
    'tokenizer.average_last': 2, 'predictor.ema_decay': .9, 'predictor.lawa': .3}
bars = sample_klines('GOOG').head(700)
cfg = Config.preset('quickstart', **SETTINGS)
no_test = {'data.train': .8, 'data.val': .2, 'data.test': 0.}

RUN = '''
import sys, json
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.test_train import *
from kronos_nb.learner import Callback
class Hold(Callback):
    "Waits after a step of a stage until the process is killed or told to stop: the test decides when, not the machine"
    def after_step(self, learn):
        if {hold!r}!=(type(learn.task).__name__, learn.step): return
        Path({out!r} + '.held').touch()
        while not learn.interrupted: time.sleep(.01)
r = fit(bars, cfg.replace(**{changes!r}), {out!r}, callbacks=[Hold()])
'''
def start(out, hold=None, processes=1, **changes):
    code = out.parent/f'{out.name}.py'
    code.write_text(RUN.format(root=str(root), out=str(out), hold=hold, changes=no_test | changes))
    launcher = [] if processes==1 else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return subprocess.Popen([sys.executable, *launcher, str(code)], cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(root)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def held(out, **kw):
    "A process that has come to where it holds"
    p, mark = start(out, **kw), out.with_name(out.name+'.held')
    while not mark.exists(): assert p.poll() is None, p.communicate()[0]; time.sleep(.02)
    mark.unlink()
    return p

def finish(p):
    try: said = p.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired: p.terminate(); raise   # a launcher ends its processes with it
    assert p.returncode==0, said
    return said

def timeless(row):
    "All but what a clock and the operating system say"
    rest = {k: v for k, v in row.items() if k not in ('step_seconds', 'data_seconds', 'memory_gb')}
    assert 'gradient_norm' in rest
    return rest

def clockless(tree):
    "A state without what a clock, the operating system or the length of a log file with clock times in it say"
    if isinstance(tree, dict): return {k: clockless(v) for k, v in tree.items() if k not in ('step_seconds', 'data_seconds', 'memory_gb', 'log_bytes')}
    return [clockless(o) for o in tree] if isinstance(tree, list) else tree

def weights(out, stage): return load_file(out/stage/'final_model'/'model.safetensors')

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'run'
    finish(start(out))
    return out

def test_kill_and_go_on_is_not_having_stopped(whole, tmp_path):
    "SIGKILL in the middle of each stage; a second and a third process end with the same bits"
    out = tmp_path/'run'
    for stage in ('tokenizer', 'predictor'):
        p = held(out, hold=(f'{stage.title()}Task', 6))   # between the checkpoints of steps 4 and 8
        p.kill(); p.communicate()
        assert [o.name for o in (out/stage/'checkpoints').glob('step_*')]==['step_000004'] and not (out/stage/'final_model').exists()
    finish(start(out))
    for stage in ('tokenizer', 'predictor'):
        a, b = weights(whole, stage), weights(out, stage)
        assert a.keys()==b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
        assert timeless(json.loads((whole/stage/'training_metrics.json').read_text()))==timeless(json.loads((out/stage/'training_metrics.json').read_text()))
        assert [timeless(o) for o in read_lines(whole/stage/'steps.jsonl')]==[timeless(o) for o in read_lines(out/stage/'steps.jsonl')]
        a, b = [split_tensors(read_checkpoint(max((o/stage/'checkpoints').glob('step_*')))) for o in (whole, out)]   # optimizer, EMA, means, position, notes: the whole state
        assert a[1].keys()==b[1].keys() and all(torch.equal(v, b[1][k]) for k, v in a[1].items()) and any('exp_avg' in k for k in a[1])
        assert clockless(a[0])==clockless(b[0])

def test_weights_are_chosen_by_validation(whole):
    for stage, names in dict(tokenizer={'best', 'last', 'average'}, predictor={'best', 'last', 'average', 'ema', 'lawa'}).items():
        said = json.loads((whole/stage/'weights.json').read_text())
        table = pd.DataFrame(said['table'])
        assert set(table.candidate)==names and table.val_loss.min()==table.set_index('candidate').val_loss[said['chosen']]
        config = json.loads((whole/stage/'best_model'/'config.json').read_text())
        assert (said['chosen']=='best')==('weights_origin' not in config)

def test_sigterm_keeps_a_checkpoint_and_says_so(tmp_path):
    out = tmp_path/'run'
    p = held(out, hold=('TokenizerTask', 6))
    p.send_signal(signal.SIGTERM)
    assert 'SIGTERM: finishing the step and saving' in finish(p)
    last = max((out/'tokenizer'/'checkpoints').glob('step_*'))
    assert last.name=='step_000006' and (last/'manifest.json').is_file() and not (out/'tokenizer'/'final_model').exists()

def launched(out, launcher, env=None, **changes):
    "Run tests/scaling_run.py under a launcher, to its end"
    p = subprocess.Popen([sys.executable, *launcher, str(root/'tests'/'scaling_run.py'), str(out), json.dumps(changes)], cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(root)) | (env or {}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return finish(p)

def ranks(out, stage): return [(load_file(p), json.loads(p.with_suffix('.json').read_text())) for p in sorted(out.with_name(out.name+'_ranks').glob(f'{stage}_*.safetensors'))]
torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
accelerate = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',   # so it names several processes, on the CPU too; with --cpu it starts one
    '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']
exact = {'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.), 'predictor.model': cfg.predictor.model | dict(ffn_dropout_p=0., resid_dropout_p=0.), 'tokenizer.epochs': 1, 'predictor.epochs': 1}

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "One process with the global batch"
    out = tmp_path_factory.mktemp('alone')/'one'
    launched(out, [], **exact, **{'tokenizer.batch_size': 32, 'predictor.batch_size': 32})
    return out

@pytest.mark.parametrize('launcher, workers', [(torchrun, 2), (accelerate, 1)], ids=['torchrun, two workers each', 'accelerate'])
def test_two_processes_are_one_with_the_global_batch(alone, tmp_path, launcher, workers):
    """Ranks share the windows of a step and end bit-identical, and with one process's weights to 1e-6; validation is the same number. The codebook entropy is a function of the
    batch mean, so it is off here (zeta=0). The predictor gets the tokenizer of the one process, since a bit of a weight may turn a token"""
    two, predictor = tmp_path/'two', tmp_path/'predictor'
    half, env = {'tokenizer.batch_size': 16, 'predictor.batch_size': 16, 'runtime.threads': workers}, dict(WORKERS=str(workers))
    launched(two, launcher, env, **exact, **half)
    launched(predictor, launcher, env, **exact, **half, **{'runtime.only': 'predictor', 'predictor.tokenizer': str(alone/'tokenizer'/'best_model')})
    for stage, out in dict(tokenizer=two, predictor=predictor).items():
        (one, _), = ranks(alone, stage)
        (a, _), (b, _) = ranks(out, stage)
        assert all(torch.equal(v, b[k]) for k, v in a.items())
        for k in one: torch.testing.assert_close(a[k], one[k], rtol=1e-5, atol=1e-6, msg=k)
        hist = [pd.DataFrame(json.loads((o/stage/'training_metrics.json').read_text())) for o in (alone, out)]
        for name in ('val_loss', 'train_loss', 'gradient_norm'): np.testing.assert_allclose(hist[1][name], hist[0][name], rtol=1e-5, err_msg=name)
    assert len(list((two/'logs').glob('*.log')))==2 and not list(two.rglob('*.tmp')) and (two/'predictor'/'final_model').is_dir()   # rank 0 wrote, once

def test_a_process_without_a_window_to_validate_keeps_in_step(tmp_path):
    "One window for two processes: the numbers are those of one process"
    few = {'data.val_windows': 1, 'tokenizer.epochs': 1, 'runtime.only': 'tokenizer', 'tokenizer.average_last': 0}
    for n, launcher in ((1, []), (2, torchrun)): launched(tmp_path/f'{n}', launcher, **few, **{'tokenizer.batch_size': 32//n})
    one, two = [read_lines(tmp_path/f'{n}'/'tokenizer'/'validations.jsonl')[0] for n in (1, 2)]
    for k, v in one.items(): assert two[k]==pytest.approx(v, rel=1e-4), k

def test_ranks_stop_together_and_another_number_of_them_is_refused(tmp_path):
    "Early stopping is decided once; the checkpoints of two processes are not for one"
    out, stop = tmp_path/'two', {'runtime.only': 'tokenizer', 'tokenizer.epochs': 6, 'tokenizer.patience': 1, 'tokenizer.min_delta': 1e3}
    launched(out, torchrun, **stop)
    (a, said), (b, also) = ranks(out, 'tokenizer')
    assert said==also and 'early stopping' in said['stop'] and all(torch.equal(v, b[k]) for k, v in a.items())
    import shutil
    shutil.rmtree(out/'tokenizer'/'final_model')   # as if it had died before its end
    with pytest.raises(RunError, match=r'written by 2 processes, and there is 1 now.*--num-gpus 2'): fit(bars, cfg.replace(**no_test, **stop), out)

HOOKS = """
import os, time
if 'RANK' in os.environ and os.environ.get('PAUSE'):
    from kronos_nb.callback.checkpoint import Interrupts
    def after_step(self, learn):
        if learn.step != 6: return
        open(os.environ['PAUSE'] + os.environ['RANK'], 'w').close()
        while not learn.interrupted: time.sleep(.01)   # until the signal is there, on each process
    Interrupts.after_step = after_step
if os.environ.get('RANK') == os.environ.get('SHORT', 'none'):
    from kronos_nb.task import TokenizerTask
    forward = TokenizerTask.forward
    def short(self, x, stamp=None):
        if len(x) > 5: raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(self, x, stamp)
    TokenizerTask.forward = short
"""
def cli(where, name, **env):
    "`kronos-nb fit --num-gpus 2` on a file of bars, one epoch; HOOKS are imported by each process"
    bars.to_csv(where/'GOOG.csv', index=False)
    (where/'sitecustomize.py').write_text(HOOKS)
    cfg.replace(**no_test, **{'runtime.only': 'tokenizer', 'tokenizer.epochs': 1, 'tokenizer.batch_size': 16, 'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.)}).save(where/'mine.yaml')
    return subprocess.Popen([sys.executable, '-m', 'kronos_nb.cli', 'fit', str(where/'GOOG.csv'), '--config', str(where/'mine.yaml'), '--out', str(where/name), '--num-gpus', '2'], cwd=root,
        env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=f'{where}{os.pathsep}{root}') | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "A run by --num-gpus 2, not interrupted"
    where = tmp_path_factory.mktemp('pair')
    said = finish(cli(where, 'run'))
    assert said.count('Report:')==1   # rank 0 speaks
    return where/'run'

def test_num_gpus_starts_the_same_command_on_several_processes(pair):
    last = max((pair/'tokenizer'/'checkpoints').glob('step_*'))
    assert json.loads((last/'training.json').read_text())['tree']['world']==2

def test_sigterm_to_several_processes_finishes_the_step_and_going_on_is_the_same(pair, tmp_path):
    "All ranks finish step 6, rank 0 saves it, the command exits with 130; the same command ends with the bits of a run that was not stopped"
    p = cli(tmp_path, 'run', PAUSE=str(tmp_path/'ready'))
    while not all((tmp_path/f'ready{r}').exists() for r in (0, 1)): assert p.poll() is None, p.communicate()[0]; time.sleep(.02)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=300)[0]
    stage = tmp_path/'run'/'tokenizer'
    assert p.returncode==130 and said.count('SIGTERM: finishing the step and saving')==2, said
    assert max((stage/'checkpoints').glob('step_*')).name=='step_000006' and not (stage/'final_model').exists()
    status = json.loads((stage/'status.json').read_text())
    assert (status['state'], status['why'], status['step'], status['epoch'])==('interrupted', 'SIGTERM', 6, 1)
    finish(cli(tmp_path, 'run'))
    a, b = weights(pair, 'tokenizer'), weights(tmp_path/'run', 'tokenizer')
    assert a.keys()==b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert [timeless(o) for o in read_lines(pair/'tokenizer'/'steps.jsonl')]==[timeless(o) for o in read_lines(stage/'steps.jsonl')]

def test_memory_that_runs_out_on_one_process_halves_on_all(pair, tmp_path):
    "Process 1 cannot hold more than five windows: both train with four, and end with the weights of a run with memory enough; only process 1 validates in pieces"
    finish(cli(tmp_path, 'run', SHORT='1'))
    said = [o['text'] for o in read_lines(tmp_path/'run'/'tokenizer'/'notes.jsonl') if 'out of memory ' in o['text']]
    assert said==[f'out of memory at {n} windows per forward pass: going on with {n//2}, accumulated to the same step' for n in (16, 8)] + ['another process ran out of memory in a validation, and goes on in smaller pieces, which gives the same mean']
    a, b = weights(pair, 'tokenizer'), weights(tmp_path/'run', 'tokenizer')
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-6, msg=k)
    np.testing.assert_allclose(*[[o['val_loss'] for o in read_lines(p/'tokenizer'/'validations.jsonl')] for p in (pair, tmp_path/'run')], rtol=1e-5)

def test_inside_a_ray_trainer(tmp_path):
    "examples/ray_fit.py, two workers on the CPU"
    pytest.importorskip('ray')
    settings = {'base.symbols': 'none', 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'data.windows_per_epoch': 256, 'data.val_windows': 64, 'evaluate.paths': 4, 'runtime.plots': 'false'}
    p = subprocess.Popen([sys.executable, str(root/'examples'/'ray_fit.py'), '--out', str(tmp_path/'run'), '--workers', '2', *[f'--set={k}={v}' for k, v in settings.items()]], cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(root), RAY_USAGE_STATS_ENABLED='0'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finish(p)
    assert (tmp_path/'run'/'report.md').is_file() and (tmp_path/'run'/'predictor'/'final_model').is_dir()
    last = max((tmp_path/'run'/'predictor'/'checkpoints').glob('step_*'))
    assert json.loads((last/'training.json').read_text())['tree']['world']==2

class Shuffled(PredictorTask):
    "Next-bar targets dealt out at random over the batch: their distribution stays, their meaning goes"
    def forward(self, stamp, s1, s2):
        order = torch.randperm(s1[:, 1:].numel(), generator=torch.Generator().manual_seed(int(s1.sum())))
        t1, t2 = (o[:, 1:].flatten()[order].view(o[:, 1:].shape) for o in (s1, s2))
        a, b = self.model(s1[:, :-1], s2[:, :-1], stamp[:, :-1], s1_targets=t1)
        ce = lambda logits, t: torch.nn.functional.cross_entropy(logits.flatten(0, 1), t.flatten())
        return dict(loss=(ce(a, t1)+ce(b, t2))/2, ce_s1=ce(a, t1).detach(), ce_s2=ce(b, t2).detach())

def test_nothing_is_learnt_from_shuffled_targets():
    "On real targets the validation loss falls below what the tokens' frequencies give; on shuffled ones it does not: what it learns is no leak"
    torch.manual_seed(0)
    d = prepare(sample_klines('GOOG'), Config.preset('quickstart', **SETTINGS | {'data.stride': 1}))
    tok = TokenizerTask(build_model('tokenizer', 'scratch', 'tiny', cfg.tokenizer.model))
    Learner(tok, WindowSource(d.train, 64, seed=0), None, adamw(tok, 3e-3)).fit(3)
    train, val = encode_windows(tok.model, d.train), encode_windows(tok.model, d.val)
    p = np.bincount(train[..., 0].ravel(), minlength=16) + 1.
    frequencies = float(-np.log(p/p.sum())[val[:, 1:, 0].ravel()].mean())
    got = {}
    for name, cls in dict(real=PredictorTask, shuffled=Shuffled).items():
        torch.manual_seed(0)
        task = cls(build_model('predictor', 'scratch', 'tiny', cfg.predictor.model))
        learn = Learner(task, TokenSource(d.train, train, 64, seed=0), TokenSource(d.val, val, 64, mode='sequential'), adamw(task, 3e-3)).fit(3)
        got[name] = learn.metrics['val_ce_s1']
    assert got['real'] < .8*frequencies, (got, frequencies)
    assert got['shuffled'] > .98*frequencies, (got, frequencies)

def test_a_folder_belongs_to_one_run(whole, tmp_path):
    changed = cfg.replace(**no_test)
    with pytest.raises(RunError, match=r'(?s)holds another run.*tokenizer.lr.*init_from'): fit(bars, changed.replace(**{'tokenizer.lr': 1e-3}), whole)
    with pytest.raises(RunError, match='holds a run on other bars'): fit(bars.head(600), changed, whole)
    with pytest.raises(RunError, match='resume is False'): fit(bars, changed, whole, resume=False)
    (tmp_path/'thesis.txt').write_text('mine')
    with pytest.raises(RunError, match='holds no run of ours'): fit(bars, changed, tmp_path)
    assert (tmp_path/'thesis.txt').read_text()=='mine' and len(list(tmp_path.iterdir()))==1

@pytest.mark.parametrize('after', [0, 1])
def test_a_run_that_was_killed_while_it_claimed_its_folder_goes_on(tmp_path, monkeypatch, after):
    "Nothing was trained yet, so the same command begins; `after` files had been written"
    import kronos_nb.train as train
    wrote = []
    def dies(path): wrote.append(path); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if after: m.setattr(Config, 'save', lambda self, path: dies(path))
        else: m.setattr(train, 'write_json', lambda path, d: dies(path))
        with pytest.raises(KeyboardInterrupt): fit(bars, cfg.replace(**no_test), tmp_path/'run')
    assert wrote and len(list((tmp_path/'run').glob('*') if (tmp_path/'run').is_dir() else []))==after
    d = prepare(bars, cfg.replace(**no_test))
    train.claim_folder(tmp_path/'run', cfg.replace(**no_test), d, resume=True)
    assert Config.load(tmp_path/'run'/'config.yaml')==cfg.replace(**no_test) and (tmp_path/'run'/'run.json').is_file()

def test_the_status_names_the_epoch_that_was_the_last(whole, tmp_path):
    "Not the one after it: of 6 epochs stopped after 2, and of 2 that were all"
    assert [json.loads((whole/s/'status.json').read_text())['epoch'] for s in ('tokenizer', 'predictor')]==[2, 2]
    fit(bars, cfg.replace(**no_test, **{'runtime.only': 'tokenizer', 'tokenizer.epochs': 6, 'tokenizer.patience': 1, 'tokenizer.min_delta': 1e3}), tmp_path/'run')
    s = json.loads((tmp_path/'run'/'tokenizer'/'status.json').read_text())
    assert (s['state'], s['epoch'], s['epochs'])==('finished', 2, 6) and 'early stopping' in s['why'] and len(read_lines(tmp_path/'run'/'tokenizer'/'validations.jsonl'))==2

def test_stages_alone(whole, tmp_path):
    with pytest.raises(RunError, match='the predictor needs a tokenizer'): fit(bars, cfg.replace(**no_test, **{'runtime.only': 'predictor'}), tmp_path/'a')
    alone = fit(bars, cfg.replace(**no_test, **{'runtime.only': 'predictor', 'predictor.tokenizer': str(whole/'tokenizer'/'best_model')}), tmp_path/'b')
    assert alone.predictor is not None and not (tmp_path/'b'/'tokenizer').exists()
    assert alone.predictor.extra['tokenizer_hash']==alone.tokenizer.weights_hash()
    only = fit(bars, cfg.replace(**no_test, **{'runtime.only': 'tokenizer'}), tmp_path/'c')
    assert only.predictor is None and (tmp_path/'c'/'tokenizer'/'best_model'/'model.safetensors').is_file()
    with pytest.raises(RunError, match='no finished predictor'): only.forecaster()
    more = fit(bars, cfg.replace(**no_test, **{'runtime.init_from': str(whole)}), tmp_path/'d')
    assert more.history.query("stage=='predictor'").val_loss.iloc[-1] < pd.DataFrame(json.loads((whole/'predictor'/'training_metrics.json').read_text())).val_loss.iloc[0]

def test_other_bits_and_other_normalisers_are_errors(whole, tmp_path):
    base = {**no_test, 'runtime.only': 'predictor', 'predictor.tokenizer': str(whole/'tokenizer'/'best_model')}
    with pytest.raises(ModelError, match='writes 4 \\+ 4 bits and the predictor reads 5 \\+ 4'): fit(bars, cfg.replace(**base, **{'predictor.model': cfg.predictor.model | dict(s1_bits=5)}), tmp_path/'a')
    with pytest.raises(ModelError, match='trained with the normaliser'): fit(bars, cfg.replace(**base, **{'data.normalizer': 'median_mad'}), tmp_path/'b')

@pytest.mark.parametrize('what', ['heads', 'last_1'])
def test_only_what_is_asked_for_is_trained(whole, tmp_path, what):
    out = tmp_path/'run'
    fit(bars, cfg.replace(**no_test, **{'runtime.init_from': str(whole), 'tokenizer.trainable': what, 'predictor.trainable': what, 'tokenizer.epochs': 1, 'predictor.epochs': 1}), out)
    before, after = [load_file(o/'predictor'/f/'model.safetensors') for o, f in ((whole, 'best_model'), (out, 'final_model'))]
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith(('head.', 'norm.', 'dep_layer.') + (('transformer.1.',) if what=='last_1' else ())) for k in moved)
    assert any(k.startswith('transformer.1.') for k in moved)==(what=='last_1')

def test_lora_merges_into_an_ordinary_model(whole, tmp_path):
    pytest.importorskip('peft')
    out = tmp_path/'run'
    r = fit(bars, cfg.replace(**no_test, **{'runtime.init_from': str(whole), 'tokenizer.trainable': 'lora', 'predictor.trainable': 'lora', 'tokenizer.epochs': 1, 'predictor.epochs': 1}), out)
    before, after = [load_file(o/'predictor'/f/'model.safetensors') for o, f in ((whole, 'best_model'), (out, 'final_model'))]
    assert before.keys()==after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.endswith('_proj.weight') or '.ffn.w' in k for k in moved)
