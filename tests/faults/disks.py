"""Run every command that writes on a disk that is full or read-only: one message, and nothing is torn

    python -m tests.faults.disks --all [--seconds 1800] [OUT]

A case is a command, an error and a moment. Before the n-th file operation in the folder that the command writes to, the
disk begins to say that it is full (ENOSPC) or read-only (EROFS); or no file can become longer than some bytes (EFBIG),
which also meets the writers of libraries. Each command writes over what an earlier call of it has written. Afterwards
every file must be the old one or the new one, and the same command must end well once the disk is whole again.
"""
import collections
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

from kronos_nb.cli import main
from tests.faults.damage import Results, cheaply, make, make_ledger, once, options, outcome

ERRORS = ('ENOSPC', 'EROFS')
CHANGES = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'shutil.rmtree')
NO_TEXT = ('.db', '.lock', '.log')   # a journal of SQLite, which rolls back itself


class Disk:
    "Count the file operations in a folder, and fail from one of them on"
    def __init__(self):
        self.folder, self.at, self.error, self.seen = None, None, 0, 0
        sys.addaudithook(self.look)

    def look(self, name, args):
        if self.folder is None or not args or not isinstance(args[0], str | os.PathLike):
            return
        if not os.fspath(args[0]).startswith(self.folder):
            return
        writes = name == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and name not in CHANGES:
            return
        self.seen += 1
        full = self.error == errno.ENOSPC and name not in ('open', 'os.mkdir')   # these need no space
        if self.at is not None and self.seen > self.at and not full:
            raise OSError(self.error, os.strerror(self.error), os.fspath(args[0]))

    @contextlib.contextmanager
    def watching(self, folder, at=None, error=0):
        self.folder, self.at, self.error, self.seen = str(folder), at, error, 0
        try:
            yield self
        finally:
            self.folder = None


@contextlib.contextmanager
def longest(size):
    "Let no file become longer"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fetch(out):
    "Return a function that runs `fetch` without a network"
    from kronos_nb.data import fetch as module
    from tests.helpers import bars

    def go():
        with mock.patch.object(module, 'fetch_klines', lambda *args, **kw: bars):
            return main(['fetch', 'GOOG', '1d', '--start', '2004-01-01', '--out', str(out/'bars.csv'), '--overwrite'])
    return go


def commands(run: Path, out: Path) -> dict:
    "Return name -> a command that writes into `out`, or into the run or ledger in it"
    few = ['--paths', '2', '--out', out]
    ledger, small = ['--ledger', out/'ledger'], ['--lookback-window', '32', '--predict-window', '4', '--paths', '2']
    bars = out.parent/'bars.csv'
    return dict(
        forecast=['forecast', '--model', run, *few], evaluate=['evaluate', '--model', run, '--origins', '4', *few],
        report=['report', out/'copy'], push=['push', out/'copy', 'user/name', '--dry-run'],
        average=['average', '--checkpoint-dir', run/'predictor', '--num-checkpoints', '2', '--output', out/'averaged'],
        compare=['compare', run, out/'copy', '--out', out], check=['check', bars, '--out', out],
        bundle=['bundle', out/'bundle', '--models', run, '--no-download'], fetch=fetch(out),
        grade=['ledger', 'grade', bars, *ledger], show=['ledger', 'show', *ledger, '--out', out],
        run=['run', bars, '--model', 'bundled', *ledger, *small],
        tune=['tune', '--preset', 'quickstart', '--space', 'predictor.lr=1e-4:1e-3', '--trials', '2', '--out',
              out/'tune', '--set', 'tokenizer.max_steps=2', '--set', 'predictor.max_steps=2', '--set',
              'data.windows_per_epoch=16', '--set', 'data.val_windows=8', '--set', 'runtime.progress=off'])


def contents(folder) -> dict:
    "Return what the files of a folder hold, without clocks"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*'))
            if p.is_file() and p.suffix not in NO_TEXT}


