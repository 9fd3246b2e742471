"""How often does the verdict say "helped" where nothing can help, and where something does?

OMP_NUM_THREADS=1 python benchmarks/verdict_error_rate.py --walks 400
"""

import argparse, time
import numpy as np, pandas as pd
from kronos_nb.judging.baselines import (Baseline, EWMA, GeometricBrownian, LastValue, NaivePool, log_returns,
    random_walks)
from kronos_nb.data.window import split_by_time
from kronos_nb.evaluate import control, evaluate
from kronos_nb.judging.calibrate import calibrate


class Linear(Baseline):
    "Next return from the last three returns and the log volume, by least squares; untrained: no change, too wide"

    def __init__(self, train=None):
        self.w, self.sd = np.zeros(5), 0.015
        if train is not None:
            X, r = self.inputs(train)
            self.w = np.linalg.lstsq(X[:-1], r[3:], rcond=None)[0]
            self.sd = (r[3:] - X[:-1] @ self.w).std()

    def inputs(self, bars):
        r, v = log_returns(bars), np.log(bars.volume.to_numpy())
        return np.stack([np.ones(len(r) - 2), r[2:], r[1:-1], r[:-2], v[3:] - v.mean()], 1), r

    def returns(self, r, size, rngs, bars):
        out = np.stack([g.normal(0, self.sd, size) for g in rngs])
        out[..., 0] += np.array([[self.inputs(b)[0][-1] @ self.w] for b in bars])
        return out


class Truth(Baseline):
    "The true law of the walk: nothing beats it, so it is the hardest case not to be fooled by"

    def returns(self, r, size, rngs, bars):
        return np.stack([g.normal(0, 0.01, size) for g in rngs])


class Delivered:
    "A forecaster with a calibration"

    def __init__(self, forecaster, bars):
        self.forecaster = forecaster
        self.calibration = calibrate(forecaster, bars, 200, 5, paths=50)

    def predict_many(self, *args, keys=None, sampling=None, **kwargs):
        made = self.forecaster.predict_many(*args, keys=keys, sampling=sampling, **kwargs)
        return self.calibration.apply(made, keys, sampling.seed)


def delivered(walks, signal) -> dict:
    "Return the share of walks on which the delivered forecast is called better: the verdict, and each quantity"
    found = []
    for seed in range(walks):
        parts = split_by_time(random_walks(4000, signal=signal, seed=5000 + seed), .5, .25, .25)
        model, base = (Delivered(o, parts.val) for o in (Linear(parts.train), Linear()))
        e = evaluate(model, parts.test, 200, 5, base=base, used=parts.val, paths=50, baselines=[*few, NaivePool()],
                     progress=False)
        better = (e.quantities.finding == 'better').to_dict()
        found.append(dict(verdict=e.verdict == 'helped', any_quantity=any(better.values())) | better)
    return pd.DataFrame(found).mean().round(3).to_dict()


p = argparse.ArgumentParser()
p.add_argument('--walks', type=int, default=400)
p.add_argument('--delivered', action='store_true', help='only the forecasts that are spread and pooled on validation')
a = p.parse_args()
few = [LastValue(), GeometricBrownian(), EWMA()]
if a.delivered:
    for signal in (0, .3): print(f'signal {signal}:', delivered(a.walks, signal), flush=True)
    raise SystemExit
learned, oracle = (lambda train: (Linear(train), Linear())), (lambda train: (Truth(), Linear()))
rows = []
for name, recipe, signal, kw in (
    ('learned, random walk', learned, 0, dict(origins=120, predict_window=2)),
    ('learned, random walk', learned, 0, dict(origins=32, predict_window=5)),
    ('the true law, random walk', oracle, 0, dict(origins=120, predict_window=2)),
    ('the true law, random walk', oracle, 0, dict(origins=32, predict_window=5)),
    ('the true law, overlapping', oracle, 0, dict(origins=200, predict_window=12)),
    ('learned, planted signal', learned, 0.3, dict(origins=120, predict_window=2)),
):
    t = time.time()
    d = control(recipe, a.walks, signal, seed=1000, paths=50, baselines=few, **kw)
    n = d.verdict.value_counts()
    rows.append(
        (
            name,
            kw['origins'],
            kw['predict_window'],
            *(n.get(v, 0) / len(d) for v in ('helped', 'did not help', 'cannot tell')),
            (d.low > 0).mean(),
            time.time() - t,
        )
    )
print(
    pd.DataFrame(
        rows,
        columns=[
            'case',
            'origins',
            'horizon',
            'helped',
            'did not help',
            'cannot tell',
            'interval above 0 against best naive',
            'seconds',
        ],
    )
    .round(3)
    .to_string(index=False)
)
