"""A turn of `kronos-nb run --fetch` against a server on this machine that answers as an exchange does: bars arrive,
come late, are corrected; the turn is called twice, or killed at any point"""
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pandas as pd
import pytest

from kronos_nb.cli import main
from kronos_nb.data import fetch
from kronos_nb.ledger import Ledger

root, HOUR, H = Path(__file__).resolve().parents[1], 3_600_000, 4
CCXT = '''
"The part of ccxt that is used here; it asks a server on this machine"
import json, os, urllib.error, urllib.parse, urllib.request

class NetworkError(Exception): pass

class here:
    has, timeframes = dict(fetchOHLCV=True), {'1h': '1h', '1d': '1d'}
    def __init__(self, options): pass
    def fetch_ohlcv(self, symbol, timeframe, since):
        query = urllib.parse.urlencode(dict(symbol=symbol, timeframe=timeframe, since=since))
        try:
            with urllib.request.urlopen(f"{os.environ['LIVE_URL']}/?{query}", timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e: raise ValueError(f'here does not know {symbol}: {e}')
        except OSError as e: raise NetworkError(str(e))

exchanges = ['here']
'''
OPTIONS = ('run --interval 1h --source ccxt:here --model bundled --ledger book --lookback-window 40 '
           f'--predict-window {H} --paths 8 --calendar 24/7').split()


