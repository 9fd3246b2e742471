"Columns beside the six: from the file through training to the forecast; and nothing moves where there are none"
import json
import numpy as np, pandas as pd, pytest, torch
from kronos_nb.baselines import random_walks
from kronos_nb.config import Config
from kronos_nb.core import FEATURES, ConfigError, DataError, ModelError
from kronos_nb.data.kline import KLINES12, extra_columns, read_klines
from kronos_nb.data.window import WindowDataset
from kronos_nb.estimate import estimate
from kronos_nb.forecast import Forecaster
from kronos_nb.hub import model_card
from kronos_nb.leaks import check_leaks
from kronos_nb.train import fit, prepare

EXTRA = ('trades', 'taker_buy_volume')
L, H = 24, 4
little = {'base.symbols': None, 'data.symbols': None, 'data.lookback_window': L, 'data.predict_window': H, 'data.max_context': 64, 'data.embargo': 0, 'data.windows_per_epoch': 64, 'data.val_windows': 32,
    **{f'{s}.{k}': v for s in ('tokenizer', 'predictor') for k, v in dict(epochs=1, batch_size=32, average_last=0, patience=None).items()},
    'runtime.progress': False, 'runtime.plots': False, 'evaluate.origins': 4, 'evaluate.paths': 4, 'evaluate.calibrate': 'off'}

def bars_of(n=600):
    bars = random_walks(n, ('A', 'B'))
    g = np.random.default_rng(0)
    return bars.assign(trades=g.integers(50, 500, len(bars)), taker_buy_volume=bars.volume*g.uniform(.2, .8, len(bars)), note='x')

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return fit(bars_of(), 'quickstart', tmp_path_factory.mktemp('runs')/'wide', **little, **{'data.extra_features': EXTRA})

def test_fit_to_forecast(run):
    assert run.tokenizer.config['d_in'] == 8 and run.tokenizer.features == (*FEATURES, *EXTRA)
    said = json.loads((run.out_dir/'tokenizer'/'best_model'/'config.json').read_text())
    assert said['features'] == [*FEATURES, *EXTRA] and said['d_in'] == 8 and said['normalizer']['kind'] == 'zscore'
    assert {f'val_mse_{k}' for k in (*FEATURES, *EXTRA)} <= set(pd.DataFrame(json.loads((run.out_dir/'tokenizer'/'training_metrics.json').read_text())))
    assert {'model', 'LastValue'} <= set(run.evaluation.rows['model'])
    f, last = Forecaster.from_pretrained(run.out_dir), bars_of().query("symbol == 'A'").tail(60)
    got = f.predict(last, H, paths=3)
    assert got.paths.shape == (3, H, 6) and tuple(got.history.columns) == FEATURES
    other = f.predict(last.assign(trades=last.trades.to_numpy()[::-1]), H, paths=3)
    assert not np.array_equal(got.paths, other.paths), 'the extra column says nothing to the model'

def test_history_without_the_columns(run):
    f, last = run.forecaster(), bars_of().query("symbol == 'A'").tail(60)
    with pytest.raises(DataError, match='history lacks trades: the model was trained on open'): f.predict(last.drop(columns='trades'), H)
    with pytest.raises(DataError, match='A at .*: trades is nan'): f.predict(last.assign(trades=last.trades.where(last.index != last.index[50])), H)

def test_what_else_reads_bars(run, tmp_path):
    found = check_leaks(run.forecaster(), bars_of(), L, H)
    assert found.ok, found
    card = model_card(run, 'tokenizer')
    assert "extra_features=('trades', 'taker_buy_volume')" in card and 'works with kronos_nb only' in card
    e = estimate(run.config, bars_of(), measured=False)
    assert e.table.parameters[0] == run.tokenizer.n_params
    with pytest.raises(ModelError, match='reads 8 columns .* and the data have 6 .*data.extra_features=trades,taker_buy_volume'):
        fit(bars_of(), run.config.replace(**{'data.extra_features': None, 'tokenizer.init': str(run.out_dir/'tokenizer'/'best_model')}), tmp_path/'a')
    with pytest.raises(ModelError, match='reads 8 columns'):
        fit(bars_of(), run.config.replace(**{'data.extra_features': EXTRA[::-1], 'runtime.only': 'predictor', 'predictor.tokenizer': str(run.out_dir/'tokenizer'/'best_model')}), tmp_path/'b')

