"Layouts of other people's files: right, or refused with the parameter that settles them"
import gzip
import json

import numpy as np
import pandas as pd
import pytest

from kronos_nb.cli import main
from kronos_nb.config import Config
from kronos_nb.core import PRICES, ConfigError, DataError
from kronos_nb.data.check import check_klines
from kronos_nb.data.parse import from_market_clock, market_clock, time_stamps, to_utc
from kronos_nb.data.read import as_frame, read_klines, read_report
from kronos_nb.data.repair import repair_klines
from kronos_nb.fitting.prepare import load_bars


def bars_of(n=30, symbol='X', start='2024-01-01', freq='h', seed=0):
    "Clean bars of one symbol"
    r = np.random.default_rng(seed)
    close = np.exp(r.normal(0, .01, n).cumsum())*100
    opens = np.r_[close[0], close[:-1]]
    high, low = np.maximum(opens, close)*1.01, np.minimum(opens, close)*.99
    volume = r.lognormal(5, 1, n)
    stamps = pd.date_range(start, periods=n, freq=freq).astype('M8[ns]')
    return pd.DataFrame(dict(symbol=symbol, timestamps=stamps, open=opens,
                             high=high, low=low, close=close, volume=volume, amount=volume*close))


def csv(tmp_path, text, name='X.csv', encoding='utf-8'):
    path = tmp_path/name
    path.write_bytes(text.encode(encoding))
    return path


def ohlc(*rows, header='timestamps,open,high,low,close,volume'):
    return '\n'.join([header, *rows]) + '\n'


def asks(parameter, read, error=DataError):
    with pytest.raises(error, match=parameter): read()


# Numbers

@pytest.mark.parametrize('cells,values', [
    (['5.006,29', '5.010,00'], [5006.29, 5010]), (['1,5', '2,25'], [1.5, 2.25]), (['0,500', '1,250'], [.5, 1.25]),
    (['5,006.29', '5,010'], [5006.29, 5010]), (["5'006.29", '7'], [5006.29, 7]), (['1.234.567', '1'], [1234567, 1]),
    (['1,234,567', '1'], [1234567, 1]), (['$1.50', '1.5K'], [1.5, 1500])])
def test_numbers_of_other_countries(tmp_path, cells, values):
    rows = [f'2024-01-0{i + 1};{";".join([cell]*4)};10' for i, cell in enumerate(cells)]
    file = csv(tmp_path, ohlc(*rows, header='date;open;high;low;close;volume'))
    assert read_klines(file).close.tolist() == values
    frame = pd.DataFrame({c: cells for c in PRICES}).assign(date=['2024-01-01', '2024-01-02'])
    assert read_klines(frame).close.tolist() == values


def test_a_comma_that_can_mean_two_things_is_asked_for(tmp_path):
    file = csv(tmp_path, ohlc('2024-01-01;5,006;5,006;5,006;5,006;7', header='date;open;high;low;close;volume'))
    asks('decimal', lambda: read_klines(file))
    assert read_klines(file, decimal=',').close[0] == 5.006 and read_klines(file, decimal='.').close[0] == 5006
    asks('decimal', lambda: read_klines(file, decimal=';'))


def test_the_decimal_mark_holds_for_the_whole_file(tmp_path):
    rows = [f'2024-01-{i + 1:02d};5,006;5,006;5,006;5,006;7' for i in range(20)] + ['2024-01-21;5,5;5,5;5,5;5,5;7']
    file = csv(tmp_path, ohlc(*rows, header='date;open;high;low;close;volume'))
    assert (read_klines(file, chunk=3).close.iloc[:20] == 5.006).all() # the last line tells
    both = csv(tmp_path, ohlc('2024-01-01;1,5;1,5;1.5;1.5;7', header='date;open;high;low;close;volume'), 'both.csv')
    asks('decimal', lambda: read_klines(both))
    late = bars_of(6).drop(columns=['amount']).astype({'close': object})
    late.loc[5, 'close'] = '99,5'
    asks('decimal', lambda: read_klines(late, chunk=2))


# Stamps

