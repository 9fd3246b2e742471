"What is imported before anything is done: a command that only prints text waits for no library"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
HEAVY = ('torch', 'pandas', 'numba', 'scipy', 'matplotlib', 'pyarrow', 'accelerate', 'huggingface_hub')
COMPILER = ('torch._dynamo', 'torch._inductor', 'sympy')
SHOW = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {}
print(json.dumps(sorted(sys.modules)))
"""


def imported(code: str) -> set[str]:
    "Return the modules that a fresh process has imported after `code`"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(root))
    command = [sys.executable, '-c', SHOW.format(code)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize('line', [
    '--version', '--help', 'fit --help', 'fit --help-all', 'forecast --help', 'fit --lr 3',
])
def test_text_needs_no_heavy_library(line):
    found = imported(f'from kronos_nb.cli import main; main({line.split()})')
    assert 'kronos_nb.config' in found
    assert not found.intersection(HEAVY)


def test_training_is_imported_without_the_compiler():
    found = imported('import kronos_nb.train')
    assert 'torch' in found
    assert not found.intersection(COMPILER)


def test_the_check_sees_what_is_imported():
    assert imported('import pandas') >= {'pandas', 'numpy'}
