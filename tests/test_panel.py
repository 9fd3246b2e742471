"Panels in the kernel: values, clicks, errors that show, a run that is found again, and nothing left behind"
import asyncio
import html
import importlib
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytest.importorskip('ipywidgets')
from kronos_nb.app import serve_studio, server_args, studio_notebook
from kronos_nb.cli import main
from kronos_nb.config import PRESETS, Config
from kronos_nb.core import ConfigError, DataError, RunError
from kronos_nb.data.read import sample_klines
from kronos_nb.panel import ConfigPanel, DataPanel, FitJob, ForecastPanel, RunsPanel, Studio, TrainPanel
from kronos_nb.panel.base import AT_WORK, Later, widget_tree
from kronos_nb.panel.data import save_upload
from kronos_nb.settings import Sampling
from kronos_nb.training.learner import Callback
from kronos_nb.training.run import Run

SMALL = Config.preset('quickstart', **{
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.windows_per_epoch': 64, 'data.val_windows': 32, 'data.test': 0., 'data.val': .3,
    'tokenizer.epochs': 2, 'tokenizer.batch_size': 16, 'tokenizer.average_last': 1,
    'predictor.epochs': 1, 'predictor.batch_size': 16, 'predictor.average_last': 1,
    'evaluate.calibrate': 'off', 'runtime.plots': False, 'runtime.progress': False})
MODULES = ['base', 'config', 'data', 'forecast', 'runs', 'studio', 'train']


@pytest.fixture
def opened():
    "Return a function that opens a panel; it is closed after the test"
    panels = []
    def open_panel(panel):
        panels.append(panel)
        panel.open()
        return panel
    yield open_panel
    for panel in panels:
        panel.close()


@pytest.mark.parametrize('name', MODULES)
def test_no_public_name_is_none(name):
    "`@patch` binds a method's name to None in the module"
    module = importlib.import_module(f'kronos_nb.panel.{name}')
    assert not [k for k, v in vars(module).items() if v is None and not k.startswith('_')]


# settings
@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_passes_the_controls_unchanged(preset, opened):
    panel = opened(ConfigPanel(preset))
    panel._read_controls()
    assert not panel.errors
    assert panel.config == Config.preset(preset)


def test_a_wrong_value_stays_where_it_was_typed_and_is_refused(opened):
    panel = opened(ConfigPanel('quickstart'))
    beta = panel.rows['predictor.beta1']
    beta.control.value = '2'
    assert list(panel.errors) == ['predictor.beta1']
    assert 'predictor.beta1' in beta.note.value
    assert 'knb-changed' in beta.control._dom_classes
    with pytest.raises(ConfigError, match='predictor.beta1'):
        panel.config
    beta.control.value = '0.9'
    assert panel.config == Config.preset('quickstart')
    assert 'knb-changed' not in beta.control._dom_classes


def test_the_estimate_follows_a_slider(opened):
    panel = opened(ConfigPanel('quickstart'))
    before = panel.cost.value
    panel.rows['predictor.epochs'].slider.value = 8
    assert panel.config.predictor.epochs == 8
    assert panel.cost.value != before


def test_the_choice_of_bars_becomes_settings(opened):
    for show in (opened, lambda panel: panel):
        studio = show(Studio())
        studio.bars.set(symbols='IBM', start='2010-01-01')
        data = studio.settings.config.data
        assert (data.symbols, data.start) == (('IBM',), '2010-01-01')
        studio.bars.set(source=sample_klines('IBM'))
        assert studio.settings.config.base.symbols is None


# bars of one's own
@pytest.fixture
def doge(tmp_path):
    file = tmp_path/'doge 1h.csv'
    sample_klines('DOGEUSDT').to_csv(file, index=False)
    return file


def shown(panel):
    "Return all HTML of a panel"
    return '\n'.join(w.value for w in widget_tree(panel.widget) if type(w).__name__ == 'HTML')


