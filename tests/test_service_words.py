"What a stranger meets first at the service: a body without its header, JSON that cannot be read, the first request"
import json

import pytest

pytest.importorskip('fastapi')
from fastapi.testclient import TestClient   # noqa: E402

from kronos_nb.core import DataError   # noqa: E402
from kronos_nb.serve import Service, _warm_up, make_app   # noqa: E402

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
