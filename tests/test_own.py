"One's own file: settings that fit it, errors that end in settings that work, and folders that never collide"
import re

import numpy as np
import pandas as pd
import pytest

import kronos_nb as kn
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, DataError, ModelError, RunError
from kronos_nb.data.read import sample_klines
from kronos_nb.fitting.prepare import LEAST, prepare
from kronos_nb.judging.origins import pick_origins
from kronos_nb.own import config_for, name_of, own_config, plan_table, plan_text, run_name, settle
from kronos_nb.settings import format_setting
from kronos_nb.training.run import Run

TINY = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4)
FAST = {   # a run of seconds
    'tokenizer.init': 'scratch', 'predictor.init': 'scratch', 'tokenizer.size': 'tiny', 'predictor.size': 'tiny',
    'tokenizer.model': TINY | dict(n_enc_layers=2, n_dec_layers=2, group_size=4),
    'predictor.model': TINY | dict(n_layers=2),
    'tokenizer.epochs': 1, 'predictor.epochs': 1, 'evaluate.paths': 4, 'evaluate.origins': 8,
    'evaluate.calibrate': 'off',
    'runtime.progress': False, 'runtime.plots': False, 'runtime.device': 'cpu'}


def walk(n, symbol='X', freq='h', seed=0) -> pd.DataFrame:
    "Return `n` bars of a random walk"
    rng = np.random.default_rng(seed)
    close = 100*np.exp(np.cumsum(rng.normal(0, .01, n)))
    open_ = np.r_[close[0], close[:-1]]
    high, low = np.maximum(open_, close)*1.001, np.minimum(open_, close)*.999
    volume = rng.uniform(1, 2, n)
    return pd.DataFrame(dict(symbol=symbol, timestamps=pd.date_range('2024-01-01', periods=n, freq=freq), open=open_,
                             high=high, low=low, close=close, volume=volume, amount=volume*close))


def dirty(bars) -> pd.DataFrame:
    "Return bars with a missing cell, a high below the close, a price of zero and a bar that occurs twice"
    out = pd.concat([bars, bars.iloc[[5]]]).sort_values(['symbol', 'timestamps'], ignore_index=True)
    out.loc[10, 'close'], out.loc[20, 'high'], out.loc[30, 'low'] = np.nan, out.low[20]/2, 0.
    return out


def judged(bars, cfg) -> int:
    "Return on how many dates a run would be judged"
    data = prepare(bars, cfg)
    starts = {s: first for s, (first, _) in data.span('test').items()}
    d = cfg.data
    return pick_origins(data.bars, d.lookback_window, d.predict_window, cfg.evaluate.origins, start=starts,
                        max_gap=d.max_gap)[0].date.nunique()


# the settings fit
@pytest.mark.parametrize('n', (LEAST, 137, 200, 400, 999, 1000, 3000))
@pytest.mark.parametrize('freq', ('min', 'h', 'D', 'W'))
def test_any_length_and_interval_can_be_trained_and_judged(n, freq):
    bars = walk(n, freq=freq)
    cfg = own_config(bars, start='bundled')
    data = prepare(bars, cfg)
    assert len(data.train) >= 16 and len(data.val) >= 3
    assert judged(bars, cfg) >= 8


@pytest.mark.parametrize('symbols,n', ((2, 150), (40, 130), (12, 1500)))
def test_many_symbols_are_judged_on_fewer_dates(symbols, n):
    bars = pd.concat([walk(n, f'S{i:02}', 'D', i) for i in range(symbols)], ignore_index=True)
    cfg = own_config(bars, start='bundled')
    assert cfg.data.symbols is None and cfg.base.symbols is None
    assert judged(bars, cfg) >= 8


def test_bars_with_holes_everywhere_are_used_across_the_holes():
    bars = walk(1000, freq='min')
    bars = bars[np.random.default_rng(0).random(1000) < .6].reset_index(drop=True)
    cfg = own_config(bars, start='bundled')
    assert cfg.data.max_gap is None and len(prepare(bars, cfg).train) > 100
    with pytest.raises(DataError, match='gap'): own_config(bars, {'data.max_gap': '2min'})


