"Panels in a real browser: served by Voila, and in JupyterLab, driven by Chromium. SHOTS=folder takes the pictures of the docs, of a longer run"
import json, os, re, shutil, socket, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
pw = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
root = Path(__file__).resolve().parents[1]
CHROME = os.environ.get('CHROME') or shutil.which('chromium') or shutil.which('google-chrome')
ARGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage'.split()
LONG = 240_000   # ms: nothing here is a measurement, and a machine with other work may take its time
pytestmark = pytest.mark.skipif(not CHROME, reason='no Chromium on the PATH (nor in CHROME)')

SMALL = {'data.windows_per_epoch': 128, 'tokenizer.epochs': 3, 'predictor.epochs': 24, 'tokenizer.batch_size': 32, 'predictor.batch_size': 32, 'data.test': 0., 'data.val': .3, 'data.val_windows': 32, 'runtime.plots': False}
SHOWN = {'data.windows_per_epoch': 512, 'tokenizer.epochs': 4, 'predictor.epochs': 6, 'tokenizer.batch_size': 32, 'predictor.batch_size': 32, 'data.val_windows': 64, 'evaluate.origins': 12, 'evaluate.paths': 30}
SETTINGS = SHOWN if 'SHOTS' in os.environ else SMALL
CELL = f'''
from kronos_nb.config import Config
from kronos_nb.panel import Studio
start = Config.preset('quickstart', **{{'base.symbols': None, 'tokenizer.lr': 3e-3, 'predictor.lr': 3e-3, 'tokenizer.average_last': 1, 'predictor.average_last': 1, 'runtime.log_every': 1, 'evaluate.calibrate': 'off'}}, **{SETTINGS})
Studio('sample', start, 'runs/goog')
'''
FIRST = f'''
from kronos_nb.train import fit
fit('sample', start.replace(**{{'predictor.lr': 1e-3, 'data.windows_per_epoch': 128, 'tokenizer.epochs': 2, 'predictor.epochs': 2, 'runtime.progress': False}}), 'runs/first', judge=False)
'''

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def answers(port, proc, t=180):
    "Whether a server listens before it dies or the time is over"
    end = time.time()+t
    while time.time() < end and proc.poll() is None:
        try: socket.create_connection(('127.0.0.1', port), 1).close(); return True
        except OSError: time.sleep(.2)
    return False

