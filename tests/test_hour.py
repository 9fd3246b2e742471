"The first hour: what a person with a file meets"
import json
from pathlib import Path

import pytest
import yaml

from kronos_nb.config import Config
from kronos_nb.config_compat import EARLIER
from kronos_nb.core import RunError
from kronos_nb.data.read import sample_klines
from kronos_nb.fitting.claim import claim_folder, holds
from kronos_nb.fitting.prepare import prepare
from kronos_nb.training.run import Run
from tests.helpers import cfg

# every setting whose default is what runs did before it was there
NEUTRAL = Path(__file__).with_name('neutral_settings.txt')


def begun(folder, bars, changes, lacking):
    "Return a run that was started when some settings were not there yet"
    run, config = Run(folder), cfg.replace(**{'data.symbols': None}, **changes)
    claim_folder(run, config, prepare(bars, config), True)
    stored = yaml.safe_load(run.config_file.read_text())
    facts = json.loads(run.facts_file.read_text())
    for path in lacking:
        group, _, name = path.partition('.')
        del stored[group][name]
        facts['settings'].pop(path, None)
    run.config_file.write_text(yaml.safe_dump(stored))
    run.facts_file.write_text(json.dumps(facts))
    return Run(folder), config


LACKING = ('data.split', 'data.market_tz', 'evaluate.calibrate')


def test_a_setting_that_a_run_lacks_means_what_runs_did_then(tmp_path):
    two = sample_klines(['AAPL', 'GOOG']).groupby('symbol').tail(700)
    run, now = begun(tmp_path/'two', two, {'data.tz': 'America/New_York'}, LACKING)
    assert run.config.data.split == 'symbol'
    assert run.config.data.clock == 'UTC'
    assert run.config.evaluate.calibrate == 'off'
    data = prepare(two, now)
    assert not holds(run, now, data)
    with pytest.raises(RunError, match='data.split'):
        claim_folder(run, now, data, True)
    assert holds(run, now.replace(**{'data.split': 'symbol', 'data.market_tz': 'UTC'}), data)


def test_a_run_on_one_symbol_goes_on_whatever_the_split_was_called(tmp_path):
    one = sample_klines('GOOG').head(700)
    run, now = begun(tmp_path/'one', one, {}, LACKING)
    data = prepare(one, now)
    assert holds(run, now, data)
    claim_folder(run, now, data, True)


def test_every_new_setting_says_what_runs_did_before_it():
    assert set(Config().flat()) == set(NEUTRAL.read_text().split()) | set(EARLIER)
