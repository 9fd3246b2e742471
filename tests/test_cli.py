"Every command on a run that a newcomer would have: small, real, from the command line to the files"
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from kronos_nb.cli import config_of, main, parser
from kronos_nb.config import Config
from kronos_nb.core import DataError
from kronos_nb.evaluate import evaluate as judge
from kronos_nb.forecast import Forecaster
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import load
from tests.helpers import bars, cfg


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Return a folder with a file of bars and a finished run on it"
    folder = tmp_path_factory.mktemp('cli')
    bars.to_csv(folder/'GOOG.csv', index=False)
    cfg.replace(**{'tokenizer.epochs': 1, 'predictor.epochs': 1, 'runtime.save_steps': 2}).save(folder/'mine.yaml')
    assert fit(folder) == 0
    return folder


def run(command, *argv):
    "Run a command with arguments of any type and return its exit code"
    return main([command, *map(str, argv)])


def fit(place):
    "Run the fit that every test here starts from"
    return run('fit', place/'GOOG.csv', '--config', place/'mine.yaml', '--out', place/'run')


def evaluate(place, model, *more):
    "Run `evaluate` with few paths"
    return run('evaluate', place/'GOOG.csv', '--model', model, '--paths', 4, *more)


def test_fit_says_the_verdict_and_leaves_a_report(place, capsys):
    assert fit(place) == 0   # again: everything is there
    said = capsys.readouterr().out
    assert 'report.md' in said
    judged = load(place/'run').evaluation
    report = (place/'run'/'report.md').read_text()
    assert all(o in said for o in (*judged.sentences, judged.by_quantity))
    assert all(text in report for text in ('## Verdict', f'**{judged.light}**', *judged.sentences, judged.by_quantity))
    assert 'plots/evaluation.png' in report
    assert (place/'run'/'plots'/'evaluation.png').is_file()


def test_forecast_writes_quantiles_paths_and_a_picture(place):
    out, horizon = place/'fc', cfg.data.predict_window
    assert run('forecast', place/'GOOG.csv', '--model', place/'run', '--paths', 6, '--out', out) == 0
    t = pd.read_csv(out/'forecast.csv')
    quantiles = ['close_q05', 'close_q25', 'close_q50', 'close_q75', 'close_q95']
    assert list(t.columns) == ['timestamps', *quantiles, 'symbol']
    assert len(t) == horizon
    assert (t.close_q05 <= t.close_q50).all()
    assert (t.close_q50 <= t.close_q95).all()
    assert pd.Timestamp(t.timestamps[0]) > bars.timestamps.max()
    assert len(pd.read_parquet(out/'paths.parquet')) == 6*horizon
    assert (out/'forecast_GOOG.png').stat().st_size > 5000


def test_forecast_takes_the_newest_run_on_the_file_and_its_horizon(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place/'run', 'runs/mine')
    assert run('forecast', place/'GOOG.csv', '--paths', 3) == 0
    assert 'runs/mine' in capsys.readouterr().err
    assert run('forecast', '--paths', 3) == 2   # its bars are not in this folder
    assert 'GOOG.csv' in capsys.readouterr().err
    assert len(pd.read_csv('forecast/GOOG/forecast.csv')) == cfg.data.predict_window