def test_bars_without_the_columns_or_with_holes(tmp_path):
    with pytest.raises(DataError, match="no column for the extra feature 'funding'"): prepare(bars_of(), Config.preset('quickstart', **little, **{'data.extra_features': ('funding',)}))
    holes = bars_of().assign(trades=lambda b: b.trades.where(b.index != 7, np.inf))
    cfg = Config.preset('quickstart', **little, **{'data.extra_features': EXTRA})
    with pytest.raises(DataError, match='inf .*1 trades'): prepare(holes, cfg)
    assert len(prepare(holes, cfg.replace(**{'data.repair': 'standard'})).changes) == 1
    assert prepare(holes, cfg.replace(**{'data.extra_features': None})).train.features == FEATURES

def test_names_in_the_config():
    assert Config.from_dict({'data.extra_features': 'trades'}).data.features == (*FEATURES, 'trades')
    assert Config.from_dict({'data.extra_features': ()}) == Config()
    for bad in (('close',), ('a', 'a'), ('symbol',)):
        with pytest.raises(ConfigError, match='data.extra_features must be different columns'): Config.from_dict({'data.extra_features': bad})

def test_an_exchange_file(tmp_path):
    t, g = 1735682400000, np.random.default_rng(1)
    rows = [(t + i*3600000, 1, 2, .5, 1.5, 10 + i % 3, t + i*3600000 + 3599999, 15, g.integers(9, 99), g.uniform(1, 9), g.uniform(2, 12), 0) for i in range(50)]
    file = tmp_path/'BTCUSDT-1h-2024-12.csv'
    for header in (None, KLINES12, ['Open time', 'Open', 'High', 'Low', 'Close', 'Volume', 'Close time', 'Quote asset volume', 'Number of trades', 'Taker buy base asset volume', 'Taker buy quote asset volume', 'Ignore']):
        pd.DataFrame(rows).to_csv(file, index=False, header=header or False)
        names = ['trades', 'taker_buy_volume', 'taker_buy_quote_volume']
        assert extra_columns(file) == names
        bars = read_klines(file, extra_features=names)
        np.testing.assert_allclose(bars[names], pd.DataFrame(rows)[[8, 9, 10]])
    assert extra_columns(bars) == names

def test_a_search_tries_columns_in_and_out(tmp_path):
    optuna = pytest.importorskip('optuna')
    from kronos_nb.tune import default_space, open_study, optional_columns, suggest, tune
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    cfg, bars = Config.preset('quickstart', **little), bars_of()
    assert optional_columns(bars, cfg) == list(EXTRA) and {'extra.trades', 'extra.taker_buy_volume', 'bits'} <= set(default_space(cfg, EXTRA))
    space = {'extra.trades': [False, True], 'bits': (4, 5)}
    sampler = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    assert {suggest(sampler.ask(), space)['extra.trades'] for _ in range(20)} == {False, True}
    first = open_study(str(tmp_path/'study.db'), tmp_path, 0, 0)
    for on in (True, False): first.enqueue_trial({'extra.trades': on})   # whatever the sampler would begin with
    found = tune(bars, cfg, space, tmp_path, trials=2)
    assert found.value.startswith('CRPS') and set(found.table.state) == {'complete'}
    models = [json.loads((tmp_path.__class__(f)/'tokenizer'/'best_model'/'config.json').read_text()) for f in found.table.folder]
    assert {m['d_in'] for m in models} == {6, 7}, 'the columns were not varied'
    assert [m['d_in'] == 7 for m in models] == found.table['extra.trades'].tolist() == [m.get('features') == [*FEATURES, 'trades'] for m in models]
    best = found.fit()
    assert best.config.data.features == best.tokenizer.features == tuple(models[0].get('features', FEATURES)) and best.tokenizer.s1_bits == models[0]['s1_bits']
    assert 'best of 2 that were tried' in best.evaluation.to_markdown()
    assert found.plot() is not None

def test_panels_show_and_say_the_columns(run):
    from kronos_nb.panel import DataPanel, ForecastPanel
    choose = DataPanel(bars_of(), run.config, folders=())
    bars, _, report = choose.read()
    assert report.features == (*FEATURES, *EXTRA) and set(EXTRA) <= set(bars)
    exec(choose.code, dict(bars=bars_of()))
    asked = ForecastPanel(run.out_dir, bars_of(), paths=2)
    assert asked.predict().paths.shape[2] == 6 and "extra_features" not in asked.code   # the frame is there already
