"""Side inputs: are planted signals found, is noise told apart, and does another market or the hour of the week help?

    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/side.py [--pairs FOLDER_OF_PARQUET_FILES]

Small models on one thread. A tokenizer and a predictor are trained from scratch on bars without covariates. Then the
predictor is trained on three times, from the same weights and on the same windows in the same order: with all weights
(the rival), with all weights and a side channel (paired with the rival), and the channel alone. Validation chooses
the step, of which 0 is one. Rival and model forecast the same bars of the test part: the verdict is that of `evaluate`,
with the rival as base; the importance is that of `importance`.

Simulated: hourly bars whose covariate is +1 or -1 at random.
- volatility: known ahead; the standard deviation of a bar is exp(0.5 x) times its mean level. The size that was found
  is half the log ratio of the standard deviations of forecasts of one bar with x = 1 and x = -1.
- drift: known with the last bar; it moves the next return by 0.5 standard deviations. The size that was found is half
  the difference of the means of such forecasts, in standard deviations.
- noise: one covariate of each kind, which move nothing. How often the verdict says that they helped, and how often an
  interval of importance excludes 0, are the error rates of the procedure.
`tokens` is the size that the bars still have after they went through the tokenizer: no predictor can show more.

Real, with --pairs: hourly bars of pairs against USDT. The covariate is the last move of BTC, or three flags known
ahead: weekend, opening hours of the New York exchange, and the hours 0, 8 and 16 UTC at which funding is exchanged.

Writes side.csv beside this file, a row per trial. Rows that are there are not run again.
"""
import argparse
import copy
import time
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
EFFECT = .5
BASE_STEPS, STEPS, LOOK_EVERY, BATCH = 300, 200, 40, 64
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
    moves = .01*g.standard_normal(n)
    if kind == 'volatility': moves *= np.exp(EFFECT*x)/np.exp(2*EFFECT**2)**.5
    if kind == 'drift': moves[1:] += .01*EFFECT*x[:-1]
    close = 100*np.exp(np.cumsum(moves))
    opened, reach = np.r_[100., close[:-1]], abs(moves)*g.uniform(.1, .6, (2, n))*close
    bars = bars.assign(open=opened, close=close, high=np.maximum(opened, close) + reach[0],
                       low=np.maximum(np.minimum(opened, close) - reach[1], 1e-6))
    return bars, bars[['timestamps']].assign(x=x, y=y)


def pairs(folder, names, start='2023-01-01'):
    "Return the bars of some pairs, and the covariates of all of them"
    files = [Path(folder)/f'{name}_1h.parquet' for name in names]
    bars = read_klines([str(f) for f in files], start=start)
    btc = pd.read_parquet(next(Path(folder).parent.glob('BTCUSDT_1h*.parquet')))
    btc = read_klines(btc, symbol='BTCUSDT', start=start)[['timestamps', 'close']]
    t = pd.DatetimeIndex(bars.timestamps.unique()).sort_values()
    local = t.tz_localize('UTC').tz_convert('America/New_York')
    minutes = local.hour*60 + local.minute
    flags = pd.DataFrame(dict(timestamps=t, weekend=(t.dayofweek >= 5)*1.,
                              new_york=((local.dayofweek < 5) & (minutes >= 9*60) & (minutes < 16*60))*1.,
                              funding_hour=(t.hour % 8 == 0)*1.))
    return bars, btc.rename(columns=dict(close='btc')).merge(flags, on='timestamps', how='outer')


# training
def batches(data, seed, steps, size=BATCH):
    sampler = BatchSampler(data, size, seed)
    for step in range(steps):
        epoch, k = divmod(step, len(sampler))
        yield step, epoch, sampler.batch(epoch, k)


def small_tokenizer(data, seed, steps=250):
    model = KronosTokenizer(d_in=6, n_enc_layers=2, n_dec_layers=2, beta=.05, gamma0=1., gamma=1.1, zeta=.05,
                            group_size=5, **SMALL)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _, _, rows in batches(data, seed, steps):
        model.loss(data.arrays(rows)[0])['loss'].backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


def tokens_of(tokenizer, data, rows):
    x, stamp, _ = data.arrays(rows)
    with torch.no_grad(): s1, s2 = tokenizer.encode(x, half=True)
    return dict(s1=s1.long(), s2=s2.long(), stamp=stamp)


@torch.no_grad()
def val_loss(model, known, side):
    model.eval()
    loss = float(model.loss(**known, side=side)['loss'])
    model.train()
    return loss


def train(model, tokenizer, data, val, opt, steps, seed, with_side):
    "Train, and leave the model at the look that validation chose; step 0 is one"
    rows = np.arange(len(val))[::max(1, len(val)//400)]
    known, side = tokens_of(tokenizer, val, rows), val.side(rows) if with_side else None
    best = val_loss(model, known, side), 0, copy.deepcopy(model.state_dict())
    peaks, K = [group['lr'] for group in opt.param_groups], len(data.covariates.moving)
    for step, epoch, rows in batches(data, seed, steps):
        for group, peak in zip(opt.param_groups, peaks): group['lr'] = peak*min(1., (steps - step)/(.6*steps))
        mine = drop_covariates(data.side(rows), K, .1, seed, epoch, rows) if with_side else None
        model.loss(**tokens_of(tokenizer, data, rows), side=mine)['loss'].backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 3.)
        opt.step()
        opt.zero_grad()
        if (step + 1) % LOOK_EVERY: continue
        loss = val_loss(model, known, side)
        if loss < best[0]: best = loss, step + 1, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[2])
    return best[1]


