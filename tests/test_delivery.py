"What is done to paths after they are drawn: begin at the last close, spread, pool; and what raw leaves out"
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from kronos_nb.core import DataError, RunError
from kronos_nb.data.read import is_sample
from kronos_nb.decode.calibration import Calibration
from kronos_nb.decode.paths import impossible
from kronos_nb.forecast import Forecaster
from kronos_nb.judging.baselines import EWMA, GeometricBrownian, random_walks
from kronos_nb.judging.calibrate import calibrate
from kronos_nb.judging.evaluation import Evaluation
from kronos_nb.settings import Sampling
from kronos_nb.train import load
from kronos_nb.training.run import Run
from tests.helpers import bars

DRAWN = dict(temperature=1., top_k=0, top_p=.9)
ALONE = {'Kronos': 1.}
LEARNT = Calibration(DRAWN, (2., 2.), 4, 1., {'Kronos': .3, 'EWMA': .7}, ALONE, ALONE, dates=30)


@pytest.fixture(scope='module')
def model(one_epoch_run):
    f = Forecaster.from_pretrained(one_epoch_run, calibration=None)
    assert f.anchor
    return f


def with_calibration(f, c=LEARNT): return Forecaster(f.tokenizer, f.predictors, calibration=c)


def past(n=40): return bars[bars.symbol == bars.symbol.iloc[0]].tail(n)


def test_an_anchored_forecast_is_the_raw_one_shifted_by_the_tokenizers_error(model):
    raw, f = (model.predict(past(), 4, paths=30, coherent_candles=False, raw=o) for o in (True, False))
    moved = f.paths[..., :4] - raw.paths[..., :4]
    np.testing.assert_allclose(moved, f.settings['shift'], rtol=1e-6)
    np.testing.assert_array_equal(f.paths[..., 4:], raw.paths[..., 4:])
    x = past(model.lookback_window)[list(model.features)].to_numpy()
    scale = model.normalizer.fit(x, len(x))
    with torch.no_grad():
        tokens = model.tokenizer.encode(torch.from_numpy(scale.encode(x))[None], half=True)
        z = model.tokenizer.decode(tokens, half=True)
    error = x[-1, 3] - scale.decode(z.double().numpy()[0, -1:])[0, 3]
    np.testing.assert_allclose(f.settings['shift'], error, rtol=1e-3)
    assert 'shift' not in raw.settings and raw.settings['anchor'] is False


def test_the_choice_travels_with_the_model(model, tmp_path):
    assert model.predictor.extra['anchor'] is True
    f = Forecaster(model.tokenizer, model.predictors, anchor=False, calibration=LEARNT)
    back = Forecaster.from_pretrained(f.save_pretrained(tmp_path))
    assert back.anchor is False and back.calibration == LEARNT
    for how in ({}, dict(raw=True)):
        np.testing.assert_array_equal(*(o.predict(past(), 4, paths=9, **how).paths for o in (f, back)))
    model.save_pretrained(tmp_path)   # over it: a calibration of other choices does not stay behind
    assert Forecaster.from_pretrained(tmp_path).calibration is None
    file = tmp_path/'predictor'/'calibration.json'
    for earlier in ('{"factors": [1, 1, 1], "dates": 30, "before": [1]}', '{"weight": 0.3, "naive": "EWMA"}'):
        file.write_text(earlier)
        with pytest.warns(UserWarning, match='calibration.json'):
            assert Forecaster.from_pretrained(tmp_path).calibration is None
    file.write_text('{"spread": [1, 1]}')
    with pytest.raises(RunError, match='calibration.json'):
        Forecaster.from_pretrained(tmp_path)


