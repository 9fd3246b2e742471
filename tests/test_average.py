"Averaging, in the cases that teach nothing: whole folders, damage, configs, resumes, exceptions in a fit"

import copy
import pytest, torch
from safetensors.torch import save_file
from torch import nn
from kronos_nb.average import (
    EMA,
    LAWA,
    Weights,
    average_checkpoints,
    choose_weights,
    greedy_soup,
    inner_model,
    on_validation,
    weights_of,
)
from kronos_nb.training.checkpoint import Checkpoint
from kronos_nb.training.optim import Best
from kronos_nb.core import ModelError, RunError
from kronos_nb.training.learner import Callback, Learner, TensorSource
from kronos_nb.model.predictor import Kronos
from kronos_nb.model.tokenizer import KronosTokenizer

SMALL = dict(
    s1_bits=3,
    s2_bits=3,
    n_layers=1,
    d_model=16,
    n_heads=2,
    ff_dim=16,
    ffn_dropout_p=0.1,
    attn_dropout_p=0.0,
    resid_dropout_p=0.1,
    token_dropout_p=0.0,
    learn_te=True,
)
g = torch.Generator().manual_seed(0)
data = dict(
    s1=torch.randint(0, 8, (40, 10), generator=g),
    s2=torch.randint(0, 8, (40, 10), generator=g),
    stamp=torch.ones(40, 10, 5, dtype=torch.long),
)


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Kronos(**SMALL, extra=dict(max_context=16))

    def forward(self, s1, s2, stamp):
        return self.model.loss(s1, s2, stamp)


def learner(*callbacks):
    task = Task()
    return Learner(
        task,
        TensorSource(data, 8, seed=0),
        TensorSource(data, 20),
        torch.optim.AdamW(task.parameters(), lr=1e-2),
        callbacks=callbacks,
    )


save = lambda learn, folder: learn.model.model.save_pretrained(folder)


def test_checkpoints_of_a_run_average_to_a_model_that_loads(tmp_path):
    learn = learner(
        Checkpoint(tmp_path / 'checkpoints', 3, save_model=save),
        Best(lambda l: save(l, tmp_path / 'best_model')),
        EMA(),
        LAWA(0.5),
    ).fit(3)
    got = average_checkpoints(tmp_path, n=5, out=tmp_path / 'averaged')
    assert got.origin.startswith('mean of 5 checkpoints: step_000003')
    back = Kronos.from_pretrained(tmp_path / 'averaged')
    files = [weights_of(tmp_path / 'checkpoints' / f'step_{n:06d}') for n in (3, 6, 9, 12, 15)]
    for k, t in back.state_dict().items():
        torch.testing.assert_close(t, torch.stack([f[k] for f in files]).mean(0), rtol=1e-6, atol=1e-7)
    assert back.extra['weights_origin'] == got.origin
    found = dict(last=weights_of(inner_model(learn)), best=tmp_path / 'best_model', mean=got) | {
        c.label: c.weights for c in learn.callbacks if isinstance(c, (EMA, LAWA))
    }
    before = copy.deepcopy(learn.model.state_dict())
    choice = choose_weights(found, on_validation(learn))
    assert choice.table.val_loss.min() == choice.table.val_loss[choice.table.chosen].item()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), learn.model.state_dict().values()))
    assert found['last'].config['max_context'] == found['ema'].config['max_context'] == 16
    choice.weights.save(tmp_path / 'winner')
    assert Kronos.from_pretrained(tmp_path / 'winner').config == Kronos(**SMALL).config


def test_a_damaged_checkpoint_is_named(tmp_path):
    learner(Checkpoint(tmp_path, 3, save_model=save)).fit(2)
    (tmp_path / 'step_000009' / 'model.safetensors').write_bytes(b'x')
    with pytest.raises(RunError, match='step_000009 is damaged'):
        average_checkpoints(tmp_path, n=3)
    assert len(average_checkpoints(tmp_path, n=2, pattern='step_00000[36]*')) > 0


def test_configs_that_differ_are_named(tmp_path):
    for n, ctx in ((1, 16), (2, 32), (3, 16)):
        Kronos(**SMALL, extra=dict(max_context=ctx)).save_pretrained(tmp_path / f'step_{n}')
    with pytest.raises(ModelError, match='max_context'):
        average_checkpoints(tmp_path, n=3)


