"""Run notebooks as a stranger's machine does: from the wheel, without nbdev, without network (this needs neither, only nbclient)

    python tools/run_plain.py --python /path/of/venv/bin/python [NOTEBOOK ...]

The wheel is built here and unpacked for the other Python, whose own libraries are used; notebooks run in a copy of `nbs`, far from the checkout.
A notebook that imports the library of an extra which the other Python does not have is left out, and named.
"""
import argparse, configparser, json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
SKIPPED = re.compile(r'^#\|\s*(notest|slow|gpu)\b|^#\|\s*eval:\s*false', re.M)
ALONE = '''
"No address but this machine's own"
import ipaddress, socket
def local(host):
    if isinstance(host, bytes): host = host.decode()
    if host in (None, '', 'localhost', '0.0.0.0', '::'): return True
    try: return ipaddress.ip_address(host).is_loopback
    except ValueError: return host == socket.gethostname()
def guard(name, host_of):
    old = getattr(socket.socket, name)
    def f(self, address, *a):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not local(host_of(address)): raise OSError(f'no network here: {address}')
        return old(self, address, *a)
    setattr(socket.socket, name, f)
for name in ('connect', 'connect_ex'): guard(name, lambda a: a[0])
_info = socket.getaddrinfo
def getaddrinfo(host, *a, **kw):
    if not local(host): raise socket.gaierror(f'no network here: {host}')
    return _info(host, *a, **kw)
socket.getaddrinfo = getaddrinfo
'''
INSIDE = '''
import sys, time, nbformat, re
from nbclient import NotebookClient
SKIPPED = re.compile(sys.argv[2], re.M)
class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kw):
        if SKIPPED.search(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kw)
fn = sys.argv[1]
Client(nbformat.read(fn, 4), timeout=900, kernel_name='python3', resources={'metadata': {'path': fn.rpartition('/')[0]}}, store_widget_state=False).execute()
'''

def extras():
    "Library -> the extra that installs it"
    cfg = configparser.ConfigParser(interpolation=None)
    cfg.read(root/'settings.ini')
    return {re.match(r'[\w.-]+', o)[0]: k.removesuffix('_requirements') for k, v in cfg['DEFAULT'].items() if k.endswith('_requirements') and not k.startswith('dev') for o in v.split()}

def missing(nb, python, env):
    "Libraries of extras that a notebook imports and the other Python has not"
    text = '\n'.join(''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
    wants = [o for o in extras() if re.search(rf'^(import|from) {o}\b', text, re.M)]
    return [o for o in wants if subprocess.run([python, '-c', f'import {o}'], env=env, capture_output=True).returncode]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', help='paths below nbs; none: all')
    p.add_argument('--python', default=sys.executable, help='the Python of the other environment')
    a = p.parse_args()
    home = Path(tempfile.mkdtemp())
    sys.path.insert(0, str(root))
    from kronos_nb.bundle import build_wheel
    wheel = build_wheel(home/'wheels')
    site = home/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(site), str(wheel)], check=True)
    (site/'sitecustomize.py').write_text(ALONE)
    shutil.copytree(root/'nbs', home/'nbs', ignore=shutil.ignore_patterns('runs', '.ipynb_checkpoints'))
    shutil.copytree(root/'tests'/'golden', home/'tests'/'golden')   # two notebooks compare with it
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(PYTHONPATH=str(site), HF_HUB_OFFLINE='1', MPLBACKEND='module://matplotlib_inline.backend_inline', OMP_WAIT_POLICY='PASSIVE')
    look = "import importlib.util as u, kronos_nb, fastcore, torch, pandas, numpy, ipywidgets, sys; assert u.find_spec('nbdev') is None, 'nbdev is there'; assert 'site' in kronos_nb.__file__; " \
        "print('python', sys.version.split()[0], *(f'{m.__name__} {m.__version__}' for m in (torch, numpy, pandas, fastcore, ipywidgets)))"
    subprocess.run([a.python, '-c', look], env=env, check=True, cwd=home)
    blocked = subprocess.run([a.python, '-c', "import socket; socket.create_connection(('192.0.2.1', 80), 3)"], env=env, cwd=home, capture_output=True, text=True)
    assert 'no network here' in blocked.stderr, blocked.stderr
    bad = 0
    for nb in a.notebooks or sorted(str(p.relative_to(home/'nbs')) for p in (home/'nbs').rglob('*.ipynb')):
        began = time.time()
        if absent := missing(home/'nbs'/nb, a.python, env):
            print(f"left {nb} needs {', '.join(f'{o} (the extra {extras()[o]})' for o in absent)}", flush=True)
            continue
        r = subprocess.run([a.python, '-c', INSIDE, str(home/'nbs'/nb), SKIPPED.pattern], env=env, cwd=home, capture_output=True, text=True)
        bad += bool(r.returncode)
        print(f"{'FAIL' if r.returncode else 'ok  '} {nb} {time.time()-began:.0f}s", *([r.stderr[-3000:]] if r.returncode else []), flush=True)
    shutil.rmtree(home)
    sys.exit(bool(bad))

if __name__ == '__main__': main()
