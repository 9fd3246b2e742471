"The search where the tokens change, the card that counts trials, and trials that were stopped or killed"
import json, subprocess, sys, time
import pytest
optuna = pytest.importorskip('optuna')
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, RunError
from kronos_nb.learner import Callback
from kronos_nb.train import prepare
from kronos_nb.tune import open_study, storage_of, tune, validation_crps, with_params

optuna.logging.set_verbosity(optuna.logging.WARNING)
little = Config.preset('quickstart', **{'base.symbols': None, 'data.windows_per_epoch': 64, 'data.val_windows': 32, 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'tokenizer.batch_size': 32, 'predictor.batch_size': 32,
    'runtime.progress': False, 'runtime.plots': False, 'evaluate.origins': 4, 'evaluate.calibrate': 'off', 'evaluate.paths': 4, 'tokenizer.average_last': 1, 'predictor.average_last': 1})

def test_other_tokens_are_compared_by_forecasts_and_the_card_counts(tmp_path):
    found = tune('sample', little, {'bits': (4, 6)}, tmp_path, trials=2)
    assert found.value.startswith('CRPS') and found.trials == 2
    result = found.fit()
    assert 'best of 2 that were tried' in result.evaluation.to_markdown()
    assert json.loads((result.out_dir/'evaluation'/'evaluation.json').read_text())['settings']['trials'] == 2
    assert 'best of 2 that were tried' in (result.out_dir/'report.md').read_text()

def test_search_sees_nothing_of_the_test_part(tmp_path, monkeypatch):
    import kronos_nb.tune as m
    seen, real = [], m.evaluate
    monkeypatch.setattr(m, 'evaluate', lambda f, bars, *a, **k: (seen.append(bars.timestamps.max()), real(f, bars, *a, **k))[1])
    tune('sample', little, {'bits': (4, 6)}, tmp_path, trials=1)
    parts = prepare('sample', little).split.summary
    assert seen and max(seen) < parts.query("part == 'test'")['first'].min()

def test_killed_trial_is_asked_for_again(tmp_path):
    study = open_study(str(tmp_path/'s.db'), tmp_path, 0, 0)
    t = study.ask(dict(x=optuna.distributions.FloatDistribution(0, 1)))
    import platform
    t.set_user_attr('pid', 2**22 + 1); t.set_user_attr('host', platform.node())
    again = open_study(str(tmp_path/'s.db'), tmp_path, 0, 0)
    assert [o.state.name for o in again.trials] == ['FAIL', 'WAITING']
    assert again.ask(dict(x=optuna.distributions.FloatDistribution(0, 1))).params == t.params

def test_search_without_validation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='needs a validation part'):
        tune('sample', little, {'predictor.lr': (1e-4, 1e-3)}, tmp_path, trials=1, **{'data.val': 0., 'data.train': .85})

WORKER = '''
import sys
import optuna
from kronos_nb.config import Config
from kronos_nb.tune import tune
optuna.logging.set_verbosity(optuna.logging.WARNING)
out, config, storage, worker = sys.argv[1:]
print(tune('sample', config, {'predictor.lr': (1e-4, 1e-2)}, out, trials=4, storage=storage, worker=int(worker)))
'''

def test_two_processes_share_a_storage_and_the_budget(tmp_path, storage='study.db'):
    little.replace(**{'runtime.threads': 1}).save(tmp_path/'little.yaml')
    start = [subprocess.Popen([sys.executable, '-c', WORKER, str(tmp_path/'out'), str(tmp_path/'little.yaml'), str(tmp_path/storage), str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in (0, 1)]
    said = [p.communicate(timeout=560)[0] for p in start]
    assert [p.returncode for p in start] == [0, 0], said
    study = optuna.load_study(study_name='kronos_nb', storage=storage_of(str(tmp_path/storage)))
    assert [t.state.name in ('COMPLETE', 'PRUNED') for t in study.trials] == [True]*4           # none too many, none failed
    assert len({t.user_attrs['pid'] for t in study.trials}) == 2, 'one process did it all'
    assert len({t.params['predictor.lr'] for t in study.trials}) == 4                           # and no work was done twice
    assert not list((tmp_path/'out').glob('*.lock'))

def test_time_ends_a_search_within_a_step_and_the_same_call_goes_on(tmp_path):
    first = tune('sample', little, {'predictor.epochs': (1, 2)}, tmp_path, trials=1)   # with what all share, outside of the time that is measured
    assert not first.reason
    began = time.monotonic()
    cut = tune('sample', little, {'predictor.epochs': (3990, 4000)}, tmp_path, trials=2, timeout='8s')
    assert cut.reason == 'the time of the search is over' and cut.trials == 1 and 'ended early' in repr(cut)
    assert [t.state.name for t in cut.study.trials] == ['COMPLETE', 'FAIL', 'WAITING']   # stopped, and first in line for the next call
    assert list((tmp_path/'trials').glob('*/predictor/checkpoints/step_*')) and time.monotonic() - began < 60

def test_a_journal_is_a_storage(tmp_path):
    study = open_study(str(tmp_path/'deep'/'study.log'), tmp_path, 0, 0)
    study.tell(study.ask(dict(x=optuna.distributions.FloatDistribution(0, 1))), .5)
    assert open_study(str(tmp_path/'deep'/'study.log'), tmp_path, 0, 1).best_value == .5

def test_a_soup_of_other_shapes_is_not_offered(tmp_path):
    found = tune('sample', little, {'layers': (2, 3)}, tmp_path, trials=1)
    assert '.soup()' not in repr(found)
    with pytest.raises(RunError, match='only trials that share both'): found.soup()
