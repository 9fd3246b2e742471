"Publishing: the pair goes to a stand-in for the hub and comes back; nothing that is written or said holds the token"
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, RunError
from kronos_nb.data.kline import sample_klines
from kronos_nb.data.normalize import MedianMAD
from kronos_nb.forecast import Forecaster
from kronos_nb.hub import model_card, push, repo_names, write_cards
from kronos_nb.train import fit
from .hub_standin import Hub

root, TOKEN = Path(__file__).resolve().parents[1], 'hf_' + 'SecretThatNobodyMaySee'
small = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4)
cfg = Config.preset('quickstart', **{'base.symbols': None, 'data.lookback_window': 16, 'data.predict_window': 4, 'data.stride': 4, 'data.normalizer': 'median_mad', 'runtime.progress': False, 'runtime.log_every': 1,
    'tokenizer.model': small | dict(n_enc_layers=2, n_dec_layers=2, group_size=4), 'predictor.model': small | dict(n_layers=2), 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'evaluate.paths': 4, 'evaluate.origins': 6})
bars = sample_klines('GOOG').head(700)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('here')/'goog'
    os.environ['HF_TOKEN'] = TOKEN   # as it is on the machine of somebody who publishes
    try: fit(bars, cfg, out)
    finally: del os.environ['HF_TOKEN']
    return out

def elsewhere(hub, home, code, token=TOKEN):
    "Run `code` in a process of its own, with the hub's address; what it said"
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')} | dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    if token: env['HF_TOKEN'] = token
    p = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    return p.returncode, p.stdout+p.stderr

def files(*folders): return [p for f in folders for p in Path(f).rglob('*') if p.is_file()]

def test_the_pair_arrives_and_comes_back(run, tmp_path):
    "Private, one commit each, with card and pictures; loaded again by name it forecasts the same, with its own normaliser; no trace of the token anywhere"
    before = Forecaster.from_pretrained(run).predict(bars.tail(16), 4, paths=3).paths
    np.save(tmp_path/'before.npy', before)
    with Hub(TOKEN) as hub:
        code, said = elsewhere(hub, tmp_path/'home', f'''
import numpy as np
from kronos_nb.hub import push
print(push({str(run)!r}, 'somebody/goog', licence='cc0-1.0', data_licence='public domain'))
from kronos_nb.forecast import Forecaster
from kronos_nb.data.kline import sample_klines
f = Forecaster.from_pretrained('somebody/goog-tokenizer', 'somebody/goog-predictor')
print(f)
assert (f.predict(sample_klines('GOOG').head(700).tail(16), 4, paths=3).paths == np.load({str(tmp_path/'before.npy')!r})).all()
print(push({str(run)!r}, 'somebody/goog', licence='cc0-1.0', data_licence='public domain'))
''')
        assert code == 0, said
        assert 'MedianMAD' in said and f'{hub.url}/somebody/goog-predictor/commit/' in said
        assert sorted(hub.repos) == ['somebody/goog-predictor', 'somebody/goog-tokenizer'] and all(r['private'] for r in hub.repos.values())
        for name, r in hub.repos.items():
            assert {'README.md', 'config.json', 'model.safetensors', 'curve.png'} <= set(r['files']) == set(r['commits'][0])
            assert r['files']['model.safetensors'] == (run/name.rpartition('-')[2]/'best_model'/'model.safetensors').read_bytes()
            assert b'license: cc0-1.0' in r['files']['README.md'] and not any(TOKEN.encode() in o for o in r['files'].values())
        assert TOKEN not in said
        assert not [p for p in files(run, tmp_path) if TOKEN.encode() in p.read_bytes()], 'the token was written'
        code, said = elsewhere(hub, tmp_path/'stranger', "from kronos_nb.forecast import Forecaster; Forecaster.from_pretrained('somebody/goog-tokenizer', 'somebody/goog-predictor')", token=None)
        assert code and 'the hub did not give its files' in said

def test_the_calibration_comes_back(run, tmp_path):
    "`fit` kept it beside the predictor; from the hub, by one name or by two, it widens the bands as it does from the run's folder"
    from kronos_nb.calibrate import Calibrated
    c = Calibrated.from_pretrained(run)
    np.save(tmp_path/'wide.npy', c.predict(bars.tail(16), 4, paths=9).paths)
    with Hub(TOKEN) as hub:
        code, said = elsewhere(hub, tmp_path/'home', f'''
import numpy as np
from kronos_nb.hub import push
from kronos_nb.calibrate import Calibrated, Calibration
from kronos_nb.forecast import Forecaster
from kronos_nb.data.kline import sample_klines
push({str(run)!r}, 'somebody/goog')
kept = Calibration.load({str(run)!r})
pair = 'somebody/goog-tokenizer', 'somebody/goog-predictor'
for c in (Calibrated.from_pretrained('somebody/goog'), Calibrated.from_pretrained(*pair), Forecaster.from_pretrained('somebody/goog-predictor').calibrated(), Forecaster.from_pretrained({str(run)!r}).calibrated()):
    assert c.calibration == kept
    assert (c.predict(sample_klines('GOOG').head(700).tail(16), 4, paths=9).paths == np.load({str(tmp_path/'wide.npy')!r})).all()
c.save_pretrained({str(tmp_path/'saved')!r})
assert Calibrated.from_pretrained({str(tmp_path/'saved')!r}).calibration == kept
''')
        assert code == 0, said
        del hub.repos['somebody/goog-predictor']['files']['calibration.json']
        code, said = elsewhere(hub, tmp_path/'stranger', "from kronos_nb.calibrate import Calibrated; Calibrated.from_pretrained('somebody/goog')")
        assert code and "RunError: there is no calibration.json in 'somebody/goog-predictor'" in said, said

