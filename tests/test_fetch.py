"Bars from archives and client libraries, against a stand-in on this machine"
import datetime
import errno
import hashlib
import http.server
import io
import ssl
import sys
import threading
import types
import urllib.error
import zipfile

import pandas as pd
import pytest

from kronos_nb.cli import main
from kronos_nb.core import ConfigError, DataError, RunError
from kronos_nb.data import fetch
from kronos_nb.data.fetch import fetch_klines, fetch_notes
from kronos_nb.data.read import read_klines


def archive_file(name, first, bars, seconds=3600):
    "Return a zip file of the exchange, stamps in microseconds"
    t = [int(pd.Timestamp(first).timestamp() + i*seconds)*10**6 for i in range(bars)]
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr(f'{name}.csv', ''.join(f'{o},1,2,0.5,1.5,10,{o + seconds*10**6 - 1},15,3,5,7,0\n' for o in t))
    return out.getvalue()


class Archive:
    "A server with files, and what goes wrong with each of them"
    def __init__(self):
        self.files, self.troubles, self.asked = {}, {}, []
        outer = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): outer.answer(self, self.path.rpartition('/')[2])
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.address = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()

    def add(self, period, first, bars, symbol='BTCUSDT', interval='1h', seconds=3600):
        name = f'{symbol}-{interval}-{period}'
        self.files[f'{name}.zip'] = archive_file(name, first, bars, seconds)

    def trouble(self, name, *what): self.troubles[name] = list(what)

    def answer(self, request, name):
        begin = int((request.headers.get('Range') or 'bytes=0-')[6:-1])
        self.asked.append((name, begin))
        body = self.files.get(name.removesuffix('.CHECKSUM'))
        trouble = self.troubles[name].pop(0) if self.troubles.get(name) else None
        if body is None: return request.send_error(404)
        if isinstance(trouble, int):
            request.send_response(trouble)
            request.send_header('Retry-After', '0')
            return request.end_headers()
        if name.endswith('.CHECKSUM'): body = f'{hashlib.sha256(body).hexdigest()}  {name}\n'.encode()
        if trouble == 'damaged': body = b'x' + body[1:]
        if begin >= len(body): return request.send_error(416)
        request.send_response(206 if begin and trouble != 'no range' else 200)
        part = body if trouble == 'no range' else body[begin:]
        request.send_header('Content-Length', str(len(part)))
        request.end_headers()
        request.wfile.write(part[:len(part)//2] if trouble == 'cut' else part)


@pytest.fixture
def archive(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, '_WAIT', 0)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('KRONOS_NB_CACHE', str(tmp_path/'cache'))
    found = Archive()
    monkeypatch.setattr(fetch, 'ARCHIVE', found.address)
    yield found
    found.server.shutdown()
    found.server.server_close()


def january(archive): archive.add('2024-01', '2024-01-01', 31*24)


def test_months_become_canonical_bars(archive):
    january(archive)
    archive.add('2024-02', '2024-02-01', 29*24)
    bars = fetch_klines('BTC/USDT', '1h', '2024-01-10', '2024-02-10', progress=False)
    assert bars.timestamps.tolist() == pd.date_range('2024-01-10', '2024-02-09 23:00', freq='h').tolist()
    assert set(bars.symbol) == {'BTCUSDT'} and bars.amount.iloc[0] == 15 and read_klines(bars).equals(bars)
    extra = fetch_klines('BTCUSDT', '1h', '2024-01-10', '2024-01-11', extra_features='trades', progress=False)
    assert (extra.trades == 3).all()


@pytest.mark.parametrize('troubles', [
    ['cut'], ['cut', 'cut', 'cut'], ['damaged'], [429], [503, 'cut', 418], ['cut', 'no range']])
def test_troubles_that_pass(archive, troubles):
    january(archive)
    archive.trouble('BTCUSDT-1h-2024-01.zip', *troubles)
    bars = fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False)
    assert len(bars) == 31*24
    again = [begin for name, begin in archive.asked if name == 'BTCUSDT-1h-2024-01.zip']
    assert len(again) == len(troubles) + ('no range' not in troubles) and (troubles[0] != 'cut' or again[1] > 0)


def test_troubles_that_stay(archive):
    january(archive)
    name = 'BTCUSDT-1h-2024-01.zip'
    archive.trouble(name, 'damaged', 'damaged')
    with pytest.raises(DataError, match='checksum'):
        fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False)
    archive.trouble(name, *[429]*50)
    with pytest.raises(RunError, match=name): fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False)
    archive.trouble(name, 400)
    with pytest.raises(RunError, match='400'): fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False)
    archive.trouble(name)
    assert len(fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False))


