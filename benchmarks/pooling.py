"""When should a pool do without the model, and how strongly be drawn to equal shares: on validation bars alone

    OMP_NUM_THREADS=1 python benchmarks/pooling.py shares --data djia31_daily_2006_2017.csv.gz [--seeds 0 1 2]
    OMP_NUM_THREADS=1 python benchmarks/pooling.py pairs --data pairs_1h BTCUSDT_1h.parquet DOGEUSDT_1h.parquet

Models are those of `gain.py MARKET --normalizers zscore --difference-weight 4`, made before. Their validation dates are
cut: some teach drift, spread and shares, all others judge. Either half teaches, or twelve dates in a row, as many as
small files have. No bar of the judged period is used. Every rule has the same drift and spread; `crps` is the mean over
the judged dates, in units of the mean member. Rows go to pooling.csv beside this file.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from gain import MARKETS, folder_name, read
from kronos_nb.decode.calibration import POOLS, centred, stretched
from kronos_nb.forecast import Forecaster
from kronos_nb.judging import calibrate as c
from kronos_nb.judging.origins import range_unit, volume_size
from kronos_nb.settings import Sampling

OUT = Path(__file__).with_suffix('.csv')
NORMALIZER, WEIGHT, FEW = 'zscore', 4., 12


def best_alone(a, d): return int(np.argmin(a[1:] - np.diag(d)[1:]/2)) + 1


def without_model(a, d, pull): return np.concatenate([[0.], c._best_shares(a[1:], d[1:, 1:], pull)])


def single(a, i): return np.eye(len(a))[i]


def aside(a, d, pull, margin=0.):
    "Return the pool with the model only where it beats that without, by a share of its CRPS"
    w, rest = c._best_shares(a, d, pull), without_model(a, d, pull)
    return w if c._pool_crps(w, a, d) < (1 - margin)*c._pool_crps(rest, a, d) else rest


def best_if_worse(a, d, pull):
    "Return the best naive forecast alone where the pool is worse than that"
    w, naive = c._best_shares(a, d, pull), single(a, best_alone(a, d))
    return w if c._pool_crps(w, a, d) < c._pool_crps(naive, a, d) else naive


def aside_if_worse(a, d, pull):
    "Return the pool without the model where that with it is worse than the best naive forecast"
    w, naive = c._best_shares(a, d, pull), single(a, best_alone(a, d))
    return w if c._pool_crps(w, a, d) < c._pool_crps(naive, a, d) else without_model(a, d, pull)


RULES = {
    'pool': lambda a, d, n: c._best_shares(a, d, 2/n),
    'pull 0.25': lambda a, d, n: c._best_shares(a, d, .25/n),
    'pull 0.5': lambda a, d, n: c._best_shares(a, d, .5/n),
    'pull 1': lambda a, d, n: c._best_shares(a, d, 1/n),
    'pull 5': lambda a, d, n: c._best_shares(a, d, 5/n),
    'no model': lambda a, d, n: without_model(a, d, 2/n),
    'best naive': lambda a, d, n: single(a, best_alone(a, d)),
    'model alone': lambda a, d, n: single(a, 0),
    'aside': lambda a, d, n: aside(a, d, 2/n),
    'aside, 1 %': lambda a, d, n: aside(a, d, 2/n, .01),
    'aside if worse than the best naive': lambda a, d, n: aside_if_worse(a, d, 2/n),
    'best naive if better': lambda a, d, n: best_if_worse(a, d, 2/n),
}


def distances(members, y):
    "Return the distances of `_distances` for each window, (N, M) and (N, M, M)"
    a = np.stack([abs(o - y[:, None]).mean((1, 2)) for o in members], 1)
    d = [[c._between(o, p).mean(-1) if o is not p else c._apart(o).mean(-1) for p in members] for o in members]
    return a, np.moveaxis(np.array(d), -1, 0)


def splits(dates):
    "Yield the dates that teach"
    half = len(dates)//2
    yield 'half', dates[:half]
    yield 'half', dates[half:]
    for i in range(0, len(dates) - FEW + 1, FEW): yield 'few', dates[i:i + FEW]


class Draws:
    "What a model and the naive forecasts draw at the validation dates of its market"
    def __init__(self, market, bars, folder, seed):
        L, H = market.windows
        known = bars[(bars.timestamps < market.test) & bars.symbol.isin(market.targets)].reset_index(drop=True)
        self.windows = c._windows(known, L, H, market.dates[0], pd.Timestamp(market.begin), None, 'auto', None)
        self.samplings = [Sampling(100, seed, t, 0, p) for t, p in c.GRID]
        self.drawn = c._drawn(Forecaster.from_pretrained(folder), self.windows, self.samplings)
        self.naive = c._naive(self.windows, self.samplings[0])
        self.dates = self.windows.origins['date'].to_numpy()
        self.last = np.array([[h['close'].iloc[-1]] for h in self.windows.histories], np.float64)
        self.scale = self.windows.origins['scale'].to_numpy()[:, None]

    def closes(self, teach, n):
        "Return members and outcome, with drift and spread learnt at the dates that teach"
        y = self.windows.y
        i, drift, spread, _ = c._best_drawing(self.drawn[:, 0][:, teach], y[teach], self.last[teach],
            self.scale[teach], n)
        drawn = self.drawn[i, 0]
        moved = np.stack([centred(o, float(l), drift) for o, l in zip(drawn, self.last[:, 0])])
        wide = np.stack([stretched(o, np.linspace(*spread, drawn.shape[-1])) for o in moved])
        others = [self.naive[m][0] for m in POOLS['close'] if m in self.naive]
        return i, [o/self.scale[..., None] for o in (wide, *others)], y/self.scale

    def others(self, i, kind, teach, n):
        "Return members and outcome of ranges (1) or volumes (2)"
        w = self.windows
        y, size, unit = ((w.ranges, range_unit(w), np.asarray) if kind == 1 else
            (w.volumes, volume_size(w), lambda v: np.log1p(np.maximum(v, 0))))
        size = np.where(size > 0, size, np.nan)[:, None]
        mine, y = self.drawn[i, kind]/size[..., None], y/size
        factor = c._factor(mine[teach], y[teach], unit, n)
        return [unit(factor*mine), *(unit(o[kind]/size[..., None]) for o in self.naive.values())], unit(y)


def rows_of(draws):
    "Return a row for each quantity, split and rule"
    out, all_dates = [], np.unique(draws.dates)
    for k, (kind, dates) in enumerate(splits(all_dates)):
        teach = np.isin(draws.dates, dates)
        i, closes, y = draws.closes(teach, len(dates))
        found = dict(close=(closes, y), range=draws.others(i, 1, teach, len(dates)),
            volume=draws.others(i, 2, teach, len(dates)))
        for quantity, (members, y) in found.items():
            a, d = distances(members, y)
            (a0, d0), (a1, d1) = ((a[at].mean(0), d[at].mean(0)) for at in (teach, ~teach))
            taught, judged = ((o - np.diag(p)/2).mean() for o, p in ((a0, d0), (a1, d1)))
            for rule, weigh in RULES.items():
                w = weigh(a0/taught, d0/taught, len(dates))
                out.append(dict(quantity=quantity, teach=kind, split=k, rule=rule, share=w[0],
                    crps=c._pool_crps(w, a1, d1)/judged))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('market', choices=MARKETS)
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--runs', default='runs/gain')
    args = parser.parse_args()
    market, done = MARKETS[args.market], pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    bars = read(args.data, market)
    for seed in args.seeds:
        folder = Path(args.runs)/folder_name(args.market, NORMALIZER, seed, WEIGHT)
        base = folder.parent/folder_name(market.base or args.market, NORMALIZER, seed, WEIGHT)/'base'
        for model, at in dict(base=base, tuned=folder/'tuned').items():
            key = dict(market=args.market, seed=seed, model=model)
            if any(all(o[k] == v for k, v in key.items()) for o in done): continue
            done += [key | o for o in rows_of(Draws(market, bars, at, seed))]
            done.sort(key=lambda o: (o['market'], o['seed'], o['model']))
            pd.DataFrame(done).to_csv(OUT, index=False, float_format='%.6g')
            new = pd.DataFrame([o for o in done if all(o[k] == v for k, v in key.items())])
            table = new.pivot_table(index='rule', columns=['quantity', 'teach'], values='crps', sort=False)
            above = 100*(table/table.loc['pool'] - 1)
            print(key, above.round(2).to_string(), sep='\n', flush=True)


if __name__ == '__main__': main()