def test_another_source_starts_again_and_takes_nothing_of_the_old_bars_with_it(opened, doge):
    studio = opened(Studio())
    studio.bars.set(start='2010-01-01', repair='standard')
    studio.settings.set(**{'predictor.lr': 2e-3, 'data.lookback_window': 30})
    assert studio.bars.chart.layout.display == ''
    studio.bars.controls['path'].value = str(doge)
    cfg = studio.settings.config
    assert (cfg.data.symbols, cfg.data.start, cfg.base.symbols) == (None, None, None)
    assert studio.settings.preset == 'own'
    assert cfg.data.lookback_window != 30
    assert cfg.predictor.lr == 2e-3
    assert studio.bars.bars.symbol.nunique() == 1
    studio.forecast.refresh()
    assert studio.forecast.controls['symbol'].options == tuple(studio.bars.bars.symbol.unique())


def test_a_source_that_cannot_be_read_leaves_no_old_picture(opened):
    panel = opened(DataPanel('sample', SMALL, folders=()))
    panel.controls['path'].value = 'nowhere.csv'
    assert panel.chart.layout.display == 'none'
    assert not panel.report.value
    assert 'nowhere.csv' in panel.error.value


def test_a_file_of_ones_own_needs_no_preset(opened, doge):
    studio = opened(Studio(str(doge)))
    assert not studio.bars.error.value
    assert studio.settings.config.data.symbols is None
    assert studio.train.out_dir.startswith('runs/doge')
    assert studio.settings.preset == 'own'


CSV = sample_klines('DOGEUSDT').head(100).to_csv(index=False).encode()


@pytest.mark.parametrize('name', ['../../evil.csv', '..\\..\\evil.csv', '/etc/evil.csv', '.evil.csv', 'C:evil.csv'])
def test_an_upload_stays_in_its_folder(tmp_path, name):
    kept = save_upload(name, CSV, tmp_path/'uploads')
    assert kept.parent == tmp_path/'uploads'
    assert [p.name for p in tmp_path.iterdir()] == ['uploads']
    assert not kept.name.startswith('.')


@pytest.mark.parametrize(('name', 'content'), [
    ('evil.sh', CSV), ('evil', CSV), ('', CSV), ('.csv', CSV), ('a.csv', b''), ('a.csv', b'\x00\x01'),
    ('a.zip', b'PK\x03\x04'), ('a.parquet', CSV), ('a.csv', b'timestamps,open,high,low,close,volume\n')])