def test_the_order_of_dates_is_decided_on_the_whole_column(tmp_path):
    days = pd.date_range('2024-01-01', '2024-01-31', freq='h')
    lines = [f'{t:%m/%d/%Y %H:%M},1,2,0.5,1.5,10' for t in days] # the 13th comes after 288 cells
    us = csv(tmp_path, ohlc(*lines))
    assert read_klines(us, chunk=50).timestamps.tolist() == days.tolist()
    head = csv(tmp_path, ohlc(*lines[:200]), 'head.csv')
    asks('dayfirst', lambda: read_klines(head))
    assert read_klines(head, dayfirst=False).timestamps[24] == pd.Timestamp('2024-01-02')
    assert read_klines(head, dayfirst=True).timestamps[24] == pd.Timestamp('2024-02-01')


def test_a_parameter_does_not_swap_dates_that_begin_with_the_year():
    for text in ('2024-03-04', '2024/03/04', '2024.03.04 09:30', '20240304', '2024-03-04T00:00:00Z'):
        for dayfirst in (True, False, None):
            t = to_utc([text, text], dayfirst=dayfirst)[0]
            assert pd.Timestamp(t[0]).strftime('%m-%d') == '03-04', (text, dayfirst)
    mixed = to_utc(['2024-03-04', '05/03/2024', '2024-03-06'], dayfirst=True)[0]
    assert [pd.Timestamp(t).strftime('%m-%d') for t in mixed] == ['03-04', '03-05', '03-06']


@pytest.mark.parametrize('stamps', [['31/12/24'], ['13/01/2024', '01/13/2024'], ['01/02/2024']])
def test_dates_that_cannot_be_known(stamps):
    asks('dayfirst', lambda: to_utc(stamps))


def test_integers_in_frames_are_read_as_in_files():
    bars = bars_of()
    for ns in (10**9, 10**6, 10**3, 1):
        numbers = bars.timestamps.astype('M8[ns]').astype('i8')//ns
        assert read_klines(bars.assign(timestamps=numbers)).timestamps.tolist() == bars.timestamps.tolist()


def berlin(bars):
    return bars.timestamps.dt.tz_localize('UTC').dt.tz_convert('Europe/Berlin').dt.tz_localize(None)


@pytest.mark.parametrize('order', ['as they came', 'newest first', 'by symbol'])
@pytest.mark.parametrize('chunk', [3, 500])
def test_the_hour_that_occurs_twice(tmp_path, order, chunk):
    utc = pd.concat([bars_of(50, s, '2024-10-26 12:00', seed=i) for i, s in enumerate('AB')])
    local = utc.assign(timestamps=berlin(utc))
    if order == 'as they came': utc, local = (o.sort_values('close').sort_index(kind='stable') for o in (utc, local))
    if order == 'newest first': local = local[::-1]
    local.to_csv(tmp_path/'a.csv', index=False)
    got = read_klines(tmp_path, tz='Europe/Berlin', chunk=chunk)
    pd.testing.assert_frame_equal(got, utc.sort_values(['symbol', 'timestamps'], ignore_index=True), check_dtype=False)


def test_an_hour_that_was_recorded_once_is_asked_for():
    utc = bars_of(50, 'A', '2024-10-26 12:00')
    local = utc.assign(timestamps=berlin(utc)).drop_duplicates('timestamps').rename(columns={'amount': 'money'})
    asks('ambiguous', lambda: read_klines(local, tz='Europe/Berlin'))
    first, last = (read_klines(local, tz='Europe/Berlin', ambiguous=o).timestamps for o in ('first', 'last'))
    assert (first != last).sum() == 1 and (last - first).max() == pd.Timedelta('1h')


