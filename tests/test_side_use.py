"Side inputs where runs stop, are averaged, reported, served and shown: nothing of the channel is lost on the way"
import json

import numpy as np
import pandas as pd
import pytest
import torch

from kronos_nb.core import DataError, ModelError
from kronos_nb.forecast import Forecaster
from kronos_nb.hub_card import model_card
from kronos_nb.judging.importance import importance
from kronos_nb.train import fit
from kronos_nb.training.checkpoint import read_checkpoint, split_tensors
from kronos_nb.training.learner import Callback
from kronos_nb.training.run import Run
from kronos_nb.tune import soup_runs
from tests.conftest import once
from tests.helpers import choice, equal, last_checkpoint
from tests.test_side import NAMES, SHORT, H, L, tables, two_symbols

FAST = SHORT | {'predictor.batch_size': 16, 'predictor.ema_decay': .9, 'predictor.side_dropout': .3}


def train(place, out, callbacks=(), **changes):
    sources = {'data.covariates': NAMES, 'data.covariates_source': str(place/'side.csv')}
    return fit([str(place/'bars.parquet')], 'quickstart', out, callbacks=callbacks, **FAST | sources | changes)


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    "Return a folder with bars and covariates"
    def make(folder):
        folder.mkdir()
        tables(two_symbols()).to_csv(folder/'side.csv', index=False)
        two_symbols().to_parquet(folder/'bars.parquet')
    return once(tmp_path_factory, 'side_place', make)


@pytest.fixture(scope='session')
def run(place, tmp_path_factory):
    "Return the folder of a run whose channel was trained"
    return once(tmp_path_factory, 'side_run', lambda folder: train(place, folder))


@pytest.fixture
def model(run):
    "Return the model of a run, its gate wide open, so that covariates move every number"
    f = Forecaster.from_pretrained(run)
    with torch.no_grad(): f.predictor.side.gate.fill_(3.)
    return f


# stops and averages
class Killed(BaseException):
    "Ends a run where it stands, as SIGKILL would"


class Kill(Callback):
    def after_step(self, learn):
        if learn.step == 5: raise Killed


@pytest.mark.parametrize('what', ['side', 'all'])
def test_a_killed_run_that_goes_on_ends_with_the_same_bits(place, tmp_path, what):
    "Killed between two checkpoints of 8 steps, and on from the middle of the first epoch"
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    changes = {'predictor.trainable': what, 'runtime.save_steps': 3, 'judge': False}
    train(place, whole, **changes)
    with pytest.raises(Killed): train(place, cut, [Kill()], **changes)
    assert last_checkpoint(cut, 'predictor').name == 'step_000003'
    assert float(train(place, cut, **changes).predictor.side.gate.detach().abs().max()) > 0
    for name in ('model.safetensors', 'side.safetensors', 'side.json'):
        for folder in ('best_model', 'final_model'):
            a, b = ((o/'predictor'/folder/name).read_bytes() for o in (whole, cut))
            assert a == b, (folder, name)
    states = [split_tensors(read_checkpoint(last_checkpoint(o, 'predictor')))[1] for o in (whole, cut)]
    assert equal(*states) and any('exp_avg' in k for k in states[0])
    losses = [json.loads((o/'predictor'/'training_metrics.json').read_text()) for o in (whole, cut)]
    assert all(losses[0][k] == losses[1][k] for k in ('train_loss', 'val_loss'))


def test_a_soup_is_chosen_with_the_covariates(place, run, tmp_path):
    "The loss of a run in the table of a soup is the one that its weights were chosen by"
    train(place, tmp_path/'other', **{'runtime.seed': 1, 'judge': False})
    soup = soup_runs({'a': run, 'b': tmp_path/'other'}, tmp_path/'soup', [str(place/'bars.parquet')])
    for name, folder in (('a', run), ('b', tmp_path/'other')):
        kept = choice(folder, 'predictor')
        best = next(o['val_loss'] for o in kept['table'] if o['candidate'] == kept['chosen'])
        assert soup.table.set_index('run').val_loss[name] == pytest.approx(best, rel=1e-6)
    assert [c.name for c in soup.forecaster().covariates] == list(NAMES)


# what a run says
def test_report_and_card_say_which_covariates_matter(run):
    found = pd.read_csv(Run(run).importance_file)
    assert set(found.covariate) == set(NAMES) and np.isfinite(found[['importance', 'low', 'high']]).to_numpy().all()
    report = (run/'report.md').read_text()
    for text in (report, model_card(run, 'predictor')):
        part = text[text.index('Importance of the covariates'):]
        assert all(f'| {name} |' in part for name in NAMES)
    assert "covariates='" in model_card(run, 'predictor')


def test_importance_of_some_windows(model):
    bars = two_symbols()
    f = model.with_covariates(tables(bars))
    all_of_them, some = (importance(f, bars, L, H, draws=1, most=n) for n in (None, 20))
    assert (some.windows == 20).all() and (all_of_them.windows > 20).all()
    assert importance(f, bars, L, H, draws=1, most=10**6).equals(all_of_them)


# the service
TOKEN = 'a-token-of-the-tests'


def as_columns(frame):
    return {c: frame[c].astype(str).tolist() if c == 'timestamps' else frame[c].tolist() for c in frame}


def request(bars, side=None, **how):
    given = {} if side is None else dict(covariates=as_columns(side))
    return dict(bars=as_columns(bars.drop(columns='symbol')), symbol='A', predict_window=H, paths=3) | given | how