def trained(bars, table, L, seed, arms):
    "Return the arms as forecasters, the steps that validation chose, and the windows and bars that are judged"
    split = split_by_time(bars, .6, .15, .25, H)
    data, val = (WindowDataset(o, L, H, covariates=table) for o in (split.train, split.val))
    seed_everything(seed)
    tokenizer = small_tokenizer(data, seed)
    base = Kronos(n_layers=2, token_dropout_p=0., learn_te=True, **SMALL)
    train(base, tokenizer, data, val, adamw(base, 4e-3, weight_decay=.05), BASE_STEPS, seed, False)
    out, steps = {}, {}
    for name, what in arms.items():
        one = copy.deepcopy(base)
        if what: set_trainable(one.add_side(side_spec(table)), what)
        own = dict(apart=list(one.side.parameters()), apart_lr=3e-2) if what else {}
        opt = adamw(one, 1.5e-3, weight_decay=.05, **own)
        steps[name] = train(one, tokenizer, data, val, opt, STEPS, seed + 1, bool(what))
        out[name] = Forecaster(tokenizer, one.eval(), normalizer=data.normalizer, lookback_window=L)
        if what: out[name] = out[name].with_covariates(table)
    return out, steps, data, split.test


# judging
def found_effect(kind, forecaster, test, table, L, seed, dates=16, paths=150):
    "Return the size of the effect that forecasts of one bar show, and its standard error over dates"
    g, sizes = np.random.default_rng(seed), []
    t = test.timestamps.to_numpy()
    for i in g.choice(np.arange(L, len(test) - 1), dates, replace=False):
        moves = []
        for x in (1., -1.):
            s = table.series['', 'x']
            v = s.v.copy()
            at = np.searchsorted(s.t, t[i if kind == 'volatility' else i - 1].astype('M8[ns]').astype('i8'))
            v[at] = x
            other = copy.copy(table)
            other.series = {('', 'x'): type(s)(s.t, s.known, v, s.step)}
            f = forecaster.with_covariates(other)
            past = test.iloc[i - L:i]
            made = f.predict_many([past], 1, futures=[t[i:i + 1]], paths=paths, seed=0, top_p=1., progress=False)[0]
            moves.append(np.log(made.paths[:, 0, 3]/past.close.iloc[-1]))
        up, down = moves
        if kind == 'volatility': sizes.append(.5*np.log(up.std()/down.std()))
        else: sizes.append(.5*(up.mean() - down.mean())/np.sqrt((up.var() + down.var())/2))
    return float(np.mean(sizes)), float(np.std(sizes, ddof=1)/len(sizes)**.5)


def size_in_tokens(kind, tokenizer, data, x, L):
    "Return the size of the effect in bars that went through the tokenizer"
    rows = np.arange(len(data))[::5]
    with torch.no_grad(): z = tokenizer.decode(tokenizer.encode(data.arrays(rows)[0]))[..., 3].numpy()
    moves, at = z[:, L] - z[:, L - 1], rows + L - (kind == 'drift')
    up, down = moves[x[at] > 0], moves[x[at] < 0]
    if kind == 'volatility': return float(.5*np.log(up.std()/down.std()))
    return float(.5*(up.mean() - down.mean())/np.sqrt((up.var() + down.var())/2))


def judged(rival, model, bars, test, L, origins, seed) -> dict:
    "Return the verdict on a model and its importances"
    e = evaluate(model, bars, L, H, base=rival, baselines=[GeometricBrownian()], origins=origins, paths=50, seed=seed,
                 start=test.timestamps.min(), used={}, progress=False)
    against, table = e.tests.loc['base'], importance(model, test, L, H, draws=3, seed=seed)
    out = dict(verdict=e.verdict, skill=against['skill'], low=against['low'], high=against['high'])
    for row in table.itertuples():
        out |= {row.covariate: row.importance, f'{row.covariate}_low': row.low, f'{row.covariate}_high': row.high}
    return out


def trial(kind, seed, folder, origins):
    "Return the row of one trial"
    began, L = time.process_time(), LOOKBACK.get(kind, 8)
    bars, x = pairs(folder, ('ETHUSDT', 'SOLUSDT', 'XRPUSDT')) if kind in LOOKBACK else simulated(kind, seed)
    table = covariate_table(parse_covariates(DECLARED[kind]), [x])
    planted = kind in ('volatility', 'drift')
    found, steps, data, test = trained(bars, table, L, seed, ARMS | (dict(alone='side') if planted else {}))
    row = dict(kind=kind, seed=seed) | {f'step_{k}': n for k, n in steps.items()}
    row |= judged(found['rival'], found['model'], bars, test, L, origins, seed)
    if planted:
        row['tokens'] = size_in_tokens(kind, found['model'].tokenizer, data, x.x.to_numpy(), L)
        for name in ('model', 'alone'):
            row[f'size_{name}'], row[f'se_{name}'] = found_effect(kind, found[name], test, table, L, seed)
    return row | dict(cpu_s=round(time.process_time() - began, 1))


def plan(seeds, folder):
    "Yield (kind, seed) of every trial"
    for seed in range(max(seeds, 3)):
        real = ('btc', 'hours') if folder else ()
        if seed < 3: yield from ((kind, seed) for kind in ('volatility', 'drift', *real))
        if seed < seeds: yield 'noise', seed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=20, help='of the noise')
    p.add_argument('--origins', type=int, default=40)
    p.add_argument('--pairs', help='folder of NAME_1h.parquet files, beside one of BTCUSDT')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = pd.read_csv(a.out).to_dict('records') if a.out.exists() else []
    done = {(o['kind'], o['seed']) for o in rows}
    for kind, seed in plan(a.seeds, a.pairs):
        if (kind, seed) in done: continue
        rows.append(trial(kind, seed, a.pairs, a.origins))
        pd.DataFrame(rows).to_csv(a.out, index=False, float_format='%.5g')
        print(rows[-1], flush=True)


if __name__ == '__main__': main()
