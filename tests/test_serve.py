"The service: the same bits as without it, limits, the token, many clients at once, and an end in order"
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip('fastapi')
from fastapi.testclient import TestClient   # noqa: E402

from kronos_nb.cli import main   # noqa: E402
from kronos_nb.core import ConfigError   # noqa: E402
from kronos_nb.data.read import sample_klines   # noqa: E402
from kronos_nb.forecast import Forecaster   # noqa: E402
from kronos_nb.serve import Limits, Service, make_app, named_models   # noqa: E402

TOKEN = 'a-token-of-the-tests'
doge = sample_klines('DOGEUSDT')


def columns(bars):
    return {c: bars[c].astype(str).tolist() if c in ('timestamps', 'symbol') else bars[c].tolist() for c in bars}


def asked(end=200, **how):
    return dict(bars=columns(doge.iloc[end - 64:end]), symbol='DOGEUSDT', predict_window=4, paths=3) | how


@pytest.fixture(scope='module')
def toy():
    return Forecaster.from_pretrained('bundled')


def expected(f, end=200, horizon=4, paths=3):
    bars = doge.iloc[end - 64:end]
    key = f'DOGEUSDT {bars.timestamps.iloc[-1]}'
    return f.predict_many([bars], horizon, keys=[key], paths=paths, progress=False)[0].quantile(.5)['close'].tolist()


@contextlib.contextmanager
def client_of(service):
    app = make_app(service, TOKEN)
    with TestClient(app, raise_server_exceptions=False, headers=dict(Authorization=f'Bearer {TOKEN}')) as c:
        yield c


@pytest.fixture(scope='module')
def client(toy):
    with client_of(Service(dict(toy=toy), Limits(rows=300, paths=20, horizon=24, body=100_000))) as c:
        yield c


def test_the_answer_is_that_of_the_forecaster(client, toy):
    got = client.post('/forecast', json=asked()).json()
    assert got['quantiles']['0.5'] == expected(toy) and got['model'] == 'toy'
    rows = doge.iloc[136:200].astype({'timestamps': str}).to_dict('records')
    assert client.post('/forecast', json=asked(bars=rows)).json() == got
    paths = client.post('/forecast', json=asked(return_paths=True)).json()['paths']
    assert len(paths) == 3 and len(paths[0]) == 4


@pytest.mark.parametrize('method, path, status', [('get', '/nothing', 404), ('get', '/forecast', 405),
                                                  ('post', '/models', 405)])
def test_what_is_not_there(client, method, path, status):
    got = getattr(client, method)(path)
    assert got.status_code == status and got.json()['error']['type'] == 'HTTPError'


def test_what_can_be_asked(client):
    assert client.get('/health').json()['status'] == 'ok'
    assert client.get('/models').json()[0]['name'] == 'toy'
    assert 'kronos_requests_total{path="/forecast"' in client.get('/metrics').text
    assert '/forecast' in client.get('/openapi.json').json()['paths']


@pytest.mark.parametrize('path', ['/models', '/metrics', '/openapi.json', '/forecast', '/nothing', '/health/', '/docs'])
@pytest.mark.parametrize('header', [None, 'Bearer', 'Bearer ', 'Bearer wrong', f'Basic {TOKEN}', f'Bearer {TOKEN}x',
                                    TOKEN, 'Bearer \xe9'])
def test_nobody_gets_in_without_the_token(client, path, header):
    headers = {'Authorization': b'' if header is None else header.encode('latin-1')}
    assert client.get(path, headers=headers).status_code == 401


BAD = [
    (asked(paths=21), 422), (asked(paths=0), 422), (asked(paths='many'), 422), (asked(predict_window=25), 422),
    (asked(temperature=-1), 422), (asked(top_p=2), 422), (asked(quantiles=[2]), 422), (asked(quantiles=[.5]*102), 422),
    (asked(extra=1), 422), (asked(model='toyy'), 404), (asked(source='binance', interval='1h'), 422),
    (dict(source='binance', symbol='BTCUSDT', interval='1h'), 422), ({}, 422), ([], 422), (asked(bars=[]), 422),
    (asked(bars={}), 422), (asked(bars='x'), 422), (asked(bars=[{'a': 1}]*5), 422), (asked(calendar='nowhere'), 422),
    (asked(bars=dict(columns(doge.head(70)), close=[1.])), 422), (asked(symbol='x'*65), 422),
    (asked(bars=columns(doge.head(301))), 413), (asked(bars=columns(doge.head(1))), 422),
    (asked(bars=dict(columns(doge.head(70)), close=['x']*70)), 422),
    (asked(bars=dict(columns(doge.head(70)), close=[None]*70)), 422),
    (asked(bars=dict(columns(doge.head(70)), timestamps=['2024-01-01']*70)), 422),
    (asked(bars=dict(columns(doge.head(70)), symbol=['a', 'b']*35)), 422), (asked(lookback_window=1), 422),
    (asked(bars=dict(columns(doge.head(70)), close=[{'a': [1]}]*70)), 422)]