def test_session_dates_stay_dates(tmp_path):
    days = pd.bdate_range('2024-04-15', '2024-07-12')
    index = days.tz_localize('Asia/Shanghai').rename('Date')
    raw = pd.DataFrame(dict(Open=1., High=2., Low=.5, Close=1.5), index=index)
    assert read_klines(raw, '600519.SS').timestamps.tolist() == days.tolist()
    raw.to_csv(tmp_path/'zone.csv')
    raw.tz_localize(None).to_csv(tmp_path/'plain.csv')
    raw.to_parquet(tmp_path/'zone.parquet')
    for name in ('zone.csv', 'plain.csv', 'zone.parquet'):
        assert read_klines(tmp_path/name, tz='Asia/Shanghai').timestamps.tolist() == days.tolist(), name
    hours = raw.set_index(raw.index + pd.Timedelta('9h'))
    assert read_klines(hours).timestamps[0] == pd.Timestamp('2024-04-15 01:00')


def test_the_clock_of_the_market_is_the_same_across_a_change():
    utc = pd.to_datetime(['2024-03-08 14:30', '2024-03-11 13:30'])
    assert time_stamps(utc, tz='America/New_York')[:, 1].tolist() == [9, 9]
    assert time_stamps(utc)[:, 1].tolist() == [14, 13]
    back = from_market_clock(market_clock(utc, 'America/New_York'), 'America/New_York')
    assert (back == utc.to_numpy('M8[ns]')).all()
    days = pd.to_datetime(['2024-07-12', '2024-07-15'])
    assert time_stamps(days, tz='America/New_York')[:, 2].tolist() == [4, 0]
    asks('tz', lambda: time_stamps(utc, tz='America/New_Yrok'))


def test_bars_never_move_because_a_log_was_lost(tmp_path):
    bars_of().to_csv(tmp_path/'a.csv', index=False)
    bars = read_klines(tmp_path, tz='Asia/Shanghai')
    joined = pd.concat([bars.iloc[:9], bars.iloc[9:]], ignore_index=True).merge(bars[['timestamps']], on='timestamps')
    joined.attrs.clear()
    cfg = Config().replace(**{'data.tz': 'Asia/Shanghai'})
    for frame in (bars, joined):
        assert read_klines(frame).timestamps.tolist() == bars.timestamps.tolist()
        assert load_bars(frame, cfg).timestamps.tolist() == bars.timestamps.tolist()
        asks('tz', lambda: read_klines(frame, tz='Asia/Shanghai'))


def test_the_log_of_the_first_reading_is_kept(tmp_path):
    (tmp_path/'a.csv').write_text(ohlc('2024-01-01,1,2,0.5,oops,10', '2024-01-02,1,2,0.5,1.5,10'))
    once = read_klines(tmp_path)
    again = read_klines(once)
    assert read_report(again).file.tolist() == ['a.csv']
    assert 'not_numbers' in check_klines(again).issues['rule'].tolist()
    other = read_klines([once, bars_of(symbol='Y')])
    assert read_report(other).file.tolist() == ['a.csv', 'DataFrame']


# Columns

def test_an_unrecognised_column_can_be_named_as_an_extra_feature(tmp_path):
    bars_of().assign(**{'Funding Rate': 1e-4}).to_csv(tmp_path/'a.csv', index=False)
    got = read_klines(tmp_path, columns={'Funding Rate': 'funding'}, extra_features=('funding',))
    assert (got.funding == 1e-4).all()
    with pytest.raises(DataError, match='funding'): read_klines(tmp_path, extra_features=('funding',))


def test_the_number_of_trades_is_never_an_amount(tmp_path):
    for name in ('trades', 'count', 'number_of_trades', 'transactions'):
        file = csv(tmp_path, ohlc('2024-01-01,1,2,0.5,1.5,10,7', header=f'date,open,high,low,close,volume,{name}'))
        assert read_klines(file).amount[0] == 12.5
    bare = csv(tmp_path, '2024-01-01,1,2,0.5,1.5,10,7\n', 'bare.csv')
    asks('columns', lambda: read_klines(bare))
    names = ['timestamps', *PRICES, 'volume']
    assert read_klines(bare, columns=[*names, 'amount']).amount[0] == 7
    assert read_klines(bare, columns=[*names, None]).amount[0] == 12.5
    assert read_klines(bare, columns=[*names, 'trades'], extra_features='trades').trades[0] == 7
    asks('columns', lambda: read_klines(bare, columns=names))


