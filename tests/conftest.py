"Fixtures that several files share: a run is trained once, whatever the number of test processes"
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

root = Path(__file__).resolve().parents[1]
os.environ.setdefault('OMP_NUM_THREADS', '1')   # test processes share the cores, and no run times threads of its own


def once(tmp_path_factory, name: str, make) -> Path:
    "Return a folder that `make(folder)` filled; the first test process makes it and the others wait"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        shared = shared.parent
    folder = shared/name
    with FileLock(f'{folder}.lock'):
        if not (done := folder.with_suffix('.done')).exists():
            make(folder)
            done.touch()
    return folder


QUICKSTART = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
import torch
import kronos_nb as kn
out = Path(sys.argv[1])
torch.set_num_threads(1)
base = {'base.symbols': ('AAPL', 'IBM', 'MSFT'), 'base.windows_per_epoch': 1000, 'tokenizer.init': 'scratch',
        'predictor.init': 'scratch', 'tokenizer.difference_weight': 0.}   # the reference's loss
small = {'data.windows_per_epoch': 640, 'runtime.save_steps': 10, 'runtime.progress': False, 'runtime.device': 'cpu'}
result = kn.fit('sample', 'quickstart', out, **base, **small)
paths = result.forecaster().predict(kn.sample_klines('GOOG'), 10, paths=20, seed=0, raw=True).paths
np.save(out/'paths.npy', paths)
"""


@pytest.fixture(scope='session')
def quickstart(tmp_path_factory) -> Path:
    "Return the folder of a short quickstart that trains its own base first, run by one process with one thread"
    def make(folder):
        env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='Agg')
        done = subprocess.run([sys.executable, '-c', QUICKSTART, str(folder)], cwd=root, env=env, text=True,
                              capture_output=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
    return once(tmp_path_factory, 'quickstart', make)


def fit_once(tmp_path_factory, name: str, changes: dict) -> Path:
    "Return the folder of a small run (tests/helpers.py) with `changes`"
    from kronos_nb.train import fit
    from tests.helpers import bars, cfg
    return once(tmp_path_factory, name, lambda folder: fit(bars, cfg.replace(**changes), folder))


@pytest.fixture(scope='session')
def whole_run(tmp_path_factory) -> Path:
    "Return a small run of two epochs with averages and checkpoints, made by one process with one thread"
    from tests.helpers import finish, start
    return once(tmp_path_factory, 'whole_run', lambda folder: finish(start(folder)))


@pytest.fixture(scope='session')
def one_epoch_run(tmp_path_factory) -> Path:
    "Return a small run of both stages, one epoch each"
    from tests.helpers import one_epoch
    return fit_once(tmp_path_factory, 'one_epoch_run', one_epoch)


@pytest.fixture(scope='session')
def four_steps_run(tmp_path_factory) -> Path:
    "Return four steps of a tokenizer"
    from tests.helpers import four_steps
    return fit_once(tmp_path_factory, 'four_steps_run', four_steps)
