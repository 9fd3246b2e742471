"A ledger of forecasts: idempotent, crash-safe, graded as `evaluate` would, and honest about bars that change"
import multiprocessing
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest

from kronos_nb.cli import main
from kronos_nb.core import ConfigError, DataError, RunError
from kronos_nb.evaluate import evaluate
from kronos_nb.judging.baselines import Drift, GeometricBrownian, LastValue, random_walks
from kronos_nb.ledger import ONE_IN, Ledger, _nominal, evidence, watch
from kronos_nb.schedule import run_once

H, L = 4, 40
NAIVE = [LastValue(), Drift()]
walk = random_walks(200, symbols=('A', 'B'), seed=5)


def forecasts(bars, starts, model=None, horizon=H, paths=20):
    "Return a forecast of each symbol at each start"
    out = []
    for _, g in bars.groupby('symbol'):
        cut = [g.iloc[i - L:i] for i in starts]
        keys = [f'{g.symbol.iloc[0]} {c.timestamps.iloc[-1]}' for c in cut]
        futures = [c.timestamps.iloc[-1] + pd.to_timedelta(np.arange(1, horizon + 1), unit='h') for c in cut]
        out += (model or GeometricBrownian()).predict_many(cut, horizon, keys=keys, futures=futures, paths=paths)
    return out


def filled(folder, starts=range(L, 150, 5)):
    ledger = Ledger(folder)
    ledger.append(forecasts(walk, starts), 'gbm')
    return ledger


def test_a_forecast_is_stored_once(tmp_path):
    ledger, made = Ledger(tmp_path), forecasts(walk, [L, L + 1])
    assert ledger.append(made, 'gbm') == 4
    before = ledger.forecasts
    assert ledger.append(forecasts(walk.assign(close=walk.close*1.1), [L]), 'gbm') == 0   # the first one stays
    pd.testing.assert_frame_equal(ledger.forecasts, before)
    assert ledger.append(made, 'another') == 4


def test_grades_are_those_of_evaluate(tmp_path):
    e = evaluate(GeometricBrownian(), walk, L, H, origins=8, baselines=NAIVE, paths=20, progress=False)
    ledger = Ledger(tmp_path)
    at = e.rows.groupby(['symbol', 'origin'], as_index=False).size()
    groups = {s: g.reset_index(drop=True) for s, g in walk.groupby('symbol')}
    for o in at.itertuples():
        g = groups[o.symbol]
        ledger.append(forecasts(g, [int((g.timestamps <= o.origin).sum())]), 'gbm')
    ledger.grade(walk, NAIVE)
    key = ['model', 'symbol', 'origin', 'h']
    ours, theirs = (o.sort_values(key).reset_index(drop=True) for o in (ledger.grades, e.rows))
    assert len(ours) == len(theirs)
    for c in key:
        assert (ours[c].to_numpy() == theirs[c].to_numpy()).all()
    for c in ('crps', 'pit', 'q10', 'q90', 'y', 'p_up'):
        np.testing.assert_allclose(ours[c], theirs[c], rtol=1e-4, atol=1e-6)
    report = ledger.report()
    pd.testing.assert_frame_equal(report.evaluation.tests, e.tests, rtol=1e-4)


def test_the_future_does_not_reach_a_naive_forecast(tmp_path):
    "Bars that the model had seen and that are corrected later move no naive forecast"
    a, b = filled(tmp_path/'a'), filled(tmp_path/'b')
    a.grade(walk, NAIVE)
    seen = walk.timestamps < walk.timestamps.iloc[L - 1]
    b.grade(walk.assign(close=walk.close.where(~seen, 1.)), NAIVE)
    pd.testing.assert_frame_equal(a.grades.drop(columns='made'), b.grades.drop(columns='made'))


def test_missing_late_and_corrected_bars(tmp_path):
    ledger = filled(tmp_path, [L])
    hole = walk.drop(index=[L + 1])   # of A
    found = ledger.grade(hole, NAIVE)
    assert (found.graded, found.missing, found.late) == (2, 1, 0)
    assert ledger.report().evaluation.rows.query("symbol == 'A' and model == 'model'")['h'].tolist() == [1, 3, 4]
    found = ledger.grade(walk, NAIVE)
    assert (found.graded, found.late, found.corrected) == (0, 1, 0)
    other = walk.copy()
    other.loc[L + 2, 'close'] *= 1.02
    found = ledger.grade(other, NAIVE)
    assert (found.late, found.corrected) == (0, 1)
    row = ledger.grades.query("symbol == 'A' and h == 3 and model == 'model'").iloc[0]
    assert (row.y, row.y_first, row.revised) == (other.close[L + 2], walk.close[L + 2], 1)
    whole = filled(tmp_path/'whole', [L])
    whole.grade(other, NAIVE)   # what the corrected bars would have given at once
    order = ['model', 'symbol', 'h']
    ours, theirs = (o.grades.sort_values(order)['crps'].to_numpy() for o in (ledger, whole))
    np.testing.assert_array_equal(ours, theirs)


