"""What delivery costs beside drawing: CPU seconds of a calibration's work on one forecast, for several sizes of model

    OMP_NUM_THREADS=1 python benchmarks/delivery.py [--sizes bundled mini small] [--repeats 5]

Closes, ranges and volumes are pooled with all naive forecasts, the most that a calibration can ask for; the fits of
GARCH are forgotten before every call, as a process that makes one forecast would have none. 100 paths of 24 hourly
bars, one history at a time. The published sizes have random weights: the time does not depend on them.
"""
import argparse
import statistics
import time

import pandas as pd

from forecast import bars, models
from kronos_nb.decode.calibration import KRONOS, POOLS, Calibration
from kronos_nb.forecast import Forecaster
from kronos_nb.judging import baselines
from kronos_nb.model.pretrained import BUNDLED
from kronos_nb.settings import Sampling

HORIZON, HISTORIES = 24, 4


def pools():
    "Return a calibration that asks every member for its part"
    def equal(name): return dict.fromkeys((KRONOS, *POOLS[name]), 1/(1 + len(POOLS[name])))
    return Calibration(dict(temperature=1., top_k=0, top_p=1.), (1., 1.2), HORIZON, .2, *map(equal, POOLS))


def seconds(f, *args):
    "Return the CPU seconds of a call, and what it returns"
    start = time.process_time()
    out = f(*args)
    return time.process_time() - start, out


def cost(forecaster, lookback, repeats) -> dict:
    "Return median milliseconds of drawing, of delivery, and of delivery with the fits of an earlier call"
    calibration, sampling = pools(), Sampling(paths=100)
    drawn, first, again = [], [], []
    for i in range(HISTORIES):
        history = bars(i, lookback)
        for _ in range(repeats):
            t, made = seconds(lambda: forecaster.predict_many([history], HORIZON, sampling=sampling, progress=False))
            baselines._garch_parameters.cache_clear()
            drawn.append(t)
            first.append(seconds(calibration.apply, made)[0])
            again.append(seconds(calibration.apply, made)[0])
    return {k: 1000*statistics.median(v[1:]) for k, v in dict(drawing=drawn, delivery=first, again=again).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', nargs='+', default=[BUNDLED, 'mini', 'small'])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--lookback', type=int, default=120)
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        f = Forecaster.from_pretrained(BUNDLED) if size == BUNDLED else Forecaster(*models(size))
        o = cost(f, args.lookback, args.repeats)
        rows.append(dict(model=size, **{f'{k}, ms': round(v, 1) for k, v in o.items()},
                         share=f"{100*o['delivery']/o['drawing']:.0f} %"))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)


if __name__ == '__main__': main()
