"What a bar says where nothing can be drawn over, and how a run of several stages tells its end"
import io

import pytest

from kronos_nb import display
from kronos_nb.display import RunProgress, current_run, progress_bar, progress_of_run
from kronos_nb.train import fit
from tests.helpers import cfg


@pytest.fixture
def now(monkeypatch):
    "Return a clock that a test moves by hand"
    class Clock:
        at = 1000.
        def monotonic(self):
            return self.at
    clock = Clock()
    monkeypatch.setattr(display, 'time', clock)
    return clock


def test_plain_lines_come_every_ten_seconds_and_not_before(now):
    out = io.StringIO()
    with progress_bar(100, 'work', 'item', stream=out) as bar:
        for _ in range(35):
            now.at += 1
            bar.update()
    lines = out.getvalue().splitlines()
    assert [line.split(',')[0] for line in lines] == ['work item 10/100', 'work item 20/100', 'work item 30/100']
    assert not {'\r', '\x1b'} & set(out.getvalue())


def test_bars_of_a_run_share_the_ten_seconds(now):
    out = io.StringIO()
    with progress_of_run(dict(a=1, b=1)) as run:
        for stage in ('a', 'b'):
            run.begin(stage)
            with progress_bar(6, None, 'step', stream=out) as bar:
                for _ in range(6):
                    now.at += 1
                    bar.update()
    assert out.getvalue().splitlines() == ['[2/2 b] step 4/6, 0:04 spent']
    assert current_run() is None


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    out = Terminal()
    with progress_bar(3, 'work', stream=out, leave=True) as bar:
        bar.update(3)
    assert '\r' in out.getvalue()


def test_nothing_shown_is_silent(capfd):
    with progress_bar(3, 'work', show=False) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ''


def test_the_estimate_is_right_where_costs_are():
    "Three stages at a steady pace of one unit of cost a second: whatever was done, the rest is left"
    run = RunProgress(dict(a=30, b=60, c=10), after=20)
    run.begin('a')
    assert run.left(.1, .9, 3) is None
    assert run.left(.5, .5, 15) == pytest.approx(105)
    run.end(1, 30)
    run.begin('b')
    assert run.left(.25, .75, 15) == pytest.approx(75)
    run.end(.5, 30)   # stopped early
    run.begin('c')
    assert run.left(.5, .5, 5) == pytest.approx(25)


def test_a_slower_stage_corrects_the_estimate():
    run = RunProgress(dict(a=10, b=10))
    run.begin('a')
    assert run.left(.5, .5, 50) == pytest.approx(150)


def test_a_fit_names_its_stages(monkeypatch, tmp_path):
    "Count the stages of the base and of the run together"
    seen, begin = [], RunProgress.begin

    def note(self, stage):
        seen.append((stage, list(self.costs)))
        begin(self, stage)
    monkeypatch.setattr(RunProgress, 'begin', note)
    small = {'tokenizer.epochs': 1, 'predictor.epochs': 1, 'base.tokenizer_epochs': 1, 'base.predictor_epochs': 1,
             'evaluate.calibrate': 'off', 'data.windows_per_epoch': 32, 'base.windows_per_epoch': 32}
    c = cfg.replace(**small, **{'runtime.progress': True, 'base.symbols': ('IBM',)})
    fit('sample', c.replace(**{'data.symbols': ('GOOG',)}), tmp_path/'run', judge=False)
    stages = ['base tokenizer', 'base predictor', 'tokenizer', 'predictor']
    assert [stage for stage, _ in seen] == stages
    assert all(costs == stages for _, costs in seen)
