"What a kill, a full disk or another run leaves in a folder; no model is needed for it"
import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from kronos_nb.average import step_files
from kronos_nb.core import RunError, write_atomic, writing
from kronos_nb.training import checkpoint
from kronos_nb.training.checkpoint import (
    Checkpoint, Interrupts, checkpoints, damage, is_extra, last_checkpoint, tidy)
from kronos_nb.training.learner import Callback, Learner, TensorSource
from kronos_nb.training.monitor import RunFiles
from kronos_nb.training.run import only_writer

STEPS = 12   # two epochs of six


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, y):
        return dict(loss=((self.layer(x) - y)**2).mean())


class StopAt(Callback):
    def __init__(self, *steps):
        self.steps = steps

    def after_step(self, learn):
        if learn.step in self.steps:
            learn.stop('enough', interrupted=True)


def save_model(learn, folder):
    from safetensors.torch import save_file
    save_file({k: v.clone() for k, v in learn.model.state_dict().items()}, folder/'model.safetensors')


def line(out, *callbacks, run='a run', **kw):
    "Return a learner that goes on in `out`, with a checkpoint every four steps"
    torch.manual_seed(0)
    task, x = Line(), torch.linspace(-1, 1, 48)[:, None]
    data = dict(x=x, y=3*x + 1)
    keep = Checkpoint(out/'tokenizer'/'checkpoints', 4, save_model=save_model, run=run)
    learn = Learner(task, TensorSource(data, 8, seed=0), TensorSource(data, 48), torch.optim.SGD(task.parameters(), .1),
                    callbacks=[RunFiles(out, 'tokenizer'), keep, *callbacks], val_every=5, **kw)
    keep.resume(learn)
    return learn


def folder(out) -> Path:
    return out/'tokenizer'/'checkpoints'


def names(out) -> list:
    return [p.name for p in checkpoints(folder(out))]


def same(a, b) -> bool:
    states = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(v, states[1][k]) for k, v in states[0].items()) and a.history == b.history


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch):
    "Flushing to disk is slow, and only a power cut needs it"
    monkeypatch.setattr(os, 'fsync', lambda fd: None)


@pytest.fixture
def whole(tmp_path):
    return line(tmp_path/'whole').fit(2)


# interruptions
@pytest.mark.parametrize('steps', [(5,), (6,), (7, 9), (12,)])
def test_what_an_interruption_adds_is_no_part_of_an_average(tmp_path, whole, steps):
    out, learn = tmp_path/'run', None
    for _ in steps:
        learn = line(out, StopAt(*steps)).fit(2)
        assert learn.interrupted
        newest = checkpoints(folder(out))[-1]
        assert is_extra(newest) == (learn.step % 4 > 0)
        assert all(n % 4 == 0 for n, _ in step_files(folder(out)))
    assert same(line(out).fit(2), whole)
    assert names(out) == names(tmp_path/'whole') == ['step_000004', 'step_000008', 'step_000012']


@pytest.mark.parametrize('event', ['before_validate', 'after_validate', 'after_epoch', 'before_train', 'after_fit'])
def test_a_signal_is_heard_at_any_event_and_changes_nothing(tmp_path, whole, event):
    "Also where a validation inside an epoch runs: the epoch is not over"
    def send(self, learn):
        if learn.step >= 5 and not self.sent:
            self.sent = True
            signal.raise_signal(signal.SIGTERM)
    once = type('Once', (Callback,), {event: send, 'sent': False})()
    part = line(tmp_path/'run', once, Interrupts()).fit(2)
    assert part.interrupted and part.stop_reason == 'SIGTERM'
    assert same(line(tmp_path/'run').fit(2), whole)


def test_a_validation_that_is_left_is_taken_again(tmp_path, whole):
    "The signal arrives between two batches of a validation"
    class Early(TensorSource):
        def load(self, epoch, step):
            if learn.step == 5:
                learn.stop('enough', interrupted=True)
            return super().load(epoch, step)
    learn = line(tmp_path/'run')
    learn.valid = Early(learn.valid.tensors, 16)
    learn.fit(2)
    assert (learn.step, learn.validated_at, len(learn.history.validations)) == (5, -1, 0)
    assert same(line(tmp_path/'run').fit(2), whole)


def test_an_end_and_an_interruption_at_once_are_both_kept(tmp_path):
    "A fit that was to end, and was interrupted before it closed its epoch, ends when it is called again"
    class End(Callback):
        def after_validate(self, learn):
            learn.stop('early stopping')
            if self.interrupt:
                learn.stop('SIGTERM', interrupted=True)
    both, alone = End(), End()
    both.interrupt, alone.interrupt = True, False
    assert line(tmp_path/'run', both).fit(2).interrupted
    ended, expected = line(tmp_path/'run', alone).fit(2), line(tmp_path/'other', alone).fit(2)
    assert ended.stop_reason == expected.stop_reason == 'early stopping' and same(ended, expected)
    assert ended.step == 5 and len(ended.history.epochs) == 1


def test_handlers_return_though_a_cleanup_fails(tmp_path):
    class Clumsy(Callback):
        def cleanup_fit(self, learn): raise ValueError('clumsy')
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match='clumsy'):
        line(tmp_path/'run', Clumsy(), Interrupts()).fit(1)
    assert signal.getsignal(signal.SIGTERM) is before