def test_files_are_kept_and_a_damaged_one_comes_again(archive, tmp_path):
    january(archive)
    def read(): return fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False)
    first = read()
    archive.asked.clear()
    assert read().equals(first) and not archive.asked
    kept = next((tmp_path/'cache').rglob('*.zip'))
    kept.write_bytes(b'damaged' + kept.read_bytes()[7:])
    assert read().equals(first) and archive.asked


def test_what_the_archive_lacks(archive):
    january(archive)
    archive.add('2024-03', '2024-03-01', 31*24)
    bars = fetch_klines('BTCUSDT', '1h', '2023-10-01', '2024-04-01', progress=False)
    assert bars.timestamps[0] == pd.Timestamp('2024-01-01') # before that it was not traded
    missing, late = fetch_notes(bars)
    assert '2024-02' in missing and '2023' not in missing and '2023-10-01' in late
    with pytest.raises(DataError, match='ETHUSDT'): fetch_klines('ETHUSDT', '1h', '2024-01-01', '2024-02-01')


def test_the_month_at_hand_comes_as_days(archive):
    today = datetime.datetime.now(datetime.timezone.utc).date()
    days = [today - datetime.timedelta(days=i) for i in (3, 2, 1)]
    for day in days: archive.add(str(day), str(day), 24)
    bars = fetch_klines('BTCUSDT', '1h', str(days[0]), progress=False)
    assert len(bars) == 72 and bars.timestamps.iloc[-1].date() == days[-1]
    assert not any(str(today) in name for name, _ in archive.asked)
    assert str(days[-1]) in fetch_notes(bars)[-1] # it says where it ends


@pytest.mark.parametrize('changes,name', [
    (dict(source='nowhere'), 'source'), (dict(interval='7m'), 'interval'), (dict(interval='1M'), 'mo'),
    (dict(start='soon'), 'start'),
    (dict(start='03/04/2024'), 'start'), (dict(start=1704067200000), 'start'), (dict(end=float('nan')), 'end'),
    (dict(start='2025-01-01', end='2024-01-01'), 'start'), (dict(symbol='BTC?'), 'symbol'),
    (dict(source='ccxt'), 'ccxt'), (dict(source='binance:um'), 'source'), (dict(source=None), 'source')])
def test_wrong_requests(changes, name):
    how = dict(symbol='BTCUSDT', interval='1h', start='2024-01-01', end='2024-02-01') | changes
    with pytest.raises(ConfigError, match=name): fetch_klines(**how)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'yfinance', None)
    with pytest.raises(ConfigError, match='pip install yfinance'):
        fetch_klines('AAPL', '1d', '2024-01-01', source='yfinance')


class Busy(Exception): "As ccxt.NetworkError"


def exchange(rows, window=None, most=10, days=True, troubles=()):
    "Return a stand-in for ccxt: `most` bars after a moment, or those inside `window` bars"
    troubles, asked = list(troubles), []
    class Kraken:
        has, timeframes = dict(fetchOHLCV=True), {'1h': 60, '1M': 43200} | ({'1d': 1440} if days else {})
        def __init__(self, options): assert options['enableRateLimit']
        def fetch_ohlcv(self, symbol, interval, since):
            asked.append((interval, since))
            if troubles: raise troubles.pop(0)
            step = 86_400_000 if interval == '1d' else 3_600_000
            found = [r for r in rows if r[0] >= since and (window is None or r[0] < since + window*step)]
            return found[::24] if interval == '1d' else found[:most] if window is None else found
    return types.SimpleNamespace(exchanges=['kraken'], kraken=Kraken, NetworkError=Busy, asked=asked)


def hours(start, n):
    first = int(pd.Timestamp(start).timestamp()*1000)
    return [[first + i*3_600_000, 1, 2, .5, 1.5, 10] for i in range(n)]


