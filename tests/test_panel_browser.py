"Panels in a real browser: served by Voila, and in JupyterLab, driven by Chromium"
import os, re, shutil, socket, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat, pytest
pw = pytest.importorskip('playwright.sync_api')
root = Path(__file__).resolve().parents[1]
CHROME = os.environ.get('CHROME') or shutil.which('chromium') or shutil.which('google-chrome')
ARGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage'.split()
pytestmark = pytest.mark.skipif(not CHROME, reason='no Chromium')

CELL = '''
from kronos_nb.config import Config
from kronos_nb.panel import Studio
little = Config.preset('quickstart', **{'base.symbols': None, 'data.windows_per_epoch': 256, 'data.val_windows': 32, 'tokenizer.epochs': 2, 'predictor.epochs': 2, 'data.test': 0., 'data.val': .3,
    'tokenizer.lr': 3e-3, 'predictor.lr': 3e-3, 'tokenizer.average_last': 1, 'predictor.average_last': 1, 'runtime.log_every': 1})
Studio('sample', little, 'out/run')
'''

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def wait_port(port, proc, t=60):
    end = time.time()+t
    while time.time()<end:
        assert proc.poll() is None, 'server died'
        try: socket.create_connection(('127.0.0.1', port), 1).close(); return
        except OSError: time.sleep(.2)
    raise TimeoutError(port)

def served(folder, *cmd):
    "Start a server in `folder`; yields its port"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nbformat.write(nb, folder/'panel.ipynb')
    port = free_port()
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline', 'JUPYTER_CONFIG_DIR': str(folder/'config')}
    with tempfile.TemporaryFile() as log:
        p = subprocess.Popen([sys.executable, '-m', *(c.format(port=port) for c in cmd)], cwd=folder, env=env, stdout=log, stderr=log)
        try:
            wait_port(port, p)
            yield port
        finally: p.terminate(); p.wait(10)

@pytest.fixture
def voila(tmp_path):
    pytest.importorskip('voila')
    yield from served(tmp_path, 'voila', 'panel.ipynb', '--no-browser', '--port={port}', '--Voila.ip=127.0.0.1', '--VoilaConfiguration.show_tracebacks=True')

@pytest.fixture
def lab(tmp_path):
    pytest.importorskip('jupyterlab')
    yield from served(tmp_path, 'jupyterlab', '--no-browser', '--port={port}', '--ip=127.0.0.1', '--IdentityProvider.token=', '--allow-root', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate')

@pytest.fixture
def page():
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, headless=True, args=ARGS)
        page = b.new_page(viewport=dict(width=1280, height=800))
        page.errors = []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        yield page
        b.close()

def tab(page, name): page.get_by_role('tab', name=name, exact=True).first.click()
def shot(page, name, tmp_path):
    out = Path(os.environ.get('SHOTS', tmp_path))/f'{name}.png'
    page.screenshot(path=out)
    assert out.stat().st_size > 5_000

def move_slider(page):
    "One step with the keyboard on the predictor's epochs; the text beside it and the count of changes follow"
    tab(page, 'settings'); tab(page, 'predictor')
    text = page.get_by_label('epochs', exact=True).locator('visible=true').first
    before = text.input_value()
    text.locator('xpath=ancestor::*[contains(@class, "widget-gridbox")]').locator('.noUi-handle').first.focus()
    page.keyboard.press('ArrowRight')
    page.get_by_text('1 change from').first.wait_for(timeout=20_000)
    page.wait_for_function('([v]) => [...document.querySelectorAll("input")].some(i => i.offsetParent && i.value == v)', arg=[str(int(before)+1)], timeout=20_000)
    assert text.input_value() == str(int(before)+1)

def train(page):
    "Start, wait until the picture of the curves is another one, and let it end"
    tab(page, 'train')
    page.get_by_role('button', name='Start').first.click()
    image = page.locator('img.widget-image').locator('visible=true').first
    image.wait_for(timeout=60_000)
    first = image.get_attribute('src')
    page.wait_for_function('([s]) => [...document.querySelectorAll("img.widget-image")].some(i => i.offsetParent && i.src != s)', arg=[first], timeout=90_000)

def test_settings_training_stop_and_forecast_in_voila(voila, page, tmp_path):
    page.goto(f'http://127.0.0.1:{voila}/', timeout=90_000)
    page.get_by_role('tab', name='settings', exact=True).wait_for(timeout=90_000)
    move_slider(page)
    shot(page, 'settings', tmp_path)
    train(page)
    page.get_by_role('button', name='Stop').first.click()
    page.get_by_text('stopped; start again to go on').wait_for(timeout=60_000)
    shot(page, 'stopped', tmp_path)
    page.get_by_role('button', name='Continue').first.click()
    page.get_by_text('finished', exact=True).wait_for(timeout=120_000)
    said = page.get_by_text(re.compile(r'^step \d+, loss')).locator('visible=true').first.inner_text()
    top, now = float(re.search(r'max ([\d.]+)', said)[1]), float(re.search(r'loss ([\d.]+)', said)[1])
    assert now < top, said
    shot(page, 'train', tmp_path)
    tab(page, 'forecast')
    page.get_by_role('button', name='Forecast').first.click()
    page.get_by_text(re.compile('of the paths end higher')).first.wait_for(timeout=60_000)
    shot(page, 'forecast', tmp_path)
    assert not page.errors, page.errors

def test_studio_in_jupyterlab(lab, page, tmp_path):
    page.goto(f'http://127.0.0.1:{lab}/lab/tree/panel.ipynb', timeout=90_000)
    page.locator('.jp-Notebook .jp-CodeCell').first.click(timeout=90_000)
    page.get_by_text(re.compile(r'Python 3|python3')).first.wait_for(timeout=60_000)
    page.keyboard.press('Shift+Enter')
    page.get_by_role('tab', name='settings', exact=True).wait_for(timeout=90_000)
    move_slider(page)
    train(page)
    shot(page, 'lab', tmp_path)
    assert not page.errors, page.errors