# checkpoints that cannot be used
def spoil(path, how, other):
    "Make a checkpoint useless"
    if how == 'another run':
        shutil.rmtree(path)
        shutil.copytree(other/path.name, path)
    elif how == 'missing':
        (path/'training.safetensors').unlink()
    else:
        (path/'manifest.json').write_text(how)


@pytest.mark.parametrize('how', ['{}', 'null', '[]', '', '{"files": null}', '{"files": {}}', 'missing', 'another run'])
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_it_is_used(tmp_path, whole, how):
    line(tmp_path/'other', run='another run').fit(2)
    out = tmp_path/'run'
    line(out, StopAt(9)).fit(2)
    spoil(folder(out)/'step_000008', how, folder(tmp_path/'other'))
    spoil(folder(out)/'step_000009', how if how != 'another run' else 'null', folder(tmp_path/'other'))
    learn = line(out)
    assert learn.step == 4
    said = [n['text'] for n in learn.history.notes if n['kind'] == 'checkpoint']
    assert ['step_000009' in said[0], 'step_000008' in said[1]] == [True, True]
    assert (folder(out)/'step_000009.unusable').is_dir() and names(out) == ['step_000004']
    learn.fit(2)
    assert torch.equal(learn.model.layer.weight, whole.model.layer.weight)
    assert [n for n, _ in step_files(folder(out))] == [4, 8, 12]


def test_without_a_usable_checkpoint_nothing_is_touched(tmp_path):
    line(tmp_path/'run').fit(2)
    for p in checkpoints(folder(tmp_path/'run')):
        (p/'manifest.json').write_text('null')
    with pytest.raises(RunError, match='step_000004.*step_000012|step_000012.*step_000004'):
        line(tmp_path/'run')
    assert len(names(tmp_path/'run')) == 3


def test_checkpoints_of_older_versions_name_no_run(tmp_path):
    line(tmp_path/'run', run=None).fit(2)
    assert last_checkpoint(folder(tmp_path/'run'), 'a run')[0].name == 'step_000012'


# what a kill leaves
def test_a_checkpoint_that_was_moved_aside_for_a_new_one_comes_back(tmp_path):
    line(tmp_path/'run').fit(2)
    where = folder(tmp_path/'run')
    (where/'step_000012').rename(where/'.step_000012.old')   # killed before the new one was there
    shutil.copytree(where/'step_000004', where/'.step_000004.old')
    (where/'.step_000016.tmp').mkdir()
    tidy(where)
    assert sorted(p.name for p in where.iterdir()) == ['step_000004', 'step_000008', 'step_000012']


def wait_for(path, seconds=30):
    ends = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < ends
        time.sleep(.01)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_lock_ends_with_its_process_and_so_does_what_it_left(tmp_path):
    out = tmp_path/'run'
    pid = os.fork()
    if not pid:
        with only_writer(out):
            (out/'.report.md.abcd_123.tmp').touch()
            (out/'.mine.tmp').touch()
            (out/'held').touch()
            time.sleep(600)
        os._exit(0)
    wait_for(out/'held')
    with pytest.raises(RunError, match='another process'):
        with only_writer(out, wait=.1):
            pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with only_writer(out, wait=5):
        assert sorted(p.name for p in out.iterdir()) == ['.lock', '.mine.tmp', 'held']   # a stranger's file stays


# a disk that is full
class Full:
    "Refuse the n-th file operation below a folder and all after it, as the system does"
    def __init__(self):
        self.left, self.below = None, ''
        sys.addaudithook(self)

    def __call__(self, name, args):
        if self.left is None or not args or not str(args[0]).startswith(self.below):
            return
        writes = name == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or name in ('os.rename', 'os.mkdir', 'os.truncate'):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope='module')
def full():
    return Full()   # a hook of the interpreter cannot be taken away


def test_a_disk_that_is_full_at_any_moment_is_named_and_leaves_checkpoints_whole(tmp_path, whole, full):
    full.below, refused = str(tmp_path/'run'), 0
    for n in range(0, 200, 5):
        shutil.rmtree(tmp_path/'run', ignore_errors=True)
        full.left = n
        try:
            line(tmp_path/'run').fit(2)
            break
        except RunError as e:
            assert os.strerror(errno.ENOSPC) in str(e)
            refused += 1
        finally:
            full.left = None
        assert [damage(p) for p in checkpoints(folder(tmp_path/'run'))] == [None]*len(names(tmp_path/'run'))
        assert same(line(tmp_path/'run').fit(2), whole)
    assert refused > 12


def test_the_writer_of_a_library_says_it_in_the_same_words(tmp_path, monkeypatch):
    "safetensors raises its own error, which is no OSError"
    def refuse(tensors, path): raise SafetensorError('Error while serializing: I/O error: No space left (os error 28)')
    line(tmp_path/'run', StopAt(5)).fit(2)
    monkeypatch.setattr(checkpoint, 'save_file', refuse)
    with pytest.raises(RunError, match='os error 28'):
        line(tmp_path/'run').fit(2)
    assert [damage(p) for p in checkpoints(folder(tmp_path/'run'))] == [None, None]
    assert not [p for p in folder(tmp_path/'run').iterdir() if p.name.startswith('.')]


def test_other_errors_pass_and_reading_is_no_writing(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        1/0
    with pytest.raises(FileNotFoundError), writing(tmp_path, full=True):
        open(tmp_path/'not there')
    with pytest.raises(RunError, match='not there'):
        write_atomic('/proc/not there/file', '')
    assert json.loads(write_atomic(tmp_path/'a'/'b.json', '1').read_text()) == 1
