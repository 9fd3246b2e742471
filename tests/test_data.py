"Bars, normalisation, windows and augmentation: what teaches nothing but must hold"
import gzip, json, pickle, zipfile
import numpy as np, pandas as pd, pytest, torch
from torch.utils.data import DataLoader
from kronos_nb.core import ConfigError, DataError, FEATURES, KronosError
from kronos_nb.data.augment import Augment
from kronos_nb.data.kline import COLUMNS, check_klines, find_gaps, read_klines, read_report, repair_klines, sample_klines, to_utc
from kronos_nb.data.normalize import MedianMAD, ZScore, with_scales
from kronos_nb.data.window import BatchSampler, WindowDataset, permute, split_by_date, split_by_time

def frame(n=20, symbol='X', start='2024-01-01', freq='h', seed=0):
    r = np.random.default_rng(seed)
    c = np.exp(r.normal(0, .01, n).cumsum()) * 100; o = np.r_[c[0], c[:-1]]
    return pd.DataFrame(dict(symbol=symbol, timestamps=pd.date_range(start, periods=n, freq=freq).astype('M8[ns]'), open=o, high=np.maximum(o, c)*1.01, low=np.minimum(o, c)*.99, close=c,
                             volume=r.lognormal(5, 1, n), amount=r.lognormal(9, 1, n)))

# ---- reading
@pytest.mark.parametrize('name', ['AAPL', 'FB', 'GOOG', 'IBM', 'MSFT', 'ASHARE_5MIN', 'DOGEUSDT'])
def test_samples_are_canonical(name):
    b = sample_klines(name)
    assert tuple(b.columns)==COLUMNS and b.timestamps.dtype=='M8[ns]' and check_klines(b).ok
    fixed, changes = repair_klines(b)
    assert not len(changes) and fixed.equals(b)

@pytest.mark.parametrize('ending', ['csv', 'csv.gz', 'zip', 'parquet', 'feather', 'tsv'])
def test_every_kind_of_file_gives_the_same_bars(tmp_path, ending):
    b, p = frame(), tmp_path/f'all.{ending}'
    if ending=='parquet': b.to_parquet(p)
    elif ending=='feather': b.to_feather(p)
    elif ending=='zip':
        with zipfile.ZipFile(p, 'w') as z: z.writestr('all.csv', b.to_csv(index=False))
    elif ending=='csv.gz': p.write_bytes(gzip.compress(b.to_csv(index=False).encode()))
    else: b.to_csv(p, index=False, sep='\t' if ending=='tsv' else ',')
    got = read_klines(p, chunk=7)
    pd.testing.assert_frame_equal(got, b, check_dtype=False)
    assert read_report(got).rows.sum()==20

row = '1735689600000,1,2,0.5,1.5,10,1735693199999,15,3,5,7,0'
texts = dict(
    headerless=(row, 10, 15), us=(row.replace('1735689600000', '1735689600000000'), 10, 15),
    yahoo=('Date,Open,High,Low,Close,Adj Close,Volume\n2025-01-01,1,2,0.5,1.5,0.75,10', 10, 12.5),
    downloader=('Price,Close,High,Low,Open,Volume\nTicker,X,X,X,X,X\nDate,,,,,\n2025-01-01,1.5,2,0.5,1,10', 10, 12.5),
    chinese=('\u65e5\u671f,\u5f00\u76d8,\u6700\u9ad8,\u6700\u4f4e,\u6536\u76d8,\u6210\u4ea4\u91cf,\u6210\u4ea4\u989d\n2025-01-01,1,2,0.5,1.5,10,15', 10, 15),
    unnamed=(',Open,High,Low,Close,Volume\n2025-01-01 00:00:00,1,2,0.5,1.5,10', 10, 12.5),
    terminal=('<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\n2025.01.01\t00:00:00\t1\t2\t0.5\t1.5\t10', 10, 12.5),
    terminal_bare=('2025.01.01,00:00,1,2,0.5,1.5,10', 10, 12.5),
    european=('date;open;high;low;close;volume\n2025-01-01;1,0;2,0;0,5;1,5;10', 10, 12.5),
    aggregator=('https://example.com\nunix,date,symbol,open,high,low,close,Volume BTC,Volume USDT\n1735689600,2025-01-01 00:00:00,X,1,2,0.5,1.5,10,15', 10, 15),
    compact=('ts_code,trade_date,open,high,low,close,vol,amount\nX,20250101,1,2,0.5,1.5,10,15', 10, 15),
    zoned=('timestamps,open,high,low,close,volume,amount\n2025-01-01 08:00:00+08:00,1,2,0.5,1.5,10,15', 10, 15),
    suffixed=('Date,Price,Open,High,Low,Vol.,Change %\n2025-01-01,1.5,1,2,0.5,0.01K,1%', 10, 12.5),
    seven=('2025-01-01 00:00:00,1,2,0.5,1.5,10,15', 10, 15))