def test_turnover_is_money_or_a_rate(tmp_path):
    for turnover, amount in ((125, 125), (.003, 12.5)):
        header = 'date,open,high,low,close,volume,turnover'
        file = csv(tmp_path, ohlc(f'2024-01-01,1,2,0.5,1.5,10,{turnover}', header=header))
        assert read_klines(file).amount[0] == amount


def test_indicators_of_volume_are_no_amount():
    bars = bars_of().drop(columns='amount').assign(volume_sma=1., volume_ema=2.)
    assert (read_klines(bars).amount > 10).all()


def test_units_are_a_parameter():
    bars = bars_of().rename(columns={'volume': 'vol'})
    got = read_klines(bars, units=dict(volume=100))
    assert np.allclose(got.volume, bars.vol*100) and np.allclose(got.amount, bars.amount)
    lots = bars.assign(vol=bars.vol/100)
    assert "units={'volume': 100}" in read_report(read_klines(lots)).notes[0]
    asks('units', lambda: read_klines(bars, units=dict(price=100)))


@pytest.mark.parametrize('ticker', ['NA', 'NULL', 'nan', 'None', 'TRUE', '000001', '1E5'])
def test_tickers_stay_text(tmp_path, ticker):
    file = csv(tmp_path, ohlc(f'{ticker},2024-01-01,1,2,0.5,1.5,', 'AAPL,2024-01-01,1,2,0.5,1.5,NA',
                              header='ticker,date,open,high,low,close,volume'))
    got = read_klines(file)
    assert sorted(got.symbol) == sorted([ticker, 'AAPL']) and got.volume.isna().all()
    assert read_klines(file, symbols=ticker).symbol.tolist() == [ticker]


def test_identifiers_are_used_or_named(tmp_path):
    file = csv(tmp_path, ohlc('2024-01-01,7,1,2,0.5,1.5,10', header='date,permno,open,high,low,close,volume'))
    assert "'permno'" in read_report(read_klines(file)).notes[0]
    assert read_klines(file, columns={'permno': 'symbol'}).symbol.tolist() == ['7']
    ids = bars_of(4).drop(columns='symbol').assign(Asset_ID=[0., 1., 0., 1.])
    assert read_klines(ids).symbol.tolist() == ['0', '0', '1', '1']


def test_interval_and_other_prices_in_one_folder_stay_apart(tmp_path):
    for name in ('BTC_USDT_USDT-1h-futures', 'BTC_USDT_USDT-8h-mark', 'BTC_USDT_USDT-8h-funding_rate'):
        bars_of().drop(columns='symbol').to_feather(tmp_path/f'{name}.feather')
    assert sorted(read_klines(tmp_path).symbol.unique()) == [
        'BTC_USDT_USDT', 'BTC_USDT_USDT-funding_rate', 'BTC_USDT_USDT-mark']


def test_ends_of_bars_move_to_their_start(tmp_path):
    stamps = pd.to_datetime(['2024-01-02 10:30', '2024-01-02 11:30', '2024-01-02 14:00', '2024-01-02 15:00'])
    frame = bars_of(4).assign(timestamps=stamps).drop(columns='symbol')
    got = read_klines(frame, 'X', bar_end=True, tz='Asia/Shanghai').timestamps
    assert got.tolist() == (stamps - pd.Timedelta('9h')).tolist()
    asks('bar_end', lambda: read_klines(bars_of(), bar_end=True))


def test_ticks_replace_a_volume_of_zero_in_the_whole_file(tmp_path):
    bars = bars_of(20).drop(columns='amount').assign(volume=0, tick_volume=7)
    assert (read_klines(bars, chunk=6).volume == 7).all() and 'price changes' in read_report(read_klines(bars)).notes[0]
    assert (read_klines(bars.assign(volume=3)).volume == 3).all()
    asks('columns', lambda: read_klines(bars.assign(volume=[0]*15 + [1]*5), chunk=6))


# Files and objects

BARS = [[1704187800000 + i*60_000, 1, 2, .5, 1.5, 10] for i in range(2)]


