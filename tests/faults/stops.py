"""Stop a run at an exact moment, call it again, and compare what it leaves with a run that nothing disturbed

    python -m tests.faults.stops --all [--goal 500] [--seconds 3600] [OUT]

The process imports and compiles once and forks one child per call of `fit`. A case is a moment and a signal: before or
after the callbacks of the n-th event of a stage, before the n-th file operation of the run, or after some seconds.
Instead of a signal, the disk may be full or read-only from a file operation on, or full inside a library's writer.
Results are appended to OUT/results.jsonl; a case that is there is not tried again, so the same command goes on.
"""
import argparse
import errno
import faulthandler
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='Agg')

import psutil
import torch
from accelerate.state import AcceleratorState

from kronos_nb.core import KronosError
from kronos_nb.train import fit
from kronos_nb.training.checkpoint import checkpoints, damage, is_extra
from kronos_nb.training.learner import EVENTS, Callback
from tests.helpers import bars, cfg, no_test

EDGES = dict(first=-1000, last=1000)   # before and after all other callbacks of an event
SIGNALS = ('SIGKILL', 'SIGTERM', 'SIGINT')
DISKS = ('ENOSPC', 'EROFS')
PATIENCE = 120   # seconds until a call counts as stuck, without those that it stood ready and had no processor
BY_CLOCK = ('step_seconds', 'data_seconds', 'memory_gb')
ONE_LAYER = dict(d_model=8, n_heads=2, ff_dim=16, s1_bits=3, s2_bits=3)
# the last step is no multiple of save_steps, and val_every none of an epoch: every order of step, checkpoint and
# validation occurs
SETTINGS = no_test | {
    'tokenizer.model': ONE_LAYER | dict(n_enc_layers=1, n_dec_layers=1, group_size=3),
    'predictor.model': ONE_LAYER | dict(n_layers=1), 'data.windows_per_epoch': 20, 'data.val_windows': 8,
    'tokenizer.batch_size': 4, 'predictor.batch_size': 4, 'tokenizer.average_last': 2, 'predictor.average_last': 2,
    'tokenizer.val_every': 3, 'predictor.val_every': 3, 'tokenizer.lawa': .5, 'tokenizer.ema_decay': .5,
    'tokenizer.patience': 9, 'predictor.patience': 9, 'runtime.save_steps': 4, 'runtime.threads': 1,
    'runtime.device': 'cpu', 'augment.noise_std': .01, 'evaluate.calibrate': 'off'}
JUDGED = {'data.train': .7, 'data.val': .15, 'data.test': .15, 'evaluate.origins': 4, 'evaluate.paths': 2,
          'evaluate.calibrate': 'auto'}


@dataclass(frozen=True)
class Case:
    "A moment and a signal"
    kind: str              # 'event', 'file', 'time' or 'size'
    signal: str            # One of `SIGNALS`; of a file also one of `DISKS`: what the system says from there on
    n: float = 0           # Which occurrence; of 'time', seconds; of 'size', bytes that a file may have
    event: str = ''        # Of `EVENTS`, of 'event'
    edge: str = 'first'
    stage: str = 'predictor'
    workers: int = 0
    world: int = 1
    rank: int = 0          # Process that gets the signal; -1: all of them
    judged: bool = False   # Whether the run is evaluated, calibrated and reported, too

    @property
    def name(self) -> str:
        return '-'.join(str(v) for v in asdict(self).values())


@dataclass
class Trigger:
    "Send the signal of a case at its moment; count moments where there is no case"
    case: Case | None
    out: Path
    rank: int
    seen: dict = field(default_factory=dict)   # Moment -> how often

    def hit(self, *moment):
        self.seen[moment] = n = self.seen.get(moment, -1) + 1
        c = self.case
        if c is None or c.rank not in (-1, self.rank) or self.moment() != moment:
            return
        if c.signal in DISKS and n >= c.n:
            number = getattr(errno, c.signal)
            raise OSError(number, os.strerror(number))
        if c.signal in SIGNALS and n == c.n:
            os.kill(os.getpid(), getattr(signal, c.signal))

    def moment(self) -> tuple:
        c = self.case
        return ('file',) if c.kind == 'file' else (c.stage, c.event, c.edge) if c.kind == 'event' else ()

    def watch_files(self):
        "Count the operations that change files of the run"
        pid, out = os.getpid(), str(self.out)

        def hook(name, args):
            if os.getpid() != pid or not args or not str(args[0]).startswith(out):
                return
            writes = name == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or name in ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'shutil.rmtree'):
                self.hit('file')
        sys.addaudithook(hook)

    def callbacks(self) -> list:
        "Return a callback that is the first at every event, and one that is the last"
        def method(event, edge):
            return lambda _, learn: self.hit(type(learn.model).__name__.removesuffix('Task').lower(), event, edge)
        return [type(f'At{edge.title()}', (Callback,), {e: method(e, edge) for e in EVENTS} | dict(order=order))()
                for edge, order in EDGES.items()]


