"Files, names and numbers of strangers: they are shown, refused or survived, and never do anything else"
import contextlib
import gzip
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kronos_nb import cli
from kronos_nb.average import greedy_soup
from kronos_nb.config import Config
from kronos_nb.core import (
    ConfigError, DataError, KronosError, ModelError, RunError, md_text, one_line, safe_name, symbol_of,
)
from kronos_nb.data.kline import check_klines, read_klines
from kronos_nb.follow import stage_lines
from kronos_nb.forecast import Forecaster
from kronos_nb.hub_card import model_card
from kronos_nb.judging.evaluation import Evaluation
from kronos_nb import hashes
from kronos_nb.model.pretrained import copy_model
from kronos_nb.report import write_report
from kronos_nb.settings import parse_yaml
from kronos_nb.training.history import LINES
from kronos_nb.training.optim import Best
from kronos_nb.training.run import STAGES, Run
from kronos_nb.training.task import CLASSES, build_model, save_model
from tests.conftest import once
from tests.faults.damage import DAMAGES, case, cases, fit_again, make
from tests.helpers import bars

EXAMPLES = int(os.environ.get('EXAMPLES', 25))   # 400 in the long form

hostile = ['BTC/USDT', '../x', '../../x', '/etc/x', 'a\\b', 'C:\\x', '$', '$SPX_$VIX', '', '.', '..', '.hidden', 'x.',
           'CON', 'nul.txt', 'com1', 'LPT9.csv', 'x'*300, 'é 😀', '贵州茅台', 'nan', '-rf', '__proto__', 'a\0b', 'a\nb',
           '\x1b[31mred', '\udcff', '<img src=x onerror=alert(1)>', 'A|B', '`x`', '[c](javascript:alert(1))', '~',
           '~2F']


# names
@given(st.text(max_size=300))
@settings(max_examples=4*EXAMPLES, deadline=None)
def test_a_safe_name_is_one_part_of_a_path_and_gives_its_symbol_back(symbol):
    name = safe_name(symbol)
    assert re.fullmatch(r'[A-Za-z0-9_~-][A-Za-z0-9_.~-]{0,127}', name) and not name.endswith('.')
    assert not re.fullmatch(r'(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?', name)
    assert symbol_of(name, [symbol]) == symbol
    assert symbol_of(name) == (None if '~~' in name else symbol)


@pytest.mark.parametrize('symbol', hostile)
def test_hostile_symbols_become_files_of_their_folder(tmp_path, symbol):
    inside = tmp_path/'inside'
    inside.mkdir()
    (inside/f'forecast_{safe_name(symbol)}.png').touch()
    assert len(os.listdir(inside)) == 1 and os.listdir(tmp_path) == ['inside']


def test_no_two_symbols_share_a_name():
    assert len(set(map(safe_name, hostile))) == len(hostile)
    assert safe_name('x'*300) != safe_name('x'*301)


# text
@given(st.text())
@settings(max_examples=4*EXAMPLES, deadline=None)
def test_text_from_data_stays_on_its_line_and_makes_no_tag(text):
    shown = md_text(text)
    assert '<' not in shown and '\n' not in shown and shown.isprintable() == one_line(text).isprintable()
    assert shown.encode().decode() == shown


# settings
BOMB = ('a: &a [x,x,x,x,x,x,x,x,x]\n' +
        ''.join(f'{c}: &{c} [{",".join([f"*{p}"]*9)}]\n' for p, c in zip('abcdefgh', 'bcdefghi')))
