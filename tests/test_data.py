"Bars, normalisation, windows and augmentation: what teaches nothing but must hold"
import gzip
import json
import pickle
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from kronos_nb.cli import main
from kronos_nb.config import Config
from kronos_nb.core import FEATURES, PRICES, ConfigError, DataError
from kronos_nb.data import window
from kronos_nb.data.augment import Augment
from kronos_nb.data.check import check_klines, find_gaps
from kronos_nb.data.normalize import MedianMAD, ZScore, _compiled_mad, _rolling_mad, with_scales
from kronos_nb.data.parse import COLUMNS, to_utc
from kronos_nb.data.read import SAMPLES, read_klines, read_report, sample_klines
from kronos_nb.data.repair import repair_klines
from kronos_nb.data.window import BatchSampler, WindowDataset, permute, split_by_date, split_by_time
from kronos_nb.fitting.prepare import load_bars

both_normalizers = pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
both_statistics = pytest.mark.parametrize('statistics', ['rolling', 'on the fly'])

def frame(n=20, symbol='X', start='2024-01-01', freq='h', seed=0):
    "Clean bars of one symbol"
    r = np.random.default_rng(seed)
    close = np.exp(r.normal(0, .01, n).cumsum()) * 100
    opens = np.r_[close[0], close[:-1]]
    stamps = pd.date_range(start, periods=n, freq=freq).astype('M8[ns]')
    high, low = np.maximum(opens, close) * 1.01, np.minimum(opens, close) * .99
    volume, amount = r.lognormal(5, 1, n), r.lognormal(9, 1, n)
    return pd.DataFrame(dict(symbol=symbol, timestamps=stamps, open=opens, high=high, low=low, close=close,
                             volume=volume, amount=amount))

def together(*frames): return pd.concat(frames, ignore_index=True)