def test_forecast_overwrites_its_own_symbols_alone(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bars.assign(symbol='A/B').to_csv('other.csv', index=False)
    common = ['--model', place/'run', '--paths', 3, '--predict-window', 2]
    assert run('forecast', place/'GOOG.csv', *common, '--out', 'here') == 0
    assert run('forecast', place/'GOOG.csv', *common, '--out', 'here') == 0
    before = {p.name: p.read_bytes() for p in Path('here').iterdir()}
    capsys.readouterr()
    assert run('forecast', 'other.csv', *common, '--out', 'here') == 2
    assert {p.name: p.read_bytes() for p in Path('here').iterdir()} == before
    tried = capsys.readouterr().err.splitlines()[-1].removeprefix('Try: kronos-nb ')
    assert main(tried.split()) == 0
    assert set(pd.read_csv('here-2/forecast.csv').symbol) == {'A/B'}


@pytest.mark.parametrize('text, way', [
    ('timestamps\n2030-01-07\n2030-01-08\n', 'naive'),
    ('2030-01-07\n2030-01-08\n', 'without a header'),
    ('symbol,timestamps\nX,2031-01-01\nGOOG,2030-01-07\nGOOG,2030-01-08\n', 'by symbol'),
])
def test_stamps_of_the_future_come_from_a_file(place, tmp_path, text, way):
    (tmp_path/'future.csv').write_text(text)
    options = ['--model', place/'run', '--paths', 3, '--predict-window', 2, '--future', tmp_path/'future.csv']
    assert run('forecast', place/'GOOG.csv', *options, '--out', tmp_path/'out') == 0
    assert list(pd.read_csv(tmp_path/'out'/'forecast.csv').timestamps) == ['2030-01-07', '2030-01-08']


@pytest.mark.parametrize('text', ['', 'a,b\n1,2\n', 'timestamps\nsoon\n', None])
def test_a_file_without_stamps_is_an_error(place, tmp_path, capsys, text):
    if text is not None:
        (tmp_path/'future.csv').write_text(text)
    assert run('forecast', place/'GOOG.csv', '--model', place/'run', '--future', tmp_path/'future.csv') == 2
    assert '--future' in capsys.readouterr().err


def test_a_finished_run_is_not_judged_again(place, capsys):
    before = (place/'run'/'evaluation'/'evaluation.json').stat().st_mtime_ns
    assert fit(place) == 0
    assert (place/'run'/'evaluation'/'evaluation.json').stat().st_mtime_ns == before
    tried = capsys.readouterr().out.strip().splitlines()[-1]
    assert tried.startswith('Next: kronos-nb forecast')
    assert str(place/'run') in tried


@pytest.mark.parametrize('options, helps', [
    ('--out RUN --seed 7', '--out RUN-2'),
    ('--preset quickstart --symbols BRK', '--preset own'),
    ('--preset doge --lookback-window 4000', '--preset own'),
])
def test_an_error_knows_the_options_that_mend_it(place, capsys, options, helps):
    line = f'fit FILE {options} --test' if '--out' not in options else f'fit FILE {options}'
    names = {'RUN': str(place/'run'), 'FILE': str(place/'GOOG.csv')}
    assert main([re.sub('RUN|FILE', lambda m: names[m[0]], word) for word in line.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(re.sub('RUN', names['RUN'], helps)) or re.sub('RUN', names['RUN'], helps) in last


def test_evaluate_takes_only_what_the_model_has_not_seen(place, capsys):
    assert evaluate(place, place/'run', '--origins', 8, '--out', place/'ev') == 0
    assert '## Evaluation' in capsys.readouterr().out
    first = pd.read_parquet(place/'ev'/'rows.parquet').origin.min()
    saved = json.loads((place/'run'/'predictor'/'best_model'/'config.json').read_text())
    assert pd.Timestamp(first) >= pd.Timestamp(saved['trained_on']['GOOG'][1])


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    "Return a folder with models of published sizes and fresh weights, which record no bars, as released ones do"
    folder = tmp_path_factory.mktemp('released')
    pair = dict(tokenizer=(KronosTokenizer, 'Kronos-Tokenizer-2k'), predictor=(Kronos, 'Kronos-mini'))
    for name, (kind, size) in pair.items():
        model = kind.from_size(size)
        model.extra.clear()
        model.save_pretrained(folder/name)
    return folder


def test_released_weights_forecast_and_say_what_they_may_have_seen(place, released, tmp_path, capsys):
    options = ['--model', released, '--paths', 2, '--lookback-window', 20, '--out', tmp_path/'out']
    assert run('forecast', place/'GOOG.csv', *options) == 0
    assert '2024-07-01' in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path/'out'/'forecast.csv')) == 10   # daily bars


def test_released_weights_are_judged_on_later_bars_alone(place, released, capsys):
    assert evaluate(place, released) == 2
    assert '2024-07-01' in capsys.readouterr().err
    f = Forecaster.from_pretrained(released)
    late = bars.assign(timestamps=bars.timestamps + pd.Timedelta('7500D'))
    with pytest.raises(DataError, match='start'):
        judge(f, late, 20, 4, start='2024-06-30')
    assert Forecaster.from_pretrained(place/'run').seen_until is None


def test_evaluate_rejects_a_start_within_the_training_bars(place, capsys):
    assert evaluate(place, place/'run', '--start', '2004-12-01') == 2
    assert 'DataError' in capsys.readouterr().err


def test_evaluate_judges_a_checkpoint_and_an_average(place, capsys):
    "Judge them as the run itself: its tokenizer and base, on the bars that the run did not see"
    kept = sorted((place/'run'/'predictor'/'checkpoints').glob('step_*'))[-1]
    average = place/'run'/'two'
    assert run('average', '--checkpoint-dir', kept.parent, '--num-checkpoints', 2, '--output', average) == 0
    found = []
    for model in (place/'run', kept, average):
        out = place/f'ev_{model.name}'
        assert evaluate(place, model, '--origins', 8, '--out', out) == 0
        found.append(pd.read_parquet(out/'rows.parquet').set_index(['model', 'origin', 'h']))
    whole, *others = found
    for other in others:
        assert other.index.equals(whole.index)
        assert other.loc['LastValue'].equals(whole.loc['LastValue'])
    assert capsys.readouterr().out.count('## Evaluation') == 3
    hashes = {Forecaster.from_pretrained(o).predictor.weights_hash() for o in (kept, average)}
    assert len(hashes) == 2


def test_compare_writes_a_table_and_a_picture(place, capsys):
    shutil.copytree(place/'run', place/'again', dirs_exist_ok=True)
    assert run('compare', place/'run', place/'again', '--out', place/'cmp') == 0
    assert capsys.readouterr().out.strip() in (place/'cmp'/'compare.md').read_text()
    assert (place/'cmp'/'compare.png').stat().st_size > 5000


@pytest.mark.parametrize('line, code, says', [
    ('monitor RUN --once', 0, 'finished'),
    ('report RUN', 0, 'report.md'),
    ('check FILE', 0, 'GOOG'),
    ('compare RUN RUN', 2, ''),
    ('average --checkpoint-dir RUN/predictor/checkpoints --num-checkpoints 2 --output RUN/avg', 0, 'written to'),
    ('report nowhere', 2, 'RunError'),
    ('forecast --model nowhere', 2, 'nowhere'),
    ('fit FILE --config RUN/config.yaml --preset doge', 2, '--preset doge'),
])
def test_other_commands(place, capsys, line, code, says):
    names = {'RUN': str(place/'run'), 'FILE': str(place/'GOOG.csv')}
    argv = [re.sub('RUN|FILE', lambda m: names[m[0]], word) for word in line.split()]
    assert main(argv) == code
    said = capsys.readouterr()
    assert says in said.out + said.err


def test_a_folder_of_configurations_runs_one_after_the_other(place, capsys):
    "Skip finished ones, name the one that fails and go on with the rest"
    folder = place/'experiments'
    folder.mkdir()
    stage = {'tokenizer.epochs': 1, 'runtime.only': 'tokenizer'}
    small = cfg.replace(**stage, **{'predictor.epochs': 1, 'evaluate.calibrate': 'off'})
    small.save(folder/'a.yaml')
    small.replace(**{'tokenizer.lr': 2e-3}).save(folder/'b.yaml')
    (folder/'c.yaml').write_text('tokenizer: {lrr: 1}\n')
    argv = ['fit', place/'GOOG.csv', '--config', folder, '--out', place/'many', '--skip-existing']
    assert run(*argv) == 2
    said = capsys.readouterr().out
    assert said.count('finished') == 2
    for word in ('failed', 'lrr', 'kronos-nb compare'):
        assert word in said
    assert run(*argv) == 2
    assert capsys.readouterr().out.count('skipped') == 2


def test_none_empties_a_list():
    argv = ['fit', '--preset', 'quickstart', '--set', 'base.symbols=none', '--set', 'runtime.trackers=a,b']
    c = config_of(parser().parse_args(argv))
    assert c.base.symbols is None
    assert c.runtime.trackers == ('a', 'b')


@pytest.mark.parametrize('line, meant', [
    ('fit --skip-tokeniser', '--skip-tokenizer'),
    ('fit --learning_rate 3', '--learning-rate'),
    ('fit --batchsize=8', '--batch-size'),
    ('forecast --model x --patsh 3', '--paths'),
    ('fits', 'fit'),
])
def test_a_misspelt_option_or_command(capsys, line, meant):
    with pytest.raises(SystemExit) as e:
        main(line.split())
    assert e.value.code == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_an_unknown_option_of_fit_points_to_set(capsys):
    with pytest.raises(SystemExit) as e:
        main(['fit', '--lr', '3'])
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert '--set predictor.lr' in said
    assert '--learning-rate' in said


def ended(capsys, line: str) -> tuple[int, str]:
    "Return exit code and text of a command"
    try:
        code = main(line.split())
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out + said.err


def commands() -> dict:
    "Return the parsers of all commands"
    return next(o for o in parser()._actions if o.dest == 'command').choices


def test_help_shows_twenty_options_and_help_all_every_option_and_setting(capsys):
    code, text = ended(capsys, 'fit --help')
    assert code == 0
    shown = {o for o in commands()['fit']._actions if any(re.search(rf'{n}\b', text) for n in o.option_strings)}
    assert 18 <= len(shown) <= 22
    code, everything = ended(capsys, 'fit --help-all')
    assert code == 0
    assert all(name in everything for name in commands()['fit']._option_string_actions)
    assert all(f'{key}=' in everything for key in Config().flat())


@pytest.mark.parametrize('command', sorted(commands()))
def test_no_option_has_nothing_as_its_default(capsys, command):
    assert 'default: None' not in ended(capsys, f'{command} --help')[1]


@pytest.mark.parametrize('line', [
    'fit --lr 3', 'fit --epochs', 'fits', 'fit --set lr=1', 'fit --set predictor.xyz=1', '',
])
def test_a_typo_prints_no_wall(capsys, line):
    code, text = ended(capsys, line)
    assert code == 2
    assert len(text.splitlines()) <= 2
    assert len(text) < 300


@pytest.mark.parametrize('line, meant', [
    ('fit --set lr=1', 'predictor.lr'),
    ('fit --set predictr.lr=1', 'predictor.lr'),
    ('fit --set predictor.lrr=1', 'lr'),
])
def test_a_misspelt_setting(capsys, line, meant):
    code, text = ended(capsys, line)
    assert code == 2
    assert f"'{meant}'" in text


def test_options_are_settings():
    "Read text as the setting does, both stages where both have it"
    line = ('fit --symbols A B,C --epochs 3 --learning-rate 1e-3 --lookback-window 50 --seed 4 --repair standard '
            '--skip-existing --disable-optimizations --seeds 1,2')
    c = config_of(parser().parse_args(line.split()))
    assert c.data.symbols == ('A', 'B', 'C')
    assert (c.tokenizer.epochs, c.predictor.epochs, c.tokenizer.lr, c.predictor.lr) == (3, 3, 1e-3, 1e-3)
    assert (c.data.lookback_window, c.data.repair, c.runtime.seed) == (50, 'standard', 4)
    assert c.runtime.skip_existing
    assert not c.runtime.optimizations
    assert c.runtime.seeds == (1, 2)


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    "Work in a folder of files that hold no bars"
    monkeypatch.chdir(tmp_path)
    Path('empty.csv').touch()
    Path('binary.csv').write_bytes(bytes(range(256))*9)
    Path('binary.parquet').write_bytes(bytes(range(256))*9)
    Path('text.csv').write_text('a,b\n1,2\n')
    Path('folder').mkdir()
    Path('bad.yaml').write_text('data: [')


@pytest.mark.parametrize('line', [
    'fit empty.csv', 'fit binary.csv', 'fit binary.parquet', 'fit text.csv', 'fit folder', 'fit nowhere.csv',
    'fit --preset doge --config bad.yaml', 'fit --config bad.yaml', 'fit --config nowhere.yaml', 'fit --config folder',
    'fit --preset dog', 'fit --out empty.csv', 'forecast empty.csv --model nowhere', 'forecast --model nowhere',
    'forecast text.csv', 'evaluate --model nowhere', 'report nowhere', 'compare a b', 'push nowhere a/b',
    'tune empty.csv', 'average --checkpoint-dir nowhere --output x', 'monitor nowhere --once',
])
def test_every_error_ends_in_a_command(bad_files, capsys, line):
    code, text = ended(capsys, line)
    assert code == 2
    last = text.strip().splitlines()[-1]
    assert last.startswith('Try: kronos-nb ')
    tried = last.removeprefix('Try: kronos-nb ')
    assert tried != line
    args = parser().parse_args(tried.split()) if '--help' not in tried else None
    assert args is None or args.command in commands()
