"""Law 1 as properties: change anything after a stamp, and nothing up to it moves.
And the reader: any bytes give a typed error or a valid frame"""
import functools
import gzip
import io
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kronos_nb.core import FEATURES, KronosError
from kronos_nb.data.augment import Augment
from kronos_nb.data.check import check_klines
from kronos_nb.data.normalize import MedianMAD, ZScore
from kronos_nb.data.parse import COLUMNS
from kronos_nb.data.read import read_klines
from kronos_nb.data.repair import repair_klines
from kronos_nb.data.window import WindowDataset, segments, split_by_date, split_by_time

law = settings(max_examples=40*int(os.environ.get('EXAMPLES', 25)), deadline=None, database=None, derandomize=True,
               suppress_health_check=list(HealthCheck))
N = 30
T = pd.date_range('2024-01-01', periods=N, freq='h').to_numpy('M8[ns]')

def frame(x, symbols):
    bars = pd.DataFrame(x, columns=list(FEATURES))
    bars.insert(0, 'timestamps', np.tile(T, symbols))
    bars.insert(0, 'symbol', np.repeat(np.array(list('ABC')[:symbols], dtype=object), N))
    return bars

@functools.lru_cache(64)
def walks(seed, symbols=2):
    r = np.random.default_rng(seed)
    x = np.exp(r.normal(0, .02, (symbols*N, 6)).cumsum(0)) * [10, 10, 10, 10, 1e4, 1e5]
    x[:, 1], x[:, 2] = x[:, :4].max(1)*1.01, x[:, :4].min(1)*.99
    return frame(x, symbols)

def disturb(bars, t, how, seed):
    "Other values in every row after stamp `t`, the same stamps"
    r, late = np.random.default_rng(seed), bars.timestamps.to_numpy() > t
    x = bars[list(FEATURES)].to_numpy(copy=True)
    if how == 'times': x[late] *= r.choice([1e-9, .5, 3., 1e9])
    if how == 'zero': x[late] = 0
    if how == 'noise': x[late] = r.lognormal(0, 20, (late.sum(), 6))
    if how == 'flip': x[late] = x[late][::-1]
    return frame(x, bars.symbol.nunique())

seeds, hows, cuts = st.integers(0, 50), st.sampled_from(['times', 'zero', 'noise', 'flip']), st.integers(3, N - 2)
norms = st.sampled_from([ZScore(), MedianMAD(), ZScore(clip=2.)])
statistics = st.sampled_from(['rolling', 'on the fly'])
shapes = st.tuples(st.integers(2, 8), st.integers(0, 4), st.integers(1, 3)) # lookback, horizon, stride

def unmoved(a, b, seen, whole):
    "Windows whose lookback was seen have the same input and statistics; whole ones have the same target"
    assert torch.equal(a['hist_features'][seen], b['hist_features'][seen])
    assert torch.equal(a['pred_features'][whole], b['pred_features'][whole])
    assert torch.equal(a['hist_timestamps'], b['hist_timestamps'])
    for k, v in a['stats'].items(): assert torch.equal(v[seen], b['stats'][k][seen])

@law
@given(seeds, hows, cuts, norms, statistics, shapes, st.integers(0, 3))
def test_windows_statistics_and_augmentation(seed, how, cut, norm, statistics, shape, shift):
    (L, H, stride), t, bars = shape, T[cut], walks(seed)
    a, b = (WindowDataset(o, L, H, norm, stride, statistics=statistics) for o in (bars, disturb(bars, t, how, seed)))
    augment, rows = Augment(.1, (.8, 1.2), .1, shift), np.arange(len(a))
    assert len(a) == len(b)
    plain = a.batch(rows), b.batch(rows), a.rows(rows)
    changed = *(augment.fetch(o, rows, seed, 1) for o in (a, b)), a.rows(rows, augment.shifts(seed, 1, rows))
    for x, y, at in (plain, changed):
        seen, whole = (torch.from_numpy(a.timestamps[at + n - 1] <= t) for n in (L, L + H))
        unmoved(x, y, seen, whole)

def up_to(bars, rows, t):
    "(symbol, stamp) of the rows of a part up to `t`"
    symbol, stamps = bars.symbol.to_numpy(), bars.timestamps.to_numpy()
    return [(symbol[i], stamps[i]) for r in rows for i in range(*r) if stamps[i] <= t]

