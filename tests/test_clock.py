"Scales in any unit, closures, the calendar ahead, the clock of the market, and splits of a panel by date"
import json

import numpy as np
import pandas as pd
import pytest

from kronos_nb.config import Config
from kronos_nb.core import DataError, seed_everything
from kronos_nb.data.calendar import future_stamps
from kronos_nb.data.check import check_klines, find_gaps, interval_changes
from kronos_nb.data.normalize import MedianMAD, ZScore
from kronos_nb.data.parse import time_stamps
from kronos_nb.data.read import sample_klines
from kronos_nb.data.window import WindowDataset, segments, split_by_time
from kronos_nb.evaluate import evaluate
from kronos_nb.fitting.prepare import prepare
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import LastValue, random_walks
from kronos_nb.judging.leaks import check_leaks, leak_splits
from kronos_nb.judging.origins import check_untouched, pick_origins
from kronos_nb.train import fit
from kronos_nb.training.task import build_model
from kronos_nb.training.learner import NOTE_KINDS
from tests.helpers import bars as small_bars
from tests.helpers import cfg as small_cfg
from tests.helpers import one_epoch

PRICED = ['open', 'high', 'low', 'close', 'amount']
NEW_YORK = 'America/New_York'


def in_unit(bars, unit):
    "Return bars whose prices are `unit` times as large"
    return bars.assign(**{c: bars[c] * unit for c in PRICED})


def to_utc(t):
    return t.tz_convert('UTC').tz_localize(None)


# Scales


@pytest.fixture(scope='module')
def released():
    "A forecaster whose models record no normaliser, as released weights do"
    seed_everything(0)
    models = [build_model(stage, 'scratch', 'tiny').eval() for stage in ('tokenizer', 'predictor')]
    return Forecaster(*models, lookback_window=60)


@pytest.mark.parametrize('unit', [1e-10, 1e-7, 1e-3, 1e6])
@pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
def test_a_scale_is_the_same_share_of_the_price_in_any_unit(norm, unit):
    x = random_walks(200)[['open', 'high', 'low', 'close']].to_numpy()
    one, other = norm.fit(x, 100), norm.fit(x * unit, 100)
    np.testing.assert_allclose(other.scale, one.scale * unit, rtol=.0101)
    np.testing.assert_allclose(other.encode(x * unit), one.encode(x), atol=.051)


def test_the_fan_of_a_cheap_coin_is_that_of_a_dear_one(released):
    walk = random_walks(200, sd=.005)
    def width(bars):
        q = released.predict(bars, 5, paths=100).quantile([.05, .95], 'close').iloc[-1]
        return np.ptp(q) / bars.close.iloc[-1]
    shares = [width(in_unit(walk, unit)) for unit in (1e-10, 1e-7, 1, 1e6)]
    np.testing.assert_allclose(shares, shares[2], rtol=.1)   # one percent of a sigma may flip a bit of a token
    np.testing.assert_allclose(shares[3], shares[2], rtol=1e-3)


def test_who_leaves_the_reference_says_so(released):
    walk = random_walks(200, freq='D')
    cheap = in_unit(walk, 1e-7)
    assert not released.predict(walk, 1, paths=2).notes
    assert 'close' in released.predict(cheap, 1, paths=2).notes[0]
    assert set(check_klines(cheap).issues['rule']) == {'small_unit'}
    assert check_klines(walk).issues.empty


def test_at_ordinary_prices_the_reference_is_kept_to_the_bit():
    x = sample_klines('GOOG')[['open', 'high', 'low', 'close', 'volume', 'amount']].to_numpy()
    past = x[:90]
    norm = ZScore()
    np.testing.assert_allclose(norm.fit(x, 90).scale, past.std(0) + 1e-5, rtol=1e-15)
    for start, _, scale in norm.rolling(x, 90):
        std = np.lib.stride_tricks.sliding_window_view(x, 90, axis=0)[start:start + len(scale)].std(-1)
        np.testing.assert_allclose(scale, std + 1e-5, rtol=1e-12)


