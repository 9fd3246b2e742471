"""What a process pays before it does something: seconds of the processor, a new process each

    OMP_NUM_THREADS=1 python benchmarks/start.py [--repeats 5]

Cases take turns; medians. The forecasts are of the model that ships, one path of ten bars after 200: the first of a
process, after loading, and the second. `without numba` is what the base install does.
"""
import argparse
import os
import subprocess
import sys
import time

import pandas as pd

from kronos_nb.speed import processor

FORECAST = """
from kronos_nb.data.read import sample_klines
from kronos_nb.forecast import Forecaster
bars, f = sample_klines('GOOG').tail(200), Forecaster.from_pretrained('bundled')
at = [time.process_time()]
for _ in range(2):
    f.predict(bars, 10, paths=1)
    at.append(time.process_time())
print(at[1] - at[0], at[2] - at[1])
"""
WHOLE = "\nprint(time.process_time())"
NO_NUMBA = "import sys; sys.modules['numba'] = None\n"
CASES = {   # name -> code that prints one figure or two
    'import torch': 'import torch' + WHOLE,
    'import kronos_nb.train': 'import kronos_nb.train' + WHOLE,
    'kronos-nb --version': "from kronos_nb.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass" + WHOLE,
    'kronos-nb --help': "from kronos_nb.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass" + WHOLE,
    'first and second forecast, without numba': NO_NUMBA + FORECAST,
    'first and second forecast, with numba': FORECAST,
}


def seconds(code) -> list:
    "Return the figures in the last line that a new process prints"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'import time\n' + code], text=True, check=True,
        capture_output=True, env=os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE'))
    return [float(o) for o in done.stdout.splitlines()[-1].split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    for code in CASES.values(): seconds(code)   # compiled code and files in memory are there for all
    rows = [dict(case=name, take=i, s=s) for _ in range(args.repeats) for name, code in CASES.items()
            for i, s in enumerate(seconds(code), 1)]
    print(processor(), time.strftime('%Y-%m-%d'))
    print(pd.DataFrame(rows).groupby(['case', 'take'], sort=False).s.agg(['median', 'min', 'max']).round(2).to_string())


if __name__ == '__main__': main()
