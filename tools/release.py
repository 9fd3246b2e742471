"""Print the changes of the version that a tag names; fail unless tag, settings.ini, package and changelog agree

    python tools/release.py --prepare 0.2.0   # writes the version, and gives it what is Unreleased
    python tools/release.py v0.2.0
"""
import re
import sys
from configparser import ConfigParser
from datetime import date
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def version() -> str:
    "Return the version of settings.ini"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']['version']


def changes(of: str) -> str:
    "Return what the changelog says of a version; '' where it has no heading of it"
    text = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    found = re.search(rf'^## {re.escape(of)}(?: [^\n]*)?\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    return found[1].strip() if found else ''


def problems(tag: str) -> list[str]:
    "Return what keeps a tag from being released"
    now = version()
    package = re.search(r'__version__ = "(.*)"', (root/'kronos_nb'/'__init__.py').read_text(encoding='utf-8'))[1]
    out = [] if tag == f'v{now}' else [f'the tag is {tag}, and settings.ini has version {now}']
    out += [] if package == now else [f'kronos_nb/__init__.py has version {package}, and settings.ini {now}']
    out += [f'CHANGELOG.md has changes that no version names: --prepare {now}'] if changes('Unreleased') else []
    return out + ([] if changes(now) else [f'CHANGELOG.md has no section {now}'])


def prepare(new: str):
    "Write a version into settings.ini, package, citation and changelog, where it takes what is unreleased"
    if not re.fullmatch(r'\d+\.\d+\.\d+', new) or changes(new):
        sys.exit(f'a new version such as 0.2.0 is needed, got {new}')
    today = date.today()
    for name, pattern, text in (
            ('settings.ini', r'(?m)^version = .*', f'version = {new}'),
            ('kronos_nb/__init__.py', r'__version__ = ".*"', f'__version__ = "{new}"'),
            ('CITATION.cff', r'(?m)^version: .*(\ndate-released: .*)?', f'version: {new}\ndate-released: {today}'),
            ('CHANGELOG.md', r'(?m)^## Unreleased$', f'## Unreleased\n\n## {new} ({today})')):
        path = root/name
        found, n = re.subn(pattern, text, path.read_text(encoding='utf-8'))
        assert n == 1, f'{name} has {n} places for the version'
        path.write_text(found, encoding='utf-8')


if __name__ == '__main__':
    if len(sys.argv) == 3 and sys.argv[1] == '--prepare':
        sys.exit(prepare(sys.argv[2]))
    if len(sys.argv) != 2:
        sys.exit('usage: python tools/release.py TAG, or --prepare VERSION')
    if found := problems(sys.argv[1]):
        sys.exit('\n'.join(found))
    print(changes(version()))