def test_paths_are_spread_and_pooled(model):
    raw, f = model.predict(past(), 4, paths=50), with_calibration(model).predict(past(), 4, paths=50)
    naive, = EWMA().predict_many([past(model.lookback_window)], 4, keys=[past().symbol.iloc[0]],
                                 futures=[f.timestamps], paths=50)
    closes, mine = f.paths[..., 3], np.arange(50)*(5**.5 - 1)/2 % 1 < .3
    assert abs(mine.sum() - 15) <= 1
    np.testing.assert_allclose(closes[~mine], naive.paths[~mine][..., 3], rtol=1e-9)
    middle = np.median(np.log(raw.paths[..., 3]), 0)
    np.testing.assert_allclose(np.log(closes[mine]) - middle, 2*(np.log(raw.paths[mine][..., 3]) - middle), atol=1e-9)
    ranges = [np.log(o.paths[..., 1]/o.paths[..., 2]) for o in (raw, f)]
    bodies = abs(np.log(f.paths[..., 0]/f.paths[..., 3]))
    np.testing.assert_allclose(ranges[1], np.maximum(ranges[0], bodies), atol=1e-9)
    np.testing.assert_array_equal(f.paths[..., 4], raw.paths[..., 4])


def test_closes_candles_and_volumes_have_pools_of_their_own(model):
    "A volume of a past bar, a range of the model times its factor, and the model's closes"
    c = dataclasses.replace(LEARNT, spread=(1., 1.), close=ALONE, candle=ALONE, range_factor=3.,
                            volume={'Kronos': .5, 'LastValue': .5}, volume_factor=2.)
    raw, f = model.predict(past(), 4, paths=40), with_calibration(model, c).predict(past(), 4, paths=40)
    np.testing.assert_allclose(f.paths[..., [0, 3]], raw.paths[..., [0, 3]], rtol=1e-9)
    ranges = [np.log(o.paths[..., 1]/o.paths[..., 2]) for o in (raw, f)]
    np.testing.assert_allclose(ranges[1], 3*ranges[0], rtol=1e-6)
    mine = np.arange(40)*(5**.5 - 1)/2 % 1 < .5
    np.testing.assert_allclose(f.paths[mine][..., 4], 2*raw.paths[mine][..., 4])
    assert np.isin(f.paths[~mine][..., 4], past(20).volume.to_numpy()).all()
    assert not impossible(f.paths).any()


def test_the_median_keeps_what_validation_said_of_its_drift(model):
    whole = model.predict(past(), 4, paths=9)
    c = dataclasses.replace(LEARNT, spread=(1., 1.), close=ALONE, drift=.4)
    f = with_calibration(model, c).predict(past(), 4, paths=9)
    last = np.log(past().close.iloc[-1])
    middle = [np.median(np.log(o.paths[..., 3]), 0) - last for o in (whole, f)]
    np.testing.assert_allclose(middle[1], .4*middle[0], rtol=1e-6)
    moved = np.log(f.paths[..., 3]) - np.log(whole.paths[..., 3])
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:1], moved.shape), atol=1e-9)


def test_a_calibration_is_for_the_sampling_it_was_learnt_with(model):
    f = with_calibration(model, dataclasses.replace(LEARNT, sampling=DRAWN | dict(top_p=1.)))
    own, same = f.predict(past(), 4, paths=9), f.predict(past(), 4, paths=9, temperature=1., top_p=1.)
    np.testing.assert_array_equal(own.paths, same.paths)
    assert own.settings['top_p'] == 1.
    other = f.predict(past(), 4, paths=9, top_p=.5)
    assert 'not calibrated' in other.notes[-1]
    np.testing.assert_array_equal(other.paths, model.predict(past(), 4, paths=9, top_p=.5).paths)
    greedy = f.predict(past(), 4, paths=2, temperature=0)
    np.testing.assert_array_equal(greedy.paths, model.predict(past(), 4, paths=2, temperature=0, top_p=1.).paths)


def test_a_grid_is_what_single_calls_give(model):
    samplings = [Sampling(7, 0, t, 0, p) for t, p in ((1., .9), (.8, 1.))]
    made = model.predict_grid([past(), past(30)], 4, samplings)
    for row, s in zip(made, samplings):
        for f, one in zip(row, model.predict_many([past(), past(30)], 4, sampling=s)):
            np.testing.assert_array_equal(f.paths, one.paths)


@pytest.mark.parametrize('shift', [0., -200.])
def test_histories_of_odd_prices_are_delivered(model, shift):
    "Prices that stand still, and prices below 0"
    t = past(30)
    flat = t.assign(open=100. + shift, high=100. + shift, low=100. + shift, close=100. + shift)
    f = with_calibration(model).predict(flat, 4, paths=20)
    assert np.isfinite(f.paths).all()


