"""Train the small base that ships with the package, from the bundled daily shares

    python tools/make_base.py [--out runs/base] [--epochs 3]

Bars: AAPL, IBM and MSFT (public domain) before `END`, where the quickstart's validation begins; GOOG stays unseen. Each
share appears once with its own dates and once for each interval of `CLOCKS`, as if its bars followed each other without
a break: the embeddings of minutes and hours are trained, and carry no clock that daily bars do not have.
The run can be interrupted and called again. The pair is copied to `kronos_nb/model/bundled/`.
"""
import argparse
import shutil
from pathlib import Path

import pandas as pd

from kronos_nb.config import Config
from kronos_nb.data.read import sample_klines
from kronos_nb.train import fit

END = '2010-08-01'
SYMBOLS = ['AAPL', 'IBM', 'MSFT']
CLOCKS = ('5min', '30min', '1h', '4h')
HOME = Path(__file__).resolve().parents[1]/'kronos_nb'/'model'/'bundled'
CARD = """# A small base for trying things out

{kind} of size tiny ({n_params:,} parameters), trained by `tools/make_base.py` on daily bars of AAPL, IBM and
MSFT from {first:%Y-%m-%d} to {last:%Y-%m-%d} (public domain).

It is a toy beside the released weights: three shares against the markets of the world. It makes
`kronos-nb forecast` and fine-tuning work at once and without a network. For forecasts that matter, start from
`NeoQuasar/Kronos-mini`, `-small` or `-base`.
"""


def bars_on_many_clocks() -> pd.DataFrame:
    "Return the shares with their own dates, and once more on each clock"
    bars = sample_klines(SYMBOLS)
    bars = bars[bars.timestamps < END]
    parts = [bars]
    for clock in CLOCKS:
        for symbol, part in bars.groupby('symbol'):
            stamps = pd.date_range('2003-01-01', periods=len(part), freq=clock)
            parts.append(part.assign(symbol=f'{symbol}@{clock}', timestamps=stamps))
    return pd.concat(parts, ignore_index=True)


def config(epochs: int) -> Config:
    "Return how the base is trained"
    stage = dict(size='tiny', epochs=epochs, batch_size=64, weight_decay=.05, warmup=.05)
    return Config().replace(
        data=dict(lookback_window=120, predict_window=24, train=.9, val=.1, test=0., embargo=24, val_windows=600),
        tokenizer=stage | dict(lr=1e-3, difference_weight=4.), predictor=stage | dict(lr=1e-3),
        runtime=dict(save_steps=100, plots=False, seed=1), evaluate=dict(calibrate='off'))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default='runs/base')
    parser.add_argument('--epochs', type=int, default=3)
    args = parser.parse_args()
    bars = bars_on_many_clocks()
    result = fit(bars, config(args.epochs), args.out, judge=False)
    if result.interrupted:
        raise SystemExit(f'interrupted: {result.stop_reason}; call again to go on')
    own = bars[bars.symbol.isin(SYMBOLS)].timestamps
    for stage, model in (('tokenizer', result.tokenizer), ('predictor', result.predictor)):
        folder = HOME/stage
        shutil.rmtree(folder, ignore_errors=True)
        del model.extra['interval']   # there were several
        model.extra['trained_on'] = {k: v for k, v in model.extra['trained_on'].items() if k in SYMBOLS}
        model.save_pretrained(folder)
        card = CARD.format(kind=stage.capitalize(), n_params=model.n_params, first=own.min(), last=own.max())
        (folder/'README.md').write_text(card, encoding='utf-8')
    print(f'written: {HOME}')


if __name__ == '__main__':
    main()
