"What the pages on judging do not teach: odd panels, resuming, agreement with independent code"
import numpy as np
import pandas as pd
import pytest
import torch

from kronos_nb.core import ConfigError, DataError, np_rng
from kronos_nb.evaluate import evaluate, fingerprint, overlap_of
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.backtest import backtest, decisions
from kronos_nb.judging import baselines
from kronos_nb.judging.baselines import EWMA, Baseline, Garch, LastValue, random_walks
from kronos_nb.decode.calibration import Calibration
from kronos_nb.judging.compare import paired
from kronos_nb.judging.evaluation import Evaluation
from kronos_nb.judging.metrics import crps
from kronos_nb.judging.origins import pick_origins
from kronos_nb.judging.stats import _expanded, block_indices, diebold_mariano
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import fit, load

WIDE = Calibration(dict(temperature=1., top_k=0, top_p=.9), (2., 2.), 5, 1., *[{'Kronos': 1.}]*3, dates=30)
quick = dict(lookback_window=60, predict_window=5, origins=16, paths=20, progress=False, baselines=[LastValue()])
simple = quick | dict(baselines=[Garch()])
panel = tuple('ABCDEF')


def walks(n=600, symbols=('A', 'B'), seed=0):
    return random_walks(n, symbols, seed=seed)


class Counting(Baseline):
    "Counts the histories that it forecast from, and stops after `fail_after` of them"
    fingerprint = 'counting'

    def __init__(self, fail_after=10**9):
        self.seen, self.fail_after = 0, fail_after

    def returns(self, r, size, rngs, bars):
        self.seen += len(r)
        if self.seen > self.fail_after:
            raise KeyboardInterrupt
        return np.stack([g.normal(0, .01, size) for g in rngs])


def tiny(seed=0):
    torch.manual_seed(seed)
    no_dropout = dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
    both = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=3, s2_bits=3, **no_dropout)
    tokenizer = KronosTokenizer(d_in=6, n_enc_layers=2, n_dec_layers=2, group_size=3, beta=.05, gamma0=1., gamma=1.1,
                                zeta=.05, **both)
    return Forecaster(tokenizer, Kronos(n_layers=1, token_dropout_p=0., learn_te=True, **both), max_context=70)


# statistics
def test_crps_equals_the_sum_over_pairs():
    rng = np_rng(0)
    x, y = rng.normal(size=(3, 7, 4)), rng.normal(size=(3, 4))
    pairs = abs(x[:, :, None] - x[:, None]).sum((1, 2)) / (7 * 6)
    np.testing.assert_allclose(crps(x, y), abs(x - y[:, None]).mean(1) - pairs / 2, rtol=1e-12)


def test_a_large_sample_reads_the_usual_percentiles():
    np.testing.assert_allclose(_expanded(10**6), (.025, .975), atol=1e-5)
    assert _expanded(4)[0] < .001 and _expanded(1) == (0., 1.)


def test_resamples_depend_on_their_seed_alone():
    first = block_indices(20, 4, 50, seed=3)
    np.random.default_rng(0).random(5)
    np.testing.assert_array_equal(first, block_indices(20, 4, 50, seed=3))
    assert first.shape == (50, 20) and (first != block_indices(20, 4, 50, seed=4)).any()


def test_garch_that_does_not_converge_is_riskmetrics(monkeypatch):
    r = np_rng(0).normal(size=(1, 400))

    def ends(b): return b.returns(r, (50, 12), [np_rng(0)], None)

    assert (ends(Garch()) != ends(EWMA())).any()
    baselines._garch_parameters.cache_clear()
    monkeypatch.setattr('arch.univariate.base.ARCHModelResult.convergence_flag', 4)
    np.testing.assert_array_equal(ends(Garch()), ends(EWMA()))
    baselines._garch_parameters.cache_clear()   # so that nothing stays of the flag
    with pytest.raises(ConfigError, match='decay'):
        EWMA(1.)


def test_diebold_mariano_keeps_its_size_under_overlap():
    rng, rejected = np_rng(0, 'dm'), 0
    for _ in range(400):
        e = rng.normal(size=63)
        loss = e[:-3] + e[1:-2] + e[2:-1] + e[3:]
        rejected += diebold_mariano(np.zeros(60), loss, overlap=3)[1] < .05
    assert rejected / 400 < .1