def test_dirt_is_repaired_and_listed():
    bars = dirty(walk(300))
    cfg = own_config(bars, start='bundled')
    data = prepare(bars, cfg)
    assert cfg.data.repair == 'standard' and len(data.bars) == 298
    assert set(data.changes.rule) == {'nan', 'duplicate', 'high_low', 'price_not_positive'}
    assert f'{len(data.changes)} repairs' in plan_text(cfg, data)
    with pytest.raises(DataError, match='data.repair'): prepare(bars, cfg.replace(**{'data.repair': 'off'}))


def test_given_settings_stay():
    given = {'data.lookback_window': 33, 'data.train': .5, 'data.val': .3, 'data.test': .2, 'predictor.lr': 7e-5,
             'predictor.batch_size': 16, 'data.repair': 'off', 'evaluate.paths': 9}
    flat = own_config(walk(500), given, 'bundled').flat()
    assert {k: flat[k] for k in given} == given
    assert own_config(walk(500), {'data.predict_window': 1}, 'bundled').data.embargo == 1


@pytest.mark.parametrize('given,pair', (
    ({'predictor.init': 'NeoQuasar/Kronos-mini'}, ('NeoQuasar/Kronos-Tokenizer-2k', 'NeoQuasar/Kronos-mini')),
    ({'predictor.init': 'NeoQuasar/Kronos-small'}, ('NeoQuasar/Kronos-Tokenizer-base', 'NeoQuasar/Kronos-small')),
    ({'predictor.init': 'scratch'}, ('scratch', 'scratch')),
    ({'predictor.size': 'Kronos-mini'}, ('scratch', 'scratch')),
    ({'data.extra_features': 'trades'}, ('scratch', 'scratch'))))
def test_tokenizer_and_predictor_start_from_one_pair(given, pair):
    cfg = own_config(walk(300).assign(trades=1.), given)
    assert (cfg.tokenizer.init, cfg.predictor.init) == pair
    assert cfg.tokenizer.size != 'tiny' if given.get('predictor.size') else True


def test_the_hub_is_asked_once_and_not_waited_for(monkeypatch):
    import time

    import huggingface_hub

    import kronos_nb.own as own
    calls = []
    def slow(*args, **kwargs):
        calls.append(1)
        time.sleep(5)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', slow)
    monkeypatch.setattr(own, '_PATIENCE', .1)
    own.hub_answers.cache_clear()
    began = time.monotonic()
    assert own.find_start() == own.find_start() and len(calls) == 1 and time.monotonic() - began < 3
    own.hub_answers.cache_clear()


