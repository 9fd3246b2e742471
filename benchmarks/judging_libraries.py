"""What judging takes from libraries, what it costs, and the two places where their nearest function is not the one
that is used.

OMP_NUM_THREADS=1 python benchmarks/judging_libraries.py
"""

import time
import numpy as np, pandas as pd
import arch, scipy, scoringrules, statsmodels
from arch.univariate import GARCH, ZeroMean
from scipy import stats
from scoringrules import crps_ensemble
from kronos_nb.judging.baselines import LastValue, random_walks
from kronos_nb.core import np_rng
from kronos_nb.evaluate import evaluate
from kronos_nb.judging.stats import block_indices, diebold_mariano
from kronos_nb.judging.metrics import crps, ic

print(
    'arch',
    arch.__version__,
    'scoringrules',
    scoringrules.__version__,
    'scipy',
    scipy.__version__,
    'statsmodels',
    statsmodels.__version__,
)
rng = np_rng(0, 'libraries')


def ms(f, n=10):
    "Median milliseconds of a call, after one that is not counted"
    f()
    took = []
    for _ in range(n):
        t = time.perf_counter()
        f()
        took.append(1e3 * (time.perf_counter() - t))
    return float(np.median(took))


x, y = rng.normal(size=(64, 100, 24)), rng.normal(size=(64, 24))
fair = crps_ensemble(y, x, m_axis=-2, estimator='fair', backend='numpy')
a, b = rng.normal(size=(2, 40))
a[3] = a[7]
rows = [
    ('fair CRPS, 64 x 24 bars, 100 paths: `pwm` (used)', ms(lambda: crps(x, y)), abs(crps(x, y) - fair).max()),
    ('the same: `fair`', ms(lambda: crps_ensemble(y, x, m_axis=-2, estimator='fair', backend='numpy')), 0.0),
    (
        'RankIC of 40 symbols: rankdata, corrcoef (used)',
        ms(lambda: ic(a, b, rank=True), 200),
        abs(ic(a, b, rank=True) - stats.spearmanr(a, b).statistic),
    ),
    ('the same: `spearmanr`', ms(lambda: stats.spearmanr(a, b), 200), 0.0),
    ('2,000 resamples of 128 dates', ms(lambda: block_indices(128, 5)), np.nan),
]
print(pd.DataFrame(rows, columns=['what', 'ms', 'difference']).to_string(index=False))

series = []
for i in range(40):
    g, v, r = np_rng(i, 'garch'), 1e-4, np.empty(400)
    for t in range(400):
        r[t] = v**0.5 * g.normal()
        v = 5e-6 + 0.1 * r[t] ** 2 + 0.85 * v
    series.append((r - r.mean()) / r.std())


def fits(**kw):
    return [ZeroMean(r, volatility=GARCH(), rescale=False).fit(disp='off', show_warning=False, **kw) for r in series]


best = [f.loglikelihood for f in fits()]
print('\nGARCH(1,1) of 400 returns, ms a fit, and log likelihood lost at worst:')
for name, kw in {
    'as used': {},
    'starting values .05, .05, .9': dict(starting_values=np.array([0.05, 0.05, 0.9])),
    'tolerance 1e-3': dict(options=dict(ftol=1e-3)),
}.items():
    print(
        f"  {name}: {ms(lambda: fits(**kw), 5) / len(series):.1f} ms, "
        f"{max(o - f.loglikelihood for o, f in zip(best, fits(**kw))):.3f}"
    )


class Model(LastValue):
    pass


walk = random_walks(400 + 128 * 24 + 50)
print('\nevaluate, 128 origins, 100 paths, horizon 24, lookback 400, default baselines:')
for turn in range(3):
    t = time.perf_counter()
    e = evaluate(Model(), walk, 400, 24, origins=128, progress=False, used={})
    took = time.perf_counter() - t
    t = time.perf_counter()
    e.to_markdown()
    print(f'  {took:.2f} s and {time.perf_counter() - t:.2f} s for the card; seconds of each: {e.settings["seconds"]}')

print('\nEqual losses that overlap: share that a Diebold-Mariano test at 5 % rejects, of 1,000')
try:
    from statsmodels.tsa.stattools import diebold_mariano_test

    def theirs(d, overlap):
        return diebold_mariano_test(
            0 * d, d, 0 * d, criterion=lambda y, f: f, lags=overlap, harvey_adj=True, horizon=overlap + 1
        ).pvalue
except ImportError:
    theirs = lambda d, overlap: np.nan  # statsmodels below 0.15 has none
for n, overlap in ((32, 0), (64, 0), (64, 1), (64, 3), (128, 3), (128, 7)):
    g = np_rng(0, 'size', n, overlap)
    p = np.array(
        [
            (diebold_mariano(0 * d, d, overlap)[1], theirs(d, overlap))
            for d in (np.convolve(g.normal(size=n + overlap), np.ones(overlap + 1), 'valid') for _ in range(1000))
        ]
    )
    print(
        f'  {n} dates, each overlaps the next {overlap}: ours {(p[:, 0] < 0.05).mean():.3f}, statsmodels '
        f'{(p[:, 1] < 0.05).mean():.3f}'
    )
