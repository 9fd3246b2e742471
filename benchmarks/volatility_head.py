"""Does a small head on the frozen predictor know more of the coming volatility than the paths do?

    OMP_NUM_THREADS=1 python benchmarks/volatility_head.py shares --data djia31_daily_2006_2017.csv.gz
    OMP_NUM_THREADS=1 python benchmarks/volatility_head.py pairs --data pairs_1h BTCUSDT_1h.parquet DOGEUSDT_1h.parquet
    OMP_NUM_THREADS=1 python benchmarks/volatility_head.py currency --data EURUSD_1h.csv

Models, bars and periods are those of gain.py, which must have run before (--runs: where). The head gives 20 quantiles
of the log of the realised volatility over the horizon, beside that of the lookback. It reads the predictor's state
after the last bar (`hidden`), a few statistics of the lookback that need no model (`statistics`: the control), or
both. It is trained by pinball loss on the bars that trained the models; validation chooses its width, its weight decay
and its epoch; three starts are averaged. The judged bars, dates (64, two symbols each in turns) and the score are
those of `evaluate`: the CRPS of the realised volatility in mean moves. `raw` and `delivered` are the volatility of the
paths themselves.

Writes volatility_head.csv beside this file, a row per forecast; models that are there are not judged again.
"""
import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gain import MARKETS, read
from torch import nn

from kronos_nb.core import np_rng, seed_everything
from kronos_nb.data.window import WindowDataset
from kronos_nb.evaluate import evaluate
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import GeometricBrownian, default_baselines
from kronos_nb.judging.calibrate import calibrate
from kronos_nb.judging.evaluation import skill
from kronos_nb.judging.metrics import crps

OUT = Path(__file__).with_suffix('.csv')
LEVELS = (np.arange(20) + .5)/20
READS = dict(hidden=('hidden',), statistics=('statistics',), both=('hidden', 'statistics'))
RIVALS = ('raw', 'delivered', 'Garch', 'EWMA')
MOST, PER_DATE = 6000, 2   # windows that train; symbols of each date, in turns


# windows: what is known at the last bar, and what came
def log_rms(r, n): return .5*np.log(np.maximum((r[:, -n:]**2).mean(1), 1e-12))


def statistics_of(bars, r):
    "Return what needs no model, of lookbacks: bars (N, L, 6), log returns (N, L-1), beside the volatility of all"
    reach = np.log(np.maximum(bars[..., 1]/bars[..., 2], 1 + 1e-6))
    decay = .94**np.arange(r.shape[1])[::-1]
    ewma = .5*np.log(np.maximum((r**2*decay).sum(1)/decay.sum(), 1e-12))
    out = [ewma, *(log_rms(r, n) for n in (1, 5, 20)), *(np.log(reach[:, -n:].mean(1)) for n in (1, 5, 20, r.shape[1]))]
    return np.stack(out, 1) - log_rms(r, r.shape[1])[:, None]


def clock_of(stamps):
    "Return hour and weekday of the last bars"
    hour, day = stamps[:, 1]/24, stamps[:, 2]/7
    return np.stack([f(2*np.pi*o) for o in (hour, day) for f in (np.sin, np.cos)], 1)


@torch.no_grad()
def hidden_of(f, data, rows):
    "Return the state of the predictor after the last bar of lookbacks, (N, D)"
    L, out = data.lookback_window, []
    for i in range(0, len(rows), 256):
        x, stamps, _ = data.arrays(rows[i:i + 256])
        s1, s2 = f.tokenizer.encode(x[:, :L], half=True)
        out.append(f.predictor.decode_s1(s1.long(), s2.long(), stamps[:, :L])[1][:, -1])
    return torch.cat(out).numpy()


