"A configuration in the reference's words: each key is renamed, left out for a reason, or an error; none is lost"
import pytest, yaml
from kronos_nb.config import FOREIGN, LEFT, RENAMED, Config, translate
from kronos_nb.core import ConfigError

def theirs(**groups):
    d = yaml.safe_load("""
    data: {data_path: bars.csv, lookback_window: 256, predict_window: 1, max_context: 512, clip: 5.0, train_ratio: 0.8, val_ratio: 0.1, test_ratio: 0.1}
    training: {tokenizer_epochs: 20, basemodel_epochs: 15, batch_size: 32, log_interval: 50, num_workers: 6, seed: 42, tokenizer_learning_rate: 2e-4, adam_beta1: 0.9}
    model_paths: {pretrained_tokenizer: tok, pretrained_predictor: pred, exp_name: mine, base_path: out, base_save_path: "", finetuned_tokenizer: ""}
    experiment: {name: a, description: b, use_comet: false, train_tokenizer: true, train_basemodel: true, skip_existing: false}
    device: {use_cuda: true, device_id: 0}
    """)
    for g, part in groups.items(): d[g] = (d.get(g) or {}) | part if isinstance(part, dict) else part
    return d

def load(said=None, **groups): return Config.load(theirs(**groups), report=(lambda line: None) if said is None else said.append)

@pytest.mark.parametrize('group, key, meant', [
    ('data', 'lookback_windw', 'lookback_window'), ('data', 'train_raito', 'train_ratio'), ('training', 'basemodle_epochs', 'basemodel_epochs'), ('training', 'batchsize', 'batch_size'),
    ('model_paths', 'pretrained_predicter', 'pretrained_predictor'), ('model_paths', 'exp_nam', 'exp_name'), ('experiment', 'train_base_model', 'train_basemodel'),
    ('experiment', 'pretrained_tokenizer', 'pre_trained_tokenizer'), ('device', 'use_cude', 'use_cuda'), ('distributed', 'use_dpp', 'use_ddp'), ('predictor', 'lrr', 'lr')])
def test_a_misspelt_key_is_an_error(group, key, meant):
    "It names the key, what was probably meant, and what to do"
    with pytest.raises(ConfigError) as e: load(**{group: {key: 1}})
    said = str(e.value)
    assert key in said and f"did you mean '{meant}'" in said and group in said and ('take it out' in said or 'there are' in said)

def test_a_misspelt_group_is_an_error():
    with pytest.raises(ConfigError, match="'trainig'.*did you mean 'training'"): load(trainig={'batch_size': 8})
    with pytest.raises(ConfigError, match="'expriment'.*did you mean 'experiment'"): load(expriment=3)

@pytest.mark.parametrize('key', sorted(LEFT))
def test_what_has_no_counterpart_is_said_with_its_reason(key):
    group, _, name = key.partition('.')
    said = []
    load(said, **{group: {name: 'x'}})
    assert (line := next(l for l in said if l.startswith(f'{key} -> left out: '))) and len(line) > len(key)+25

def test_every_key_is_reported_once():
    "Renamed, left out with its reason, or ours as it is"
    said, d = [], theirs()
    Config.load(d, report=said.append)
    told = [k for l in said for k in l.split(' -> ')[0].split(', ')]
    for g, part in d.items():
        for k in part:
            if f'{g}.{k}' not in Config().flat() and not k.startswith('train_'): assert told.count(f'{g}.{k}')==1, k

def test_the_more_special_key_wins_in_any_order():
    assert load(training=dict(epochs=3)).tokenizer.epochs==20
    d = theirs(); d['training'] = dict(basemodel_epochs=2, epochs=3)
    assert [(c := Config.load(d, report=lambda l: None)).tokenizer.epochs, c.predictor.epochs]==[3, 2]
    c = load(experiment=dict(pre_trained=False, pre_trained_predictor=True))
    assert (c.tokenizer.init, c.predictor.init)==('scratch', 'pred')
    d = theirs(); d = dict(experiment=d['experiment'] | dict(pre_trained=False)) | {k: v for k, v in d.items() if k!='experiment'}
    assert (c := Config.load(d, report=lambda l: None)).tokenizer.init==c.predictor.init=='scratch'

def test_switches_mean_what_they_mean_there():
    assert load(experiment=dict(train_tokenizer='no')).runtime.only=='predictor' and load(experiment=dict(train_basemodel=0)).runtime.only=='tokenizer'
    with pytest.raises(ConfigError, match='train_tokenizer and experiment.train_basemodel are both off'): load(experiment=dict(train_tokenizer=False, train_basemodel=False))
    with pytest.raises(ConfigError, match='experiment.train_tokenizer must be of type bool'): load(experiment=dict(train_tokenizer='maybe'))
    assert load(model_paths=dict(finetuned_tokenizer='out/{exp_name}/tokenizer/best_model')).predictor.tokenizer=='out/mine/tokenizer/best_model'
    assert load(device=dict(device_id=1)).runtime.device=='cuda:1' and load(device=dict(use_cuda=False)).runtime.device=='cpu'

def test_ours_beside_theirs():
    "A preset and settings of ours may stand in the same file"
    c = Config.load(dict(preset='kaggle_stock', training=dict(batch_size=8), predictor=dict(lr=1e-5)) | {'tokenizer.lr': 1e-3}, report=lambda l: None)
    assert (c.data.lookback_window, c.tokenizer.batch_size, c.predictor.lr, c.tokenizer.lr)==(256, 8, 1e-5, 1e-3)
    assert Config.load(dict(training=None, data=dict(data_path='a.csv')), report=lambda l: None).data.source==('a.csv',)

def test_every_name_that_is_kept_exists():
    assert {k for v in RENAMED.values() for k in v} <= set(Config().flat()) and {k.partition('.')[0] for k in LEFT} <= set(FOREIGN)
    assert translate({})==({}, [])
