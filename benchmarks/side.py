"""Side inputs: are planted signals found, is noise told apart, and does another market or the hour of the week help?

    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/side.py [--pairs FOLDER_OF_PARQUET_FILES]

Small models on one thread (2 layers of width 32). A tokenizer and a predictor that know no covariate are trained once
on a random walk, and once on the pairs before their test part, as a released pair would be. From there the predictor
is trained on three times for 200 steps, on the same windows in the same order: with all weights (the rival), with all
weights and a side channel (paired with the rival), and, for planted signals, the channel alone. Validation chooses the
step, of which 0 is one. Rival and model forecast the same 40 dates of the test part: the verdict is that of
`evaluate`, with the rival as base; the importance is that of `importance`. A trial takes 8 to 40 s of the processor.
Windows are encoded once and the start is shared, because two thirds of a trial went there before.

Simulated: hourly bars whose covariate is +1 or -1 at random.
- volatility: known ahead; the standard deviation of a bar is exp(0.5 x) times its mean level. The size that was found
  is half the log ratio of the standard deviations of forecasts of one bar with x = 1 and x = -1.
- drift: known with the last bar; it moves the next return by 0.5 standard deviations. The size that was found is half
  the difference of the means of such forecasts, in those standard deviations.
- noise: one covariate of each kind, which move nothing. How often the verdict says that they helped, and how often an
  interval of importance excludes 0, are the error rates of the procedure.
`bars` and `tokens` are the size in normalised windows, before and after the tokenizer: no predictor can show more.
`spread` is the standard deviation of forecasts of one bar, 1 where it is right. `longer` trains four times as long.

Real, with --pairs: hourly bars of pairs against USDT. The covariate is the last move of BTC, or three flags known
ahead: weekend, opening hours of the New York exchange, and the hours 0, 8 and 16 UTC at which funding is exchanged.

Writes side.csv beside this file, a row per trial. Rows that are there are not run again.
"""
import argparse
import copy
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kronos_nb.core import seed_everything
from kronos_nb.covariate import parse_covariates
from kronos_nb.data.covariates import covariate_table
from kronos_nb.data.read import read_klines
from kronos_nb.data.window import BatchSampler, WindowDataset, split_by_time
from kronos_nb.evaluate import evaluate
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import GeometricBrownian, random_walks
from kronos_nb.judging.importance import importance
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.side import side_spec
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training.optim import adamw
from kronos_nb.training.task import drop_covariates, set_trainable

H = 4
LOOKBACK = dict(btc=24, hours=24)   # of the simulated ones: 8, where a bar moves as much as the level
EFFECT, SD = .5, .01   # planted size; standard deviation of a move
TOKENIZER_STEPS, BASE_STEPS, STEPS, LOOK_EVERY, BATCH = 250, 300, 200, 40, 64
DECLARED = dict(volatility=dict(x='future'), drift=dict(x='past raw'), noise=dict(x='past raw', y='future'),
                btc=dict(btc='past change'), hours=dict(weekend='future', new_york='future', funding_hour='future'))
ARMS = dict(rival=None, model='all')
STILL = dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
SMALL = dict(s1_bits=5, s2_bits=5, d_model=32, n_heads=2, ff_dim=64) | STILL


# bars and covariates
def simulated(kind, seed, n=9000):
    "Return bars whose moves depend on a covariate, and the covariates"
    g, bars = np.random.default_rng([seed, len(kind)]), random_walks(n, seed=seed)
    x, y = g.choice([-1., 1.], (2, n))
    moves = SD*g.standard_normal(n)
    if kind == 'volatility': moves *= np.exp(EFFECT*x)/np.cosh(2*EFFECT)**.5
    if kind == 'drift': moves[1:] += SD*EFFECT*x[:-1]
    close = 100*np.exp(np.cumsum(moves))
    opened, reach = np.r_[100., close[:-1]], abs(moves)*g.uniform(.1, .6, (2, n))*close
    bars = bars.assign(open=opened, close=close, high=np.maximum(opened, close) + reach[0],
                       low=np.maximum(np.minimum(opened, close) - reach[1], 1e-6))
    return bars, bars[['timestamps']].assign(x=x, y=y)


