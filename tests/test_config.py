"Settings go through text unchanged, and a configuration of the reference loses no key"
import dataclasses
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kronos_nb.config import PRESETS, SECTIONS, VARIANTS, Config
from kronos_nb.config_compat import FOREIGN, LEFT, RENAMED
from kronos_nb.core import ConfigError
from kronos_nb.settings import format_setting, parse_setting

SETTINGS = sorted(Config().flat())

# text -> value -> text


@pytest.mark.parametrize('preset', PRESETS)
def test_every_setting_of_every_preset_goes_through_text_unchanged(preset):
    cfg = Config.preset(preset)
    text = {k: format_setting(v) for k, v in cfg.flat().items()}
    again = Config().replace(**text)
    assert again == cfg
    assert {k: format_setting(v) for k, v in again.flat().items()} == text


@pytest.mark.parametrize('name', SETTINGS)
def test_every_choice_and_bound_goes_through_text_unchanged(name):
    group, _, key = name.partition('.')
    cls = SECTIONS[group]
    meta = cls.__dataclass_fields__[key].metadata
    values = [*(meta['choices'] or ()), *(meta[k] for k in ('lo', 'hi') if meta[k] is not None)]
    for value in values:
        parsed = cls.parse(key, value)
        assert cls.parse(key, format_setting(parsed)) == parsed


plain_text = st.text(st.characters(categories=['L', 'N', 'P', 'S', 'Zs']), min_size=1).map(str.strip).filter(bool)
not_none = plain_text.filter(lambda o: o.lower() not in ('none', 'null'))


@given(st.one_of(
    st.tuples(st.integers(), st.just(int)), st.tuples(st.floats(allow_nan=False), st.just(float)),
    st.tuples(st.booleans(), st.just(bool)), st.tuples(not_none, st.just(str | None)),
    st.tuples(st.none(), st.just(int | None)),
    st.tuples(st.lists(plain_text).map(tuple), st.just(tuple[str, ...])),
    st.tuples(st.lists(st.integers()).map(tuple), st.just(tuple[int, ...])),
    st.tuples(st.dictionaries(st.sampled_from('abc'), st.integers() | st.floats(allow_nan=False)), st.just(dict))))
def test_a_value_goes_through_text_unchanged(case):
    value, kind = case
    assert parse_setting(format_setting(value), kind, 'x') == value


@pytest.mark.parametrize('value, kind', [
    ('fast', float), (True, float), ('nan', int), ('inf', int), (2.5, int), (None, int), ('maybe', bool), (2, bool),
    (5, str), (None, tuple[str, ...]), ('1,x', tuple[int, ...]), ('a: [', dict), (3, dict)])
def test_a_value_of_another_type_is_an_error(value, kind):
    with pytest.raises(ConfigError, match='group.name'):
        parse_setting(value, kind, 'group.name')


@pytest.mark.parametrize('name, wrong', [
    ('predictor.lr', 'nan'), ('predictor.beta1', 2), ('predictor.schedule', 'cosin'),
    ('predictor.trainable', 'last_0'), ('predictor.trainable', 'last_two'),
    ('data.train', .9), ('data.tz', 'Asia/Shangai'), ('data.extra_features', 'a,a'),
    ('runtime.max_time', 'soon'), ('runtime.seeds', '1'), ('runtime.seeds', '1,1'), ('runtime.seeds', '-1,2')])
def test_a_value_out_of_range_is_an_error(name, wrong):
    with pytest.raises(ConfigError, match=name):
        Config().replace(**{name: wrong})


def test_a_saved_configuration_loads_again(tmp_path):
    for name in PRESETS:
        for variant in VARIANTS:
            cfg = Config.preset(name, variant)
            assert Config.load(cfg.save(tmp_path/'config.yaml')) == cfg


def test_sampling_holds_the_evaluation_and_the_seed():
    c = Config().replace(evaluate=dict(paths=7, temperature=.8, top_k=5, top_p=.5), runtime=dict(seed=3))
    assert dataclasses.astuple(c.sampling)[:5] == (7, 3, .8, 5, .5)
    assert c.evaluate.sampling == dataclasses.replace(c.sampling, seed=0)


# the reference's vocabulary
def theirs(**groups):
    d = yaml.safe_load("""
    data: {data_path: bars.csv, lookback_window: 256, predict_window: 1, max_context: 512, clip: 5.0,
           train_ratio: 0.8, val_ratio: 0.1, test_ratio: 0.1}
    training: {tokenizer_epochs: 20, basemodel_epochs: 15, batch_size: 32, log_interval: 50, num_workers: 6, seed: 42,
               tokenizer_learning_rate: 2e-4, adam_beta1: 0.9}
    model_paths: {pretrained_tokenizer: tok, pretrained_predictor: pred, exp_name: mine, base_path: out,
                  base_save_path: "", finetuned_tokenizer: ""}
    experiment: {name: a, description: b, use_comet: false, train_tokenizer: true, train_basemodel: true,
                 skip_existing: false}
    device: {use_cuda: true, device_id: 0}
    """)
    for name, part in groups.items():
        d[name] = (d.get(name) or {}) | part if isinstance(part, dict) else part
    return d


