"""What fine-tuning brings, by part: on seven daily shares together, from a base of 24 others

    OMP_NUM_THREADS=1 python benchmarks/finetuning.py --data djia31_daily_2006_2017.csv.gz [--seeds 0 1 2]

The base is that of gain.py with the last close as location, made where it is missing. Every way has the same bars and
the same steps, but for `twice the steps`. Each model is judged against its base on 2014-06 to 2017, begun at the last
close and nothing more (`anchored`), and as delivered, each with its own choices of the validation part. Rows go to
finetuning.csv beside this file; rows that are there are not made again, and runs go on where they stopped.
"""
import argparse
from pathlib import Path

import pandas as pd

from gain import MARKETS, config, read, train
from kronos_nb.evaluate import evaluate
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import NaivePool
from kronos_nb.judging.calibrate import calibrate
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import fit

OUT = Path(__file__).with_suffix('.csv')
STEPS = 125, 200
WAYS = {
    'tokenizer alone': {'runtime.only': 'tokenizer'},
    'predictor alone': {'runtime.only': 'predictor'},
    'both': {},
    'both, twice the steps': {'tokenizer.max_steps': 250, 'predictor.max_steps': 400},
    'both, lr 1e-3': {'tokenizer.lr': 1e-3, 'predictor.lr': 1e-3},
    'both, lr 1e-4': {'tokenizer.lr': 1e-4, 'predictor.lr': 1e-4},
    'predictor, last two blocks': {'runtime.only': 'predictor', 'predictor.trainable': 'last_2'},
}
QUANTITIES = ('range', 'volatility', 'volume', 'direction')


def tuned(way, market, bars, seed, base, out):
    "Return a forecaster that was fine-tuned this way; the stage that was left out is the base's"
    init = {f'{k}.init': str(base/k/'best_model') for k in ('tokenizer', 'predictor')}
    settings = config(market, seed, 'last_close', STEPS, 3e-4, .1).replace(**init | WAYS[way])
    if settings.runtime.only == 'predictor':
        settings = settings.replace(**{'predictor.tokenizer': init['tokenizer.init']})
    mine = bars.symbol.isin(market.targets) & (bars.timestamps < market.begin)
    fit(bars[mine].reset_index(drop=True), settings, out, judge=False)
    trained = settings.runtime.only or 'tokenizer', settings.runtime.only or 'predictor'
    a, b = ((out if k in trained else base)/k/'best_model' for k in ('tokenizer', 'predictor'))
    tokenizer, predictor = KronosTokenizer.from_pretrained(a), Kronos.from_pretrained(b)
    predictor.extra['tokenizer_hash'] = tokenizer.weights_hash()   # a pair of two trainings is refused otherwise
    return Forecaster(tokenizer, predictor)


def both_ways(f, market, bars, seed):
    "Return the forecaster anchored, and as delivered"
    L, H = market.windows
    known = bars[bars.timestamps < market.test].reset_index(drop=True)
    chosen = calibrate(f, known, L, H, start=pd.Timestamp(market.begin), origins=48, seed=seed)
    return dict(anchored=f, delivered=Forecaster(f.tokenizer, f.predictors, calibration=chosen))


def judge(model, base, market, bars, seed) -> list:
    "Return a row for each way to deliver, against the base delivered the same way"
    L, H = market.windows
    rows = []
    for way in model:
        e = evaluate(model[way], bars, L, H, base=base[way], start=pd.Timestamp(market.test), origins=64, paths=100,
                     seed=seed, used={}, baselines=[NaivePool()], progress=False)
        t, pooled = e.tests.loc['base'], e.metrics.query("scope == 'pooled'").set_index(['model', 'metric']).value
        rows.append(dict(delivery=way, crps=pooled['model', 'crps'], base=pooled['base', 'crps'],
            naive=pooled['NaivePool', 'crps'], skill=t['skill'], low=t['low'], high=t['high']))
        for q in QUANTITIES[:3]: rows[-1][q] = 1 - pooled['model', f'crps_{q}']/pooled['base', f'crps_{q}']
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--out', default='runs/gain')
    args = parser.parse_args()
    market, done = MARKETS['shares'], pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    bars = read(args.data, market)
    mine = bars[bars.symbol.isin(market.targets)].reset_index(drop=True)
    for seed in args.seeds:
        folder, base = Path(args.out)/f'shares-last_close-{seed}', None
        for way in WAYS:
            if any(o['seed'] == seed and o['way'] == way for o in done): continue
            if base is None:
                folders = train(market, bars, seed, 'last_close', folder)
                base = both_ways(Forecaster.from_pretrained(folders['base']), market, mine, seed)
            out = folder/way.replace(',', '').replace(' ', '-')
            model = both_ways(tuned(way, market, bars, seed, folders['base'], out), market, mine, seed)
            done += [dict(seed=seed, way=way) | o for o in judge(model, base, market, mine, seed)]
            pd.DataFrame(done).to_csv(OUT, index=False)
            print(pd.DataFrame(done[-2:]).round(3).to_string(), flush=True)


if __name__ == '__main__': main()