WRONG_YAML = {
    'bomb': BOMB, 'bomb in a setting': BOMB.replace('a: &a', 'data: {source: &a', 1)[:60], 'depth': '['*20_000,
    'an alias in itself': 'data: &a {source: *a}', 'a key twice': 'data: {stride: 2, stride: 3}',
    'a group twice': 'data: {stride: 2}\ndata: {clip: 3}', 'python': '!!python/object/apply:os.system ["true"]',
    'empty': '', 'only a comment': '# nothing\n', 'a list': '- 1', 'text': 'hello', 'a tab': 'data:\n\tstride: 1',
    'nan': 'predictor: {lr: .nan}', 'nan as text': 'predictor: {clip_norm: nan}', 'preset': 'preset: [a]',
    'a long number': f'data: {{stride: {"9"*5000}}}', 'a date': 'data: {start: 2024-99-99}',
    'nan in a model': 'predictor: {model: {ffn_dropout_p: .nan}}'}


@pytest.mark.parametrize('text', WRONG_YAML.values(), ids=WRONG_YAML)
def test_wrong_yaml_is_one_short_error(tmp_path, text):
    file = tmp_path/'c.yaml'
    file.write_text(text)
    with pytest.raises(ConfigError) as e:
        Config.load(file)
    assert len(str(e.value)) < 3000


def test_yaml_of_other_encodings_is_an_error_that_names_utf8(tmp_path):
    for content in ('data: {tz: 时区}'.encode('gbk'), 'data: {tz: "\xe9"}'.encode('latin-1'), bytes(range(256))):
        (tmp_path/'c.yaml').write_bytes(content)
        with pytest.raises(ConfigError, match='UTF-8|YAML'):
            Config.load(tmp_path/'c.yaml')


def test_yaml_says_what_it_means(tmp_path):
    text = 'data: {start: 2006-01-01, symbols: [000001, 600000, NO, ON, 1e5, null_]}\nevaluate: {calibrate: off}\n'
    (tmp_path/'c.yaml').write_text('\ufeff' + text, encoding='utf-8')
    cfg = Config.load(tmp_path/'c.yaml')
    assert cfg.data.start == '2006-01-01' and cfg.evaluate.calibrate == 'off'
    assert cfg.data.symbols == ('000001', '600000', 'NO', 'ON', '1e5', 'null_')


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8), lambda x:
       st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=12))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_yaml_gives_a_configuration_or_an_error_of_ours(content):
    try:
        Config.load(parse_yaml(yaml.safe_dump({'data': content, 'predictor': {'lr': content, 'model': content}})))
    except (ConfigError, yaml.YAMLError):
        pass


