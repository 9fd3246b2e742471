"Searches that change the tokens, cards that count trials, and trials that were stopped or killed"
import json
import platform
import subprocess
import sys
import time

import pytest

optuna = pytest.importorskip('optuna')

import kronos_nb.tune as tune_module
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, RunError
from kronos_nb.fitting.prepare import prepare
from kronos_nb.tune import open_study, storage_of, tune

optuna.logging.set_verbosity(optuna.logging.WARNING)
X = dict(x=optuna.distributions.FloatDistribution(0, 1))
stages = {f'{stage}.{k}': v for stage in ('tokenizer', 'predictor')
          for k, v in dict(epochs=1, batch_size=32, average_last=1).items()}
little = Config.preset('quickstart', **stages, **{
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.windows_per_epoch': 64, 'data.val_windows': 32, 'runtime.progress': False,
    'runtime.plots': False, 'evaluate.origins': 4, 'evaluate.calibrate': 'off', 'evaluate.paths': 4})


def test_other_tokens_are_compared_by_forecasts_and_the_card_counts(tmp_path):
    found = tune('sample', little, {'bits': (4, 6)}, tmp_path, trials=2)
    assert found.value.startswith('CRPS') and found.trials == 2
    result = found.fit()
    assert 'best of 2 trials' in result.evaluation.to_markdown()
    stored = json.loads((result.out_dir/'evaluation'/'evaluation.json').read_text())
    assert stored['settings']['trials'] == 2
    assert 'best of 2 trials' in (result.out_dir/'report.md').read_text()


def test_search_sees_nothing_of_the_test_part(tmp_path, monkeypatch):
    seen, real = [], tune_module.evaluate

    def watched(forecaster, bars, *args, **kwargs):
        seen.append(bars.timestamps.max())
        return real(forecaster, bars, *args, **kwargs)
    monkeypatch.setattr(tune_module, 'evaluate', watched)
    tune('sample', little, {'bits': (4, 6)}, tmp_path, trials=1)
    parts = prepare('sample', little).split.summary
    assert seen and max(seen) < parts.query("part == 'test'")['first'].min()


def test_killed_trial_is_queued_again(tmp_path):
    storage = str(tmp_path/'s.db')
    trial = open_study(storage, tmp_path, 0, 0).ask(X)
    trial.set_user_attr('pid', 2**22 + 1)
    trial.set_user_attr('host', platform.node())
    again = open_study(storage, tmp_path, 0, 0)
    assert [o.state.name for o in again.trials] == ['FAIL', 'WAITING']
    assert again.ask(X).params == trial.params


def test_search_without_validation_is_refused(tmp_path):
    no_validation = {'data.val': 0., 'data.train': .85}
    with pytest.raises(ConfigError, match='data.val'):
        tune('sample', little, {'predictor.lr': (1e-4, 1e-3)}, tmp_path, trials=1, **no_validation)


WORKER = '''
import sys
import optuna
from kronos_nb.config import Config
from kronos_nb.tune import tune
optuna.logging.set_verbosity(optuna.logging.WARNING)
out, config, storage, worker = sys.argv[1:]
print(tune('sample', config, {'predictor.lr': (1e-4, 1e-2)}, out, trials=4, storage=storage, worker=int(worker)))
'''


def test_two_processes_share_a_storage_and_the_budget(tmp_path):
    config, storage = tmp_path/'little.yaml', str(tmp_path/'study.db')
    little.replace(**{'runtime.threads': 1}).save(config)
    command = [sys.executable, '-c', WORKER, str(tmp_path/'out'), str(config), storage]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [subprocess.Popen([*command, str(worker)], **pipes) for worker in (0, 1)]
    output = [p.communicate(timeout=560)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], output
    study = optuna.load_study(study_name='kronos_nb', storage=storage_of(storage))
    assert [t.state.name in ('COMPLETE', 'PRUNED') for t in study.trials] == [True]*4
    assert len({t.user_attrs['pid'] for t in study.trials}) == 2, 'one process ran all trials'
    assert len({t.params['predictor.lr'] for t in study.trials}) == 4   # no settings were tried twice


def test_timeout_ends_a_search_within_a_step_and_the_same_call_resumes(tmp_path):
    first = tune('sample', little, {'predictor.epochs': (1, 2)}, tmp_path, trials=1)   # trains the shared start
    assert not first.reason
    began = time.monotonic()
    cut = tune('sample', little, {'predictor.epochs': (3990, 4000)}, tmp_path, trials=2, timeout='8s')
    assert time.monotonic() - began < 60
    assert 'time limit' in cut.reason and cut.trials == 1 and 'ended early' in repr(cut)
    assert [t.state.name for t in cut.study.trials] == ['COMPLETE', 'FAIL', 'WAITING']   # first in the queue
    assert list((tmp_path/'trials').glob('*/predictor/checkpoints/step_*'))


def test_a_journal_is_a_storage(tmp_path):
    storage = str(tmp_path/'deep'/'study.log')
    study = open_study(storage, tmp_path, 0, 0)
    study.tell(study.ask(X), .5)
    assert open_study(storage, tmp_path, 0, 1).best_value == .5


def test_a_soup_of_other_shapes_is_not_offered(tmp_path):
    found = tune('sample', little, {'layers': (2, 3)}, tmp_path, trials=1)
    assert '.soup()' not in repr(found)
    with pytest.raises(RunError, match='layers'):
        found.soup()
