"Forecasts against the reference's golden ones, and the promises about paths, stamps and errors"

import copy, os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file

from kronos_nb.data.calendar import future_stamps
from kronos_nb.core import ConfigError, DataError, KronosError, ModelError, RunError
from kronos_nb.data.read import sample_klines
from kronos_nb.data.normalize import MedianMAD, ZScore
from kronos_nb.forecast import Forecaster, coherent, impossible
from kronos_nb.decode import engine, sample
from kronos_nb.decode.engine import Decoder, Detokenizer
from kronos_nb.decode.sample import Prefill, decode_tail, generate
from kronos_nb.kernels import choice
from kronos_nb.model.layers import evaluating
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer

golden = Path(__file__).parent / 'golden'
torch.set_num_threads(1)


def load(size, **kw):
    pair = golden / size / 'tokenizer', golden / size / 'predictor'
    return Forecaster.from_pretrained(*pair, **dict(anchor=False) | kw)


def bars_of(size='tiny', a=0, b=80):
    return pd.read_csv(golden / size / 'bars_rows_90_169.csv', parse_dates=['timestamps'])[a:b].assign(symbol='A')


@pytest.fixture(scope='module')
def fc():
    return load('tiny', max_context=32, lookback_window=24)


def walk(n=60, seed=0, symbol='W', start='2024-01-01', freq='h'):
    rng = np.random.default_rng(seed)
    c = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    o = np.concatenate(([100], c[:-1]))
    return pd.DataFrame(
        dict(
            symbol=symbol,
            timestamps=pd.date_range(start, periods=n, freq=freq),
            open=o,
            high=np.maximum(o, c) * 1.002,
            low=np.minimum(o, c) * 0.998,
            close=c,
            volume=rng.lognormal(3, 1, n),
            amount=100 * rng.lognormal(3, 1, n),
        )
    )


# Golden