@functools.cache
def pairs(folder, names=('ETHUSDT', 'SOLUSDT', 'XRPUSDT'), start='2023-01-01'):
    "Return the bars of some pairs, and the covariates of all of them"
    files = [Path(folder)/f'{name}_1h.parquet' for name in names]
    bars = read_klines([str(f) for f in files], start=start)
    btc = pd.read_parquet(next(Path(folder).parent.glob('BTCUSDT_1h*.parquet')))
    btc = read_klines(btc, symbol='BTCUSDT', start=start)[['timestamps', 'close']]
    t = pd.DatetimeIndex(bars.timestamps.unique()).sort_values()
    local = t.tz_localize('UTC').tz_convert('America/New_York')
    minutes = local.hour*60 + local.minute
    flags = pd.DataFrame(dict(timestamps=t, weekend=(t.day_of_week >= 5)*1.,
                              new_york=((local.day_of_week < 5) & (minutes >= 9*60) & (minutes < 16*60))*1.,
                              funding_hour=(t.hour % 8 == 0)*1.))
    return bars, btc.rename(columns=dict(close='btc')).merge(flags, on='timestamps', how='outer')


# training
def batches(data, seed, steps, size=BATCH):
    sampler = BatchSampler(data, size, seed)
    for step in range(steps):
        epoch, k = divmod(step, len(sampler))
        yield step, epoch, sampler.batch(epoch, k)


def small_tokenizer(data, seed, steps=TOKENIZER_STEPS):
    model = KronosTokenizer(d_in=6, n_enc_layers=2, n_dec_layers=2, beta=.05, gamma0=1., gamma=1.1, zeta=.05,
                            group_size=5, **SMALL)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _, _, rows in batches(data, seed, steps):
        model.loss(data.arrays(rows)[0])['loss'].backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


@dataclass
class Known:
    "What a predictor reads of windows"
    data: WindowDataset
    tokens: dict   # s1, s2 and stamp, (N, T) and (N, T, 5)
    side: torch.Tensor | None

    def batch(self, rows) -> dict: return {k: v[rows] for k, v in self.tokens.items()}


@torch.no_grad()
def known_of(tokenizer, data, rows=None) -> Known:
    "Return tokens and side inputs of windows, of all by default"
    rows = np.arange(len(data)) if rows is None else rows
    parts = []
    for i in range(0, len(rows), 2048):
        x, stamp, _ = data.arrays(rows[i:i + 2048])
        s1, s2 = tokenizer.encode(x, half=True)
        parts.append((s1.long(), s2.long(), stamp))
    s1, s2, stamp = (torch.cat(o) for o in zip(*parts))
    return Known(data, dict(s1=s1, s2=s2, stamp=stamp), data.side(rows))


@torch.no_grad()
def val_loss(model, val, with_side):
    model.eval()
    loss = float(model.loss(**val.tokens, side=val.side if with_side else None)['loss'])
    model.train()
    return loss


def train(model, known, val, opt, steps, seed, with_side):
    "Train, and leave the model at the look that validation chose; step 0 is one"
    best = val_loss(model, val, with_side), 0, copy.deepcopy(model.state_dict())
    peaks, K = [group['lr'] for group in opt.param_groups], len(known.data.covariates.moving) if with_side else 0
    for step, epoch, rows in batches(known.data, seed, steps):
        for group, peak in zip(opt.param_groups, peaks): group['lr'] = peak*min(1., (steps - step)/(.6*steps))
        side = drop_covariates(known.side[rows], K, .1, seed, epoch, rows) if with_side else None
        model.loss(**known.batch(rows), side=side)['loss'].backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 3.)
        opt.step()
        opt.zero_grad()
        if (step + 1) % LOOK_EVERY: continue
        loss = val_loss(model, val, with_side)
        if loss < best[0]: best = loss, step + 1, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[2])
    return best[1]


