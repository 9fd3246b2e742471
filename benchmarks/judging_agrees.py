"""Scores, intervals and baselines beside the statistics libraries that also have them.

    pip install arch scoringrules statsmodels scipy      # for this script alone
    OMP_NUM_THREADS=1 python benchmarks/judging_agrees.py
"""
import time, warnings
import numpy as np, pandas as pd
import scoringrules
from arch import arch_model
from arch.bootstrap import CircularBlockBootstrap
from scipy import stats
from statsmodels.tsa.ar_model import AutoReg
from kronos_nb.baselines import fit_ar1, fit_garch, garch_loss, garch_var
from kronos_nb.core import np_rng
from kronos_nb.evaluate import resample_weights
from kronos_nb.evidence import t_cdf
from kronos_nb.metrics import crps, ic

warnings.simplefilter('ignore')
rng, rows = np_rng(0, 'agree'), []
def add(what, ours, theirs, library): rows.append((what, library, float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs)))), float(np.mean(np.abs(theirs)))))

x, y = rng.normal(size=(200, 50, 12)), rng.normal(size=(200, 12))
add('fair CRPS', crps(x, y), scoringrules.crps_ensemble(y, np.moveaxis(x, 1, -1), estimator='fair'), 'scoringrules')
a, b = rng.normal(size=(2, 40)); a[3] = a[7]
add('RankIC with ties', ic(a, b, rank=True), stats.spearmanr(a, b)[0], 'scipy')
add('t distribution', [t_cdf(o, 7) for o in (-3, .5, 2)], stats.t.cdf([-3, .5, 2], 7), 'scipy')
r = rng.normal(size=400)
c, phi, _ = fit_ar1(r[None])
add('AR(1) constant and slope', [c.item(), phi.item()], AutoReg(r, 1).fit().params, 'statsmodels')
d = np.convolve(rng.normal(size=80), np.ones(4), 'valid')
own = (resample_weights(len(d), 6, 20000) @ d).std()
add('bootstrap standard error, blocks of 6', own, np.std(CircularBlockBootstrap(6, d, seed=1).apply(np.mean, 20000)), 'arch')
print(pd.DataFrame(rows, columns=['what', 'library', 'largest difference', 'typical size']).to_string(index=False))

gain, ratio, ours_s, theirs_s = [], [], 0., 0.
series = []
for i in range(40):
    g, v, r = np_rng(i, 'garch'), 1e-4, np.empty(400)
    for t in range(400): r[t] = v**.5 * g.normal(); v = 5e-6 + .1 * r[t]**2 + .85 * v
    series.append(r - r.mean())
series = np.stack(series)
t = time.perf_counter(); omega, alpha, beta = fit_garch(series); ours_s = time.perf_counter() - t
for r, w, a, b in zip(series, omega, alpha, beta):
    t = time.perf_counter(); f = arch_model(100 * r, mean='Zero', rescale=False).fit(disp='off'); theirs_s += time.perf_counter() - t
    w2, a2, b2 = f.params['omega'] / 1e4, f.params['alpha[1]'], f.params['beta[1]']
    v1, v2 = (garch_var(r, *p, (r * r).mean()) for p in ((w, a, b), (w2, a2, b2)))
    nll = lambda v: (np.log(v[:-1]) + r * r / v[:-1]).sum() / 2
    gain.append(nll(v1) - nll(v2)); ratio.append(np.sqrt(v1[-1] / v2[-1]))
print(f"\nGARCH(1,1), 40 series of 400 returns, against arch: log likelihood lower by {np.median(gain):.2f} (median; 5-95 %: {np.quantile(gain, .05):.2f} to {np.quantile(gain, .95):.2f}), "
      f"next volatility {np.median(ratio):.3f} of theirs (5-95 %: {np.quantile(ratio, .05):.3f} to {np.quantile(ratio, .95):.3f}); {ours_s:.2f} s against {theirs_s:.2f} s")
