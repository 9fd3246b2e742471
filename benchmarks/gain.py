"""What a base, its fine-tuning and the choices for its paths are worth, on bars that chose nothing

    OMP_NUM_THREADS=1 python benchmarks/gain.py shares --data djia31_daily_2006_2017.csv.gz [--seeds 0 1 2]
    OMP_NUM_THREADS=1 python benchmarks/gain.py pairs --data pairs_1h BTCUSDT_1h.parquet DOGEUSDT_1h.parquet
    OMP_NUM_THREADS=1 python benchmarks/gain.py currency --data EURUSD_1h.csv   # after the pairs, whose base it takes

    ... --normalizers zscore --difference-weight 4   # errors in the moves between bars count, too
    ... --levels .5   # training moves the prices of each window by one random offset of so many sigmas
    ... --shares 0 .25 .5   # beside `delivered`, with so many times its share of Kronos in closes, in hindsight
    ... --size Kronos-mini   # of predictors, with tokenizers of their published size

A base, of size tiny by default, is trained on some symbols before a date, once with the z-score and once with the last
close as location, and fine-tuned on others together. Base and fine-tuned model are calibrated on a validation period
and judged on a later one: as drawn by the reference (`raw`), begun at the last close (`anchored`), and as delivered.
The score is the CRPS of the close in mean one-bar moves of the lookback, beside the naive forecast that is best on the
judged bars. Rows go to gain.csv beside this file; rows that are there are not made again, and runs go on where they
stopped.
"""
import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kronos_nb.config import Config
from kronos_nb.core import stable_key
from kronos_nb.data.augment import Augment
from kronos_nb.data.read import read_klines
from kronos_nb.data.repair import repair_klines
from kronos_nb.decode.calibration import KRONOS
from kronos_nb.evaluate import evaluate
from kronos_nb.fitting.stage import Stage
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import default_baselines
from kronos_nb.judging.calibrate import calibrate
from kronos_nb.train import fit

OUT = Path(__file__).with_suffix('.csv')


@dataclass
class Market:
    "Which symbols are judged, and when"
    targets: tuple   # Symbols that are judged; the others train the base
    windows: tuple   # Lookback and horizon
    begin: str       # Of validation; the base sees nothing later
    test: str        # Begin of the judged bars
    steps: tuple     # Of tokenizer and predictor
    dates: tuple     # Of validation and of the judged bars, at most
    base: str = ''   # Market whose base is fine-tuned; by default one of its own
    size: str = 'tiny'   # Of the predictor


MARKETS = dict(
    shares=Market(('AAPL', 'BA', 'IBM', 'JPM', 'KO', 'MSFT', 'XOM'), (60, 10), '2013-02-01', '2014-06-01', (500, 800),
                  (64, 90)),
    pairs=Market(('BTCUSDT', 'DOGEUSDT', 'SOLUSDT', 'MATICUSDT'), (120, 24), '2023-01-01', '2023-07-01', (400, 800),
                 (90, 200)),
    currency=Market(('EURUSD',), (120, 24), '', '', (400, 800), (64, 64), 'pairs'))


SIZES = {'tiny': 'tiny', 'Kronos-mini': 'Kronos-Tokenizer-base'}   # of predictor and tokenizer


def config(market, seed, normalizer, steps, lr, val, difference=0.) -> Config:
    "Return how a base or a fine-tuned model is trained"
    L, H = market.windows
    stage = dict(epochs=10_000, batch_size=64, weight_decay=.05, warmup=.05, lr=lr)
    return Config().replace(
        data=dict(lookback_window=L, predict_window=H, normalizer=normalizer, train=1 - val, val=val, test=0.,
                  embargo=H, val_windows=300, windows_per_epoch=6400),
        tokenizer=dict(stage, size=SIZES[market.size], max_steps=steps[0], difference_weight=difference),
        predictor=dict(stage, size=market.size, max_steps=steps[1]),
        runtime=dict(progress=False, plots=False, device='cpu', threads=1, seed=seed, save_steps=200),
        evaluate=dict(calibrate='off'))


def folder_name(market, normalizer, seed, difference, levels=0., size='tiny'):
    name = f'{market}-{normalizer}-{seed}' + f'-d{difference:g}'*(difference > 0) + f'-l{levels:g}'*(levels > 0)
    return name + f'-{size}'*(size != 'tiny')


@dataclass(frozen=True)
class Levels(Augment):
    "Moves the four prices of a window, history and future alike, by one offset"
    levels: float = 0.   # Its standard deviation, in sigmas of the lookback

    @property
    def on(self): return True

    def values(self, x, seed, epoch, indices):
        key = stable_key(seed, 'levels', epoch)
        drawn = [np.random.Generator(np.random.Philox(key=[key, int(i)])).standard_normal() for i in indices]
        out = x.clone()
        out[..., :4] += self.levels*torch.tensor(drawn, dtype=x.dtype)[:, None, None]
        return out.clamp_(-self.clip, self.clip)


def move_levels(levels):
    "Let every stage that trains from now on move the levels of its windows"
    Stage.augment = property(lambda stage: Levels(clip=stage.cfg.data.clip, levels=levels))


def train_base(market, bars, seed, normalizer, base, difference=0.):
    "Train on the symbols that are not judged"
    others = ~bars.symbol.isin(market.targets) & (bars.timestamps < market.begin)
    whole = config(market, seed, normalizer, market.steps, 1e-3, .1, difference)
    fit(bars[others].reset_index(drop=True), whole, base, judge=False)