@pytest.mark.parametrize('level', [0., 1e-8, 5., 1e8])
@pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
def test_what_never_moves_stays_where_it_is(norm, level):
    s = norm.fit(np.full((50, 1), level), 50)
    assert (s.encode(np.full((5, 1), level)) == 0).all()
    assert abs(s.decode(np.full((1, 1), 5.)) - level).item() <= 5.1e-5 * max(level, 1 if level == 0 else level)


# Gaps


def session(freq, start, stop, zone=NEW_YORK, year=('2023-06-01', '2024-06-01'), days=5):
    t = pd.date_range(*year, freq=freq, tz=zone)
    minute = t.hour * 60 + t.minute
    return to_utc(t[(t.day_of_week < days) & (minute >= start) & (minute < stop)])


MARKETS = dict(
    share_5min=session('5min', 570, 960), share_30min=session('30min', 570, 960),
    coin_1h=session('h', 0, 1440, 'UTC', days=7),
    coin_daily=pd.date_range('2022-01-01', periods=600), share_daily=pd.bdate_range('2022-01-03', periods=600),
    hourly_workdays=session('h', 0, 1440), lunch=session('30min', 570, 690, 'Asia/Shanghai').union(
        session('30min', 780, 900, 'Asia/Shanghai')))


@pytest.mark.parametrize('name', MARKETS)
def test_closures_are_no_gaps(name):
    t = MARKETS[name]
    assert not len(find_gaps(t)) and not len(interval_changes(t))