@pytest.mark.parametrize('content', [
    BARS, dict(result=dict(list=BARS)), [dict(zip(['t', 'o', 'h', 'l', 'c', 'v'], bar)) for bar in BARS],
    dict(s='ok', **dict(zip(['t', 'o', 'h', 'l', 'c', 'v'], map(list, zip(*BARS)))))])
def test_json(tmp_path, content):
    (tmp_path/'X-1m.json').write_text(json.dumps(content))
    (tmp_path/'Y-1m.json.gz').write_bytes(gzip.compress(json.dumps(content).encode()))
    got = read_klines(tmp_path)
    assert got.symbol.tolist() == ['X', 'X', 'Y', 'Y'] and got.close.tolist() == [1.5]*4
    assert got.timestamps[1] == pd.Timestamp('2024-01-02 09:31')


@pytest.mark.parametrize('text', ['{}', '[]', 'no', '[1, 2]', '[[1, 2], [1, 2, 3]]', '[[1, 2, 3, 4, 5, 6, 7, 8]]'])
def test_json_without_bars_is_named(tmp_path, text):
    (tmp_path/'bad.json').write_text(text)
    asks('bad.json', lambda: read_klines(tmp_path/'bad.json'))


def test_lists_of_clients():
    for bars in (BARS, np.array(BARS), [tuple(bar) for bar in BARS], [[str(o) for o in bar] for bar in BARS]):
        assert read_klines(bars, 'X').close.tolist() == [1.5, 1.5]
    binance = [[*BARS[0], 0, 15, 3, 5, 7, '0']]
    assert read_klines(binance).amount[0] == 15
    both = read_klines({'A': BARS, 'B': bars_of(3, 'ignored').drop(columns='symbol')})
    assert both.symbol.value_counts().to_dict() == dict(A=2, B=3)


class Foreign:
    "A frame of another library, which speaks one protocol"
    def __init__(self, bars, how): self.bars, self.how = bars, how
    def __getattr__(self, name):
        if name == 'how' or name != self.how: raise AttributeError(name)
        if name == '__arrow_c_stream__':
            return pytest.importorskip('pyarrow').Table.from_pandas(self.bars).__arrow_c_stream__
        return lambda: self.bars


@pytest.mark.parametrize('how', ['to_pandas', 'df', '__arrow_c_stream__'])
def test_frames_of_other_libraries(how):
    bars = bars_of()
    pd.testing.assert_frame_equal(read_klines(Foreign(bars, how)), bars, check_dtype=False)


def test_an_argument_that_does_not_exist_is_named():
    asks('dayfirst', lambda: read_klines(BARS, day_first=True), ConfigError)


def test_objects_that_are_no_frames_are_named():
    for thing in (object(), Foreign(None, 'nothing')):
        asks('pandas', lambda: read_klines(thing))
        asks('pandas', lambda: as_frame(thing))


@pytest.mark.parametrize('backend', ['numpy_nullable', 'pyarrow'])
def test_frames_of_any_backend(backend):
    if backend == 'pyarrow': pytest.importorskip('pyarrow')
    bars = bars_of()
    for frame in (bars, bars.assign(timestamps=bars.timestamps.dt.tz_localize('UTC')), bars.assign(close=None)):
        other = read_klines(frame.convert_dtypes(dtype_backend=backend))
        pd.testing.assert_frame_equal(other, read_klines(frame), check_dtype=False)


def test_closing_lines_and_other_encodings(tmp_path):
    text = ohlc('2024-01-01,1,2,0.5,1.5,10', 'Source: somebody')
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
        got = read_klines(csv(tmp_path, text, 'X.csv', encoding))
        assert len(got) == 1 and 'Source: somebody' in read_report(got).notes[0]
    bad = read_klines(csv(tmp_path, ohlc('2024-01-01,1,2,0.5,1.5,10', 'soon,1,2,0.5,1.5,10')))
    assert 'bad_timestamp' in check_klines(bad).issues['rule'].tolist()


