"""Feed bytes that coverage chooses to what reads strangers' files; keep those that end in no typed error

    python -m tests.faults.fuzz readers|settings|models|metrics [--seconds 600] [OUT]

It needs `pip install atheris`, which is no dependency. A find is OUT/TARGET/find_*.bin beside the traceback. It becomes
a test: the bytes go to tests/faults/finds/TARGET/, which `test_finds.py` feeds to the same functions without atheris.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ENDINGS = ('csv', 'csv.gz', 'zip', 'parquet', 'feather', 'json', 'txt')
HEAD = b'timestamps,open,high,low,close,volume,amount\n'
FOLDER = Path(tempfile.gettempdir())   # of the files that the targets write; a folder of its own in `main`
SIZE = dict(d_model=8, n_heads=2, ff_dim=16, s1_bits=3, s2_bits=3)
LAYERS = dict(tokenizer=dict(n_enc_layers=1, n_dec_layers=1, group_size=3), predictor=dict(n_layers=1))


# targets: bytes -> nothing, or an exception that is a find
def readers(data: bytes):
    "The first byte says what the file is called"
    from kronos_nb.core import DataError
    from kronos_nb.data.check import check_klines
    from kronos_nb.data.read import read_klines
    from kronos_nb.data.repair import repair_klines
    if not data:
        return
    file = FOLDER/f'any.{ENDINGS[data[0] % len(ENDINGS)]}'
    file.write_bytes(data[1:])
    try:
        bars = read_klines(file)
        check_klines(bars).to_markdown()
        repair_klines(bars)
    except DataError as e:
        assert len(str(e)) < 20_000
    finally:
        file.unlink()


def settings(data: bytes):
    from kronos_nb.config import Config
    from kronos_nb.core import ConfigError
    file = FOLDER/'any.yaml'
    file.write_bytes(data)
    try:
        cfg = Config.load(file)
    except ConfigError as e:
        assert len(str(e)) < 5000
        return
    cfg.save(file)
    assert Config.load(file) == cfg


@functools.cache
def _models() -> Path:
    "Return a folder with two small models"
    from kronos_nb.training.task import build_model, save_model
    folder = Path(tempfile.mkdtemp())
    more = dict(normalizer=dict(kind='zscore', clip=5., eps=1e-5), max_context=64)
    for stage, layers in LAYERS.items():
        save_model(build_model(stage, 'scratch', 'tiny', SIZE | layers), folder/stage, **more)
        (folder/stage/'SHA256SUMS').unlink()
    return folder


def models(data: bytes):
    "The first byte says whose configuration, or whose weights, the rest is"
    from kronos_nb.core import ModelError
    from kronos_nb.forecast import Forecaster
    from kronos_nb.training.task import build_model
    if not data:
        return
    stage, name = ('tokenizer', 'predictor')[data[0] & 1], ('config.json', 'model.safetensors')[data[0] & 6 == 6]
    file = _models()/stage/name
    whole = file.read_bytes()
    file.write_bytes(data[1:])
    try:
        with contextlib.suppress(ModelError):
            build_model(stage, str(_models()/stage))
            Forecaster.from_pretrained(_models()/'tokenizer', _models()/'predictor')
    finally:
        file.write_bytes(whole)


def metrics(data: bytes):
    "The first byte says which file of a stage the rest is"
    from kronos_nb.core import RunError
    from kronos_nb.follow import stage_lines
    from kronos_nb.training.diagnose import diagnose
    from kronos_nb.training.history import LINES
    from kronos_nb.training.run import Run
    stage = Run(FOLDER/'metrics').stage('predictor')
    stage.folder.mkdir(parents=True, exist_ok=True)
    files = [stage.metrics_file, stage.status_file, stage.weights_file, *map(stage.rows_file, LINES)]
    for file in files:
        file.unlink(missing_ok=True)
    stage.rows_file('steps').write_text('')
    files[(data or b'\0')[0] % len(files)].write_bytes(data[1:])
    real, time.sleep = time.sleep, lambda s: None   # a damaged file is looked at again in case it is being written
    try:
        assert isinstance(stage.ended, str) and stage_lines(stage)
        diagnose(stage.history, stage.ended).to_markdown()
        with contextlib.suppress(RunError):
            assert isinstance(stage.choice, dict)
    finally:
        time.sleep = real


TARGETS = dict(readers=readers, settings=settings, models=models, metrics=metrics)
INSTRUMENTED = dict(
    readers=('kronos_nb.data.parse', 'kronos_nb.data.read', 'kronos_nb.data.check', 'kronos_nb.data.repair'),
    settings=('yaml', 'kronos_nb.settings', 'kronos_nb.config', 'kronos_nb.config_compat'),
    models=('kronos_nb.model', 'kronos_nb.hashes', 'kronos_nb.training.task'),
    metrics=('kronos_nb.training.history', 'kronos_nb.training.run', 'kronos_nb.follow', 'kronos_nb.training.diagnose'))


def seeds(target) -> list:
    "Return inputs to begin with"
    if target == 'settings':
        from kronos_nb.config import Config
        return [b'data: {stride: 2}\npredictor: {lr: 1e-4, model: {d_model: 16}}\n', b'preset: quickstart\n',
                b'a: &a [1, 2]\nb: *a\n', json.dumps(Config().flat()).encode()]
    if target == 'models':
        return [bytes([k]) + (_models()/s/n).read_bytes() for k, s, n in (
            (0, 'tokenizer', 'config.json'), (1, 'predictor', 'config.json'), (7, 'predictor', 'model.safetensors'))]
    if target == 'metrics':
        status = dict(step=1, total_steps=2, epoch=1, epochs=1, first_step=0, pid=1, state='running', why=None,
                      host='a', updated=1., began=0., every=5., stage='predictor')
        choice = dict(chosen='best', origin='x', table=[dict(candidate='best', val_loss=1., chosen=True)])
        rows = (dict(epoch=1, epoch_step=1, step=1, loss=1., gradient_norm=2., learning_rate=.1),
                dict(epoch=1, step=1, val_loss=1.), dict(epoch=1, step=1, kind='note', text='a'))
        contents = (dict(epoch=[1, 2], train_loss=[1., None]), status, choice, *rows)
        return [bytes([i]) + json.dumps(c).encode() + b'\n' for i, c in enumerate(contents)]
    from kronos_nb.data.read import sample_klines
    bars, found = sample_klines('GOOG').head(20), [b'\0' + HEAD + b'2020-01-01,1,2,1,1,1,1\n2020-01-02,1,2,1,1,1,1\n']
    for i, ending in enumerate(ENDINGS):
        file = FOLDER/f'seed.{ending}'
        if ending == 'parquet':
            bars.to_parquet(file)
        elif ending == 'feather':
            bars.to_feather(file)
        elif ending == 'json':
            bars.to_json(file, orient='records', date_format='iso')
        else:
            bars.to_csv(file, index=False)
        found.append(bytes([i]) + file.read_bytes())
        file.unlink()
    return found


def keep(out, data, error) -> None:
    "Write an input and its traceback, once for each place where errors come from"
    place = traceback.extract_tb(error.__traceback__)[-1]
    key = hashlib.sha256(f'{type(error).__name__} {place.filename} {place.name}'.encode()).hexdigest()[:10]
    file = out/f'find_{key}.bin'
    if file.exists():
        return
    file.write_bytes(data)
    file.with_suffix('.txt').write_text(''.join(traceback.format_exception(error)))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('target', choices=TARGETS)
    p.add_argument('out', type=Path, nargs='?', default=Path('runs/fuzz'))
    p.add_argument('--seconds', type=int, default=600, help='of processor time')
    a = p.parse_args(argv)
    global FOLDER
    FOLDER = Path(tempfile.mkdtemp())
    import atheris
    with atheris.instrument_imports(include=list(INSTRUMENTED[a.target])):
        for name in INSTRUMENTED[a.target]:
            importlib.import_module(name)
    os.environ['HF_HUB_OFFLINE'] = '1'
    out = a.out.resolve()/a.target
    corpus = out/'corpus'
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir(parents=True)
    for i, data in enumerate(seeds(a.target)):
        (corpus/f'seed_{i}').write_bytes(data)
    count, began = 0, time.process_time()

    def one(data):
        nonlocal count
        count += 1
        try:
            TARGETS[a.target](bytes(data))
        except Exception as e:
            keep(out, bytes(data), e)
        spent = time.process_time() - began
        if spent > a.seconds:
            finds = len(list(out.glob('find_*.bin')))
            print(f'{a.target}: {count:,} inputs in {spent:.0f} s of processor time, {finds} finds', flush=True)
            os._exit(finds > 0)
    flags = ['-timeout=600', '-rss_limit_mb=6000', '-max_len=4096', '-verbosity=0', f'-artifact_prefix={out}/']
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


if __name__ == '__main__':
    main()
