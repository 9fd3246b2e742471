"What a calibration does to closes, ranges and volumes is said with every forecast, wherever it is read"
import json
from dataclasses import replace

import pytest

from kronos_nb.data.read import sample_klines
from kronos_nb.decode.calibration import KRONOS, Calibration, pools_text
from kronos_nb.forecast import Forecaster
from kronos_nb.ledger import Ledger

doge = sample_klines('DOGEUSDT')[:120]
close, candle, volume = {KRONOS: .25, 'EWMA': .75}, {KRONOS: 1., 'EWMA': 0.}, {KRONOS: .5, 'SeasonalNaive': .5}
kept = Calibration(dict(temperature=1., top_k=0, top_p=.9), (1.2, 1.3), 4, .5, close, candle, volume)
POOLS = dict(closes=close, ranges={KRONOS: 1.}, volumes=volume)


@pytest.fixture(scope='module')
def forecaster():
    return Forecaster.from_pretrained('bundled', calibration=kept)


@pytest.fixture(scope='module')
def forecast(forecaster):
    return forecaster.predict(doge, 4, paths=8, lookback_window=40)


def test_with_a_forecast(forecaster, forecast):
    assert forecast.settings['pools'] == POOLS and any(pools_text(POOLS) in o for o in forecast.notes)
    assert all(o in pools_text(POOLS) for o in ('closes', 'ranges', 'volumes', '0.25 Kronos', 'Kronos alone'))
    assert pools_text(POOLS)[1:] in kept.sentence   # of a run, its report and its card
    assert 'pools' not in forecaster.predict(doge, 4, paths=8, lookback_window=40, raw=True).settings
    same = replace(kept, candle=close, volume=close)
    assert pools_text(same.pools()) == 'closes and ranges and volumes are 0.25 Kronos, 0.75 EWMA'


def test_a_member_that_is_missing_is_not_named(forecaster):
    short = replace(kept, close={KRONOS: .3, 'Garch': .7})
    f = Forecaster.from_pretrained('bundled', calibration=short).predict(doge[:4], 4, paths=8, lookback_window=40)
    assert f.settings['pools']['closes'] == {KRONOS: 1.} and any('not pooled with Garch' in o for o in f.notes)


def test_in_a_ledger(tmp_path, forecaster, forecast):
    ledger = Ledger(tmp_path)
    ledger.append(forecast, forecaster)
    ledger.append(replace(forecast, settings=forecast.settings | dict(pools=dict(POOLS, closes={KRONOS: 1.})),
                          history=forecast.history[:-1]), forecaster)   # a member was missing: still one series
    assert len(ledger.series) == 1 and json.loads(ledger.series['settings'].iloc[0])['pools'] == POOLS
    bars = sample_klines('DOGEUSDT')[:130]
    ledger.grade(bars)
    assert any(pools_text(POOLS) in o for o in ledger.report().sentences)


def test_in_an_answer(forecast):
    from types import SimpleNamespace

    from kronos_nb.serve import _as_json
    got = json.loads(json.dumps(_as_json(forecast, 'toy', 'hash', SimpleNamespace(quantiles=[.5], return_paths=False))))
    assert got['settings']['pools'] == POOLS and any(pools_text(POOLS) in o for o in got['notes'])