def test_released_weights_are_taken_from_a_bundle(tmp_path, monkeypatch):
    import kronos_nb.own as own
    for name in own.released_pair('cpu'):
        (tmp_path/'bundle'/name.replace('/', '--')).mkdir(parents=True)
        (tmp_path/'bundle'/name.replace('/', '--')/'config.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    cfg = own_config(walk(300), {'runtime.device': 'cpu'})
    assert cfg.predictor.init.endswith('Kronos-mini') and cfg.tokenizer.init.endswith('Tokenizer-2k')
    assert cfg.predictor.init.startswith('bundle')


# errors
def test_too_few_bars_say_what_they_are_needed_for():
    with pytest.raises(DataError, match=f'{LEAST - 1} bars.*{LEAST}'): own_config(walk(LEAST - 1))
    with pytest.raises(DataError): own_config(walk(1))
    with pytest.raises(DataError): own_config(walk(200).assign(close=-1.))


def test_a_name_that_does_not_exist_is_found():
    with pytest.raises(ConfigError, match='lerning'): config_for(walk(300), lerning=dict(rate=1))
    with pytest.raises(ConfigError, match='data'): Config.preset('own')
    with pytest.raises(ConfigError, match='own'): config_for('sample', 'owm')


def options(message) -> dict:
    "Return the settings that a message offers"
    return {k: v.rstrip('.') for k, v in re.findall(r'((?:data|base)\.\w+)=([\w.]+)', str(message))}


@pytest.mark.parametrize('preset', ('doge', 'btc_original', 'kaggle_stock', 'quickstart'))
@pytest.mark.parametrize('n', (60, 130, 400, 900))
@pytest.mark.parametrize('repair', ('off', 'standard'))
def test_what_a_preset_offers_for_a_short_file_works(preset, n, repair):
    bars = walk(n)
    cfg = Config.preset(preset, **{'data.repair': repair, 'data.symbols': None, 'base.symbols': None})
    try: prepare(bars, cfg)
    except DataError as e:
        if n < LEAST and 'data.predict_window' not in options(e): assert str(LEAST) in str(e)
        else:
            better = cfg.replace(**options(e))
            prepare(bars, better)
            if better.data.test: assert judged(bars, better) >= 8


def test_a_preset_for_other_symbols_names_those_of_the_file():
    bars = walk(600, 'MINE')
    with pytest.raises(DataError, match='GOOG.*MINE') as error: prepare(bars, Config.preset('quickstart'))
    prepare(bars, Config.preset('quickstart').replace(**options(error.value)))


def test_short_symbols_are_left_out_and_listed_but_never_all():
    bars = pd.concat([walk(400, 'LONG'), walk(20, 'NEW')], ignore_index=True)
    cfg = own_config(bars, start='bundled')
    for repair, given in (('standard', bars), ('off', bars), ('standard', dirty(bars))):
        data = prepare(given, cfg.replace(**{'data.repair': repair}))
        assert list(data.bars.symbol.unique()) == ['LONG'] and 'too short: NEW' in plan_text(cfg, data)


def test_a_message_about_a_split_counts_the_file():
    cfg = Config.preset('btc_original')
    with pytest.raises(DataError, match='of the 400 bars') as error: prepare(walk(400), cfg)
    assert 'data.val=0.15' in str(error.value)


def test_a_test_part_without_room_for_a_verdict_offers_windows(tmp_path):
    changes = {'data.symbols': None, 'base.symbols': None, 'data.lookback_window': 8, 'data.predict_window': 10,
               'data.embargo': 0, 'runtime.progress': False}
    with pytest.raises(DataError, match='data.test=0.15') as error:
        kn.fit(walk(140), 'quickstart', tmp_path, **changes)
    better = Config.preset('quickstart', **changes).replace(**options(error.value))
    assert judged(walk(140), better) >= 8 and not any(tmp_path.iterdir())


def test_start_weights_that_cannot_be_had_leave_the_folder_free(tmp_path):
    start = {'tokenizer.init': 'nobody/nothing', 'predictor.init': 'nobody/nothing', 'runtime.progress': False}
    with pytest.raises(ModelError, match='predictor.init=bundled'): kn.fit(walk(400), None, tmp_path/'x', **start)
    assert not (tmp_path/'x').exists()


# the plan
def test_the_plan_has_five_rows_with_settings_that_exist():
    bars = walk(400)
    cfg = own_config(bars, FAST)
    plan = plan_table(cfg, prepare(bars, cfg))
    assert len(plan) == 5
    assert {name for names in plan['change it with'] for name in names.split()} <= set(Config().flat())


def test_the_rules_look_at_bars_and_settings_alone(monkeypatch):
    bars = walk(700)
    monkeypatch.setattr('kronos_nb.own.find_start', lambda device: 'bundled')
    chosen = own_config(bars, start='bundled')
    assert chosen == own_config(bars) == Config.preset('own', data=bars) == config_for(bars, dict(preset='own'))
    assert chosen == own_config(bars, chosen.flat())


# folders
def test_the_name_of_a_run():
    assert run_name('a/my bars.csv.gz', None) == 'my-bars-own'
    assert run_name(walk(3, 'BTC/USDT'), 'doge') == 'BTC-USDT-doge'
    assert run_name('sample', None) == run_name(None, None) == 'quickstart'
    assert run_name('x.csv', Config()) == 'x-run' and run_name(None, 'a/wide.yaml') == 'wide'
    assert name_of(pd.concat([walk(2, 'A'), walk(2, 'B')])) == 'bars'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Return a folder with a file and the run that `fit(file)` leaves"
    folder = tmp_path_factory.mktemp('own')
    walk(160).to_csv(folder/'my.csv', index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first = kn.fit('my.csv', **FAST)
    return folder, first


def test_a_file_is_read_once(place, monkeypatch):
    folder, first = place
    monkeypatch.chdir(folder)
    import kronos_nb.fitting.prepare as module
    calls, read = [], module.read_klines
    monkeypatch.setattr(module, 'read_klines', lambda *a, **k: calls.append(1) or read(*a, **k))
    kn.fit('my.csv', **FAST)
    assert len(calls) == 1 and first.run.facts['files'] == ['my.csv']


def test_a_search_takes_a_folder_for_each_file(tmp_path, monkeypatch):
    from kronos_nb.core import write_json
    from kronos_nb.fitting.claim import run_facts
    from kronos_nb.tune import _folder_for
    monkeypatch.chdir(tmp_path)
    one, other = walk(200, 'A'), walk(201, 'A')
    cfg = own_config(one, FAST)
    assert str(_folder_for(one, cfg)) == 'runs/A-tune'
    write_json(tmp_path/'runs'/'A-tune'/'start'/'run.json', run_facts(cfg, prepare(one, cfg)))
    assert str(_folder_for(one, cfg)) == 'runs/A-tune' and str(_folder_for(other, cfg)) == 'runs/A-tune-2'


def test_the_same_call_gives_the_finished_run_back(place, monkeypatch):
    folder, first = place
    monkeypatch.chdir(folder)
    file = first.run.evaluation_file
    monkeypatch.setattr('kronos_nb.train.evaluate', lambda *a, **k: pytest.fail('judged again'))
    before = (folder/file).stat().st_mtime_ns
    again = kn.fit('my.csv', **FAST)
    assert str(again.out_dir) == 'runs/my-own' and (folder/file).stat().st_mtime_ns == before
    assert again.evaluation.sentence == first.evaluation.sentence
    assert kn.load('runs/my-own').evaluation.sentence == first.evaluation.sentence


def test_another_file_or_setting_takes_the_next_folder(place, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    longer = walk(170)
    assert str(settle('my.csv', None, FAST)[1]) == 'runs/my-own'
    assert str(settle('my.csv', None, FAST | {'predictor.lr': 1e-5})[1]) == 'runs/my-own-2'
    (folder/'other').mkdir(exist_ok=True)
    longer.to_csv(folder/'other'/'my.csv', index=False)
    assert str(settle('other/my.csv', None, FAST)[1]) == 'runs/my-own-2'
    with pytest.raises(RunError): kn.fit('other/my.csv', None, 'runs/my-own', **FAST)


def test_a_run_keeps_its_start_weights_when_better_ones_appear(place, monkeypatch):
    folder, first = place
    monkeypatch.chdir(folder)
    few = {k: v for k, v in FAST.items() if '.init' not in k and '.size' not in k and '.model' not in k}
    cfg = own_config('my.csv', few, 'scratch')
    cfg.save(folder/'runs'/'mine'/'config.yaml')
    import kronos_nb.own as own
    from kronos_nb.core import write_json
    from kronos_nb.fitting.claim import run_facts
    data = prepare('my.csv', cfg)
    write_json(folder/'runs'/'mine'/'run.json', run_facts(cfg, data))
    monkeypatch.setattr(own, 'find_start', lambda device: 'NeoQuasar/Kronos-mini')
    assert own.config_for('my.csv', **few).predictor.init == 'NeoQuasar/Kronos-mini'
    assert settle('my.csv', None, few, 'runs/mine')[0].predictor.init == 'scratch'


def test_few_bars_get_a_verdict_that_is_honest(place):
    _, first = place
    assert first.evaluation.verdict in ('inconclusive', 'cannot tell') or 'Cannot tell' in first.evaluation.sentence
    assert Run(first.out_dir) is not None
    assert len(sample_klines('GOOG'))


def test_the_command_line_finds_the_same_run(place, monkeypatch, capsys):
    from kronos_nb.cli import main
    folder, _ = place
    monkeypatch.chdir(folder)
    given = [o for name, value in FAST.items() for o in ('--set', f'{name}={format_setting(value)}')]
    assert main(['fit', 'my.csv', '--test', *given]) == 0
    assert main(['fit', 'my.csv', *given]) == 0 and 'runs/my-own/report.md' in capsys.readouterr().out
