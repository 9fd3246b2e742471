"The card of a judged model carries its results in the metadata of the hub, equal to the verdict's"
import json
import shutil

import pytest
from huggingface_hub import ModelCard

from kronos_nb.core import RunError
from kronos_nb.hub_card import model_card
from kronos_nb.judging.evaluation import Evaluation

from .test_hub import run   # noqa: F401


def read(folder, stage='predictor', **how): return ModelCard(model_card(folder, stage, **how)).data


def test_results_are_those_of_the_evaluation(run):
    e, data = Evaluation.load(run), read(run)
    kept = ModelCard.load(run/'predictor'/'best_model'/'README.md').data   # `fit` wrote it
    assert data.to_dict() == kept.to_dict()
    by_name = {o.metric_type: o for o in data.eval_results}
    pooled = e.metrics.query("model == 'model' and scope == 'pooled'").set_index('metric')
    rivals = {e.best_naive} | {'base'} & set(e.models)
    assert set(by_name) == {'crps', 'mase', 'cover_80', 'direction'} | {f'crps_skill_{o}' for o in rivals}
    for name, o in by_name.items():
        wanted = pooled.loc[name, ['value', 'low', 'high']] if name in pooled.index else \
            e.tests.loc[name.removeprefix('crps_skill_'), ['skill', 'low', 'high']]
        got = o.metric_value, o.metric_args['low'], o.metric_args['high']
        assert got == pytest.approx(tuple(wanted), abs=1e-6)
        assert o.dataset_split == 'test' and 'GOOG' in o.dataset_name and o.dataset_args['origins'] == e.n
    json.dumps(data.to_dict(), allow_nan=False)   # the hub keeps it as JSON
    assert data.model_name and str(run) not in str(data)


def test_a_repository_gives_its_name(run):
    repos = dict(tokenizer='me/goog-tokenizer', predictor='me/goog-predictor')
    assert read(run, repos=repos).model_name == 'goog-predictor'


def test_what_was_not_judged_claims_nothing(run, tmp_path):
    assert read(run, 'tokenizer').eval_results is None
    copy = shutil.copytree(run, tmp_path/'run')
    shutil.rmtree(copy/'evaluation')
    assert read(copy).eval_results is None and 'model-index' not in model_card(copy, 'predictor')


def test_rows_that_were_changed_are_not_quoted(run, tmp_path):
    copy = shutil.copytree(run, tmp_path/'run')
    file = copy/'evaluation'/'rows.parquet'
    file.write_bytes(file.read_bytes()[:-20] + b'0'*20)
    with pytest.raises(RunError, match='rows.parquet'):
        model_card(copy, 'predictor')