@pytest.fixture
def client(model):
    pytest.importorskip('fastapi')
    from fastapi.testclient import TestClient

    from kronos_nb.serve import Limits, Service, make_app
    service = Service(dict(side=model, plain=Forecaster.from_pretrained('bundled')), Limits(rows=300, horizon=24))
    with TestClient(make_app(service, TOKEN), headers=dict(Authorization=f'Bearer {TOKEN}')) as c: yield c


def test_the_service_takes_covariates(model, client):
    bars, side = two_symbols().query("symbol == 'A'").tail(64), tables(two_symbols()).query("symbol == 'A'")
    key = f'A {bars.timestamps.iloc[-1]}'
    def direct(x): return model.predict_many([bars], H, keys=[key], covariates=x, paths=3)[0]
    def median(answer): return answer.json()['quantiles']['0.5']
    side = side.tail(80)
    moved = side.assign(release=1 - side.release)
    for x in (side, moved): assert median(client.post('/forecast', json=request(bars, x))) == \
        direct(x).quantile(.5)['close'].tolist()
    assert not np.array_equal(direct(side).paths, direct(moved).paths)
    assert [c['name'] for c in client.get('/models').json()[0]['covariates']] == list(NAMES)
    assert client.get('/models').json()[1]['covariates'] == []
    alone = client.post('/forecast', json=request(bars, side.drop(columns='release'), missing='mask')).json()
    assert any('release' in note for note in alone['notes'])


@pytest.mark.parametrize('change, names', [
    (lambda bars, x: request(bars), 'funding'),
    (lambda bars, x: request(bars, x[x.timestamps <= bars.timestamps.max()]), 'release'),
    (lambda bars, x: request(bars, x.drop(columns='funding')), 'funding'),
    (lambda bars, x: request(bars, x, model='plain'), 'covariates'),
    (lambda bars, x: request(bars, x, missing='drop'), 'missing'),
    (lambda bars, x: request(bars) | dict(covariates=dict(timestamps=[1, 2], funding=[1])), 'covariates'),
    (lambda bars, x: request(bars) | dict(covariates=[dict(timestamps='x', funding=1)]), 'timestamp')])
def test_a_request_that_lacks_a_covariate_is_told_which(client, change, names):
    bars, side = two_symbols().query("symbol == 'A'").tail(64), tables(two_symbols()).query("symbol == 'A'").tail(80)
    got = client.post('/forecast', json=change(bars, side))
    error = got.json()['error']
    assert got.status_code == 422 and names in error['message'] and len(got.text) < 1000
    many = dict(covariates=dict(timestamps=[0]*400, funding=[0]*400))
    assert client.post('/forecast', json=request(bars) | many).status_code == 413


# panels and commands
def test_the_forecast_panel_reads_the_files_of_the_run(place, run):
    from kronos_nb.panel import ForecastPanel
    bars = str(place/'bars.parquet')
    panel = ForecastPanel(str(run), bars, paths=3)
    names = {}
    exec(panel.code.replace('forecast.plot()', ''), names)
    np.testing.assert_array_equal(panel.predict().paths, names['forecast'].paths)
    table = pd.read_csv(place/'side.csv')
    short = table[pd.to_datetime(table.timestamps) <= two_symbols().timestamps.max()]
    with pytest.raises(DataError, match='release'): ForecastPanel(str(run), bars, covariates=short).predict()
    lacking = ForecastPanel(str(run), bars, paths=3, covariates=short, missing='mask').predict()
    assert lacking.paths.shape[0] == 3


def test_the_forecast_panel_reads_columns_of_the_bars(place, tmp_path):
    from kronos_nb.panel import DataPanel, ForecastPanel
    side = tables(two_symbols(), 0)[['symbol', 'timestamps', 'funding']]
    two_symbols().merge(side).to_csv(tmp_path/'bars.csv', index=False)
    done = fit(str(tmp_path/'bars.csv'), 'quickstart', tmp_path/'run', judge=False,
               **FAST | {'data.covariates': {'funding': 'past'}, 'predictor.epochs': 1})
    panel = ForecastPanel(done, DataPanel(str(tmp_path/'bars.csv')), paths=3)
    names = dict(forecaster=done.forecaster())
    exec(panel.code.replace('forecast.plot()', ''), names)
    np.testing.assert_array_equal(panel.predict().paths, names['forecast'].paths)


def test_a_turn_with_downloaded_bars_reads_covariates(place, run, tmp_path, monkeypatch, capsys):
    from kronos_nb import schedule
    from kronos_nb.cli import main
    bars = two_symbols().query("symbol == 'A'")
    monkeypatch.setattr(schedule, 'fetch_new', lambda *a, **how: (bars, {}))
    call = ['run', '--model', str(run), '--fetch', 'A', '--interval', '1h', '--ledger', str(tmp_path/'l')]
    assert main(call) == 0   # the files of the run
    tables(two_symbols(), 0).to_csv(tmp_path/'short.csv', index=False)
    assert main([*call, '--covariates-source', str(tmp_path/'short.csv')]) != 0
    assert 'release' in capsys.readouterr().err


def test_covariates_for_a_model_that_reads_none(tmp_path):
    from kronos_nb.panel import ForecastPanel
    with pytest.raises(ModelError, match='covariates'):
        ForecastPanel('bundled', 'sample', covariates=tables(two_symbols())).predict()


def test_a_wrong_declaration_is_shown_at_its_setting():
    from kronos_nb.panel.config import check_section
    _, errors = check_section('data', dict(covariates='funding: tomorrow', lookback_window='60'))
    assert set(errors) == {'covariates'}
