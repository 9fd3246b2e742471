"""What fine-tuning brings, by part: on seven daily shares, from a base of 24 others, or four hourly pairs, from 16

    OMP_NUM_THREADS=1 python benchmarks/finetuning.py shares --data djia31_daily_2006_2017.csv.gz [--seeds 0 1 2]
    OMP_NUM_THREADS=1 python benchmarks/finetuning.py pairs --data pairs_1h BTCUSDT_1h.parquet DOGEUSDT_1h.parquet

The base is that of `gain.py MARKET --normalizers zscore --difference-weight 4` with the same seed, made where it is
missing, and periods are those of `gain.py`. Every way has the same bars and the same steps, but for `twice the steps`.
Each model is calibrated on the validation part and judged on the later one, begun at the last close and nothing more
(`anchored`), and as delivered, against its base delivered in the same way; `val` and `val_base` are the skills of both
against the best naive forecast on validation. `chosen by CRPS` takes the predictor's checkpoint with the best paths on
validation, where every other way takes the one with the lowest loss. `AAPL alone` is fine-tuned on that symbol and
judged on it against the model of all. Rows go to finetuning.csv beside this file; rows that are there are not made
again, and runs go on where they stopped.
"""
import argparse
from pathlib import Path

import pandas as pd

from gain import MARKETS, config, folder_name, read, train_base
from kronos_nb.average import step_files
from kronos_nb.evaluate import evaluate
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import NaivePool
from kronos_nb.judging.calibrate import calibrate
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import fit

OUT = Path(__file__).with_suffix('.csv')
NORMALIZER, WEIGHT = 'zscore', 4.
TWICE = 'both, twice the steps'
WAYS = {
    'tokenizer alone': {'runtime.only': 'tokenizer'},
    'predictor alone': {'runtime.only': 'predictor'},
    'both': {},
    TWICE: {},
    'both, lr 1e-3': {'tokenizer.lr': 1e-3, 'predictor.lr': 1e-3},
    'both, lr 1e-4': {'tokenizer.lr': 1e-4, 'predictor.lr': 1e-4},
    'predictor, last block': {'runtime.only': 'predictor', 'predictor.trainable': 'last_1'},
    'both, twice the steps, chosen by CRPS': {},
}
ALONE = {m: [f'{o} alone' for o in MARKETS[m].targets] for m in ('shares', 'pairs')}
QUANTITIES = 'range', 'volatility', 'volume'


