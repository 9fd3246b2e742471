"The search where the tokens change, the card that counts trials, and trials that were stopped or killed"
import json
import pytest
optuna = pytest.importorskip('optuna')
from kronos_nb.config import Config
from kronos_nb.core import ConfigError
from kronos_nb.learner import Callback
from kronos_nb.train import prepare
from kronos_nb.tune import open_study, tune, validation_crps, with_params

optuna.logging.set_verbosity(optuna.logging.WARNING)
little = Config.preset('quickstart', **{'base.symbols': None, 'data.windows_per_epoch': 64, 'data.val_windows': 32, 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'tokenizer.batch_size': 32, 'predictor.batch_size': 32,
    'runtime.progress': False, 'runtime.plots': False, 'evaluate.origins': 4, 'evaluate.paths': 4, 'tokenizer.average_last': 1, 'predictor.average_last': 1})

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