@given(st.binary(max_size=200))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_give_a_configuration_or_an_error_of_ours(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp()/'bytes.yaml'
    file.write_bytes(content)
    with contextlib.suppress(ConfigError):
        Config.load(file)


# models
@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Return a folder with two small models"
    folder = tmp_path_factory.mktemp('pair')
    size = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4)
    extra = dict(normalizer=dict(kind='zscore', clip=5., eps=1e-5), max_context=64)
    save_model(build_model('tokenizer', 'scratch', 'tiny', size | dict(n_enc_layers=2, n_dec_layers=2, group_size=4)),
               folder/'tokenizer', **extra)
    save_model(build_model('predictor', 'scratch', 'tiny', size | dict(n_layers=1)), folder/'predictor', **extra)
    return folder


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'SHA256SUMS'])
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_model_is_never_loaded(pair, tmp_path, stage, name, damage):
    model = shutil.copytree(pair/stage, tmp_path/'model')
    other = STAGES[stage == 'tokenizer']
    if name == 'SHA256SUMS' and damage == 'deleted':
        pytest.skip('a model without hashes loads as a released one')
    DAMAGES[damage](model/name, pair/other/name)
    with pytest.raises(ModelError):
        build_model(stage, str(model))
    with pytest.raises(ModelError):
        copy_model(model, tmp_path/'copy')


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_flipped_bit_is_found(pair, tmp_path_factory, data):
    stage, name = data.draw(st.sampled_from(STAGES)), data.draw(st.sampled_from(['model.safetensors', 'config.json']))
    model = tmp_path_factory.mktemp('flip')/'model'
    shutil.copytree(pair/stage, model)
    content = bytearray((model/name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (model/name).write_bytes(content)
    with pytest.raises(ModelError):
        build_model(stage, str(model))


def test_models_without_hashes_load_and_nan_is_refused(pair, tmp_path):
    model = Path(shutil.copytree(pair/'predictor', tmp_path/'model'))
    (model/'SHA256SUMS').unlink()
    state = build_model('predictor', str(model)).state_dict()
    for value in (math.nan, math.inf):
        first = next(iter(state))
        save_file(state | {first: torch.full_like(state[first], value)}, model/'model.safetensors')
        with pytest.raises(ModelError, match=re.escape(first)):
            build_model('predictor', str(model))


def test_a_kill_while_a_model_is_replaced_leaves_one_that_loads(pair, tmp_path, monkeypatch):
    model = Path(shutil.copytree(pair/'predictor', tmp_path/'model'))
    new = build_model('predictor', str(model))
    with torch.no_grad():
        next(new.parameters()).add_(1)
    real, left = hashes.write_atomic, []

    def dying(path, content):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(path, content)
    monkeypatch.setattr(hashes, 'write_atomic', dying)
    for writes in range(4):
        left[:] = [None]*writes
        with contextlib.suppress(KeyboardInterrupt):
            new.save_pretrained(model)
        assert not list(model.glob('.*')) and build_model('predictor', str(model))
    left[:] = [None]*9
    new.save_pretrained(model)
    assert len((model/'SHA256SUMS').read_text().splitlines()) == 2


BAD_NUMBERS = [0, -1, 10**9, 10**30, '16', None, 1.5, math.nan, math.inf, True, [], {}]


@pytest.mark.parametrize('stage', STAGES)
def test_every_number_of_a_config_is_checked_before_anything_is_built(pair, tmp_path, stage):
    model = Path(shutil.copytree(pair/stage, tmp_path/'model'))
    (model/'SHA256SUMS').unlink()
    good, began = json.loads((model/'config.json').read_text()), time.process_time()
    for key, value in good.items():
        for bad in BAD_NUMBERS:
            if isinstance(value, dict | str) or isinstance(value, float) and isinstance(bad, int | float):
                continue   # a weight of a loss may be any number
            (model/'config.json').write_text(json.dumps(good | {key: bad}))
            if bad is None and key not in pretrained_arguments(stage) or bad == value:
                continue
            with pytest.raises(KronosError):
                build_model(stage, str(model))
    for content in ('[]', 'null', '3', '', '\0', '['*100_000, '{}', '{"d_model": ' + '9'*5000 + '}', 'NaN', ' '*2**21):
        (model/'config.json').write_text(content)
        with pytest.raises(ModelError):
            build_model(stage, str(model))
    assert time.process_time() - began < 20


@given(st.data(), st.sampled_from(STAGES))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_model_config_is_built_or_refused(pair, tmp_path_factory, data, stage):
    model = tmp_path_factory.getbasetemp()/f'drawn_{stage}'
    if not model.exists():
        shutil.copytree(pair/stage, model)
        (model/'SHA256SUMS').unlink()
    good = json.loads((pair/stage/'config.json').read_text())
    simple = st.none() | st.booleans() | st.integers() | st.integers(-3, 300) | st.floats() | st.text(max_size=8)
    any_value = st.recursive(simple, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x))
    changes = data.draw(st.dictionaries(st.sampled_from([*good, 'other']), any_value, min_size=1, max_size=3))
    (model/'config.json').write_text(json.dumps(good | changes))
    with contextlib.suppress(KronosError):
        build_model(stage, str(model))


def pretrained_arguments(stage):
    return CLASSES[stage].__init__.__kwdefaults__ or inspect.signature(CLASSES[stage]).parameters


@pytest.mark.parametrize('name', ['../etc/x', 'a/../../b', 'a/..', '..', 'a/b\n', 'a//b', '~/x', 'x'*5000 + '/y',
                                  'a/b?c', 'a/b\0', ''])
def test_what_is_no_hub_id_is_never_asked_for(name):
    with pytest.raises(ModelError):
        build_model('predictor', name)


# runs
def damaged(run, file, how, other=None):
    DAMAGES[how](run/file, other/file if other else Path('/nowhere'))


@pytest.fixture(scope='session')
def judged_run(tmp_path_factory) -> Path:
    "Return a small run with averages, checkpoints and an evaluation"
    return once(tmp_path_factory, 'judged_run', make)


@pytest.fixture
def run(judged_run, tmp_path) -> Path:
    return Path(shutil.copytree(judged_run, tmp_path/'run'))


def said(capsys, *argv) -> tuple:
    code = cli.main(list(map(str, argv)))
    out = capsys.readouterr()
    return code, out.out + out.err


def test_damaged_files_of_a_run_end_in_typed_errors_or_are_left_out(judged_run, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    names = ['report', 'monitor', 'compare', 'evaluate', 'forecast', 'push', 'average']
    for file, how, command in cases(judged_run, 12, seed=2, only=names):
        code, text = case(judged_run, tmp_path, file, how, command, fit_again)
        assert code in (0, 1, 2), (file, how, command, text)


@pytest.mark.parametrize(
    'name', ['steps.jsonl', 'notes.jsonl', 'validations.jsonl', 'training_metrics.json', 'status.json'])
def test_reports_and_monitors_say_what_is_damaged(run, capsys, name):
    file = run/'predictor'/name
    torn = b'{"epoch": 1, "st\n' if name.endswith('l') else b''
    file.write_bytes(torn + file.read_bytes()[:-20])
    code, text = said(capsys, 'monitor', run, '--once')
    assert name in text and 'damaged' in text
    assert said(capsys, 'report', run)[0] == 0
    assert name in (run/'report.md').read_text()


def test_a_config_that_lost_its_end_is_not_read_as_defaults(run, capsys):
    whole = (run/'config.yaml').read_text()
    for content in ('', 'data: {}\n', whole[:whole.index('predictor:')]):
        (run/'config.yaml').write_text(content)
        assert said(capsys, 'report', run)[0] == 2
    assert fit_again(run) == 0 and (run/'config.yaml').read_text() == whole   # the same call heals it


def test_an_evaluation_with_other_rows_is_refused(run, judged_run, capsys):
    damaged(run, 'evaluation/rows.parquet', 'flipped')
    with pytest.raises(RunError):
        Evaluation.load(run)
    assert said(capsys, 'compare', run, judged_run)[0] == 0
    assert said(capsys, 'report', run)[0] == 0 and 'rows.parquet' in (run/'report.md').read_text()


def test_an_ensemble_names_predictors_of_its_run_alone(run):
    (run/'ensemble.json').write_text('{"predictors": ["../../elsewhere/predictor"]}')
    with pytest.raises(RunError):
        Run(run).ensemble


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) |
       st.dictionaries(st.sampled_from(['epoch', 'step', 'text', 'val_loss', 'state', 'data']), x, max_size=4)))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_metric_file_is_read_or_refused(tmp_path_factory, content):
    stage = Run(tmp_path_factory.getbasetemp()/'metrics').stage('predictor')
    stage.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content)
    for file in (stage.metrics_file, stage.status_file, stage.weights_file, *map(stage.rows_file, LINES)):
        file.write_text(f'{text}\n')
    with mock.patch('kronos_nb.training.history.time.sleep'):
        assert stage.ended.startswith('Unknown') and stage_lines(stage) and stage.history
        with contextlib.suppress(RunError):
            stage.choice


