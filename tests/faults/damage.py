"""Damage every file of a run in five ways, then run every command: each ends in a typed error, or goes on and says so

    python -m tests.faults.damage --all [--seconds 3600] [OUT]

Four subjects: a finished run before every command that reads one, runs that were stopped while they trained and while
they were judged, which are gone on with, and a ledger. What a command says of a damaged file is compared with what it
says of a whole one. Results are appended to OUT/results.jsonl; a case that is there is not tried again.
"""
import argparse
import base64
import collections
import contextlib
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

from filelock import FileLock

from kronos_nb.cli import main

SKIPPED = ('.png', '.log', '.lock')   # nothing reads them
WRITE_REPORTS, SLOW = ('report', 'fit', 'resume'), ('fit', 'resume')   # the slow ones come last
SIZES = ['--paths', '2']
TOKEN = 'a-token-of-the-tests'
PNG = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==')


def _truncate(file, other): file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
def _empty(file, other): file.write_bytes(b'')
def _delete(file, other): file.unlink()


def _flip(file, other):
    "Flip a bit in the middle of a file"
    data = bytearray(file.read_bytes())
    data[len(data)*3//5] ^= 4
    file.write_bytes(data)


def _swap(file, other):
    "Put the same file of another run in its place, or JSON of another program"
    if other.is_file():
        shutil.copyfile(other, file)
    else:
        file.write_bytes(b'{}')


DAMAGES = dict(truncated=_truncate, flipped=_flip, emptied=_empty, deleted=_delete, swapped=_swap)


# commands: a subject, the same without damage, a folder to write into -> what runs the command
def serve(run):
    "Load a model as the service does, and ask it once"
    from fastapi.testclient import TestClient

    from kronos_nb import serve as module
    from tests.helpers import bars
    columns = {c: bars[c].tail(64).astype(str).tolist() for c in bars}

    def ask(models, ip, port, sources, limits):
        app = module.make_app(module.Service(models, limits), TOKEN)
        with TestClient(app, headers=dict(Authorization=f'Bearer {TOKEN}')) as client:
            print(client.get('/models').text)
            print(client.post('/forecast', json=dict(bars=columns, symbol='GOOG', paths=2)).text)
    with mock.patch.object(module, 'serve', ask):
        return main(['serve', '--model', str(run)])


def studio(run, whole):
    "Open every page on a run, forecast with it, and compare it"
    from kronos_nb.panel.studio import Studio
    from kronos_nb.settings import Sampling
    from tests.helpers import bars, cfg
    page = Studio(bars, cfg.replace(**CHANGES), run)
    page.open()
    page.settle()
    for i in range(len(page.panels)):
        page._show_page(dict(new=i))
    page.forecast.use(str(run))
    page.forecast.sampling = Sampling(paths=2)
    print(page.forecast.predict().quantile(.5).to_string())
    page.runs.selected = [str(run), str(whole)]
    print(page.runs.compare().to_markdown())
    print(*[p.error.value for p in page.panels.values() if hasattr(p, 'error')])
    page.close()
    return 0


def commands(run: Path, whole: Path, out: Path, fit) -> dict:
    "Return name -> what runs the command on a finished run"
    write = [*SIZES, '--out', out]
    return dict(
        report=['report', run], monitor=['monitor', run, '--once'], compare=['compare', run, whole],
        evaluate=['evaluate', '--model', run, '--origins', '4', *write], forecast=['forecast', '--model', run, *write],
        push=['push', run, 'user/name', '--dry-run'], bundle=['bundle', out, '--models', run, '--no-download'],
        average=['average', '--checkpoint-dir', run/'predictor', '--num-checkpoints', '2', '--output', out],
        run=['run', '--model', run, '--ledger', out, *SIZES], serve=lambda: serve(run),
        studio=lambda: studio(run, whole),
        fit=fit)


def on_a_stopped_run(run, whole, out, fit) -> dict:
    return dict(resume=fit, monitor=['monitor', run, '--once'], report=['report', run])


def on_a_ledger(folder, whole, out, fit) -> dict:
    bars = folder.parent/'bars.csv'
    where = ['--ledger', folder]
    return dict(
        show=['ledger', 'show', *where, '--out', out], grade=['ledger', 'grade', bars, *where],
        run=['run', bars, '--model', 'bundled', *where, *SIZES, '--lookback-window', '32', '--predict-window', '4'])


COMMANDS = dict(finished=commands, stopped=on_a_stopped_run, judging=on_a_stopped_run, ledger=on_a_ledger)


def files_of(run: Path) -> list:
    "Return the files that a command may read, without older checkpoints; of an evaluation that was stopped, its parts"
    if parts := sorted(run.glob('evaluation/parts/*')):
        return [p.relative_to(run) for p in parts]
    newest = {max((run/stage/'checkpoints').glob('step_*'), default=None) for stage in ('tokenizer', 'predictor')}
    def read(path):
        folder = next((p for p in path.parents if p.name.startswith('step_')), None)
        return path.suffix not in SKIPPED and not path.name.startswith('.') and folder in {None, *newest}
    return sorted(p.relative_to(run) for p in run.rglob('*') if p.is_file() and read(p))


def outcome(go) -> tuple:
    "Return how a command ended (its exit code, or 'traceback'), and what it printed"
    from kronos_nb.core import KronosError
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(list(map(str, go))) if isinstance(go, list) else go()
        except SystemExit as e:
            code = e.code
        except KronosError as e:   # of what is no command of the shell
            code = 2
            print(f'{type(e).__name__}: {e}')
        except BaseException:
            code = 'traceback'
            traceback.print_exc()
    return code, text.getvalue()


def wrote(copy, out, command) -> str:
    "Return what a command left, as text"
    from tests.faults.stops import sha
    report, cards = copy/'report.md', copy.glob('hub/*/README.md') if command == 'push' else ()
    found = [p.read_text(errors='replace') for p in sorted(cards)]
    found += [report.read_text(errors='replace')] if command in WRITE_REPORTS and report.is_file() else []
    for p in sorted(out.rglob('*')):
        if p.suffix in ('.csv', '.md'):
            found.append(p.read_text(errors='replace'))
        elif p.suffix == '.safetensors' or p.name == 'config.json':
            found.append(f'{p.relative_to(out)} {sha(p)}')
    return '\n'.join(found)


def case(run, other, file, damage, command, fit=None, subject='finished') -> tuple:
    "Return how a command ended on a copy of a subject with one damaged file (None: undamaged), and what it said"
    with tempfile.TemporaryDirectory() as d:
        copy = Path(shutil.copytree(run, Path(d)/'subject'))
        for beside in run.parent.glob('*.csv'):
            shutil.copy(beside, d)
        if file is not None:
            DAMAGES[damage](copy/file, other/file)
        def go(): return fit(copy)
        code, text = outcome(COMMANDS[subject](copy, run, Path(d)/'out', go)[command])
        if command in ('fit', 'resume') and code == 0:
            text += '\n' + kept(copy, run, file)
        return code, text + '\n' + wrote(copy, Path(d)/'out', command)


def kept(copy, run, file) -> str:
    "Return what a run that was gone on with has otherwise, and what it notes"
    from tests.faults.stops import differences, left
    said = [p.read_text(errors='replace') for p in sorted(copy.rglob('notes.jsonl'))]
    differ = differences(left(copy), left(finished_of(run)))
    return '\n'.join([*said, *(f'OTHER {k}' for k in differ if k != str(file) and not k.endswith('notes.jsonl'))])


def finished_of(run) -> Path:
    "Return the finished run with the settings of a subject"
    return run.parent/'finished' if (run.parent/'finished').is_dir() else run


def lines_of(text) -> set:
    "Return lines without clocks, temporary folders and pictures"
    text = re.sub(r'/tmp/\w+/(subject|out)', r'\1', re.sub(r'\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?', 'WHEN', text))
    text = re.sub(r'[\d.,]+ (s|ms|windows/s|GiB|min)\b', 'N', re.sub(r'\bcreated_at.*|evaluate forecast .*', '', text))
    return {o.strip() for o in text.splitlines() if o.strip()}


WORDS = re.compile(r'damaged|holds \d+ of \d+ rows|left out|lacks|cannot|no longer|was not|missing|does not|is no |'
                   'again|unknown', re.IGNORECASE)


def verdict(file, code, text, whole) -> str:
    "Return 'traceback', 'error', 'unnamed error', 'same', 'said' or 'believed'"
    if code == 'traceback' or 'Traceback (most recent' in text:
        return 'traceback'
    new = lines_of(text) - whole
    names = {file.name, *(p.name for p in file.parents if p.name)}
    named = any(name in o for o in new for name in names)
    if code == 2:
        return 'error' if named else 'unnamed error'
    if not new:
        return 'same' if not whole - lines_of(text) else 'less'
    return 'said' if any(WORDS.search(o) for o in new) else 'believed'


def cases(run, n=None, seed=0, only=None, subject='finished') -> list:
    "Return every (file, damage, command), or `n` of them, drawn"
    names = list(only or COMMANDS[subject](Path(), Path(), Path(), None))
    every = list(itertools.product(files_of(run), DAMAGES, names))
    return every if n is None else random.Random(seed).sample(every, min(n, len(every)))


@contextlib.contextmanager
def cheaply():
    "Leave out what takes time and reads nothing of a run: drawing, most naive forecasts, the wheel"
    from matplotlib.figure import Figure

    from kronos_nb import bundle, evaluate, ledger
    from kronos_nb.judging.baselines import Drift, LastValue

    def wheel(out, root=None):
        out.mkdir(parents=True, exist_ok=True)
        (out/'kronos_nb-0-py3-none-any.whl').write_bytes(b'')
    with contextlib.ExitStack() as stack:
        for module in (evaluate, ledger):
            stack.enter_context(mock.patch.object(module, 'default_baselines', lambda *a, **kw: [LastValue(), Drift()]))
        stack.enter_context(mock.patch.object(bundle, 'build_wheel', wheel))
        stack.enter_context(mock.patch.object(Figure, 'savefig', lambda self, f, **kw: f.write(PNG)))
        yield


# subjects
CHANGES = {'runtime.keep_last': 2, 'runtime.save_steps': 2, 'tokenizer.epochs': 2, 'predictor.epochs': 2,
           'data.stride': 4}


def make(folder: Path, stop=None, **changes):
    "Train a small run with averages, checkpoints and an evaluation; `stop`: no further than this step of the predictor"
    from kronos_nb.train import fit
    from kronos_nb.training.learner import Callback
    from tests.helpers import bars, cfg

    class Stop(Callback):
        def after_step(self, learn):
            if learn.step == stop and 'Predictor' in type(learn.model).__name__:
                learn.stop('enough', interrupted=True)
    result = fit(bars, cfg.replace(**CHANGES | changes), folder, callbacks=[Stop()] if stop else [])
    assert bool(result.interrupted) == bool(stop), result.stop_reason
    return folder


def make_judging(folder: Path):
    "Train a run, and stop it while it is judged"
    from kronos_nb import evaluate

    real, left = evaluate.write_parquet, [None]*2

    def dying(path, frame):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(path, frame)
    with mock.patch.object(evaluate, 'write_parquet', dying), contextlib.suppress(KeyboardInterrupt):
        make(folder)
    assert len(files_of(folder)) == 2
    return folder


def fit_again(run) -> int:
    "Call `fit` again for a run that `make` made; return the exit code that the command line would give"
    from kronos_nb.core import KronosError
    try:
        make(run)
    except KronosError as e:
        print(f'{type(e).__name__}: {e}')
        return 2
    return 0


def make_ledger(folder: Path, seed=5):
    "Store and grade forecasts of two random walks, and write their bars beside them"
    import pandas as pd

    from kronos_nb.judging.baselines import GeometricBrownian, random_walks
    from kronos_nb.ledger import Ledger
    walk, ledger = random_walks(200, symbols=('A', 'B'), seed=seed), Ledger(folder)
    for at in range(64, 160, 8):
        cut = [g.iloc[at - 64:at] for _, g in walk.groupby('symbol')]
        futures = [pd.DatetimeIndex(g.iloc[at:at + 4]['timestamps']) for _, g in walk.groupby('symbol')]
        made = GeometricBrownian().predict_many(cut, 4, keys=[f'{at}']*2, futures=futures, paths=10)
        ledger.append(made, f'gbm {seed}')
    ledger.grade(walk[walk.timestamps < walk.timestamps.iloc[140]])
    if seed == 5:
        walk.to_csv(folder.parent/'bars.csv', index=False)
    return folder


def another(folder, **kw): return make(folder, **kw, **{'runtime.seed': 7})


MAKERS = dict(finished=make, stopped=functools.partial(make, stop=3), judging=make_judging, ledger=make_ledger)
OTHERS = dict(finished=another, stopped=functools.partial(another, stop=3), judging=another,
              ledger=functools.partial(make_ledger, seed=6))


def once(folder, maker) -> Path:
    "Make a subject where it is not whole yet"
    done = folder.with_suffix('.done')
    with FileLock(folder.with_suffix('.once')):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            maker(folder)
            done.touch()
    return folder


def options(doc, folder, cases):
    "Return the options of a long form whose results are kept in a folder, from which it goes on"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path, nargs='?', default=Path(folder))
    p.add_argument('--all', action='store_true', help='every case; otherwise --n of each kind')
    p.add_argument('--n', type=int, default=cases, help='cases of each kind without --all')
    p.add_argument('--seed', type=int, default=0, help='of the draw')
    p.add_argument('--only', nargs='*', help='these commands')
    p.add_argument('--seconds', type=float, default=float('inf'), help='begin no case after these')
    return p


