"Commands beside damaged files, and on disks that are full or read-only"
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from kronos_nb import evaluate as evaluate_module
from kronos_nb.cli import main
from kronos_nb.core import RunError, write_atomic
from kronos_nb.evaluate import evaluate
from kronos_nb.hub_card import _Card
from kronos_nb.judging.baselines import GeometricBrownian, LastValue, random_walks
from kronos_nb.judging.evaluation import Evaluation, read_card, write_card
from kronos_nb.ledger import Ledger
from kronos_nb.panel.data import save_upload
from kronos_nb.training.run import Run
from kronos_nb.tune import _is_on
from tests.faults.damage import cheaply, make_ledger
from tests.faults.disks import Disk, attempt, is_wrong
from tests.helpers import bars

EXAMPLES = int(os.environ.get('EXAMPLES', 25))   # 400 in the long form
FEW = ['--paths', '2', '--predict-window', '4', '--lookback-window', '32']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bars.to_csv('goog.csv', index=False)
    return tmp_path


def said(capsys, *argv) -> tuple:
    code = main(list(map(str, argv)))
    out = capsys.readouterr()
    assert 'Traceback' not in out.out + out.err
    return code, out.out + out.err


# runs that are damaged, beside what is asked for
@pytest.mark.parametrize('content', ['', 'data: [', '- 1', 'data: {stride: 0}'])
def test_a_damaged_run_beside_stops_no_command(here, capsys, one_epoch_run, content):
    whole, other = (Path(shutil.copytree(one_epoch_run, Path('runs')/name)) for name in ('whole', 'other'))
    (other/'config.yaml').write_text(content)
    os.utime(whole/'config.yaml', (0, 0))   # the other one is newer
    code, text = said(capsys, 'forecast', '--out', 'f', '--paths', '2')
    assert code == 0 and f'Model: {whole}' in text and str(other) in text
    code, text = said(capsys, 'report', 'nowhere')
    assert code == 2 and f'Try: kronos-nb report {whole}' in text


def test_a_run_that_lost_its_settings_is_no_folder_of_models(one_epoch_run, tmp_path, capsys):
    run = shutil.copytree(one_epoch_run, tmp_path/'run')
    (run/'config.yaml').unlink()
    for command in ('forecast', 'evaluate', 'run'):
        where = ['--ledger' if command == 'run' else '--out', tmp_path/'out']
        code, text = said(capsys, command, '--model', run, '--paths', 2, *where)
        assert code == 2 and 'config.yaml' in text and not (tmp_path/'out').exists()


@pytest.mark.parametrize('content', ['', '{}', '{"data": 1}'])
def test_a_damaged_run_is_no_search_on_these_bars(tmp_path, content):
    (tmp_path/'run.json').write_text(content)
    assert not _is_on(Run(tmp_path), 'a hash')


@pytest.mark.parametrize('content', [b'', b'a,b\n1,2\n', b'\xff\xfe\0symbol', b'"', b'symbol\n"'])
def test_a_forecast_is_not_written_over_what_is_none(here, capsys, content):
    Path('f').mkdir()
    Path('f/forecast.csv').write_bytes(content)
    code, text = said(capsys, 'forecast', 'goog.csv', '--model', 'bundled', '--out', 'f', *FEW)
    assert code == 2 and 'forecast.csv' in text and Path('f/forecast.csv').read_bytes() == content


@pytest.mark.parametrize('name', ['steps.jsonl', 'notes.jsonl', 'validations.jsonl', 'training_metrics.json'])
@pytest.mark.parametrize('how', ['deleted', 'last row', 'empty'])
def test_a_record_that_lost_rows_is_named(one_epoch_run, tmp_path, capsys, name, how):
    run = Path(shutil.copytree(one_epoch_run, tmp_path/'run'))
    file = run/'predictor'/name
    if how == 'deleted':
        file.unlink()
    elif name.endswith('.json'):
        rows = {k: v[:-1] for k, v in json.loads(file.read_text()).items()}
        file.write_text(json.dumps(rows if how == 'last row' else {}))
    else:
        file.write_text(''.join(file.read_text().splitlines(True)[:-1]) if how == 'last row' else '')
    assert name in said(capsys, 'monitor', run, '--once')[1]
    assert said(capsys, 'report', run)[0] == 0 and name in (run/'report.md').read_text()
    code, text = said(capsys, 'push', run, 'user/name', '--dry-run')
    assert name in text and (code == 2 or name.endswith('l'))


# tables
@pytest.fixture(scope='module')
def book(tmp_path_factory) -> Path:
    return make_ledger(tmp_path_factory.mktemp('book')/'ledger')


def test_grades_of_forecasts_that_are_gone_are_not_shown(book, tmp_path):
    ledger = Ledger(shutil.copytree(book, tmp_path/'ledger'))
    file = sorted((ledger.folder/'forecasts').iterdir())[1]
    assert (ledger.folder/'grades'/file.name).is_file() and len(ledger.grades)
    file.unlink()
    with pytest.raises(RunError, match=file.name):
        ledger.report()


def test_any_flipped_bit_in_a_ledger_is_found(book, tmp_path):
    ledger, draw, found = Ledger(shutil.copytree(book, tmp_path/'ledger')), random.Random(0), 0
    file = next((ledger.folder/'forecasts').iterdir())
    whole, before = file.read_bytes(), ledger._read('forecasts', file.stem)
    for at in draw.choices(range(len(whole)), k=EXAMPLES):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:])
        try:
            pd.testing.assert_frame_equal(ledger._read('forecasts', file.stem), before)   # a bit that means nothing
        except RunError as e:
            found += 1
            assert file.name in str(e)
    print(f'{found} of {EXAMPLES} flipped bits were refused, the others changed nothing')
    assert found > EXAMPLES/2