def torn(before: dict, after: dict, folder, stays=False) -> list:
    "Return files that are neither those of before nor whole, and hidden files, unless nothing could be removed"
    import pandas as pd
    from PIL import Image
    from safetensors import safe_open
    wrong = []
    for name in after:
        file = folder/name
        if before.get(name) == after[name]:
            continue
        try:
            if any(part.startswith('.') for part in Path(name).parts):
                if not stays:
                    raise ValueError('hidden')
                continue
            if file.suffix == '.parquet':
                pd.read_parquet(file)
            elif file.suffix == '.json':
                json.loads(after[name])
            elif file.suffix == '.png':
                Image.open(file).load()
            elif file.suffix == '.safetensors':
                safe_open(file, 'pt').__enter__()
            elif not after[name].endswith(b'\n') and file.suffix in ('.csv', '.md', '.jsonl'):
                raise ValueError('cut')
        except Exception as e:
            wrong.append(f'{name}: {type(e).__name__} {str(e)[:80]}')
    aside = {name.replace('/.', '/').replace('.old/', '/') for name in after}   # between two renames
    return wrong + [f'{name}: gone' for name in before if name not in after and not (stays and name in aside)]


def begin(folder, run) -> Path:
    "Return a folder with a run and a ledger, as a call has left it"
    out = folder/'out'
    out.mkdir()
    shutil.copytree(run, out/'copy')
    shutil.copytree(run.parent/'ledger', out/'ledger')
    shutil.copy(run.parent/'bars.csv', folder)
    return out


def attempt(disk, run, name, how=None, at=None) -> dict:
    "Return what a command did on a disk that fails, and what it left"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        out = begin(d, run)
        go = commands(run, out)[name]
        if name not in ('grade', 'tune'):   # there is an earlier result
            assert outcome(go)[0] in (0, 1)
        before = contents(out)
        with disk.watching(out, at if how in ERRORS else None, getattr(errno, how or 'EIO')):
            with longest(at) if how == 'EFBIG' else contextlib.nullcontext():
                code, text = outcome(go)
        seen = disk.seen
        wrong = torn(before, contents(out), out, how == 'EROFS') if how else []
        for hidden in out.rglob('.*.tmp'):   # of a call long ago
            os.utime(hidden, (0, 0))
        again, more = outcome(go)
        left = [p.relative_to(out).as_posix() for p in out.rglob('.*') if p.name != '.lock']
        said = 'could not be written' in text or 'storage of the search' in text
        return dict(command=name, how=how, at=at, code=code, said=said, seen=seen, torn=wrong, again=again, left=left,
                    size=max((len(o) for o in contents(out).values()), default=0), text=text[-1500:],
                    more=more[-1500:] if again not in (0, 1) else '')


def is_wrong(r) -> bool:
    "Return whether a promise was broken: a message and nothing torn, or an end as if nothing had been"
    ended = r['code'] == 2 and r['said'] or r['code'] in (0, 1) and not r['said']
    return not ended or r['torn'] or r['again'] not in (0, 1) or r['left']


def moments(disk, run, name, n, draw) -> list:
    "Return errors and moments for a command: file operations, and lengths of files"
    whole = attempt(disk, run, name)
    assert whole['code'] in (0, 1) and not is_wrong(whole), whole
    every = [(e, at) for e in ERRORS for at in range(whole['seen'])]
    every += [('EFBIG', int(whole['size']**(i/20))) for i in range(6, 20)]
    return every if n is None else draw.sample(every, min(n, len(every)))


def prepare(folder) -> Path:
    "Return a run beside a ledger"
    run = once(folder/'run', make)
    once(folder/'ledger', make_ledger)
    return run


def main_():
    with cheaply():
        return try_all(options(__doc__, 'runs/disks', 6).parse_args())


def try_all(a):
    "Try the cases that have no result yet, and count how all of them ended"
    results, disk, draw = Results(a), Disk(), random.Random(a.seed)
    done = results.rows
    known, run = {(o['command'], o['how'], o['at']) for o in done}, prepare(results.out)
    for name in a.only or commands(run, results.out):
        for how, at in moments(disk, run, name, None if a.all else a.n, draw):
            if (name, how, at) in known:
                continue
            if results.late:
                return 3
            results.add(attempt(disk, run, name, how, at))
    for name, n in sorted(collections.Counter(o['command'] for o in done).items()):
        print(f"{name:9} {n:4} cases, {sum(o['code'] == 2 for o in done if o['command'] == name)} errors")
    wrong = [o for o in done if is_wrong(o)]
    for o in wrong:
        print({k: v for k, v in o.items() if k not in ('seen', 'size')})
    print(f'{len(done)} cases, {len(wrong)} wrong')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main_())
