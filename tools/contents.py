"""The one reading order: sidebar and README table, made from the numbers and titles of the notebooks

    python tools/contents.py           write nbs/sidebar.yml, the table in nbs/index.ipynb, badges and install cells
    python tools/contents.py --check   exit 1 if one of them differs from what notebooks and settings.ini say
"""
import configparser
import json
import re
import sys
from pathlib import Path

nbs = Path(__file__).resolve().parents[1]/'nbs'
BEGIN, END = '<!-- pages -->', '<!-- end of pages -->'
_ini = configparser.ConfigParser()
_ini.read(nbs.parent/'settings.ini', encoding='utf-8')
INI = _ini['DEFAULT']   # where the repository is


def first_cell(path: Path) -> str:
    "Return the source of the first cell of a notebook"
    return ''.join(json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source'])


def purpose(path: Path) -> str:
    "Return the sentence below the title"
    return re.search(r'^> (.+)$', first_cell(path), re.M)[1].strip()


def module(path: Path) -> str:
    "Return the module that a notebook exports"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    source = '\n'.join(''.join(c['source']) for c in cells)
    return re.search(r'^#\|\s*default_exp\s+(\S+)', source, re.M)[1].removesuffix('.__init__')


def chapters() -> dict[str, list[Path]]:
    "Return the pages of each chapter, in the order of their numbers"
    folders = sorted((nbs/'api').iterdir(), key=lambda d: int(d.name.partition('_')[0]))
    return {d.name: sorted(d.glob('[0-9]*.ipynb')) for d in folders if d.is_dir()}


def title(folder: str) -> str:
    "Return the title of a chapter: '4_training' is '4 Training'"
    number, _, name = folder.partition('_')
    return f"{number} {name.replace('_', ' ').title()}"


def sidebar() -> str:
    "Return `sidebar.yml`"
    below = lambda path: path.relative_to(nbs).as_posix()
    first = [nbs/'index.ipynb', *sorted((nbs/'tutorials').glob('0[01]_*.ipynb')), nbs/'guides'/'01_how_it_works.ipynb']
    lines = ['# Made by tools/contents.py from the numbers and titles of the notebooks', 'website:', '  sidebar:',
             '    contents:', '      - section: Start here', '        contents:']
    lines += [f'          - {below(p)}' for p in first]
    for name in ('tutorials', 'guides'):
        lines += [f'      - section: {name.title()}', '        contents:']
        lines += [f'          - {below(p)}' for p in sorted((nbs/name).glob('[0-9]*.ipynb')) if p not in first]
    lines += ['          - changelog.md', '      - section: API', '        contents:']
    for folder, pages in chapters().items():
        lines += [f'          - section: {title(folder)}', '            contents:']
        lines += [f'              - {below(p)}' for p in pages]
    return '\n'.join(lines) + '\n'


def table() -> str:
    "Return the README's table of modules, in Markdown"
    rows = ['| module | what lives there |', '| --- | --- |']
    for folder, pages in chapters().items():
        rows.append(f'| **{title(folder)}** | |')
        rows += [f'| [{module(p)}]({p.relative_to(nbs).as_posix()}) | {purpose(p)} |' for p in pages]
    return '\n'.join(rows)


def index_with(table: str) -> str:
    "Return `index.ipynb` with `table` between its two marks"
    nb = json.loads((nbs/'index.ipynb').read_text(encoding='utf-8'))
    cell = next(c for c in nb['cells'] if BEGIN in ''.join(c['source']))
    before, _, rest = ''.join(cell['source']).partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
    cell['source'] = text.splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False) + '\n'


# badges and install cells
PLACES = {
    'Open in Colab': ('https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/{path}',
                      'https://colab.research.google.com/assets/colab-badge.svg'),
    'Open in Kaggle': ('https://kaggle.com/kernels/welcome?src=https://github.com/{user}/{repo}/blob/{branch}/{path}',
                       'https://kaggle.com/static/images/open-in-kaggle.svg')}
BADGE = re.compile(r'<a href="[^"]*?(nbs/[^"]+\.ipynb)"><img src="[^"]*" alt="(Open in \w+)"></a>')
HOW = ("The next two cells do nothing where `{lib_name}` is installed. On Colab and Kaggle they install it, from an "
       "attached [bundle](../api/8_share/82_bundle.ipynb) if there is one (no internet needed), and keep the installed "
       "torch, numpy and pandas. If the address in the last line but one cannot be reached, attach a bundle, or clone "
       "the repository elsewhere and run `pip install -e .` in it.")
INSTALL = """if importlib.util.find_spec('{lib_name}') is None:
    have = [o for o in ('torch', 'numpy', 'pandas') if importlib.util.find_spec(o)]
    Path('kept.txt').write_text('\\n'.join(f'{{o}}=={{importlib.metadata.version(o)}}' for o in have))
    wheels = glob.glob('/kaggle/input/**/{lib_name}-*.whl', recursive=True)
    offline = ['--no-index', '--find-links', os.path.dirname(wheels[0]), '{name}'] if wheels else []
    source = offline or ['{name} @ git+{git_url}']
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '-c', 'kept.txt', *source], check=True)"""


def badge(path: str, text: str) -> str:
    "Return the badge that opens a notebook of the repository"
    link, image = PLACES[text]
    return f'<a href="{link.format(path=path, **INI)}"><img src="{image}" alt="{text}"></a>'


def with_badges(source: str) -> str:
    "Return a cell of Markdown whose badges point to the repository of settings.ini"
    source = BADGE.sub(lambda m: badge(m[1], m[2]), source)
    return re.sub(r'^The next two cells do nothing where .+$', HOW.format(**INI), source, flags=re.M)


def installing(source: str) -> str:
    "Return an install cell, with the extra that it asks for"
    extra = re.search(r"kronos_nb(\[\w+\])", source)
    return INSTALL.format(name=INI['lib_name'] + (extra[1] if extra else ''), **INI)


def with_heads(text: str) -> str:
    "Return a notebook with its badges and its install cell"
    nb = json.loads(text)
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            source = with_badges(source)
        elif source.startswith('if importlib.util.find_spec('):
            source = installing(source)
        cell['source'] = source.splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False) + '\n'


def made() -> list[tuple]:
    "Return every file and what it must be"
    tutorials = sorted((nbs/'tutorials').glob('[0-9]*.ipynb'))
    return [(nbs/'sidebar.yml', sidebar()), (nbs/'index.ipynb', with_heads(index_with(table()))),
            *((p, with_heads(p.read_text(encoding='utf-8'))) for p in tutorials)]


def main(check: bool) -> list[str]:
    "Write the files, or with `check` return the names of those that are not current"
    stale = []
    for path, text in made():
        if path.read_text(encoding='utf-8') == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(text, encoding='utf-8')
    return stale if check else []


if __name__ == '__main__':
    if stale := main('--check' in sys.argv):
        sys.exit(f"{', '.join(stale)} not current: run python tools/contents.py")
