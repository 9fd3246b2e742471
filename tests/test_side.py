"Side inputs: a closed gate changes no bit, nothing is read before it is known; from file through fit to forecast"
import json

import numpy as np
import pandas as pd
import pytest
import torch

from kronos_nb.average import average_checkpoints, weights_of
from kronos_nb.cli import main
from kronos_nb.config import Config
from kronos_nb.core import ConfigError, DataError, ModelError
from kronos_nb.covariate import parse_covariate, parse_covariates
from kronos_nb.data.covariates import covariate_table, read_covariates
from kronos_nb.data.read import sample_klines
from kronos_nb.data.window import WindowDataset
from kronos_nb.decode.engine import Decoder
from kronos_nb.evaluate import fingerprint
from kronos_nb.forecast import Forecaster
from kronos_nb.hub_card import model_card
from kronos_nb.judging.baselines import random_walks
from kronos_nb.judging.leaks import check_leaks
from kronos_nb.model.pretrained import PREFIX, copy_model
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.side import side_spec
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import fit
from kronos_nb.training.task import drop_covariates, set_trainable

NAMES = dict(funding='past', release='future', sector='static')
L, H, HOUR = 24, 4, 3600*10**9
SHORT = {
    'data.symbols': None, 'data.lookback_window': L, 'data.predict_window': H, 'data.max_context': 64,
    'data.embargo': 0, 'data.windows_per_epoch': 64, 'data.val_windows': 32, 'runtime.progress': False,
    'runtime.plots': False, 'runtime.only': 'predictor', 'predictor.tokenizer': 'bundled', 'evaluate.origins': 4,
    'evaluate.paths': 4, 'evaluate.calibrate': 'off', 'predictor.epochs': 2, 'predictor.batch_size': 32,
    'predictor.average_last': 2, 'predictor.patience': None, 'predictor.trainable': 'side', 'predictor.side_lr': .05,
    'runtime.save_steps': 2}


def two_symbols(n=400):
    return random_walks(n, ('A', 'B'))


def tables(bars, ahead=10):
    "Return covariates of bars, and of some steps after them, as one table"
    g, parts = np.random.default_rng(0), []
    for symbol, rows in bars.groupby('symbol', sort=False):
        t = rows.timestamps.to_numpy()
        t = np.concatenate([t, t[-1] + (t[-1] - t[-2])*np.arange(1, ahead + 1)])
        release = (np.arange(len(t)) % 7 == 0)*1.
        parts.append(pd.DataFrame(dict(symbol=symbol, timestamps=t, funding=g.normal(size=len(t)), release=release,
                                       sector='bank' if symbol == 'A' else 'car')))
    return pd.concat(parts, ignore_index=True)


def pair_with(table):
    predictor = Kronos.from_pretrained('bundled').add_side(side_spec(table))
    return Forecaster(KronosTokenizer.from_pretrained('bundled'), predictor)


@pytest.fixture(scope='module')
def table():
    return covariate_table(parse_covariates(NAMES), [tables(two_symbols())])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('side')
    tables(two_symbols()).to_csv(folder/'side.csv', index=False)
    two_symbols().to_parquet(folder/'bars.parquet')
    changes = {'data.covariates': NAMES, 'data.covariates_source': str(folder/'side.csv')}
    return fit([str(folder/'bars.parquet')], 'quickstart', folder/'run', **SHORT, **changes)


# the model
def logits(model, side=None):
    g = torch.Generator().manual_seed(0)
    s1, s2 = (torch.randint(2**b, (2, 30), generator=g) for b in (model.s1_bits, model.s2_bits))
    stamp = torch.ones(2, 30, 5, dtype=torch.long)
    return model(s1, s2, stamp, s1_targets=s1.roll(-1, 1), side=side)


def test_a_closed_gate_changes_no_bit(table):
    plain = Kronos.from_pretrained('bundled')
    model, side = Kronos.from_pretrained('bundled').add_side(side_spec(table)), torch.randn(2, 30, table.width)
    side[..., -1] = 1.
    for a, b in zip(logits(plain), logits(model, side)): assert torch.equal(a, b)
    stamp = torch.ones(2, 30, 5, dtype=torch.long)
    assert torch.equal(Decoder(plain).embed_stamps(stamp), Decoder(model).embed_stamps(stamp, side))


