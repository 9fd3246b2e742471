"Publishing: a pair goes to a stand-in for the hub and comes back, and nothing written or said holds the token"
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kronos_nb.core import ConfigError
from kronos_nb.data.read import sample_klines
from kronos_nb.forecast import Forecaster
from kronos_nb.hub import push
from kronos_nb.hub_card import model_card
from kronos_nb.train import fit
from .hub_standin import Hub

root, TOKEN = Path(__file__).resolve().parents[1], 'hf_' + 'SecretThatNobodyMaySee'
small = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4)
SETTINGS = {
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.lookback_window': 16, 'data.predict_window': 4, 'data.stride': 4,
    'data.normalizer': 'median_mad', 'runtime.progress': False, 'runtime.log_every': 1,
    'tokenizer.model': small | dict(n_enc_layers=2, n_dec_layers=2, group_size=4), 'tokenizer.epochs': 1,
    'predictor.model': small | dict(n_layers=2), 'predictor.epochs': 1, 'evaluate.paths': 4, 'evaluate.origins': 6}
bars = sample_klines('GOOG').head(700)
PAIR = 'somebody/goog-tokenizer', 'somebody/goog-predictor'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Return a run of a median/MAD model, trained on a machine that is logged in"
    out = tmp_path_factory.mktemp('here')/'goog'
    with pytest.MonkeyPatch.context() as m:
        m.setenv('HF_TOKEN', TOKEN)
        fit(bars, 'quickstart', out, **SETTINGS)
    return out


@pytest.fixture
def hub():
    with Hub(TOKEN) as hub:
        yield hub


def elsewhere(hub, home, code, token=TOKEN, **names):
    "Run `code` in a process that talks to `hub` and knows `names`; return its exit code and what it said"
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    env |= dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
                PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    if token:
        env['HF_TOKEN'] = token
    given = '\n'.join(f'{k} = {v!r}' for k, v in names.items())
    done = subprocess.run([sys.executable, '-c', f'{given}\n{code}'], env=env, text=True, capture_output=True,
                          timeout=300)
    return done.returncode, done.stdout + done.stderr


def holding_token(*folders):
    "Return the files below `folders` that hold the token"
    files = (p for folder in folders for p in Path(folder).rglob('*') if p.is_file())
    return [p for p in files if TOKEN.encode() in p.read_bytes()]


# a pair goes out and comes back
ROUND_TRIP = """
import numpy as np
import kronos_nb as kn
print(kn.push(run, 'somebody/goog', licence='cc0-1.0', data_licence='public domain'))
f = kn.Forecaster.from_pretrained(*pair)
print(f)
history, given = kn.sample_klines('GOOG').head(700).tail(16), np.load(before)
assert (f.predict(history, 4, paths=3, raw=True).paths == given['raw']).all()
paths = f.predict(history, 4, paths=3).paths
np.testing.assert_allclose(paths, given['delivered'], rtol=1e-6)   # a fit of GARCH knows how many threads there are
print(kn.push(run, 'somebody/goog', licence='cc0-1.0', data_licence='public domain'))
"""


def test_the_pair_arrives_and_comes_back(run, hub, tmp_path):
    "Private, one commit each, with card and picture; loaded by name it forecasts the same, with its own normaliser"
    made = {k: Forecaster.from_pretrained(run).predict(bars.tail(16), 4, paths=3, raw=k == 'raw').paths
            for k in ('raw', 'delivered')}
    np.savez(tmp_path/'before.npz', **made)
    code, said = elsewhere(hub, tmp_path/'home', ROUND_TRIP, run=str(run), pair=PAIR,
                           before=str(tmp_path/'before.npz'))
    assert code == 0, said
    assert 'MedianMAD' in said and f'{hub.url}/somebody/goog-predictor/commit/' in said
    assert sorted(hub.repos) == sorted(PAIR) and all(r['private'] for r in hub.repos.values())
    for name, repo in hub.repos.items():
        files = repo['files']
        assert {'README.md', 'config.json', 'model.safetensors', 'curve.png'} <= set(files) == set(repo['commits'][0])
        weights = run/name.rpartition('-')[2]/'best_model'/'model.safetensors'
        assert files['model.safetensors'] == weights.read_bytes()
        assert b'license: cc0-1.0' in files['README.md']
        assert not any(TOKEN.encode() in content for content in files.values())
    assert TOKEN not in said and not holding_token(run, tmp_path)


LOAD = "from kronos_nb.forecast import Forecaster; Forecaster.from_pretrained(*pair)"
UNCALIBRATED = "import kronos_nb as kn; assert kn.Forecaster.from_pretrained(*pair).calibration is None"
CALIBRATED = """
import numpy as np
import kronos_nb as kn
from kronos_nb.decode.calibration import Calibration
kn.push(run, 'somebody/goog')
kept = Calibration.load(run)
history = kn.sample_klines('GOOG').head(700).tail(16)
ways = map(kn.Forecaster.from_pretrained, ('somebody/goog', pair[1], run))
ways = (kn.Forecaster.from_pretrained(*pair), *ways)
for c in ways:
    assert c.calibration == kept
    np.testing.assert_allclose(c.predict(history, 4, paths=9).paths, np.load(wide), rtol=1e-6)
c.save_pretrained(saved)
assert kn.Forecaster.from_pretrained(saved).calibration == kept
"""


