"Damage every file of a run in five ways, then run every command: each ends in a typed error, or goes on and says so"
import argparse
import contextlib
import io
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from kronos_nb.cli import main

SKIPPED = ('.png', '.log', '.lock')   # nothing reads them


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


def commands(run: Path, whole: Path, out: Path, fit) -> dict:
    "Return name -> what runs the command on a run"
    sizes = ['--paths', '2', '--out', out]
    return dict(
        report=['report', run], monitor=['monitor', run, '--once'], compare=['compare', run, whole],
        evaluate=['evaluate', '--model', run, '--origins', '4', *sizes], forecast=['forecast', '--model', run, *sizes],
        push=['push', run, 'user/name', '--dry-run'], bundle=['bundle', out, '--models', run, '--no-download'],
        average=['average', '--checkpoint-dir', run/'predictor', '--num-checkpoints', '2', '--output', out], fit=fit)


def files_of(run: Path) -> list:
    "Return the files that a command may read, without older checkpoints"
    newest = {max((run/stage/'checkpoints').glob('step_*'), default=None) for stage in ('tokenizer', 'predictor')}
    def read(path):
        folder = next((p for p in path.parents if p.name.startswith('step_')), None)
        return path.suffix not in SKIPPED and not path.name.startswith('.') and folder in {None, *newest}
    return sorted(p.relative_to(run) for p in run.rglob('*') if p.is_file() and read(p))


def outcome(go) -> tuple:
    "Return how a command ended (its exit code, or 'traceback'), and what it printed"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(list(map(str, go))) if isinstance(go, list) else go()
        except SystemExit as e:
            code = e.code
        except BaseException:
            code = 'traceback'
            traceback.print_exc(file=text)
    return code, text.getvalue()


def case(run, other, file, damage, command, fit) -> tuple:
    "Return how a command ended on a copy of a run with one damaged file"
    with tempfile.TemporaryDirectory() as d:
        copy = Path(shutil.copytree(run, Path(d)/'run'))
        DAMAGES[damage](copy/file, other/file)
        def go(): return fit(copy)
        return outcome(commands(copy, run, Path(d)/'out', go)[command])


def cases(run, n=None, seed=0, only=None) -> list:
    "Return every (file, damage, command), or `n` of them, drawn"
    names = list(only or commands(Path(), Path(), Path(), None))
    every = list(itertools.product(files_of(run), DAMAGES, names))
    return every if n is None else random.Random(seed).sample(every, min(n, len(every)))


def make(folder: Path, **changes):
    "Train a small run with averages, checkpoints and an evaluation"
    from kronos_nb.train import fit
    from tests.helpers import bars, cfg
    changes = {'runtime.keep_last': 2, 'runtime.save_steps': 4, 'tokenizer.epochs': 2, 'predictor.epochs': 2,
               'data.stride': 4} | changes
    fit(bars, cfg.replace(**changes), folder)
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


def main_():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--all', action='store_true', help='every case, about an hour; otherwise 60 of them')
    p.add_argument('--n', type=int, default=60, help='cases without --all')
    p.add_argument('--seed', type=int, default=0, help='of the draw')
    p.add_argument('--only', nargs='*', help='these commands')
    a, began, ends = p.parse_args(), time.time(), {}
    os.environ['HF_HUB_OFFLINE'] = '1'
    with tempfile.TemporaryDirectory() as d:
        run, other = make(Path(d)/'ref'), make(Path(d)/'other', **{'runtime.seed': 7})
        for file, damage, command in cases(run, None if a.all else a.n, a.seed, a.only):
            code, text = case(run, other, file, damage, command, fit_again)
            ends[code] = ends.get(code, 0) + 1
            last = (text.strip().splitlines() or [''])[-1]
            print(f'{file!s:50} {damage:10} {command:9} {code} {last[:150]}', flush=True)
    print(f'{sum(ends.values())} cases in {time.time() - began:.0f} s: {ends}')
    return int('traceback' in ends)


if __name__ == '__main__':
    sys.exit(main_())