@pytest.mark.parametrize('context', [512, 40], ids=['within the context', 'beyond it'])
def test_a_closed_gate_forecasts_the_same(table, context):
    bars, f = two_symbols().tail(60), pair_with(table)
    plain = Forecaster(f.tokenizer, Kronos.from_pretrained('bundled'), max_context=context)
    mine = Forecaster(f.tokenizer, f.predictor, max_context=context).with_covariates(table)
    a, b = (o.predict(bars, H, paths=3, seed=1).paths for o in (plain, mine))
    np.testing.assert_array_equal(a, b)
    with torch.no_grad(): f.predictor.side.gate.fill_(3.)
    assert not np.array_equal(a, mine.predict(bars, H, paths=3, seed=1).paths)
    hidden = mine.predict(bars, H, paths=3, seed=1, covariates=pd.DataFrame(), missing='mask')
    np.testing.assert_array_equal(a, hidden.paths)   # nothing known: the released model, whatever the gate
    assert any('funding' in note for note in hidden.notes)


def test_the_fast_path_reads_what_training_reads(table):
    "Greedy tokens with a KV cache are the argmax of uncached logits, with the gate open"
    f = pair_with(table)
    with torch.no_grad(): f.predictor.side.gate.normal_(0, .5, generator=torch.Generator().manual_seed(0))
    from kronos_nb.decode.sample import Prefill, generate
    g = torch.Generator().manual_seed(0)
    s1, s2 = (torch.randint(2**b, (1, 20), generator=g) for b in (f.predictor.s1_bits, f.predictor.s2_bits))
    stamp, side = torch.ones(1, 20 + H, 5, dtype=torch.long), torch.randn(1, 20 + H, table.width, generator=g)
    side[..., -1] = 1.
    with torch.inference_mode():
        made = generate(Prefill(Decoder(f.predictor), s1, s2, stamp, 512, side), torch.zeros(1, 1, H, 2), temperature=0)
        for i in range(H):
            first, context = f.predictor.decode_s1(s1, s2, stamp[:, :20 + i], side=side[:, :20 + i])
            one = first[:, -1:].argmax(-1)
            two = f.predictor.decode_s2(context, one)[:, -1:].argmax(-1)
            assert (int(one), int(two)) == (int(made[0][0, i]), int(made[1][0, i]))
            s1, s2 = torch.cat([s1, one], 1), torch.cat([s2, two], 1)


def test_a_later_covariate_moves_no_past_logit(table):
    model = Kronos.from_pretrained('bundled').add_side(side_spec(table))
    with torch.no_grad(): model.side.gate.fill_(1.)
    side = torch.randn(2, 30, table.width)
    side[..., -1] = 1.
    other = side.clone()
    other[:, 15:, :-1] += 1
    for a, b in zip(logits(model, side), logits(model, other)):
        torch.testing.assert_close(a[:, :15], b[:, :15], rtol=0, atol=1e-5)
        assert not torch.equal(a[:, 15:], b[:, 15:])


def test_what_is_trained(table):
    def trained(what):
        model = set_trainable(Kronos.from_pretrained('bundled').add_side(side_spec(table)), what)
        return {k for k, p in model.named_parameters() if p.requires_grad}
    alone = trained('side')
    assert alone and all(k.startswith(PREFIX) for k in alone)
    assert alone < trained('heads') and alone < trained('last_1') and alone < trained('all')
    with pytest.raises(ConfigError, match='data.covariates'):
        set_trainable(Kronos.from_pretrained('bundled'), 'side')
    pytest.importorskip('peft')
    assert alone < trained('lora') and any('lora_' in k for k in trained('lora'))


def test_another_channel_is_refused(table):
    model = Kronos.from_pretrained('bundled').add_side(side_spec(table))
    with pytest.raises(ModelError, match='data.covariates'):
        model.add_side(side_spec(table) | dict(labels=dict(sector=['x'])))
    plain = Kronos.from_pretrained('bundled')
    with pytest.raises(ModelError, match='data.covariates'): logits(plain, torch.zeros(2, 30, 7))