def load(report=lambda line: None, **groups):
    return Config.load(theirs(**groups), report=report)


@pytest.mark.parametrize('group, key, meant', [
    ('data', 'lookback_windw', 'lookback_window'), ('data', 'train_raito', 'train_ratio'),
    ('training', 'basemodle_epochs', 'basemodel_epochs'), ('training', 'batchsize', 'batch_size'),
    ('model_paths', 'pretrained_predicter', 'pretrained_predictor'), ('model_paths', 'exp_nam', 'exp_name'),
    ('experiment', 'train_base_model', 'train_basemodel'),
    ('experiment', 'pretrained_tokenizer', 'pre_trained_tokenizer'),
    ('device', 'use_cude', 'use_cuda'), ('distributed', 'use_dpp', 'use_ddp'), ('predictor', 'lrr', 'lr')])
def test_a_misspelt_key_is_an_error(group, key, meant):
    with pytest.raises(ConfigError, match=f"{group}.*'{key}'.*'{meant}'"):
        load(**{group: {key: 1}})


@pytest.mark.parametrize('group, value, meant', [
    ('trainig', {'batch_size': 8}, 'training'), ('expriment', 3, 'experiment')])
def test_a_misspelt_group_is_an_error(group, value, meant):
    with pytest.raises(ConfigError, match=f"'{group}'.*'{meant}'"):
        load(**{group: value})


@pytest.mark.parametrize('key', sorted(LEFT))
def test_a_key_without_a_counterpart_is_reported_with_its_reason(key):
    group, _, name = key.partition('.')
    lines = []
    load(lines.append, **{group: {name: 'x'}})
    assert f'{key} -> left out: {LEFT[key]}' in lines


def test_every_key_is_reported_once():
    lines, d, ours = [], theirs(), Config().flat()
    Config.load(d, report=lines.append)
    reported = [k for line in lines for k in line.split(' -> ')[0].split(', ')]
    for group, part in d.items():
        for k in part:
            if f'{group}.{k}' in ours or k in ('train_tokenizer', 'train_basemodel'):
                continue   # the same name here; switched on, as by default
            assert reported.count(f'{group}.{k}') == 1, k


def test_the_more_special_key_wins_in_any_order():
    assert load(training=dict(epochs=3)).tokenizer.epochs == 20
    for training in (dict(basemodel_epochs=2, epochs=3), dict(epochs=3, basemodel_epochs=2)):
        c = Config.load(theirs() | dict(training=training), report=lambda line: None)
        assert (c.tokenizer.epochs, c.predictor.epochs) == (3, 2)


def test_from_scratch_wins_over_weights_in_any_order():
    c = load(experiment=dict(pre_trained=False, pre_trained_predictor=True))
    assert (c.tokenizer.init, c.predictor.init) == ('scratch', 'pred')
    d = theirs(experiment=dict(pre_trained=False))
    for order in (d, dict(reversed(d.items()))):
        c = Config.load(order, report=lambda line: None)
        assert c.tokenizer.init == c.predictor.init == 'scratch'


def test_switches_mean_what_they_mean_there():
    assert load(experiment=dict(train_tokenizer='no')).runtime.only == 'predictor'
    assert load(experiment=dict(train_basemodel=0)).runtime.only == 'tokenizer'
    assert load(device=dict(device_id=1)).runtime.device == 'cuda:1'
    assert load(device=dict(use_cuda=False)).runtime.device == 'cpu'
    with pytest.raises(ConfigError, match='experiment.train_tokenizer'):
        load(experiment=dict(train_tokenizer=False, train_basemodel=False))
    with pytest.raises(ConfigError, match='experiment.train_tokenizer'):
        load(experiment=dict(train_tokenizer='maybe'))


def test_values_keep_their_meaning():
    tokenizer = 'out/{exp_name}/tokenizer/best_model'
    c = load(model_paths=dict(finetuned_tokenizer=tokenizer), data=dict(data_path='a,b.csv'))
    assert c.predictor.tokenizer == 'out/mine/tokenizer/best_model'
    assert c.data.source == ('a,b.csv',)
    d = theirs()
    del d['data']['test_ratio']
    assert Config.load(d, report=lambda line: None) == load()


def test_ours_beside_theirs():
    d = dict(preset='kaggle_stock', training=dict(batch_size=8), predictor=dict(lr=1e-5)) | {'tokenizer.lr': 1e-3}
    c = Config.load(d, report=lambda line: None)
    assert (c.data.lookback_window, c.tokenizer.batch_size, c.predictor.lr, c.tokenizer.lr) == (256, 8, 1e-5, 1e-3)
    empty = Config.load(dict(training=None, data=dict(data_path='a.csv')), report=lambda line: None)
    assert empty.data.source == ('a.csv',)


def test_every_name_in_the_tables_exists():
    assert {k for names in RENAMED.values() for k in names} <= set(SETTINGS)
    assert {k.partition('.')[0] for k in LEFT} <= set(FOREIGN)
