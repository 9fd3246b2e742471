"The first hour: what a person with a file meets"
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from kronos_nb.config import Config
from kronos_nb.config_compat import EARLIER
from kronos_nb.core import RunError
from kronos_nb.data.read import sample_klines
from kronos_nb.fitting.claim import claim_folder, holds
from kronos_nb.fitting.prepare import prepare
from kronos_nb.training.run import Run
from tests.helpers import bars, cfg, one_epoch, root

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


# one rule for every door
def test_every_door_chooses_the_same_settings(tmp_path, monkeypatch):
    from kronos_nb.own import config_for, settle
    from kronos_nb.panel import ConfigPanel, Studio, TrainPanel
    monkeypatch.chdir(tmp_path)
    file = tmp_path/'mine.csv'
    sample_klines('DOGEUSDT').to_csv(file, index=False)
    wanted = config_for(file)
    studio = Studio(str(file))
    assert wanted.data.lookback_window < 400
    assert settle(file, None, {})[0] == wanted
    assert ConfigPanel(None, str(file)).config == wanted
    assert TrainPanel(str(file)).config == wanted
    assert studio.settings.config == studio.train.config == wanted
    studio.settings.use_preset('quickstart')
    studio.settings.use_preset('own')
    assert studio.settings.config == wanted


# released weights under a run
def test_a_run_that_began_with_released_weights_says_which_bars_they_may_have_seen(tmp_path, monkeypatch):
    import kronos_nb.forecast as forecast
    from kronos_nb.cli import _unseen_from
    from kronos_nb.forecast import RELEASED_UNTIL, Forecaster
    from kronos_nb.train import fit
    from kronos_nb.training.task import build_model
    start = {}
    for stage in ('tokenizer', 'predictor'):
        model = build_model(stage, 'scratch', 'tiny', getattr(cfg, stage).model)
        start[f'{stage}.init'] = str(model.save_pretrained(tmp_path/stage))
    monkeypatch.setattr(forecast, '_known_context', lambda predictor: 512)   # as if its shape was a published one
    split = {'data.train': .6, 'data.val': .2, 'data.test': .2, 'evaluate.origins': 4, 'evaluate.calibrate': 'off'}
    short = {'tokenizer.max_steps': 2, 'predictor.max_steps': 2}
    tuned = fit(bars, cfg.replace(**one_epoch | start | split | short), tmp_path/'tuned')
    f = Forecaster.from_pretrained(tuned.out_dir)
    assert str(f.seen_until.date()) == RELEASED_UNTIL
    assert RELEASED_UNTIL in tuned.evaluation.sentence
    assert max(_unseen_from(f, bars).values()) < bars.timestamps.max()   # judged, and marked
    assert Forecaster.from_pretrained(start['tokenizer.init'], start['predictor.init']).seen_until is not None
    later = bars.assign(timestamps=bars.timestamps + pd.Timedelta(days=7400))
    assert set(_unseen_from(f, later).values()) == {pd.Timestamp(RELEASED_UNTIL)}


# many symbols
def test_many_symbols_are_judged_in_turns():
    from kronos_nb.data.read import sample_klines
    from kronos_nb.judging.origins import pick_origins
    five = sample_klines().groupby('symbol').tail(190)
    every, _ = pick_origins(five, 20, 4, 12)
    turns, _ = pick_origins(five, 20, 4, 12, per_date=2)
    assert turns.groupby('date').size().max() == 2
    assert turns.date.nunique() == every.date.nunique()
    assert set(turns.symbol) == set(every.symbol)
    assert turns.groupby('symbol').size().max() < every.groupby('symbol').size().max()


# the command line
def test_a_reader_that_has_enough_is_no_error(tmp_path):
    sample_klines('GOOG').to_csv(tmp_path/'goog.csv', index=False)
    command = f'"{sys.executable}" -m kronos_nb.cli check goog.csv | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path, text=True, capture_output=True, timeout=120,
                          env=os.environ | dict(PYTHONPATH=str(root)))
    assert done.stdout.split('\n')[1] in ('0', '141')
    assert not done.stderr


def test_notes_name_all_symbols_at_once():
    from types import SimpleNamespace as Forecast
    from kronos_nb.cli import _notes_of
    found = {s: Forecast(notes=[f'the model was trained on AAPL, not on {s}', 'no volume']) for s in ('X', 'Y', 'Z')}
    assert _notes_of(found) == ['the model was trained on AAPL, not on X, Y, Z', 'no volume']