# one call of `fit`, in a child
def call_fit(out, case: Case | None, judged=False, workers=0, rank=0, world=1) -> int:
    "Return the exit code: 0 finished, 130 interrupted, 2 an error of the package, 3 loader processes stayed"
    trigger = Trigger(case, out, rank)
    trigger.watch_files()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fsync = lambda fd: None   # slow, and only a power cut needs it
    if case is not None and case.kind == 'size':
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(case.n), int(case.n)))
    if case is not None and case.kind == 'time' and case.rank in (-1, rank):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), getattr(signal, case.signal)))
        signal.setitimer(signal.ITIMER_REAL, max(case.n, .001))
    try:
        settings = SETTINGS | (JUDGED if judged else {}) | {'runtime.workers': workers}
        result = fit(bars, cfg.replace(**settings), out, callbacks=trigger.callbacks())
    finally:
        if case is None and os.environ.get('COUNT'):
            counts = [[*moment, n + 1] for moment, n in trigger.seen.items()]
            Path(os.environ['COUNT']).write_text(json.dumps(counts))
    if psutil.Process().children():
        return 3
    return 130 if result.interrupted else 0


def child(log, port, *args) -> int:
    "Fork a process that calls `fit` and leave it alone; return its number"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, 'w', buffering=1, closefd=False) for n in (1, 2))
        *_, rank, world = args
        if world > 1:
            os.environ |= dict(RANK=f'{rank}', LOCAL_RANK=f'{rank}', WORLD_SIZE=f'{world}', MASTER_PORT=f'{port}',
                               LOCAL_WORLD_SIZE=f'{world}', MASTER_ADDR='127.0.0.1')
            AcceleratorState._reset_state(reset_partial_state=True)   # the parent has run alone
        code = call_fit(*args)
    except KronosError as e:
        print(f'{type(e).__name__}: {e}')
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def stop_all(pids, number):
    for pid, send in itertools.product(pids, (os.killpg, os.kill)):   # a child that has just begun leads no group
        try:
            send(pid, number)
        except ProcessLookupError:
            pass


def starved(pid) -> float:
    "Return how long a process stood ready and had no processor: the longest of its threads, and of its children's"
    try:
        tree = [pid, *(p.pid for p in psutil.Process(pid).children(recursive=True))]
        rows = [t.read_text().split() for p in tree for t in Path(f'/proc/{p}/task').glob('*/schedstat')]
    except (OSError, psutil.Error):   # it ended meanwhile, or the system keeps no such count
        return 0.
    return max((int(row[1])/1e9 for row in rows), default=0.)


def is_stuck(began, pids) -> bool:
    late = time.monotonic() - began - PATIENCE
    return late > 0 and late > max(map(starved, pids), default=0.)


def call(out, log, case=None, judged=False, workers=0, world=1) -> list:
    "Call `fit` on `world` processes as a launcher does; return exit codes, 'stuck' where there is none"
    port, codes, told = free_port(), {}, None
    pids = [child(log, port, out, case, judged, workers, rank, world) for rank in range(world)]
    began = time.monotonic()
    while len(codes) < world:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if told is None and any(c not in (0, 130) for c in codes.values()):   # one failed: the others are told to end
            told = time.monotonic()
            stop_all(set(pids) - set(codes), signal.SIGTERM)
        if told is not None and time.monotonic() - told > 20:
            stop_all(set(pids) - set(codes), signal.SIGKILL)
        if is_stuck(began, set(pids) - set(codes)):
            stop_all(set(pids) - set(codes), signal.SIGUSR1)   # say where they stand
            time.sleep(2)
            stop_all(set(pids) - set(codes), signal.SIGKILL)
            for pid in set(pids) - set(codes):
                os.waitpid(pid, 0)
                codes[pid] = 'stuck'
        time.sleep(.005)
    return [codes[pid] for pid in pids]


