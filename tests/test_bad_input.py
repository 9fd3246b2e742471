"Bad input to what ships: a clear error or an unread cell, never a traceback, a guess or a wrong number"
import shutil
import socket

import numpy as np
import pandas as pd
import pytest

from kronos_nb.cli import main
from kronos_nb.core import ConfigError, DataError, RunError
from kronos_nb.data.check import check_klines
from kronos_nb.data.parse import to_float
from kronos_nb.data.read import read_klines
from kronos_nb.judging.baselines import Drift, GeometricBrownian, random_walks
from kronos_nb.ledger import Ledger

walk = random_walks(120, seed=5)


def table(stamps, **columns):
    return pd.DataFrame(dict(timestamps=stamps, open=1., high=1., low=1., close=1., volume=1.) | columns)


YEARS = [f'{year}-01-0{day}' for year, day in [(2024, 1), (2024, 2), (2024, 3), (2024, 4), (3000, 1), (9999, 2)]]


@pytest.mark.parametrize('form', [list, lambda t: np.array(t, 'M8[us]'), lambda t: np.array(t, 'M8[s]'),
                                  lambda t: pd.array(t, 'datetime64[us, UTC]'), lambda t: [f'{o} 00:00' for o in t]])
def test_a_year_that_nanoseconds_cannot_hold_is_no_other_year(form, tmp_path):
    "It was 1830 once; now the stamp is unread, and the check says so"
    bars = read_klines(table(form(YEARS)), 'X')
    assert bars['timestamps'].dropna().dt.year.unique().tolist() == [2024] and bars['timestamps'].isna().sum() == 2
    assert not check_klines(bars).ok
    table(YEARS).to_csv(tmp_path/'x.csv', index=False)
    assert read_klines(tmp_path/'x.csv')['timestamps'].isna().sum() == 2


def test_a_whole_number_without_end_is_infinite():
    bars = read_klines(table(YEARS[:4], close=pd.Series([1, 2, 10**400, 3], dtype=object)), 'X')
    assert bars['close'].tolist() == [1, 2, np.inf, 3] and not check_klines(bars).ok
    for decimal in '.,':
        x, bad = to_float(pd.Series([1, -10**400, 10**400], dtype=object), decimal)
        assert x.tolist() == [1, -np.inf, np.inf] and not bad.any()


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ledger')/'book'
    cut = walk.iloc[:60]
    ahead = cut['timestamps'].iloc[-1] + pd.to_timedelta(np.arange(1, 5), unit='h')
    made = GeometricBrownian().predict_many([cut], 4, keys=['0'], futures=[ahead], paths=10)
    ledger = Ledger(folder)
    ledger.append(made, 'gbm')
    assert ledger.grade(walk, [Drift()]).graded == 1
    return folder


def without(*names): return lambda f: pd.read_parquet(f).drop(columns=list(names)).to_parquet(f)


def as_text(f): pd.read_parquet(f).assign(h='x').to_parquet(f)


def as_folder(f):
    f.unlink()
    f.mkdir()


SPOILT = dict(
    cut=lambda f: f.write_bytes(f.read_bytes()[:300]), empty=lambda f: f.write_bytes(b''), folder=as_folder,
    text=as_text, no_key=without('key'), no_h=without('h'), no_quantile=without('q50'),
    another=lambda f: pd.DataFrame(dict(a=[1])).to_parquet(f))


@pytest.mark.parametrize('kind, spoil', [
    *((kind, how) for kind in ('forecasts', 'grades') for how in SPOILT.values()),
    ('forecasts', without('closes')), ('grades', without('y'))])
def test_a_damaged_day_is_named_and_left_alone(book, tmp_path, kind, spoil):
    folder = shutil.copytree(book, tmp_path/'book')
    file = next((folder/kind).iterdir())
    spoil(file)
    before = None if file.is_dir() else file.read_bytes()
    ledger, found = Ledger(folder), []
    for use in (ledger.to_markdown, lambda: ledger.grade(walk.assign(close=walk['close'] + 1), [Drift()])):
        try: use()
        except RunError as e: found.append(str(e))
    assert found and all(file.name in o for o in found)
    assert file.is_dir() if before is None else file.read_bytes() == before


def test_a_ledger_is_a_folder_with_a_name(tmp_path):
    (tmp_path/'file').write_text('x')
    for wrong in ('', tmp_path/'file'):
        with pytest.raises(ConfigError, match='folder'): Ledger(wrong)


@pytest.mark.parametrize('options', ['--predict-window 0', '--lookback-window 0', '--lookback-window=-5',
                                     '--paths 1e12', '--ledger='])
def test_a_turn_that_cannot_be_is_one_error(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    walk.to_csv('bars.csv', index=False)
    assert main(['run', 'bars.csv', '--model', 'bundled', '--calendar', '24/7', *options.split()]) == 2
    said = capsys.readouterr().err
    assert '\nTry: kronos-nb' in said and 'Traceback' not in said and not list(tmp_path.rglob('*.parquet'))


def test_the_service_refuses_a_number_without_end():
    pytest.importorskip('fastapi')
    from kronos_nb.serve import parse_bars
    with pytest.raises(DataError):
        bars = parse_bars(table(YEARS[:4]).to_dict('list') | dict(close=[10**400]*4), 'X', 10)
        from kronos_nb.forecast import Forecaster
        Forecaster.from_pretrained('bundled').predict(bars, 2, paths=1)


def test_who_reads_the_address_of_the_service_can_call_at_once():
    from kronos_nb.serve import listen
    with listen('127.0.0.1', 0) as s, socket.create_connection(s.getsockname(), timeout=5) as caller:
        assert caller.getpeername() == s.getsockname()
        with pytest.raises(ConfigError, match='port'): listen(*s.getsockname())
