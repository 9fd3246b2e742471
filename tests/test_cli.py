"Every command on a run that a newcomer would have: small, real, from the command line to the files"
import json, re
from pathlib import Path
import pandas as pd, pytest
from kronos_nb.cli import main
from kronos_nb.data.kline import sample_klines
from kronos_nb.forecast import Forecaster
from tests.test_train import bars, cfg, SETTINGS

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A file of bars and a finished run on it"
    d = tmp_path_factory.mktemp('cli')
    bars.to_csv(d/'GOOG.csv', index=False)
    cfg.replace(**{'tokenizer.epochs': 1, 'predictor.epochs': 1, 'runtime.save_steps': 2}).save(d/'mine.yaml')
    assert main(['fit', str(d/'GOOG.csv'), '--config', str(d/'mine.yaml'), '--out', str(d/'run')])==0
    return d

def test_fit_says_the_verdict_and_leaves_a_report(place, capsys):
    assert main(['fit', str(place/'GOOG.csv'), '--config', str(place/'mine.yaml'), '--out', str(place/'run')])==0   # again: everything is there
    said = capsys.readouterr().out
    assert re.search('helped|did not help|Cannot tell', said) and 'report.md' in said
    report = (place/'run'/'report.md').read_text()
    assert '## Verdict' in report and 'plots/evaluation.png' in report and (place/'run'/'plots'/'evaluation.png').is_file()

def test_forecast_writes_quantiles_paths_and_a_picture(place, capsys):
    assert main(['forecast', str(place/'GOOG.csv'), '--model', str(place/'run'), '--paths', '6', '--out', str(place/'fc')])==0
    t = pd.read_csv(place/'fc'/'forecast.csv')
    assert list(t.columns)==['timestamps', 'close_q05', 'close_q25', 'close_q50', 'close_q75', 'close_q95', 'symbol'] and len(t)==cfg.data.predict_window
    assert (t.close_q05<=t.close_q50).all() and (t.close_q50<=t.close_q95).all() and pd.Timestamp(t.timestamps[0])>bars.timestamps.max()
    assert len(pd.read_parquet(place/'fc'/'paths.parquet'))==6*cfg.data.predict_window and (place/'fc'/'forecast_GOOG.png').stat().st_size>5000

def test_evaluate_takes_only_what_the_model_has_not_seen(place, capsys):
    assert main(['evaluate', str(place/'GOOG.csv'), '--model', str(place/'run'), '--paths', '4', '--origins', '8', '--out', str(place/'ev')])==0
    assert '## Evaluation' in capsys.readouterr().out
    first = pd.read_parquet(place/'ev'/'rows.parquet').origin.min()
    last = json.loads((place/'run'/'predictor'/'best_model'/'config.json').read_text())['trained_on']['GOOG'][1]
    assert pd.Timestamp(first)>=pd.Timestamp(last)
    assert main(['evaluate', str(place/'GOOG.csv'), '--model', str(place/'run'), '--paths', '4', '--start', '2004-12-01'])==2   # bars that it was trained on
    assert 'DataError' in capsys.readouterr().err

def test_evaluate_judges_a_checkpoint_and_an_average(place, capsys):
    "With the run's tokenizer and base, on the bars that the run did not see, as it judges the run itself"
    kept = sorted((place/'run'/'predictor'/'checkpoints').glob('step_*'))[-1]
    assert main(['average', '--checkpoint-dir', str(kept.parent), '--num-checkpoints', '2', '--output', str(place/'run'/'two')])==0
    found = {}
    for model in (place/'run', kept, place/'run'/'two'):
        assert main(['evaluate', str(place/'GOOG.csv'), '--model', str(model), '--paths', '4', '--origins', '8', '--out', str(place/f'ev_{model.name}')])==0
        found[model.name] = pd.read_parquet(place/f'ev_{model.name}'/'rows.parquet').set_index(['model', 'origin', 'h'])
    run, *others = found.values()
    assert all(o.index.equals(run.index) and o.loc['LastValue'].equals(run.loc['LastValue']) for o in others)
    assert capsys.readouterr().out.count('## Evaluation') == 3 and len({Forecaster.from_pretrained(o).predictor.weights_hash() for o in (kept, place/'run'/'two')}) == 2

def test_compare_writes_a_table_and_a_picture(place, capsys):
    import shutil
    shutil.copytree(place/'run', place/'again', dirs_exist_ok=True)
    assert main(['compare', str(place/'run'), str(place/'again'), '--out', str(place/'cmp')])==0
    assert capsys.readouterr().out.strip() in (place/'cmp'/'compare.md').read_text() and (place/'cmp'/'compare.png').stat().st_size>5000

@pytest.mark.parametrize('argv, code, says', [
    (['monitor', 'RUN', '--once'], 0, 'finished'), (['report', 'RUN'], 0, 'report.md'), (['check', 'FILE'], 0, 'GOOG'), (['compare', 'RUN', 'RUN'], 2, ''),
    (['average', '--checkpoint-dir', 'RUN/predictor/checkpoints', '--num-checkpoints', '2', '--output', 'RUN/avg'], 0, 'written to'), (['report', 'nowhere'], 2, 'is no run'),
    (['forecast', '--model', 'nowhere'], 2, 'nowhere'), (['fit', 'FILE', '--config', 'RUN/config.yaml', '--preset', 'doge'], 2, 'both name a configuration')])
def test_other_commands(place, capsys, argv, code, says):
    assert main([o.replace('RUN', str(place/'run')).replace('FILE', str(place/'GOOG.csv')) for o in argv])==code
    out = capsys.readouterr()
    assert says in out.out+out.err

def test_a_folder_of_configurations_runs_one_after_the_other(place, capsys):
    "Finished ones are left alone; a failing one is told and does not stop the rest"
    d = place/'experiments'
    d.mkdir()
    small = cfg.replace(**{'tokenizer.epochs': 1, 'predictor.epochs': 1, 'runtime.only': 'tokenizer', 'evaluate.calibrate': 'off'})
    small.save(d/'a.yaml')
    small.replace(**{'tokenizer.lr': 2e-3}).save(d/'b.yaml')
    (d/'c.yaml').write_text('tokenizer: {lrr: 1}\n')
    argv = ['fit', str(place/'GOOG.csv'), '--config', str(d), '--out', str(place/'many'), '--skip-existing']
    assert main(argv)==2
    said = capsys.readouterr().out
    assert said.count('finished')==2 and 'failed' in said and 'lrr' in said and 'kronos-nb compare' in said
    assert main(argv)==2 and capsys.readouterr().out.count('skipped')==2

def test_none_empties_a_list():
    from kronos_nb.cli import settings
    assert settings(['base.symbols=none', 'runtime.trackers=a,b'])=={'base.symbols': None, 'runtime.trackers': ('a', 'b')}

@pytest.mark.parametrize('argv, meant', [(['fit', '--skip-tokeniser'], "did you mean '--skip-tokenizer'?"), (['fit', '--learning_rate', '3'], "did you mean '--learning-rate'?"), (['fit', '--batchsize=8'], "did you mean '--batch-size'?"),
    (['forecast', '--model', 'x', '--patsh', '3'], "did you mean '--paths'?"), (['fits'], "did you mean 'fit'?"), (['fit', '--lr', '3'], '--set predictor.lr')])
def test_a_misspelt_option_or_command(capsys, argv, meant):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code==2 and meant in capsys.readouterr().err