# what a run leaves
def sha(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def plain(o, out):
    "Return JSON without what a clock or the folder's name says"
    if isinstance(o, dict):
        return {k: plain(v, out) for k, v in o.items() if k not in BY_CLOCK}
    if isinstance(o, list):
        return [plain(v, out) for v in o]
    return o.replace(str(out), 'OUT') if isinstance(o, str) else o


def parsed(text):
    "Return what JSON says; the text itself where it is none, which differs from all that is whole"
    try: return json.loads(text)
    except ValueError: return f'no JSON: {text[:200]!r}'


def left(out) -> dict:
    "Return everything of a run that must not depend on whether it was stopped"
    out, found = Path(out), {}
    files = [p for p in sorted(out.rglob('*')) if p.is_file()]
    for p in files:
        name = p.relative_to(out).as_posix()
        if p.suffix in ('.safetensors', '.png') or p.name in ('rows.parquet', 'data_report.md'):
            found[name] = sha(p)
        elif p.suffix == '.jsonl':
            rows = [parsed(line) for line in p.read_text(errors='replace').splitlines()]
            rows = [r for r in rows if not (isinstance(r, dict) and r.get('kind') == 'machine')]
            found[name] = plain(rows, out)   # it names the loader processes
        elif p.name in ('weights.json', 'training_metrics.json', 'config.json', 'cross_rope.json', 'calibration.json'):
            found[name] = plain(parsed(p.read_text(errors='replace')), out)
    for stage in ('tokenizer', 'predictor'):
        found[f'{stage} checkpoints'] = [(p.name, damage(p), is_extra(p)) for p in checkpoints(out/stage/'checkpoints')]
    hidden = [p.relative_to(out).as_posix() for p in out.rglob('.*')]
    found['hidden'] = sorted(set(hidden) - {'.lock'})
    found['folders'] = sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_dir())
    return found


def differences(a: dict, b: dict) -> list:
    return [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def newest_step(out) -> dict:
    "Return the step of the newest intact checkpoint of each stage"
    found = {}
    for stage in ('tokenizer', 'predictor'):
        whole = [p for p in checkpoints(Path(out)/stage/'checkpoints') if damage(p) is None]
        found[stage] = int(whole[-1].name[5:]) if whole else None
    return found


def rows_of(out, stage) -> int:
    "Return the last step that was trained"
    path = Path(out)/stage/'steps.jsonl'
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])['step'] if lines else 0


def lost(out, codes) -> list:
    "Return the stages whose checkpoints are further behind than was promised"
    behind = {}
    for stage, step in newest_step(out).items():
        gap = rows_of(out, stage) - (step or 0)
        if gap > (0 if all(c == 130 for c in codes) and stage == last_stage(out) else 4):
            behind[stage] = gap
    return [f'{k}: {v} steps' for k, v in behind.items()]


def last_stage(out) -> str:
    return 'predictor' if (Path(out)/'predictor'/'steps.jsonl').is_file() else 'tokenizer'


# cases
def warm(folder, judged):
    "Run once in this process, so that no child has to import or compile anything"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        fit(bars, cfg.replace(**SETTINGS | (JUDGED if judged else {})), out)


def reference(folder, world, judged=False) -> tuple:
    "Return what an undisturbed run leaves, its moments and its seconds"
    kind = f"{world}{'_judged' if judged else ''}"
    out, counts, seconds = folder/f'undisturbed_{kind}', folder/f'moments_{kind}.json', folder/f'seconds_{kind}.json'
    if not seconds.exists():
        shutil.rmtree(out, ignore_errors=True)
        os.environ['COUNT'], began = str(counts), time.monotonic()
        codes = call(out, folder/'undisturbed.log', judged=judged, world=world)
        del os.environ['COUNT']
        if any(codes):
            raise RuntimeError(f"exit codes {codes}: {(folder/'undisturbed.log').read_text()[-3000:]}")
        seconds.write_text(json.dumps(time.monotonic() - began))
    moments = {tuple(m): n for *m, n in json.loads(counts.read_text())}
    return left(out), moments, json.loads(seconds.read_text())


def try_case(folder, case: Case, expected: dict) -> dict:
    "Stop a run, go on until it is finished, and return what differs"
    out, log = folder/f'case_{os.getpid()}', folder/f'case_{os.getpid()}.log'
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    began = time.monotonic()
    same = (case.judged, case.workers, case.world)
    codes = [call(out, log, case, *same)]
    result = dict(name=case.name, codes=codes, lost=lost(out, codes[0]) if (out/'config.yaml').is_file() else [])
    while any(codes[-1]) and len(codes) < 4 or len(codes) == 1:
        codes.append(call(out, log, None, *same))
    result |= dict(stuck=sum(row.count('stuck') for row in codes), differs=differences(left(out), expected),
                   seconds=round(time.monotonic() - began, 2))
    text = log.read_text()
    result['traceback'] = 'Traceback' in text and case.world == 1
    if case.signal in DISKS or case.kind == 'size':
        result['traceback'] |= codes[0] != [0] and (codes[0] != [2] or 'RunError' not in text)
    if result['differs'] or result['stuck'] or result['traceback'] or result['lost']:
        kept = folder/'wrong'/case.name
        shutil.rmtree(kept, ignore_errors=True)
        if out.is_dir():
            shutil.copytree(out, kept)
        kept.with_suffix('.log').write_text(text)
    shutil.rmtree(out, ignore_errors=True)
    return result


def case_of(moment: tuple, n, number: str, **kw) -> Case:
    if moment == ('file',):
        return Case('file', number, n, **kw)
    stage, event, edge = moment
    return Case('event', number, n, event, edge, stage, **kw)