def test_integer_buffers_of_a_tokenizer_stay(tmp_path):
    size = dict(
        d_in=6,
        d_model=16,
        n_heads=2,
        ff_dim=16,
        n_enc_layers=2,
        n_dec_layers=2,
        ffn_dropout_p=0.0,
        attn_dropout_p=0.0,
        resid_dropout_p=0.0,
        s1_bits=3,
        s2_bits=3,
        beta=0.05,
        gamma0=1.0,
        gamma=1.1,
        zeta=0.05,
        group_size=3,
    )
    for n in range(3):
        KronosTokenizer(**size).save_pretrained(tmp_path / f'step_{n}')
    KronosTokenizer.from_pretrained(average_and_save(tmp_path))


def average_and_save(folder):
    average_checkpoints(folder, n=3, out=folder / 'averaged')
    return folder / 'averaged'


def test_a_list_of_files_and_one_file_out(tmp_path):
    for n in (1, 2, 3):
        save_file({'w': torch.tensor([float(n)])}, tmp_path / f'{n}.safetensors')
    got = average_checkpoints([tmp_path / f'{n}.safetensors' for n in (1, 2, 3)], out=tmp_path / 'mean.safetensors')
    assert got['w'].item() == 2 and weights_of(tmp_path / 'mean.safetensors')['w'].item() == 2


@pytest.mark.parametrize('n, few', [(2, True), (3, False), (15, False), (16, True)])
def test_unusual_numbers_are_noted(tmp_path, n, few):
    for i in range(16):
        save_file({'w': torch.tensor([float(i)])}, tmp_path / f'step_{i}.safetensors')
    assert bool(average_checkpoints(tmp_path, n=n).notes) == few


def test_weights_return_after_an_exception_in_a_validation():
    class Boom(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            if not self.training:
                raise ValueError('boom')
            return dict(loss=-self.w.sum() + 0 * x.sum())

    task, ema = Boom(), EMA(validate=True)
    learn = Learner(
        task, TensorSource(dict(x=torch.zeros(4)), 1), None, torch.optim.SGD(task.parameters(), lr=1.0), callbacks=[ema]
    ).fit(1)
    learn.valid = TensorSource(dict(x=torch.zeros(4)), 1)
    with pytest.raises(ValueError):
        ema.after_validate(learn)
    assert task.w.item() == 4.0 and ema.weights['w'].item() != 4.0


def test_averages_leave_training_alone_and_resume_exactly(tmp_path):
    make = lambda folder: learner(EMA(validate=True), LAWA(0.4), Checkpoint(folder, 4, save_model=save))
    bare, whole = learner().fit(3), make(tmp_path / 'a').fit(3)
    assert all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), whole.model.parameters()))

    class Stop(Callback):
        def after_step(self, learn):
            if learn.step == 10:
                learn.stop('enough', interrupted=True)

    make(tmp_path / 'b').add(Stop()).fit(3)
    rest = make(tmp_path / 'b')
    rest.callbacks[-1].resume(rest)
    assert rest.step == 10
    rest.fit(3)
    for a, b in zip(whole.callbacks, rest.callbacks):
        if isinstance(a, (EMA, LAWA)):
            assert a.n == b.n and all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    assert whole.history.to_dict() == rest.history.to_dict()


def test_soup_of_runs_with_other_tokenizers_is_refused(tmp_path):
    for h in 'ab':
        Weights({'w': torch.ones(1)}, config=dict(tokenizer_hash=h)).save(tmp_path / h)
    with pytest.raises(ModelError, match='tokenizer_hash'):
        greedy_soup({h: tmp_path / h for h in 'ab'}, lambda w: 1.0)


def test_an_average_goes_on_in_a_second_fit_and_starts_anew_in_another_learner():
    ema = EMA()
    learner(once := EMA()).fit(2)
    learn = learner(ema).fit(1)
    learn.fit(2)
    assert ema.n == once.n == 10 and all(torch.equal(ema.weights[k], once.weights[k]) for k in once.weights)
    learner(ema).fit(1)
    assert ema.n == 5