def test_an_upload_that_is_no_bars_leaves_nothing(tmp_path, name, content):
    with pytest.raises(DataError):
        save_upload(name, content, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_upload_replaces_nothing(tmp_path):
    first = save_upload('a.csv', CSV, tmp_path)
    other = save_upload('a.csv', CSV[:-80], tmp_path)
    assert (first.read_bytes(), other.read_bytes()) == (CSV, CSV[:-80])
    assert save_upload('a.csv', CSV, tmp_path) == first


EVIL = '<img src=x onerror=alert(1)>'


def test_text_from_data_is_shown_and_does_nothing(opened, tmp_path):
    studio = opened(Studio(sample_klines('DOGEUSDT').assign(symbol=EVIL)))
    studio.bars.uploads = tmp_path
    studio.forecast.refresh()
    for name in (f'{EVIL}.csv', f'{EVIL}.exe'):
        try:
            studio.bars.take_file(name, CSV)
        except DataError as e:
            studio.bars.controls['path'].value = str(e)
    studio.bars.controls['symbols'].value = EVIL
    studio.settings.rows['data.tz'].control.value = EVIL
    text = shown(studio)
    assert '<img' not in text
    assert html.escape(EVIL) in text


# answers
def test_many_changes_ask_for_one_picture():
    calls = []
    async def change():
        later = Later(lambda: calls.append(1), pause=.05)
        for _ in range(10):
            later.ask()
            await asyncio.sleep(.001)
        assert not calls
        await asyncio.sleep(.2)
    asyncio.run(change())
    assert calls == [1]


def test_an_edit_is_answered_within_half_a_second_of_work(opened, tmp_path):
    bars = sample_klines('DOGEUSDT')
    many = bars.loc[bars.index.repeat(80)].reset_index(drop=True)
    many['timestamps'] = many.timestamps.iloc[0] + many.index*(bars.timestamps.iloc[1] - bars.timestamps.iloc[0])
    many.to_csv(tmp_path/'many.csv', index=False)
    studio = opened(Studio(str(tmp_path/'many.csv')))
    rows, times = studio.settings.rows, []
    for path, value in {'predictor.lr': '1e-4', 'predictor.epochs': '3', 'data.lookback_window': '50'}.items():
        began = time.process_time()
        rows[path].control.value = value
        times.append(time.process_time() - began)
        assert not studio.settings.errors
    assert max(times) < .5


# training
class FirstStep(Callback):
    "Tell when the first step is done"
    def __init__(self):
        self.done = threading.Event()

    def after_step(self, learn):
        self.done.set()


def test_pause_holds_the_run_and_a_second_panel_finds_it(tmp_path, opened):
    panel = opened(TrainPanel('sample', SMALL, tmp_path/'run'))
    start, pause, stop = panel.buttons.values()
    first = FirstStep()
    panel.follow(FitJob('sample', SMALL, tmp_path/'run', callbacks=[first], every=0))
    panel.job.start()
    assert first.done.wait(300)
    pause.click()
    step = panel.job.learn.step if panel.job.learn else None
    assert (panel.job.state, pause.description) == ('paused', 'Resume')
    threading.Event().wait(.5)
    assert panel.job.learn is None or panel.job.learn.step <= step + 1
    assert TrainPanel('sample', SMALL, tmp_path/'run').job is panel.job
    pause.click()
    stop.click()
    assert panel.job.wait(300).interrupted
    assert start.description == 'Continue training'
    start.click()
    assert not panel.job.wait(300).interrupted
    assert panel.bar.value == 1.
    assert not FitJob.active


LEAVE = """
import sys, threading
import kronos_nb.panel.train as train
from kronos_nb.config import Config
train._LAST_SECONDS = 60
seen = threading.Event()
job = train.FitJob('sample', Config.load(sys.argv[1]), sys.argv[2], every=0)
job.listeners.append(lambda job: job.learn is not None and job.learn.step >= 3 and seen.set())
job.start()
seen.wait(300)
"""


def test_a_kernel_that_ends_stops_its_run_with_a_checkpoint(tmp_path):
    SMALL.save(tmp_path/'small.yaml')
    command = [sys.executable, '-c', LEAVE, str(tmp_path/'small.yaml'), str(tmp_path/'run')]
    subprocess.run(command, check=True, timeout=300)
    run = Run(tmp_path/'run')
    assert run.state == 'interrupted'
    assert list(run.stage('tokenizer').checkpoints.iterdir())


def test_nothing_is_measured_beside_a_run(opened, monkeypatch):
    panel = opened(ConfigPanel('quickstart'))
    monkeypatch.setitem(AT_WORK, 'runs/a', None)
    with pytest.raises(RunError, match='runs/a'):
        panel.measure()
    panel.measuring.click()
    assert 'runs/a' in panel.error.value
    assert not panel.measuring.disabled


def test_a_run_with_other_settings_goes_into_another_folder(tmp_path, opened, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(TrainPanel('sample', SMALL).out_dir)
    folder.mkdir(parents=True)
    SMALL.save(folder/'config.yaml')
    assert TrainPanel('sample', SMALL.replace(**{'runtime.threads': 2})).out_dir == str(folder)
    assert TrainPanel('sample', SMALL.replace(**{'predictor.lr': 2e-3})).out_dir == f'{folder}-2'
    assert opened(TrainPanel('sample', SMALL)).buttons['start'].description == 'Continue training'


def test_an_error_shows_in_the_panel(tmp_path, opened):
    panel = opened(TrainPanel('nowhere.csv', SMALL, tmp_path/'run'))
    panel.buttons['start'].click()
    panel.job.thread.join(300)
    assert panel.job.state == 'failed'
    assert 'nowhere.csv' in html.unescape(panel.error.value)


# what a panel shows is what the functions give
def test_the_code_of_the_data_panel_reads_the_same_bars(opened):
    panel = opened(DataPanel('sample', SMALL, folders=()))
    panel.controls['symbols'].value = 'IBM'
    panel.controls['start'].value = '2010-01-01'
    names = {}
    exec(panel.code, names)
    assert names['bars'].equals(panel.bars)
    assert list(names['bars'].symbol.unique()) == ['IBM']
    assert names['bars'].timestamps.min().year == 2010


def test_the_code_of_the_training_panel_trains_the_same_model(tmp_path):
    panel = TrainPanel('sample', SMALL, tmp_path/'by_panel')
    panel.start()
    panel.job.wait(300)
    names = {}
    exec(panel.code.replace(str(tmp_path/'by_panel'), str(tmp_path/'by_code')), names)
    assert names['result'].history.val_loss.equals(panel.value.history.val_loss)


def test_the_code_of_the_forecast_panel_draws_the_same_paths(quickstart, opened):
    bars = sample_klines(['GOOG', 'IBM'])
    panel = opened(ForecastPanel(quickstart, bars, paths=20, temperature=.9))
    panel.controls['origin'].value = 300
    panel.button.click()
    names = dict(bars=bars)
    exec(panel.code, names)
    assert (panel.forecast.symbol, panel.forecast.paths.shape) == ('GOOG', (20, 10, 6))
    assert (names['forecast'].paths == panel.forecast.paths).all()


def test_a_forecast_begins_at_the_end_and_a_replay_before_it(quickstart, opened):
    panel = opened(ForecastPanel(quickstart, 'sample', paths=20))
    n = len(sample_klines('GOOG'))
    assert panel.controls['origin'].value == n
    assert panel.button.description == 'Forecast the next 10 bars'
    panel.button.click()
    assert not len(panel.actual)
    assert panel.forecast.timestamps[0] > sample_klines('GOOG').timestamps.iloc[-1]
    panel.replay.click()
    assert panel.controls['origin'].value == n - 10
    assert list(panel.forecast.timestamps) == list(panel.actual.timestamps)
    panel.controls['origin'].value = n
    assert panel.origin is None


def test_a_model_is_chosen_from_runs_and_released_ones(quickstart, opened):
    panel = opened(ForecastPanel(TrainPanel('sample', SMALL), 'sample', runs=quickstart.parent))
    panel.button.click()
    assert 'AAPL, IBM, MSFT' in panel.said.value   # no finished run: the small base that ships
    panel.refresh()
    assert 'of the paths end higher' in panel.said.value   # as long as its picture is there
    offered = panel.controls['model'].options
    assert str(quickstart) in offered
    assert any(label.startswith('Kronos-small') for label in offered)
    panel.controls['model'].value = str(quickstart)
    panel.controls['paths'].value = 20
    panel.button.click()
    assert panel.forecast.paths.shape == (20, 10, 6)
    panel.controls['model'].value = next(label for label in offered if label.startswith('Kronos-small'))
    assert panel.chart.layout.display == 'none'
    assert "from_pretrained('NeoQuasar/Kronos-small')" in panel.code


def test_the_runs_panel_names_an_average_after_its_method(quickstart, tmp_path):
    for name in ('a', 'b'):
        shutil.copytree(quickstart, tmp_path/name)
    panel = RunsPanel(tmp_path, 'sample')
    panel.selected = [str(tmp_path/'a'), str(tmp_path/'b')]
    assert [panel.average('mean').folder.name for _ in range(2)] == ['mean_1', 'mean_2']
    assert 'mean_2' in panel.code
    assert len(panel.compare().losses) >= 2


# nothing is left behind
def test_close_closes_every_widget():
    studio = Studio()
    widgets = widget_tree(studio.open())
    studio.close()
    assert len(widgets) > 100
    assert all(w.comm is None for w in widgets)


CELL = """
from kronos_nb.panel import ConfigPanel, DataPanel
import matplotlib.pyplot as plt, threading
from ipywidgets.widgets import widget as m
display(ConfigPanel('quickstart'), DataPanel('sample', folders=()))
ours = [t for t in threading.enumerate() if not type(t).__module__.startswith('zmq.')]   # its collector begins late
print(len(getattr(m, '_instances', None) or m.Widget.widgets), plt.get_fignums(), len(ours))
"""


def test_a_cell_that_runs_twenty_times_leaves_no_growth():
    kernel = dict(name='python3', display_name='python3', language='python')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=dict(kernelspec=kernel))
    client, counts = NotebookClient(nb, timeout=400), []
    with client.setup_kernel():
        for _ in range(20):
            client.execute_cell(nb.cells[0], 0)
            outputs = [o for o in nb.cells[0].outputs if o.output_type == 'stream' and o.name == 'stdout']
            counts.append(''.join(o.text for o in outputs))
    assert counts[1] == counts[-1]


# a page of its own
def test_the_page_opens_the_studio_in_the_folder_of_the_command(tmp_path):
    cell = studio_notebook(["my 'own'.csv"], None, 'runs/x', tmp_path)['cells'][0]['source']
    compile(cell, 'cell', 'exec')
    assert f'os.chdir({str(tmp_path)!r})' in cell
    assert """kn.Studio(["my 'own'.csv"], None, 'runs/x')""" in cell


def test_the_server_listens_on_this_machine_and_asks_for_a_token(tmp_path):
    args = server_args(tmp_path/'studio.ipynb')
    assert '--Voila.ip=127.0.0.1' in args
    assert '--token' in args
    assert f'--Voila.config_file_paths={tmp_path}' in args


def test_a_studio_without_its_file_or_without_voila_is_an_error(monkeypatch, capsys):
    assert main(['studio', 'nowhere.csv', '--no-browser']) == 2
    assert 'nowhere.csv' in capsys.readouterr().err
    assert main(['studio', '--preset', 'ownn', '--no-browser']) == 2
    assert '--preset' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'voila.app', None)
    with pytest.raises(ConfigError, match=r'kronos_nb\[studio\]'):
        serve_studio(browser=False)


