"What the notebooks on judging do not teach: odd panels, resuming, agreement with independent code"
import numpy as np, pandas as pd, pytest
from kronos_nb.baselines import Baseline, EWMA, Garch, LastValue
from kronos_nb.core import ConfigError, DataError, np_rng
from kronos_nb.evaluate import Evaluation, evaluate, forecast_rows, overlap_of, pick_origins
from kronos_nb.evidence import block_indices, diebold_mariano, expanded
from kronos_nb.metrics import crps

def walks(n=600, symbols=('A', 'B'), seed=0, start='2024-01-01'):
    out = []
    for s in symbols:
        close = 100 * np.exp(np.cumsum(.01 * np_rng(seed, 'walks', s).normal(size=n)))
        out.append(pd.DataFrame(dict(symbol=s, timestamps=pd.date_range(start, periods=n, freq='1h'), open=close, high=close, low=close, close=close, volume=1., amount=close)))
    return pd.concat(out, ignore_index=True)

class Counting(Baseline):
    "Counts the histories it forecast from, and can be told to fail"
    def __init__(self, fail_after=10**9): self.seen, self.fail_after = 0, fail_after
    fingerprint = 'counting'
    def returns(self, r, size, rngs, bars):
        self.seen += len(r)
        if self.seen > self.fail_after: raise KeyboardInterrupt
        return np.stack([g.normal(0, .01, size) for g in rngs])

quick = dict(lookback_window=60, predict_window=5, origins=16, paths=20, progress=False, batch=8, baselines=[LastValue()])

def test_crps_equals_the_sum_over_pairs():
    rng = np_rng(0)
    x, y = rng.normal(size=(3, 7, 4)), rng.normal(size=(3, 4))
    pairs = abs(x[:, :, None] - x[:, None]).sum((1, 2)) / (7 * 6)
    np.testing.assert_allclose(crps(x, y), abs(x - y[:, None]).mean(1) - pairs / 2, rtol=1e-12)

def test_a_large_sample_reads_the_usual_percentiles():
    np.testing.assert_allclose(expanded(10**6), (.025, .975), atol=1e-5)
    assert expanded(4)[0] < .001 and expanded(1) == (0., 1.)

def test_resamples_are_ours_to_repeat():
    a = block_indices(20, 4, 50, seed=3)
    np.random.default_rng(0).random(5)                                  # nobody else's draws move them
    np.testing.assert_array_equal(a, block_indices(20, 4, 50, seed=3))
    assert a.shape == (50, 20) and (a != block_indices(20, 4, 50, seed=4)).any()

def test_garch_that_does_not_converge_is_riskmetrics(monkeypatch):
    r = np_rng(0).normal(size=(1, 400))
    def ends(b): return b.returns(r, (50, 12), [np_rng(0)], None)
    assert (ends(Garch()) != ends(EWMA())).any()
    monkeypatch.setattr('arch.univariate.base.ARCHModelResult.convergence_flag', 4)
    np.testing.assert_array_equal(ends(Garch()), ends(EWMA()))
    with pytest.raises(ConfigError, match='decay'): EWMA(1.)

def test_diebold_mariano_keeps_its_size_under_overlap():
    rng, wrong = np_rng(0, 'dm'), 0
    for _ in range(400):
        e = rng.normal(size=63)
        wrong += diebold_mariano(np.zeros(60), e[:-3] + e[1:-2] + e[2:-1] + e[3:], overlap=3)[1] < .05
    assert wrong / 400 < .1

def test_a_stopped_evaluation_goes_on(tmp_path):
    whole = evaluate(Counting(), walks(), **quick)
    with pytest.raises(KeyboardInterrupt): evaluate(Counting(fail_after=20), walks(), **quick, out_dir=tmp_path)
    again = Counting()
    e = evaluate(again, walks(), **quick, out_dir=tmp_path)
    assert again.seen == 32 - 16 # the first two parts of eight were whole
    pd.testing.assert_frame_equal(e.rows, whole.rows)
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path).tests, e.tests)
    assert not (tmp_path/'parts').exists()

def test_parts_of_other_baselines_are_not_reused(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt): evaluate(Counting(fail_after=20), walks(), **quick, out_dir=tmp_path)
    monkeypatch.setattr('kronos_nb.evaluate.ROWS', 1)
    f = Counting()
    evaluate(f, walks(), **quick, out_dir=tmp_path)
    assert f.seen == 32

def test_parts_of_other_settings_are_not_reused(tmp_path):
    with pytest.raises(KeyboardInterrupt): evaluate(Counting(fail_after=20), walks(), **quick, out_dir=tmp_path)
    for other in (dict(seed=1), dict(paths=21)):
        f = Counting()
        evaluate(f, walks(), **{**quick, **other})
        assert f.seen == 32
    f = Counting(fail_after=30)
    with pytest.raises(KeyboardInterrupt): evaluate(f, walks(seed=5), **quick, out_dir=tmp_path)
    assert f.seen == 32