PARTS = dict(cut=lambda d: d[:300], empty=lambda d: b'', json=lambda d: b'{}', bit=lambda d: d[:200] + b'?' + d[201:])


@pytest.mark.parametrize('spoil', PARTS.values(), ids=PARTS)
def test_a_damaged_part_of_an_evaluation_is_made_again(tmp_path, monkeypatch, spoil):
    walk, how = random_walks(300, seed=1), dict(baselines=[LastValue()], origins=4, paths=4, progress=False)
    model = GeometricBrownian()
    monkeypatch.setattr(evaluate_module, 'fingerprint', lambda f: type(f).__name__)
    monkeypatch.setattr(evaluate_module._Parts, 'drop', lambda self: None)
    whole = evaluate(model, walk, 32, 4, out_dir=tmp_path, **how)
    for part in (tmp_path/'parts').iterdir():
        part.write_bytes(spoil(part.read_bytes()))
    again = evaluate(model, walk, 32, 4, out_dir=tmp_path, **how)
    pd.testing.assert_frame_equal(again.rows, whole.rows)


def test_an_evaluation_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    walk, how = random_walks(300, seed=1), dict(baselines=[LastValue()], origins=4, progress=False)
    evaluate(GeometricBrownian(), walk, 32, 4, out_dir=tmp_path/'e', paths=4, **how)
    before, disk = Evaluation.load(tmp_path/'e'), Disk()
    for at in range(0, 12, 3):
        with disk.watching(tmp_path/'e', at, errno.ENOSPC), pytest.raises(RunError):
            evaluate(GeometricBrownian(), walk, 32, 4, out_dir=tmp_path/'e', paths=8, **how)
        pd.testing.assert_frame_equal(Evaluation.load(tmp_path/'e').rows, before.rows)


def test_a_card_that_was_cut_is_not_published(tmp_path):
    walk, how = random_walks(300, seed=1), dict(baselines=[LastValue()], origins=4, paths=4, progress=False)
    evaluate(GeometricBrownian(), walk, 32, 4, out_dir=tmp_path, **how)
    assert read_card(tmp_path).startswith('## Evaluation')
    write_card(tmp_path, '## Another\n')
    assert read_card(tmp_path) == '## Another\n' and Evaluation.load(tmp_path)
    for damage in (lambda: (tmp_path/'card.md').write_text('## An'), (tmp_path/'card.md').unlink):
        damage()
        with pytest.raises(RunError, match='card.md'):
            read_card(tmp_path)


def test_the_data_of_a_card_hold_no_tag():
    walk, how = random_walks(300, symbols=('<img src=x>',), seed=1), dict(baselines=[LastValue()], origins=4, paths=4)
    e = evaluate(GeometricBrownian(), walk, 32, 4, progress=False, **how)
    run = SimpleNamespace(config=SimpleNamespace(runtime=SimpleNamespace(seeds=None)))
    shown = _Card._judged_on(SimpleNamespace(run=run, intervals='1 h'), e)
    assert '<' not in json.dumps(shown) and 'img src=x' in shown['dataset_name']


def test_hidden_files_of_writers_that_were_killed_go_away(tmp_path):
    old, new = tmp_path/'.a.txt.abcd1234.tmp', tmp_path/'.b.txt.abcd1234.tmp'
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    write_atomic(tmp_path/'c.txt', 'c')
    assert not old.exists() and new.exists()   # another process may be writing


# disks
@pytest.fixture(scope='module')
def place(tmp_path_factory, one_epoch_run) -> Path:
    "Return a run beside a ledger"
    folder = tmp_path_factory.mktemp('disks')
    shutil.copytree(one_epoch_run, folder/'run')
    make_ledger(folder/'ledger')
    return folder/'run'


disk = Disk()
QUICK = ('forecast', 'report', 'push', 'check', 'fetch', 'grade')


@pytest.mark.parametrize('name', QUICK)
def test_a_command_on_a_disk_that_fails_tears_nothing(place, name, monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda fd: None)
    with cheaply():
        for how, at in (('ENOSPC', 1), ('EROFS', random.Random(name).randrange(2, 6)), ('EFBIG', 600)):
            found = attempt(disk, place, name, how, at)
            assert not is_wrong(found), found


def test_an_upload_on_a_full_disk_is_one_error(tmp_path):
    content = bars.to_csv(index=False).encode()
    for at in range(3):
        with disk.watching(tmp_path, at, errno.ENOSPC), pytest.raises(RunError, match='uploads'):
            save_upload('goog.csv', content, tmp_path/'uploads')
    assert not list((tmp_path/'uploads').rglob('*.csv'))
    assert save_upload('goog.csv', content, tmp_path/'uploads').read_bytes() == content


def test_a_full_disk_behind_standard_output_is_one_error(one_epoch_run):
    with open('/dev/full', 'w') as full:
        p = subprocess.run([sys.executable, '-m', 'kronos_nb.cli', 'monitor', one_epoch_run, '--once'], stdout=full,
                           stderr=subprocess.PIPE, text=True, timeout=100)
    assert p.returncode == 2 and p.stderr.startswith('RunError: ') and 'Traceback' not in p.stderr
    assert len(p.stderr.splitlines()) == 2