def test_a_correction_of_the_last_close_is_said(tmp_path):
    ledger = filled(tmp_path, [L])
    other = walk.copy()
    other.loc[L - 1, 'close'] *= 1.01
    assert ledger.grade(other, NAIVE).moved == [('A', walk.timestamps[L - 1])]


def test_later_bars_do_not_forget_earlier_ones(tmp_path):
    "A source that hands out the newest bars alone does not make old ones missing"
    ledger = filled(tmp_path, [L])
    ledger.grade(walk, NAIVE)
    before = ledger.grades
    ledger.grade(walk[walk.timestamps > walk.timestamps.iloc[L + 1]], NAIVE)
    pd.testing.assert_frame_equal(ledger.grades, before)


def test_bars_that_are_not_over_are_no_outcome(tmp_path):
    ledger = filled(tmp_path, [L])
    last = walk.timestamps[L + H - 1]
    assert ledger.grade(walk, NAIVE, now=last + pd.Timedelta('59min')).open == 2
    assert ledger.grade(walk, NAIVE, now=last + pd.Timedelta('60min')).graded == 2


def test_bars_that_occur_twice(tmp_path):
    ledger = filled(tmp_path, [L])
    assert ledger.grade(pd.concat([walk, walk.tail(3)]), NAIVE).repeated == 3
    with pytest.raises(DataError, match='B at 2024'):
        ledger.grade(pd.concat([walk, walk.tail(1).assign(close=1.)]), NAIVE)


@pytest.mark.parametrize('spoil, error', [
    (lambda f: f.paths.__setitem__((0, 1, 3), np.inf), DataError), (lambda f: setattr(f, 'symbol', ''), DataError),
    (lambda f: setattr(f, 'history', f.history[-4:]), DataError),
    (lambda f: setattr(f, 'timestamps', f.timestamps[::-1]), DataError),
    (lambda f: setattr(f, 'timestamps', f.timestamps - pd.Timedelta('9h')), DataError)])
def test_a_forecast_that_cannot_be_graded_is_refused(tmp_path, spoil, error):
    f, = forecasts(walk[walk.symbol == 'A'], [L])
    spoil(f)
    with pytest.raises(error):
        Ledger(tmp_path).append(f, 'gbm')
    assert not Ledger(tmp_path)._days('forecasts')


def test_what_is_no_forecast_or_has_no_name(tmp_path):
    with pytest.raises(ConfigError):
        Ledger(tmp_path).append([1], 'gbm')
    with pytest.raises(ConfigError, match='model='):
        Ledger(tmp_path).append(forecasts(walk, [L]), object())


def append_for_ever(folder):
    ledger, i = Ledger(folder), L
    while True:
        ledger.append(forecasts(walk, [i], paths=200), 'gbm')
        i = L + (i + 1 - L) % 100


def test_a_killed_writer_loses_nothing(tmp_path):
    "Killed at any moment, the ledger reads, keeps what it had, and takes the rest"
    known = set()
    for k in range(4):
        p = multiprocessing.get_context('fork').Process(target=append_for_ever, args=(tmp_path,))
        p.start()
        time.sleep(.4 + .13*k)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        now = set(Ledger(tmp_path).forecasts['key'])
        assert known <= now
        known = now
    ledger = Ledger(tmp_path)
    ledger.append(forecasts(walk, range(L, L + 100), paths=200), 'gbm')
    assert (ledger.forecasts.groupby('key').size() == H).all() and ledger.forecasts['key'].nunique() == 200
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_damaged_file_is_named(tmp_path):
    ledger = filled(tmp_path)
    file = ledger._file('forecasts', ledger._days('forecasts')[0])
    file.write_bytes(file.read_bytes()[:-20])
    for use in (lambda: ledger.forecasts, lambda: ledger.grade(walk), lambda: filled(tmp_path)):
        with pytest.raises(RunError, match=file.name):
            use()


def test_evidence_is_a_fair_bet():
    "By hand: one coin, a loss of half the stake, the next coin, and so on"
    got = evidence([0, 1], .5, sides=(1,))
    bets = 2*np.array([.1, .25, .5, .8])
    first = 1 - .5*bets
    np.testing.assert_allclose(got, [first.mean(), ((1 + first)*(1 + .5*bets)).mean()])
    rng = np.random.default_rng(0)
    ends = [evidence((rng.random(50) < .8), .8)[-1] for _ in range(400)]
    assert np.mean(ends) < 50 + 4*np.std(ends)/20   # on average no more than a coin per date


