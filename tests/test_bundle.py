"A bundle for machines without internet: libraries by pip, nothing left behind by a failure, and a wheel made again from an installed one"
import importlib.metadata, subprocess, sys, zipfile
from pathlib import Path
import pytest
from kronos_nb.bundle import build_wheel, bundle, repack
from kronos_nb.core import RunError

def tiny_wheel(folder, name='needed', version='1.0'):
    "A wheel of one module"
    folder.mkdir(parents=True, exist_ok=True)
    p, info = folder/f'{name}-{version}-py3-none-any.whl', f'{name}-{version}.dist-info'
    with zipfile.ZipFile(p, 'w') as z:
        z.writestr(f'{name}.py', 'answer = 42\n')
        z.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', f'{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n')
    return p

@pytest.fixture(scope='module')
def shop(tmp_path_factory): return tiny_wheel(tmp_path_factory.mktemp('shop')).parent

def test_libraries_come_by_pip(shop, tmp_path):
    got = bundle(tmp_path/'b', extras=['needed'], download=False, pip=['--no-index', '--find-links', str(shop)])
    assert [p.name.split('-')[0] for p in got.wheels] == ['kronos_nb', 'needed'] and 'no-index' in (tmp_path/'b'/'README.md').read_text()

def test_a_failure_leaves_nothing_and_the_old_bundle(shop, tmp_path):
    "Neither half a folder, nor a loss of what was there"
    out = tmp_path/'b'
    for _ in range(2):
        with pytest.raises(RunError, match='pip download failed'): bundle(out, extras=['absent'], download=False, pip=['--no-index', '--find-links', str(shop)])
        assert not out.exists() or len(list((out/'wheels').glob('*.whl'))) == 1
        assert not list(tmp_path.glob('.*')), 'half a bundle was left'
        if not out.exists(): bundle(out, download=False)

def test_an_installed_package_is_packed_again(tmp_path):
    "Installed from the wheel that was packed from the installed files, the package is the same"
    first = build_wheel(tmp_path/'first')
    install = lambda wheel, to: subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(to), str(wheel)], check=True, capture_output=True)
    install(first, tmp_path/'site')
    dist = next(iter(importlib.metadata.distributions(path=[str(tmp_path/'site')])))
    second = repack(tmp_path, dist)
    install(second, tmp_path/'again')
    files = lambda d: {p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob('*') if p.is_file() and '__pycache__' not in p.parts and p.name not in ('RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json')}
    assert files(tmp_path/'site').keys() - files(tmp_path/'again').keys() <= {'bin/kronos-nb'} and files(tmp_path/'again').items() <= files(tmp_path/'site').items()
