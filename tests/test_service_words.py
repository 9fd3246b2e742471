"What a stranger meets first at the service: a body without its header, JSON that cannot be read, the first request"
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip('fastapi')
from fastapi.testclient import TestClient   # noqa: E402

from kronos_nb.core import DataError   # noqa: E402
from kronos_nb.serve import Limits, Service, _warm_up, listen, make_app   # noqa: E402

TOKEN = 'a-token-of-the-tests'


class Model:
    lookback_window, predict_window, max_context, features, fingerprint = 64, 4, 512, (), 'toy'
    def __init__(self, error=None): self.asked, self.error = [], error
    def predict_many(self, histories, predict_window, **how):
        self.asked.append(how['paths'])
        if self.error: raise self.error


@pytest.fixture(scope='module')
def client():
    app = make_app(Service(dict(toy=Model())), TOKEN)
    with TestClient(app, raise_server_exceptions=False, headers=dict(Authorization=f'Bearer {TOKEN}')) as c:
        yield c


@pytest.mark.parametrize('kind', [None, 'application/x-www-form-urlencoded', 'text/plain'])
def test_a_body_without_its_header(client, kind):
    "As `curl -d @file` sends it"
    headers = {} if kind is None else {'Content-Type': kind}
    got = client.post('/forecast', content=json.dumps(dict(bars=[])), headers=headers)
    assert got.status_code == 415 and 'Content-Type: application/json' in got.json()['error']['message']


@pytest.mark.parametrize('body', ['{"bars":' + '['*100_000 + ']'*100_000 + '}', '{"predict_window": ' + '9'*5000 + '}'])
def test_json_that_cannot_be_read(client, body):
    got = client.post('/forecast', content=body, headers={'Content-Type': 'application/json'})
    assert got.status_code == 400 and got.json()['error']['type'] == 'InvalidRequest' and 'JSON' in got.text


def test_models_are_warm_before_anybody_asks():
    good, bad = Model(), Model(DataError('it needs a column trades'))
    _warm_up(dict(bad=bad, good=good))
    assert good.asked == bad.asked == [1, 30]
    with pytest.raises(ZeroDivisionError): _warm_up(dict(broken=Model(ZeroDivisionError())))


BARS = dict(timestamps=['2024-01-01', '2024-01-02'], close=[1., 2.])


@pytest.mark.parametrize('body, words', [
    (dict(bars=BARS, predict_window=9999), ('predict_window', '256', '9999')),
    (dict(bars=BARS, paths='many'), ('paths', "'many'")), (dict(bar=BARS), ("'bar'", "'bars'")),
    (dict(bars=BARS, missing='zero'), ('missing', "'mask'", "'zero'")), ([1, 2], ('bars', '[1, 2]')),
    (dict(bars=BARS, quantiles=[.5, 2]), ('quantiles', '0..1', '2')), (dict(paths=3), ('bars', 'source', 'neither')),
    (dict(bars=BARS, source='binance'), ('bars', 'source', 'both')), (dict(bars=BARS, model='toi'), ("'toi'", "'toy'")),
    (dict(bars=dict(BARS, open=[1.])), ('2 values of timestamps', '1 of open'))])
def test_an_error_names_what_was_sent_and_what_may_be(client, body, words):
    got = client.post('/forecast', json=body)
    assert got.status_code in (404, 422) and all(o in got.json()['error']['message'] for o in words), got.text


def test_broken_json_and_an_empty_body_are_named_as_such(client):
    head = {'Content-Type': 'application/json'}
    broken = client.post('/forecast', content='{"bars": {"close": [1,2', headers=head).json()['error']['message']
    empty = client.post('/forecast', content='', headers=head).json()['error']['message']
    assert 'JSON' in broken and '23' in broken and 'bars' in empty and 'none' in empty


def test_a_path_or_a_method_that_is_not_there_is_named(client):
    assert '/openapi.json' in client.get('/forecasts').json()['error']['message']
    assert 'POST' in client.get('/forecast').json()['error']['message']


@contextlib.contextmanager
def listening(limits):
    "Yield the address of a service in a thread of this process"
    uvicorn = pytest.importorskip('uvicorn')
    app, s = make_app(Service(dict(toy=Model()), limits), TOKEN), listen('127.0.0.1', 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level='error', lifespan='on', ws='none'))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[s]), daemon=True)
    thread.start()
    try:
        yield s.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        s.close()


@pytest.mark.parametrize('token, status', [(TOKEN, 413), ('a-guess-of-a-stranger', 401)])
@pytest.mark.parametrize('announced', [True, False])
def test_who_sends_too_much_reads_why(token, status, announced):
    "Most clients send all before they read; a connection that is closed meanwhile shows them no answer"
    body = b' '*3_000_000
    headers = {'Authorization': f'Bearer {token}', 'Content-Type': 'application/json'}
    with listening(Limits(body=1_000_000)) as port:
        data = body if announced else (body[i:i + 100_000] for i in range(0, len(body), 100_000))
        request = urllib.request.Request(f'http://127.0.0.1:{port}/forecast', data, headers, method='POST')
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        error = json.loads(refused.value.read())['error']
    assert refused.value.code == status and (status == 401 or '3,000,000' in error['message'])


@pytest.mark.parametrize('head', ['', 'Expect: 100-continue\r\n'])
def test_nobody_sends_for_ever(head, monkeypatch):
    "Who is refused and sends nothing more, or waits to be asked for it, has the answer soon"
    monkeypatch.setattr('kronos_nb.serve._REST', 1.)
    with listening(Limits(body=1_000)) as port, socket.create_connection(('127.0.0.1', port), timeout=60) as s:
        begun = time.monotonic()
        s.sendall(f'POST /forecast HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n{head}\r\n'.encode())
        assert s.recv(1000).startswith(b'HTTP/1.1 401')
        assert time.monotonic() - begun < 30