def test_rows_do_not_depend_on_the_batch():
    pd.testing.assert_frame_equal(*(evaluate(Garch(), walks(), **{**quick, 'batch': n}).rows for n in (3, 64)))

def test_symbols_with_different_spans_and_gaps():
    a, b = walks(400, ('A',)), walks(400, ('B',), start='2024-02-10')
    a = a.drop(index=range(200, 260)) # a gap
    bars = pd.concat([a, b], ignore_index=True)
    o, left_out = pick_origins(bars, 60, 5, origins=24)
    assert set(o.symbol) == {'A', 'B'} and o.period.nunique() == 4
    assert left_out.reason.str.contains('gap').any()
    t = a.timestamps.iloc[200]
    inside = o[(o.symbol == 'A') & (o['last'] >= t) & (o.origin - pd.Timedelta('59h') < t)]
    assert not len(inside)

def test_overlap_counts_dates():
    o, _ = pick_origins(walks(200, ('A',)), 60, 12, origins=40)
    assert overlap_of(o) >= 3
    o, _ = pick_origins(walks(600, ('A',)), 60, 5)
    assert overlap_of(o) == 0

def test_single_symbol_panel_and_not_judged():
    e = evaluate(Garch(), walks(symbols=tuple('ABCDEF'), n=400), **quick)
    assert {'ic', 'rank_ic'} <= set(e.metrics[(e.metrics.model == 'model') & (e.metrics.scope == 'pooled')].metric)
    assert set(e.metrics.scope) == {'pooled', *'ABCDEF'}
    n = Evaluation.not_judged('the split has no test part')
    assert n.verdict == 'not judged' and 'no test part' in n.sentence and not len(n.metrics)

def test_bad_input():
    with pytest.raises(ConfigError, match='at least 4'): evaluate(LastValue(), walks(), 60, 5, periods=2)
    with pytest.raises(ConfigError, match='baselines is empty'): evaluate(LastValue(), walks(), 60, 5, baselines=[])
    with pytest.raises(DataError, match='touches bars'): evaluate(LastValue(), walks(), 60, 5, used=walks(300))
    with pytest.raises(DataError, match='no origin is possible'): evaluate(LastValue(), walks(50), 60, 5)

def tiny(seed=0):
    import torch
    from kronos_nb.forecast import Forecaster
    from kronos_nb.model.predictor import Kronos
    from kronos_nb.model.tokenizer import KronosTokenizer
    torch.manual_seed(seed)
    none = dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
    t = KronosTokenizer(d_in=6, d_model=16, n_heads=2, ff_dim=32, n_enc_layers=2, n_dec_layers=2, s1_bits=3, s2_bits=3, beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=3, **none)
    return Forecaster(t, Kronos(s1_bits=3, s2_bits=3, n_layers=1, d_model=16, n_heads=2, ff_dim=32, token_dropout_p=0., learn_te=True, **none), max_context=70)

def test_a_forecaster_is_judged_against_its_base(tmp_path):
    how = {**quick, 'temperature': .8, 'top_p': .95}
    e = evaluate(tiny(), walks(), base=tiny(1), out_dir=tmp_path, **how)
    assert e.models == ['model', 'base', 'LastValue'] and e.settings['sampling'] == dict(temperature=.8, top_p=.95)
    assert 'temperature 0.8' in e.to_markdown() and e.verdict in ('helped', 'did not help', 'cannot tell')
    same = evaluate(tiny(), walks(), base=tiny(), **how)
    assert same.tests.loc['base', 'skill'] == 0 and same.verdict != 'helped'
    pd.testing.assert_frame_equal(same.rows[same.rows.model == 'model'], e.rows[e.rows.model == 'model'])

def test_windows_and_training_bars_are_read_off_the_model():
    f, bars = tiny(), walks()
    with pytest.raises(ConfigError, match='lookback_window was not given'): evaluate(f, bars)
    f.predictor.extra.update(lookback_window=60, predict_window=5, trained_on={'A': ['2024-01-01', '2024-01-12'], 'B': ['2024-01-01', '2024-01-12']})
    kw = dict(origins=4, paths=4, progress=False, baselines=[LastValue()])
    with pytest.raises(DataError, match='trained or selected'): evaluate(f, bars, **kw)
    e = evaluate(f, bars, start='2024-01-12 01:00', **kw)
    assert (e.settings['lookback_window'], e.settings['predict_window']) == (60, 5)

def test_fingerprints_tell_weights_apart():
    from kronos_nb.calibrate import Calibrated, Calibration
    from kronos_nb.evaluate import fingerprint
    a, b = tiny(), tiny(1)
    assert fingerprint(a) == fingerprint(tiny()) != fingerprint(b)
    assert fingerprint(Calibrated(a, Calibration((2., 2., 2.), 30, (.3, .5, .7)))) != fingerprint(a)
    assert fingerprint(object()) is None