# resuming
@pytest.fixture
def small_parts(monkeypatch):
    "Parts of eight forecasts; the 32 of `quick` make four"
    monkeypatch.setattr('kronos_nb.evaluate._BATCH', 8)


def stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Counting(fail_after=20), walks(), out_dir=folder, **quick)


def test_a_stopped_evaluation_resumes(tmp_path, small_parts):
    whole, again = evaluate(Counting(), walks(), **quick), Counting()
    stopped(tmp_path)
    e = evaluate(again, walks(), out_dir=tmp_path, **quick)
    assert again.seen == 32 - 16   # two parts of eight were complete
    pd.testing.assert_frame_equal(e.rows, whole.rows)
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path).tests, e.tests)
    assert not (tmp_path/'parts').exists()


@pytest.mark.parametrize('change', [dict(seed=1), dict(paths=21), dict(bars=walks(seed=5))], ids=' '.join)
def test_parts_of_other_settings_are_not_reused(tmp_path, small_parts, change):
    stopped(tmp_path)
    f = Counting()
    evaluate(f, out_dir=tmp_path, **dict(bars=walks()) | quick | change)
    assert f.seen == 32


def test_parts_of_other_versions_are_not_reused(tmp_path, small_parts, monkeypatch):
    stopped(tmp_path)
    monkeypatch.setattr('kronos_nb.evaluate._ROWS_VERSION', 1)
    f = Counting()
    evaluate(f, walks(), out_dir=tmp_path, **quick)
    assert f.seen == 32


def test_rows_do_not_depend_on_the_batch(monkeypatch):
    whole = evaluate(Garch(), walks(), **quick).rows
    monkeypatch.setattr('kronos_nb.evaluate._BATCH', 3)
    pd.testing.assert_frame_equal(evaluate(Garch(), walks(), **quick).rows, whole)


def test_fingerprints_tell_weights_apart():
    a, b = tiny(), tiny(1)
    assert fingerprint(a) == fingerprint(tiny()) != fingerprint(b)
    for how in (dict(calibration=WIDE), dict(anchor=False)):
        assert fingerprint(Forecaster(a.tokenizer, a.predictors, **how)) != fingerprint(a)


# panels
def test_symbols_with_different_spans_and_gaps():
    a, b = walks(400, ('A',)), walks(400, ('B',))
    t = a.timestamps[200]
    bars = pd.concat([a.drop(index=range(200, 260)), b.assign(timestamps=b.timestamps + pd.Timedelta('40D'))])
    o, left_out = pick_origins(bars.reset_index(drop=True), 60, 5, origins=24)
    assert set(o.symbol) == {'A', 'B'} and o.period.nunique() == 4
    assert left_out.reason.str.contains('gap').any()
    assert not len(o[(o.symbol == 'A') & (o['last'] >= t) & (o.origin - pd.Timedelta('59h') < t)])


def test_a_panel_has_information_coefficients_and_a_scope_for_each_symbol():
    e = evaluate(Garch(), walks(400, panel), **quick)
    found = e.metrics[(e.metrics.model == 'model') & (e.metrics.scope == 'pooled')]
    assert {'ic', 'rank_ic'} <= set(found.metric)
    assert set(e.metrics.scope) == {'pooled', *panel}


def test_a_symbol_without_a_test_part_is_left_out():
    t = walks().timestamps
    used = {'A': (t[0], t[299]), 'B': (t[0], t[299])}
    e = evaluate(LastValue(), walks(), start={'A': t[300]}, used=used, **simple)
    assert e.symbols == ['A'] and list(e.left_out.symbol) == ['B']


def test_a_panel_is_traded_by_rank():
    e = evaluate(LastValue(), walks(500, panel), **simple | dict(origins=40))
    b = backtest(e, 'top_k', 'mean', k=2, cost=.001, slippage=0., delay=1)
    assert len(b.periods) <= 40 and (b.periods.invested <= 1 + 1e-9).all()
    assert (b.periods.turnover <= 3 + 1e-9).all()   # sell all, buy others, and sell them at the end of the horizon
    np.testing.assert_allclose(b.periods.gross - b.periods.net, .001 * b.periods.turnover)
    with pytest.raises(ConfigError, match='top_k'):
        backtest(e, 'top_k', k=4)
    with pytest.raises(ConfigError, match='delay'):
        backtest(e, delay=5)


