"The studio forecasts with the run that is there, not with the toy"
from kronos_nb.forecast import Forecaster
from kronos_nb.panel import Studio
from kronos_nb.training.run import Run


def test_a_finished_run_forecasts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    studio = Studio('sample', 'quickstart', 'runs/own')
    panel = studio.forecast
    panel._take()
    assert panel.seen[0] == 'bundled'
    folder = Forecaster.from_pretrained('bundled').save_pretrained(studio.train.out_dir)
    monkeypatch.setattr(Run, 'finished', True)
    studio.open()
    panel.refresh()
    assert panel.seen[0] == str(folder) and str(folder) in panel.origin_note.value and str(folder) in panel.code
    loaded = panel._loaded()
    panel.refresh()
    assert panel._loaded() is loaded   # loaded once
    panel.use('bundled')
    panel.refresh()
    assert panel.seen[0] == 'bundled' and str(folder) not in panel.origin_note.value
    studio.close()