@law
@given(seeds, hows, cuts, st.integers(0, 4), st.integers(0, 5))
def test_splits(seed, how, cut, embargo, lost):
    bars, t = walks(seed), T[cut]
    other = disturb(bars, t, how, seed)
    assert split_by_time(bars, embargo=embargo).rows == split_by_time(other, embargo=embargo).rows
    late = np.flatnonzero(other.timestamps.to_numpy() > t)
    fewer = other.drop(index=late[:lost]).reset_index(drop=True) # bars of the future may even be absent
    a, b = (split_by_date(o, T[12], T[20]).rows for o in (bars, fewer))
    for part in a: assert up_to(bars, a[part], t) == up_to(fewer, b[part], t)

@law
@given(seeds, cuts, st.integers(0, 6), st.sampled_from([None, '1h', '2h', '5h']))
def test_segments_with_a_fixed_gap(seed, cut, lost, max_gap):
    bars = walks(seed, 1).drop(index=[7, 8, 15]).reset_index(drop=True)
    early = int((bars.timestamps.to_numpy() <= T[cut]).sum())
    fewer = bars.drop(index=range(early, min(early + lost, len(bars)))).reset_index(drop=True)
    def starts(o): return [int(s) for s in segments(o, max_gap)[:, 0] if s < early]
    assert starts(bars) == starts(fewer)

policies = st.fixed_dictionaries(dict(
    nan=st.sampled_from(['drop', 'ffill']), winsorise=st.sampled_from([None, 3., 8.]),
    winsorise_volume=st.sampled_from([None, 2., 5.])))

@law
@given(seeds, hows, cuts, policies)
def test_repairs(seed, how, cut, policy):
    bars, r, t = walks(seed, 1).copy(), np.random.default_rng(seed), T[cut]
    bars.loc[r.integers(0, N, 2), 'close'] = np.nan
    bars.loc[r.integers(0, N), 'high'] *= .5
    a, b = (repair_klines(o, winsorise_window=10, **policy)[0] for o in (bars, disturb(bars, t, how, seed)))
    assert a[a.timestamps <= t].equals(b[b.timestamps <= t])

# Fuzzing the reader

def assert_valid(bars):
    assert tuple(bars.columns) == COLUMNS and bars.timestamps.dtype == 'M8[ns]'
    assert all(bars[c].dtype == 'float64' for c in FEATURES)
    check_klines(bars)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')

heads = st.sampled_from(['timestamps,open,high,low,close,volume,amount\n',
                         'Ticker,Date,Open,High,Low,Close,Volume,Adj Close\n', '', 'date;open;high;low;close\n'])
known = st.sampled_from([
    '1', '2.5', '-1', '', 'nan', 'inf', '2024-01-02', '2024-01-02 10:00:00+08:00', '13/02/2024', '1735689600000',
    '20240102', '1e400', '"', 'x,y', '\u65e5', '99999999999999999999', '0000-00-00', '1,5'])
rows = st.lists(st.lists(st.one_of(known, st.text(max_size=6)), min_size=1, max_size=13), max_size=6)

@law
@given(heads, rows, st.sampled_from(',;\t'))
def test_any_text(folder, head, rows, sep):
    path = folder/'any.csv'
    path.write_bytes((head + '\n'.join(sep.join(row) for row in rows)).encode('utf-8', 'surrogatepass'))
    try: assert_valid(read_klines(path))
    except KronosError: pass

def content(kind):
    "The bytes of a good file"
    bars, f = walks(0, 1), io.BytesIO()
    text = bars.to_csv(index=False).encode()
    if kind == 'csv': return text
    if kind == 'csv.gz': return gzip.compress(text)
    if kind == 'parquet': bars.to_parquet(f)
    if kind == 'feather': bars.to_feather(f, compression='uncompressed')
    if kind == 'zip':
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.csv', text)
    return f.getvalue()

def damage(data, how, r):
    "Cut the end, change a few bytes, or replace a stretch"
    data = bytearray(data)
    if how == 'cut': return bytes(data[:r.integers(0, len(data))])
    if how == 'flip':
        for i in r.integers(0, len(data), r.integers(1, 6)): data[i] = r.integers(256)
        return bytes(data)
    start = r.integers(0, len(data))
    data[start:start + r.integers(1, 200)] = r.integers(0, 256, r.integers(0, 40)).astype('u1').tobytes()
    return bytes(data)

@pytest.mark.parametrize('kind', ['csv', 'csv.gz', 'zip', 'parquet', 'feather'])
def test_damaged_files(folder, kind):
    data, r, path, refused = content(kind), np.random.default_rng(0), folder/f'damaged.{kind}', 0
    for i in range(150):
        path.write_bytes(damage(data, ('cut', 'flip', 'replace')[i % 3], r))
        try: assert_valid(read_klines(path))
        except KronosError as e:
            assert 'damaged' in str(e)
            refused += 1
    assert refused