def served(folder, cell, *cmd):
    "A server in `folder` with settings and data of its own; yields its port"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nbformat.write(nb, folder/'panel.ipynb')
    quiet = folder/'lab'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    own = {k: str(folder/k.lower()) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
    env = {**os.environ, **own, 'JUPYTERLAB_SETTINGS_DIR': str(folder/'lab'), 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}
    said = folder/'server.log'
    for _ in range(3):   # between asking for a free port and using it somebody else may take it
        port = free_port()
        with said.open('a') as log: p = subprocess.Popen([sys.executable, '-m', *(c.format(port=port) for c in cmd)], cwd=folder, env=env, stdout=log, stderr=log)
        try:
            if answers(port, p): yield port; return
        finally: p.terminate(); p.wait(30)
    pytest.fail(f'no server: {said.read_text()[-3000:]}')

@pytest.fixture
def voila(tmp_path):
    pytest.importorskip('voila', reason='voila is not installed')
    yield from served(tmp_path, CELL.replace('Studio(', FIRST + 'Studio('), 'voila', 'panel.ipynb', '--no-browser', '--port={port}', '--Voila.ip=127.0.0.1', '--VoilaConfiguration.show_tracebacks=True')

@pytest.fixture
def lab(tmp_path):
    pytest.importorskip('jupyterlab', reason='jupyterlab is not installed')
    yield from served(tmp_path, CELL, 'jupyterlab', '--no-browser', '--port={port}', '--ServerApp.port_retries=0', '--ip=127.0.0.1', '--IdentityProvider.token=', '--allow-root', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate')

@pytest.fixture
def page():
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, headless=True, args=ARGS, timeout=LONG)
        page = b.new_page(viewport=dict(width=1366, height=768))
        page.set_default_timeout(LONG)
        page.errors = []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        yield page
        b.close()

def tab(page, name): page.get_by_role('tab', name=name, exact=True).first.click()

def shot(page, name, tmp_path):
    "A picture of the page; where it is for the docs, of the panel alone"
    out = Path(os.environ.get('SHOTS', tmp_path))/f'panel_{name}.png'
    what = page if name == 'lab' else page.locator('.widget-tab').first
    what.screenshot(path=out)
    assert out.stat().st_size > 5_000

def fits(page):
    "Nothing of the panel lies outside of a laptop's screen"
    box = page.locator('.widget-tab').first.bounding_box()
    assert box['x'] >= 0 and box['x']+box['width'] <= 1366 and box['height'] <= 768, box
    wide = page.evaluate('[...document.querySelectorAll(".widget-tab *")].filter(o => o.offsetParent && o.getBoundingClientRect().right > innerWidth && !o.closest("pre")).length')
    assert not wide, f'{wide} elements are cut off at the right'

def move_slider(page):
    "One step with the keyboard on the predictor's epochs; the text beside it, the count of changes and the estimate follow"
    tab(page, 'settings'); tab(page, 'predictor')
    text = page.get_by_label('epochs', exact=True).locator('visible=true').first
    before, cost = text.input_value(), page.get_by_text(re.compile(r'^[\d,]+ steps, ')).locator('visible=true').first
    cost.wait_for()
    steps = cost.inner_text()
    text.locator('xpath=ancestor::*[contains(@class, "widget-gridbox")]').locator('.noUi-handle').first.focus()
    page.keyboard.press('ArrowRight')
    page.get_by_text('1 change from').first.wait_for()
    page.wait_for_function('([v]) => [...document.querySelectorAll("input")].some(i => i.offsetParent && i.value == v)', arg=[str(int(before)+1)])
    page.wait_for_function('([v]) => [...document.querySelectorAll(".widget-html-content")].some(o => o.offsetParent && / steps, /.test(o.innerText) && o.innerText != v)', arg=[steps])
    assert text.input_value() == str(int(before)+1)

FALLS = '''() => [...document.querySelectorAll(".widget-html-content")].some(o => {
    const m = o.offsetParent && o.innerText.match(/step [0-9,]+, loss ([0-9.]+) .min [0-9.]+, max ([0-9.]+)/); return m && parseFloat(m[1]) < .97*parseFloat(m[2]) })'''

def train(page):
    "Start, and wait until the picture of the curves is another one and the loss below it has fallen"
    tab(page, 'train')
    page.get_by_role('button', name='Start').first.click()
    image = page.locator('img.widget-image').locator('visible=true').first
    image.wait_for()
    first = image.get_attribute('src')
    page.wait_for_function('([s]) => [...document.querySelectorAll("img.widget-image")].some(i => i.offsetParent && i.src != s)', arg=[first])
    page.wait_for_function(FALLS)

def compare_runs(page, tmp_path):
    "Tick the run that the notebook began with and the one that was clicked, and set them side by side"
    tab(page, 'runs')
    page.get_by_role('button', name='Look again').first.click()
    page.locator('option', has_text='first').first.wait_for(state='attached')
    page.locator('select[multiple]').first.select_option([f'runs{os.sep}goog', f'runs{os.sep}first'])
    page.get_by_role('button', name='Compare').first.click()
    page.get_by_text('settings that differ').first.wait_for()
    page.locator('img.widget-image').locator('visible=true').first.wait_for()
    fits(page)
    shot(page, 'runs', tmp_path)

def test_settings_training_stop_and_forecast_in_voila(voila, page, tmp_path):
    page.goto(f'http://127.0.0.1:{voila}/', wait_until='commit')
    page.get_by_role('tab', name='settings', exact=True).wait_for()
    page.get_by_text(re.compile(r'bars of \d+ symbols, usable')).first.wait_for()
    fits(page)
    shot(page, 'data', tmp_path)
    move_slider(page)
    fits(page)
    shot(page, 'settings', tmp_path)
    train(page)
    shot(page, 'running', tmp_path)
    page.get_by_role('button', name='Stop').first.click()
    page.get_by_text('stopped; start again to go on').wait_for()
    page.get_by_role('button', name='Continue').first.click()
    page.get_by_text('finished', exact=True).wait_for()
    said = page.get_by_text(re.compile(r'^step \d+, loss')).locator('visible=true').first.inner_text()
    assert float(re.search(r'loss ([\d.]+)', said)[1]) < float(re.search(r'max ([\d.]+)', said)[1]), said
    fits(page)
    shot(page, 'train', tmp_path)
    tab(page, 'forecast')
    page.get_by_role('button', name='Forecast').first.click()
    page.get_by_text(re.compile('of the paths end higher')).first.wait_for()
    fits(page)
    shot(page, 'forecast', tmp_path)
    compare_runs(page, tmp_path)
    assert not page.errors, page.errors

def run_cell(page):
    "Run the first cell as soon as the kernel is there; a key that came too early is pressed again"
    cell = page.locator('.jp-Notebook .jp-CodeCell').first
    cell.wait_for()
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(state='attached')
    for _ in range(5):
        cell.locator('.cm-content').click()
        page.keyboard.press('Shift+Enter')
        try: page.wait_for_function('() => !/^\\[ ?\\]/.test(document.querySelector(".jp-Notebook .jp-CodeCell .jp-InputPrompt").innerText.trim())', timeout=10_000); return
        except pw.TimeoutError: continue
    pytest.fail('the cell does not run')

def test_studio_in_jupyterlab(lab, page, tmp_path):
    page.goto(f'http://127.0.0.1:{lab}/lab/tree/panel.ipynb', wait_until='commit')
    run_cell(page)
    page.get_by_role('tab', name='settings', exact=True).wait_for()
    move_slider(page)
    train(page)
    shot(page, 'lab', tmp_path)
    page.get_by_role('button', name='Stop').first.click()
    page.get_by_text('stopped; start again to go on').wait_for()
    assert not page.errors, page.errors