@pytest.mark.parametrize('name', texts)
def test_every_dialect(tmp_path, name):
    text, volume, amount = texts[name]
    p = tmp_path/'X.csv'; p.write_bytes(text.encode('gb18030' if name=='chinese' else 'utf-8'))
    b = read_klines(p)
    assert b.symbol.tolist()==['X'] and b.timestamps.tolist()==[pd.Timestamp('2025-01-01')]
    assert b[list(FEATURES)].iloc[0].tolist()==[1, 2, .5, 1.5, volume, amount]

def test_codes_keep_their_zeros(tmp_path):
    (tmp_path/'a.csv').write_text('code,date,open,high,low,close\n000001,2025-01-01,1,1,1,1\n')
    assert read_klines(tmp_path/'a.csv').symbol[0]=='000001'

def test_filters_cut_while_reading(tmp_path):
    b = pd.concat([frame(symbol='B'), frame(symbol='A')], ignore_index=True)
    b.to_csv(tmp_path/'a.csv', index=False)
    got = read_klines(tmp_path, symbols='A', start='2024-01-01 02:00', end=pd.Timestamp('2024-01-01 06:00', tz='UTC'), max_rows=3, chunk=4)
    assert got.symbol.tolist()==['A']*3 and got.timestamps[0]==pd.Timestamp('2024-01-01 02:00')
    assert read_klines(tmp_path).symbol.tolist()==['A']*20+['B']*20
    assert not len(read_klines(b, symbols='C'))

def test_interleaved_symbols_and_index_frames():
    b = pd.concat([frame(symbol='B'), frame(symbol='A')]).sort_values('timestamps', kind='stable')
    assert read_klines(b).equals(repair_klines(b)[0])
    one = frame().drop(columns='symbol').set_index('timestamps')
    assert read_klines(one, 'X').equals(frame())
    assert read_klines(one.tz_localize('UTC'), 'X').equals(frame())

def test_the_zone_is_a_setting(tmp_path, capsys):
    from kronos_nb.cli import main
    from kronos_nb.config import Config
    from kronos_nb.train import load_bars
    b, cfg = frame(), Config()
    b.to_csv(tmp_path/'a.csv', index=False)
    read = lambda data, tz: load_bars(data, cfg.replace(**{'data.tz': tz}))
    plain, there = read(tmp_path, None), read(tmp_path, 'Asia/Shanghai')
    assert ((plain.timestamps - there.timestamps) == pd.Timedelta('8h')).all() and plain.close.equals(there.close)
    assert (read(b, 'America/New_York').timestamps - read(b, 'Asia/Shanghai').timestamps == pd.Timedelta('13h')).all()
    assert 'read as Asia/Shanghai' in check_klines(there).to_markdown() and 'read as' not in check_klines(plain).to_markdown()
    for done in (there, sample_klines('GOOG')): assert read(done, 'Asia/Shanghai').timestamps.equals(done.timestamps)   # UTC already
    with pytest.raises(ConfigError, match="did you mean 'Asia/Shanghai'"): cfg.replace(**{'data.tz': 'Asia/Shanghia'})
    assert main(['check', str(tmp_path/'a.csv'), '--tz', 'Asia/Shanghai']) == 0 and 'read as Asia/Shanghai' in capsys.readouterr().out

