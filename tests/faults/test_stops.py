"The short form of tests/faults/stops.py; the long one: python -m tests.faults.stops OUT --goal 500"
import json
import subprocess
import sys

from tests.helpers import root


def test_a_run_that_is_stopped_anywhere_ends_as_if_nothing_had_happened(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'tests.faults.stops', tmp_path, '--short'], cwd=root, text=True,
                          capture_output=True, timeout=580)
    results = [json.loads(line) for line in (tmp_path/'results.jsonl').read_text().splitlines()]
    wrong = [r for r in results if r['differs'] or r['lost'] or r['stuck'] or r['traceback']]
    assert done.returncode == 0 and not wrong, (wrong, done.stderr[-3000:])
    first = [code for r in results for code in r['codes'][0]]
    assert {130, -9, 2} <= set(first) and 0 not in first   # each was stopped, by request, by force and by the disk
