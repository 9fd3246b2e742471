"README and docs site come from the notebooks, through the one `_quarto.yml`, and every link leads somewhere"
import subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse
import pytest, yaml
root = Path(__file__).resolve().parents[1]
def run(*a): return subprocess.run([sys.executable, *a], cwd=root, text=True, capture_output=True, timeout=600)

def test_readme_is_current():
    r = run('tools/readme.py', '--check'); assert r.returncode==0, r.stderr

def test_readme_links_lead_somewhere():
    import re
    links = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s]+)', (root/'README.md').read_text())
    local = [o for o in links if not urlparse(o).scheme]
    assert local and all((root/o).exists() for o in local), [o for o in local if not (root/o).exists()]

def test_quarto_yml():
    q = yaml.safe_load((root/'_quarto.yml').read_text())
    assert (root/'nbs/_quarto.yml').read_text()==(root/'_quarto.yml').read_text()
    assert q['project']['type']=='website' and q['metadata-files']==['nbdev.yml', 'sidebar.yml']

@pytest.fixture(scope='module')
def site():
    r = run('tools/docs.py', '--no-quarto'); assert r.returncode==0, r.stdout+r.stderr
    return root/'_docs'

def test_pages_show_signatures_outputs_and_pictures(site):
    assert 'lookback_window' in (site/'api/core.html').read_text()
    page = (site/'api/train.html').read_text()
    assert 'out_dir' in page and '<img' in page and 'val_loss' in page

class Links(HTMLParser):
    def __init__(self): super().__init__(); self.found = []
    def handle_starttag(self, tag, attrs): self.found += [v for k, v in attrs if k in ('href', 'src') and v]

def test_no_dead_links(site):
    dead = set()
    for page in site.rglob('*.html'):
        p = Links(); p.feed(page.read_text())
        for link in p.found:
            u = urlparse(link)
            if u.scheme or u.netloc or not u.path: continue
            target = site/u.path.lstrip('/') if u.path.startswith('/') else page.parent/unquote(u.path)
            if not target.exists(): dead.add((page.relative_to(site).as_posix(), link))
    assert not dead, sorted(dead)