@pytest.mark.parametrize('text,message', [
    ('', 'is empty'), ('a,b\n1,2\n', 'no column for timestamps, open'), ('date,open\n', 'no column'), ('a,b,c,d,e\n1,2,3,4,5,6\n', '5 columns and a row below it 6'),
    ('date,open,high,low,close\n01/02/2024,1,1,1,1\n', 'dayfirst'), ('PK\0\0', 'zero bytes'), ('1,2,3\n', 'no header')])
def test_bad_files_say_what_is_wrong(tmp_path, text, message):
    (tmp_path/'bad.csv').write_text(text)
    with pytest.raises(DataError, match=message) as e: read_klines(tmp_path/'bad.csv')
    assert 'bad.csv' in str(e.value) or 'bad' in message or 'column' in str(e.value) or 'dayfirst' in str(e.value)

def test_bombs_are_stopped(tmp_path):
    text = ('date,open,high,low,close\n' + '2024-01-01,1,1,1,1\n'*2_000_000).encode()
    (tmp_path/'a.csv.gz').write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path/'b.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('b.csv', text)
    for o in ('a.csv.gz', 'b.zip'):
        with pytest.raises(DataError, match='expands beyond the limit'): read_klines(tmp_path/o)
    pd.DataFrame(dict(date=np.zeros(3_000_000, 'i8'), open=1., high=1., low=1., close=1.)).to_parquet(tmp_path/'c.parquet')
    with pytest.raises(DataError, match='expands'): read_klines(tmp_path/'c.parquet', max_ratio=10)

def test_daylight_saving_round_trip():
    ny = pd.date_range('2024-03-08', '2024-03-12', freq='h', tz='America/New_York')
    assert (to_utc(ny.tz_localize(None), 'America/New_York')[0]==ny.tz_convert('UTC').tz_localize(None)).all()

def test_read_log_survives_pandas_and_json():
    b = sample_klines('DOGEUSDT')
    assert len(read_report(b.head(3).copy()))==1 and json.dumps(b.attrs)

# ---- checking and repairing
def spoil(kind):
    b = frame(200, freq='h')
    if kind=='nan': b.loc[5, 'open'] = np.nan
    if kind=='inf': b.loc[5, 'volume'] = np.inf
    if kind=='duplicate': b = pd.concat([b, b.tail(1)])
    if kind=='disorder': b = pd.concat([b.tail(100), b.head(100)])
    if kind=='price_not_positive': b.loc[5, ['open', 'low']] = 0
    if kind=='high_low': b.loc[5, 'high'] = b.low[5] / 2
    if kind=='negative_volume': b.loc[5, 'amount'] = -1
    if kind=='bad_timestamp': b.loc[5, 'timestamps'] = pd.NaT
    if kind=='zero_volume': b.loc[5, 'volume'] = 0
    if kind=='outage': b.loc[5, ['open', 'high', 'low']] = b.close[5]; b.loc[5, 'volume'] = 0
    if kind=='no_volume': b['volume'] = 0.
    if kind=='stale': b.loc[5:20, ['open', 'high', 'low', 'close']] = 1.
    if kind=='gap': b = b.drop(index=range(50, 55))
    if kind=='split_like': b.loc[100:, ['open', 'high', 'low', 'close']] /= 2
    if kind=='jump': b.loc[100:, ['high', 'close']] *= 1.7; b.loc[101:, ['open', 'low']] *= 1.7
    if kind=='too_short': b = b.head(9)
    if kind=='not_numbers': b['close'] = b.close.astype(object); b.loc[5, 'close'] = 'oops'
    if kind=='missing_column': b = b.drop(columns='low')
    if kind=='missing_session': b = pd.concat([frame(200, s) for s in 'AB'] + [b.drop(index=50)], ignore_index=True)
    if kind=='mixed_zones': b['timestamps'] = b.timestamps.astype(str).where(b.index != 5, '2024-01-01 13:00:00+08:00'); b = read_klines(b)
    return b

