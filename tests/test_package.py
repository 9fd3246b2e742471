"Wheel and source archive hold all that is needed, outside the checkout too; importing is light; the front door opens"
import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kronos_nb
from kronos_nb.bundle import build_wheel

root = Path(__file__).resolve().parents[1]
HEAVY = set("""matplotlib ipywidgets IPython accelerate huggingface_hub optuna plotly scipy scoringrules arch
statsmodels peft transformers tensorboard exchange_calendars ray""".split())
SMALL = """base.windows_per_epoch=64 base.tokenizer_epochs=1 base.predictor_epochs=1 data.windows_per_epoch=64
data.val_windows=16 evaluate.origins=4 evaluate.paths=8 tokenizer.epochs=1 predictor.epochs=1 runtime.progress=false
runtime.plots=false""".split()

LOOK = """
import kronos_nb as kn
from kronos_nb.data.read import SAMPLES
for symbol in SAMPLES:
    kn.sample_klines(symbol)
print(kn.__file__)
"""


def python(arguments, cwd, *paths):
    "Run Python with `paths` before its own libraries and return what it printed"
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env |= dict(PYTHONPATH=os.pathsep.join(map(str, paths)), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The folder of the wheel, installed in `site`"
    folder = tmp_path_factory.mktemp('package')
    wheel = build_wheel(folder)
    install = ['-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(folder/'site'), str(wheel)]
    python(install, folder)
    return folder


def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    "Its own files are imported, the bundled bars came along, and a small quickstart ends in a verdict"
    site = installed/'site'
    assert python(['-m', 'kronos_nb.cli', '--version'], tmp_path, site).strip() == f'kronos_nb {kronos_nb.__version__}'
    assert Path(python(['-c', LOOK], tmp_path, site).strip()).is_relative_to(site)
    settings = [word for s in SMALL for word in ('--set', s)]
    python(['-m', 'kronos_nb.cli', 'fit', '--preset', 'quickstart', *settings], tmp_path, site)
    run = tmp_path/'runs'/'quickstart'
    assert (run/'report.md').is_file()
    assert (run/'predictor'/'best_model'/'model.safetensors').is_file()


def test_the_source_archive_builds_the_same_wheel(installed, tmp_path):
    "From the tracked files alone: what git ignores is not needed"
    source = tmp_path/'source'
    listed = subprocess.run(['git', 'ls-files'], cwd=root, text=True, capture_output=True, check=True)
    for name in filter(None, listed.stdout.split('\n')):
        if (root/name).is_file():
            (source/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/name, source/name)
    python(['-c', f'from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})'], source)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        archive.extractall(tmp_path/'unpacked', filter='data')
    again = build_wheel(tmp_path/'again', next((tmp_path/'unpacked').iterdir()))
    names = {p: set(zipfile.ZipFile(p).namelist()) for p in (again, next(installed.glob('*.whl')))}
    assert len(set(map(frozenset, names.values()))) == 1
    assert any(n.startswith('kronos_nb/data/bundled/') for n in names[again])


def test_extras(installed):
    "What the README offers can be asked for"
    meta = next(iter(importlib.metadata.distributions(path=[str(installed/'site')]))).metadata
    assert {'tune', 'track', 'calendar', 'lora', 'plot', 'dev'} <= set(meta.get_all('Provides-Extra'))
    assert meta['Requires-Python'] == '>=3.10'


def libraries(statement, cwd, *paths, before='') -> set[str]:
    "Return the top-level packages that a statement loads"
    code = f"""
import json, sys
{before}
had = set(sys.modules)
{statement}
print(json.dumps(sorted({{name.partition('.')[0] for name in set(sys.modules) - had}})))
"""
    return set(json.loads(python(['-c', code], cwd, *paths)))


@pytest.mark.parametrize('module', ['train', 'cli', 'forecast', 'panel'])
def test_importing_is_light(module, tmp_path):
    "Beyond torch: no library of pictures, widgets, hubs or extras, and no touch of the GPU"
    assert not libraries(f'import kronos_nb.{module}', tmp_path, root, before='import torch') & HEAVY
    python(['-c', f'import torch, kronos_nb.{module}; assert not torch.cuda.is_initialized()'], tmp_path, root)


def test_a_planted_import_is_found(tmp_path):
    (tmp_path/'planted.py').write_text('import matplotlib')
    assert libraries('import planted', tmp_path, tmp_path) & HEAVY == {'matplotlib'}


# the front door
def test_the_front_door_loads_nothing(tmp_path):
    used = libraries('import kronos_nb as kn; dir(kn); kn.__version__', tmp_path, root)
    assert not used & (HEAVY | {'torch', 'pandas'})


def test_the_front_door_shows_its_names_alone():
    wanted = """Config Forecaster Studio average_checkpoints check_klines compare evaluate fetch_klines fit load push
    read_klines repair_klines sample_klines tune __version__"""
    assert dir(kronos_nb) == sorted(wanted.split())
    with pytest.raises(AttributeError, match='fits'):
        kronos_nb.fits


@pytest.mark.parametrize('name', [o for o in dir(kronos_nb) if o != '__version__'])
def test_each_name_has_an_example(name):
    "Its docstring shows a call that starts at the front door and parses"
    o = getattr(kronos_nb, name)
    lines = [line.strip()[4:] for line in o.__doc__.splitlines() if line.strip().startswith(('>>> ', '... '))]
    assert callable(o) and f'kn.{name}' in '\n'.join(lines)
    ast.parse('\n'.join(lines))


# names
def bound(node) -> list[str]:
    "Return the names that a statement of a module binds"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [a.asname or a.name.partition('.')[0] for a in node.names]
    return [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []


def is_patched(node) -> bool:
    "Return whether `@patch` makes a method of this function"
    if not isinstance(node, ast.FunctionDef):
        return False
    calls = [getattr(d, 'func', d) for d in node.decorator_list]
    return any(getattr(c, 'id', '') == 'patch' for c in calls)


def lost(source: str) -> list[str]:
    "Return names that `@patch` would set to None: the oldest fastcore allowed forgets a name that a method has"
    body = ast.parse(source).body
    names = [name for node in body for name in bound(node)]
    patched = [node.name for node in body if is_patched(node)]
    return sorted({n for n in patched if names.count(n) > patched.count(n)})


@pytest.mark.parametrize('path', sorted((root/'kronos_nb').rglob('*.py')), ids=lambda p: p.stem)
def test_patched_methods_take_no_name_from_their_module(path):
    assert not lost(path.read_text())


def twice(source: str) -> list[str]:
    "Return the names that a module defines twice, where @patch does not put them into different classes"
    seen, found = set(), []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = [d for d in node.decorator_list if ast.unparse(d).startswith('patch')]
            owner = ast.unparse(node.args.args[0].annotation) if patched and node.args.args[0].annotation else ''
            found += [node.name] if (owner, node.name) in seen else []
            seen.add((owner, node.name))
    return found


@pytest.mark.parametrize('path', sorted((root/'kronos_nb').rglob('*.py')), ids=lambda p: p.stem)
def test_no_name_is_defined_twice(path):
    assert not twice(path.read_text())


def test_a_planted_second_definition_is_found():
    assert twice('def f(): pass\ndef f(): pass') == twice('@patch\ndef f(self: A): pass\n@patch\ndef f(self: A): pass')
    assert twice('def f(): pass\ndef f(): pass') == ['f']
    assert not twice('@patch\ndef f(self: A): pass\n@patch(as_prop=True)\ndef f(self: B): pass')


def test_a_planted_loss_is_found():
    assert lost('from x import fit\n@patch\ndef fit(self: A): pass') == ['fit']
    assert not lost('from x import fit\n@patch\ndef fits(self: A): pass\n@patch\ndef fits(self: B): pass')