def test_overlapping_dates_are_traded_once():
    bars = walks(300, ('A',))
    assert overlap_of(pick_origins(bars, 60, 10, origins=80)[0]) > 0
    e = evaluate(LastValue(), bars, **simple | dict(predict_window=10, origins=80, paths=5))
    d = decisions(e.rows[e.rows.model == 'model'])
    assert (d.origin.to_numpy()[1:] >= d.end.to_numpy()[:-1]).all()


def test_runs_with_other_lookbacks_are_compared_in_one_scale():
    later = simple | dict(start=walks().timestamps[200])
    a, b = (evaluate(LastValue(), walks(), **later | dict(lookback_window=n)) for n in (60, 120))
    p = paired(a, b)
    assert p['shared'] == 16 and abs(p['skill']) < .3
    unscaled = [e.rows[e.rows.model == 'model'].eval('crps * scale').mean() for e in (a, b)]
    assert np.sign(p['skill']) == np.sign(unscaled[0] - unscaled[1])


# models
def test_bad_input():
    with pytest.raises(ConfigError, match='periods'):
        pick_origins(walks(), 60, 5, periods=2)
    with pytest.raises(DataError, match='lookback_window=60'):
        evaluate(LastValue(), walks(50), 60, 5)
    with pytest.raises(ConfigError, match='lookback_window'):
        evaluate(tiny(), walks())


def test_a_forecaster_is_judged_against_its_base(tmp_path):
    how = quick | dict(temperature=.8, top_p=.95)
    e = evaluate(tiny(), walks(), base=tiny(1), out_dir=tmp_path, **how)
    assert e.models == ['model', 'base', 'LastValue']
    assert e.settings['sampling'] == dict(temperature=.8, top_k=0, top_p=.95) and 'temperature 0.8' in e.to_markdown()
    same = evaluate(tiny(), walks(), base=tiny(), **how)
    assert same.tests.loc['base', 'skill'] == 0 and same.verdict != 'helped'
    pd.testing.assert_frame_equal(same.rows[same.rows.model == 'model'], e.rows[e.rows.model == 'model'])


def test_windows_and_training_bars_are_read_off_the_model():
    f, span = tiny(), ['2024-01-01', '2024-01-12']
    f.predictor.extra.update(lookback_window=60, predict_window=5, trained_on={'A': span, 'B': span})
    how = dict(origins=4, paths=4, progress=False, baselines=[LastValue()])
    with pytest.raises(DataError, match='trained or selected'):
        evaluate(f, walks(), **how)
    e = evaluate(f, walks(), start='2024-01-12 01:00', **how)
    assert (e.settings['lookback_window'], e.settings['predict_window']) == (60, 5)


# calibration of a run
def test_a_run_learns_a_calibration(quickstart):
    r = load(quickstart)
    assert r.calibration.dates >= 20 and '## Calibration' in r.run.report_file.read_text()
    assert Forecaster.from_pretrained(quickstart).calibration == r.calibration == r.forecaster().calibration


MODEL = dict(d_model=16, n_heads=2, ff_dim=16, s1_bits=4, s2_bits=4)
SHORT = {
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.symbols': None, 'data.lookback_window': 16, 'data.predict_window': 8,
    'data.embargo': 0, 'data.windows_per_epoch': 16, 'data.val_windows': 8,
    'tokenizer.model': MODEL | dict(n_enc_layers=2, n_dec_layers=2, group_size=4), 'tokenizer.epochs': 1,
    'predictor.model': MODEL | dict(n_layers=1), 'predictor.epochs': 1, 'evaluate.paths': 4, 'evaluate.origins': 4,
    'runtime.progress': False, 'runtime.plots': False}


def test_a_run_says_why_it_learned_no_calibration(tmp_path):
    "The validation part has 60 bars, too few for 20 forecasts of 8 bars"
    r = fit(walks(400, ('A',)), 'quickstart', tmp_path, **SHORT)
    assert r.calibration is None and 'data.val' in r.not_calibrated
    for page in (r.run.report_file.read_text(), r._repr_markdown_()):
        assert r.not_calibrated in page


@pytest.mark.parametrize('change, named', [({}, 'data.val'), ({'evaluate.temperature': 0.}, 'evaluate.temperature')])
def test_a_calibration_that_must_be_learned_fails_before_training(tmp_path, change, named):
    with pytest.raises(DataError, match=named):
        fit(walks(400, ('A',)), 'quickstart', tmp_path, **SHORT, **{'evaluate.calibrate': 'on'}, **change)
    assert not list(tmp_path.iterdir())
