"README and docs site come from the notebooks, through the one `_quarto.yml`"
import subprocess, sys
from pathlib import Path
import yaml
root = Path(__file__).resolve().parents[1]
def run(*a): return subprocess.run([sys.executable, *a], cwd=root, text=True, capture_output=True, timeout=600)

def test_readme_is_current():
    r = run('tools/readme.py', '--check'); assert r.returncode==0, r.stderr

def test_quarto_yml():
    q = yaml.safe_load((root/'_quarto.yml').read_text())
    assert (root/'nbs/_quarto.yml').read_text()==(root/'_quarto.yml').read_text()
    assert q['project']['type']=='website' and q['metadata-files']==['nbdev.yml', 'sidebar.yml']

def test_docs_build():
    r = run('tools/docs.py', '--no-quarto'); assert r.returncode==0, r.stdout+r.stderr
    page = (root/'_docs/api/core.html').read_text()
    assert 'lookback_window' in page and (root/'_docs/index.html').exists()
