"Bars, normalisation, windows and augmentation: what teaches nothing but must hold"
import numpy as np, pandas as pd, pytest, torch
from kronos_nb.core import FEATURES
from kronos_nb.data.augment import Augment
from kronos_nb.data.kline import COLUMNS, check_klines, read_klines, repair_klines, sample_klines
from kronos_nb.data.normalize import MedianMAD, ZScore
from kronos_nb.data.window import BatchSampler, WindowDataset, permute, split_by_time

@pytest.mark.parametrize('name', ['AAPL', 'FB', 'GOOG', 'IBM', 'MSFT', 'ASHARE_5MIN', 'DOGEUSDT'])
def test_samples_are_canonical(name):
    b = sample_klines(name)
    assert tuple(b.columns)==COLUMNS and b.timestamps.dtype=='M8[ns]' and check_klines(b).ok
    fixed, changes = repair_klines(b)
    assert not len(changes) and fixed.equals(b)

@pytest.mark.parametrize('norm', [ZScore(), MedianMAD()])
def test_batch_equals_stacked_items(norm):
    ds = WindowDataset(sample_klines('DOGEUSDT'), 50, 7, norm, stride=3)
    b = ds.batch(range(len(ds)))
    for i in range(len(ds)):
        one = ds[i]
        for k in ('hist_features', 'hist_timestamps', 'pred_features', 'pred_timestamps'): assert torch.equal(one[k], b[k][i])
        for k, v in one['stats'].items(): assert torch.equal(v, b['stats'][k][i])
    assert b['hist_features'].dtype==torch.float32 and b['hist_timestamps'].dtype==torch.int64
