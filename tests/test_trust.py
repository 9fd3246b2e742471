"Settings, losses and histories at the edge of what their types hold"
import errno
import sys

import numpy as np
import pytest
import torch
from sqlalchemy.exc import SQLAlchemyError
from torch import nn

from kronos_nb import tune
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, RunError, seed_everything
from kronos_nb.judging.evaluation import skill
from kronos_nb.training.history import read_lines
from kronos_nb.training.learner import Learner, TensorSource


@pytest.mark.parametrize('name,wrong', [
    ('runtime.seed', 2**63), ('runtime.seed', 10**30), ('runtime.seed', -1), ('runtime.seeds', (1, 2**64)),
    ('runtime.seeds', (-1, 2))])
def test_a_seed_that_torch_cannot_take_is_no_setting(name, wrong):
    with pytest.raises(ConfigError, match=name):
        Config().replace(**{name: wrong})
    seed_everything(Config().replace(**{'runtime.seed': 2**63 - 1}).runtime.seed)


@pytest.mark.parametrize('key', [None, 1, 1.5, True, (1, 2)])
def test_a_group_without_a_name_is_no_group(key):
    with pytest.raises(ConfigError):
        Config.load({key: {'stride': 2}})


@pytest.mark.parametrize('loss,other', [
    ([0, .25, 0, 0], [0, 0, 0, .25]), ([0, .2, .1, .3]*4, [0]*16), ([0]*8, [0]*8), ([.1]*8, [0]*8), ([0], [0])])
def test_a_loss_of_zero_in_some_resamples_decides_nothing_by_accident(loss, other):
    t = skill(loss, other)
    assert not t['low'] > 0 and t['needed'] == np.inf


def test_a_row_without_its_place_is_damaged(tmp_path):
    (tmp_path/'steps.jsonl').write_text('{"step": 1, "loss": 1}\n{"epoch": 1, "step": 2, "loss": 1}\n')
    said = []
    assert [r['step'] for r in read_lines(tmp_path/'steps.jsonl', said)] == [2] and len(said) == 1


def test_a_long_history_holds_each_name_once():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return dict(loss=(self.w*x).sum())

    learn = Learner(Task(), TensorSource(dict(x=torch.ones(4, 1)), 1))
    learn.log(**{f'{part}/block': 1. for part in ['a']})
    assert next(iter(learn.row)) is sys.intern('a/block')


# searches
SEARCH = dict(space={'predictor.lr': (1e-4, 1e-2)}, trials=3)


@pytest.fixture
def search(tmp_path, monkeypatch):
    "Return a function that searches in a folder with a fit that raises"
    def go(error, **kw):
        tried = []

        def fit(*args, **more):
            tried.append(args)
            raise error
        monkeypatch.setattr(tune, 'shared_start', lambda data, cfg, *_: cfg)
        monkeypatch.setattr(tune, 'fit', fit)
        with pytest.raises(RunError) as e:
            tune.tune('sample', 'quickstart', out_dir=tmp_path/'search', **SEARCH | kw)
        return len(tried), str(e.value)
    return go


def full_disk():
    error = RunError('no space')
    error.__cause__ = OSError(errno.ENOSPC, 'No space left on device')
    return error


def test_a_search_in_which_every_trial_fails_ends(search):
    assert search(RunError('diverged'))[0] == 3


def test_a_full_disk_ends_a_search_and_takes_no_trial(search):
    assert search(full_disk())[0] == 1
    assert search(OSError(errno.ENOSPC, 'No space left on device'))[0] == 1


@pytest.mark.parametrize('name', ['study.db', 'study.log'])
def test_a_damaged_storage_is_named(search, tmp_path, name):
    (tmp_path/name).write_bytes(b'garbage\n'*300)
    tried, said = search(RunError('not reached'), storage=str(tmp_path/name))
    assert tried == 0 and name in said and len(said) < 500


def test_the_error_of_a_storage_hides_the_password():
    with pytest.raises(RunError) as e, tune._storing('postgresql://user:secret@host/name'):
        raise SQLAlchemyError('away')
    assert 'secret' not in str(e.value)