def spread(moments: dict, most: int, draw) -> list:
    "Return up to `most` occurrences of the moments, each kind of moment at least twice, the rest by chance"
    pool = [(m, i) for m, n in moments.items() for i in range(n)]
    sure = [(m, i) for m, n in moments.items() if m != ('file',) for i in sorted({0, n - 1})]
    rest = sorted(set(pool) - set(sure))
    return [*sure, *draw.sample(rest, max(min(most - len(sure), len(rest)), 0))]


def long_cases(folder, goal: int) -> list:
    "Return the cases of the long form: events, file operations and chance, on one process and on two"
    draw, numbers, workers = random.Random(0), itertools.cycle(SIGNALS), itertools.cycle((0, 0, 0, 2))
    def some(n, judged=False, world=1):
        _, moments, seconds = reference(folder, world, judged)
        for m, i in draw.sample(spread(moments, n, draw), n):
            yield case_of(m, i, next(numbers), workers=next(workers), judged=judged, world=world,
                          rank=draw.choice((0, 1, -1)) if world > 1 else 0)
        for _ in range(n//8):
            yield Case('time', next(numbers), draw.uniform(0, seconds), judged=judged, world=world)
    found = [*some(goal*5//9), *some(goal*2//9, judged=True), *some(goal//9, world=2)]
    n = reference(folder, 1, True)[1]['file',]
    found += [Case('file', d, i, judged=True) for i, d in zip(draw.sample(range(n), goal//9), itertools.cycle(DISKS))]
    found += [Case('size', 'EFBIG', draw.randrange(1000, 60_000), judged=True) for _ in range(goal//25)]
    draw.shuffle(found)
    return found


def short_cases() -> list:
    "Return the moments at which runs once ended otherwise, and one of each kind beside them"
    def at(event, n, number, edge='last', **kw):
        return Case('event', f'SIG{number}', n, event, edge, **kw)
    return [
        at('before_validate', 1, 'TERM'),          # inside an epoch: it was closed as if it were whole
        at('before_batch', 6, 'INT', 'first'),
        at('after_validate', 2, 'KILL'),           # the end of an epoch
        at('after_step', 9, 'KILL', 'last'),       # between the last step and its validation
        at('after_validate', 4, 'KILL'),           # the best model is newer than the checkpoint
        at('after_fit', 0, 'TERM', 'first'),
        at('after_epoch', 1, 'TERM', stage='tokenizer', workers=2),
        at('before_validate', 1, 'TERM', world=2, rank=1),   # the other process waited for ever
        Case('file', 'ENOSPC', 150),
        Case('size', 'EFBIG', 12_000),             # inside safetensors' own writer
    ]


def run_cases(folder, cases, ends=float('inf')) -> list:
    "Try cases that have no result yet, and append their results"
    file, expected = folder/'results.jsonl', {}
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {r['name'] for r in results}
    for case in cases:
        if time.monotonic() > ends:
            break
        if case.name in done:
            continue
        kind = case.world, case.judged
        if kind not in expected:
            expected[kind] = reference(folder, *kind)[0]
        (folder/'now.txt').write_text(f'{os.getpid()} {case.name}\n')
        result = try_case(folder, case, expected[kind])
        with file.open('a') as f:
            f.write(json.dumps(result) + '\n')
        results.append(result)
    return results


def summary(results) -> dict:
    count = dict.fromkeys(('cases', 'interrupted', 'killed', 'differ', 'lost', 'stuck', 'tracebacks'), 0)
    for r in results:
        first = r['codes'][0]
        for key, add in dict(cases=1, interrupted=130 in first, killed=any(str(c).startswith('-') for c in first),
                             differ=bool(r['differs']), lost=bool(r['lost']), stuck=bool(r['stuck']),
                             tracebacks=r['traceback']).items():
            count[key] += int(add)
    return count | dict(slowest=max((r['seconds'] for r in results), default=0))


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('out', type=Path, nargs='?', default=Path('runs/stops'))
    p.add_argument('--all', action='store_true', help='the long form, instead of the cases of the test suite')
    p.add_argument('--goal', type=int, default=500, help='signals, at least')
    p.add_argument('--seconds', type=float, default=float('inf'), help='start no case after so many seconds')
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    folder, ends = a.out.resolve(), time.monotonic() + a.seconds
    folder.mkdir(parents=True, exist_ok=True)
    warm(folder, judged=a.all)
    results = run_cases(folder, long_cases(folder, a.goal) if a.all else short_cases(), ends)
    print(json.dumps(summary(results), indent=1))
    return 0 if not any(r['differs'] or r['lost'] or r['stuck'] or r['traceback'] for r in results) else 1


if __name__ == '__main__':
    sys.exit(main())