def same_batch(a, b):
    "Two batches hold the same bits"
    a, b = ({k: v for k, v in batch.items() if k != 'stats'} | batch['stats'] for batch in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# Reading

@pytest.mark.parametrize('name', SAMPLES)
def test_samples_are_canonical(name):
    bars = sample_klines(name)
    assert tuple(bars.columns) == COLUMNS and bars.timestamps.dtype == 'M8[ns]' and check_klines(bars).ok
    fixed, changes = repair_klines(bars)
    assert not len(changes) and fixed.equals(bars)

def write_bars(bars, path):
    "Write bars in the format that the name of the file tells"
    text = bars.to_csv(index=False, sep='\t' if path.suffix == '.tsv' else ',')
    if path.suffix == '.parquet': bars.to_parquet(path)
    elif path.suffix == '.feather': bars.to_feather(path)
    elif path.suffix == '.gz': path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z: z.writestr('all.csv', text)
    else: path.write_text(text)

@pytest.mark.parametrize('ending', ['csv', 'csv.gz', 'zip', 'parquet', 'feather', 'tsv'])
def test_every_kind_of_file_gives_the_same_bars(tmp_path, ending):
    bars, path = frame(), tmp_path/f'all.{ending}'
    write_bars(bars, path)
    got = read_klines(path, chunk=7)
    pd.testing.assert_frame_equal(got, bars, check_dtype=False)
    assert read_report(got).rows.sum() == 20

CHINESE = '\u65e5\u671f,\u5f00\u76d8,\u6700\u9ad8,\u6700\u4f4e,\u6536\u76d8,\u6210\u4ea4\u91cf,\u6210\u4ea4\u989d'
DIALECTS = dict( # each is the bar 1, 2, 0.5, 1.5 with volume 10 of 2025-01-01
    milliseconds='1735689600000,1,2,0.5,1.5,10,1735693199999,15,3,5,7,0',
    microseconds='1735689600000000,1,2,0.5,1.5,10,1735693199999,15,3,5,7,0',
    shares='Date,Open,High,Low,Close,Adj Close,Volume\n2025-01-01,1,2,0.5,1.5,0.75,10',
    downloader='Price,Close,High,Low,Open,Volume\nTicker,X,X,X,X,X\nDate,,,,,\n2025-01-01,1.5,2,0.5,1,10',
    chinese=f'{CHINESE}\n2025-01-01,1,2,0.5,1.5,10,15',
    unnamed=',Open,High,Low,Close,Volume\n2025-01-01 00:00:00,1,2,0.5,1.5,10',
    terminal='<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\n2025.01.01\t00:00:00\t1\t2\t0.5\t1.5\t10',
    bare_terminal='2025.01.01,00:00,1,2,0.5,1.5,10',
    european='date;open;high;low;close;volume\n2025-01-01;1,0;2,0;0,5;1,5;10',
    aggregator='https://example.com\nunix,date,symbol,open,high,low,close,Volume BTC,Volume USDT\n'
               '1735689600,2025-01-01 00:00:00,X,1,2,0.5,1.5,10,15',
    compact='ts_code,trade_date,open,high,low,close,vol,amount\nX,20250101,1,2,0.5,1.5,10,15',
    zoned='timestamps,open,high,low,close,volume,amount\n2025-01-01 08:00:00+08:00,1,2,0.5,1.5,10,15',
    suffixed='Date,Price,Open,High,Low,Vol.,Change %\n2025-01-01,1.5,1,2,0.5,0.01K,1%',
    seven='2025-01-01 00:00:00,1,2,0.5,1.5,10,15')
SEVEN = ['timestamps', *FEATURES]
NO_AMOUNT = {'shares', 'downloader', 'unnamed', 'terminal', 'bare_terminal', 'european', 'suffixed'}

@pytest.mark.parametrize('name', DIALECTS)
def test_every_dialect(tmp_path, name):
    path = tmp_path/'X.csv'
    path.write_bytes(DIALECTS[name].encode('gb18030' if name == 'chinese' else 'utf-8'))
    bars = read_klines(path, columns=SEVEN if name == 'seven' else None)
    assert bars.symbol.tolist() == ['X'] and bars.timestamps.tolist() == [pd.Timestamp('2025-01-01')]
    amount = 10 * 1.25 if name in NO_AMOUNT else 15
    assert bars[list(FEATURES)].iloc[0].tolist() == [1, 2, .5, 1.5, 10, amount]

def test_codes_keep_their_zeros(tmp_path):
    path = tmp_path/'a.csv'
    path.write_text('code,date,open,high,low,close\n000001,2025-01-01,1,1,1,1\n')
    assert read_klines(path).symbol[0] == '000001'

def test_filters_cut_while_reading(tmp_path):
    bars = together(frame(symbol='B'), frame(symbol='A'))
    bars.to_csv(tmp_path/'a.csv', index=False)
    end = pd.Timestamp('2024-01-01 06:00', tz='UTC')
    got = read_klines(tmp_path, symbols='A', start='2024-01-01 02:00', end=end, max_rows=3, chunk=4)
    assert got.symbol.tolist() == ['A']*3 and got.timestamps[0] == pd.Timestamp('2024-01-01 02:00')
    assert read_klines(tmp_path).symbol.tolist() == ['A']*20 + ['B']*20
    assert not len(read_klines(bars, symbols='C'))

def test_interleaved_symbols_and_index_frames():
    bars = pd.concat([frame(symbol='B'), frame(symbol='A')]).sort_values('timestamps', kind='stable')
    assert read_klines(bars).equals(repair_klines(bars)[0])
    one = frame().drop(columns='symbol').set_index('timestamps')
    assert read_klines(one, 'X').equals(frame())
    assert read_klines(one.tz_localize('UTC'), 'X').equals(frame())

@pytest.mark.parametrize('values', [
    [], [None], ['2024-01-02 09:30', 'soon'], ['2024-01-02 09:30+08:00', '2024-01-02 01:35'], ['1735689600', 'x'],
    [20240102], [1735689600.], [pd.Timestamp('2024-01-02')], [pd.Timestamp('2024-01-02', tz='UTC')]])
def test_stamps_and_their_mask_whatever_the_source(values):
    for stamps in (values, pd.Series(values), np.array(values, dtype=object)):
        t, mixed = to_utc(stamps, 'Asia/Shanghai')
        assert t.dtype == 'M8[ns]' and mixed.dtype == bool and len(t) == len(mixed) == len(values)

def test_daylight_saving_round_trip():
    ny = pd.date_range('2024-03-08', '2024-03-12', freq='h', tz='America/New_York')
    utc = ny.tz_convert('UTC').tz_localize(None)
    assert (to_utc(ny.tz_localize(None), 'America/New_York')[0] == utc).all()

def test_the_zone_is_a_setting(tmp_path):
    bars = frame()
    bars.to_csv(tmp_path/'a.csv', index=False)
    def read(data, tz): return load_bars(data, Config().replace(**{'data.tz': tz}))
    plain, shanghai = read(tmp_path, None), read(tmp_path, 'Asia/Shanghai')
    assert ((plain.timestamps - shanghai.timestamps) == pd.Timedelta('8h')).all() and plain.close.equals(shanghai.close)
    own = bars.drop(columns='symbol') # a frame of one's own is no different from a file
    new_york = read(own, 'America/New_York')
    assert (new_york.timestamps - read(own, 'Asia/Shanghai').timestamps == pd.Timedelta('13h')).all()
    assert 'Asia/Shanghai' in check_klines(shanghai).to_markdown()
    assert 'Asia/Shanghai' not in check_klines(plain).to_markdown()
    with pytest.raises(ConfigError, match='data.tz'): Config().replace(**{'data.tz': 'Asia/Shanghia'})

def test_the_zone_is_an_option(tmp_path, capsys):
    frame().to_csv(tmp_path/'a.csv', index=False)
    assert main(['check', str(tmp_path/'a.csv'), '--tz', 'Asia/Shanghai']) == 0
    assert 'Asia/Shanghai' in capsys.readouterr().out

def test_reading_what_was_read_changes_nothing(tmp_path):
    frame().to_csv(tmp_path/'a.csv', index=False)
    shanghai = read_klines(tmp_path, tz='Asia/Shanghai')
    for bars in (shanghai, shanghai.head(5), sample_klines('GOOG')):
        assert read_klines(bars).equals(bars)

@pytest.mark.parametrize('text,what', [
    ('', 'bad.csv'), ('a,b\n1,2\n', 'timestamps, open'), ('date,open\n', 'high, low, close'), ('PK\0\0', 'bad.csv'),
    ('a,b,c,d,e\n1,2,3,4,5,6\n', 'bad.csv'), ('1,2,3\n', 'bad.csv'),
    ('date,open,high,low,close\n01/02/2024,1,1,1,1\n', 'bad.csv: dayfirst')])
def test_bad_files_are_named(tmp_path, text, what):
    (tmp_path/'bad.csv').write_text(text)
    with pytest.raises(DataError, match=what): read_klines(tmp_path/'bad.csv')

def test_compressed_input_has_a_limit(tmp_path):
    text = ('date,open,high,low,close\n' + '2024-01-01,1,1,1,1\n'*2_000_000).encode()
    (tmp_path/'a.csv.gz').write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path/'b.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('b.csv', text)
    same = pd.DataFrame(dict(date=np.zeros(3_000_000, 'i8'), open=1., high=1., low=1., close=1.))
    same.to_parquet(tmp_path/'c.parquet')
    for name in ('a.csv.gz', 'b.zip', 'c.parquet'):
        with pytest.raises(DataError, match='max_ratio'): read_klines(tmp_path/name, max_ratio=10)

def test_the_log_survives_pandas_and_json():
    bars = sample_klines('DOGEUSDT')
    assert len(read_report(bars.head(3).copy())) == 1 and json.dumps(bars.attrs)

# Checking and repairing

def with_cells(rows, columns, value):
    bars = frame(200)
    bars.loc[rows, columns] = value
    return bars

def scaled(rows, columns, factor):
    bars = frame(200)
    bars.loc[rows, columns] *= factor
    return bars

def outage():
    bars = frame(200)
    bars.loc[5, ['open', 'high', 'low']] = bars.close[5]
    bars.loc[5, 'volume'] = 0
    return bars

def jump():
    bars = scaled(slice(100, None), ['high', 'close'], 1.7)
    bars.loc[101:, ['open', 'low']] *= 1.7
    return bars

def mixed_zones():
    stamps = frame(200).timestamps.astype(str)
    return read_klines(frame(200).assign(timestamps=stamps.where(stamps.index != 5, '2024-01-01 13:00:00+08:00')))

SPOILT = dict( # rule: bars that break it
    nan=lambda: with_cells(5, 'open', np.nan),
    inf=lambda: with_cells(5, 'volume', np.inf),
    duplicate=lambda: pd.concat([frame(200), frame(200).tail(1)]),
    disorder=lambda: pd.concat([frame(200).tail(100), frame(200).head(100)]),
    price_not_positive=lambda: with_cells(5, ['open', 'low'], 0.),
    high_low=lambda: scaled(5, 'high', .4),
    negative_volume=lambda: with_cells(5, 'amount', -1.),
    bad_timestamp=lambda: with_cells(5, 'timestamps', pd.NaT),
    zero_volume=lambda: with_cells(5, 'volume', 0.),
    outage=outage,
    no_volume=lambda: frame(200).assign(volume=0.),
    stale=lambda: with_cells(slice(5, 20), list(PRICES), 1.),
    gap=lambda: frame(200).drop(index=range(50, 55)),
    split_like=lambda: scaled(slice(100, None), list(PRICES), .5),
    jump=jump,
    too_short=lambda: frame(9),
    not_numbers=lambda: frame(200).assign(close=lambda b: b.close.astype(object).where(b.index != 5, 'oops')),
    missing_column=lambda: frame(200).drop(columns='low'),
    missing_session=lambda: together(frame(200, 'A'), frame(200, 'B'), frame(200).drop(index=50)),
    mixed_zones=mixed_zones)

@pytest.mark.parametrize('rule', SPOILT)
def test_every_rule_fires_and_names_the_bar(rule):
    bars = SPOILT[rule]()
    before = bars.copy()
    issues = check_klines(bars, window=10).issues
    found = issues[issues['rule'] == rule]
    assert len(found), issues
    assert found.symbol.iloc[0] in ('X', 'all') and found['count'].iloc[0] >= 1
    first = found['first'].iloc[0]
    if rule in ('nan', 'zero_volume', 'high_low', 'inf'): assert first[0] == pd.Timestamp('2024-01-01 05:00')
    if rule == 'gap': assert first[0] == pd.Timestamp('2024-01-03 01:00') and '5 bars' in found.detail.iloc[0]
    pd.testing.assert_frame_equal(bars, before)

def test_what_only_the_text_shows_is_told_per_symbol(tmp_path):
    raw = together(frame(30, 'A'), frame(30, 'B')).astype(dict(close=object, timestamps=str))
    raw.loc[[35, 41], 'close'] = 'oops'
    raw.loc[7, 'timestamps'] += '+00:00'
    raw.to_csv(tmp_path/'a.csv', index=False)
    read = read_klines(tmp_path, chunk=11)
    for bars in (raw, read):
        issues = check_klines(bars).issues.set_index('rule')
        text, zone = issues.loc['not_numbers'], issues.loc['mixed_zones']
        assert (text.symbol, text['count']) == ('B', 2)
        assert text['first'] == [pd.Timestamp('2024-01-01 05:00'), pd.Timestamp('2024-01-01 11:00')]
        assert (zone.symbol, zone['count'], zone['first']) == ('A', 1, [pd.Timestamp('2024-01-01 07:00')])
    assert '2 cells' in read_report(read).notes[0]
    assert '2 cells' not in read_report(read_klines(tmp_path, symbols='A')).notes[0]
    for rest in (repair_klines(read)[0], read[read.symbol == 'A']): # the bars are gone, and the issue with them
        assert 'not_numbers' not in set(check_klines(rest).issues['rule'])

def test_clean_bars_have_no_issues():
    report = check_klines(frame(500), window=100)
    assert report.ok and not len(report.issues) and report.summary.coverage[0] == 1

@pytest.mark.parametrize('rule', ['nan', 'inf', 'duplicate', 'disorder', 'price_not_positive', 'high_low',
                                  'negative_volume', 'bad_timestamp'])
@pytest.mark.parametrize('policy', [{}, dict(nan='ffill', duplicates='first', high_low='drop', volume='drop')])
def test_repair_leaves_no_error_and_lists_the_change(rule, policy):
    bars = SPOILT[rule]()
    before = bars.copy()
    fixed, changes = repair_klines(bars, **policy)
    assert check_klines(fixed).ok and len(changes) and set(changes['rule']) <= {rule, 'high_low'}
    pd.testing.assert_frame_equal(bars, before)
    assert len(fixed) == len(bars) - (changes.action == 'dropped').sum()
    WindowDataset(fixed, 10, 2)

def test_changes_reproduce_the_result():
    bars = together(SPOILT['high_low'](), SPOILT['negative_volume']().assign(symbol='Y'))
    fixed, changes = repair_klines(bars)
    redone = bars.set_index(['symbol', 'timestamps'])
    for change in changes.itertuples():
        cell = (change.symbol, change.timestamps), change.column
        assert redone.loc[cell] == change.old
        redone.loc[cell] = change.new
    assert redone.reset_index().equals(fixed)

def test_short_symbols_are_dropped_on_request():
    fixed, changes = repair_klines(together(frame(50, 'A'), frame(5, 'B')), min_bars=10)
    assert set(fixed.symbol) == {'A'} and len(changes) == 5

def test_outliers_of_volume_are_limited_and_listed():
    bars = together(frame(200, 'A'), frame(200, 'B', seed=1))
    bars.loc[150, 'volume'] *= 1e7
    bars.loc[350, ['volume', 'amount']] *= 1e7
    fixed, changes = repair_klines(bars, winsorise_volume=8, winsorise_window=50)
    assert set(changes['rule']) == {'winsorise_volume'} and set(changes.action) == {'limited'}
    assert changes[['symbol', 'column']].values.tolist() == [['A', 'volume'], ['B', 'volume'], ['B', 'amount']]
    change = changes.set_index(['symbol', 'column']).loc[('B', 'amount')]
    assert change.old == bars.amount[350] and change.new == fixed.amount[350] < bars.amount[350]
    assert fixed[list(PRICES)].equals(bars[list(PRICES)]) and not len(repair_klines(bars)[1])

@pytest.mark.parametrize('settings,name', [
    (dict(winsorise_volume=0), 'winsorise_volume'), (dict(winsorise=-1), 'winsorise'),
    (dict(winsorise=5, winsorise_window=2), 'winsorise_window'), (dict(nan='fill'), 'nan')])
def test_bad_policies(settings, name):
    with pytest.raises(ConfigError, match=name): repair_klines(frame(), **settings)

def test_scales_say_why_they_are_not_computed():
    for bars, why in ((frame(20), '20'), (frame(200).assign(close=np.nan), 'NaN')):
        assert why in with_scales(check_klines(bars), 50).sections[0].text
    assert not with_scales(check_klines(frame().drop(columns='low')), 5).sections

def test_scales_do_not_mix_interleaved_symbols():
    mixed = pd.concat([frame(100, 'A', seed=0), frame(100, 'B', seed=1)]).sort_values('timestamps', kind='stable')
    tables = [with_scales(check_klines(bars), 60).sections[0].table for bars in (mixed, read_klines(mixed))]
    pd.testing.assert_frame_equal(*tables)

def session_stamps(freq, hours):
    "UTC stamps of half a year in New York: some hours of each weekday, a long holiday, a change of the clock"
    t = pd.date_range('2024-01-01', '2024-06-01', freq=freq, tz='America/New_York')
    hour = t.hour + t.minute/60
    t = t[(t.day_of_week < 5) & np.any([(hour >= a) & (hour < b) for a, b in hours], 0)]
    return t[~((t >= '2024-02-09') & (t < '2024-02-19'))].tz_convert('UTC').tz_localize(None)

@pytest.mark.parametrize('freq,hours', [
    ('5min', ((9.5, 16),)), ('5min', ((9.5, 11.5), (13, 15))), ('h', ((0, 24),)), ('1min', ((18, 24), (0, 17)))])
def test_sessions_are_no_gaps_and_holes_are(freq, hours):
    t = session_stamps(freq, hours)
    assert not len(find_gaps(t))
    inside = np.flatnonzero(np.diff(t) == np.diff(t).min())[len(t)//3] + 3
    assert len(find_gaps(t.delete(range(inside, inside + 3)))) == 1

def test_reports_can_be_saved(tmp_path):
    report = with_scales(check_klines(sample_klines('DOGEUSDT')), 60, 10)
    text = report.save(tmp_path).read_text()
    assert 'DOGEUSDT' in text and '## Scales' in text
    assert {o.name for o in (tmp_path/'plots').iterdir()} == {'data.png', 'scales.png'}

def test_empty_frames():
    none = frame().head(0)
    assert not check_klines(none).ok and not len(repair_klines(none)[0]) and not len(read_klines(none))
    with pytest.raises(DataError): WindowDataset(none, 5, 1)

def test_the_check_command_exits_by_what_it_finds(tmp_path, capsys):
    frame(300).to_csv(tmp_path/'good.csv', index=False)
    SPOILT['nan']().to_csv(tmp_path/'bad.csv', index=False)
    SPOILT['missing_column']().to_csv(tmp_path/'worse.csv', index=False)
    def check(name, *more):
        code = main(['check', str(tmp_path/f'{name}.csv'), '--lookback-window', '60', *more])
        return code, capsys.readouterr().out
    code, out = check('good', '--out', str(tmp_path/'out'))
    assert code == 0 and 'clipped_median_mad' in out and (tmp_path/'out'/'plots'/'scales.png').is_file()
    code, out = check('bad')
    assert code == 1 and '| nan | error | X |' in out
    code, out = check('worse')
    assert code == 1 and 'low' in out

# Windows

@both_normalizers
@both_statistics
def test_batch_equals_stacked_items(norm, statistics):
    dataset = WindowDataset(sample_klines('DOGEUSDT'), 50, 7, norm, stride=9, statistics=statistics)
    batch = dataset.batch(range(len(dataset)))
    for i in range(len(dataset)):
        one = dataset[i]
        for k in ('hist_features', 'hist_timestamps', 'pred_features', 'pred_timestamps'):
            assert torch.equal(one[k], batch[k][i])
        for k, v in one['stats'].items(): assert torch.equal(v, batch['stats'][k][i])
    assert batch['hist_features'].dtype == torch.float32 and batch['hist_timestamps'].dtype == torch.int64

def calendar_of(t): return [t.minute, t.hour, t.to_pydatetime().weekday(), t.day, t.month]

@both_normalizers
@both_statistics
def test_windows_are_the_bars(norm, statistics):
    bars = together(frame(40, 'A'), frame(30, 'B', seed=1), frame(5, 'C')).drop(index=[20]).reset_index(drop=True)
    dataset = WindowDataset(bars, 6, 2, norm, stride=2, statistics=statistics)
    x, seen = bars[list(FEATURES)].to_numpy(), set()
    for i in range(len(dataset)):
        symbol, first, future = dataset.where(i)
        at = bars.index[(bars.symbol == symbol) & (bars.timestamps == first)][0]
        rows = bars.iloc[at:at + 8]
        assert rows.symbol.nunique() == 1 and rows.timestamps.diff().dropna().nunique() == 1
        assert rows.timestamps.iloc[6] == future
        z, stamps, _ = dataset.arrays([i])
        np.testing.assert_allclose(z[0], norm.fit(x[at:at + 8], 6).encode(x[at:at + 8]), atol=2e-6)
        assert stamps[0].tolist() == [calendar_of(t) for t in rows.timestamps]
        seen.add(at)
    parts = (20, 19, 30) # A is cut where its bar is missing
    assert len(seen) == len(dataset) == sum((n - 8)//2 + 1 for n in parts) and dataset.symbols == ['A', 'B']

def test_zscore_is_the_reference_formula():
    x = sample_klines('AAPL')[list(FEATURES)].to_numpy()[:100].astype(np.float32)
    past = x[:90]
    want = np.clip((x - past.mean(0)) / (past.std(0) + 1e-5), -5, 5)
    np.testing.assert_allclose(ZScore().fit(x, 90).encode(x.astype('f8')), want, atol=2e-5)

@both_normalizers
@pytest.mark.parametrize('scale', [1e-12, 1., 1e12])
def test_rolling_equals_fit_on_hard_numbers(norm, scale):
    x = np.random.default_rng(0).normal(size=(300, 4)).cumsum(0)*1e-3 + 1e3
    x[100, 1], x[:, 2], x[50:120, 3] = 1e9, 7., 5.
    x *= scale
    windows = np.lib.stride_tricks.sliding_window_view(x, 37, axis=0).transpose(0, 2, 1)
    fitted = norm.fit(windows, 37)
    loc, size = (np.concatenate(parts) for parts in zip(*[o[1:] for o in norm.rolling(x, 37, block=50)]))
    np.testing.assert_allclose(loc, fitted.loc, rtol=1e-12)
    np.testing.assert_allclose(size, fitted.scale, rtol=1e-7)

@both_normalizers
def test_float_extremes_are_errors_not_nan(norm):
    x = np.ones((10, 6))
    x[3, 2] = np.inf
    with pytest.raises(DataError): norm.fit(x, 10)
    assert np.isfinite(norm.fit(np.full((10, 6), 1e150), 10).scale).all()

@pytest.mark.parametrize('lookback', [1, 2, 3, 50, 51])
def test_compiled_medians_are_the_sorted_ones(lookback):
    pytest.importorskip('numba')
    r = np.random.default_rng(0)
    for x in (r.normal(size=(500, 2)).cumsum(0), r.integers(0, 4, (500, 2))*1., np.zeros((200, 2))):
        pairs = zip(_rolling_mad(x, lookback), _rolling_mad(x, lookback, _compiled_mad()))
        assert all((a == b).all() for a, b in pairs)

@pytest.mark.parametrize('norm', [ZScore(), MedianMAD(clip=2.1)])
def test_compiled_windows_are_the_same_bits(norm, monkeypatch):
    pytest.importorskip('numba')
    def dataset(): return WindowDataset(sample_klines(['AAPL', 'FB']), 50, 7, norm, stride=3, statistics='rolling')
    plain = dataset()
    monkeypatch.setattr(window, 'compiles', lambda n: True)
    compiled = dataset()
    assert compiled.compiled and 'compiled' in repr(compiled)
    for rows in ([0], range(len(plain)), [-1, 5]): assert same_batch(plain.batch(rows), compiled.batch(rows))

def test_a_dataset_pickles_small():
    dataset = WindowDataset(sample_klines('AAPL'), 90, 10)
    dataset.batch([1])
    data = pickle.dumps(dataset)
    assert len(data) < 4*dataset.x.nbytes and same_batch(pickle.loads(data).batch([7]), dataset.batch([7]))

def test_split_covers_every_bar_once():
    bars = together(frame(100, 'A'), frame(37, 'B'), frame(3, 'C'))
    split = split_by_time(bars)
    parts = pd.concat([split.train, split.val, split.test])
    assert parts.sort_values(['symbol', 'timestamps'], ignore_index=True).equals(bars)
    apart = split_by_time(bars, embargo=5, by='symbol')
    lost = sum(min(5, a) + min(5, b) for a, b in ((70, 15), (25, 6), (2, 0)))
    assert len(apart.train) + len(apart.val) + len(apart.test) == len(bars) - lost
    assert split_by_date(bars, '2024-01-03').test.empty

# Sampling

def batches(sampler, epoch=0): return [sampler.batch(epoch, i) for i in range(len(sampler))]

@pytest.fixture(scope='module')
def dataset():
    return WindowDataset(together(frame(100, 'A'), frame(40, 'B'), frame(30, 'C')), 10, 2)

@pytest.mark.parametrize('n', [1, 2, 3, 5, 64, 97, 1000])
def test_permutations(n):
    different = {tuple(permute(np.arange(n), n, k)) for k in range(200)}
    assert len(different) >= min(n**2//4 + 1, 100) or n < 3
    for k in range(20): assert sorted(permute(np.arange(n), n, k)) == list(range(n))

def test_permutations_look_uniform():
    n = 97
    p = np.stack([permute(np.arange(n), n, k) for k in range(2000)])
    counts = np.stack([np.bincount(p[:, j], minlength=n) for j in range(n)])
    chi = ((counts - 2000/n)**2 / (2000/n)).sum(1)
    assert chi.mean()/(n - 1) == pytest.approx(1, abs=.05) and chi.max() < (n - 1)*1.8
    neighbours = np.array([np.corrcoef(row[:-1], row[1:])[0, 1] for row in p])
    assert abs(neighbours.mean()) < .02

@pytest.mark.parametrize('mode', ['shuffled', 'sequential', 'balanced'])
@pytest.mark.parametrize('drop_last', [True, False])
def test_ranks_share_the_epoch_without_repeats(dataset, mode, drop_last):
    whole = batches(BatchSampler(dataset, 12, 5, mode, drop_last=drop_last), 3)
    parts = [batches(BatchSampler(dataset, 4, 5, mode, drop_last=drop_last, rank=r, world_size=3), 3) for r in range(3)]
    for step, batch in enumerate(whole): assert sorted(batch) == sorted(np.concatenate([p[step] for p in parts]))
    if mode == 'balanced': return
    seen = np.concatenate(whole)
    assert len(set(seen)) == len(seen) and (drop_last or sorted(seen) == list(range(len(dataset))))

def test_a_stream_visits_all_before_any_again(dataset):
    sampler, n = BatchSampler(dataset, 10, 1, samples_per_epoch=30), len(dataset)
    seen = np.concatenate([b for e in range(10) for b in batches(sampler, e)])
    first, second = seen[:n], seen[n:2*n]
    assert sorted(first) == sorted(second) == list(range(n)) and len(sampler) == 3
    assert not np.array_equal(first, second)

def test_balanced_gives_every_symbol_its_share(dataset):
    seen = np.concatenate(batches(BatchSampler(dataset, 9, 1, 'balanced', samples_per_epoch=900)))
    symbol = np.searchsorted(dataset.offsets, seen, 'right') - 1
    assert np.bincount(symbol).tolist() == [300]*3

def test_epochs_seeds_and_steps_differ(dataset):
    one, two = BatchSampler(dataset, 10, 1), BatchSampler(dataset, 10, 2)
    assert not np.array_equal(one.batch(0, 0), one.batch(1, 0))
    assert not np.array_equal(one.batch(0, 0), two.batch(0, 0))
    with pytest.raises(IndexError): one.batch(0, len(one))

@pytest.mark.parametrize('settings,name', [
    (dict(batch_size=0), 'batch_size'), (dict(mode='random'), 'mode'), (dict(rank=2, world_size=2), 'rank'),
    (dict(samples_per_epoch=0), 'samples_per_epoch'), (dict(mode='sequential', samples_per_epoch=5), 'sequential'),
    (dict(batch_size=10**6), 'batch_size')])
def test_bad_samplers(dataset, settings, name):
    with pytest.raises(ConfigError, match=name): BatchSampler(dataset, **dict(batch_size=4) | settings)

@pytest.mark.parametrize('workers', [0, 2])
def test_items_drop_into_a_plain_loader(dataset, workers):
    order = np.random.default_rng(0).permutation(len(dataset))
    how = dict(batch_size=16, num_workers=workers, generator=torch.Generator())
    got = list(DataLoader(dataset, sampler=order.tolist(), **how))
    assert len(got) == -(-len(dataset)//16)
    assert torch.equal(torch.cat([b['window_idx'] for b in got]), torch.from_numpy(order))
    for i, batch in enumerate(got): assert same_batch(batch, dataset.batch(order[16*i:16*i + 16]))

@pytest.mark.parametrize('workers', [0, 1, 2])
def test_any_number_of_workers_gives_the_same_bits(dataset, workers):
    sampler = BatchSampler(dataset, 8, 3)
    got = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers, generator=torch.Generator())
    for i, batch in enumerate(got): assert same_batch(batch, dataset.batch(sampler.batch(0, i)))

def test_augmentation_has_an_address(dataset):
    augment, rows = Augment(.1, (.5, 1.5), .2, 4), np.arange(20)
    whole = augment.fetch(dataset, rows, 3, 5)
    for i in (0, 7, 19):
        assert torch.equal(augment.fetch(dataset, [i], 3, 5)['hist_features'][0], whole['hist_features'][i])
    for seed, epoch in ((4, 5), (3, 6)):
        assert not torch.equal(augment.fetch(dataset, rows, seed, epoch)['pred_features'], whole['pred_features'])
    assert whole['hist_features'].abs().max() <= 5

def test_augmentation_leaves_its_input(dataset):
    rows = np.arange(20)
    clean = dataset.batch(rows)
    before = clean['hist_features'].clone()
    Augment(.1)(clean, 0, 0, rows)
    assert torch.equal(clean['hist_features'], before)

def test_shifts_stay_inside_the_segment(dataset):
    rows = np.arange(len(dataset))
    at = dataset.rows(rows, Augment(time_shift_max=1000).shifts(0, 0, rows))
    segment = np.searchsorted(dataset.offsets, rows, 'right') - 1
    assert (at >= dataset.starts[segment]).all() and (at + dataset.window <= dataset.ends[segment]).all()