kinds = 'nan inf duplicate disorder price_not_positive high_low negative_volume bad_timestamp zero_volume outage no_volume stale gap split_like jump too_short not_numbers missing_column missing_session mixed_zones'.split()
@pytest.mark.parametrize('kind', kinds)
def test_every_rule_fires_and_names_the_bar(kind):
    b = spoil(kind)
    before = b.copy()
    i = check_klines(b, window=10).issues
    hit = i[i['rule']==kind]
    assert len(hit), i
    assert hit.symbol.iloc[0] in ('X', 'all', 'DataFrame') and hit['count'].iloc[0]>=1
    if kind in ('nan', 'zero_volume', 'high_low', 'inf'): assert hit['first'].iloc[0][0]==pd.Timestamp('2024-01-01 05:00')
    if kind=='gap': assert hit['first'].iloc[0][0]==pd.Timestamp('2024-01-03 01:00') and '5 bars' in hit.detail.iloc[0]
    pd.testing.assert_frame_equal(b, before)

def test_text_only_the_file_showed_is_told_per_symbol(tmp_path):
    b = pd.concat([frame(30, 'A'), frame(30, 'B')], ignore_index=True).astype(dict(close=object, timestamps=str))
    b.loc[[35, 41], 'close'] = 'oops'; b.loc[7, 'timestamps'] += '+00:00'
    b.to_csv(tmp_path/'a.csv', index=False)
    for bars in (b, read_klines(tmp_path, chunk=11)):
        i = check_klines(bars).issues.set_index('rule')
        bad, zone = i.loc['not_numbers'], i.loc['mixed_zones']
        assert (bad.symbol, bad['count'], bad['first'])==('B', 2, [pd.Timestamp('2024-01-01 05:00'), pd.Timestamp('2024-01-01 11:00')])
        assert (zone.symbol, zone['count'], zone['first'])==('A', 1, [pd.Timestamp('2024-01-01 07:00')])
    assert 'not_numbers' not in set(check_klines(repair_klines(bars)[0]).issues['rule'])       # the bars are gone, and the issue with them
    assert 'not_numbers' not in set(check_klines(bars[bars.symbol=='A']).issues['rule'])
    assert '2 cells' in read_report(bars).notes[0] and '2 cells' not in read_report(read_klines(tmp_path, symbols='A')).notes[0]

def test_clean_bars_have_no_issues():
    r = check_klines(frame(500), window=100)
    assert r.ok and not len(r.issues) and r.summary.coverage[0]==1

@pytest.mark.parametrize('kind', 'nan inf duplicate disorder price_not_positive high_low negative_volume bad_timestamp'.split())
@pytest.mark.parametrize('policy', [{}, dict(nan='ffill', duplicates='first', high_low='drop', volume='drop')])
def test_repair_leaves_no_error_and_lists_the_change(kind, policy):
    b = spoil(kind); before = b.copy()
    fixed, changes = repair_klines(b, **policy)
    assert check_klines(fixed).ok and len(changes) and set(changes['rule'])<={kind, 'high_low'}
    pd.testing.assert_frame_equal(b, before)
    dropped = changes[changes.action=='dropped']
    assert len(fixed)==len(b)-len(dropped)
    WindowDataset(fixed, 10, 2)

def test_changes_reproduce_the_result():
    b = pd.concat([spoil('high_low'), spoil('negative_volume').assign(symbol='Y')], ignore_index=True)
    fixed, changes = repair_klines(b)
    redo = b.set_index(['symbol', 'timestamps'])
    for r in changes.itertuples(): assert redo.loc[(r.symbol, r.timestamps), r.column]==r.old; redo.loc[(r.symbol, r.timestamps), r.column] = r.new
    assert redo.reset_index().equals(fixed)

def test_short_symbols_are_dropped_on_request():
    fixed, changes = repair_klines(pd.concat([frame(50, 'A'), frame(5, 'B')], ignore_index=True), min_bars=10)
    assert set(fixed.symbol)=={'A'} and len(changes)==5

