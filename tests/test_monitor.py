"Files of a run, in the cases that teach nothing: second fits, short logs, steps between rows"

import copy, importlib.util, io, json, os, subprocess, sys, time
import pytest, torch
from torch import nn
from kronos_nb.training.monitor import (
    GradNorm,
    LivePlot,
    LossPlot,
    Progress,
    RunFiles,
    Throughput,
    Tracker,
    UpdateRatio,
)
from kronos_nb.training.run import RunStage
from kronos_nb.follow import monitor_run, snapshot
from kronos_nb.training.learner import Callback, Learner, TensorSource
from kronos_nb.training.diagnose import diagnose
from kronos_nb.training.history import read_lines


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return dict(loss=((x * self.w + self.b - y) ** 2).mean())


x = torch.randn(100, generator=torch.Generator().manual_seed(0))
data = dict(x=x, y=3 * x + 1)


def line(*callbacks, **kw):
    task = Line()
    return Learner(
        task,
        TensorSource(data, 16, seed=0),
        TensorSource(data, 50),
        torch.optim.SGD(task.parameters(), lr=0.1),
        callbacks=callbacks,
        **kw,
    )


class At(Callback):
    "Keep the state after `keep` steps, raise after `die`"

    def __init__(self, keep=None, die=None, order=0):
        self.keep, self.die, self.order = keep, die, order

    def after_step(self, learn):
        if learn.step == self.keep:
            self.state = copy.deepcopy(learn.state_dict())
        if learn.step == self.die:
            raise KeyboardInterrupt


def test_second_fit_appends(tmp_path):
    learn = line(RunFiles(tmp_path, 'predictor')).fit(1)
    learn.fit(2)
    log = (tmp_path / 'logs/predictor.log').read_text()
    assert log.count('[Epoch 1/1, Step 1/7]') == 1 and log.count('[Epoch 2/2, Step 7/7] LR') == 1
    assert RunStage(tmp_path / 'predictor').history.steps == learn.history.steps


def test_new_run_in_an_old_folder_starts_anew(tmp_path):
    line(RunFiles(tmp_path, 'predictor')).fit(2)
    line(RunFiles(tmp_path, 'predictor')).fit(1)
    assert [o['step'] for o in read_lines(tmp_path / 'predictor/steps.jsonl')] == list(range(1, 8))
    assert (tmp_path / 'logs/predictor.log').read_text().count('start') == 1


@pytest.mark.parametrize('order', [0, 200])  # before and after the files have the row
@pytest.mark.parametrize('log_every', [1, 3])
def test_resume_leaves_no_row_twice(tmp_path, order, log_every):
    keep = At(keep=10, die=13, order=order)
    with pytest.raises(KeyboardInterrupt):
        line(keep, RunFiles(tmp_path, 'tokenizer'), log_every=log_every).fit(3)
    assert json.loads((tmp_path / 'tokenizer/status.json').read_text())['state'] == 'interrupted'
    learn = line(RunFiles(tmp_path, 'tokenizer'), log_every=log_every)
    learn.load_state_dict(keep.state)
    learn.fit(3)
    whole = line(log_every=log_every).fit(3)
    h = RunStage(tmp_path / 'tokenizer').history
    assert h.to_dict() == whole.history.to_dict()
    lines = [o for o in (tmp_path / 'logs/tokenizer.log').read_text().splitlines() if 'LR' in o]
    assert len(lines) == len(set(lines)) == len(whole.history.steps)


def test_log_that_was_deleted_begins_again(tmp_path):
    keep = At(keep=5)
    line(keep, RunFiles(tmp_path, 'tokenizer')).fit(1)
    (tmp_path / 'logs/tokenizer.log').unlink()
    learn = line(RunFiles(tmp_path, 'tokenizer'))
    learn.load_state_dict(keep.state)
    learn.fit(1)
    assert 'from step 5' in (tmp_path / 'logs/tokenizer.log').read_text().splitlines()[0]


class Kept:
    def __init__(self):
        self.rows = []

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        pass


