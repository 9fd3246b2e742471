"A bundle for machines without internet: libraries by pip, nothing left behind by a failure, and a wheel made again from an installed one"
import importlib.metadata, os, re, subprocess, sys, zipfile
from pathlib import Path
import pytest
from kronos_nb.bundle import build_wheel, bundle, repack
from kronos_nb.core import RunError

def tiny_wheel(folder, name='needed', version='1.0', needs=()):
    "A wheel of one module"
    folder.mkdir(parents=True, exist_ok=True)
    p, info = folder/f'{name}-{version}-py3-none-any.whl', f'{name}-{version}.dist-info'
    with zipfile.ZipFile(p, 'w') as z:
        z.writestr(f'{name}.py', 'answer = 42\n')
        z.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n' + ''.join(f'Requires-Dist: {o}\n' for o in needs) + '\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', f'{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n')
    return p

@pytest.fixture(scope='module')
def shop(tmp_path_factory): return tiny_wheel(tmp_path_factory.mktemp('shop')).parent

def test_libraries_come_by_pip(shop, tmp_path):
    got = bundle(tmp_path/'b', extras=['needed'], download=False, pip=['--no-index', '--find-links', str(shop)])
    assert [p.name.split('-')[0] for p in got.wheels] == ['kronos_nb', 'needed'] and 'no-index' in (tmp_path/'b'/'README.md').read_text()

def test_what_libraries_need_comes_too(tmp_path):
    "In turn, for the machine that it is for, in a version that suits all; never torch, numpy or pandas"
    shop = tmp_path/'shop'
    tiny_wheel(shop, 'needed', needs=['deeper>=1', 'torch>=99', 'other', 'never; python_version < "3.9"', 'optional; extra == "more"', 'special; platform_machine == "aarch64"'])
    tiny_wheel(shop, 'other', needs=['deeper<2', 'deepest[more]', 'needed'])   # a circle, too
    tiny_wheel(shop, 'deepest', needs=['extra-one; extra == "more"', 'numpy'])
    for name, version in (('deeper', '1.5'), ('deeper', '2.0'), ('extra_one', '1.0'), ('special', '1.0')): tiny_wheel(shop, name, version)
    names = lambda b: sorted(p.name.rpartition('-py3')[0] for p in b.wheels if not p.name.startswith('kronos_nb'))
    go = dict(extras=['needed'], download=False, pip=['--no-index', '--find-links', str(shop)])
    assert names(bundle(tmp_path/'b', **go))==['deeper-1.5', 'deepest-1.0', 'extra_one-1.0', 'needed-1.0', 'other-1.0']
    assert 'special-1.0' in names(bundle(tmp_path/'b', platform='manylinux2014_aarch64', **go))
    tiny_wheel(shop, 'other', needs=['deeper<1'])
    with pytest.raises(RunError, match='deeper'): bundle(tmp_path/'c', **go)

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

@pytest.mark.parametrize('capability,precision', [((7, 5), 'fp16'), ((8, 0), 'bf16'), ((9, 0), 'bf16')])
def test_a_gpu_without_bfloat16_takes_fp16(capability, precision, monkeypatch):
    "A T4 (7.5) emulates bfloat16 slowly; 'mixed' knows, and what is asked for by name stays"
    import torch
    from kronos_nb import train
    from kronos_nb.config import Config
    monkeypatch.setattr(train, 'pick_device', lambda name: torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    mixed = Config.preset('kaggle_stock', **{'runtime.precision': 'mixed'})
    assert train.precision_of(mixed)==precision and train.precision_of(mixed.replace(**{'runtime.precision': 'fp32'}))=='fp32'

def test_a_bundle_installs_without_internet(tmp_path):
    "Mounted read-only under Kaggle's paths, by the command of its own README; then data, models and the folder for runs are found"

    root, site = tmp_path/'disk', tmp_path/'site'
    (root/'kaggle'/'working').mkdir(parents=True)
    bundle(root/'kaggle'/'input'/'some-data'/'kronos', models=[Path(__file__).parent/'golden'/'tiny'], download=False)
    (root/'kaggle'/'input'/'some-data'/'train_combined.csv').write_text('Date,Open\n')
    readme = (root/'kaggle'/'input'/'some-data'/'kronos'/'README.md').read_text()
    code = re.search(r'``` python\n(.*?)```', readme, re.S)[1].replace('/kaggle/input', f'{root}/kaggle/input').replace("'install',", f"'install', '--no-deps', '--target', {str(site)!r},")
    env = {k: v for k, v in os.environ.items() if k!='PYTHONPATH'}
    subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    use = f"from kronos_nb.bundle import *; import kronos_nb; p = place({str(root)!r}); print(kronos_nb.__file__, p.out, *find_data('train*.csv', p), sep='\\n'); " \
        f"from kronos_nb.forecast import Forecaster; print(Forecaster.from_pretrained(next(p.inputs[0].rglob('models/tiny'))).predictor.n_params)"
    said = subprocess.run([sys.executable, '-c', use], env=env | dict(PYTHONPATH=str(site)), cwd=tmp_path, check=True, capture_output=True, text=True, timeout=200).stdout.split('\n')
    assert said[0].startswith(str(site)) and said[1]==str(root/'kaggle'/'working'/'runs') and said[2].endswith('train_combined.csv') and int(said[3]) > 0
