"A small run that several test files share: its bars and settings, how it starts in processes, and what it leaves"
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from kronos_nb.config import Config
from kronos_nb.data.read import sample_klines
from kronos_nb.training.history import read_lines

root = Path(__file__).resolve().parents[1]
small = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4)
SETTINGS = {
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
    'data.lookback_window': 16, 'data.predict_window': 4, 'data.stride': 2, 'evaluate.paths': 4,
    'runtime.save_steps': 4, 'runtime.log_every': 1, 'runtime.progress': False, 'runtime.plots': False,
    'tokenizer.model': small | dict(n_enc_layers=2, n_dec_layers=2, group_size=4),
    'predictor.model': small | dict(n_layers=2), 'tokenizer.epochs': 2, 'predictor.epochs': 2,
    'tokenizer.patience': None, 'predictor.patience': None, 'tokenizer.average_last': 2, 'predictor.ema_decay': .9,
    'predictor.lawa': .3}
bars = sample_klines('GOOG').head(700)
cfg = Config.preset('quickstart', **SETTINGS)
no_test = {'data.train': .8, 'data.val': .2, 'data.test': 0.}

# the codebook's entropy is a function of the batch mean, so it is off where batches are cut differently
no_entropy = {'tokenizer.model': cfg.tokenizer.model | dict(zeta=0.)}
one_epoch = {
    **no_test, 'tokenizer.epochs': 1, 'predictor.epochs': 1, 'tokenizer.average_last': 0, 'predictor.average_last': 0,
    'predictor.ema_decay': None, 'predictor.lawa': None, 'data.stride': 4}
four_steps = one_epoch | no_entropy | {
    'runtime.only': 'tokenizer', 'tokenizer.max_steps': 4, 'tokenizer.batch_size': 16}


# what a run leaves
def final(out, stage='tokenizer') -> dict:
    "Return the weights of the last step"
    return load_file(out/stage/'final_model'/'model.safetensors')


def rows(out, kind, stage='tokenizer') -> list:
    "Return the rows of steps, validations or notes"
    return read_lines(out/stage/f'{kind}.jsonl')


def notes(out, kind, stage='tokenizer') -> list:
    "Return the notes of one kind"
    return [n for n in rows(out, 'notes', stage) if n['kind'] == kind]


def choice(out, stage='tokenizer') -> dict:
    "Return which weights were kept, and the candidates"
    return json.loads((out/stage/'weights.json').read_text())


def last_checkpoint(out, stage='tokenizer') -> Path:
    return max((out/stage/'checkpoints').glob('step_*'))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def assert_close(a: dict, b: dict, rtol, atol):
    assert a.keys() == b.keys()
    for k, v in a.items():
        torch.testing.assert_close(v, b[k], rtol=rtol, atol=atol, msg=k)


# processes
def popen(argv, cwd=root, path=(), **env) -> subprocess.Popen:
    "Start Python on `argv` with one thread; `path` goes before the repository in PYTHONPATH"
    own = dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(map(str, (*path, root))))
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=os.environ | own | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def start(out, launcher=(), changes=None, **env) -> subprocess.Popen:
    "Start tests/scaling_run.py"
    return popen([*launcher, root/'tests'/'scaling_run.py', out, json.dumps(changes or {})], **env)


def finish(process) -> str:
    "Return what a process says until it ends"
    try:
        said = process.communicate(timeout=600)[0]
    except subprocess.TimeoutExpired:
        process.terminate()   # a launcher ends its processes with it
        raise
    assert process.returncode == 0, said
    return said
