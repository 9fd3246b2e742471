"Scripts that are run by hand ask for nothing that is gone"
import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1]/'benchmarks').glob('*.py'))


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_every_name_of_ours_exists(script):
    tree = ast.parse(script.read_text(encoding='utf-8'))
    asked = [(o.module, a.name) for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) for a in o.names
             if (o.module or '').startswith('kronos_nb')]
    gone = []
    for module, name in asked:
        if hasattr(importlib.import_module(module), name): continue
        try: importlib.import_module(f'{module}.{name}')
        except ImportError: gone.append(f'{module}.{name}')
    assert not gone