def test_outliers_of_volume_are_limited_and_listed():
    b = pd.concat([frame(200, 'A'), frame(200, 'B', seed=1)], ignore_index=True)
    b.loc[150, 'volume'] *= 1e7; b.loc[350, ['volume', 'amount']] *= 1e7
    fixed, changes = repair_klines(b, winsorise_volume=8, winsorise_window=50)
    assert changes[['rule', 'action', 'symbol', 'column']].values.tolist()==[['winsorise_volume', 'limited', *o] for o in (['A', 'volume'], ['B', 'volume'], ['B', 'amount'])]
    at = changes.set_index(['symbol', 'column'])
    assert at.loc[('B', 'amount'), 'old']==b.amount[350] and at.loc[('B', 'amount'), 'new']==fixed.amount[350]<b.amount[350]
    assert fixed[['open', 'high', 'low', 'close']].equals(b[['open', 'high', 'low', 'close']]) and not len(repair_klines(b)[1])
    for kw, what in ((dict(winsorise_volume=0), 'winsorise_volume'), (dict(winsorise=5, winsorise_window=2), 'winsorise_window')):
        with pytest.raises(ConfigError, match=what): repair_klines(b, **kw)

def test_scales_say_why_they_are_not_computed():
    for b, why in ((frame(20), 'longest has 20'), (frame(200).assign(close=np.nan), 'NaN')): assert why in with_scales(check_klines(b), 50).to_markdown()
    assert not with_scales(check_klines(frame().drop(columns='low')), 5).sections
    mixed = pd.concat([frame(100, s, seed=i) for i, s in enumerate('AB')]).sort_values('timestamps', kind='stable')   # interleaved symbols are not mixed up
    both = [with_scales(check_klines(o), 60).sections[0].table for o in (mixed, read_klines(mixed))]
    pd.testing.assert_frame_equal(*both)

