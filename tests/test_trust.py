"Settings, losses and histories at the edge of what their types hold"
import sys

import numpy as np
import pytest
import torch
from torch import nn

from kronos_nb.config import Config
from kronos_nb.core import ConfigError, seed_everything
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