@pytest.mark.parametrize(
    'make',
    [
        lambda d: Progress('silent'),
        lambda d: Progress('text', stream=open('/dev/null', 'w')),
        lambda d: RunFiles(d, 'tokenizer'),
        lambda d: LossPlot(d, 'tokenizer', every=7),
        lambda d: LivePlot(show=False),
        lambda d: GradNorm(),
        lambda d: UpdateRatio(3, True),
        lambda d: Throughput(),
        lambda d: Tracker(Kept()),
    ],
)
def test_each_callback_is_inert(make, tmp_path):
    bare, watched = line(log_every=3).fit(2), line(make(tmp_path), log_every=3).fit(2)
    assert all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), watched.model.parameters()))
    for k in ('steps', 'epochs', 'validations'):
        for a, b in zip(getattr(bare.history, k), getattr(watched.history, k)):
            assert a == {n: b[n] for n in a}


def test_update_ratio_leaves_no_hook_behind():
    learn = line(UpdateRatio(1)).fit(1)
    inner = getattr(learn.opt, 'optimizer', learn.opt)
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks

    class Boom(Callback):
        def after_step(self, learn):
            raise ValueError('boom')

    learn = line(UpdateRatio(1), Boom())
    with pytest.raises(ValueError):
        learn.fit(1)
    assert not getattr(learn.opt, 'optimizer', learn.opt)._optimizer_step_pre_hooks


@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='TensorBoard is optional')
def test_tensorboard_takes_a_whole_configuration(tmp_path):
    "Which holds lists, mappings and None"
    from kronos_nb.config import Config

    line(Tracker('tensorboard', tmp_path, 'predictor', Config.preset('doge').flat())).fit(1)


@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='TensorBoard is optional')
def test_tensorboard_forgets_what_a_resume_repeats(tmp_path):
    keep = At(keep=5, die=9)
    with pytest.raises(KeyboardInterrupt):
        line(keep, Tracker('tensorboard', tmp_path, 'predictor')).fit(2)
    learn = line(Tracker('tensorboard', tmp_path, 'predictor'))
    learn.load_state_dict(keep.state)
    learn.fit(2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / 'runs' / 'predictor')).Reload()
    assert [e.step for e in seen.Scalars('Training/Loss')] == list(range(1, 15)) and [
        e.step for e in seen.Scalars('Validation/Loss')
    ] == [7, 14]


CHILD = '''
import sys, time
sys.path.insert(0, {tests!r})
from test_monitor import Callback, RunFiles, line
class Slow(Callback):
    def after_step(self, learn): time.sleep(.02)
line(Slow(), RunFiles({out!r}, 'predictor', every=.1)).fit(1000)
'''


def test_a_killed_run_keeps_its_lines_and_is_called_killed(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', CHILD.format(tests=os.path.dirname(__file__), out=str(tmp_path))])
    try:
        for _ in range(600):
            if len(read_lines(tmp_path / 'predictor/steps.jsonl')) > 20:
                break
            time.sleep(0.1)
        assert snapshot(tmp_path)[1] and RunStage(tmp_path / 'predictor').status['state'] == 'running'
    finally:
        child.kill()
        child.wait()
    said = io.StringIO()
    assert monitor_run(tmp_path, stream=said) == 'killed' and 'Killed' in said.getvalue()
    steps = [o['step'] for o in RunStage(tmp_path / 'predictor').history.steps]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20


def test_a_half_written_status_or_line_is_no_error(tmp_path):
    line(RunFiles(tmp_path, 'predictor')).fit(1)
    with open(tmp_path / 'predictor/steps.jsonl', 'a') as f:
        f.write('{"step": 8, "epo')
    assert 'finished' in snapshot(tmp_path)[0] and RunStage(tmp_path / 'predictor').ended.startswith('Ended at step 7')


def test_base_and_both_stages_are_followed(tmp_path):
    for where, stage in (('base', 'tokenizer'), ('base', 'predictor'), ('.', 'tokenizer'), ('.', 'predictor')):
        line(RunFiles(tmp_path / where, stage)).fit(1)
    text, running = snapshot(tmp_path)
    assert not running and text.count('finished') == 4 and text.index('[base]') < text.rindex('predictor')


def test_any_tracker_that_accelerate_knows_is_started_by_name(monkeypatch, tmp_path):
    from accelerate import tracking
    from kronos_nb.training.monitor import check_tracker
    from kronos_nb.core import ConfigError

    here = {str(o) for o in tracking.get_available_trackers()}
    for name in tracking.LOGGER_TYPE_TO_CLASS:
        if name in here:
            assert check_tracker(name).name == name
        else:
            with pytest.raises(ConfigError, match=f'needs its package: pip install {name}'):
                check_tracker(name)
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        check_tracker('wandd')
    began = []

    def fake(name, folder):
        class Fake(Kept):
            requires_logging_directory = folder

            def __init__(self, *args, **kw):
                super().__init__()
                self.args, self.kw, self.started = args, kw, False
                began.append(self)

            def start(self):
                self.started = True

            def store_init_configuration(self, values):
                self.config = values

        return Fake

    for name, cls in tracking.LOGGER_TYPE_TO_CLASS.items():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, fake(name, cls.requires_logging_directory))
    monkeypatch.setattr(tracking, 'get_available_trackers', lambda: list(tracking.LOGGER_TYPE_TO_CLASS))
    for name, cls in list(tracking.LOGGER_TYPE_TO_CLASS.items()):
        line(
            Tracker(
                name, tmp_path, 'predictor', dict(lr=1.0), 'mine', **({} if name == 'tensorboard' else dict(tags=3))
            )
        ).fit(1)
        t = began[-1]
        assert (
            t.started
            and t.config == dict(lr=1.0)
            and t.args == (('predictor', str(tmp_path / 'runs')) if cls.requires_logging_directory else ('mine',))
            and len(t.rows) > 2
        )
        told = {k: v for k, v in t.kw.items() if k not in ('run_name', 'name')}
        assert told == ({} if name == 'tensorboard' else dict(tags=3))


