"Columns beside the six: from the file through training to the forecast; without them nothing changes"
import json

import numpy as np
import pandas as pd
import pytest

from kronos_nb.config import Config
from kronos_nb.core import FEATURES, ConfigError, DataError, ModelError
from kronos_nb.data.parse import EXCHANGE_COLUMNS
from kronos_nb.data.read import extra_columns, read_klines
from kronos_nb.estimate import estimate
from kronos_nb.fitting.prepare import prepare
from kronos_nb.forecast import Forecaster
from kronos_nb.hub_card import model_card
from kronos_nb.judging.baselines import random_walks
from kronos_nb.judging.leaks import check_leaks
from kronos_nb.panel.data import DataPanel
from kronos_nb.panel.forecast import ForecastPanel
from kronos_nb.train import fit

EXTRA = ('trades', 'taker_buy_volume')
WIDE = {'data.extra_features': EXTRA}
ALL = (*FEATURES, *EXTRA)
L, H = 24, 4
SHORT = {
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.symbols': None, 'data.lookback_window': L, 'data.predict_window': H,
    'data.max_context': 64, 'data.embargo': 0, 'data.windows_per_epoch': 64, 'data.val_windows': 32,
    'runtime.progress': False, 'runtime.plots': False, 'evaluate.origins': 4, 'evaluate.paths': 4,
    'evaluate.calibrate': 'off'}
for stage in ('tokenizer', 'predictor'):
    SHORT |= {f'{stage}.epochs': 1, f'{stage}.batch_size': 32, f'{stage}.average_last': 0, f'{stage}.patience': None}


def wide_bars():
    bars, g = random_walks(600, ('A', 'B')), np.random.default_rng(0)
    trades = g.integers(50, 500, len(bars))
    return bars.assign(trades=trades, taker_buy_volume=bars.volume * g.uniform(.2, .8, len(bars)), note='x')


def last_bars():
    return wide_bars().query("symbol == 'A'").tail(60)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return fit(wide_bars(), 'quickstart', tmp_path_factory.mktemp('runs')/'wide', **SHORT, **WIDE)


def test_models_of_a_run_record_the_columns(run):
    assert run.tokenizer.config['d_in'] == 8 and run.tokenizer.features == ALL
    stage = run.run.stage('tokenizer')
    stored = json.loads((stage.best_model/'config.json').read_text())
    assert stored['features'] == list(ALL) and stored['d_in'] == 8 and stored['normalizer']['kind'] == 'zscore'
    assert {f'val_mse_{name}' for name in ALL} <= set(stage.metrics)
    assert {'model', 'LastValue'} <= set(run.evaluation.rows['model'])
    assert run.not_calibrated == 'evaluate.calibrate=off'


def test_a_forecast_reads_the_columns(run):
    f, last = Forecaster.from_pretrained(run.out_dir), last_bars()
    found = f.predict(last, H, paths=3)
    assert found.paths.shape == (3, H, 6) and tuple(found.history.columns) == FEATURES
    reversed_trades = last.assign(trades=last.trades.to_numpy()[::-1])
    assert not np.array_equal(found.paths, f.predict(reversed_trades, H, paths=3).paths)


def test_history_without_the_columns(run):
    f, last = run.forecaster(), last_bars()
    with pytest.raises(DataError, match='trades'):
        f.predict(last.drop(columns='trades'), H)
    with pytest.raises(DataError, match='A at .*trades'):
        f.predict(last.assign(trades=last.trades.where(last.index != last.index[50])), H)


def test_everything_else_that_reads_bars(run):
    found = check_leaks(run.forecaster(), wide_bars(), L, H)
    assert found.ok, found
    card = model_card(run, 'tokenizer')
    assert f'extra_features={EXTRA!r}' in card and 'kronos_nb only' in card
    assert estimate(run.config, wide_bars(), measured=False).table.parameters[0] == run.tokenizer.n_params


@pytest.mark.parametrize('change', [
    lambda model: {'data.extra_features': None, 'tokenizer.init': model},
    lambda model: {'data.extra_features': EXTRA[::-1], 'runtime.only': 'predictor', 'predictor.tokenizer': model}])
def test_a_tokenizer_of_other_columns_is_refused(run, tmp_path, change):
    model = str(run.run.stage('tokenizer').best_model)
    with pytest.raises(ModelError, match='data.extra_features'):
        fit(wide_bars(), run.config.replace(**change(model)), tmp_path)