def test_seeds_train_an_ensemble_on_one_tokenizer(tmp_path):
    from kronos_nb.judging.baselines import random_walks
    from kronos_nb.judging.compare import compare
    from kronos_nb.config import Config
    from kronos_nb.core import ConfigError
    from kronos_nb.follow import monitor_run
    from kronos_nb.forecast import Forecaster
    from kronos_nb.train import fit, load

    small = dict(d_model=16, n_heads=2, ff_dim=16, s1_bits=4, s2_bits=4)
    bars, settings = (
        random_walks(500),
        {
            'tokenizer.init': 'scratch', 'predictor.init': 'scratch',
            'data.symbols': None,
            'data.lookback_window': 16,
            'data.predict_window': 2,
            'data.embargo': 0,
            'data.windows_per_epoch': 64,
            'data.val_windows': 32,
            'runtime.progress': False,
            'runtime.plots': False,
            'tokenizer.model': small | dict(n_enc_layers=2, n_dec_layers=2, group_size=4),
            'predictor.model': small | dict(n_layers=1),
            'tokenizer.epochs': 1,
            'predictor.epochs': 1,
            'evaluate.paths': 8,
            'evaluate.origins': 8,
            'evaluate.calibrate': 'on',
            'predictor.norm_schedule': True,
            'predictor.norm_stopping': True,
            'runtime.live_plot': True,
            'runtime.log_every': 1,
        },
    )
    r = fit(bars, 'quickstart', tmp_path, **settings, **{'runtime.seeds': [1, 2]})
    assert (
        r.history.seed.tolist() == [0, 1, 2]
        and 'lr_scale' in r.history
        and len(r.predictors) == 2
        and not torch.equal(*(m.head.proj_s1.weight for m in r.predictors))
    )
    past = bars.tail(16)
    one, two = (Forecaster(r.tokenizer, m).predict(past, 2, paths=6, raw=True).paths for m in r.predictors)
    pooled = Forecaster.from_pretrained(tmp_path).predict(past, 2, paths=6, raw=True).paths
    assert (
        (pooled[::2] == one[::2]).all()
        and (pooled[1::2] == two[1::2]).all()
        and (r.forecaster().predict(past, 2, paths=6, raw=True).paths == pooled).all()
    )
    assert (
        len(Forecaster.from_pretrained(tmp_path).predictors) == 2
        and Forecaster.from_pretrained(tmp_path).calibration == r.calibration
    )
    page, card = ((tmp_path / o).read_text() for o in ('report.md', 'predictor/best_model/README.md'))
    assert (
        '### Predictor, seed 2' in page
        and '## Calibration' in page
        and 'those of 2 predictors (seeds 1, 2)' in card
        and '## Calibration' in card
    )
    assert {'predictor', 'seed_2 predictor'} <= set(
        compare({'a': tmp_path, 'b': tmp_path}).losses.stage
    ) and monitor_run(tmp_path, follow=False) == 'finished'
    back = load(tmp_path)
    assert back.history.equals(r.history) and (back.evaluation.sentence, back.calibration, back.interrupted) == (
        r.evaluation.sentence,
        r.calibration,
        False,
    )
    assert (back.forecaster().predict(past, 2, paths=6, raw=True).paths == pooled).all()
    again = fit(
        bars, 'quickstart', tmp_path, **settings, **{'runtime.seeds': [1, 2]}
    )  # finished: nothing is trained again
    assert all(
        torch.equal(a, b)
        for m, n in zip(r.predictors, again.predictors)
        for a, b in zip(m.parameters(), n.parameters())
    )
    with pytest.raises(RunError, match='runtime.seeds'):
        fit(bars, 'quickstart', tmp_path, **settings, **{'runtime.seeds': [1, 3]})
    with pytest.raises(ConfigError, match='two or more'):
        fit(bars, 'quickstart', tmp_path / 'other', **{'runtime.seeds': [1]})
    from kronos_nb.cli import config_of, main, parser

    bars.to_csv(tmp_path.parent / 'walk.csv', index=False)  # a model inside the run is judged with the run's tokenizer
    assert (
        main(
            [
                'evaluate',
                str(tmp_path.parent / 'walk.csv'),
                '--model',
                str(tmp_path / 'seed_2' / 'predictor' / 'best_model'),
                '--paths',
                '4',
                '--origins',
                '8',
            ]
        )
        == 0
    )
    assert (
        config_of(parser().parse_args(['fit', '--seeds', '1,2'])).runtime.seeds
        == Config.load({'runtime': {'seeds': [1, 2]}}).runtime.seeds
        == (1, 2)
    )
