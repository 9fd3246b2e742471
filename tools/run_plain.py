"""Run notebooks as a user's machine does: from the wheel, without nbdev and without network (only nbclient is needed)

    python tools/run_plain.py --python /path/of/venv/bin/python [NOTEBOOK ...]

The wheel is built here and unpacked for the other Python, which brings its own libraries. Notebooks run in a copy of
`nbs`, away from the checkout. A notebook that needs an extra which the other Python lacks is skipped and named.
"""
import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
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
        if self.family in (socket.AF_INET, socket.AF_INET6) and not local(host_of(address)):
            raise OSError(f'no network here: {address}')
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
where = {'metadata': {'path': fn.rpartition('/')[0]}}
Client(nbformat.read(fn, 4), timeout=900, kernel_name='python3', resources=where, store_widget_state=False).execute()
'''

def extras() -> dict[str, str]:
    "Return the extra that installs a library, by library"
    cfg = configparser.ConfigParser(interpolation=None)
    cfg.read(root/'settings.ini')
    found = {}
    for key, value in cfg['DEFAULT'].items():
        if key.endswith('_requirements') and not key.startswith('dev'):
            found |= {re.match(r'[\w.-]+', o)[0]: key.removesuffix('_requirements') for o in value.split()}
    return found


def missing(nb: Path, python: str, env: dict) -> list[str]:
    "Return the libraries of extras that a notebook imports and the other Python lacks"
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    wanted = [o for o in extras() if re.search(rf'^(import|from) {o}\b', text, re.M)]
    return [o for o in wanted if subprocess.run([python, '-c', f'import {o}'], env=env, capture_output=True).returncode]


LOOK = """
import importlib.util, sys
import fastcore, ipywidgets, kronos_nb, numpy, pandas, torch
assert importlib.util.find_spec('nbdev') is None, 'nbdev is there'
assert 'site' in kronos_nb.__file__
found = (f'{m.__name__} {m.__version__}' for m in (torch, numpy, pandas, fastcore, ipywidgets))
print('python', sys.version.split()[0], *found)
"""
REACH = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"


def lay_out(home: Path) -> dict:
    "Unpack the wheel, copy the notebooks, and return the environment of the other Python"
    sys.path.insert(0, str(root))
    from kronos_nb.bundle import build_wheel
    wheel, site = build_wheel(home/'wheels'), home/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(site),
                    str(wheel)], check=True)
    (site/'sitecustomize.py').write_text(ALONE)
    shutil.copytree(root/'nbs', home/'nbs', ignore=shutil.ignore_patterns('runs', '.ipynb_checkpoints'))
    shutil.copytree(root/'tests'/'golden', home/'tests'/'golden')   # some notebooks compare with it
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    return env | dict(PYTHONPATH=str(site), HF_HUB_OFFLINE='1', OMP_WAIT_POLICY='PASSIVE',
                      MPLBACKEND='module://matplotlib_inline.backend_inline')


def run_one(nb: str, python: str, home: Path, env: dict) -> bool:
    "Run one notebook, say how it went, and return whether it failed"
    began = time.time()
    if absent := missing(home/'nbs'/nb, python, env):
        print(f"left {nb} needs {', '.join(f'{o} (the extra {extras()[o]})' for o in absent)}", flush=True)
        return False
    done = subprocess.run([python, '-c', INSIDE, str(home/'nbs'/nb), SKIPPED.pattern], env=env, cwd=home,
                          capture_output=True, text=True)
    error = [done.stderr[-3000:]] if done.returncode else []
    print(f"{'FAIL' if done.returncode else 'ok  '} {nb} {time.time()-began:.0f}s", *error, flush=True)
    return bool(done.returncode)


def main():
    "Run the notebooks that the command line names, or all"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', help='paths below nbs; none: all')
    parser.add_argument('--python', default=sys.executable, help='the Python of the other environment')
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    env = lay_out(home)
    subprocess.run([args.python, '-c', LOOK], env=env, check=True, cwd=home)
    reached = subprocess.run([args.python, '-c', REACH], env=env, cwd=home, capture_output=True, text=True)
    assert 'no network here' in reached.stderr, reached.stderr
    notebooks = args.notebooks or sorted(str(p.relative_to(home/'nbs')) for p in (home/'nbs').rglob('*.ipynb'))
    failed = sum([run_one(nb, args.python, home, env) for nb in notebooks])
    shutil.rmtree(home)
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
