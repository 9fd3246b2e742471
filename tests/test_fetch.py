"Bars from archives and client libraries, against a stand-in on this machine"
import datetime
import hashlib
import http.server
import io
import sys
import threading
import types
import zipfile

import pandas as pd
import pytest

from kronos_nb.cli import main
from kronos_nb.core import ConfigError, DataError, RunError
from kronos_nb.data import fetch
from kronos_nb.data.fetch import fetch_klines
from kronos_nb.data.read import read_klines, read_report


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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

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
    assert '2024-02' in read_report(bars).notes.iloc[-1] and '2023' not in read_report(bars).notes.iloc[-1]
    with pytest.raises(DataError, match='ETHUSDT'): fetch_klines('ETHUSDT', '1h', '2024-01-01', '2024-02-01')


def test_the_month_at_hand_comes_as_days(archive):
    today = datetime.datetime.now(datetime.timezone.utc).date()
    days = [today - datetime.timedelta(days=i) for i in (3, 2, 1)]
    for day in days: archive.add(str(day), str(day), 24)
    bars = fetch_klines('BTCUSDT', '1h', str(days[0]), progress=False)
    assert len(bars) == 72 and bars.timestamps.iloc[-1].date() == days[-1]
    assert not any(str(today) in name for name, _ in archive.asked)


@pytest.mark.parametrize('changes,name', [
    (dict(source='nowhere'), 'source'), (dict(interval='7m'), 'interval'), (dict(start='soon'), 'start'),
    (dict(start='2025-01-01', end='2024-01-01'), 'start'), (dict(symbol='BTC?'), 'symbol'),
    (dict(source='ccxt'), 'ccxt')])
def test_wrong_requests(changes, name):
    how = dict(symbol='BTCUSDT', interval='1h', start='2024-01-01', end='2024-02-01') | changes
    with pytest.raises(ConfigError, match=name): fetch_klines(**how)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'yfinance', None)
    with pytest.raises(ConfigError, match='pip install yfinance'):
        fetch_klines('AAPL', '1d', '2024-01-01', source='yfinance')


def test_ccxt_page_by_page(monkeypatch):
    start = int(pd.Timestamp('2024-01-01').timestamp()*1000)
    class Kraken:
        def __init__(self, options): assert options['enableRateLimit']
        def fetch_ohlcv(self, symbol, interval, since):
            first = -(-(since - start)//3_600_000)
            return [[start + i*3_600_000, 1, 2, .5, 1.5, 10] for i in range(first, min(first + 10, 30))]
    monkeypatch.setitem(sys.modules, 'ccxt', types.SimpleNamespace(exchanges=['kraken'], kraken=Kraken))
    bars = fetch_klines('BTC/USD', '1h', '2024-01-01', '2024-01-02', source='ccxt:kraken')
    assert bars.timestamps.tolist() == pd.date_range('2024-01-01', periods=24, freq='h').tolist()
    assert set(bars.symbol) == {'BTC/USD'}
    with pytest.raises(ConfigError, match='kraken'): fetch_klines('BTC/USD', '1h', '2024-01-01', source='ccxt:karken')


def test_yfinance_and_akshare(monkeypatch):
    days = pd.bdate_range('2024-01-02', '2024-01-31', tz='America/New_York')
    yahoo = pd.DataFrame(dict(Open=1., High=2., Low=.5, Close=1.5, Volume=10.), index=days.rename('Date'))
    ticker = types.SimpleNamespace(history=lambda **how: yahoo)
    monkeypatch.setitem(sys.modules, 'yfinance', types.SimpleNamespace(Ticker=lambda symbol: ticker))
    bars = fetch_klines('AAPL', '1d', '2024-01-01', '2024-02-01', source='yfinance')
    assert bars.timestamps.tolist() == days.tz_localize(None).tolist() and set(bars.symbol) == {'AAPL'}
    columns = ['\u65f6\u95f4', '\u5f00\u76d8', '\u6700\u9ad8', '\u6700\u4f4e', '\u6536\u76d8', '\u6210\u4ea4\u91cf']
    minutes = pd.DataFrame([['2024-01-02 09:35:00', 1, 2, .5, 1.5, 10]], columns=columns)
    ak = types.SimpleNamespace(stock_zh_a_hist_min_em=lambda **how: minutes)
    monkeypatch.setitem(sys.modules, 'akshare', ak)
    bars = fetch_klines('000001', '5m', '2024-01-01', '2024-02-01', source='akshare')
    assert bars.timestamps[0] == pd.Timestamp('2024-01-02 01:35') and bars.symbol[0] == '000001'


def test_the_bar_at_hand_is_left_out(monkeypatch):
    now = pd.Timestamp.now('UTC').tz_localize(None).floor('h')
    rows = [[int((now - pd.Timedelta(hours=i)).timestamp()*1000), 1, 2, .5, 1.5, 10] for i in (3, 2, 1, 0)]
    class Kraken:
        def __init__(self, options): pass
        def fetch_ohlcv(self, symbol, interval, since): return [row for row in rows if row[0] >= since]
    monkeypatch.setitem(sys.modules, 'ccxt', types.SimpleNamespace(exchanges=['kraken'], kraken=Kraken))
    bars = fetch_klines('BTC/USD', '1h', now - pd.Timedelta('4h'), source='ccxt:kraken')
    assert bars.timestamps.iloc[-1] == now - pd.Timedelta('1h')


def test_the_fetch_command(archive, tmp_path, capsys):
    january(archive)
    argv = ['fetch', 'BTCUSDT', '1h', '--start', '2024-01-01', '--end', '2024-01-03', '--out']
    for name in ('a.parquet', 'b.feather', 'c.csv'):
        assert main([*argv, str(tmp_path/'new'/name)]) == 0
        assert '48 bars' in capsys.readouterr().out and len(read_klines(tmp_path/'new'/name)) == 48
    assert main([*argv, str(tmp_path/'a.xlsx')]) == 2