def parts_of(bars, L, table=None):
    "Return the windows that train and choose, and the bars that judge"
    split = split_by_time(bars, .6, .15, .25, H)
    return *(WindowDataset(o, L, H, covariates=table) for o in (split.train, split.val)), split.test


def few(val): return np.arange(len(val))[::max(1, len(val)//400)]


@functools.cache
def pretrained(kind, folder, seed=0):
    "Return a tokenizer and a predictor that know no covariate: of a random walk, or of the pairs before the test part"
    bars, L = (pairs(folder)[0], LOOKBACK[kind]) if kind in LOOKBACK else (simulated('noise', 1000)[0], 8)
    data, val, _ = parts_of(bars, L)
    seed_everything(seed)
    tokenizer = small_tokenizer(data, seed)
    model = Kronos(n_layers=2, token_dropout_p=0., learn_te=True, **SMALL)
    opt = adamw(model, 4e-3, weight_decay=.05)
    train(model, known_of(tokenizer, data), known_of(tokenizer, val, few(val)), opt, BASE_STEPS, seed, False)
    return tokenizer, model


def arms_of(tokenizer, base, data, val, table, L, seed, arms, longer):
    "Return the arms as forecasters, and the steps that validation chose"
    known, out, steps = (known_of(tokenizer, data), known_of(tokenizer, val, few(val))), {}, {}
    for name, what in arms.items():
        seed_everything(seed)
        one = copy.deepcopy(base)
        if what: set_trainable(one.add_side(side_spec(table)), what)
        own = dict(apart=list(one.side.parameters()), apart_lr=3e-2) if what else {}
        opt = adamw(one, 1.5e-3, weight_decay=.05, **own)
        steps[name] = train(one, *known, opt, STEPS*longer, seed, bool(what))
        out[name] = Forecaster(tokenizer, one.eval(), normalizer=data.normalizer, lookback_window=L)
        if what: out[name] = out[name].with_covariates(table)
    return out, steps


# judging
def with_values(table, t, value):
    "Return a table in which the covariate x has one value at some stamps"
    s = table.series['', 'x']
    v = s.v.copy()
    v[np.searchsorted(s.t, t.astype('M8[ns]').astype('i8'))] = value
    other = copy.copy(table)
    other.series = {('', 'x'): type(s)(s.t, s.known, v, s.step)}
    return other


def found_effect(kind, forecaster, test, table, L, seed, dates=40, paths=100) -> tuple:
    "Return the size of the effect that forecasts of one bar show, its standard error over dates, and their spread"
    t, g = test.timestamps.to_numpy(), np.random.default_rng(seed)
    at = np.sort(g.choice(np.arange(L, len(test) - 1, 2*L), dates, replace=False))   # no history reads another's value
    histories, futures = [test.iloc[i - L:i] for i in at], [t[i:i + 1] for i in at]
    moves = []
    for x in (1., -1.):
        f = forecaster.with_covariates(with_values(table, t[at - (kind == 'drift')], x))
        made = f.predict_many(histories, 1, futures=futures, keys=[str(i) for i in at], paths=paths, seed=0, top_p=1.,
                              progress=False)
        moves.append(np.stack([np.log(o.paths[:, 0, 3]/o.last_close) for o in made]))
    up, down = moves
    if kind == 'volatility': sizes = .5*np.log(up.std(1)/down.std(1))
    else: sizes = .5*(up.mean(1) - down.mean(1))/SD
    return sizes.mean(), sizes.std(ddof=1)/len(sizes)**.5, np.sqrt((up.var(1) + down.var(1)).mean()/2)/SD


def size_in(kind, z, x, rows, L):
    "Return the size of the effect in the last known and the first future close of normalised windows (N, T, F)"
    moves, at = z[:, L, 3] - z[:, L - 1, 3], rows + L - (kind == 'drift')
    up, down = moves[x[at] > 0], moves[x[at] < 0]
    if kind == 'volatility': return float(.5*np.log(up.std()/down.std()))
    return float(.5*(up.mean() - down.mean())/np.sqrt((up.var() + down.var())/2))


@torch.no_grad()
def sizes_in_windows(kind, tokenizer, data, x, L) -> dict:
    "Return the size of the effect in windows, and in windows that went through the tokenizer"
    rows = np.arange(len(data))[::2]
    z = data.arrays(rows)[0]
    seen = dict(bars=z, tokens=tokenizer.decode(tokenizer.encode(z)))
    return {k: size_in(kind, v.numpy(), x, rows, L) for k, v in seen.items()}


def judged(rival, model, bars, test, L, origins, seed) -> dict:
    "Return the verdict on a model and its importances"
    e = evaluate(model, bars, L, H, base=rival, baselines=[GeometricBrownian()], origins=origins, paths=50, seed=seed,
                 start=test.timestamps.min(), used={}, progress=False)
    against, table = e.tests.loc['base'], importance(model, test, L, H, draws=3, seed=seed)
    out = dict(verdict=e.verdict, skill=against['skill'], low=against['low'], high=against['high'])
    for row in table.itertuples():
        out |= {row.covariate: row.importance, f'{row.covariate}_low': row.low, f'{row.covariate}_high': row.high}
    return out


def trial(kind, seed, longer, folder, origins):
    "Return the row of one trial"
    began, L = time.process_time(), LOOKBACK.get(kind, 8)
    bars, x = pairs(folder) if kind in LOOKBACK else simulated(kind, seed)
    table = covariate_table(parse_covariates(DECLARED[kind]), [x])
    planted = kind in ('volatility', 'drift')
    arms = ARMS | (dict(alone='side') if planted else {})
    data, val, test = parts_of(bars, L, table)
    found, steps = arms_of(*pretrained('btc' if kind in LOOKBACK else 'noise', folder), data, val, table, L, seed, arms,
                           longer)
    row = dict(kind=kind, seed=seed, longer=longer) | {f'step_{k}': n for k, n in steps.items()}
    row |= judged(found['rival'], found['model'], bars, test, L, origins, seed)
    if planted:
        row |= sizes_in_windows(kind, found['model'].tokenizer, data, x.x.to_numpy(), L)
        for name in ('model', 'alone'):
            effect = found_effect(kind, found[name], test, table, L, seed)
            row |= dict(zip((f'size_{name}', f'se_{name}', f'spread_{name}'), effect))
    return row | dict(cpu_s=round(time.process_time() - began, 1))


def plan(seeds, folder):
    "Yield (kind, seed, longer) of every trial"
    for seed in range(3):
        yield from ((kind, seed, 1) for kind in ('volatility', 'drift', *(('btc', 'hours') if folder else ())))
    yield from ((kind, 0, 4) for kind in ('volatility', 'drift'))
    yield from (('noise', seed, 1) for seed in range(seeds))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=20, help='of the noise')
    p.add_argument('--origins', type=int, default=40)
    p.add_argument('--pairs', help='folder of NAME_1h.parquet files, beside one of BTCUSDT')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = pd.read_csv(a.out).to_dict('records') if a.out.exists() else []
    done = {(o['kind'], o['seed'], o['longer']) for o in rows}
    for key in plan(a.seeds, a.pairs):
        if key in done: continue
        rows.append(trial(*key, a.pairs, a.origins))
        pd.DataFrame(rows).to_csv(a.out, index=False, float_format='%.5g')
        print(rows[-1], flush=True)


if __name__ == '__main__': main()
