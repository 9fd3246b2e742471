"""Print the changes of the version that a tag names; fail unless tag, settings.ini, package and changelog agree

    python tools/release.py v0.2.0
"""
import re
import sys
from configparser import ConfigParser
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
    found = re.search(rf'^## {re.escape(of)}(?: .*)?\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    return found[1].strip() if found else ''


def problems(tag: str) -> list[str]:
    "Return what keeps a tag from being released"
    now = version()
    package = re.search(r'__version__ = "(.*)"', (root/'kronos_nb'/'__init__.py').read_text(encoding='utf-8'))[1]
    out = [] if tag == f'v{now}' else [f'the tag is {tag}, and settings.ini has version {now}']
    out += [] if package == now else [f'kronos_nb/__init__.py has version {package}, and settings.ini {now}']
    return out + ([] if changes(now) else [f'CHANGELOG.md has no section {now}'])


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python tools/release.py TAG')
    if found := problems(sys.argv[1]):
        sys.exit('\n'.join(found))
    print(changes(version()))