def test_dropout_of_whole_covariates_depends_on_the_window_alone():
    side = torch.ones(50, 3, 7)
    few = drop_covariates(side, 2, .5, 3, 1, range(50))
    assert torch.equal(few[10:], drop_covariates(side[10:], 2, .5, 3, 1, range(10, 50)))
    assert torch.equal(few[..., 0], few[..., 2]) and torch.equal(few[..., 0], few[..., 4])
    assert .3 < float(few[:, 0].mean()) < .7 and drop_covariates(side, 2, 0., 3, 1, range(50)) is side


# files of a model
def test_saved_beside_the_pair(table, tmp_path):
    from safetensors.torch import load_file
    plain, model = Kronos.from_pretrained('bundled'), Kronos.from_pretrained('bundled').add_side(side_spec(table))
    with torch.no_grad(): model.side.gate.fill_(.3)
    plain.save_pretrained(tmp_path/'plain')
    model.save_pretrained(tmp_path/'side')
    for name in ('config.json', 'model.safetensors'):
        assert (tmp_path/'plain'/name).read_bytes() == (tmp_path/'side'/name).read_bytes()
    said = json.loads((tmp_path/'side'/'side.json').read_text())
    assert [c['name'] for c in said['covariates']] == list(NAMES) and said['hash'] and said['predictor']
    assert set(load_file(tmp_path/'side'/'side.safetensors')) == {k for k in model.side.state_dict()}
    read = Kronos.from_pretrained(copy_model(tmp_path/'side', tmp_path/'copy'))
    assert read.weights_hash() == model.weights_hash() and read.extra['side'] == side_spec(table)
    plain.save_pretrained(tmp_path/'side')   # no channel is left behind
    assert Kronos.from_pretrained(tmp_path/'side').side is None


def test_side_files_of_another_model_are_refused(table, tmp_path):
    Kronos.from_pretrained('bundled').add_side(side_spec(table)).save_pretrained(tmp_path/'a')
    other = Kronos.from_pretrained('bundled')
    with torch.no_grad(): other.norm.weight.mul_(2)
    other.save_pretrained(tmp_path/'b')
    for name in ('side.json', 'side.safetensors'): (tmp_path/'b'/name).write_bytes((tmp_path/'a'/name).read_bytes())
    with pytest.raises(ModelError, match='side'): Kronos.from_pretrained(tmp_path/'b')
    (tmp_path/'b'/'side.json').unlink()
    with pytest.raises(ModelError, match='side.json'): Kronos.from_pretrained(tmp_path/'b')


# the data
def test_a_value_is_used_as_of_the_close(table):
    "A daily row stamped at its start is known when its day is over; `lag` says otherwise"
    t = pd.date_range('2024-01-01', periods=72, freq='h')
    days = pd.DataFrame(dict(timestamps=pd.date_range('2024-01-01', periods=3, freq='D'), x=[1., 2, 3]))
    def values(text): return covariate_table((parse_covariate('x', text),), [days]).align('S', t, HOUR)
    usual, soon, late = map(values, ('past', 'past lag 0h', 'past lag 36h'))
    assert usual.there[:23].sum() == 0 and usual.v[23, 0] == 1 and usual.v[46, 0] == 1 and usual.v[47, 0] == 2
    assert soon.v[22, 0] == 1 and soon.v[23, 0] == 2
    assert not late.there[34, 0] and late.v[35, 0] == 1
    assert usual.age[23, 0] == 0 and usual.age[24, 0] == 1


