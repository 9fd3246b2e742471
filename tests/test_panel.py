"Panels in the kernel: values, clicks, errors that show, a run that is found again, and nothing left behind"
import html, sys, threading
import nbformat, pytest
from nbclient import NotebookClient
pytest.importorskip('ipywidgets')
from kronos_nb.config import PRESETS, Config
from kronos_nb.core import ConfigError
from kronos_nb.learner import Callback
from kronos_nb.panel import ConfigPanel, DataPanel, FitJob, Studio, TrainPanel, widget_tree

little = Config.preset('quickstart', **{'base.symbols': None, 'data.windows_per_epoch': 64, 'data.val_windows': 32, 'tokenizer.epochs': 2, 'predictor.epochs': 1, 'tokenizer.batch_size': 16, 'predictor.batch_size': 16,
    'data.test': 0., 'data.val': .3, 'evaluate.calibrate': 'off', 'runtime.plots': False, 'runtime.progress': False, 'tokenizer.average_last': 1, 'predictor.average_last': 1})

@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_goes_through_the_controls_unchanged(preset):
    p = ConfigPanel(preset)
    p.open()
    p.changed()
    assert not p.wrong and p.config == Config.preset(preset)
    p.close()

def test_wrong_value_stays_where_it_was_typed_and_is_refused():
    p = ConfigPanel('quickstart')
    p.open()
    beta = p.views['predictor.beta1']
    beta.control.value = '2'
    assert 'must be in' in beta.note.value and list(p.wrong) == ['predictor.beta1'] and 'knb-changed' in beta.control._dom_classes
    with pytest.raises(ConfigError, match='beta1'): p.config
    beta.control.value = '0.9'
    assert p.config == Config.preset('quickstart') and 'knb-changed' not in beta.control._dom_classes
    p.close()

def test_estimate_follows_a_slider():
    p = ConfigPanel('quickstart')
    p.open()
    p.measured.value = False
    before = p.cost.value
    p.views['predictor.epochs'].slider.value = 8
    assert p.config.predictor.epochs == 8 and p.cost.value != before
    p.close()

class Slow(Callback):
    def __init__(self): self.step = threading.Event()
    def after_step(self, learn): self.step.set()

def test_pause_holds_the_run_and_a_second_panel_finds_it(tmp_path):
    p = TrainPanel('sample', little, tmp_path/'run')
    p.open()
    start, pause, stop = p.buttons
    slow = Slow()
    p.listen(FitJob('sample', little, tmp_path/'run', callbacks=[slow], every=0))
    p.job.start()
    assert slow.step.wait(300)
    pause.click()
    at = p.job.learn.step if p.job.learn else None
    assert p.job.state == 'paused' and pause.description == 'Go on'
    threading.Event().wait(.5)
    assert p.job.learn is None or p.job.learn.step <= at + 1
    again = TrainPanel('sample', little, tmp_path/'run')
    assert again.job is p.job
    pause.click(); stop.click()
    result = p.job.wait(300)
    assert result.interrupted and start.description == 'Continue'
    start.click()
    assert not p.job.wait(300).interrupted and p.bar.value == 1. and not FitJob.running
    p.close()

def test_an_error_shows_in_the_panel(tmp_path):
    p = TrainPanel('nowhere.csv', little, tmp_path/'run')
    p.open()
    p.buttons[0].click()
    p.job.thread.join(300)
    assert p.job.state == 'failed' and 'no file of bars at' in html.unescape(p.said.value)
    p.close()

def test_close_closes_every_widget():
    p = Studio()
    made = widget_tree(p.open())
    p.close()
    assert len(made) > 100 and all(w.comm is None for w in made)

def test_opened_twenty_times_in_one_cell_leaves_no_growth():
    cell = "from kronos_nb.panel import ConfigPanel, DataPanel\nimport matplotlib.pyplot as plt, threading\nfrom ipywidgets.widgets import widget as m\ndisplay(ConfigPanel('quickstart'), DataPanel('sample', folders=()))\nprint(len(getattr(m, '_instances', None) or m.Widget.widgets), plt.get_fignums(), threading.active_count())"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    client, said = NotebookClient(nb, timeout=400), []
    with client.setup_kernel():
        for _ in range(20):
            client.execute_cell(nb.cells[0], 0)
            said.append(''.join(o.text for o in nb.cells[0].outputs if o.output_type == 'stream' and o.name == 'stdout'))
    assert said[1] == said[-1], (said[1], said[-1])

@pytest.fixture
def no_widgets(monkeypatch):
    for m in [m for m in sys.modules if m.partition('.')[0] == 'ipywidgets']: monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)   # import ipywidgets: ModuleNotFoundError

def test_without_widgets_every_panel_is_text_and_can_be_used(no_widgets, tmp_path, capsys):
    with pytest.raises(ImportError): import ipywidgets
    s = Studio('sample', little, tmp_path/'run')
    s.settings.set(**{'predictor.lr': 1e-3})
    s.bars.asked |= dict(symbols=('GOOG',))
    s.train.start()
    assert s.train.job.wait(300) is s.train.current()
    s.forecast.asked |= dict(paths=5)
    assert s.forecast.predict().paths.shape[0] == 5
    s.runs.ticked = [str(tmp_path/'run')]
    for p in (*s.panels.values(), s): p._ipython_display_()
    said = capsys.readouterr().out
    for part in ('predictor.lr', '# as YAML', 'steps, ', 'GOOG', 'usable', 'finished', 'loss', 'Forecaster.from_pretrained', f'[x] {tmp_path/"run"}', 'panel.set(', 'panel.start()', 'panel.predict()', 'panel.compare()', 'panel.read()'): assert part in said, part
    s.close()

def test_without_widgets_an_error_is_text_too(no_widgets, capsys):
    DataPanel('nowhere.csv')._ipython_display_()
    assert 'no file of bars at' in capsys.readouterr().out

def test_outside_of_a_notebook_a_panel_is_text_even_where_widgets_are_installed(capsys):
    p = ConfigPanel('quickstart')
    p._ipython_display_()
    assert 'nothing is changed' in capsys.readouterr().out and p.widget is None

def test_a_panel_holds_what_the_functions_give(tmp_path):
    "The code that a panel shows, run as a script, gives the same numbers"
    p = DataPanel('sample', little, folders=())
    p.open()
    p.views['symbols'].value = 'IBM'
    names = {}
    exec(p.code, names)
    assert names['bars'].equals(p.bars) and list(names['bars'].symbol.unique()) == ['IBM']
    p.close()
    t = TrainPanel('sample', little, tmp_path/'by_panel')
    t.start(); t.job.wait(300)
    names = {}
    exec(t.code.replace(str(tmp_path/'by_panel'), str(tmp_path/'by_code')), names)
    assert names['result'].history.val_loss.equals(t.current().history.val_loss)