class Results:
    "The results of earlier calls in a folder, which becomes the working folder, and those of this one"
    def __init__(self, a):
        os.environ |= dict(HF_HUB_OFFLINE='1', MPLBACKEND='Agg')
        os.fsync = lambda fd: None   # slow, and only a power cut needs it
        self.out, self.ends = a.out.resolve(), time.monotonic() + a.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        os.chdir(self.out)   # nothing is read from the runs of this folder
        self.file = self.out/'results.jsonl'
        self.rows = [json.loads(o) for o in self.file.read_text().splitlines()] if self.file.exists() else []

    @property
    def late(self) -> bool: return time.monotonic() > self.ends

    def add(self, row):
        self.rows.append(row)
        with self.file.open('a') as f:
            f.write(json.dumps(row) + '\n')


def main_():
    p = options(__doc__, 'runs/damage', 60)
    p.add_argument('--subjects', nargs='*', default=list(COMMANDS), choices=COMMANDS)
    with cheaply():
        return try_all(p.parse_args())


def try_all(a):
    "Try the cases that have no result yet, and count how all of them ended"
    results, draw = Results(a), random.Random(a.seed)
    out, done = results.out, results.rows
    known = {(o['subject'], o['file'], o['damage'], o['command']) for o in done}
    once(out/'finished', make)
    for subject in a.subjects:
        run, other = once(out/subject, MAKERS[subject]), once(out/f'other_{subject}', OTHERS[subject])
        wholes = {}
        names = [o for o in COMMANDS[subject](Path(), Path(), Path(), None) if a.only is None or o in a.only]
        todo = cases(run, None if a.all else a.n, a.seed, names, subject)
        for file, damage, command in sorted(todo, key=lambda o: (o[2] in SLOW, draw.random())):
            if (subject, str(file), damage, command) in known:
                continue
            if results.late:
                return 3
            if command not in wholes:
                code, text = case(run, other, None, None, command, fit_again, subject)
                assert code in (0, 1), f'{command}: {text[:2000]}'
                wholes[command] = lines_of(text)
            began = time.process_time()
            code, text = case(run, other, file, damage, command, fit_again, subject)
            how, new = verdict(file, code, text, wholes[command]), sorted(lines_of(text) - wholes[command])
            row = dict(subject=subject, file=str(file), damage=damage, command=command, code=code, verdict=how,
                       seconds=round(time.process_time() - began, 2), new=[o[:300] for o in new[:6]])
            if how == 'traceback':
                row['text'] = text[-3000:]
            results.add(row)
    ends = collections.Counter((o['subject'], o['verdict']) for o in done)
    print(f'{len(done)} cases, {sum(o["seconds"] for o in done):.0f} s of processor time')
    for (subject, how), n in sorted(ends.items()):
        print(f'{subject:9} {how:14} {n}')
    return int(any(o['verdict'] == 'traceback' for o in done))


if __name__ == '__main__':
    sys.exit(main_())