def test_the_calibration_comes_back(run, hub, tmp_path):
    "From the hub, by one name or by two, it acts on the paths as it does from the run's folder"
    np.save(tmp_path/'wide.npy', Forecaster.from_pretrained(run).predict(bars.tail(16), 4, paths=9).paths)
    code, said = elsewhere(hub, tmp_path/'home', CALIBRATED, run=str(run), pair=PAIR, wide=str(tmp_path/'wide.npy'),
                           saved=str(tmp_path/'saved'))
    assert code == 0, said
    del hub.repos[PAIR[1]]['files']['calibration.json']
    code, said = elsewhere(hub, tmp_path/'other', UNCALIBRATED, pair=PAIR)
    assert code == 0, said


# what goes wrong
PUSH = "import kronos_nb as kn; print(kn.push(run, 'somebody/goog'))"


@pytest.mark.parametrize('path, status', [('/api/repos/create', 403), ('/commit/', 403), ('/objects/', 403)])
def test_a_refusal_is_an_error_without_the_token(run, hub, tmp_path, path, status):
    "Even where the hub's answer repeats the token"
    hub.broken = {path: status}
    code, said = elsewhere(hub, tmp_path/'home', PUSH, run=str(run))
    assert code and 'RunError' in said and 'somebody/goog-' in said, said
    assert TOKEN not in said and (path == '/objects/' or 'Bearer ***' in said), said
    assert not holding_token(run, tmp_path)


def test_the_same_call_completes_half_a_pair(run, hub, tmp_path):
    hub.broken = {'goog-predictor/commit': 403}
    code, said = elsewhere(hub, tmp_path/'home', PUSH, run=str(run))
    assert code and f'{hub.url}/somebody/goog-tokenizer/commit/' in said
    assert not hub.repos[PAIR[1]]['commits']
    hub.broken = {}
    code, said = elsewhere(hub, tmp_path/'home', PUSH, run=str(run))
    assert code == 0 and hub.repos[PAIR[1]]['commits'], said


def test_nothing_is_sent_to_a_public_repository_unasked(run, hub, tmp_path):
    hub.repos[PAIR[1]] = dict(private=False, files={}, commits=[])
    code, said = elsewhere(hub, tmp_path/'home', PUSH, run=str(run))
    assert code and PAIR[1] in said and 'private=False' in said
    assert not any(r['files'] for r in hub.repos.values())


def test_without_a_login(run, hub, tmp_path):
    "Nothing is asked of the hub; and a private pair stays closed to strangers"
    code, said = elsewhere(hub, tmp_path/'home', PUSH, token=None, run=str(run))
    assert code and 'RunError' in said and 'HF_TOKEN' in said and not hub.asked
    for repo in PAIR:
        hub.repos[repo] = dict(private=True, files={}, commits=[])
    code, said = elsewhere(hub, tmp_path/'home', LOAD, token=None, pair=PAIR)
    assert code and 'ModelError' in said and 'somebody/goog-' in said, said


@pytest.mark.parametrize('name', ['goog', 'a/b/c', 'some body/x', '/x', 'x/', 'a/x--y', 'a/..', 'a/x.git', '../x'])
def test_names_that_the_hub_rejects(name):
    with pytest.raises(ConfigError, match='user/name'):
        push('nowhere', name, dry_run=True)


# cards
def test_cards_of_a_real_run(run):
    "They quote the numbers of the run, the hub can read their front matter, and no path of this machine is in them"
    from huggingface_hub import ModelCard
    facts = json.loads((run/'run.json').read_text())
    verdict = json.loads((run/'evaluation'/'evaluation.json').read_text())['sentence']
    for stage in ('tokenizer', 'predictor'):
        folder = run/stage/'best_model'
        text = (folder/'README.md').read_text()
        assert all(fact in text for fact in (facts['data'], '2004-08-19', 'median and 1.4826', verdict))
        assert str(run) not in text and str(root) not in text
        assert ModelCard(text).data.to_dict()['license'] == 'other'
        pictures = re.findall(r'!\[.*?\]\((.*?)\)', text)
        assert pictures and all((folder/p).resolve().is_file() for p in pictures)
    assert 'cover_80' in text and 'Calibration' in text


def test_a_card_says_which_weights_it_describes(run, tmp_path):
    stage = shutil.copytree(run, tmp_path/'copy')/'predictor'
    validations = stage/'validations.jsonl'
    start = json.dumps(dict(epoch=1, step=0, val_loss=.01))
    validations.write_text(f'{start}\n{validations.read_text()}')
    assert 'Training never improved' in model_card(stage, 'predictor')
    table = [dict(candidate=k, val_loss=v, chosen=k == 'ema') for k, v in dict(best=1.2, ema=1.1).items()]
    choice = dict(chosen='ema', origin='EMA of 20 steps', table=table)
    (stage/'weights.json').write_text(json.dumps(choice))
    assert '**ema** (EMA of 20 steps)' in model_card(stage, 'predictor')