def train(market, bars, seed, normalizer, out, difference=0., levels=0.) -> dict:
    "Return the folders of the base and of the model that was fine-tuned on the targets"
    mine = bars.symbol.isin(market.targets) & (bars.timestamps < market.begin)
    base = out/'base'
    if market.base: base = out.parent/folder_name(market.base, normalizer, seed, difference, levels, market.size)/'base'
    else: train_base(market, bars, seed, normalizer, base, difference)
    steps = tuple(n//4 for n in market.steps)
    tuned = config(market, seed, normalizer, steps, 3e-4, .1, difference).replace(**{
        'tokenizer.init': str(base/'tokenizer'/'best_model'), 'predictor.init': str(base/'predictor'/'best_model')})
    fit(bars[mine].reset_index(drop=True), tuned, out/'tuned', judge=False)
    return dict(base=base, tuned=out/'tuned')


def name_of(times): return f'{times:g} of the share'


def with_share(calibration, times):
    "Return a calibration whose closes have `times` the share of Kronos, and the others the rest as they had it"
    close = dict(calibration.close)
    mine = close.pop(KRONOS)
    if not close: close = {'LastValue': 1.}
    others = sum(close.values())
    return replace(calibration, close={KRONOS: times*mine} | {m: o*(1 - times*mine)/others for m, o in close.items()})


def ways(f, market, bars, seed, shares=()):
    "Yield name and forecaster of each way to deliver its paths"
    L, H = market.windows
    known = bars[bars.timestamps < market.test].reset_index(drop=True)
    yield 'raw', f._raw()
    yield 'anchored', f
    cal = calibrate(f, known, L, H, start=pd.Timestamp(market.begin), origins=market.dates[0], seed=seed)
    yield 'delivered', Forecaster(f.tokenizer, f.predictors, calibration=cal)
    for times in shares: yield name_of(times), Forecaster(f.tokenizer, f.predictors, calibration=with_share(cal, times))


def on_validation(calibration) -> dict:
    "Return the skill of the close on the bars that it was calibrated on"
    scores = dict(calibration.scores)
    drawn, alone, pool = (scores.pop(k) for k in ('as drawn', 'spread', 'delivered'))
    naive = min(scores.values())
    return dict(val_drawn=1 - drawn/naive, val_alone=1 - alone/naive, val_pool=1 - pool/naive)


def judge(market, bars, folder, seed, shares=(), there=()) -> list:
    "Return a row for each way to deliver that is not there"
    mine = bars[bars.symbol.isin(market.targets)].reset_index(drop=True)
    L, H = market.windows
    rows = []
    for name, f in ways(Forecaster.from_pretrained(folder), market, mine, seed, shares):
        if name in there: continue
        e = evaluate(f, mine, L, H, start=pd.Timestamp(market.test), origins=market.dates[1], paths=100, seed=seed,
                     used={}, baselines=default_baselines(mine, L), progress=False)
        pooled = e.metrics.query("scope == 'pooled' and model == 'model'").set_index('metric').value
        naive = e.best_naive
        first = e.rows[(e.rows.model == 'model') & (e.rows.h == 1)]
        t = e.tests.loc[naive]
        rows.append(dict(way=name, crps=pooled['crps'], naive=naive, skill=t['skill'], low=t['low'], high=t['high'],
            cover_80=pooled['cover_80'], first_bar=first.crps.mean(),
            jump=(abs(first.q50 - first['last'])/first.scale).mean(),
            dates=first.date.nunique(), calibration=getattr(f.calibration, 'sentence', '')))
        if f.calibration: rows[-1] |= on_validation(f.calibration)
        for q in ('range', 'volatility', 'volume', 'direction'):
            o = e.quantities.loc[q]
            rows[-1] |= {f'{q}_naive': o.against, f'{q}_skill': o.skill, f'{q}_low': o.low, f'{q}_high': o.high}
    return rows


def read(files, market) -> pd.DataFrame:
    "Return repaired bars; the periods of a single file are shares of it"
    bars, _ = repair_klines(read_klines([Path(f) for f in files]))
    if not market.begin:
        t = bars.timestamps.sort_values().to_numpy()
        market.begin, market.test = (str(t[int(len(t)*q)]) for q in (.6, .8))
    return bars


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('market', choices=MARKETS)
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--normalizers', nargs='+', default=['zscore', 'last_close'])
    parser.add_argument('--difference-weight', type=float, default=0.)
    parser.add_argument('--levels', type=float, default=0.)
    parser.add_argument('--size', choices=SIZES, default='tiny')
    parser.add_argument('--shares', nargs='+', type=float, default=[])
    parser.add_argument('--out', default='runs/gain')
    args = parser.parse_args()
    market, done = MARKETS[args.market], pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    bars, weight, levels = read(args.data, market), args.difference_weight, args.levels
    market.size = args.size
    if levels: move_levels(levels)
    for seed in args.seeds:
        for normalizer in args.normalizers:
            key = dict(market=args.market, normalizer=normalizer, difference=weight, levels=levels, size=args.size,
                       seed=seed)
            there = {o['way'] for o in done if all(o[k] == v for k, v in key.items())}
            if {'delivered', *map(name_of, args.shares)} <= there: continue
            out = Path(args.out)/folder_name(args.market, normalizer, seed, weight, levels, args.size)
            models = train(market, bars, seed, normalizer, out, weight, levels)
            for model, folder in models.items():
                done += [key | dict(model=model) | o for o in judge(market, bars, folder, seed, args.shares, there)]
            done.sort(key=lambda o: tuple(o[k] for k in key))
            pd.DataFrame(done).to_csv(OUT, index=False)
            new = pd.DataFrame([o for o in done if all(o[k] == v for k, v in key.items())])
            print(new.round(3).to_string(), flush=True)


if __name__ == '__main__': main()
