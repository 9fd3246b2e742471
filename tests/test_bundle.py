"A bundle for machines without internet: libraries, failures, and the wheel of an installed package"
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from kronos_nb import train
from kronos_nb.bundle import _repack, build_wheel, bundle
from kronos_nb.config import Config
from kronos_nb.core import RunError


def tiny_wheel(folder, name, version='1.0', needs=()):
    "Write a wheel of one module"
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder/f'{name}-{version}-py3-none-any.whl', f'{name}-{version}.dist-info'
    requires = ''.join(f'Requires-Dist: {o}\n' for o in needs)
    files = {f'{name}.py': 'answer = 42\n',
             f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}\n',
             f'{info}/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
             f'{info}/RECORD': f'{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n'}
    with zipfile.ZipFile(path, 'w') as z:
        for file, text in files.items():
            z.writestr(file, text)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "Return a folder of wheels that pip takes for the only index"
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path/'shop'))
    tiny_wheel(tmp_path/'shop', 'needed')
    return tmp_path/'shop'


def libraries(made):
    "Return name and version of the libraries in a bundle"
    names = (p.name.rpartition('-py3')[0] for p in made.wheels)
    return sorted(n for n in names if not n.startswith('kronos_nb'))


def test_libraries_come_along_with_what_they_need(shop, tmp_path):
    "For the target machine, in a version that suits all; never torch, numpy or pandas"
    needs = ['deeper>=1', 'torch>=99', 'other', 'never; python_version < "3.9"', 'optional; extra == "more"',
             'special; platform_machine == "aarch64"']
    tiny_wheel(shop, 'needed', needs=needs)
    tiny_wheel(shop, 'other', needs=['deeper<2', 'deepest[more]', 'needed'])   # a circle, too
    tiny_wheel(shop, 'deepest', needs=['extra-one; extra == "more"', 'numpy'])
    for name, version in (('deeper', '1.5'), ('deeper', '2.0'), ('extra_one', '1.0'), ('special', '1.0')):
        tiny_wheel(shop, name, version)
    made = bundle(tmp_path/'a', extras=['needed'], download=False)
    expected = ['deeper-1.5', 'deepest-1.0', 'extra_one-1.0', 'needed-1.0', 'other-1.0']
    assert libraries(made) == expected
    arm = bundle(tmp_path/'b', extras=['needed'], download=False, platform='manylinux2014_aarch64')
    assert libraries(arm) == [*expected, 'special-1.0']
    tiny_wheel(shop, 'other', needs=['deeper<1'])
    with pytest.raises(RunError, match='deeper'):
        bundle(tmp_path/'c', extras=['needed'], download=False)


def test_a_failure_leaves_the_earlier_bundle_and_nothing_else(shop, tmp_path):
    out = tmp_path/'bundle'
    with pytest.raises(RunError, match='absent'):
        bundle(out, extras=['absent'], download=False)
    assert not out.exists()
    bundle(out, extras=['needed'], download=False)
    with pytest.raises(RunError, match='absent'):
        bundle(out, extras=['absent'], download=False)
    assert len(list((out/'wheels').glob('*.whl'))) == 2
    assert not list(tmp_path.glob('.*'))


def install(wheel, folder):
    "Install a wheel without its libraries"
    words = ['pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(folder), str(wheel)]
    subprocess.run([sys.executable, '-m', *words], check=True, capture_output=True)


def contents(folder):
    "Return the files of an installed package, without those that pip writes"
    skipped = ('RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json')
    files = (p for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts and p.name not in skipped)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_an_installed_package_is_packed_again(tmp_path):
    install(build_wheel(tmp_path/'first'), tmp_path/'site')
    dist = next(iter(importlib.metadata.distributions(path=[str(tmp_path/'site')])))
    install(_repack(dist, tmp_path), tmp_path/'again')
    first, again = contents(tmp_path/'site'), contents(tmp_path/'again')
    assert first.keys() - again.keys() <= {'bin/kronos-nb'} and again.items() <= first.items()


LOOK = """
import kronos_nb as kn
from kronos_nb.place import find_data, place
p = place(root)
print(kn.__file__, p.out, *find_data('train*.csv', p), sep='\\n')
print(kn.Forecaster.from_pretrained(next(p.inputs[0].rglob('models/tiny'))).predictor.n_params)
"""


def test_a_bundle_installs_without_internet(tmp_path):
    "By the command of its README, below Kaggle's paths; then data, models and the folder for runs are found"
    disk, site = tmp_path/'disk', tmp_path/'site'
    attached = disk/'kaggle'/'input'/'some-data'
    (disk/'kaggle'/'working').mkdir(parents=True)
    bundle(attached/'kronos', models=[Path(__file__).parent/'golden'/'tiny'], download=False)
    (attached/'train_combined.csv').write_text('Date,Open\n')
    code = re.search(r'``` python\n(.*?)```', (attached/'kronos'/'README.md').read_text(), re.S)[1]
    code = code.replace('/kaggle/input', f'{disk}/kaggle/input')
    code = code.replace("'install',", f"'install', '--no-deps', '--target', {str(site)!r},")
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    def python(code, **more):
        return subprocess.run([sys.executable, '-c', code], env=env | more, cwd=tmp_path, check=True, text=True,
                              capture_output=True, timeout=200).stdout.split('\n')
    python(code)
    file, out, data, n_params, *_ = python(f'root = {str(disk)!r}\n{LOOK}', PYTHONPATH=str(site))
    assert Path(file).is_relative_to(site) and out == str(disk/'kaggle'/'working'/'runs')
    assert data.endswith('train_combined.csv') and int(n_params) > 0


@pytest.mark.parametrize('capability, precision', [((7, 5), 'fp16'), ((8, 0), 'bf16'), ((9, 0), 'bf16')])
def test_a_gpu_without_bfloat16_takes_fp16(capability, precision, monkeypatch):
    "Kaggle's T4 (7.5) emulates bfloat16 slowly: 'mixed' avoids it, and a precision asked for by name stays"
    monkeypatch.setattr(train, 'pick_device', lambda name: torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    mixed = Config.preset('kaggle_stock', **{'runtime.precision': 'mixed'})
    assert train.precision_of(mixed) == precision
    assert train.precision_of(mixed.replace(**{'runtime.precision': 'fp32'})) == 'fp32'
