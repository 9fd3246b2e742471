"""The two BTC presets side by side, and the DOGE workflow, from a base trained on other bars, at a reduced size.

    OMP_NUM_THREADS=1 python benchmarks/compare_presets.py BTC_FILE DOGE_FILE --out runs/presets

BTC_FILE and DOGE_FILE are hourly bars in anything `read_klines` takes. What is reduced: the model (tiny instead of small), the epochs and the windows of an epoch; everything else is the preset's. Interrupt it when you like: the same command goes on.
"""
import argparse, time
from pathlib import Path
from kronos_nb.compare import compare
from kronos_nb.config import Config
from kronos_nb.data.kline import read_klines
from kronos_nb.train import fit

p = argparse.ArgumentParser()
p.add_argument('btc'); p.add_argument('doge')
p.add_argument('--out', default='runs/presets')
p.add_argument('--windows', type=int, default=3200, help='windows of an epoch')
p.add_argument('--epochs', type=int, default=3)
p.add_argument('--origins', type=int, default=240)
p.add_argument('--only', choices=('btc', 'doge'))
a = p.parse_args()
out, t = Path(a.out), time.time()
btc, doge = read_klines(a.btc, 'BTCUSDT'), read_klines(a.doge, 'DOGEUSDT')
small = lambda epochs, windows: {f'{s}.{k}': v for s in ('tokenizer', 'predictor') for k, v in dict(init='scratch', size='tiny', epochs=epochs, model={}).items()} | {
    'data.windows_per_epoch': windows, 'data.val_windows': 640, 'runtime.plots': False, 'runtime.progress': False, 'runtime.precision': 'fp32'}

def run(name, preset, bars, base_bars, windows, base_epochs, origins):
    "A base on other bars, before the first bar that chooses the model, then the preset from it"
    cfg = Config.preset(preset).replace(**small(a.epochs, windows), **{'evaluate.origins': origins})
    cut = bars.timestamps.iloc[int(len(bars) * cfg.data.train)]
    base = cfg.replace(**small(base_epochs, windows), **{'tokenizer.lr': 1e-3, 'predictor.lr': 1e-3, 'data.test': 0., 'data.train': .9, 'data.val': .1},
                       augment=dict(noise_std=0., feature_dropout=0., time_shift_max=0, scale_low=1., scale_high=1.))
    where = out/f'base_of_{base_bars.symbol.iloc[0]}'
    for data, c, folder, more in ((base_bars[base_bars.timestamps < cut], base, where, {}), (bars, cfg, out/name, {'runtime.init_from': str(where)})):
        if (folder/'report.md').exists(): continue
        if fit(data, c, folder, **more).interrupted: raise SystemExit(f'{folder} was interrupted after {time.time() - t:.0f} s; run the same command again to go on')
    print(f'{name}: {time.time() - t:.0f} s of this session', flush=True)

if a.only != 'doge':
    for name in ('btc_original', 'btc_optimized'): run(name, name, btc, doge, a.windows, 10, a.origins)
    print(compare([out/'btc_original', out/'btc_optimized']).to_markdown(), flush=True)
if a.only != 'btc':
    run('doge', 'doge', doge, btc, a.windows // 4, 6, 32)
    from kronos_nb.evaluate import Evaluation
    print(Evaluation.load(out/'doge').to_markdown())
