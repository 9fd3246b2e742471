"""Write the addresses of the project, as settings.ini has them, into every page and file that shows one

    python tools/addresses.py [--check]
"""
import argparse
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
KINDS = ('.ipynb', '.md', '.cff', '.py', '.yml', '.ini', '.toml')


def addresses() -> list[tuple]:
    "Return patterns of addresses of this project under any owner, and what to write"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    cfg = config['DEFAULT']
    repo, name = re.escape(cfg['repo']), r'[\w-]+'
    host = re.match(r'https://[^/]+', cfg['git_url'])[0]
    path = cfg['git_url'].removeprefix(host + '/')
    return [(rf'{re.escape(host)}/{name}/{repo}(?![\w-])', cfg['git_url']),
            (rf'https://{name}\.github\.io/{repo}(?![\w-])', cfg['doc_host'] + cfg['doc_baseurl']),
            (rf'(?<=colab\.research\.google\.com/github/){name}/{repo}(?![\w-])', path)]


def rewritten(text: str) -> str:
    "Return a text with the addresses of settings.ini"
    for pattern, new in addresses():
        text = re.sub(pattern, new, text)
    return text


def stale() -> dict[Path, str]:
    "Return the new text of each tracked file that shows another address"
    listed = subprocess.run(['git', 'ls-files'], cwd=root, text=True, capture_output=True, check=True)
    names = [o for o in listed.stdout.split('\n') if o.endswith(KINDS) and o != 'settings.ini']
    files = [root/o for o in names if (root/o).is_file()]
    found = ((path, path.read_text(encoding='utf-8')) for path in files)
    return {path: new for path, text in found if (new := rewritten(text)) != text}


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--check', action='store_true', help='exit with 1 where a file shows another address')
    check, changed = p.parse_args().check, stale()
    for path, text in changed.items():
        print(path.relative_to(root))
        if not check:
            path.write_text(text, encoding='utf-8')
    sys.exit(bool(check and changed))
