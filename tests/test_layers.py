"A module imports only from modules above it in the table of the notebooks, and no stored output is an error"
import ast, re
from pathlib import Path
import nbformat, pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
root = Path(__file__).resolve().parents[1]
lib = root/get_config().lib_path.name

def order():
    "Module names in reading order: the number of the notebook, not the name, decides"
    out = []
    for p in sorted((root/'nbs/api').glob('[0-9]*.ipynb')):
        src = '\n'.join(c.source for c in nbformat.read(p, 4).cells)
        out.append(re.search(r'^#\|\s*default_exp\s+(\S+)', src, re.M)[1])
    return out

def upward(module, source, names):
    "The modules imported by `source` that do not come before `module`, wherever in the code the import stands"
    pos, found = {n: i for i, n in enumerate(names)}, set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Import): targets = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = n.module or ''
            if n.level: base = '.'.join(['kronos_nb', *module.split('.')][:len(module.split('.'))+1-n.level] + ([base] if base else []))
            targets = [base, *(f'{base}.{a.name}' for a in n.names)]
        else: continue
        for t in targets:
            t = t.removeprefix('kronos_nb.')
            if t in pos and pos[t] >= pos[module]: found.add(t)
    return found

@pytest.mark.parametrize('module', order())
def test_imports_point_upward(module):
    src = (lib/(module.replace('.', '/')+'.py')).read_text()
    assert not upward(module, src, order())

def test_planted_violation_is_found():
    names = ['core', 'data.kline', 'learner']
    for bad in ('from kronos_nb.learner import Learner', 'import kronos_nb.learner', 'def f():\n    from ..learner import Learner'):
        assert upward('data.kline', bad, names)=={'learner'}
    assert not upward('learner', 'from .data.kline import FEATURES\nfrom kronos_nb.core import nearest', names)

@pytest.mark.parametrize('nb', sorted(Path(p) for p in nbglob(root/'nbs', as_path=True)), ids=lambda p: p.name)
def test_no_stored_output_is_an_error(nb):
    for c in nbformat.read(nb, 4).cells:
        assert not any(o.output_type=='error' for o in c.get('outputs', [])), c.source