def known_of(f, data, rows):
    "Return what heads read of windows, the log volatility of the horizon beside that of the lookback, and the latter"
    L, H, at = data.lookback_window, data.predict_window, data.rows(rows)
    bars = data.x[at[:, None] + np.arange(L + H)]
    r = np.diff(np.log(bars[..., 3]), axis=1)
    unit = log_rms(r[:, :L - 1], L - 1) + .5*np.log(H)
    came = .5*np.log(np.maximum((r[:, L - 1:]**2).sum(1), 1e-12))
    simple = np.concatenate([statistics_of(bars[:, :L], r[:, :L - 1]), clock_of(data.stamps[at + L - 1])], 1)
    return dict(hidden=hidden_of(f, data, rows), statistics=simple), np.clip(came - unit, -4, 4), unit


def parts_of(data, market, symbols):
    "Return the windows that train and those that choose"
    at = data.rows(np.arange(len(data)))
    first, last = (data.timestamps[at + o] for o in (data.lookback_window, data.window - 1))
    mine = np.isin(symbols[at], market.targets)
    train = np.flatnonzero(last < np.datetime64(market.begin))
    val = np.flatnonzero(mine & (first >= np.datetime64(market.begin)) & (last < np.datetime64(market.test)))
    return train[::max(1, len(train)//MOST)], val[::max(1, len(val)//1500)]


def windows_at(data, symbols, origins):
    "Return the windows whose lookback ends at origins, in their order"
    at = data.rows(np.arange(len(data)))
    ends = pd.MultiIndex.from_arrays([symbols[at], data.timestamps[at + data.lookback_window - 1]])
    return ends.get_indexer(pd.MultiIndex.from_frame(origins[['symbol', 'origin']]))


# heads
def loss_of(q, y):
    "Return the mean pinball loss of quantiles (N, 20)"
    level = torch.from_numpy(LEVELS).float()
    return (((y[:, None] < q).float() - level)*(q - y[:, None])).mean()


def fitted(x, y, val, width, decay, seed, epochs=20):
    "Return a head at its best epoch on validation, and its loss there"
    seed_everything(seed)
    size, best = x.shape[1], (np.inf, None)
    layers = [nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 20)] if width else [nn.Linear(size, 20)]
    head = nn.Sequential(*layers)
    opt = torch.optim.AdamW(head.parameters(), 2e-3, weight_decay=decay)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(512):
            opt.zero_grad()
            loss_of(head(x[rows]), y[rows]).backward()
            opt.step()
        with torch.no_grad(): loss = float(loss_of(head(val[0]), val[1]))
        if loss < best[0]: best = loss, [p.detach().clone() for p in head.parameters()]
    with torch.no_grad():
        for p, o in zip(head.parameters(), best[1]): p.copy_(o)
    return best[0], head


def chosen(x, y, val):
    "Return three heads of the width and decay that validation chose, and what they are"
    tried = {(w, d): [fitted(x, y, val, w, d, seed) for seed in range(3)]
             for w, d in itertools.product((0, 32), (1e-3, .3))}
    best = min(tried, key=lambda k: np.mean([loss for loss, _ in tried[k]]))
    return [head for _, head in tried[best]], f'width {best[0]}, decay {best[1]:g}'


def quantiles_by(name, known, known_val, known_test):
    "Return quantiles (N, 20) of the windows of the test, and how the head was chosen"
    def joined(o): return np.concatenate([o[0][k] for k in READS[name]], 1)
    x = joined(known)
    mean, std = x.mean(0), x.std(0) + 1e-6
    def tensors(o): return torch.from_numpy((joined(o) - mean)/std).float(), torch.from_numpy(o[1]).float()
    heads, how = chosen(*tensors(known), tensors(known_val))
    with torch.no_grad(): q = torch.stack([h(tensors(known_test)[0]) for h in heads]).mean(0)
    return np.sort(q.numpy(), 1), how


def scores(q, unit, came, size):
    "Return the CRPS of the volatility of each window in mean moves, as `evaluate` scores paths"
    draws, ends = np_rng(0, 'volatility').random(2000), (1.5*q[:, :1] - .5*q[:, 1:2], 1.5*q[:, -1:] - .5*q[:, -2:-1])
    x = np.stack([np.interp(draws, np.r_[0, LEVELS, 1], o) for o in np.concatenate([ends[0], q, ends[1]], 1)])
    return crps(np.exp(x + unit[:, None])[..., None], np.exp(came + unit)[:, None])[:, 0]/size


# judging
def ways(f, market, bars, seed):
    "Yield the paths as they are drawn, and as they are delivered after a calibration on validation"
    known = bars[bars.timestamps < market.test].reset_index(drop=True)
    yield 'raw', f._raw()
    how = dict(origins=48, per_date=PER_DATE, seed=seed)
    cal = calibrate(f, known, *market.windows, start=pd.Timestamp(market.begin), **how)
    yield 'delivered', Forecaster(f.tokenizer, f.predictors, calibration=cal)


def judged_paths(f, market, bars, seed):
    "Return the volatility score of each path forecast and baseline at each origin, and the evaluation"
    L, H = market.windows
    out = {}
    for name, way in ways(f, market, bars, seed):
        some = default_baselines(bars, L) if name == 'delivered' else [GeometricBrownian()]
        e = evaluate(way, bars, L, H, start=pd.Timestamp(market.test), origins=64, per_date=PER_DATE, paths=100,
                     seed=seed, used={}, baselines=some, progress=False)
        last = e.rows[e.rows.h == H].replace(dict(model=dict(model=name)))
        out |= {k: g for k, g in last.groupby('model')}
    return {k: g for k, g in out.items() if k in ('raw', 'delivered', *e.baselines)}, e


def rows_of(losses, e, how, cover):
    "Return a row for each forecast, with its skill against paths and naive forecasts"
    naive = [k for k in losses if k in e.baselines]
    best = min(naive, key=lambda k: losses[k].mean())
    for name, loss in losses.items():
        row = dict(forecast=name, crps=loss.mean(), best_naive=best, chosen=how.get(name), cover_80=cover.get(name))
        for rival in (*RIVALS, 'best'):
            t = skill(loss, losses[best if rival == 'best' else rival], *e._how)
            row |= {f'{rival}_{k}': t[k] for k in ('skill', 'low', 'high')}
        yield row


def judge(market, folder, bars, seed) -> list:
    "Return a row for each forecast of the volatility"
    f, mine = Forecaster.from_pretrained(folder), bars[bars.symbol.isin(market.targets)].reset_index(drop=True)
    paths, e = judged_paths(f, market, mine, seed)
    data = WindowDataset(bars, *market.windows, f.normalizer, features=f.features, market_tz=f.market_tz)
    symbols, origins = bars.symbol.to_numpy(str), paths['delivered']
    test = windows_at(data, symbols, origins)
    assert (test >= 0).all()
    known, known_val, known_test = (known_of(f, data, rows) for rows in (*parts_of(data, market, symbols), test))
    losses = {k: g.groupby('date').crps_volatility.mean() for k, g in paths.items()}
    how, cover, unit = {}, {}, known_test[2]
    size = (origins.scale/origins['last']).to_numpy()*market.windows[1]**.5
    for name in READS:
        q, how[name] = quantiles_by(name, known, known_val, known_test)
        each = scores(q, unit, known_test[1], size)
        losses[name] = pd.Series(each).groupby(origins.date.to_numpy()).mean()
        cover[name] = float(((q[:, 1:3].mean(1) <= known_test[1]) & (known_test[1] <= q[:, 17:19].mean(1))).mean())
    return list(rows_of(losses, e, how, cover))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('market', choices=MARKETS)
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--runs', type=Path, default=Path('runs/gain'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    market, done = MARKETS[args.market], pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    bars = read(args.data, market)
    for seed, model, normalizer in itertools.product(args.seeds, ('tuned', 'base'), ('zscore', 'last_close')):
        key = dict(market=args.market, normalizer=normalizer, seed=seed, model=model)
        if any(all(o[k] == v for k, v in key.items()) for o in done): continue
        place = market.base if market.base and model == 'base' else args.market
        new = judge(market, args.runs/f'{place}-{normalizer}-{seed}'/model, bars, seed)
        done += [key | o for o in new]
        pd.DataFrame(done).to_csv(OUT, index=False, float_format='%.5g')
        print(pd.DataFrame(new).round(3).to_string(), flush=True)


if __name__ == '__main__': main()