@pytest.mark.parametrize('kind', ['past', 'past change', 'past lag 5h', 'past raw'])
def test_nothing_later_than_the_last_close_is_read(kind):
    bars, g = two_symbols(200).query("symbol == 'A'").reset_index(drop=True), np.random.default_rng(0)
    x = pd.DataFrame(dict(timestamps=bars.timestamps, x=g.uniform(-1, 1, len(bars))))
    for n in (L, 50, 150):
        y = x.assign(x=np.where(x.index >= n, 3., x.x))
        step = int((bars.timestamps.iloc[1] - bars.timestamps.iloc[0]).value)
        found = []
        for frame in (x, y):
            table = covariate_table((parse_covariate('x', kind),), [frame])
            a = table.align('A', bars.timestamps[n - L:n + H].to_numpy(), step, past=L)
            ds = WindowDataset(bars, L, H, covariates=table)
            ahead = table.inputs(a.v[None], a.there[None], a.age[None], a.codes[None], L)[0]
            found.append((ahead, ds.side([n - L])[0]))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_array_equal(found[0][1], found[1][1])
        np.testing.assert_array_equal(found[0][0], found[0][1])   # training and forecast read the same


def test_the_scale_is_that_of_the_lookback_alone():
    bars, g = two_symbols(100).query("symbol == 'A'").reset_index(drop=True), np.random.default_rng(0)
    x = pd.DataFrame(dict(timestamps=bars.timestamps, x=g.normal(5, 2, len(bars))))
    z = WindowDataset(bars, L, H, covariates=covariate_table((parse_covariate('x', 'past'),), [x])).side([7])[0]
    part = x.x.to_numpy()[7:7 + L]
    np.testing.assert_allclose(z[:L, 0], (part - part.mean())/part.std(), rtol=1e-5, atol=1e-5)
    assert (z[L:, 0] == z[L - 1, 0]).all() and (np.diff(z[L - 1:, 2]) > 0).all()


def test_a_future_covariate_is_that_of_the_bar_to_be_predicted():
    bars = two_symbols(100).query("symbol == 'A'").reset_index(drop=True)
    x = pd.DataFrame(dict(timestamps=bars.timestamps, x=np.arange(len(bars)) % 3))
    side = WindowDataset(bars, L, H, covariates=covariate_table((parse_covariate('x', 'future'),), [x])).side([5])[0]
    np.testing.assert_array_equal(side[:-1, 0], x.x[6:5 + L + H])
    assert side[-1].sum() == 0


def good():
    return tables(two_symbols(), 0)


BAD = dict(   # the table, and what an error must name
    early=(lambda x: x[(x.symbol != 'B') | (x.timestamps < x.timestamps.max() - pd.Timedelta('5D'))],
           'B at .*(funding|release)'),
    twice=(lambda x: pd.concat([x, x.iloc[5:6]]), 'A at .*funding'),
    text=(lambda x: x.astype(dict(funding=object)).assign(funding=lambda o: o.funding.where(o.index != 9, 'n/a?')),
          'A at .*funding'),
    infinite=(lambda x: x.assign(funding=x.funding.where(x.index != 9, np.inf)), 'A at .*funding'),
    absurd=(lambda x: x.assign(funding=x.funding.where(x.index != 9, 1e30)), 'A at .*funding'),
    hole=(lambda x: x.assign(funding=x.funding.where(x.index != 9)), 'A at .*funding'),
    constant=(lambda x: x.assign(funding=3.), 'A at .*funding'),
    symbol=(lambda x: x[x.symbol == 'A'], 'B at .*(funding|sector|release)'),
    interval=(lambda x: x[x.index % 24 == 0], 'A at .*release'),
    big=(lambda x: x.assign(release=100*x.release), 'A at .*release'),
    labels=(lambda x: x.assign(sector=[f's{i % 2}' for i in range(len(x))]), 'A: .*sector'),
    no_column=(lambda x: x.drop(columns='funding'), 'funding'),
    no_stamp=(lambda x: x.drop(columns='timestamps'), 'timestamps'),
)


@pytest.mark.parametrize('name', list(BAD))
def test_bad_input_is_an_error_that_names_it(name, tmp_path):
    from kronos_nb.fitting.prepare import prepare
    change, match = BAD[name]
    change(good()).to_csv(tmp_path/'x.csv', index=False)
    cfg = Config.preset('quickstart', **SHORT, **{'data.covariates': NAMES,
                                                  'data.covariates_source': str(tmp_path/'x.csv')})
    with pytest.raises(DataError, match=match): prepare(two_symbols(), cfg)


