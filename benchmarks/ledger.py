"""How often the alarms of a ledger are false and how soon they are right, and a month of real bars graded

    python benchmarks/ledger.py alarms                      # writes ledger.md's first table
    python benchmarks/ledger.py month --bars BARS... --model RUN --since 2024-05-16 --ledger FOLDER
"""
import argparse
import time

import numpy as np
import pandas as pd

from kronos_nb.core import np_rng
from kronos_nb.judging.metrics import crps, quantiles
from kronos_nb.judging.origins import QUANTILES
from kronos_nb.ledger import ONE_IN, Ledger, watch

H, S, SYMBOLS = 12, 50, 3
FAULTS = {   # name -> (spread of the paths, shift of every step), in true standard deviations of a step
    'none: the true distribution': (1., 0.), 'bands 15 % too narrow': (.85, 0.), 'bands 30 % too narrow': (.7, 0.),
    'bands 40 % too wide': (1.4, 0.), 'drift of 0.1 per bar': (1., .1), 'drift of 0.3 per bar': (1., .3)}


def walks(rng, n, spread=1., shift=0.):
    "Return log closes (n, SYMBOLS, S, H) of independent random walks"
    return np.cumsum(shift + spread*rng.normal(size=(n, SYMBOLS, S, H)).astype(np.float32), -1)


def truth(rng, n):
    "Return log closes (n, SYMBOLS, H); symbols share half of their variance"
    common, own = rng.normal(size=(n, 1, H)), rng.normal(size=(n, SYMBOLS, H))
    return np.cumsum((common + own)/np.sqrt(2), -1)


def rows_of(name, paths, y, dates):
    "Return graded rows as a ledger holds them"
    n = len(y)
    q = np.exp(quantiles(paths/100)).transpose(0, 1, 3, 2).reshape(-1, len(QUANTILES))
    ahead = pd.to_timedelta(np.arange(1, H + 1), unit='h').to_numpy()
    stamps = np.broadcast_to(dates[:, None, None] + ahead, (n, SYMBOLS, H))
    scores = crps(np.exp(paths/100), np.exp(y/100)).ravel()
    frame = dict(model=name, origin=np.repeat(dates, SYMBOLS*H), timestamps=stamps.ravel(), crps=scores,
                 y=np.exp(y/100).ravel())
    return pd.DataFrame(frame | dict(zip(QUANTILES, q.T))) if n else pd.DataFrame()


def simulate(fault, seed, n):
    "Return the alarms of `n` dates: the first of each kind, or None"
    rng = np_rng(seed, 'ledger', fault)
    dates = (pd.Timestamp('2024-01-01') + pd.to_timedelta(np.arange(n)*H, unit='h')).to_numpy()
    y = truth(rng, n)
    parts = [rows_of('model', walks(rng, n, *FAULTS[fault]), y, dates)]
    parts += [rows_of(f'naive {i}', walks(rng, n), y, dates) for i in range(2)]
    watched = watch(pd.concat(parts, ignore_index=True), S)
    assert len(watched) == n
    hit = {k: watched[k].to_numpy() >= ONE_IN for k in ('bands', 'skill')}
    return {k: int(v.argmax()) + 1 if v.any() else None for k, v in hit.items()}


def alarms(repeats, n):
    "Print the share of simulations with an alarm, and its median date"
    out = []
    for fault in FAULTS:
        k = repeats if fault.startswith('none') else max(repeats//5, 1)
        found = pd.DataFrame([simulate(fault, seed, n) for seed in range(k)], dtype=float)
        line = {'fault': fault, 'dates': k*n}
        for name, text in (('bands', 'recalibrate'), ('skill', 'stop trusting')):
            line[f'{text}: alarms'] = f'{int(found[name].notna().sum())} of {k}'
            line[f'{text}: median date'] = f'{found[name].median():.0f}' if found[name].notna().mean() >= .5 else 'none'
        out.append(line)
        print(line, flush=True)
    return pd.DataFrame(out)


def month(files, model, since, folder, hours, paths):
    "Replay forecasts of every `hours` since a date, append, grade, and return the ledger"
    from kronos_nb.data.read import read_klines
    from kronos_nb.forecast import Forecaster
    f, ledger = Forecaster.from_pretrained(model), Ledger(folder)
    bars = read_klines(files, start=pd.Timestamp(since) - pd.Timedelta('40D'))
    L, H = f.lookback_window, f.predict_window
    groups = {s: g.reset_index(drop=True) for s, g in bars.groupby('symbol')}
    stamps = groups[next(iter(groups))].timestamps
    begun = time.process_time()
    for i in np.flatnonzero(stamps >= pd.Timestamp(since))[::hours]:
        if i + H >= len(stamps):
            break
        cut = [g.iloc[i - L + 1:i + 1] for g in groups.values()]
        keys = [f'{s} {stamps[i]}' for s in groups]
        ledger.append(f.predict_many(cut, H, keys=keys, paths=paths, progress=False), f)
    forecast_at = time.process_time()
    print(ledger.grade(bars))
    graded_at = time.process_time()
    report = ledger.report()
    print(report.to_markdown())
    print(f'CPU: forecasts {forecast_at - begun:.0f} s, grades {graded_at - forecast_at:.0f} s, '
          f'report {time.process_time() - graded_at:.0f} s')
    return report


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('what', choices=('alarms', 'month'))
    p.add_argument('--repeats', type=int, default=100)
    p.add_argument('--dates', type=int, default=1000)
    p.add_argument('--bars', nargs='+')
    p.add_argument('--model')
    p.add_argument('--since', default='2024-05-16')
    p.add_argument('--ledger', default='ledger')
    p.add_argument('--hours', type=int, default=3)
    p.add_argument('--paths', type=int, default=50)
    p.add_argument('--picture')
    a = p.parse_args()
    if a.what == 'alarms':
        from kronos_nb.display import md_table
        print(md_table(alarms(a.repeats, a.dates)))
    else:
        found = month(a.bars, a.model, a.since, a.ledger, a.hours, a.paths)
        if a.picture:
            from kronos_nb.display import save_figure
            save_figure(found.plot(), a.picture)