def test_ccxt_page_by_page(monkeypatch):
    monkeypatch.setattr(fetch, '_WAIT', 0)
    monkeypatch.setitem(sys.modules, 'ccxt', exchange(hours('2024-01-01', 30), troubles=[Busy('wait'), Busy('wait')]))
    bars = fetch_klines('BTC/USD', '1h', '2024-01-01', '2024-01-02', source='ccxt:kraken')
    assert bars.timestamps.tolist() == pd.date_range('2024-01-01', periods=24, freq='h').tolist()
    assert set(bars.symbol) == {'BTC/USD'} and not fetch_notes(bars)
    with pytest.raises(ConfigError, match='kraken'): fetch_klines('BTC/USD', '1h', '2024-01-01', source='ccxt:karken')
    with pytest.raises(ConfigError, match='1M'): fetch_klines('BTC/USD', '5m', '2024-01-01', source='ccxt:kraken')


@pytest.mark.parametrize('days', [True, False])
def test_an_empty_page_is_no_end(monkeypatch, days):
    "An exchange that answers by windows, before the coin was listed and in an outage of 20 days"
    rows = hours('2024-01-01', 24*10) + hours('2024-01-31', 24*10)
    monkeypatch.setitem(sys.modules, 'ccxt', ccxt := exchange(rows, window=120, days=days))
    bars = fetch_klines('BTC/USD', '1h', '2020-01-01', '2024-03-01', source='ccxt:kraken')
    assert len(bars) == len(rows) and '2024-01-01' in fetch_notes(bars)[0]
    assert (len(ccxt.asked) < 40) == days # hundreds of empty pages of hours, or a few of days


def test_an_exchange_that_keeps_its_last_bars_says_so(monkeypatch):
    "Kraken keeps 720 bars and ignores an earlier beginning"
    monkeypatch.setitem(sys.modules, 'ccxt', exchange(hours('2024-01-31', 24)))
    bars = fetch_klines('BTC/USD', '1h', '2024-01-01', '2024-02-01', source='ccxt:kraken')
    assert len(bars) == 24 and '2024-01-31' in fetch_notes(bars)[0]


@pytest.mark.parametrize('error', [ValueError('kraken does not have market symbol X'), KeyError('data')])
def test_what_a_library_says_comes_through(monkeypatch, error):
    monkeypatch.setitem(sys.modules, 'ccxt', exchange([], troubles=[error]))
    with pytest.raises(RunError, match=type(error).__name__):
        fetch_klines('X', '1h', '2024-01-01', source='ccxt:kraken')
    monkeypatch.setitem(sys.modules, 'ccxt', exchange([]))
    with pytest.raises(DataError, match='X'): fetch_klines('X', '1h', '2024-01-01', '2024-01-03', source='ccxt:kraken')


class Yahoo:
    "A stand-in for yfinance and its ticker, which answers for at most eight days of minutes"
    def __init__(self, index):
        columns = dict(Open=1., High=2., Low=.5, Close=1.5, Volume=10.)
        self.frame, self.asked = pd.DataFrame(columns, index.rename('Date')), []

    def Ticker(self, symbol): return self

    def history(self, interval, start, end, **how):
        self.asked.append((interval, start, end, how))
        if interval == '1m' and end - start > pd.Timedelta('8D'): return self.frame[:0]
        return self.frame[(self.frame.index >= start) & (self.frame.index < end)]


@pytest.mark.parametrize('zone', ['America/New_York', 'Asia/Tokyo'])
def test_yfinance(monkeypatch, zone):
    days = pd.bdate_range('2023-12-01', '2024-02-29', tz=zone)
    monkeypatch.setitem(sys.modules, 'yfinance', yahoo := Yahoo(days))
    bars = fetch_klines('AAPL', '1d', '2024-01-01', '2024-02-01', source='yfinance')
    assert bars.timestamps.tolist() == pd.bdate_range('2024-01-01', '2024-01-31').tolist()
    assert set(bars.symbol) == {'AAPL'}
    assert fetch_notes(bars) == ['prices adjusted for splits and dividends']
    fetch_klines('AAPL', '1w', '2024-01-01', '2024-02-01', source='yfinance', auto_adjust=False)
    assert yahoo.asked[-1][0] == '1wk' and yahoo.asked[-1][3] == dict(auto_adjust=False)
    with pytest.raises(ConfigError, match='interval'): fetch_klines('AAPL', '8h', '2024-01-01', source='yfinance')
    with pytest.raises(DataError, match='AAPL'):
        fetch_klines('AAPL', '1d', '2020-01-01', '2020-02-01', source='yfinance')