@pytest.mark.parametrize('freq,hours', [('5min', ((9.5, 16),)), ('5min', ((9.5, 11.5), (13, 15))), ('h', ((0, 24),)), ('1min', ((18, 24), (0, 17)))])
def test_sessions_are_no_gaps_and_holes_are(freq, hours):
    t = pd.date_range('2024-01-01', '2024-06-01', freq=freq, tz='America/New_York')
    h = t.hour + t.minute/60
    t = t[((t.weekday if pd.__version__<'3' else t.day_of_week)<5) & np.any([(h>=a) & (h<b) for a, b in hours], 0)]
    t = t[~((t>='2024-02-09') & (t<'2024-02-19'))]                     # a long holiday
    t = t.tz_convert('UTC').tz_localize(None)                          # with a change of the clock in it
    assert not len(find_gaps(t))
    k = np.flatnonzero(np.diff(t)==np.diff(t).min())[len(t)//3] + 3
    assert len(find_gaps(t.delete(range(k, k+3))))==1

def test_reports_can_be_saved(tmp_path):
    r = with_scales(check_klines(sample_klines('DOGEUSDT')), 60, 10)
    text = r.save(tmp_path).read_text()
    assert 'DOGEUSDT' in text and '## Scales' in text and {o.name for o in (tmp_path/'plots').iterdir()}=={'data.png', 'scales.png'}

def test_empty_frames():
    none = frame().head(0)
    assert check_klines(none).ok and not len(repair_klines(none)[0])
    with pytest.raises(DataError, match='no bars'): WindowDataset(none, 5, 1)

# ---- windows
@pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
@pytest.mark.parametrize('statistics', ['rolling', 'on the fly'])
def test_batch_equals_stacked_items(norm, statistics):
    ds = WindowDataset(sample_klines('DOGEUSDT'), 50, 7, norm, stride=9, statistics=statistics)
    b = ds.batch(range(len(ds)))
    for i in range(len(ds)):
        one = ds[i]
        for k in ('hist_features', 'hist_timestamps', 'pred_features', 'pred_timestamps'): assert torch.equal(one[k], b[k][i])
        for k, v in one['stats'].items(): assert torch.equal(v, b['stats'][k][i])
    assert b['hist_features'].dtype==torch.float32 and b['hist_timestamps'].dtype==torch.int64

@pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
@pytest.mark.parametrize('statistics', ['rolling', 'on the fly'])
def test_windows_are_the_bars(norm, statistics):
    bars = pd.concat([frame(40, 'A'), frame(30, 'B', seed=1), frame(5, 'C')], ignore_index=True).drop(index=[20]).reset_index(drop=True)
    ds = WindowDataset(bars, 6, 2, norm, stride=2, statistics=statistics)
    x, seen = bars[list(FEATURES)].to_numpy(), []
    for i in range(len(ds)):
        sym, first, future = ds.where(i)
        at = bars.index[(bars.symbol==sym) & (bars.timestamps==first)][0]
        w = bars.iloc[at:at+8]
        assert w.symbol.nunique()==1 and w.timestamps.diff().dropna().nunique()==1 and w.timestamps.iloc[6]==future
        z, s, _ = ds.arrays([i])
        np.testing.assert_allclose(z[0], norm.fit(x[at:at+8], 6).encode(x[at:at+8]), atol=2e-6)
        assert s[0].tolist()==[[t.minute, t.hour, t.to_pydatetime().weekday(), t.day, t.month] for t in w.timestamps]
        seen.append(at)
    assert len(ds)==(20-8)//2+1 + (19-8)//2+1 + (30-8)//2+1 and len(set(seen))==len(ds) and ds.symbols==['A', 'B']

def test_zscore_is_the_reference_formula():
    x = sample_klines('AAPL')[list(FEATURES)].to_numpy()[:100].astype(np.float32)
    past = x[:90]
    want = np.clip((x - past.mean(0)) / (past.std(0) + 1e-5), -5, 5)
    np.testing.assert_allclose(ZScore().fit(x, 90).encode(x.astype('f8')), want, atol=2e-5)

@pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
@pytest.mark.parametrize('scale', [1e-12, 1., 1e12])
def test_rolling_equals_fit_on_hard_numbers(norm, scale):
    r = np.random.default_rng(0)
    x = r.normal(size=(300, 4)).cumsum(0)*1e-3 + 1e3
    x[100, 1], x[:, 2], x[50:120, 3] = 1e9, 7., 5.
    x *= scale
    w = np.lib.stride_tricks.sliding_window_view(x, 37, axis=0).transpose(0, 2, 1)
    s = norm.fit(w, 37)
    loc, size = (np.concatenate(o) for o in zip(*[o[1:] for o in norm.rolling(x, 37, block=50)]))
    np.testing.assert_allclose(loc, s.loc, rtol=1e-12); np.testing.assert_allclose(size, s.scale, rtol=1e-7)

def test_float_extremes_are_errors_not_nan():
    x = np.ones((10, 6)); x[3, 2] = np.inf
    for n in (ZScore(), MedianMAD()):
        with pytest.raises(DataError, match='NaN or inf'): n.fit(x, 10)
        assert np.isfinite(n.fit(np.full((10, 6), 1e150), 10).scale).all()

def test_compiled_medians_are_the_sorted_ones():
    pytest.importorskip('numba')
    from kronos_nb.data.normalize import _compiled_mad, _rolling_mad
    r = np.random.default_rng(0)
    for x in (r.normal(size=(500, 2)).cumsum(0), r.integers(0, 4, (500, 2))*1., np.zeros((200, 2))):
        for L in (1, 2, 3, 50, 51): assert all((a==b).all() for a, b in zip(_rolling_mad(x, L), _rolling_mad(x, L, _compiled_mad())))

@pytest.mark.parametrize('norm', [ZScore(), MedianMAD(clip=2.1)])
def test_compiled_windows_are_the_same_bits(norm, monkeypatch):
    pytest.importorskip('numba')
    import kronos_nb.data.window as w
    a = WindowDataset(sample_klines(['AAPL', 'FB']), 50, 7, norm, stride=3, statistics='rolling')
    monkeypatch.setattr(w, 'compiles', lambda n: True)
    b = WindowDataset(sample_klines(['AAPL', 'FB']), 50, 7, norm, stride=3, statistics='rolling')
    assert b.compiled and 'compiled' in repr(b)
    for rows in ([0], range(len(a)), [-1, 5]):
        x, y = a.batch(rows), b.batch(rows)
        assert all(torch.equal(x[k], y[k]) for k in x if k!='stats') and all(torch.equal(x['stats'][k], y['stats'][k]) for k in x['stats'])

def test_a_dataset_pickles_small():
    ds = WindowDataset(sample_klines('AAPL'), 90, 10)
    ds.batch([1])
    data = pickle.dumps(ds)
    assert len(data)<4*ds.x.nbytes and torch.equal(pickle.loads(data).batch([7])['hist_features'], ds.batch([7])['hist_features'])

def test_split_covers_every_bar_once():
    bars = pd.concat([frame(n, s) for n, s in ((100, 'A'), (37, 'B'), (3, 'C'))], ignore_index=True)
    sp = split_by_time(bars)
    assert pd.concat([sp.train, sp.val, sp.test]).sort_values(['symbol', 'timestamps'], ignore_index=True).equals(bars)
    emb = split_by_time(bars, embargo=5)
    assert len(emb.train)+len(emb.val)+len(emb.test)==len(bars)-sum(min(5, a) + min(5, b) for a, b in ((70, 15), (25, 6), (2, 0)) )
    assert split_by_date(bars, '2024-01-03').test.empty

# ---- sampling
def all_of(s, epoch=0): return [s.batch(epoch, i) for i in range(len(s))]
ds = WindowDataset(pd.concat([frame(100, 'A'), frame(40, 'B'), frame(30, 'C')], ignore_index=True), 10, 2)

@pytest.mark.parametrize('n', [1, 2, 3, 5, 64, 97, 1000])
def test_permutations(n):
    assert len({tuple(permute(np.arange(n), n, k)) for k in range(200)})>=min(n**2//4+1, 100) or n<3
    for k in range(20): assert sorted(permute(np.arange(n), n, k))==list(range(n))

def test_permutations_look_uniform():
    n = 97
    p = np.stack([permute(np.arange(n), n, k) for k in range(2000)])
    hits = np.stack([np.bincount(p[:, j], minlength=n) for j in range(n)])
    chi = ((hits-2000/n)**2/(2000/n)).sum(1)
    assert chi.mean()/(n-1)==pytest.approx(1, abs=.05) and chi.max()<(n-1)*1.8
    runs = np.array([[np.corrcoef(o[:-1], o[1:])[0, 1]] for o in p])
    assert abs(runs.mean())<.02

@pytest.mark.parametrize('mode', ['shuffled', 'sequential', 'balanced'])
@pytest.mark.parametrize('drop_last', [True, False])
def test_ranks_share_the_epoch_without_repeats(mode, drop_last):
    whole = all_of(BatchSampler(ds, 12, 5, mode, drop_last=drop_last), 3)
    parts = [all_of(BatchSampler(ds, 4, 5, mode, drop_last=drop_last, rank=r, world_size=3), 3) for r in range(3)]
    for s, w in enumerate(whole): assert sorted(w)==sorted(np.concatenate([p[s] for p in parts]))
    if mode!='balanced':
        seen = np.concatenate(whole)
        assert len(set(seen))==len(seen) and (drop_last or sorted(seen)==list(range(len(ds))))

def test_a_stream_visits_all_before_any_again():
    s = BatchSampler(ds, 10, 1, samples_per_epoch=30)
    seen = np.concatenate([b for e in range(10) for b in all_of(s, e)])
    n = len(ds)
    assert sorted(seen[:n])==list(range(n)) and sorted(seen[n:2*n])==list(range(n)) and len(s)==3
    assert not np.array_equal(seen[:n], seen[n:2*n])

def test_balanced_gives_every_symbol_its_share():
    seen = np.concatenate(all_of(BatchSampler(ds, 9, 1, 'balanced', samples_per_epoch=900)))
    who = np.searchsorted(ds.offsets, seen, 'right')-1
    assert np.bincount(who).tolist()==[300]*3

def test_epochs_seeds_and_steps_differ():
    s, t = BatchSampler(ds, 10, 1), BatchSampler(ds, 10, 2)
    assert not np.array_equal(s.batch(0, 0), s.batch(1, 0)) and not np.array_equal(s.batch(0, 0), t.batch(0, 0))
    with pytest.raises(IndexError): s.batch(0, len(s))

@pytest.mark.parametrize('kw,message', [(dict(batch_size=0), 'batch_size'), (dict(mode='random'), 'mode must be'), (dict(rank=2, world_size=2), 'rank'), (dict(samples_per_epoch=0), 'samples_per_epoch'),
    (dict(mode='sequential', samples_per_epoch=5), 'sequential'), (dict(batch_size=10**6), 'lower batch_size')])
def test_bad_samplers(kw, message):
    with pytest.raises(ConfigError, match=message): BatchSampler(ds, **dict(batch_size=4) | kw)

@pytest.mark.parametrize('workers', [0, 2])
def test_items_drop_into_a_plain_loader(workers):
    want = np.random.default_rng(0).permutation(len(ds))
    got = list(DataLoader(ds, batch_size=16, sampler=want.tolist(), num_workers=workers, generator=torch.Generator()))
    assert len(got)==-(-len(ds)//16) and torch.equal(torch.cat([b['window_idx'] for b in got]), torch.from_numpy(want))
    for i, b in enumerate(got):
        x = ds.batch(want[16*i:16*i+16])
        assert all(torch.equal(b[k], x[k]) for k in x if k!='stats') and all(torch.equal(b['stats'][k], x['stats'][k]) for k in x['stats'])

@pytest.mark.parametrize('workers', [0, 1, 3])
def test_any_number_of_workers_gives_the_same_bits(workers):
    s = BatchSampler(ds, 8, 3)
    got = list(DataLoader(ds, batch_size=None, sampler=s, num_workers=workers, generator=torch.Generator()))
    for i, b in enumerate(got): assert torch.equal(b['hist_features'], ds.batch(s.batch(0, i))['hist_features'])

def test_augmentation_has_an_address():
    a = Augment(.1, (.5, 1.5), .2, 4)
    rows = np.arange(20)
    whole = a.fetch(ds, rows, 3, 5)
    for i in (0, 7, 19): assert torch.equal(a.fetch(ds, [i], 3, 5)['hist_features'][0], whole['hist_features'][i])
    for other in ((4, 5), (3, 6)): assert not torch.equal(a.fetch(ds, rows, *other)['pred_features'], whole['pred_features'])
    clean = ds.batch(rows)
    before = clean['hist_features'].clone()
    Augment(.1)(clean, 0, 0, rows)
    assert torch.equal(clean['hist_features'], before) and whole['hist_features'].abs().max()<=5

def test_shifts_stay_inside_the_segment():
    a = Augment(time_shift_max=1000)
    at = ds.rows(np.arange(len(ds)), a.shifts(0, 0, range(len(ds))))
    k = np.searchsorted(ds.offsets, np.arange(len(ds)), 'right')-1
    assert (at>=ds.starts[k]).all() and (at+ds.window<=ds.ends[k]).all()

def test_the_check_command_shows_scales_and_exits_by_what_it_finds(tmp_path, capsys):
    from kronos_nb.cli import main
    frame(300).to_csv(tmp_path/'good.csv', index=False); spoil('nan').to_csv(tmp_path/'bad.csv', index=False); frame(50).drop(columns='low').to_csv(tmp_path/'worse.csv', index=False)
    said = {}
    for name, code in (('good', 0), ('bad', 1), ('worse', 1)): assert main(['check', str(tmp_path/f'{name}.csv'), '--lookback-window', '60', *(['--out', str(tmp_path/'out')] if code==0 else [])])==code; said[name] = capsys.readouterr().out
    assert 'clipped_median_mad' in said['good'] and (tmp_path/'out'/'plots'/'scales.png').is_file()
    assert '| nan | error | X |' in said['bad'] and 'no column for low' in said['worse']
