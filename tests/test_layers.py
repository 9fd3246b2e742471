"A module imports only from modules above it in the reading order, and no stored output is an error"
import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parents[1]
library = root/get_config().lib_path.name
spec = importlib.util.spec_from_file_location('contents', root/'tools'/'contents.py')
contents = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contents)


def order() -> list[str]:
    "Return the modules in reading order"
    return [contents.module(page) for pages in contents.chapters().values() for page in pages]


def file_of(module: str) -> Path:
    "Return the file of a module, which may be a package"
    path = library/module.replace('.', '/')
    return path/'__init__.py' if path.is_dir() else path.with_suffix('.py')


def imported(node, module: str, is_package: bool) -> list[str]:
    "Return the dotted names that an import statement may refer to"
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ''
    if node.level:
        here = ['kronos_nb', *module.split('.')]
        above = here[:len(here) - node.level + is_package]
        base = '.'.join(above + ([base] if base else []))
    return [base, *(f'{base}.{a.name}' for a in node.names)]


def upward(module: str, source: str, names: list[str], is_package=False) -> set[str]:
    "Return the modules that `source` imports, wherever in the code, and that do not come before `module`"
    position = {name: i for i, name in enumerate(names)}
    targets = [t for node in ast.walk(ast.parse(source)) for t in imported(node, module, is_package)]
    ours = {t.removeprefix('kronos_nb.') for t in targets if t.startswith('kronos_nb')}
    return {t for t in ours if t in position and position[t] >= position[module]}


@pytest.mark.parametrize('module', order())
def test_imports_only_go_down(module):
    path = file_of(module)
    assert not upward(module, path.read_text(), order(), path.name == '__init__.py')


@pytest.mark.parametrize('bad', ['from kronos_nb.train import fit', 'import kronos_nb.train',
                                 'def f():\n    from ..train import fit', 'from .. import train'])
def test_a_planted_violation_is_found(bad):
    assert upward('data.window', bad, ['core', 'data.window', 'train']) == {'train'}


def test_an_import_from_below_is_allowed():
    names = ['core', 'data.window', 'train']
    assert not upward('train', 'from .data.window import WindowDataset\nfrom kronos_nb.core import nearest', names)


def test_every_module_is_on_a_page():
    "Each file of the package comes from one notebook, except the front door and packages without code"
    files = {p for p in library.rglob('*.py') if p.name != '_modidx.py' and p.read_text().strip()}
    assert files - {library/'__init__.py'} == {file_of(m) for m in order()}


@pytest.mark.parametrize('nb', sorted(Path(p) for p in nbglob(root/'nbs', as_path=True)), ids=lambda p: p.name)
def test_no_stored_output_is_an_error(nb):
    for cell in nbformat.read(nb, 4).cells:
        assert not any(o.output_type == 'error' for o in cell.get('outputs', [])), cell.source


def exported(nb) -> list[str]:
    "Return the exported cells of a notebook"
    cells = [c.source for c in nbformat.read(nb, 4).cells if c.cell_type == 'code']
    return [s for s in cells if s.startswith(('#| export\n', '#| exporti\n'))]


def test_cells_hold_one_idea():
    "No exported cell is longer than 1,500 characters, and half of them have at most 450"
    lengths = {(p.name, i): len(s) for p in (root/'nbs'/'api').rglob('*.ipynb') for i, s in enumerate(exported(p))}
    assert not {where: n for where, n in lengths.items() if n > 1500}
    assert sorted(lengths.values())[len(lengths)//2] <= 450


@pytest.mark.parametrize('nb', sorted((root/'nbs'/'api').rglob('[0-9]*.ipynb')), ids=lambda p: p.name)
def test_a_page_shows_a_picture_or_a_table(nb):
    cells = nbformat.read(nb, 4).cells
    kinds = {kind for c in cells for o in c.get('outputs', []) for kind in o.get('data', {})}
    pictures = [p for c in cells if c.cell_type == 'markdown' for p in re.findall(r'!\[.*?\]\((\S+?)\)', c.source)]
    assert kinds & {'image/png', 'text/html', 'image/svg+xml'}
    assert not [p for p in pictures if not (nb.parent/p).is_file()]