def test_minutes_of_yfinance_come_by_the_week(monkeypatch):
    minutes = pd.date_range('2024-01-02 09:30', '2024-01-20', freq='min', tz='America/New_York')
    monkeypatch.setitem(sys.modules, 'yfinance', yahoo := Yahoo(minutes))
    bars = fetch_klines('AAPL', '1m', '2024-01-02 15:00', '2024-01-19', source='yfinance')
    assert bars.timestamps.tolist() == pd.date_range('2024-01-02 15:00', '2024-01-18 23:59', freq='min').tolist()
    assert len(yahoo.asked) == 3 and 'America/New_York' in fetch_notes(bars)[1]


COLUMNS = ['\u65f6\u95f4', '\u5f00\u76d8', '\u6700\u9ad8', '\u6700\u4f4e', '\u6536\u76d8', '\u6210\u4ea4\u91cf',
           '\u6210\u4ea4\u989d'] # time, open, high, low, close, volume in lots, amount


def test_akshare(monkeypatch):
    "Stamps mark the end of a bar, on the clock of Shanghai; volume is in lots"
    rows = [[f'2024-01-02 09:{m}:00', 1, 2, .5, 1.5, 10, 1250] for m in (35, 40, 45)]
    minutes, asked = pd.DataFrame(rows, columns=COLUMNS), {}
    ak = types.SimpleNamespace(stock_zh_a_hist_min_em=lambda **how: asked.update(how) or minutes)
    monkeypatch.setitem(sys.modules, 'akshare', ak)
    bars = fetch_klines('000001', '5m', '2024-01-02 01:35', '2024-01-03', source='akshare', adjust='qfq')
    assert bars.timestamps.tolist() == list(pd.to_datetime(['2024-01-02 01:35', '2024-01-02 01:40']))
    assert bars.symbol[0] == '000001' and bars.volume[0] == 1000 and bars.amount[0] == 1250
    adjusted, zone = fetch_notes(bars)
    assert adjusted == 'prices adjusted for splits and dividends' and 'Asia/Shanghai' in zone
    assert asked['period'] == '5' and asked['start_date'] < '2024-01-02 01:35' and asked['adjust'] == 'qfq'


@pytest.mark.parametrize('name,interval,now,over', [
    ('ccxt', '1h', '2024-03-08 01:59', [True, False]), ('ccxt', '1h', '2024-03-08 02:00', [True, True]),
    ('yfinance', '1d', '2024-03-08 23:59', [True, False]), ('yfinance', '1d', '2024-03-09', [True, True]),
    ('akshare', '1d', '2024-03-08 07:59', [True, False]), ('akshare', '1d', '2024-03-08 08:00', [True, True]),
    ('akshare', '1w', '2024-03-10', [True, False]), ('akshare', '1w', '2024-03-11', [True, True]),
    ('ccxt', '1w', '2024-03-14', [True, False]), ('ccxt', '1w', '2024-03-15', [True, True]),
    ('akshare', '1mo', '2024-03-31', [True, False]), ('ccxt', '1mo', '2024-04-01', [True, True])])
def test_bars_that_are_over(monkeypatch, name, interval, now, over):
    def clock(zone='UTC'): return pd.Timestamp(now, tz='UTC').tz_convert(zone).tz_localize(None)
    monkeypatch.setattr(fetch, '_now', clock)
    last = pd.Timestamp('2024-03-08 01:00' if interval == '1h' else '2024-03-08')
    before = last - (pd.Timedelta('31D') if interval == '1mo' else fetch.interval_length(interval))
    assert fetch._over(pd.Series([before, last]), interval, name).tolist() == over


def test_the_bar_at_hand_is_left_out(monkeypatch):
    now = pd.Timestamp.now('UTC').tz_localize(None).floor('h')
    monkeypatch.setitem(sys.modules, 'ccxt', exchange(hours(now - pd.Timedelta('3h'), 4)))
    bars = fetch_klines('BTC/USD', '1h', now - pd.Timedelta('4h'), source='ccxt:kraken')
    assert bars.timestamps.iloc[-1] == now - pd.Timedelta('1h') and 'left out' in fetch_notes(bars)[0]


