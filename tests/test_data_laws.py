"Law 1 as properties: change anything after t, and nothing up to t moves. And the reader: any bytes give a typed error or a valid frame"
import functools, gzip, io, zipfile
import numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from kronos_nb.core import FEATURES, KronosError
from kronos_nb.data.augment import Augment
from kronos_nb.data.kline import COLUMNS, check_klines, read_klines, repair_klines
from kronos_nb.data.normalize import MedianMAD, ZScore
from kronos_nb.data.window import WindowDataset, segments, split_by_date, split_by_time

law = settings(max_examples=1000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
N = 30
T = pd.date_range('2024-01-01', periods=N, freq='h').to_numpy('M8[ns]')

def make(x, symbols):
    b = pd.DataFrame(x, columns=list(FEATURES))
    b.insert(0, 'timestamps', np.tile(T, symbols)); b.insert(0, 'symbol', np.repeat(np.array(list('ABC')[:symbols], dtype=object), N))
    return b

@functools.lru_cache(64)
def bars(seed, symbols=2):
    r = np.random.default_rng(seed)
    x = np.exp(r.normal(0, .02, (symbols*N, 6)).cumsum(0)) * [10, 10, 10, 10, 1e4, 1e5]
    x[:, 1], x[:, 2] = x[:, :4].max(1)*1.01, x[:, :4].min(1)*.99
    return make(x, symbols)

def disturb(b, t, how, seed):
    "Other values in every row after stamp `t`, the same stamps"
    r, late = np.random.default_rng(seed), b.timestamps.to_numpy()>t
    x = b[list(FEATURES)].to_numpy(copy=True)
    if how=='times': x[late] *= r.choice([1e-9, .5, 3., 1e9])
    if how=='zero': x[late] = 0
    if how=='noise': x[late] = r.lognormal(0, 20, (late.sum(), 6))
    if how=='flip': x[late] = x[late][::-1]
    return make(x, b.symbol.nunique())

seeds, hows, cuts = st.integers(0, 50), st.sampled_from(['times', 'zero', 'noise', 'flip']), st.integers(3, N-2)
norms, stats = st.sampled_from([ZScore(), MedianMAD(), ZScore(clip=2.)]), st.sampled_from(['rolling', 'on the fly'])

@law
@given(seeds, hows, cuts, norms, stats, st.integers(2, 8), st.integers(0, 4), st.integers(1, 3), st.integers(0, 3))
def test_windows_statistics_and_augmentation(seed, how, cut, norm, statistics, L, H, stride, shift):
    a = bars(seed); t = T[cut]
    b = disturb(a, t, how, seed)
    A, B = (WindowDataset(o, L, H, norm, stride, statistics=statistics) for o in (a, b))
    assert len(A)==len(B)
    aug, rows = Augment(.1, (.8, 1.2), .1, shift), np.arange(len(A))
    for fetch, at in ((lambda d: d.batch(rows), A.rows(rows)), (lambda d: aug.fetch(d, rows, seed, 1), A.rows(rows, aug.shifts(seed, 1, rows)))):
        x, y = fetch(A), fetch(B)
        seen = torch.from_numpy(A.timestamps[at+L-1]<=t)
        whole = torch.from_numpy(A.timestamps[at+L+H-1]<=t)
        assert torch.equal(x['hist_features'][seen], y['hist_features'][seen]) and torch.equal(x['pred_features'][whole], y['pred_features'][whole])
        for k in x['stats']: assert torch.equal(x['stats'][k][seen], y['stats'][k][seen])
        assert torch.equal(x['hist_timestamps'], y['hist_timestamps'])

@law
@given(seeds, hows, cuts, st.integers(0, 4), st.integers(0, 5))
def test_splits(seed, how, cut, embargo, lost):
    a, t = bars(seed), T[cut]
    b = disturb(a, t, how, seed)
    assert split_by_time(a, embargo=embargo).rows==split_by_time(b, embargo=embargo).rows
    late = np.flatnonzero(b.timestamps.to_numpy()>t)
    c = b.drop(index=late[:lost]).reset_index(drop=True)      # bars of the future may even be absent
    A, C = (split_by_date(o, T[12], T[20]).rows for o in (a, c))
    early = lambda o, rows: [(s, t) for r in rows for s, t in zip(o.symbol.to_numpy()[slice(*r)], o.timestamps.to_numpy()[slice(*r)]) if t<=T[cut]]
    for k in A: assert early(a, A[k])==early(c, C[k])

@law
@given(seeds, hows, cuts, st.integers(0, 6), st.sampled_from([None, '1h', '2h', '5h']))
def test_segments_with_a_fixed_gap(seed, how, cut, lost, max_gap):
    a = bars(seed, 1).drop(index=[7, 8, 15]).reset_index(drop=True)
    early = int((a.timestamps.to_numpy()<=T[cut]).sum())
    c = a.drop(index=range(early, min(early+lost, len(a))))
    cut_at = lambda o: [int(s) for s in segments(o, max_gap)[:, 0] if s<early]
    assert cut_at(a)==cut_at(c.reset_index(drop=True))

@law
@given(seeds, hows, cuts, st.sampled_from(['drop', 'ffill']), st.sampled_from([None, 3., 8.]), st.sampled_from([None, 2., 5.]))
def test_repairs(seed, how, cut, nan, winsorise, volume):
    a = bars(seed, 1).copy(); r = np.random.default_rng(seed)
    a.loc[r.integers(0, N, 2), 'close'] = np.nan
    a.loc[r.integers(0, N), 'high'] *= .5
    t = T[cut]
    x, y = (repair_klines(o, nan=nan, winsorise=winsorise, winsorise_volume=volume, winsorise_window=10)[0] for o in (a, disturb(a, t, how, seed)))
    assert x[x.timestamps<=t].equals(y[y.timestamps<=t])

# ---- fuzzing the reader
def valid(b): assert tuple(b.columns)==COLUMNS and b.timestamps.dtype=='M8[ns]' and all(b[c].dtype=='float64' for c in FEATURES); check_klines(b)

heads = ['timestamps,open,high,low,close,volume,amount\n', 'Ticker,Date,Open,High,Low,Close,Volume,Adj Close\n', '', 'date;open;high;low;close\n']
cell = st.one_of(st.sampled_from(['1', '2.5', '-1', '', 'nan', 'inf', '2024-01-02', '2024-01-02 10:00:00+08:00', '13/02/2024', '1735689600000', '20240102', '1e400', '"', 'x,y', '\u65e5', '99999999999999999999', '0000-00-00', '1,5']), st.text(max_size=6))
@law
@given(st.sampled_from(heads), st.lists(st.lists(cell, min_size=1, max_size=13), max_size=6), st.sampled_from(',;\t'))
def test_any_text(tmp_path_factory, head, rows, sep):
    p = folder/'any.csv'
    p.write_bytes((head + '\n'.join(sep.join(r) for r in rows)).encode('utf-8', 'surrogatepass'))
    try: valid(read_klines(p))
    except KronosError: pass

@pytest.fixture(scope='module', autouse=True)
def _folder(tmp_path_factory):
    global folder
    folder = tmp_path_factory.mktemp('fuzz')

def good(kind):
    b, f = bars(0, 1), io.BytesIO()
    text = b.to_csv(index=False).encode()
    if kind=='csv': return text
    if kind=='csv.gz': return gzip.compress(text)
    if kind=='parquet': b.to_parquet(f)
    if kind=='feather': b.to_feather(f, compression='uncompressed')
    if kind=='zip':
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.csv', text)
    return f.getvalue()

@pytest.mark.parametrize('kind', ['csv', 'csv.gz', 'zip', 'parquet', 'feather'])
def test_damaged_files(kind):
    data, r, ok = good(kind), np.random.default_rng(0), 0
    for i in range(150):
        d = bytearray(data)
        if i%3==0: d = d[:r.integers(0, len(d))]
        elif i%3==1:
            for j in r.integers(0, len(d), r.integers(1, 6)): d[j] = r.integers(256)
        else: a = r.integers(0, len(d)); d[a:a+r.integers(1, 200)] = r.integers(0, 256, r.integers(0, 40)).astype('u1').tobytes()
        p = folder/f'damaged.{kind}'; p.write_bytes(bytes(d))
        try: valid(read_klines(p)); ok += 1
        except KronosError as e: assert 'damaged' in str(e)
    assert ok<150