# numbers
def test_nan_is_never_the_best():
    best = Best()
    assert not best.better(math.nan, None) and not best.better(math.nan, 1.) and best.better(2., math.nan)
    assert best.better(1., 2.) and not best.better(2., 1.)
    with pytest.raises(RunError):
        greedy_soup({'a': {}, 'b': {}}, lambda w: math.nan)
    for name in ('predictor.lr', 'data.train', 'predictor.weight_decay', 'evaluate.temperature'):
        with pytest.raises(ConfigError, match=name):
            Config().replace(**{name: math.nan})


# strangers' text
def test_reports_and_cards_show_names_and_nothing_else(run):
    hostile = '<img src=x>|[a](javascript:1)\n# title'
    facts = json.loads((run/'run.json').read_text())
    for s in facts['series']:
        s['symbol'] = hostile
    facts['files'] = ['/home/somebody/private/bars.csv']
    facts['versions'] = {'torch': '<b>'}
    (run/'run.json').write_text(json.dumps(facts))
    text = write_report(run).read_text() + model_card(run, 'predictor')
    assert '<img' not in text and '<b>' not in text and '\n# title' not in text
    assert not re.search(r'(?<!\\)\]\(javascript', text)
    assert str(run) not in text and 'somebody' not in text


def test_a_symbol_that_is_a_path_stays_in_its_folder(pair, tmp_path):
    table = pd.concat([bars.tail(80).assign(symbol=s) for s in ('BTC/USDT', '../x', '$a$')])
    f = Forecaster(build_model('tokenizer', str(pair/'tokenizer')), build_model('predictor', str(pair/'predictor')))
    found = f.predict(table, 2, paths=2, progress=False)
    cli._write_forecasts(found, tmp_path/'out')
    names = {p.name for p in (tmp_path/'out').glob('*.png')}
    assert names == {f'forecast_{safe_name(s)}.png' for s in found} and len(list(tmp_path.iterdir())) == 1