def test_calibrated_forecaster_from_a_folder(tmp_path):
    from kronos_nb.calibrate import Calibrated, Calibration
    f = tiny()
    f.save_pretrained(tmp_path)
    Calibration((2., 2., 2.), 30, (.3, .5, .7)).save(tmp_path)
    c, past = Calibrated.from_pretrained(tmp_path), walks().head(100)
    wide, plain = (o.predict(past, 4, paths=30, seed=1) for o in (c, f))
    spread = lambda o: np.log(o.paths[..., 3]).std(0)
    np.testing.assert_allclose(spread(wide), 2 * spread(plain), rtol=.1)
    assert c.max_context == f.max_context and 'calibrated' in wide.notes[-1]

def test_a_run_says_why_it_learnt_no_calibration(tmp_path):
    "Too few validation bars, or no bands: one sentence in the report and on the result; with room for it, none"
    from kronos_nb.train import fit
    small = dict(d_model=16, n_heads=2, ff_dim=16, s1_bits=4, s2_bits=4)
    how = {'base.symbols': None, 'data.symbols': None, 'data.lookback_window': 16, 'data.predict_window': 8, 'data.embargo': 0, 'data.windows_per_epoch': 16, 'data.val_windows': 8, 'runtime.progress': False, 'runtime.plots': False,
        'tokenizer.model': small | dict(n_enc_layers=2, n_dec_layers=2, group_size=4), 'predictor.model': small | dict(n_layers=1), 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'evaluate.paths': 4, 'evaluate.origins': 4}
    def said(**settings):
        r = fit(walks(symbols=('A',), n=400), 'quickstart', tmp_path/str(len(list(tmp_path.iterdir()))), **how | settings)
        page, shown = (r.out_dir/'report.md').read_text(), r._repr_markdown_()
        assert (r.calibration is None) == ('No calibration was learnt' in page) == ('No calibration was learnt' in shown)
        return page
    assert 'No calibration was learnt: a calibration needs 20 forecasts of 8 bars one after another, and the validation part has room for fewer' in said()
    assert 'No calibration was learnt: forecasts drawn with temperature 0 have no bands' in said(**{'evaluate.temperature': 0.})
    assert '## Calibration' in said(**{'data.predict_window': 2, 'data.lookback_window': 16})
    assert 'No calibration was learnt: evaluate.calibrate=off' in said(**{'evaluate.calibrate': 'off'})

def test_a_symbol_without_a_test_part_is_left_out():
    bars = walks()
    e = evaluate(LastValue(), bars, 60, 5, origins=16, paths=20, progress=False, baselines=[Garch()], start={'A': bars.timestamps[300]}, used={'A': (bars.timestamps[0], bars.timestamps[299]), 'B': (bars.timestamps[0], bars.timestamps[599])})
    assert e.symbols == ['A'] and list(e.left_out.symbol) == ['B']

def test_a_panel_is_traded_by_rank():
    from kronos_nb.backtest import backtest
    e = evaluate(LastValue(), walks(symbols=tuple('ABCDEF'), n=500), 60, 5, origins=40, paths=20, progress=False, baselines=[Garch()])
    b = backtest(e, 'top_k', 'mean', k=2, cost=.001, slippage=0., delay=1)
    assert (b.periods.invested <= 1 + 1e-9).all() and (b.periods.turnover <= 2 + 1e-9).all() and len(b.periods) <= 40
    np.testing.assert_allclose(b.periods.gross - b.periods.net, .001 * b.periods.turnover)
    with pytest.raises(ConfigError, match='needs at least 8 symbols'): backtest(e, 'top_k', k=4)
    with pytest.raises(ConfigError, match='delay'): backtest(e, delay=5)

def test_overlapping_dates_are_traded_once():
    from kronos_nb.backtest import decisions
    e = evaluate(LastValue(), walks(300, ('A',)), 60, 10, origins=80, paths=5, progress=False, baselines=[Garch()])
    d = decisions(e.rows[e.rows.model == 'model'])
    assert overlap_of(pick_origins(walks(300, ('A',)), 60, 10, origins=80)[0]) > 0
    assert (d.origin.to_numpy()[1:] >= d.end.to_numpy()[:-1]).all()

def test_runs_judged_in_other_steps_are_compared_in_the_same(tmp_path):
    "A run with another lookback measures in other steps; the pair is brought to one"
    from kronos_nb.compare import paired
    bars = walks()
    a = evaluate(LastValue(), bars, 60, 5, origins=16, paths=20, progress=False, baselines=[Garch()], start=bars.timestamps[200])
    b = evaluate(LastValue(), bars, 120, 5, origins=16, paths=20, progress=False, baselines=[Garch()], start=bars.timestamps[200])
    p = paired(a, b)
    assert p['shared'] == 16 and abs(p['skill']) < .3
    raw = [e.rows[e.rows.model == 'model'].eval('crps * scale').mean() for e in (a, b)]
    assert np.sign(p['skill']) == np.sign(raw[0] - raw[1])