@pytest.mark.parametrize('body, status', BAD)
def test_a_bad_request_is_a_clear_error(client, body, status):
    got = client.post('/forecast', json=body)
    assert got.status_code == status, got.text
    error = got.json()['error']
    assert error['message'] and set(error) == {'type', 'message'} and len(got.text) < 1000
    assert 'Traceback' not in got.text and '/work' not in got.text and 'site-packages' not in got.text


@pytest.mark.parametrize('body', [b'', b'{', b'\xff\xfe', b'[' * 5000, b'{"bars": NaN}', b'null'])
def test_what_is_no_request(client, body):
    got = client.post('/forecast', content=body, headers={'Content-Type': 'application/json'})
    assert got.status_code in (400, 422) and got.json()['error']['message']


def test_a_body_that_is_too_large(client):
    assert client.post('/forecast', content=b' '*100_001).status_code == 413
    def pieces():   # no length is announced
        for _ in range(20):
            yield b' '*10_000
    assert client.post('/forecast', content=pieces()).status_code == 413


def test_nan_in_bars_is_named(client):
    bars = columns(doge.iloc[136:200])
    bars['close'][5] = float('nan')
    got = client.post('/forecast', content=json.dumps(asked(bars=bars)), headers={'Content-Type': 'application/json'})
    assert got.status_code == 422 and str(doge.timestamps[141]) in got.json()['error']['message']


class Slow:
    "A forecaster that takes its time, or fails"
    lookback_window, predict_window, max_context, features, fingerprint = 64, 4, 512, (), 'slow'
    def __init__(self, toy, seconds=0., error=None):
        self.toy, self.predictor, self.seconds, self.error, self.sizes = toy, toy.predictor, seconds, error, []
    def predict_many(self, histories, *args, **kwargs):
        self.sizes.append(len(histories))
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return self.toy.predict_many(histories, *args, **kwargs)


def together(client, n, **how):
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda i: client.post('/forecast', json=asked(150 + i, **how)), range(n)))


def test_requests_that_wait_are_forecast_together(toy):
    slow = Slow(toy, .3)
    with client_of(Service(dict(slow=slow))) as c:
        found = together(c, 12)
    assert [r.json()['quantiles']['0.5'] for r in found] == [expected(toy, 150 + i) for i in range(12)]
    assert sum(slow.sizes) == 12 and max(slow.sizes) >= 4


def test_too_many_and_too_slow(toy):
    with client_of(Service(dict(slow=Slow(toy, 1.)), Limits(waiting=2, timeout=.5))) as c:
        codes = sorted(r.status_code for r in together(c, 6))
        assert set(codes) == {503, 504} and codes.count(504) <= 3
        time.sleep(1.2)
        assert c.get('/health').status_code == 200


def test_a_bug_is_an_answer_without_details(toy):
    with client_of(Service(dict(bad=Slow(toy, error=ZeroDivisionError('secret'))))) as c:
        got = c.post('/forecast', json=asked())
    assert got.status_code == 500 and 'secret' not in got.text


@pytest.mark.parametrize('make', [
    lambda: Limits(paths=0), lambda: Service({}), lambda: named_models(['=x']), lambda: named_models(['a=x', 'a=y'])])
def test_wrong_settings(make):
    with pytest.raises(ConfigError):
        make()


def test_a_short_token_is_refused(toy):
    with pytest.raises(ConfigError, match='token'):
        make_app(Service(dict(toy=toy)), 'short')


@contextlib.contextmanager
def server(*options):
    "Run the command and yield its process and its address"
    env = os.environ | dict(KRONOS_NB_TOKEN=TOKEN, OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'kronos_nb.cli', 'serve', '--model', 'toy=bundled', '--port', '0', *options]
    p = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        address = re.search(r'http://\S+?(?=,)', p.stdout.readline())[0]
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f'{address}/health', timeout=5)
                break
            time.sleep(.1)
        yield p, address
    finally:
        p.kill()
        p.communicate()


def post(address, body):
    headers = {'Authorization': f'Bearer {TOKEN}', 'Content-Type': 'application/json'}
    request = urllib.request.Request(f'{address}/forecast', json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_sigterm_lets_requests_finish(toy):
    with server() as (p, address):
        post(address, asked())
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = [pool.submit(post, address, asked(150 + i, paths=60)) for i in range(8)]
            time.sleep(.3)
            p.send_signal(signal.SIGTERM)
            answers = [o.result()['quantiles']['0.5'] for o in found if not isinstance(o.exception(), OSError)]
        out, err = p.communicate(timeout=60)
    assert answers and p.returncode in (0, -signal.SIGTERM, 143) and 'Traceback' not in err
    assert TOKEN not in out + err


@pytest.mark.parametrize('argv', ['serve --model nowhere', 'serve --model bundled --port 99999', 'serve --max-paths 0',
    'serve --model a=bundled --model a=bundled', 'serve --model bundled --ip 203.0.113.1'])
def test_wrong_use_is_one_error_and_one_command(capsys, argv):
    assert main(argv.split()) == 2
    said = capsys.readouterr().err
    assert 'Error: ' in said and '\nTry: kronos-nb' in said


def test_a_taken_port_is_said(capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        assert main(['serve', '--model', 'bundled', '--port', str(s.getsockname()[1])]) == 2
    assert '--port' in capsys.readouterr().err