class Trial:
    "The market, and the models of one seed"
    def __init__(self, market, bars, seed, out):
        self.market, self.seed, self.out = market, seed, out
        self.all, self.bars = bars, bars[bars.symbol.isin(market.targets)].reset_index(drop=True)
        self.base = out/'base'
        train_base(market, bars, seed, NORMALIZER, self.base, WEIGHT)
        self.kept = {}

    def folder(self, way): return self.out/way.replace(',', '').replace(' ', '-')

    def calibrate(self, f, bars):
        "Return the choices for paths on the validation part"
        L, H = self.market.windows
        known = bars[bars.timestamps < self.market.test].reset_index(drop=True)
        return calibrate(f, known, L, H, start=pd.Timestamp(self.market.begin), origins=48, seed=self.seed)

    def pair(self, way):
        "Return tokenizer and predictor that were fine-tuned this way; the stage that was left out is the base's"
        init = {f'{k}.init': str(self.base/k/'best_model') for k in ('tokenizer', 'predictor')}
        steps = tuple(n//(2 if way == TWICE else 4) for n in self.market.steps)
        settings = config(self.market, self.seed, NORMALIZER, steps, 3e-4, .1, WEIGHT)
        settings = settings.replace(**init | WAYS.get(way, {}) | {'runtime.save_steps': 100})
        only = settings.runtime.only
        if only == 'predictor': settings = settings.replace(**{'predictor.tokenizer': init['tokenizer.init']})
        known, symbol = self.bars[self.bars.timestamps < self.market.begin], way.removesuffix(' alone')
        if symbol in self.market.targets: known = known[known.symbol == symbol]
        fit(known.reset_index(drop=True), settings, self.folder(way), judge=False)
        a, b = (self.base if only == k else self.folder(way) for k in ('predictor', 'tokenizer'))
        return KronosTokenizer.from_pretrained(a/'tokenizer'/'best_model'), b/'predictor'

    def models(self, way):
        "Return the forecasters of a way to try"
        if way.endswith('chosen by CRPS'):
            tokenizer, stage = self.pair(TWICE)
            folders = [file.parent for _, file in step_files(stage)]
        else:
            tokenizer, stage = self.pair(way)
            folders = [stage/'best_model']
        for folder in folders:
            predictor = Kronos.from_pretrained(folder)
            predictor.extra['tokenizer_hash'] = tokenizer.weights_hash()   # else a pair of two runs is refused
            yield Forecaster(tokenizer, predictor)

    def both_ways(self, way, bars=None):
        "Return the forecaster anchored and as delivered, and its skill on validation, from memory where it is known"
        if way in self.kept: return self.kept[way]
        found = [Forecaster.from_pretrained(self.base)] if way == 'base' else self.models(way)
        tried = [(f, self.calibrate(f, self.bars if bars is None else bars)) for f in found]
        f, chosen = min(tried, key=lambda o: dict(o[1].scores)['spread'])
        scores = dict(chosen.scores)
        drawn, alone, pool = (scores.pop(k) for k in ('as drawn', 'spread', 'delivered'))
        naive = min(scores.values())
        out = dict(anchored=(f, 1 - alone/naive),
            delivered=(Forecaster(f.tokenizer, f.predictors, calibration=chosen), 1 - pool/naive))
        return self.kept.setdefault(way, out)

    def judge(self, way) -> list:
        "Return a row for each way to deliver, against the base or the model of all symbols"
        L, H = self.market.windows
        symbol, bars, against = way.removesuffix(' alone'), self.bars, 'base'
        if symbol in self.market.targets:
            bars, against = bars[bars.symbol == symbol].reset_index(drop=True), 'both'
        model, base, rows = self.both_ways(way, bars), self.both_ways(against), []
        for delivery, (f, val) in model.items():
            b, val_base = base[delivery]
            e = evaluate(f, bars, L, H, base=b, start=pd.Timestamp(self.market.test), origins=64, paths=100,
                seed=self.seed, used={}, baselines=[NaivePool()], progress=False)
            t, pooled = e.tests.loc['base'], e.metrics.query("scope == 'pooled'").set_index(['model', 'metric']).value
            rows.append(dict(against=against, delivery=delivery, val=val, val_base=val_base,
                crps=pooled['model', 'crps'], base=pooled['base', 'crps'], naive=pooled['NaivePool', 'crps'],
                skill=t['skill'], low=t['low'], high=t['high']))
            for q in QUANTITIES: rows[-1][q] = 1 - pooled['model', f'crps_{q}']/pooled['base', f'crps_{q}']
        return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('market', choices=ALONE)
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--ways', nargs='+', help='all by default, each symbol alone among them')
    parser.add_argument('--out', default='runs/gain')
    args = parser.parse_args()
    market, done = MARKETS[args.market], pd.read_csv(OUT).to_dict('records') if OUT.exists() else []
    known = [*WAYS, *ALONE[args.market]]
    if wrong := set(args.ways or ()) - set(known): parser.error(f'--ways: got {sorted(wrong)}, allowed {known}')
    order = [*WAYS, *(way for ways in ALONE.values() for way in ways)]
    bars, out = read(args.data, market), Path(args.out)
    for seed in args.seeds:
        trial = None
        for way in args.ways or known:
            key = dict(market=args.market, seed=seed, way=way)
            if any(all(o[k] == v for k, v in key.items()) for o in done): continue
            trial = trial or Trial(market, bars, seed, out/folder_name(args.market, NORMALIZER, seed, WEIGHT))
            done += [key | o for o in trial.judge(way)]
            done.sort(key=lambda o: (list(ALONE).index(o['market']), order.index(o['way']), o['seed']))
            pd.DataFrame(done).to_csv(OUT, index=False)
            new = pd.DataFrame([o for o in done if all(o[k] == v for k, v in key.items())])
            print(new.round(3).to_string(), flush=True)


if __name__ == '__main__': main()