def test_a_qlib_folder_names_its_calendars(tmp_path):
    for name in ('calendars', 'features/x'): (tmp_path/name).mkdir(parents=True)
    for freq, days in (('day', '2024-01-01\n2024-01-02\n'), ('1min', '2024-01-01 09:30:00\n2024-01-01 09:31:00\n')):
        (tmp_path/'calendars'/f'{freq}.txt').write_text(days)
        for field, value in dict(open=1, high=2, low=.5, close=1.5).items():
            np.array([0, value, np.nan], '<f4').tofile(tmp_path/'features/x'/f'{field}.{freq}.bin')
    asks('day.txt', lambda: read_klines(tmp_path))
    for freq, t in (('day', '2024-01-01'), ('1min', '2024-01-01 09:30')):
        got = read_klines(tmp_path/'calendars'/f'{freq}.txt')
        assert got.timestamps.tolist() == [pd.Timestamp(t)] and got.symbol[0] == 'X'
    np.array([5, 1.], '<f4').tofile(tmp_path/'features/x'/'open.day.bin')
    asks('open.day.bin', lambda: read_klines(tmp_path/'calendars'/'day.txt'))


# Check, repair, run

def test_a_table_without_bars_is_an_error():
    assert check_klines(bars_of(3).head(0)).issues['rule'].tolist() == ['no_bars']


def test_the_row_of_the_day_at_hand_is_named():
    days = bars_of(60, freq='D')
    live = pd.concat([days, days.tail(1).assign(timestamps=days.timestamps.iloc[-1] + pd.Timedelta('14h37m12s'))])
    assert 'unfinished' in check_klines(live).issues['rule'].tolist()
    assert 'unfinished' not in check_klines(days).issues['rule'].tolist()
    okx = [[*bar, 15, 15, confirm] for bar, confirm in zip(BARS, (1, 0))]
    assert 'unfinished' in check_klines(read_klines(okx)).issues['rule'].tolist()


def test_the_old_end_of_a_symbol_is_named():
    bars = pd.concat([bars_of(300, 'A', freq='D'), bars_of(100, 'OLD', freq='D')])
    issue = check_klines(bars).issues.set_index('rule').loc['ended']
    assert issue.symbol == 'OLD' and issue['first'] == [pd.Timestamp('2024-04-09')]


def test_widening_takes_each_side_by_itself():
    bars = bars_of(5)
    bars.loc[2, ['open', 'high', 'low', 'close']] = 99.5, 1., 99., 100.
    fixed, changes = repair_klines(bars)
    assert fixed.loc[2, list(PRICES)].tolist() == [99.5, 100., 99., 100.] and changes.column.tolist() == ['high']


def test_a_repair_that_leaves_nothing_says_why():
    asks('price_not_positive', lambda: repair_klines(bars_of().assign(low=-1.)))
    asks('too_short', lambda: repair_klines(bars_of(), min_bars=100))
    assert not len(repair_klines(bars_of().head(0))[0])


def test_negative_prices_are_a_setting():
    spread = bars_of()
    spread[list(PRICES)] -= 100
    assert not check_klines(spread).ok and check_klines(spread, allow_negative_prices=True).ok
    fixed, changes = repair_klines(spread, allow_negative_prices=True)
    assert not len(changes) and fixed.close.equals(spread.close)
    asks('winsorise', lambda: repair_klines(spread, allow_negative_prices=True, winsorise=5), ConfigError)


def test_layout_options_are_settings_and_options(tmp_path, capsys):
    file = csv(tmp_path, ohlc('01/02/2024;1,0;2,0;0,5;1,5;10', header='date;open;high;low;close;volume'))
    cfg = Config().replace(**{'data.layout': 'dayfirst: true', 'data.source': str(file)})
    assert load_bars(None, cfg).timestamps[0] == pd.Timestamp('2024-02-01')
    assert main(['check', str(file)]) == 1 and 'dayfirst' in capsys.readouterr().out
    assert main(['check', str(file), '--layout', 'dayfirst: true']) == 0
    asks('data.layout', lambda: Config().replace(**{'data.layout': 'day: true'}), ConfigError)
    asks('data.market_tz', lambda: Config().replace(**{'data.market_tz': 'Shanghai'}), ConfigError)
