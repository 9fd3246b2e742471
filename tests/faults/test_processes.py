"Processes that die, stand still or stay behind"
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from kronos_nb.core import RunError
from kronos_nb.data.window import WindowDataset
from kronos_nb.fitting.stage import _loaders
from kronos_nb.training import guard, task
from kronos_nb.training.run import answers, watch
from kronos_nb.training.task import WindowSource
from tests.helpers import bars

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


class Loaders:
    "A learner that has nothing but loader processes"
    def __init__(self):
        self.source, self.valid = WindowSource(WindowDataset(bars, 16, 4), 8, seed=0, workers=1), None

    def close(self): self.source.close()


def loader_of(stream) -> psutil.Process:
    next(stream)
    return psutil.Process().children()[-1]


@pytest.mark.parametrize('number, within', [(signal.SIGSTOP, 20), (signal.SIGKILL, 20)])
def test_a_loader_that_dies_or_stands_still_is_an_error_and_does_not_stay(monkeypatch, number, within):
    monkeypatch.setattr(task, 'LOADER_PATIENCE', 1)
    learn, began = Loaders(), time.monotonic()
    with pytest.raises(RunError, match='runtime.workers'), _loaders(learn):
        stream = learn.source.stream(0)
        loader = loader_of(stream)
        loader.send_signal(number)
        for _ in stream:
            pass
    assert not loader.is_running() and time.monotonic() - began < within


def test_loaders_leave_signals_to_the_process_that_trains():
    learn = Loaders()
    stream = learn.source.stream(0)
    loader = loader_of(stream)
    for number in (signal.SIGINT, signal.SIGTERM):
        loader.send_signal(number)
    assert len(list(stream)) == len(learn.source) - 1
    learn.close()
    assert not loader.is_running()
    assert len(list(learn.source.stream(1))) == len(learn.source)   # it can begin again
    learn.close()


def forked(f, *args) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        f(*args)
    finally:
        os._exit(7)


def exit_code(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize('number', [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_no_longer_answers_ends_the_others(number, capfd):
    other = psutil.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    pid = forked(watch, {1: psutil.Process(other.pid)}, 1, guard._leave, threading.Event())
    time.sleep(1.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)   # it answers: nothing happens
    other.send_signal(number)
    assert exit_code(pid) == 2
    assert other.wait(10) == -signal.SIGKILL
    assert 'process 1' in capfd.readouterr().err


LAUNCHER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from kronos_nb.training import guard
if os.fork() == 0:
    guard.follow_launcher()
    open({mark!r}, 'w').write(str(os.getpid()))
    time.sleep(60)
time.sleep(60)
"""


@pytest.mark.parametrize('behind', [False, True], ids=['launcher', 'the command behind the launcher'])
def test_processes_end_with_their_launcher(tmp_path, monkeypatch, behind):
    mark = tmp_path/'pid'
    command = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    monkeypatch.setenv(guard.LAUNCHER, str(command.pid))
    code = LAUNCHER.format(root=os.getcwd(), mark=str(mark))
    launcher = subprocess.Popen([sys.executable, '-c', code])
    ends = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < ends
        time.sleep(.05)
    rank = psutil.Process(int(mark.read_text()))
    gone = command if behind else launcher
    gone.kill()
    gone.wait()
    ends = time.monotonic() + 30
    while answers(rank):   # it asks itself to stop, and outside of a fit that ends it
        assert time.monotonic() < ends
        time.sleep(.1)
    for p in (command, launcher):
        p.kill()
        p.wait()
