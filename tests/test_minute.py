"README's first command does only what serves its purpose"
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kronos_nb.training import monitor
from kronos_nb.training.history import read_json
from kronos_nb.training.learner import Learner, TensorSource

root = Path(__file__).resolve().parents[1]


def run(code, **env):
    "Run `code` in a fresh process; return what it printed to both streams"
    env = {k: v for k, v in os.environ.items() if k != 'OMP_WAIT_POLICY'} | dict(PYTHONPATH=str(root)) | env
    done = subprocess.run([sys.executable, '-c', code], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='torch brings another OpenMP elsewhere')
@pytest.mark.parametrize('env, policy', [({}, 'PASSIVE'), (dict(OMP_WAIT_POLICY='ACTIVE'), 'ACTIVE')])
def test_idle_threads_sleep_unless_the_user_decides(env, policy):
    said = run('import kronos_nb, torch', OMP_DISPLAY_ENV='TRUE', **env)
    assert f"OMP_WAIT_POLICY = '{policy}'" in said


def test_nothing_is_set_that_would_come_too_late():
    code = "import sys; sys.modules['torch'] = sys; import kronos_nb, os; print(os.environ)"
    assert 'OMP_WAIT_POLICY' not in run(code)


def test_scores_load_no_library_that_compiles():
    code = ("import sys, numpy as np; from kronos_nb.judging.metrics import crps, pinball; "
            "print(crps(np.eye(3), np.ones(3)), pinball(1, 2, .5)); print(*sorted(sys.modules))")
    assert not {'scoringrules', 'numba'} & set(run(code).split())


def fitted(folder, monkeypatch, seconds):
    "Names of the loss plots, in the order in which they were written, of five epochs with pictures that take `seconds`"
    import torch
    from torch import nn
    clock, seen = [0.], []
    def picture(fig):
        clock[0] += seconds
        return b''
    monkeypatch.setattr(monitor, 'png', picture)
    monkeypatch.setattr(monitor, 'write_atomic', lambda path, data: seen.append(path.stem.removeprefix('loss_curve_')))
    monkeypatch.setattr(monitor.time, 'monotonic', lambda: clock[0])

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 1)
        def forward(self, x):
            clock[0] += .01
            return dict(loss=self.model(x).square().mean())

    source = TensorSource(dict(x=torch.randn(40, 2)), 10)
    Learner(Task(), source, source, callbacks=[monitor.LossPlot(folder, 'predictor', every=15)], val_first=True).fit(5)
    return seen


def test_loss_plots_take_three_seconds_and_little_more(tmp_path, monkeypatch):
    often = fitted(tmp_path, monkeypatch, 0)
    assert often == ['latest']*3 + ['latest', 'step_15'] + ['latest']*2 + ['latest', 'final_step_20']
    assert fitted(tmp_path, monkeypatch, 4) == ['latest', 'latest', 'step_15', 'latest', 'final_step_20']


def test_weights_that_are_there_twice_are_validated_once(tmp_path, monkeypatch):
    from kronos_nb.train import fit
    counted, validate = [], Learner.validate
    monkeypatch.setattr(Learner, 'validate', lambda *a: counted.append(1) or validate(*a))
    small = {'data.windows_per_epoch': 64, 'data.val_windows': 16, 'runtime.only': 'tokenizer', 'tokenizer.epochs': 2}
    small |= {'tokenizer.average_last': 1, 'tokenizer.init': 'scratch', 'runtime.plots': False}
    small |= {'runtime.progress': False}
    fit('sample', 'quickstart', tmp_path/'run', judge=False, **small)
    best, last = read_json(tmp_path/'run'/'tokenizer'/'weights.json')['table']
    assert (best['candidate'], last['candidate'], best['val_loss']) == ('best', 'last', last['val_loss'])
    assert len(counted) == 3   # after each epoch, and of the best weights