def test_few_dates_are_told_apart_from_none():
    "Four dates are refused; eight choose little: no factor far from 1, no member left out that is not far off"
    with pytest.raises(DataError, match='origins'):
        calibrate(GeometricBrownian(), random_walks(200), 60, 10, origins=4)
    c = calibrate(GeometricBrownian(), random_walks(200), 60, 10, origins=8)
    assert c.dates == 8 and all(.7 < f < 1.5 for f in c.spread)
    assert all(.1 < w < .5 for w in c.close.values()) and sum(c.close.values()) == pytest.approx(1)


@pytest.mark.parametrize('scale', [1., 1e-10, 1e10])
def test_choices_do_not_depend_on_the_currency(scale):
    walks = random_walks(600)
    prices = {c: walks[c]*scale for c in ('open', 'high', 'low', 'close')}
    a, b = (calibrate(GeometricBrownian(), o, 60, 5, origins=20) for o in (walks, walks.assign(**prices)))
    assert a.close == b.close and a.volume == b.volume and a.spread == pytest.approx(b.spread)


def test_few_paths_of_the_verdict_do_not_spoil_the_choices():
    c, d = (calibrate(GeometricBrownian(), random_walks(600), 60, 5, origins=20, paths=n) for n in (2, 30))
    assert c == d


def test_a_symbol_whose_price_stands_still_is_left_out():
    walks = random_walks(600)
    flat = walks.assign(symbol='FLAT', open=100., high=100., low=100., close=100.)
    both = pd.concat([walks, flat], ignore_index=True)
    a, b = (calibrate(GeometricBrownian(), o, 60, 5, origins=20) for o in (walks, both))
    assert a == b
    with pytest.raises(DataError, match='never moves'):
        calibrate(GeometricBrownian(), flat, 60, 5)


def test_bars_without_volume_and_short_lookbacks_leave_members_out():
    walks = random_walks(600)
    c = calibrate(GeometricBrownian(), walks.assign(volume=0., amount=0.), 60, 5, origins=20)
    assert c.volume == ALONE and 'SeasonalNaive' in c.candle
    short = calibrate(GeometricBrownian(), walks, 20, 5, origins=20)   # less than a day of hours
    assert 'SeasonalNaive' not in short.candle and 'SeasonalNaive' not in short.volume


def test_symbols_without_room_are_left_out_of_the_choice():
    walks = random_walks(900, ('A', 'B'))
    few = pd.concat([walks, random_walks(30, ('C',))], ignore_index=True)
    a, b = (calibrate(GeometricBrownian(), o, 60, 5) for o in (walks, few))
    assert a == b


def test_a_run_delivers_what_its_report_says(quickstart):
    r = load(quickstart)
    text = r.run.report_file.read_text()
    assert r.calibration.sentence in text and set(r.calibration.close) == {'Kronos', 'LastValue', 'EWMA', 'Garch'}
    assert set(r.calibration.scores) >= {'as drawn', 'spread', 'delivered'}
    card = (quickstart/'predictor'/'best_model'/'README.md').read_text()
    assert r.calibration.sentence in card


def test_the_commands_that_a_finished_quickstart_names_work_elsewhere(quickstart, tmp_path, monkeypatch):
    "From any folder: the bars of the run ship with the package"
    from kronos_nb.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(['forecast', '--model', str(quickstart), '--paths', '3', '--market-tz', 'America/New_York']) == 0
    assert main(['evaluate', '--model', str(quickstart), '--paths', '4', '--origins', '8', '--out', 'judged']) == 0
    assert 'base' in Evaluation.load('judged').models


@pytest.mark.parametrize('more', [[], ['--raw']])
def test_evaluate_delivers_the_base_as_the_verdict_did(quickstart, more):
    from kronos_nb.cli import _base_of, parser
    a = parser().parse_args(['evaluate', '--model', str(quickstart), *more])
    base = _base_of(a, Forecaster.from_pretrained(quickstart))
    kept = Calibration.load(Run(quickstart).base_calibration)
    assert (base.anchor, base.calibration) == ((False, None) if more else (True, kept))
    assert kept != load(quickstart).calibration


def test_a_file_that_ships_is_known():
    assert is_sample('stocks_daily.csv.gz') and is_sample('dogeusdt_1h.csv.gz') and not is_sample('mine.csv')
