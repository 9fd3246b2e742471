"Panels in Chromium: in Voila, in JupyterLab and by `kronos-nb studio`; SHOTS=folder takes the pictures of the docs"
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

pw = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
root = Path(__file__).resolve().parents[1]
CHROME = os.environ.get('CHROME') or shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROME, reason='no Chromium on the PATH (nor in CHROME)')
ARGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage""".split()
LONG = 900_000 if 'SHOTS' in os.environ else 240_000   # ms; a machine with other work may take its time
WIDTH, HEIGHT = 1366, 768
NARROW = dict(width=390, height=844)
PAGES = ('data', 'settings', 'train', 'forecast', 'runs')

BASE = {'tokenizer.init': 'scratch', 'predictor.init': 'scratch', 'evaluate.calibrate': 'off', 'runtime.log_every': 1,
        'tokenizer.lr': 3e-3, 'tokenizer.batch_size': 32, 'tokenizer.average_last': 1,
        'predictor.lr': 3e-3, 'predictor.batch_size': 32, 'predictor.average_last': 1}
SMALL = {'data.windows_per_epoch': 128, 'data.val_windows': 32, 'data.test': 0., 'data.val': .3,
         'tokenizer.epochs': 3, 'predictor.epochs': 24, 'runtime.plots': False}
SHOWN = {'data.windows_per_epoch': 512, 'data.val_windows': 64, 'tokenizer.epochs': 4, 'predictor.epochs': 6,
         'evaluate.origins': 12, 'evaluate.paths': 30}
CELL = f'''
import kronos_nb as kn
start = kn.Config.preset('quickstart', **{BASE | (SHOWN if 'SHOTS' in os.environ else SMALL)})
kn.Studio('sample', start, 'runs/goog')
'''
FIRST_RUN = f'''
import kronos_nb as kn
first = kn.Config.preset('quickstart', **{BASE | SMALL}, **{{'runtime.progress': False}})
first = first.replace(**{{'predictor.lr': 1e-3, 'tokenizer.epochs': 2, 'predictor.epochs': 2}})
kn.fit('sample', first, 'runs/first', judge=False)
'''


# servers
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def listens(port, process, seconds=180):
    "Return whether a server listens before it dies or the time is over"
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return True
        except OSError:
            time.sleep(.2)
    return False


def private(folder):
    "Return an environment whose Jupyter settings and data lie in `folder`"
    quiet = folder/'lab'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    names = 'JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR JUPYTERLAB_WORKSPACES_DIR IPYTHONDIR'.split()
    return os.environ | {k: str(folder/k.lower()) for k in names} | dict(
        JUPYTERLAB_SETTINGS_DIR=str(folder/'lab'), PYTHONPATH=str(root), OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE',
        MPLBACKEND='module://matplotlib_inline.backend_inline')


def serve(folder, cell, *command):
    "Serve a notebook of one cell from `folder`; yield the port"
    kernel = dict(name='python3', display_name='python3', language='python')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=dict(kernelspec=kernel))
    nbformat.write(nb, folder/'panel.ipynb')
    env, log = private(folder), folder/'server.log'
    for _ in range(3):   # between asking for a free port and using it somebody else may take it
        port = free_port()
        with log.open('a') as out:
            process = subprocess.Popen([sys.executable, '-m', *(c.format(port=port) for c in command)], cwd=folder,
                                       env=env, stdout=out, stderr=out)
        try:
            if listens(port, process):
                yield port
                return
        finally:
            process.terminate()
            process.wait(30)
    pytest.fail(f'no server: {log.read_text()[-3000:]}')


@pytest.fixture
def voila(tmp_path):
    pytest.importorskip('voila', reason='voila is not installed')
    yield from serve(tmp_path, FIRST_RUN + CELL, 'voila', 'panel.ipynb', '--no-browser', '--port={port}',
                     '--Voila.ip=127.0.0.1', '--VoilaConfiguration.show_tracebacks=True')


@pytest.fixture
def lab(tmp_path):
    pytest.importorskip('jupyterlab', reason='jupyterlab is not installed')
    yield from serve(tmp_path, CELL, 'jupyterlab', '--no-browser', '--port={port}', '--ServerApp.port_retries=0',
                     '--ip=127.0.0.1', '--IdentityProvider.token=', '--allow-root',
                     '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate')


# the browser
@pytest.fixture
def page():
    with pw.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROME, headless=True, args=ARGS, timeout=LONG)
        page = browser.new_page(viewport=dict(width=WIDTH, height=HEIGHT))
        page.set_default_timeout(LONG)
        page.errors = []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        yield page
        browser.close()


def open_tab(page, name):
    page.get_by_role('tab', name=name, exact=True).first.click()


def click(page, name):
    page.get_by_role('button', name=name).first.click()


def visible(page, selector):
    return page.locator(selector).locator('visible=true').first


def shot(page, name, tmp_path):
    "Take a picture of the panel; of the whole page in JupyterLab"
    out = Path(os.environ.get('SHOTS', tmp_path))/f'panel_{name}.png'
    (page if name == 'lab' else page.locator('.widget-tab').first).screenshot(path=out)
    assert out.stat().st_size > 5_000


CUT_OFF = '''() => [...document.querySelectorAll(".widget-tab *")].filter(o => o.offsetParent
    && o.getBoundingClientRect().right > innerWidth && !o.closest("pre, .knb-picture, .knb table")).length'''


def check_fit(page):
    "Nothing of the panel lies outside of a laptop's screen"
    box = page.locator('.widget-tab').first.bounding_box()
    assert 0 <= box['x'] and box['x'] + box['width'] <= WIDTH
    assert box['height'] <= HEIGHT
    assert page.evaluate(CUT_OFF) == 0


def check_narrow(page, tmp_path):
    "On a phone no page is wider than the screen; pictures and tables scroll inside it"
    page.set_viewport_size(NARROW)
    for name in PAGES:
        open_tab(page, name)
        page.wait_for_timeout(500)
        assert page.evaluate('document.documentElement.scrollWidth') <= NARROW['width'], name
        assert page.evaluate(CUT_OFF) == 0, name
        page.screenshot(path=tmp_path/f'narrow_{name}.png', full_page=True)
    page.set_viewport_size(dict(width=WIDTH, height=HEIGHT))


INPUT_IS = '([v]) => [...document.querySelectorAll("input")].some(i => i.offsetParent && i.value == v)'
COST_CHANGED = '''([v]) => [...document.querySelectorAll(".widget-html-content")].some(
    o => o.offsetParent && / steps, /.test(o.innerText) && o.innerText != v)'''


def move_slider(page):
    "Move the predictor's epochs by one with the keyboard; the text, the count of changes and the estimate follow"
    open_tab(page, 'settings')
    open_tab(page, 'predictor')
    text = page.get_by_label('epochs', exact=True).locator('visible=true').first
    cost = page.get_by_text(re.compile(r'^[\d,]+ steps, ')).locator('visible=true').first
    cost.wait_for()
    epochs, before = int(text.input_value()), cost.inner_text()
    grid = text.locator('xpath=ancestor::*[contains(@class, "widget-gridbox")]')
    grid.locator('.noUi-handle').first.focus()
    page.keyboard.press('ArrowRight')
    page.get_by_text('1 change from').first.wait_for()
    page.wait_for_function(INPUT_IS, arg=[str(epochs + 1)])
    page.wait_for_function(COST_CHANGED, arg=[before])


PICTURE_CHANGED = '([s]) => [...document.querySelectorAll("img.widget-image")].some(i => i.offsetParent && i.src != s)'
LOSS_FELL = '''() => [...document.querySelectorAll(".widget-html-content")].some(o => {
    const m = o.offsetParent && o.innerText.match(/step [0-9,]+, loss ([0-9.]+) .min [0-9.]+, max ([0-9.]+)/);
    return m && parseFloat(m[1]) < .97*parseFloat(m[2]) })'''


def train(page):
    "Start, and wait until the curves were drawn again and the loss has fallen"
    open_tab(page, 'train')
    click(page, 'Start')
    image = visible(page, 'img.widget-image')
    image.wait_for()
    page.wait_for_function(PICTURE_CHANGED, arg=[image.get_attribute('src')])
    page.wait_for_function(LOSS_FELL)


def stop(page):
    click(page, 'Stop')
    page.get_by_text('stopped; start again to go on').wait_for()


def compare_runs(page):
    "Select the run that the notebook began with and the one that was clicked"
    open_tab(page, 'runs')
    click(page, 'Look for new runs')
    page.locator('option', has_text='first').first.wait_for(state='attached')
    page.locator('select[multiple]').first.select_option([f'runs{os.sep}goog', f'runs{os.sep}first'])
    click(page, 'Compare')
    page.get_by_text('settings that differ').first.wait_for()
    visible(page, 'img.widget-image').wait_for()


def test_every_page_in_voila(voila, page, tmp_path):
    def check(name):
        shot(page, name, tmp_path)
        check_fit(page)
    page.goto(f'http://127.0.0.1:{voila}/', wait_until='commit')
    page.get_by_role('tab', name='settings', exact=True).wait_for()
    page.get_by_text(re.compile(r'bars of \d+ symbols?, usable')).first.wait_for()
    check('data')
    move_slider(page)
    check('settings')
    train(page)
    shot(page, 'running', tmp_path)
    stop(page)
    click(page, 'Continue')
    page.get_by_text('finished', exact=True).wait_for()
    check('train')
    page.get_by_text('training curves').click()
    line = page.get_by_text(re.compile(r'^step \d+, loss')).locator('visible=true').first.inner_text()
    assert float(re.search(r'loss ([\d.]+)', line)[1]) < float(re.search(r'max ([\d.]+)', line)[1])
    open_tab(page, 'forecast')
    click(page, 'Forecast')
    page.get_by_text(re.compile('of the paths end higher')).first.wait_for()
    check('forecast')
    compare_runs(page)
    check('runs')
    check_narrow(page, tmp_path)
    assert not page.errors


RAN = r'''() => !/^\[ ?\]/.test(
    document.querySelector(".jp-Notebook .jp-CodeCell .jp-InputPrompt").innerText.trim())'''


def run_cell(page):
    "Run the first cell once the kernel is there; a key that came too early is pressed again"
    cell = page.locator('.jp-Notebook .jp-CodeCell').first
    cell.wait_for()
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(state='attached')
    for _ in range(5):
        cell.locator('.cm-content').click()
        page.keyboard.press('Shift+Enter')
        try:
            page.wait_for_function(RAN, timeout=10_000)
            return
        except pw.TimeoutError:
            continue
    pytest.fail('the cell does not run')


def test_studio_in_jupyterlab(lab, page, tmp_path):
    page.goto(f'http://127.0.0.1:{lab}/lab/tree/panel.ipynb', wait_until='commit')
    run_cell(page)
    page.get_by_role('tab', name='settings', exact=True).wait_for()
    move_slider(page)
    train(page)
    shot(page, 'lab', tmp_path)
    stop(page)
    assert not page.errors


# a page of its own
def status_of(url):
    "Return the status and the final address of a request without a cookie"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.url
    except urllib.error.HTTPError as e:
        return e.code, e.url


@pytest.fixture
def studio(tmp_path):
    "Start `kronos-nb studio` on a file of bars; yield its address and its process"
    pytest.importorskip('voila', reason='voila is not installed')
    home = tmp_path/'home'
    home.mkdir()
    from kronos_nb.data.read import sample_klines
    sample_klines('DOGEUSDT').to_csv(home/'my doge.csv', index=False)
    (home/'voila.json').write_text(json.dumps(dict(Voila=dict(ip='0.0.0.0'))))   # of somebody else: not obeyed
    command = [sys.executable, '-m', 'kronos_nb.cli', 'studio', 'my doge.csv', '--no-browser', '--port']
    process = subprocess.Popen([*command, str(free_port())], cwd=home, env=private(tmp_path), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        lines = iter(process.stdout.readline, '')
        yield next(found[0] for line in lines if (found := re.search(r'http://\S+', line))), process
    finally:
        process.kill()
        process.wait(30)


def test_the_studio_lets_nobody_in_without_its_token(studio):
    url, process = studio
    address, _, token = url.partition('?token=')
    assert address.startswith('http://127.0.0.1:')
    assert len(token) >= 32
    assert '/login' in status_of(address)[1]
    kernel = 'api/kernels/00000000-0000-0000-0000-000000000000'
    for path in ('voila/files/studio.ipynb', 'voila/files/voila.json', kernel, f'{kernel}/channels'):
        assert status_of(address + path)[0] == 403, path
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_an_upload_in_the_studio(studio, page, tmp_path):
    from kronos_nb.data.read import sample_klines
    sample_klines(['AAPL', 'IBM']).to_csv(tmp_path/'two shares.csv', index=False)
    (tmp_path/'page.csv').write_text('<script>alert(1)</script>')
    page.goto(studio[0], wait_until='commit')
    page.get_by_text('400 bars of 1 symbol, usable').first.wait_for()
    for file, answer in (('two shares.csv', 'bars of 2 symbols, usable'), ('page.csv', 'DataError')):
        with page.expect_file_chooser() as chooser:
            click(page, 'Upload a file')
        chooser.value.set_files(tmp_path/file)
        page.get_by_text(answer).first.wait_for()
    assert [f.name for f in (tmp_path/'home'/'uploads').iterdir()] == ['two_shares.csv']
    check_narrow(page, tmp_path)
    open_tab(page, 'forecast')
    page.get_by_role('button', name='Forecast the next').wait_for()
    assert not page.errors