# readers
HEAD, ROW = 'timestamps,open,high,low,close,volume,amount\n', '2020-01-{:02},1,2,1,1,1,1\n'


@pytest.mark.parametrize('content', ['', '\0', 'timestamps', HEAD, HEAD + '\n\n', '{', '[]', '\x1f\x8b', 'PK\x03\x04',
                                     'PAR1', 'ARROW1', 'a'*2**21, HEAD + '2020-01-01,' + '1'*2**21, '"' + 'x,'*2**20])
@pytest.mark.parametrize('ending', ['csv', 'csv.gz', 'zip', 'parquet', 'feather', 'json'])
def test_files_that_hold_no_bars_are_named(tmp_path, content, ending):
    file = tmp_path/f'odd.{ending}'
    file.write_bytes(gzip.compress(content.encode()) if ending == 'csv.gz' else content.encode())
    with pytest.raises(DataError, match='odd') as e:
        read_klines(file)
    assert len(str(e.value)) < 20_000


def test_values_that_no_statistic_can_hold_are_errors():
    for column, value in (('close', 1e308), ('volume', 1e200), ('amount', -math.inf)):
        table = bars.copy()
        table.loc[500, column] = value
        found = check_klines(table).issues.query("rule == 'inf'")
        assert list(found.level) == ['error'] and column in found.detail.iloc[0]


@pytest.mark.skipif(os.name == 'nt' or sys.platform == 'darwin', reason='names are Unicode there')
def test_a_file_whose_name_is_no_text_is_refused(tmp_path):
    file = os.fsencode(tmp_path) + b'/\xff.csv'
    Path(os.fsdecode(file)).write_text(HEAD + ''.join(map(ROW.format, range(1, 20))))
    for source in (os.fsdecode(file), tmp_path):
        with pytest.raises(DataError, match='rename'):
            read_klines(source)


@given(st.binary(max_size=300) | st.text(alphabet='0123456789.,;-:\n eE"\t|naif', max_size=300).map(
       lambda text: (HEAD + text).encode()))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_are_bars_or_a_data_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp()/'any.csv'
    file.write_bytes(content)
    with contextlib.suppress(DataError):
        check_klines(read_klines(file)).to_markdown()