@pytest.mark.parametrize('name', ['early', 'hole', 'symbol', 'interval'])
def test_what_is_missing_is_masked_where_that_is_asked_for(name):
    table = covariate_table(parse_covariates(NAMES), [BAD[name][0](good())], missing='mask')
    side = WindowDataset(two_symbols(), L, H, covariates=table).side(range(300))
    assert torch.isfinite(side).all() and 0 < float(side[..., 2].mean()) <= 1


def test_a_column_that_is_nowhere_is_an_error_in_training_even_where_values_may_be_masked():
    found, rest = parse_covariates(dict(funding='past')), good().drop(columns='funding')
    with pytest.raises(DataError, match='funding'): covariate_table(found, [rest], missing='mask')
    assert covariate_table(found, [rest], missing='mask', labels={}).series == {}


@pytest.mark.parametrize('change', [
    {'data.covariates': {'funding': 'tomorrow'}}, {'data.covariates': {'close': 'past'}},
    {'data.covariates': {'x': 'future lag 1h'}}, {'data.covariates_source': 'x.csv'},
    {'data.covariates': {'x': 'static'}}])
def test_wrong_declarations(change):
    with pytest.raises(ConfigError, match='data.covariates'): Config().replace(**change)
    with pytest.raises(ConfigError, match='predictor.trainable'): Config().replace(**{'predictor.trainable': 'sides'})
    with pytest.raises(ConfigError, match='tokenizer.trainable'): Config().replace(**{'tokenizer.trainable': 'side'})


def test_settings_as_text_and_yaml(tmp_path):
    cfg = Config().replace(**{'data.covariates': 'funding: past lag 8h raw unit bps, btc: past change'})
    assert [c.name for c in cfg.data.side] == ['funding', 'btc'] and cfg.data.side[0].lag == 8*3600
    assert Config.load(cfg.save(tmp_path/'c.yaml')) == cfg and Config().data.side == ()


# a run
def test_a_run_trains_and_saves_the_channel(run):
    base, model = Kronos.from_pretrained('bundled'), run.predictor
    assert [c.name for c in run.forecaster().covariates] == list(NAMES)
    own = {k: p for k, p in model.named_parameters() if not k.startswith(PREFIX)}
    assert all(torch.equal(p, own[k]) for k, p in base.named_parameters())   # the channel alone was trained
    final = weights_of(run.run.stage('predictor').final_model)
    assert float(final['side.gate'].abs().max()) > 0
    mean = average_checkpoints(run.run.stage('predictor').folder, 2)
    assert 'side.gate' in mean and mean.config['side'] == model.extra['side']
    mean.save(run.out_dir/'mean')
    assert torch.equal(Kronos.from_pretrained(run.out_dir/'mean').side.gate, mean['side.gate'])


def test_a_run_tells_of_its_covariates(run):
    report = (run.out_dir/'data_report.md').read_text()
    assert all(name in report for name in NAMES)
    assert all(name in model_card(run, 'predictor') for name in NAMES)


def test_a_run_passes_the_leak_check(run):
    found = check_leaks(run.out_dir, two_symbols())
    assert found.ok and 'covariates' in set(found.checks['check']), found


def test_forecast_of_a_run(run):
    bars, x = two_symbols(), tables(two_symbols())
    f = Forecaster.from_pretrained(run.out_dir)
    with torch.no_grad(): f.predictor.side.gate.fill_(3.)
    made = f.predict(bars, H, paths=3, covariates=x)
    assert set(made) == {'A', 'B'}
    moved = x.assign(release=1 - x.release)
    assert not np.array_equal(made['A'].paths, f.predict(bars, H, paths=3, covariates=moved)['A'].paths)
    t = bars.timestamps.max()
    later = x.assign(funding=np.where(x.timestamps > t, 50., x.funding))
    np.testing.assert_array_equal(made['A'].paths, f.predict(bars, H, paths=3, covariates=later)['A'].paths)
    with pytest.raises(DataError, match='release'): f.predict(bars, H, covariates=x[x.timestamps <= t])
    with pytest.raises(DataError, match='funding'): f.predict(bars, H)
    alone = f.predict(bars, H, paths=3, missing='mask', covariates=x[['symbol', 'timestamps', 'funding']])
    assert any('release' in note for note in alone['A'].notes)
    plain = Forecaster.from_pretrained('bundled')
    with pytest.raises(ModelError, match='covariates'): plain.predict(bars, H, covariates=x)


