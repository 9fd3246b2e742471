"A turn with several symbols: one that fails ends nothing for the others, is named with its error, and is tried again"
import numpy as np
import pandas as pd
import pytest

from kronos_nb import schedule
from kronos_nb.cli import main
from kronos_nb.core import ConfigError, DataError, RunError
from kronos_nb.judging.baselines import GeometricBrownian, LastValue, random_walks
from kronos_nb.ledger import Ledger
from kronos_nb.schedule import fetch_new, read_each, run_once

H, L, N = 4, 40, 60
walk = random_walks(200, symbols=('A', 'B', 'C'), seed=5)
OPTIONS = '--model bundled --ledger book --lookback-window 40 --predict-window 4 --paths 8 --calendar 24/7'.split()


class Model:
    "A forecaster that checks bars as `Forecaster` does"
    fingerprint = 'gbm'
    def predict_many(self, histories, predict_window, *, lookback_window=None, calendar=None, progress=None, **how):
        for h in histories:
            if not np.isfinite(h['close'].iloc[-L:]).all(): raise DataError(f'{h.symbol.iloc[0]}: close is nan')
        futures = [h.timestamps.iloc[-1] + pd.to_timedelta(range(1, predict_window + 1), unit='h') for h in histories]
        histories = [h.iloc[-L:] for h in histories]
        return GeometricBrownian().predict_many(histories, predict_window, futures=futures, **how)


def turn(folder, bars, i=N, **how):
    return run_once(Model(), bars, folder, H, baselines=[LastValue()], paths=20,
                    now=walk.timestamps[i - 1] + pd.Timedelta('1h'), **how)


def until(i, symbols='ABC'): return walk[walk.symbol.isin(list(symbols))].groupby('symbol').head(i)


def content(folder, symbols):
    ledger, key = Ledger(folder), ['key', 'h']
    f, g = (o[o['symbol'].isin(list(symbols))].drop(columns='made') for o in (ledger.forecasts, ledger.grades))
    return f.sort_values(key, ignore_index=True), g.sort_values([*key, 'model'], ignore_index=True)


def spoilt(bars, how):
    "Return bars in which those of B are damaged"
    b, last = bars.symbol == 'B', bars.index[bars.symbol == 'B'][-1]
    if how == 'a close that is no number': return bars.assign(close=bars.close.mask(bars.index == last))
    if how == 'one moment, two closes': return pd.concat([bars, bars.loc[[last]].assign(close=1.)])
    if how == 'one bar': return bars[~b | (bars.index == last)]
    if how == 'four bars': return bars[~b | (bars.index > last - 4)]
    return bars[~b | (bars.timestamps > '2024-01-03 11:00')]   # none is over


@pytest.mark.parametrize('how', ['a close that is no number', 'one moment, two closes', 'one bar', 'four bars',
                                 'none is over'])
def test_damaged_bars_of_one_symbol(tmp_path, how):
    for folder, symbols in (('all', 'ABC'), ('two', 'AC')): turn(tmp_path/folder, until(N, symbols))
    bars = spoilt(until(N + H) if how != 'none is over' else until(N + H + 2), how)
    done = turn(tmp_path/'all', bars, N + H)
    assert list(done.failed) == ['B'] and isinstance(done.failed['B'], DataError)
    assert sorted(done.forecasts) == ['A', 'C'] and done.new == 2 and 'B failed: DataError: ' in str(done)
    turn(tmp_path/'two', until(N + H, 'AC'), N + H)
    for got, wanted in zip(content(tmp_path/'all', 'AC'), content(tmp_path/'two', 'AC')):   # as if B were not there
        pd.testing.assert_frame_equal(got, wanted.assign(series=got['series']))
    again = turn(tmp_path/'all', bars, N + H)
    assert (again.new, again.graded.graded, list(again.failed)) == (0, 0, ['B'])
    mended = turn(tmp_path/'all', until(N + H), N + H)
    assert (mended.new, mended.failed) == (1, {}) and len(Ledger(tmp_path/'all').pending) == 3


def test_where_all_fail_it_is_an_error(tmp_path):
    bars = until(N).assign(close=np.nan)
    with pytest.raises(DataError, match='A.*B.*C'): turn(tmp_path, bars)
    with pytest.raises(RunError, match='A.*N'):   # of different kinds
        turn(tmp_path, bars[bars.symbol == 'A'], failed=dict(N=RunError('gone')))
    with pytest.raises(DataError, match='A'): turn(tmp_path, bars[bars.symbol == 'A'])
    with pytest.raises(ConfigError, match='paths'):   # no symbol is at fault
        run_once(Model(), until(N), tmp_path, H, paths=0)
    assert not Ledger(tmp_path)._days('forecasts')


def test_bars_without_a_symbol_are_not_dropped(tmp_path):
    with pytest.raises(DataError): turn(tmp_path, until(0))
    with pytest.raises(DataError, match='symbol'):
        turn(tmp_path, until(N).assign(symbol=lambda d: d.symbol.where(d.symbol != 'B')))


