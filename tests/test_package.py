"Wheel and source archive hold all that is needed, outside the checkout too; importing is light"
import ast, importlib.metadata, json, os, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest
import kronos_nb
from kronos_nb.bundle import build_wheel
root = Path(__file__).resolve().parents[1]
HEAVY = ('matplotlib', 'ipywidgets', 'IPython', 'accelerate', 'huggingface_hub', 'optuna', 'plotly', 'scipy', 'scoringrules', 'arch', 'statsmodels', 'peft', 'transformers', 'tensorboard', 'exchange_calendars', 'ray')

def python(code, cwd, *paths, **env):
    env = {k: v for k, v in os.environ.items() if k!='PYTHONPATH'} | dict(PYTHONPATH=os.pathsep.join(map(str, paths)), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1') | env
    r = subprocess.run([sys.executable, *code], cwd=cwd, env=env, text=True, capture_output=True, timeout=300)
    assert r.returncode==0, r.stderr[-3000:]
    return r.stdout

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The folder of the wheel, installed"
    d = tmp_path_factory.mktemp('package')
    wheel = build_wheel(d)
    python(['-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(d/'site'), str(wheel)], d)
    return d

def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    "Its own files are imported, the bundled bars came along, and the quickstart, made small, ends in a verdict"
    site = installed/'site'
    out = python(['-m', 'kronos_nb.cli', '--version'], tmp_path, site)
    assert out.strip()==f'kronos_nb {kronos_nb.__version__}'
    where = python(['-c', 'import kronos_nb; from kronos_nb.data.kline import SAMPLES, sample_klines; print(kronos_nb.__file__); [sample_klines(s) for s in SAMPLES]'], tmp_path, site)
    assert Path(where.strip()).is_relative_to(site)
    small = ['base.windows_per_epoch=64', 'base.tokenizer_epochs=1', 'base.predictor_epochs=1', 'data.windows_per_epoch=64', 'data.val_windows=16', 'evaluate.origins=4', 'evaluate.paths=8',
        'tokenizer.epochs=1', 'predictor.epochs=1', 'runtime.progress=false', 'runtime.plots=false']
    said = python(['-m', 'kronos_nb.cli', 'fit', '--preset', 'quickstart', *(w for s in small for w in ('--set', s))], tmp_path, site)
    assert 'ine-tuning' in said and (tmp_path/'runs/quickstart/report.md').is_file() and (tmp_path/'runs/quickstart/predictor/best_model/model.safetensors').is_file()

def test_the_source_archive_builds_the_same_wheel(installed, tmp_path):
    "From the tracked files alone: what git ignores is not needed"
    src, files = tmp_path/'src', subprocess.run(['git', 'ls-files'], cwd=root, text=True, capture_output=True, check=True).stdout.split('\n')
    for f in files:
        if f and (root/f).is_file(): (src/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(root/f, src/f)
    python(['-c', f'from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})'], src)
    archive = next(tmp_path.glob('*.tar.gz'))
    with tarfile.open(archive) as t: t.extractall(tmp_path/'un', filter='data')
    again = build_wheel(tmp_path/'again', next((tmp_path/'un').iterdir()))
    names = lambda p: set(zipfile.ZipFile(p).namelist())
    assert names(again)==names(next(installed.glob('*.whl'))) and any(n.startswith('kronos_nb/data/bundled/') for n in names(again))

def test_extras(installed):
    "What the README offers can be asked for"
    meta = next(iter(importlib.metadata.distributions(path=[str(installed/'site')]))).metadata
    assert {'tune', 'track', 'calendar', 'lora', 'plot', 'dev'} <= set(meta.get_all('Provides-Extra')) and meta['Requires-Python']=='>=3.10'

@pytest.mark.parametrize('module', ['kronos_nb.train', 'kronos_nb.cli', 'kronos_nb.forecast', 'kronos_nb.panel'])
def test_importing_is_light(module, tmp_path):
    "Beyond torch: no library of pictures, widgets, hubs or extras, and no touch of the GPU"
    found = json.loads(python(['-c', f'import torch, json, sys; before = set(sys.modules); import {module}; print(json.dumps([sorted({{o.partition(".")[0] for o in set(sys.modules)-before}}), torch.cuda.is_initialized()]))'], tmp_path, root))
    assert not set(found[0]) & set(HEAVY) and found[1] is False

def test_a_planted_import_is_found(tmp_path):
    (tmp_path/'planted.py').write_text('import matplotlib')
    out = python(['-c', 'import sys, planted; print([o for o in sys.modules])'], tmp_path, tmp_path)
    assert 'matplotlib' in out and 'matplotlib' in HEAVY

def lost(source):
    "Names of a module that `@patch` would set to None: the fastcore of our floor forgets what has the name of a patched method"
    body, names = ast.parse(source).body, []
    for o in body: names += [a.asname or a.name.partition('.')[0] for a in o.names] if isinstance(o, (ast.Import, ast.ImportFrom)) else [o.name] if isinstance(o, (ast.FunctionDef, ast.ClassDef)) else []
    patched = [o.name for o in body if isinstance(o, ast.FunctionDef) and any(getattr(d, 'id', getattr(getattr(d, 'func', None), 'id', '')) == 'patch' for d in o.decorator_list)]
    return sorted({n for n in patched if names.count(n) > patched.count(n)})

@pytest.mark.parametrize('path', sorted((root/'kronos_nb').rglob('*.py')), ids=lambda p: p.stem)
def test_patched_methods_take_no_name_from_their_module(path): assert not lost(path.read_text())

def test_a_planted_loss_is_found():
    assert lost('from x import fit\n@patch\ndef fit(self: A): pass')==['fit'] and not lost('from x import fit\n@patch\ndef fits(self: A): pass\n@patch\ndef fits(self: B): pass')