def test_alarms(tmp_path):
    class Narrow(GeometricBrownian):
        def returns(self, r, size, rngs, bars): return .4*super().returns(r, size, rngs, bars)
    class Wrong(GeometricBrownian):
        def returns(self, r, size, rngs, bars): return .02 + super().returns(r, size, rngs, bars)
    bars = random_walks(L + 70*H, seed=1)
    verdicts = {}
    for model in (GeometricBrownian(), Narrow(), Wrong()):
        ledger = Ledger(tmp_path/model.name)
        ledger.append(forecasts(bars, range(L, len(bars) - H + 1, H), model), model)
        ledger.grade(bars, NAIVE)
        verdicts[model.name] = ledger.report().verdict
        assert ledger.report()._repr_markdown_()
    assert verdicts == dict(GeometricBrownian='no alarm', Narrow='recalibrate', Wrong='stop trusting')


def test_only_dates_that_share_no_bars_are_watched(tmp_path):
    ledger = filled(tmp_path, range(L, 80))
    ledger.grade(walk, NAIVE)
    assert len(watch(ledger.grades, 20)) == 10
    assert 0 < _nominal(5) < _nominal(100) < .75 + 1e-9 and ONE_IN >= 1000


def test_one_date_is_enough_to_report(tmp_path):
    ledger = filled(tmp_path, [L])
    ledger.grade(walk, NAIVE)
    assert ledger.report().verdict == 'no alarm' and ledger.to_markdown() and ledger.report().plot()


def test_a_turn_twice_and_after_a_pause(tmp_path):
    model = GeometricBrownian()
    class Model:
        fingerprint = 'gbm'
        def predict_many(self, histories, predict_window, *, lookback_window=None, calendar=None, progress=None, **how):
            return model.predict_many([h.iloc[-L:] for h in histories], predict_window, **how)
    def at(i): return run_once(Model(), walk.groupby('symbol').head(i), tmp_path, H, baselines=NAIVE,
                               now=walk.timestamps[i - 1] + pd.Timedelta('1h'), paths=20)
    first = at(60)
    assert (first.new, first.graded, first.report) == (2, None, None)
    again = at(60)
    assert (again.new, again.graded.graded, again.graded.open) == (0, 0, 2) and 'No new bar' in str(again)
    late = at(90)
    assert (late.new, late.graded.graded, late.report.facts.forecasts) == (2, 2, 4)
    assert Ledger(tmp_path).series['replayed'].sum() == 0
    with pytest.raises(DataError):
        run_once(Model(), walk, tmp_path, H, now='2020-01-01')
    with pytest.raises(DataError, match='symbol'):
        run_once(Model(), walk.drop(columns='symbol'), tmp_path, H)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk[walk.symbol == 'A'].iloc[:150].to_parquet('bars.parquet')
    options = '--model bundled --ledger book --lookback-window 40 --predict-window 4 --paths 8 --calendar 24/7'.split()
    for _ in range(2):
        assert main(['run', 'bars.parquet', *options]) == 0
    assert len(Ledger('book').pending) == 1
    walk[walk.symbol == 'A'].to_csv('later.csv', index=False)
    assert main(['ledger', 'grade', 'later.csv', '--ledger', 'book']) == 0
    assert main(['ledger', 'show', '--ledger', 'book', '--out', 'shown']) == 0
    assert '1 forecast graded' in capsys.readouterr().out
    assert len(list((tmp_path/'shown').iterdir())) == 2


@pytest.mark.parametrize('argv', [
    'ledger grade', 'ledger grade bars.csv --ledger none', 'ledger show --series abc', 'run --fetch BTCUSDT',
    'run bars.csv --fetch BTCUSDT --interval 1h', 'run --fetch BTCUSDT --interval hourly --model bundled',
    'run nothing.csv', 'run bars.csv --model nowhere', 'run bars.csv --model bundled --paths 0'])
def test_wrong_use_is_one_error_and_one_command(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    walk[walk.symbol == 'A'].to_csv('bars.csv', index=False)
    assert main(argv.split()) == 2
    said = capsys.readouterr().err
    assert 'Error: ' in said and '\nTry: kronos-nb' in said and 'Traceback' not in said
    assert not list(tmp_path.rglob('*.parquet'))


def test_an_empty_ledger_says_so(tmp_path, capsys):
    assert main(['ledger', 'show', '--ledger', str(tmp_path)]) == 0
    assert 'no forecasts' in capsys.readouterr().out


def test_one_series_whatever_the_numbers_of_a_forecast(tmp_path):
    "A share of repaired candles or a shift belongs to one forecast; another seed or anchor is another series"
    ledger, made = Ledger(tmp_path), forecasts(walk, [L, L + 1, L + 2])
    for i, f in enumerate(made):
        f.settings |= dict(repaired=.1*i, shift=.3*i, something_new=i, anchor=True)
    ledger.append(made, 'gbm')
    assert len(ledger.series) == 1
    made[0].settings['anchor'] = False
    assert ledger.append(made[:1], 'gbm') == 1 and len(ledger.series) == 2