def test_bars_without_the_columns_or_with_holes():
    cfg = Config.preset('quickstart', **SHORT, **WIDE)
    with pytest.raises(DataError, match='funding'):
        prepare(wide_bars(), cfg.replace(**{'data.extra_features': ('funding',)}))
    holes = wide_bars()
    holes['trades'] = holes.trades.where(holes.index != 7, np.inf)
    with pytest.raises(DataError, match='trades'):
        prepare(holes, cfg)
    assert len(prepare(holes, cfg.replace(**{'data.repair': 'standard'})).changes) == 1
    assert prepare(holes, cfg.replace(**{'data.extra_features': None})).train.features == FEATURES


def test_names_in_the_config():
    assert Config().replace(**{'data.extra_features': 'trades'}).data.features == (*FEATURES, 'trades')
    assert Config().replace(**{'data.extra_features': ()}) == Config()


@pytest.mark.parametrize('names', [('close',), ('a', 'a'), ('symbol',)])
def test_wrong_names_in_the_config(names):
    with pytest.raises(ConfigError, match='data.extra_features'):
        Config().replace(**{'data.extra_features': names})


BINANCE = ['Open time', 'Open', 'High', 'Low', 'Close', 'Volume', 'Close time', 'Quote asset volume',
           'Number of trades', 'Taker buy base asset volume', 'Taker buy quote asset volume', 'Ignore']


@pytest.mark.parametrize('header', [None, EXCHANGE_COLUMNS, BINANCE], ids=['no header', 'names', 'titles'])
def test_an_exchange_file(tmp_path, header):
    hour, g, names = 3_600_000, np.random.default_rng(1), ['trades', 'taker_buy_volume', 'taker_buy_quote_volume']
    opens = 1_735_682_400_000 + hour * np.arange(50)
    rows = [(t, 1, 2, .5, 1.5, 10, t + hour - 1, 15, g.integers(9, 99), *g.uniform(1, 12, 2), 0) for t in opens]
    file = tmp_path/'BTCUSDT-1h-2024-12.csv'
    pd.DataFrame(rows).to_csv(file, index=False, header=header or False)
    assert extra_columns(file) == names
    bars = read_klines(file, extra_features=names)
    np.testing.assert_allclose(bars[names], pd.DataFrame(rows)[[8, 9, 10]])
    assert extra_columns(bars) == names


def test_a_space_offers_the_columns():
    optuna = pytest.importorskip('optuna')
    from kronos_nb.tune import default_space, optional_columns, suggest
    cfg = Config.preset('quickstart', **SHORT)
    assert optional_columns(wide_bars(), cfg) == list(EXTRA)
    assert {'extra.trades', 'extra.taker_buy_volume', 'bits'} <= set(default_space(cfg, EXTRA))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    assert {suggest(study.ask(), {'extra.trades': [False, True]})['extra.trades'] for _ in range(20)} == {False, True}


def test_a_search_tries_columns_in_and_out(tmp_path):
    pytest.importorskip('optuna').logging.set_verbosity(30)
    from kronos_nb.tune import open_study, tune
    study = open_study(str(tmp_path/'study.db'), tmp_path, 0, 0)
    for on in (True, False):
        study.enqueue_trial({'extra.trades': on})
    space = {'extra.trades': [False, True], 'bits': (4, 5)}
    found = tune(wide_bars(), Config.preset('quickstart', **SHORT), space, tmp_path, trials=2)
    assert found.value.startswith('CRPS') and set(found.table.state) == {'complete'}
    features = [Forecaster.from_pretrained(folder).features for folder in found.table.folder]
    assert set(features) == {FEATURES, (*FEATURES, 'trades')}
    assert [len(o) == 7 for o in features] == found.table['extra.trades'].tolist()
    best = found.fit()
    assert best.config.data.features == best.tokenizer.features == features[0]
    assert best.evaluation.settings['trials'] == 2 and '2 trials' in best.evaluation.to_markdown()
    assert found.plot() is not None


def test_panels_show_the_columns(run):
    choose = DataPanel(wide_bars(), run.config, folders=())
    bars, _, report = choose.read()
    assert report.features == ALL and set(EXTRA) <= set(bars)
    exec(choose.code, dict(bars=wide_bars()))
    forecast = ForecastPanel(run.out_dir, wide_bars(), paths=2)
    assert forecast.predict().paths.shape[2] == 6
    assert 'extra_features' not in forecast.code   # the frame has the columns already