@pytest.mark.parametrize('size', ['tiny', 'bits10'])
@pytest.mark.parametrize('name, max_context', [('greedy_within_values', 64), ('greedy_rolling_values', 32)])
def test_greedy_generation(size, name, max_context):
    e, f = load_file(golden / size / 'expected.safetensors'), load(size)
    s1, s2, stamp = e['s1'][:, :28], e['s2'][:, :28], e['stamp']
    with evaluating(f.tokenizer, f.predictor):
        made = generate(
            Prefill(Decoder(f.predictor), s1, s2, stamp, max_context), torch.zeros(3, 1, 12, 2), temperature=0
        )
        z = decode_tail(Detokenizer(f.tokenizer), (s1, s2), made, max_context)
    torch.testing.assert_close(z, e[name][:, -12:], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = f.tokenizer.decode([torch.cat(o, 1)[:, -max_context:] for o in zip((s1, s2), made)], half=True)
    torch.testing.assert_close(whole, e[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', ['tiny', 'bits10'])
def test_greedy_forecast_in_price_units(size):
    "Rows 100..147 of the five-minute file; the file's own stamps are the future"
    bars, want = bars_of(size), load_file(golden / size / 'expected.safetensors')['predict_df_values']
    f = load(size, max_context=64).predict(
        bars[10:58], 12, paths=2, temperature=0, future=bars['timestamps'][58:70], coherent_candles=False
    )
    np.testing.assert_allclose(f.paths[0], want.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(f.paths[0], f.paths[1])


# Paths


def test_a_path_depends_on_seed_symbol_and_number_alone(fc):
    a, b = walk(symbol='A', seed=1), walk(symbol='B', seed=2)
    alone = fc.predict(a, 12, paths=6, seed=5).paths
    np.testing.assert_array_equal(fc.predict(a, 12, paths=3, seed=5).paths, alone[:3])
    np.testing.assert_array_equal(fc.predict(pd.concat([b, a]), 12, paths=6, seed=5)['A'].paths, alone)
    np.testing.assert_array_equal(fc.predict(a, 12, paths=6, seed=5, memory=0.01).paths, alone)
    assert not np.allclose(fc.predict(a, 12, paths=6, seed=6).paths, alone)
    assert not np.allclose(fc.predict(a.assign(symbol='C'), 12, paths=6, seed=5).paths, alone)
    assert len(np.unique(alone[:, -1, 3])) > 1


def test_horizon_only_adds_bars_within_the_context(fc):
    a = walk(24)
    short, long = (fc.predict(a, h, paths=4).paths for h in (4, 8))
    np.testing.assert_allclose(short, long[:, :4], rtol=1e-5)


def test_different_lengths_in_one_call(fc):
    hists = [walk(n, seed=n, symbol=str(n)) for n in (5, 24, 13, 24)]
    many = fc.predict_many(hists, 10, paths=3)
    for h, f in zip(hists, many):
        np.testing.assert_allclose(f.paths, fc.predict(h, 10, paths=3).paths, rtol=1e-6)
    assert [len(f.history) for f in many] == [5, 24, 13, 24]


def test_keys_address_the_random_numbers(fc):
    a = walk()
    x, y, z = fc.predict_many([a, a, a], 6, keys=['1', '2', '1'], paths=2)
    np.testing.assert_allclose(x.paths, z.paths, rtol=1e-6)
    assert not np.allclose(x.paths, y.paths)


@pytest.mark.parametrize('horizon, max_context', [(12, 64), (12, 30), (40, 32), (70, 32)])
def test_horizons_within_at_and_beyond_the_context(horizon, max_context):
    f = load('tiny', max_context=max_context, lookback_window=24).predict(walk(), horizon, paths=2)
    assert f.paths.shape == (2, horizon, 6) and np.isfinite(f.paths).all() and not impossible(f.paths).any()


def test_refresh_is_another_mode_only_past_the_context():
    near, far = (load('tiny', max_context=c, lookback_window=24) for c in (64, 30))
    a = walk()
    np.testing.assert_allclose(
        near.predict(a, 12, paths=3, refresh=8).paths, near.predict(a, 12, paths=3).paths, rtol=1e-6
    )
    exact, fast = (far.predict(a, 12, paths=3, refresh=r).paths for r in (1, 8))
    assert not np.allclose(exact, fast)


def test_modes_weights_and_inputs_stay_as_they_were(fc):
    a, f = walk(), load('tiny', max_context=32)
    f.predictor.train()
    f.predictor.transformer[0].eval()
    f.tokenizer.train()
    before, mode = (
        {k: v.clone() for k, v in f.predictor.state_dict().items()},
        [m.training for o in (f.predictor, f.tokenizer) for m in o.modules()],
    )
    copy_, state = a.copy(deep=True), torch.get_rng_state()
    f.predict(a, 10, paths=2)
    pd.testing.assert_frame_equal(a, copy_)
    assert [m.training for o in (f.predictor, f.tokenizer) for m in o.modules()] == mode
    assert all(torch.equal(v, before[k]) for k, v in f.predictor.state_dict().items()) and torch.equal(
        state, torch.get_rng_state()
    )
    f.predictor.loss(torch.zeros(1, 40, dtype=torch.long), torch.zeros(1, 40, dtype=torch.long))['loss'].backward()
    with pytest.raises(DataError):
        f.predict(a.assign(close=np.nan), 10)
    assert [m.training for o in (f.predictor, f.tokenizer) for m in o.modules()] == mode


def test_ensembles_pool_their_paths(fc):
    other = copy.deepcopy(fc.predictor)
    with torch.no_grad():
        other.head.proj_s1.weight.mul_(-1)
    kw = dict(max_context=32, lookback_window=24)
    a, b, both = (
        Forecaster(fc.tokenizer, o, **kw).predict(walk(), 8, paths=6).paths
        for o in (fc.predictor, other, [fc.predictor, other])
    )
    np.testing.assert_allclose(both[::2], a[::2], rtol=1e-6)
    np.testing.assert_allclose(both[1::2], b[1::2], rtol=1e-6)


def test_one_empty_cell_is_one_bar_in_the_error(fc):
    bars = sample_klines('DOGEUSDT').tail(60).drop(columns='amount').reset_index(drop=True)
    bars.loc[55, 'close'] = np.nan   # the amount that is made of it is empty, too
    with pytest.raises(DataError, match=rf"{bars.timestamps[55]}.*\b1 such"):
        fc.predict(bars, 4)


def test_candles_are_repaired_on_a_copy_and_only_where_needed(fc):
    raw, ok = (fc.predict(walk(), 12, paths=50, coherent_candles=o) for o in (False, True))
    assert impossible(raw.paths).any() and not impossible(ok.paths).any()
    np.testing.assert_array_equal(ok.paths[..., [0, 3]], raw.paths[..., [0, 3]])
    good = ~impossible(raw.paths)
    np.testing.assert_array_equal(ok.paths[good], raw.paths[good])
    assert 0 < ok.settings['repaired'] < 1


# Stamps


@pytest.mark.parametrize('name, symbol, calendar', [('ASHARE_5MIN', 'ASHARE_5MIN', 'XSHG'), ('IBM', 'IBM', 'XNYS')])
def test_exchange_calendar_knows_holidays_and_labels(name, symbol, calendar):
    pytest.importorskip('exchange_calendars')
    t = pd.DatetimeIndex(sample_klines(symbol)['timestamps'])
    for i in (1000, 1500, 2000):
        np.testing.assert_array_equal(future_stamps(t[:i], 200, calendar)[0], t[i : i + 200])
    with pytest.raises(DataError, match='pass future='):
        future_stamps(pd.bdate_range('2030-01-01', periods=60) - pd.Timedelta('5D'), 10**4, calendar)
    with pytest.raises(ConfigError, match='get_calendar_names'):
        future_stamps(t, 5, 'NOWHERE')


def test_exchange_calendar_absent_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'exchange_calendars', None)
    with pytest.raises(ConfigError, match='pip install exchange_calendars'):
        future_stamps(walk()['timestamps'], 5, 'XNYS')


@example(2, 1, '7D', pd.Timestamp('2001-02-22'))  # two weekly bars on either side of a month's end are no months
@given(
    st.integers(2, 400),
    st.integers(1, 300),
    st.sampled_from(['1min', '5min', '30min', 'h', '4h', 'D', 'B', '7D', 'MS', 'ME']),
    st.datetimes(pd.Timestamp('2001-01-01'), pd.Timestamp('2030-01-01')),
)
@settings(max_examples=60, deadline=None)
def test_stamps_ahead_increase_and_follow_the_history(n, h, freq, start):
    t = pd.date_range(pd.Timestamp(start).floor('min'), periods=n, freq=freq)
    if len(t) < 2:
        return
    f, _ = future_stamps(t, h)
    assert len(f) == h and f.is_monotonic_increasing and f.is_unique and f[0] > t[-1]
    if freq in ('7D', 'MS', 'ME'):
        assert (f == pd.date_range(t[-1], periods=h + 1, freq=freq)[1:]).all()
    if freq in ('1min', 'h') and n > 3:
        assert (np.diff(f) == pd.Timedelta(1, freq[-1] if freq == 'h' else 'min')).all()


def test_zone_aware_stamps_become_utc(fc):
    a = walk()
    b = a.assign(timestamps=a['timestamps'].dt.tz_localize('UTC').dt.tz_convert('Asia/Shanghai'))
    np.testing.assert_array_equal(fc.predict(a, 5, paths=2).paths, fc.predict(b, 5, paths=2).paths)


# Pictures


def test_plotly_chart_where_installed(fc):
    pytest.importorskip('plotly')
    f = fc.predict(walk(), 6, paths=9)
    fig = f.plot(interactive=True, actual=walk(66)[60:])
    assert len(fig.data) == 1 + 2 + 5 + 1 + 1
    assert {o.y[0] for o in fig.data[3:9]} == {f.last_close} and fig.data[3].x[0] == f.history.index[-1]


def test_plotly_absent_names_the_remedy(fc, monkeypatch):
    monkeypatch.setitem(sys.modules, 'plotly', None)
    monkeypatch.setitem(sys.modules, 'plotly.graph_objects', None)
    with pytest.raises(ConfigError, match='pip install plotly'):
        fc.predict(walk(), 3, paths=2).plot(interactive=True)


# Options


def logits_of(decoder, e):
    with torch.inference_mode():
        session = decoder.session(1)
        context = decoder.read(e['s1'], e['s2'], decoder.embed_stamps(e['stamp']), session)
        return decoder.s1_logits(context), decoder.s2_logits(context, e['s1'][:, 0], session)


FALLBACKS = [
    ({}, ((choice, '_has_onednn'),), 1e-5),
    ({}, ((engine, 'machine_code'),), 1e-5),
    (dict(compiler='eager'), ((engine, 'machine_code'),), 1e-5),
    (dict(dtype=torch.bfloat16), (), 0.05),
    (dict(dtype=torch.bfloat16), ((engine, 'machine_code'),), 0.05),
    (dict(dtype=torch.bfloat16), ((choice, '_has_onednn'),), 0.05),
]


@pytest.mark.parametrize('kw, absent, atol', FALLBACKS)
def test_engine_options_compute_the_same_function(kw, absent, atol, monkeypatch):
    "Also where numba or oneDNN's arranged weights are absent"
    for module, name in absent:
        monkeypatch.setattr(module, name, lambda *args: None)
    e, f = load_file(golden / 'tiny' / 'expected.safetensors'), load('tiny')
    with torch.no_grad():
        want, context = f.predictor.decode_s1(e['s1'], e['s2'], e['stamp'])
        want = want[:, -1], f.predictor.decode_s2(context, e['s1'][:, :1])[:, -1]
    for a, b in zip(logits_of(Decoder(f.predictor, **kw), e), want):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    torch._dynamo.reset()


def test_threads_share_all_units_once():
    from kronos_nb.core import threads
    from kronos_nb.kernels.parallel import share_units

    for n, work, want in ((7, 10**9, 3), (2, 10**9, 2), (7, 10, 1), (1, 10**9, 1)):
        done = []
        with threads(3):
            share_units(lambda a, e: done.append(range(a, e)), n, work)
        assert len(done) == want and sorted(i for o in done for i in o) == list(range(n))


def test_an_error_in_a_thread_is_raised():
    from kronos_nb.core import threads
    from kronos_nb.kernels.parallel import share_units

    def f(a, e):
        if a:
            raise ValueError('second half')

    with threads(2), pytest.raises(ValueError, match='second half'):
        share_units(f, 2, 10**9)


def test_machine_code_and_tensor_operations_draw_the_same_tokens(monkeypatch):
    pytest.importorskip('numba')
    paths = {}
    for how in ('machine code', 'tensors'):
        f = load('tiny', max_context=32, lookback_window=24)   # arranged weights are kept with the models
        if how == 'tensors':
            for m in (engine, sample):
                monkeypatch.setattr(m, 'machine_code', lambda name: None)
        paths[how] = [
            f.predict(walk(), H, paths=7, refresh=r, top_k=k, top_p=p).paths
            for H, r, k, p in ((8, 1, 0, 0.9), (20, 1, 5, 0.8), (20, 4, 0, 1.0))
        ]
    for a, b in zip(*paths.values()):
        np.testing.assert_allclose(a, b, rtol=1e-4)


ATTEND = """
import hashlib, numpy as np
from kronos_nb.kernels import attention
rng, N, H, d, P = np.random.default_rng(0), 12, 2, 16, 300
def floats(*shape): return rng.normal(size=shape).astype(np.float32)
z, cis, out = floats(N, 1, 3, H, d), np.ones((1, 3, 1, d//2), np.complex64), np.empty((N, 1, H, d), np.float32)
history, own = (floats(1, H, d, P), floats(1, H, P, d)), (floats(N, H, 9, d), floats(N, H, 9, d))
attention.attend(z, cis, *history, *own, 9, False, out, 0, H)
print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_a_process_that_compiles_has_the_bits_of_one_that_loads(tmp_path):
    pytest.importorskip('numba')
    env = os.environ | dict(NUMBA_CACHE_DIR=str(tmp_path), PYTHONPATH=str(golden.parents[1]))
    runs = [
        subprocess.run([sys.executable, '-c', ATTEND], env=env, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert len({o.stdout for o in runs}) == 1 and any(tmp_path.rglob('*.nbc'))


def test_bfloat16_forecasts_and_is_not_silent(fc):
    f = load('tiny', max_context=32, lookback_window=24, precision='bfloat16').predict(walk(), 12, paths=3)
    assert np.isfinite(f.paths).all() and f.settings['precision'] == 'bfloat16'
    with pytest.raises(ConfigError, match='float32, bfloat16'):
        load('tiny', precision='float16')


# Files


def test_saved_and_loaded(fc, tmp_path):
    fc.save_pretrained(tmp_path)
    again = Forecaster.from_pretrained(tmp_path, lookback_window=24)
    np.testing.assert_array_equal(again.predict(walk(), 5, paths=2).paths, fc.predict(walk(), 5, paths=2).paths)
    assert again.max_context == 32 and again.normalizer == fc.normalizer and 'normalizer' not in fc.predictor.extra
    run = tmp_path / 'run'
    for kind in ('tokenizer', 'predictor'):
        getattr(fc, kind).save_pretrained(run / kind / 'best_model')
    assert Forecaster.from_pretrained(run).max_context == 512
    with pytest.raises(RunError, match='holds no predictor'):
        fc.tokenizer.save_pretrained(tmp_path / 'half' / 'tokenizer')
        Forecaster.from_pretrained(tmp_path / 'half')
    with pytest.raises(ModelError, match="did you mean 'NeoQuasar/Kronos-mini'"):
        Forecaster.from_pretrained('NeoQuasar/Kronos-mimi')


def test_released_predictors_know_their_tokenizer(monkeypatch):
    import huggingface_hub

    asked = []

    def give(repo, name, revision=None):
        asked.append(repo)
        return str(golden / 'tiny' / ('tokenizer' if 'Tokenizer' in repo else 'predictor') / name)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', give)
    Forecaster.from_pretrained('NeoQuasar/Kronos-mini')
    assert set(asked) == {'NeoQuasar/Kronos-Tokenizer-2k', 'NeoQuasar/Kronos-mini'}


def test_memory_of_released_sizes():
    tok = KronosTokenizer.from_size('Kronos-Tokenizer-2k')
    tok.extra.clear()
    for name, n in (('Kronos-mini', 2048), ('Kronos-small', 512)):
        model = Kronos.from_size(name)
        model.extra.clear()
        assert Forecaster(tok, model).max_context == n


# Bad input


def test_pairs_that_do_not_fit():
    a, b = load('tiny'), load('bits10')
    with pytest.raises(ModelError, match=r'tokens of 4 \+ 4 bits and the predictor reads 10 \+ 10'):
        Forecaster(a.tokenizer, b.predictor)
    a.predictor.extra['tokenizer_hash'] = '0' * 16
    with pytest.raises(ModelError, match='tokens of another tokenizer'):
        Forecaster(a.tokenizer, a.predictor)
    a.predictor.extra['tokenizer_hash'] = a.tokenizer.weights_hash()
    a.predictor.extra['normalizer'] = MedianMAD().to_dict()
    assert Forecaster(a.tokenizer, a.predictor).normalizer == MedianMAD()
    with pytest.raises(ModelError, match='MedianMAD'):
        Forecaster(a.tokenizer, a.predictor, normalizer=ZScore())
    a.tokenizer.extra['normalizer'] = ZScore().to_dict()
    with pytest.raises(ModelError, match='saved with different normalizer'):
        Forecaster(a.tokenizer, a.predictor)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda o: o[:1], 'W has 1 bars'),
        (lambda o: o[:0], 'history has 0 bars'),
        (lambda o: o.assign(low=o.low.where(o.index != 50)), 'W at 2024-01-03 02:00:00: low is nan'),
        (lambda o: o.assign(volume=np.inf), 'volume is inf'),
        (lambda o: o.drop(columns='open'), 'lacks open'),
        (lambda o: o.assign(close='x'), 'numbers'),
        (lambda o: o.drop(columns='timestamps'), 'has no timestamps'),
        (lambda o: o.iloc[[*range(58), 59, 58]], 'timestamps must increase'),
        (lambda o: o.iloc[[*range(60), 59]], 'timestamps must increase'),
        (lambda o: 'bars.csv', 'DataFrame'),
        (lambda o: o.to_numpy(), 'DataFrame'),
    ],
)
def test_bad_histories(fc, change, message):
    with pytest.raises(DataError, match=message):
        fc.predict(change(walk()), 5)


@pytest.mark.parametrize(
    'kw, message',
    [
        (dict(predict_window=0), 'predict_window must be a whole number of at least 1, got 0'),
        (dict(predict_window=2.5), 'got 2.5'),
        (dict(paths=0), 'paths'),
        (dict(temperature=-1), 'temperature'),
        (dict(top_p=0.0), 'top_p'),
        (dict(top_p=1.1), 'top_p'),
        (dict(top_k=-1), 'top_k'),
        (dict(refresh=0), 'refresh'),
        (dict(calendar='NOWHERE'), 'calendar'),
        (dict(future=pd.date_range('2023-01-01', periods=5)), 'must begin after the last bar'),
        (dict(future=pd.date_range('2025-01-01', periods=4)), 'has 4 stamps'),
        (dict(keys=['a', 'b']), 'keys'),
    ],
)
def test_bad_settings(fc, kw, message):
    with pytest.raises(KronosError, match=message):
        fc.predict(walk(), **dict(predict_window=5, paths=2) | kw)


def test_top_k_none_and_a_datetime_index_work(fc):
    a = walk()
    f = fc.predict(a.set_index('timestamps').drop(columns='symbol'), 5, paths=2, top_k=None, top_p=None)
    assert f.paths.shape == (2, 5, 6) and f.symbol == ''


def test_absent_volume_is_said(fc):
    f = fc.predict(walk().drop(columns=['volume', 'amount']), 5, paths=2)
    assert (f.history[['volume', 'amount']] == 0).all().all() and 'no volume in the history' in repr(f)


def test_several_symbols_and_their_futures(fc):
    bars = pd.concat([walk(symbol='A'), walk(symbol='B')])
    t = pd.date_range('2024-02-01', periods=5)
    out = fc.predict(bars, 5, paths=2, future=dict(A=t, B=t + pd.Timedelta('1D')))
    assert list(out) == ['A', 'B'] and out['B'].timestamps[0] == pd.Timestamp('2024-02-02')
    with pytest.raises(ConfigError, match='no stamps for B'):
        fc.predict(bars, 5, future=dict(A=t))
    with pytest.raises(ConfigError, match='list of frames'):
        fc.predict_many(bars, 5)


def test_coherent_is_the_identity_on_possible_candles():
    rng = np.random.default_rng(0)
    p = rng.normal(size=(50, 6))
    once = coherent(p)
    assert not impossible(once).any()
    np.testing.assert_array_equal(coherent(once), once)