PUSH = "from kronos_nb.hub import push; print(push({run!r}, 'somebody/goog', private={private}))"
@pytest.mark.parametrize('path, status', [('/api/repos/create', 403), ('/commit/', 403), ('/objects/', 403)])
def test_a_refusal_is_an_error_without_the_token(run, tmp_path, path, status):
    "Even where the hub's answer repeats it"
    with Hub(TOKEN) as hub:
        hub.broken = {path: status}
        code, said = elsewhere(hub, tmp_path/'home', PUSH.format(run=str(run), private=True))
    assert code and 'RunError: the hub did not take' in said and TOKEN not in said and (path == '/objects/' or 'Bearer ***' in said), said
    assert not [p for p in files(run, tmp_path) if TOKEN.encode() in p.read_bytes()]

def test_half_a_pair_goes_on(run, tmp_path):
    "The tokenizer is there, the predictor is refused: the message says so, and the same call completes the pair"
    with Hub(TOKEN) as hub:
        hub.broken = {'goog-predictor/commit': 403}
        code, said = elsewhere(hub, tmp_path/'home', PUSH.format(run=str(run), private=True))
        assert code and 'Already there:' in said and 'the same call goes on' in said and not hub.repos['somebody/goog-predictor']['commits']
        hub.broken = {}
        code, said = elsewhere(hub, tmp_path/'home', PUSH.format(run=str(run), private=True))
        assert code == 0 and hub.repos['somebody/goog-predictor']['commits'], said

def test_nothing_is_sent_to_a_public_repository_unasked(run, tmp_path):
    with Hub(TOKEN) as hub:
        hub.repos['somebody/goog-predictor'] = dict(private=False, files={}, commits=[])
        code, said = elsewhere(hub, tmp_path/'home', PUSH.format(run=str(run), private=True))
        assert code and "'somebody/goog-predictor' exists and is public, and private=True was asked" in said
        assert not any(r['files'] for r in hub.repos.values())

def test_no_login(run, tmp_path):
    with Hub(TOKEN) as hub: code, said = elsewhere(hub, tmp_path/'home', PUSH.format(run=str(run), private=True), token=None)
    assert code and 'no login for the hub: set HF_TOKEN in the environment' in said and not hub.asked

def test_cards_of_a_real_run(run, tmp_path):
    "Beside the weights of each stage; they say where the numbers of the run say; the hub can read their head; no path of this machine"
    from huggingface_hub import ModelCard
    facts = json.loads((run/'run.json').read_text())
    for stage in ('tokenizer', 'predictor'):
        text = (run/stage/'best_model'/'README.md').read_text()
        assert facts['data'] in text and str(run) not in text and str(root) not in text and '2004-08-19' in text and 'median and 1.4826' in text
        assert ModelCard(text).data.to_dict()['license'] == 'other'
        assert all((run/stage/'best_model'/p).resolve().is_file() for p in __import__('re').findall(r'!\[.*?\]\((.*?)\)', text))
    assert json.loads((run/'evaluation'/'evaluation.json').read_text())['sentence'] in text and 'cover_80' in text

def test_training_that_improved_nothing_is_said(run, tmp_path):
    import shutil
    out = shutil.copytree(run, tmp_path/'copy')
    rows = [json.loads(o) for o in (out/'predictor'/'validations.jsonl').read_text().splitlines()]
    (out/'predictor'/'validations.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in [dict(epoch=1, step=0, val_loss=.01), *rows]))
    assert 'No step of training improved' in model_card(out, 'predictor')
    (out/'predictor'/'weights.json').write_text(json.dumps(dict(chosen='ema', origin='EMA of 20 steps', table=[dict(candidate='best', val_loss=1.2), dict(candidate='ema', val_loss=1.1)])))
    assert 'The weights are **ema** (EMA of 20 steps)' in model_card(out, 'predictor')

@pytest.mark.parametrize('name', ['goog', 'a/b/c', 'some body/x', '/x', 'x/', 'a/x--y', 'a/..', 'a/x.git', '../x'])
def test_names_that_cannot_be(name):
    with pytest.raises(ConfigError, match='user/name'): repo_names(name)