class Exchange:
    "Hours of two coins up to the one at hand, `behind` hours ago"
    def __init__(self):
        now = int(time.time()*1000)//HOUR
        self.rows, self.behind, self.hidden, self.holding, self.asked = {}, 12, set(), None, 0
        for seed, symbol in enumerate(('AAA', 'BBB')):
            closes = 100*np.exp(np.random.default_rng(seed).normal(0, .01, 300).cumsum())
            self.rows[symbol] = [[(now - 299 + i)*HOUR, c, 1.01*c, .99*c, float(c), 5.] for i, c in enumerate(closes)]
        outer = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): outer.answer(self)
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()

    def answer(self, request):
        asked = {k: v[0] for k, v in parse_qs(urlparse(request.path).query).items()}
        self.asked += 1
        if self.holding: self.holding.wait(60)
        if asked['symbol'] not in self.rows: return request.send_error(404)
        rows = self.rows[asked['symbol']]
        rows = [r for r in rows[:len(rows) - self.behind] if r[0] >= int(asked['since']) and r[0] not in self.hidden]
        body = json.dumps(rows[::24] if asked['timeframe'] == '1d' else rows[:100]).encode()
        request.send_response(200)
        request.send_header('Content-Length', str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def correct(self, symbol, back, factor):
        "Change a close, `back` bars before the newest one that was handed out"
        row = self.rows[symbol][len(self.rows[symbol]) - self.behind - 1 - back]
        row[1:5] = [factor*o for o in row[1:5]]
        return pd.Timestamp(row[0], unit='ms')


@pytest.fixture
def exchange(tmp_path, monkeypatch):
    (tmp_path/'modules').mkdir()
    (tmp_path/'modules'/'ccxt.py').write_text(CCXT)
    found = Exchange()
    monkeypatch.setenv('LIVE_URL', f'http://127.0.0.1:{found.server.server_port}')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(fetch, '_WAIT', 0)
    monkeypatch.delitem(sys.modules, 'ccxt', raising=False)
    monkeypatch.syspath_prepend(str(tmp_path/'modules'))
    monkeypatch.chdir(tmp_path)
    yield found
    found.server.shutdown()
    found.server.server_close()
    sys.modules.pop('ccxt', None)


def turn(*symbols, code=0):
    assert main([*OPTIONS, '--fetch', *(symbols or ('AAA', 'BBB'))]) == code
    return Ledger('book')


def killed(exchange, code=''):
    "Begin a turn in a process of its own; return it"
    env = os.environ | dict(PYTHONPATH=f'{root}{os.pathsep}{Path("modules").resolve()}', OMP_NUM_THREADS='1')
    script = f'{code}\nfrom kronos_nb.cli import main\nmain({[*OPTIONS, "--fetch", "AAA", "BBB"]!r})'
    return subprocess.Popen([sys.executable, '-c', script], env=env, stdout=subprocess.DEVNULL)


def content(ledger):
    "Return what a ledger holds, without the times at which forecasts were made"
    def plain(frame, key):
        return frame.drop(columns='made').sort_values(key).reset_index(drop=True) if len(frame) else frame
    return plain(ledger.forecasts, ['key', 'h']), plain(ledger.grades, ['key', 'model', 'h'])


def test_turns_follow_the_market(exchange, capsys):
    ledger = turn()
    first = ledger.forecasts
    assert len(first) == 2*H and not len(ledger.grades)
    newest = pd.Timestamp(exchange.rows['AAA'][300 - exchange.behind - 1][0], unit='ms')
    assert set(first['origin']) == {newest} and 'the source is late' in capsys.readouterr().out
    before = content(turn())   # twice: nothing is stored or lost
    assert 'nothing was stored' in capsys.readouterr().out and len(before[0]) == 2*H
    for exchange.behind in (11, 7, 3, 0): ledger = turn()
    origins = ledger.forecasts['origin'].unique()
    now = pd.Timestamp.now('UTC').tz_localize(None)
    assert len(origins) == 5 and origins.max() < now.floor('h') - pd.Timedelta('59min')   # the bar at hand is not read
    graded = ledger.grades.query("model == 'model'")
    assert len(graded) == 3*2*H and set(ledger.pending['origin']) == set(sorted(origins)[-2:])
    truth = {(s, pd.Timestamp(r[0], unit='ms')): r[4] for s, rows in exchange.rows.items() for r in rows}
    assert [truth[s, t] for s, t in zip(graded['symbol'], graded['timestamps'])] == graded['y'].tolist()
    assert ledger.series['replayed'].iloc[0] == 8 and ledger.series['forecasts'].iloc[0] == 10   # the last two are real


def test_late_and_corrected_bars_are_graded_again(exchange, capsys):
    turn('AAA')
    late = exchange.rows['AAA'][300 - exchange.behind + 1][0]   # the second bar of the forecast
    exchange.hidden, exchange.behind = {late}, 12 - H - 1
    turn('AAA')
    assert '1 missing bar' in capsys.readouterr().out   # a later bar is there, so it is graded without this one
    exchange.hidden, exchange.behind = set(), 12 - H - 2
    ledger = turn('AAA')
    assert '1 late bar' in capsys.readouterr().out
    y = ledger.grades.query("model == 'model'")['y'].tolist()
    assert y == [r[4] for r in exchange.rows['AAA'][288:288 + H]]
    at = exchange.correct('AAA', 2 + 1, 1.02)
    changed = turn('AAA').grades.loc[lambda d: (d['model'] == 'model') & (d['timestamps'] == at)]
    assert '1 corrected bar' in capsys.readouterr().out
    assert changed['y'].iloc[0] == pytest.approx(1.02*changed['y_first'].iloc[0])


def test_a_killed_turn_leaves_nothing_to_clean_up(exchange, tmp_path):
    turn()
    exchange.behind = 6
    exchange.holding, asked = threading.Event(), exchange.asked
    waiting = killed(exchange)   # killed while it waits for the exchange
    for _ in range(600):
        if exchange.asked > asked: break
        time.sleep(.1)
    assert exchange.asked > asked
    waiting.send_signal(signal.SIGKILL)
    exchange.holding.set()
    exchange.holding = None
    assert waiting.wait(30) == -signal.SIGKILL and len(Ledger('book').pending) == 2
    dies = ('import os, signal\nfrom kronos_nb.ledger import Ledger\n'
            'Ledger.append = lambda self, *args: os.kill(os.getpid(), signal.SIGKILL)')
    assert killed(exchange, dies).wait(120) == -signal.SIGKILL   # graded, and the forecasts not stored
    half = Ledger('book')
    assert len(half.forecasts) == 2*H and len(half.grades.query("model == 'model'")) == 2*H
    undone = content(turn())
    os.rename('book', 'killed')
    exchange.behind = 12
    turn()
    exchange.behind = 6
    for got, wanted in zip(undone, content(turn())): pd.testing.assert_frame_equal(got, wanted)
    assert not [p for p in (tmp_path/'killed').rglob('*') if p.is_file() and not p.name.endswith(('.parquet', '.lock'))]


def test_one_symbol_that_fails_costs_nothing(exchange, capsys):
    "The exchange does not know it: the others have their turn, and the exit code is 1 until it is known"
    turn()
    exchange.behind = 6
    before = content(turn('AAA', 'NOPE', 'BBB', code=1))
    out, err = capsys.readouterr()
    assert 'NOPE failed: RunError: ' in out and 'NOPE' in err and 'Traceback' not in err
    for got, wanted in zip(content(turn()), before): pd.testing.assert_frame_equal(got, wanted)   # nothing was left
    for got, wanted in zip(content(turn('AAA', 'NOPE', code=1)), before): pd.testing.assert_frame_equal(got, wanted)
    exchange.rows['NOPE'] = exchange.rows['AAA']
    assert set(turn('AAA', 'NOPE').pending['symbol']) == {'AAA', 'BBB', 'NOPE'}
    turn('NEVER', code=2)
    assert 'NEVER' in capsys.readouterr().err


def test_an_exchange_that_is_gone_is_one_error(exchange, capsys, monkeypatch):
    monkeypatch.setenv('LIVE_URL', 'http://127.0.0.1:9')
    turn('AAA', code=2)
    said = capsys.readouterr().err
    assert 'here cannot be read' in said and 'Traceback' not in said and not Path('book').exists()
