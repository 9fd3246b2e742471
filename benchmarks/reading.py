"""Reading: one large csv of many tickers, and thousands of small files, against pandas.

    OMP_NUM_THREADS=1 python benchmarks/reading.py [--rows 2000000] [--tickers 1000] [--files 10000] [--each 250]
        [--repeats 3]

Times are of the processor, not of the wall, so that a busy machine gives the same figures. pandas reads the same
columns, parses the stamps, and for the small files concatenates them: what somebody would write who knows the
layout. The bars of the small files are also checked, and one more file gets a name that is not UTF-8. Prints Markdown.
"""
import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from kronos_nb.core import DataError
from kronos_nb.data.check import check_klines
from kronos_nb.data.read import read_klines
from kronos_nb.display import md_table

NAMES = ['date', 'ticker', 'open', 'high', 'low', 'close', 'volume', 'amount']


def synthetic(rows, tickers, seed=0):
    "Return bars of many tickers, by ticker and minute"
    r, n = np.random.default_rng(seed), rows // tickers
    close = (np.exp(r.normal(0, .001, (tickers, n)).cumsum(1)) * 100).round(4)
    spread = abs(r.normal(0, .05, (tickers, n))).round(4)
    volume = r.lognormal(8, 1, (tickers, n)).round()
    stamps = pd.date_range('2020-01-01 09:30', periods=n, freq='min').strftime('%Y-%m-%d %H:%M:%S')
    columns = (np.tile(stamps, tickers), np.repeat([f'T{i:04d}' for i in range(tickers)], n), close, close + spread,
               close - spread, close, volume, (volume * close).round(2))
    return pd.DataFrame({name: np.ravel(values) for name, values in zip(NAMES, columns)}).round(4)


def pandas_one(path):
    bars = pd.read_csv(path)
    bars['date'] = pd.to_datetime(bars['date'])
    return bars


def pandas_many(folder):
    parts = [pandas_one(f).assign(ticker=f.stem) for f in sorted(folder.glob('*.csv'))]
    return pd.concat(parts, ignore_index=True)


def seconds(f, repeats):
    "Return the least processor time of some calls"
    took = []
    for _ in range(repeats):
        begin = time.process_time()
        f()
        took.append(time.process_time() - begin)
    return min(took)


def small_files(folder, n, each) -> tuple: # Rows of the table, sentences
    "Read and check many small files, then again beside one whose name is not UTF-8"
    folder.mkdir()
    text, bars, report = synthetic(each, 1).drop(columns='ticker').to_csv(index=False), [], []
    for i in range(n):
        (folder/f'T{i:05d}.csv').write_text(text)
    ours = seconds(lambda: bars.append(read_klines(folder)), 1)
    checked = seconds(lambda: report.append(check_klines(bars[0])), 1)
    shown = seconds(lambda: report[0].to_markdown(), 1)
    theirs = seconds(lambda: pandas_many(folder), 1)
    open(os.fsencode(folder) + b'/\xff.csv', 'w').close()
    said = []

    def refused():
        try:
            read_klines(folder)
        except DataError as e:
            said.append(str(e).replace(f'{folder}/', ''))
    found = seconds(refused, 1)
    assert said, 'a name that is not UTF-8 was read'
    return [(f'{n:,} files of {each} rows', ours, theirs, ours / theirs)], [
        f'The bars of the small files: checked in {checked:.1f} s, the report as text in {shown:.1f} s.',
        f'One more file with a name that is not UTF-8: refused after {found:.2f} s ({said[0]}).']


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=2_000_000)
    p.add_argument('--tickers', type=int, default=1000)
    p.add_argument('--files', type=int, default=10_000)
    p.add_argument('--each', type=int, default=250, help='rows of a small file')
    p.add_argument('--repeats', type=int, default=3)
    a = p.parse_args()
    rows, more = [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if a.rows:
            synthetic(a.rows, a.tickers).to_csv(folder/'all.csv', index=False)
            read_klines(folder/'all.csv', max_rows=1000) # imports
            ours, theirs = (seconds(lambda: f(folder/'all.csv'), a.repeats) for f in (read_klines, pandas_one))
            rows.append((f'{a.rows:,} rows of {a.tickers:,} tickers', ours, theirs, ours / theirs))
        if a.files:
            found, more = small_files(folder/'many', a.files, a.each)
            rows += found
    print(f'{platform.machine()}, {os.environ.get("OMP_NUM_THREADS")} thread, pandas {pd.__version__}\n')
    print(md_table(pd.DataFrame(rows, columns=['what', 'read_klines, s', 'pandas, s', 'ratio'])), *more, sep='\n')


if __name__ == '__main__': main()
