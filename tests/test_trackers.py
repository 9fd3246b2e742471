"Runs are sent to the trackers that people have: each writes on this machine, and one that fails stops no run"
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import tracking

from kronos_nb.core import ConfigError
from kronos_nb.training.history import read_lines
from kronos_nb.training.monitor import Tracker

from .test_monitor import line

root = Path(__file__).resolve().parents[1]


class Kept:
    "A tracker of accelerate, in memory"
    requires_logging_directory = False
    made = []

    def __init__(self, *args, **kw):
        self.args, self.kw, self.rows, self.finished = args, kw, [], False
        self.made.append(self)

    def start(self): pass
    def store_init_configuration(self, values): pass
    def log(self, values, step): self.rows.append((step, values))
    def finish(self): self.finished = True


@pytest.fixture
def stand_in(monkeypatch):
    def use(name, cls):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, cls)
        monkeypatch.setattr(tracking, 'get_available_trackers', lambda: [name])
    return use


@pytest.mark.parametrize(('name', 'key'), [('wandb', 'name'), ('trackio', 'name'), ('mlflow', 'run_name')])
@pytest.mark.parametrize(('folder', 'shown'), [
    ('goog', 'goog predictor'), ('goog/base', 'goog base predictor'), ('goog/seed_2', 'goog seed_2 predictor')])
def test_a_run_has_the_name_of_its_folder_and_stage(stand_in, tmp_path, name, key, folder, shown):
    stand_in(name, Kept)
    line(Tracker(name, tmp_path/folder, 'predictor')).fit(1)
    assert Kept.made[-1].kw == {key: shown} and Kept.made[-1].args == ('kronos_nb',)
    line(Tracker(name, tmp_path/folder, 'predictor', **{key: 'mine'})).fit(1)
    assert Kept.made[-1].kw == {key: 'mine'}


@pytest.mark.parametrize('where', ['__init__', 'start'])
def test_one_that_does_not_start_is_an_error_before_the_first_step(stand_in, tmp_path, where):
    def refuse(self, *args, **kw): raise ValueError('no account')
    stand_in('wandb', type('Refused', (Kept,), {where: refuse}))
    learn = line(Tracker('wandb', tmp_path, 'predictor'))
    with pytest.raises(ConfigError, match='wandb.*no account') as caught:
        learn.fit(1)
    assert 'runtime.trackers' in str(caught.value) and learn.step == 0


@pytest.mark.parametrize('when', ['store_init_configuration', 'log', 'finish'])
def test_one_that_fails_later_is_left_out_and_changes_nothing(tmp_path, when):
    def fail(self, *args, **kw): raise OSError('server\nlost')
    plain, lost = line(), type('Lost', (Kept,), {when: fail})()
    learn = line(Tracker(lost, tmp_path, 'predictor', dict(lr=1.)))
    plain.fit(2)
    learn.fit(2)
    noted = [n for n in learn.history.notes if n['kind'] == 'tracker']
    assert len(noted) == 1 and 'lost' in noted[0]['text'] and '\n' not in noted[0]['text']
    assert all((a == b).all() for a, b in zip(plain.model.parameters(), learn.model.parameters()))
    assert plain.history.steps == learn.history.steps


# the real ones, each in a process and a home of its own
CODE = '''
import sys
from pathlib import Path
from kronos_nb.training.monitor import RunFiles, Tracker
from tests.test_monitor import line
line(RunFiles(Path('goog'), 'predictor'), Tracker(sys.argv[1], 'goog', 'predictor', dict(lr=1.))).fit(1)
'''


def sent(tmp_path, name) -> Path:
    "Return the folder in which a real tracker followed a run"
    if importlib.util.find_spec(name) is None: pytest.skip(f'{name} is optional')
    env = os.environ | dict(HOME=str(tmp_path), PYTHONPATH=str(root), WANDB_MODE='offline', WANDB_SILENT='true',
        MLFLOW_DISABLE_TELEMETRY='true', TRACKIO_DIR=str(tmp_path/'trackio'), MLFLOW_TRACKING_URI='sqlite:///mlflow.db')
    done = subprocess.run([sys.executable, '-c', CODE, name], cwd=tmp_path, env=env, text=True, capture_output=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path


def query(file, text): return sqlite3.connect(file).execute(text).fetchall()


def steps_of(folder):
    return {row['step']: row['loss'] for row in read_lines(folder/'goog'/'predictor'/'steps.jsonl')}


def test_mlflow_holds_every_step(tmp_path):
    file = sent(tmp_path, 'mlflow')/'mlflow.db'
    rows = dict(query(file, "select step, value from metrics where key = 'Training/Loss'"))
    assert rows == steps_of(tmp_path)
    assert query(file, 'select name, status from runs') == [('goog predictor', 'FINISHED')]


def test_trackio_holds_every_step(tmp_path):
    file = next(sent(tmp_path, 'trackio').rglob('kronos_nb.db'))
    rows = query(file, 'select step, metrics, run_name from metrics order by id')
    losses = {step: json.loads(said)['Training/Loss'] for step, said, _ in rows if 'Training/Loss' in json.loads(said)}
    assert losses == steps_of(tmp_path) and {name for *_, name in rows} == {'goog predictor'}


def test_wandb_holds_every_step(tmp_path):
    data = next((sent(tmp_path, 'wandb')/'wandb').glob('offline-run-*/*.wandb')).read_bytes()
    losses = steps_of(tmp_path).values()   # records of protobuf that hold each number as text
    assert b'goog predictor' in data and len(losses) > 5 and all(repr(v).encode() in data for v in losses)