@pytest.mark.parametrize('name, cut', [(n, n) for n in MARKETS if not n.endswith('daily')])
def test_a_hole_inside_a_session_is_a_gap(name, cut):
    t = MARKETS[name]
    inside = np.flatnonzero(np.diff(t) == np.diff(t).min())
    inside = inside[np.isin(inside + 2, inside)]   # two bars on, still in the same session
    for i in inside[[len(inside) // 4, len(inside) // 2, len(inside) * 3 // 4]]:
        assert find_gaps(t.delete(i + 1)).tolist() == [i + 1], t[i]


def test_an_outage_that_recurs_is_a_gap_each_time():
    t = pd.date_range('2024-09-01', periods=40 * 1440, freq='min')
    night = (t.hour == 23) & (t.day_of_year % 2 == 0)
    assert len(find_gaps(t[~night])) == 19   # the last night is the end of the bars
    days = pd.date_range('2024-01-01', periods=200)
    lost = days.delete([20, 41, 60, 61, 83, 104, 125, 146, 166, 187])
    assert len(find_gaps(lost)) == 9   # two days in a row are one gap
    assert len(find_gaps(MARKETS['share_daily'].delete([50, 51, 120]))) == 0   # may be holidays, and no stamp tells


def test_windows_check_and_gaps_agree():
    t = pd.date_range('2024-09-01', periods=500, freq='h').delete([100, 101, 102, 300, 301])
    walk = random_walks(len(t)).assign(timestamps=t)
    gaps = find_gaps(t)
    assert [s for s, _ in segments(walk)] == [0, *gaps]
    issue = check_klines(walk).issues.set_index('rule').loc['gap']
    assert issue['count'] == len(gaps) == 2 and issue['first'] == list(t[gaps - 1])


def test_two_intervals_in_one_symbol_are_found_and_cut():
    days, hours = pd.date_range('2023-01-01', periods=300), pd.date_range('2023-10-28', periods=1500, freq='h')
    walk = random_walks(1800).assign(timestamps=days.append(hours))
    issue = check_klines(walk).issues.set_index('rule').loc['mixed_intervals']
    assert issue['count'] == 1 and issue['first'] == [hours[0]]
    assert segments(walk).tolist() == [[0, 300], [300, 1800]]
    steps = np.diff(WindowDataset(walk, 20, 5).timestamps)
    assert len(np.unique(steps)) == 2


# The calendar ahead


@pytest.mark.parametrize('last, due', [
    ('2024-05-31', ['2024-06-03', '2024-06-04', '2024-06-05']),   # a Monday holiday the week before
    ('2024-07-05', ['2024-07-08', '2024-07-09', '2024-07-10'])])  # a Thursday holiday the day before
def test_one_holiday_closes_nothing(last, due):
    t = pd.bdate_range('2023-06-01', last).difference(pd.to_datetime(['2024-05-27', '2024-07-04']))
    for bars in (60, 250): assert list(future_stamps(t[-bars:], 3)[0]) == list(pd.to_datetime(due))


@pytest.mark.parametrize('times', [('10:30', '11:30', '14:00', '15:00'), ('11:30', '15:00'), ('12:00',),
                                   ('09:30', '10:30', '11:30', '12:30', '13:30', '14:30', '15:30')])
def test_few_bars_a_day(times):
    days = pd.bdate_range('2024-01-01', '2024-04-01')
    t = pd.DatetimeIndex([pd.Timestamp(f'{d:%Y-%m-%d} {clock}') for d in days for clock in times])
    for i in range(60, len(t) - 4, 3): assert (future_stamps(t[i - 60:i], 4)[0] == t[i:i + 4]).all(), t[i]


@pytest.mark.parametrize('year', [('2024-02-05', '2024-04-05'), ('2024-10-01', '2024-12-01')])
def test_hours_are_those_of_the_market_when_clocks_change(year):
    for t in (session('30min', 570, 960, year=year), session('h', 0, 1440, year=year)):
        for i in range(260, len(t) - 30, 7):
            got, note = future_stamps(t[i - 260:i], 30, tz=NEW_YORK)
            assert (got == t[i:i + 30]).all() and not note, t[i - 1]


def test_a_market_that_never_closes_keeps_its_pace_over_a_hole_and_a_change_of_clocks():
    t = pd.date_range('2024-03-01', periods=500, freq='h')
    held = t.delete(range(200, 230))
    assert (future_stamps(held, 500, tz='Europe/Berlin')[0] == t[-1] + pd.to_timedelta(np.arange(1, 501), 'h')).all()
    friday = pd.date_range('2024-03-04', periods=110, freq='h').delete(range(40, 52))   # no weekend yet, a hole
    assert future_stamps(friday, 24)[0][-1] == friday[-1] + pd.Timedelta('24h')


@pytest.mark.parametrize('begin, bars', [('2001-01-05 01:00', 24), ('2024-03-01 06:00', 40), ('2024-03-08', 30)])
def test_a_short_history_without_a_break_keeps_its_pace(begin, bars):
    "From Friday into the weekend: no closing was seen, so none is expected"
    t = pd.date_range(begin, periods=bars, freq='h')
    assert (future_stamps(t, 48)[0] == t[-1] + pd.to_timedelta(np.arange(1, 49), 'h')).all()


@pytest.mark.parametrize('rule', ['BME', 'ME', 'MS', 'BMS'])
def test_months_whose_session_was_moved_by_a_holiday(rule):
    due = pd.date_range('2022-01-01', '2024-12-31', freq=rule)
    t = due[:27]
    moved = t[:-1].append(t[-1:] + pd.Timedelta(-1 if 'E' in rule else 1, 'D'))   # the last one is off by a day
    got, note = future_stamps(moved, 5)
    assert list(got) == list(due[27:32]) and note
    assert future_stamps(t, 5)[1] == ''


def test_weeks_whose_friday_was_a_holiday():
    t = pd.date_range('2023-01-06', periods=60, freq='7D')
    moved = t[:-1].append(t[-1:] - pd.Timedelta('1D'))
    assert list(future_stamps(moved, 3)[0]) == list(t[-1] + pd.to_timedelta([7, 14, 21], 'D'))


def test_exchange_calendar_in_either_zone():
    ec = pytest.importorskip('exchange_calendars')
    days = ec.get_calendar('XSHG', start='2023-01-01', end='2024-12-31').sessions.tz_localize(None)
    midnight = to_utc(days.tz_localize('Asia/Shanghai'))   # 16:00 of the day before
    close = to_utc((days + pd.Timedelta('15h')).tz_localize('Asia/Shanghai'))
    i = int(np.flatnonzero(days > '2024-02-08')[0])        # the new year's holiday follows
    for t in (days, midnight, close):
        assert list(future_stamps(t[:i], 10, 'XSHG')[0]) == list(t[i:i + 10])
    us = ec.get_calendar('XNYS', start='2022-01-01', end='2024-12-31').sessions.tz_localize(None)
    ends = us[np.r_[us[1:].month != us[:-1].month, True]]
    j = int(np.flatnonzero(ends == '2024-03-28')[0])
    assert list(future_stamps(ends[:j], 3, 'XNYS')[0]) == list(ends[j:j + 3])


# The market's clock


def test_stamps_are_those_of_the_exchange_in_every_place():
    bars = sample_klines('ASHARE_5MIN').head(400)
    data = WindowDataset(bars, 60, 10, market_tz='Asia/Shanghai')
    local = pd.DatetimeIndex(bars.timestamps).tz_localize('UTC').tz_convert('Asia/Shanghai')
    assert (data.stamps == time_stamps(local.tz_localize(None))).all()
    assert set(data.stamps[:, 1]) == {9, 10, 11, 13, 14, 15} != set(WindowDataset(bars, 60, 10).stamps[:, 1])
    two = pd.concat([bars, sample_klines('IBM').head(100)], ignore_index=True)
    assert (WindowDataset(two, 60, 10, market_tz='Asia/Shanghai').stamps[:400] == data.stamps).all()
    assert WindowDataset(two, 60, 10, market_tz='Asia/Shanghai').stamps[400:, 1].max() == 0   # dates stay dates


def test_the_zone_goes_from_the_settings_into_the_model_and_back(tmp_path, one_epoch_zoned):
    kept = json.loads((one_epoch_zoned/'predictor'/'best_model'/'config.json').read_text())
    assert kept['market_tz'] == NEW_YORK and kept['split'] == 'date'
    f = Forecaster.from_pretrained(one_epoch_zoned)
    assert f.market_tz == NEW_YORK
    assert Forecaster(f.tokenizer, f.predictors, market_tz='UTC').market_tz == 'UTC'
    saved = Forecaster.from_pretrained(f.save_pretrained(tmp_path/'saved'))
    utc = Forecaster(f.tokenizer, f.predictors, market_tz='UTC')
    a, b, c = (o.predict(sample_klines('ASHARE_5MIN'), 4, paths=9).paths for o in (f, saved, utc))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.fixture(scope='module')
def one_epoch_zoned(tmp_path_factory):
    changes = one_epoch | {'data.market_tz': NEW_YORK}
    folder = tmp_path_factory.mktemp('zoned')/'run'
    fit(small_bars, small_cfg.replace(**changes), folder)
    return folder


def test_what_only_judges_may_change(one_epoch_zoned):
    changes = one_epoch | {'data.market_tz': NEW_YORK, 'evaluate.paths': 7}
    again = fit(small_bars, small_cfg.replace(**changes), one_epoch_zoned)
    assert again.config.evaluate.paths == 7 and not again.interrupted


# Panels


def panel():
    walk = random_walks(900, ('OLD', 'YOUNG', 'LONG'))
    t = walk.timestamps
    first, last = t.min() + (t.max() - t.min()) * .55, t.min() + (t.max() - t.min()) * .6
    keep = ((walk.symbol == 'OLD') & (t < last)) | ((walk.symbol == 'YOUNG') & (t > first)) | (walk.symbol == 'LONG')
    return walk[keep].reset_index(drop=True)


def test_no_symbol_trains_after_another_is_judged():
    bars = panel()
    split = split_by_time(bars)
    ends = [getattr(split, part).timestamps.agg(['min', 'max']) for part in ('train', 'val', 'test')]
    assert all(a['max'] < b['min'] for a, b in zip(ends, ends[1:]))
    assert leak_splits(split)[0] == 0 < leak_splits(split_by_time(bars, by='symbol'))[0]
    assert split.absent['test'] == ['OLD']


def test_one_symbol_and_symbols_of_one_length_are_cut_as_ever():
    one = random_walks(777)
    assert split_by_time(one, embargo=3).rows == split_by_time(one, embargo=3, by='symbol').rows
    same = random_walks(333, ('A', 'B', 'C'))
    assert split_by_time(same).rows == split_by_time(same, by='symbol').rows


SETTINGS = {'base.symbols': None, 'data.symbols': None, 'data.lookback_window': 30, 'data.predict_window': 5}


def test_old_young_and_tiny_symbols_are_named_and_stop_nobody():
    bars = pd.concat([panel(), random_walks(1, ('TINY',))], ignore_index=True)
    p = prepare(bars, Config.preset('quickstart', **SETTINGS))
    texts = {(o['kind'], o.get('part')): o['text'] for o in p.notes}
    assert 'TINY' in texts['left_out', None] and 'OLD' in texts['absent', 'test']
    assert {o['kind'] for o in p.notes} <= set(NOTE_KINDS)   # what a fit writes down
    assert set(p.bars.symbol) == {'OLD', 'YOUNG', 'LONG'} and p.report.ok
    assert 'TINY' in p.report.to_markdown()
    by_symbol = prepare(panel(), Config.preset('quickstart', **SETTINGS, **{'data.split': 'symbol'}))
    assert [o['kind'] for o in by_symbol.notes] == ['split'] and 'split' in NOTE_KINDS


def test_a_lookback_beyond_the_context_is_noted(released):
    p = prepare(random_walks(900), Config.preset('quickstart', **SETTINGS, **{'data.max_context': 20}))
    assert [o['kind'] for o in p.notes] == ['context'] and 'context' in NOTE_KINDS
    short = Forecaster(released.tokenizer, released.predictors, max_context=20, lookback_window=60)
    assert '20' in short.predict(random_walks(100), 2, paths=2).notes[0]


def test_days_that_trained_one_symbol_judge_no_other():
    bars = random_walks(900, ('A', 'B'))
    origins, _ = pick_origins(bars[bars.symbol == 'B'], 50, 10, origins=16)
    used = {'A': (bars.timestamps.min(), bars.timestamps[500])}
    with pytest.raises(DataError, match='start='): check_untouched(origins, used)
    check_untouched(origins, used, across=False)
    with pytest.raises(DataError, match='A'):
        evaluate(LastValue(), bars[bars.symbol == 'B'], 50, 10, used=used, origins=8, paths=4, progress=False)


def test_the_leak_check_looks_across_symbols():
    bars = panel()
    assert 'splits' not in check_leaks(bars=bars, lookback_window=30, predict_window=5).found
    report = check_leaks(bars=bars, lookback_window=30, predict_window=5, splits=split_by_time(bars, by='symbol'))
    assert report.found == ['splits']


# Prices that may be negative


def spread(symbol='SPREAD', n=900):
    "Bars of a spread that crosses zero"
    walk, r = random_walks(n, (symbol,)), np.random.default_rng(0)
    close = r.normal(size=n).cumsum() * .3
    opens = np.r_[0., close[:-1]]
    high, low = np.maximum(opens, close) + .1, np.minimum(opens, close) - .1
    return walk.assign(open=opens, high=high, low=low, close=close)


def test_negative_prices_are_judged_where_they_are_allowed(released):
    bars = spread()
    assert (bars.close < 0).any() and not check_klines(bars).ok
    p = prepare(bars, Config.preset('quickstart', **SETTINGS, **{'data.allow_negative_prices': True}))
    assert p.report.ok and np.isfinite(p.train.arrays(range(50))[0].numpy()).all()
    with pytest.raises(DataError, match='above 0'): evaluate(released, bars, 50, 5, paths=20, origins=8, progress=False)
    released.predictor.extra['negative_prices'] = True
    try: e = evaluate(released, bars, 50, 5, paths=20, origins=8, progress=False)
    finally: del released.predictor.extra['negative_prices']
    table = e.metrics.select_dtypes('number')
    assert np.isfinite(table.drop(columns=[c for c in table if c.startswith(('ic', 'rank'))])).all(axis=None)
    assert isinstance(e.sentence, str)