def test_what_no_try_can_change_is_said_at_once(archive, monkeypatch):
    january(archive)
    def read(): return fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', progress=False)
    archive.trouble('BTCUSDT-1h-2024-01.zip', 403)
    with pytest.raises(RunError, match='403'): read()
    assert [name for name, _ in archive.asked].count('BTCUSDT-1h-2024-01.zip') == 1
    def not_valid(*args, **how): raise urllib.error.URLError(ssl.SSLCertVerificationError('self-signed'))
    with monkeypatch.context() as m:
        m.setattr(fetch.urllib.request, 'urlopen', not_valid)
        with pytest.raises(RunError, match='certificate'): read()
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(fetch, '_receive', full)
        with pytest.raises(RunError, match='No space'): read()
    assert len(read()) == 31*24


def test_a_part_that_is_longer_than_the_file_begins_again(archive, tmp_path):
    january(archive)
    series = fetch._Series('BTCUSDT', '1h', 'spot', archive.address)
    kept = tmp_path/'x.zip'
    (tmp_path/'x.zip.part').write_bytes(b'0'*10**6)
    fetch._download(series.url(series.path('monthly', '2024-01')), kept)
    assert kept.read_bytes() == archive.files['BTCUSDT-1h-2024-01.zip']


def test_each_archive_has_its_files(archive, tmp_path):
    january(archive)
    other = Archive()
    other.add('2024-01', '2024-01-01', 24)
    def read(address): return fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-02-01', archive=address, progress=False)
    try: assert len(read(archive.address)) == 31*24 and len(read(other.address)) == 24
    finally:
        other.server.shutdown()
        other.server.server_close()


def test_a_month_without_a_file_comes_as_days(archive):
    "After a month that was there; a coin that is no longer traded is not asked for day after day"
    january(archive)
    for day in (1, 2, 4): archive.add(f'2024-02-0{day}', f'2024-02-0{day}', 24)
    bars = fetch_klines('BTCUSDT', '1h', '2024-01-01', '2024-09-01', progress=False)
    assert len(bars) == 31*24 + 3*24
    note = fetch_notes(bars)[0]
    assert '2024-02-03' in note and '2024-02-04' not in note and '2024-03,' in note and '2024-03-01' not in note
    assert not any('2024-05-0' in name for name, _ in archive.asked)


def test_weeks_come_by_the_month(archive):
    today = datetime.datetime.now(datetime.timezone.utc).date()
    archive.add('2024-01', '2024-01-01', 5, interval='1w', seconds=7*86400)
    assert len(fetch_klines('BTCUSDT', '1w', '2024-01-01', '2024-02-01', progress=False)) == 5
    with pytest.raises(DataError): fetch_klines('BTCUSDT', '1w', str(today), progress=False)
    assert not any(name.count('-') > 3 for name, _ in archive.asked) # no days


def test_futures_with_coins_as_margin(archive):
    "They count contracts, and have coins where others have the amount"
    archive.add('2024-01', '2024-01-01', 24, symbol='BTCUSD_PERP')
    bars = fetch_klines('BTCUSD_PERP', '1h', '2024-01-01', '2024-02-01', source='binance-cm', progress=False)
    assert bars.volume[0] == 15 and bars.amount[0] == 1000 and 'contracts' in fetch_notes(bars)[0]


def test_a_range_without_bars_inside_its_files(archive):
    archive.add('2024-01', '2024-01-01', 24)
    with pytest.raises(DataError, match='BTCUSDT'):
        fetch_klines('BTCUSDT', '1h', '2024-01-20', '2024-02-01', progress=False)


def test_the_fetch_command(archive, tmp_path, capsys):
    january(archive)
    argv = ['fetch', 'BTCUSDT', '1h', '--start', '2024-01-01', '--end', '2024-01-03', '--out']
    for name in ('a.parquet', 'b.feather', 'c.csv'):
        assert main([*argv, str(tmp_path/'new'/name)]) == 0
        assert '48 bars' in capsys.readouterr().out and len(read_klines(tmp_path/'new'/name)) == 48
    assert main([*argv, str(tmp_path/'a.xlsx')]) == 2
    before = (tmp_path/'new'/'c.csv').read_bytes()
    assert main([*argv, str(tmp_path/'new'/'c.csv')]) == 2 # nothing is overwritten
    assert (tmp_path/'new'/'c.csv').read_bytes() == before
    assert main([*argv, str(tmp_path/'new'/'c.csv'), '--overwrite', '--options', 'extra_features: trades']) == 0
    assert 'trades' in (tmp_path/'new'/'c.csv').read_text()
    assert main([*argv, str(tmp_path/'d.csv'), '--options', 'trades']) == 2
    assert [p.name for p in (tmp_path/'new').iterdir() if p.name.startswith('.')] == []