@pytest.fixture
def asked(monkeypatch):
    "Return what is asked of a source that does not know C"
    starts = {}
    def fetch_klines(symbol, interval, start, end, source):
        starts[symbol] = start
        if symbol == 'C': raise RunError('C is not known')
        return walk[walk.symbol == symbol]
    monkeypatch.setattr(schedule, 'fetch_klines', fetch_klines)
    return starts


def test_a_symbol_that_cannot_be_fetched(tmp_path, asked):
    now = walk.timestamps.iloc[199]
    bars, failed = fetch_new(['A', 'C', 'B', 'A'], '1h', Ledger(tmp_path), 2, now=now)
    assert set(bars.symbol) == {'A', 'B'} and len(bars) == 400 and list(failed) == ['C']
    assert set(asked.values()) == {now - pd.Timedelta('10h')}
    with pytest.raises(RunError, match='C is not known'): fetch_new(['C'], '1h', Ledger(tmp_path), 2, now=now)
    done = turn(tmp_path, bars, failed=failed)
    assert sorted(done.forecasts) == ['A', 'B'] and list(done.failed) == ['C']


def test_each_symbol_is_fetched_from_its_own_open_forecast(tmp_path, asked):
    "One that is no longer fetched, or whose bars never came, does not make the others download more and more"
    turn(tmp_path, until(N))
    turn(tmp_path, until(100, 'A'), 100)
    ledger, now = Ledger(tmp_path), walk.timestamps.iloc[199]
    fetch_new(['A', 'B'], '1h', ledger, 2, now=now)
    assert asked == dict(A=walk.timestamps[99], B=walk.timestamps[N - 1])
    hole = until(120, 'A')
    hole = hole[~hole.timestamps.isin(walk.timestamps[100:100 + H])]   # the bars of the second forecast never come
    turn(tmp_path, hole, 120)
    turn(tmp_path, pd.concat([hole, walk[120:130]]), 130)
    fetch_new(['A'], '1h', ledger, 2, now=now)
    assert asked['A'] == walk.timestamps[129]


def test_one_file_of_several_is_damaged(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for s in 'ABC': until(N, s).to_parquet(f'{s}.parquet')
    (tmp_path/'B.parquet').write_bytes((tmp_path/'B.parquet').read_bytes()[:-20])
    for _ in range(2):
        assert main(['run', 'A.parquet', 'B.parquet', 'C.parquet', *OPTIONS]) == 1
        out, err = capsys.readouterr()
        assert 'B.parquet failed: DataError: ' in out and 'B.parquet' in err and 'Traceback' not in err
    assert sorted(Ledger('book').pending['symbol']) == ['A', 'C']
    until(N, 'B').to_parquet('B.parquet')
    assert main(['run', '*.parquet', *OPTIONS]) == 0 and len(Ledger('book').pending) == 3
    assert main(['run', '*.parquet', *OPTIONS, '--symbols', 'A', 'Z']) == 1 and 'Z' in capsys.readouterr().out


def test_the_error_of_one_symbol_names_the_option_that_mends_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoilt(until(N), 'a close that is no number').to_parquet('bars.parquet')
    assert main(['run', 'bars.parquet', *OPTIONS]) == 1
    out, err = capsys.readouterr()
    tried = err.split('Try: kronos-nb ')[1].split()
    assert '--repair' in tried and main(tried) == 0
    assert out.count('the source is late') == 1   # for all symbols at once


def test_parts_of_one_symbol_are_not_read_around_a_damaged_one(tmp_path):
    for i, part in enumerate((walk[:50], walk[50:100], walk[100:150])): part.to_parquet(tmp_path/f'{i}.parquet')
    (tmp_path/'1.parquet').write_bytes(b'PAR1')
    with pytest.raises(DataError, match='1.parquet'): read_each(tmp_path)
    with pytest.raises(DataError, match='1.parquet'): read_each(tmp_path/'1.parquet')
    (tmp_path/'0.parquet').unlink()
    bars, failed = read_each(tmp_path)
    assert len(bars) == 50 and list(failed) == [str(tmp_path/'1.parquet')]


def test_bars_of_another_name_are_not_graded_in_silence(tmp_path, capsys, monkeypatch):
    "A file that is named otherwise than the forecasts were: an error with the option that mends it"
    monkeypatch.chdir(tmp_path)
    until(N, 'A').to_parquet('A.parquet')
    assert main(['run', 'A.parquet', *OPTIONS]) == 0
    walk[walk.symbol == 'A'].drop(columns='symbol').to_csv('later.csv', index=False)
    assert main(['ledger', 'grade', 'later.csv', '--ledger', 'book']) == 2
    tried = capsys.readouterr().err.split('Try: kronos-nb ')[1].split()
    assert main(tried) == 0 and '1 forecast graded, 0 open' in capsys.readouterr().out


def test_open_forecasts_of_other_symbols_are_counted(tmp_path):
    turn(tmp_path, until(N))
    assert Ledger(tmp_path).grade(walk[walk.symbol == 'B'], [LastValue()]).open == 2
    assert turn(tmp_path, until(N + H, 'A'), N + H).graded.open == 1   # of C; B is graded