def test_other_values_are_another_forecaster(run):
    f, x = run.forecaster(), tables(two_symbols())
    a, b = (f.with_covariates(o) for o in (x, x.assign(funding=2*x.funding)))
    assert len({fingerprint(o) for o in (f, a, b)}) == 3 and fingerprint(a) == fingerprint(f.with_covariates(x))


def test_commands(run, tmp_path, capsys):
    folder = run.out_dir.parent
    call = [str(folder/'bars.parquet'), '--model', str(run.out_dir), '--paths', '3']
    assert main(['forecast', *call, '--out', str(tmp_path/'f')]) == 0
    x = tables(two_symbols(), 0)
    x.to_csv(tmp_path/'past.csv', index=False)
    side = ['--covariates-source', str(tmp_path/'past.csv')]
    assert main(['forecast', *call, *side, '--out', str(tmp_path/'g')]) != 0
    assert 'release' in capsys.readouterr().err
    assert main(['forecast', *call, *side, '--covariates-missing', 'mask', '--out', str(tmp_path/'g')]) == 0
    assert main(['evaluate', *call, '--origins', '4', '--out', str(tmp_path/'e')]) == 0


def test_the_same_run_goes_on_and_other_values_do_not(run, tmp_path):
    again = fit([str(run.out_dir.parent/'bars.parquet')], run.config, run.out_dir)
    assert again.predictor.weights_hash() == run.predictor.weights_hash()
    other = tables(two_symbols())
    other.assign(funding=2*other.funding).to_csv(tmp_path/'side.csv', index=False)
    from kronos_nb.core import RunError
    with pytest.raises(RunError):
        fit([str(run.out_dir.parent/'bars.parquet')], run.config.replace(**{
            'data.covariates_source': str(tmp_path/'side.csv')}), run.out_dir)


def test_columns_of_the_bars(tmp_path):
    "Without another file the covariates are columns of the bars, and a forecast reads them there"
    bars = sample_klines('GOOG').tail(300).reset_index(drop=True)
    bars['funding'] = np.random.default_rng(0).normal(size=len(bars))
    from kronos_nb.fitting.prepare import prepare
    cfg = Config.preset('quickstart', **SHORT, **{'data.covariates': {'funding': 'past'}})
    data = prepare(bars, cfg)
    assert 'funding' in data.bars and data.train.side([0]).shape == (1, L + H, 3)
    f = pair_with(data.covariates)
    with torch.no_grad(): f.predictor.side.gate.fill_(3.)
    one, two = (o.predict(bars.tail(60), H, paths=2).paths for o in (f, f.with_covariates(data.covariates)))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(DataError, match='funding'): f.predict(bars.drop(columns='funding').tail(60), H)


def test_files_of_several_kinds(tmp_path):
    x = tables(two_symbols())
    if int(pd.__version__.split('.')[0]) < 3:
        x = x.round(6)   # it misreads the last of seventeen digits in a csv file
    x.to_parquet(tmp_path/'a.parquet')
    x.drop(columns='sector').to_csv(tmp_path/'a.csv.gz', index=False)
    x[['symbol', 'sector']].drop_duplicates().to_csv(tmp_path/'b.csv', index=False)
    found = parse_covariates(NAMES)
    one = read_covariates(found, tmp_path/'a.parquet')
    two = read_covariates(found, [tmp_path/'a.csv.gz', tmp_path/'b.csv'])
    assert one.digest == two.digest and one.labels == two.labels == dict(sector=['bank', 'car'])
    with pytest.raises(DataError, match='absent'): read_covariates(found, tmp_path/'absent.csv')