def test_skipped_updates_are_diagnosed():
    "One skipped update is named with its step; a history with other notes alone is not accused"
    from kronos_nb.training.history import History

    other = dict(epoch=1, step=2, kind='machine', text='update skipped')
    found = diagnose(History(notes=[other, dict(epoch=1, step=7, kind='update_skipped', text='loss inf')]))
    assert (
        found.kinds[0] == 'loss_not_finite'
        and '1 updates' in found.findings[0].text
        and 'step 7' in found.findings[0].text
    )
    assert 'loss_not_finite' not in diagnose(History(notes=[other])).kinds


def test_a_gpu_that_tells_nothing_about_itself_is_no_reason_to_stop(monkeypatch):
    "pynvml without its library, and then no nvidia-smi either"
    import subprocess
    from kronos_nb.training.monitor import gpu_use

    def fails(e):
        def f(*a, **k):
            raise e

        return f

    monkeypatch.setattr(torch.cuda, 'utilization', fails(RuntimeError('NVML shared library not found')))
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout='37\n12\n'))
    assert (gpu_use(torch.device('cuda:1')), gpu_use(torch.device('cuda')), gpu_use(torch.device('cpu'))) == (
        12.0,
        37.0,
        None,
    )
    monkeypatch.setattr(subprocess, 'run', fails(FileNotFoundError('nvidia-smi')))
    assert gpu_use(torch.device('cuda')) is None


def test_a_stage_that_has_not_said_anything_yet_is_waited_for(tmp_path, monkeypatch):
    "Its folder is there before its first status"
    (tmp_path / 'predictor').mkdir()
    (tmp_path / 'predictor' / 'steps.jsonl').write_text(
        json.dumps(dict(epoch=1, epoch_step=1, step=1, loss=2.0)) + '\n'
    )
    status = dict(
        stage='predictor',
        state='finished',
        why=None,
        epoch=1,
        epochs=1,
        step=1,
        total_steps=1,
        steps_per_epoch=1,
        first_step=0,
        began=0.0,
        updated=0.0,
        every=5,
        pid=1,
        host='elsewhere',
    )
    clock, naps = [0.0], []

    def nap(s):
        naps.append(s)
        clock[0] += s
        if len(naps) == 2 and wanted:
            (tmp_path / 'predictor' / 'status.json').write_text(json.dumps(status))

    monkeypatch.setattr(
        'kronos_nb.follow.time',
        type('Clock', (), dict(monotonic=staticmethod(lambda: clock[0]), sleep=staticmethod(nap))),
    )
    wanted = False
    assert monitor_run(tmp_path, every=10.0, wait=30.0, stream=io.StringIO()) == 'unknown' and sum(naps) >= 30
    clock[0], naps, wanted = 0.0, [], True
    assert monitor_run(tmp_path, every=1.0, wait=30.0, stream=io.StringIO()) == 'finished' and len(naps) == 2