# without widgets
@pytest.fixture
def no_widgets(monkeypatch):
    for name in [m for m in sys.modules if m.partition('.')[0] == 'ipywidgets']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)   # import ipywidgets: ModuleNotFoundError


SHOWN = """predictor.lr|# as YAML|steps, |GOOG|usable|finished|loss|Forecaster.from_pretrained|panel.set(|panel.start()
panel.predict()|panel.compare()|panel.read()""".replace('\n', '|').split('|')


def test_without_widgets_every_panel_is_text_and_can_be_used(no_widgets, tmp_path, capsys):
    with pytest.raises(ImportError):
        import ipywidgets  # noqa: F401
    studio = Studio('sample', SMALL, tmp_path/'run')
    studio.settings.set(**{'predictor.lr': 1e-3})
    studio.bars.set(symbols=('GOOG',))
    studio.train.start()
    assert studio.train.job.wait(300) is studio.train.value
    studio.forecast.sampling = Sampling(paths=5)
    assert studio.forecast.predict().paths.shape[0] == 5
    studio.runs.selected = [str(tmp_path/'run')]
    for panel in (*studio.panels.values(), studio):
        panel._ipython_display_()
    text = capsys.readouterr().out
    assert not [part for part in [*SHOWN, f'[x] {tmp_path/"run"}'] if part not in text]
    studio.close()


def test_without_widgets_an_error_is_text_too(no_widgets, capsys):
    DataPanel('nowhere.csv')._ipython_display_()
    assert 'nowhere.csv' in capsys.readouterr().out


def test_outside_of_a_notebook_a_panel_is_text_even_where_widgets_are_installed(capsys):
    panel = ConfigPanel('quickstart')
    panel._ipython_display_()
    assert 'no changes' in capsys.readouterr().out
    assert panel.widget is None
