"The loss of a tokenizer may count errors in the moves between bars"
import pytest
import torch

from kronos_nb.config import Config
from kronos_nb.core import ConfigError
from kronos_nb.data.read import sample_klines
from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.train import fit
from kronos_nb.training.task import TINY, TokenizerTask

WEIGHT = 4.


def tokenizer():
    torch.manual_seed(0)
    return KronosTokenizer(**TINY['tokenizer']).eval()


def bars():
    return torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(1))


def test_the_loss_adds_the_squared_errors_of_moves_of_prices():
    model, x = tokenizer(), bars()
    (coarse, full), *_ = model(x)
    def error(z): return ((z - x)[:, 1:, :4] - (z - x)[:, :-1, :4]).square().mean()
    more = WEIGHT*(error(coarse) + error(full))/2
    torch.testing.assert_close(TokenizerTask(model, WEIGHT)(x)['loss'], TokenizerTask(model)(x)['loss'] + more)


def test_a_single_bar_has_no_moves():
    model, x = tokenizer(), bars()[:, :1]
    assert torch.equal(TokenizerTask(model, WEIGHT)(x)['loss'], TokenizerTask(model)(x)['loss'])


@pytest.mark.parametrize('weight', [-1., float('nan'), 'much'])
def test_weights_that_cannot_be(weight):
    with pytest.raises(ConfigError, match='difference_weight'):
        Config().replace(**{'tokenizer.difference_weight': weight})


def test_a_run_trains_with_it_and_says_so(tmp_path):
    cfg = Config().replace(**{
        'data.lookback_window': 16, 'data.predict_window': 4, 'runtime.only': 'tokenizer', 'runtime.plots': False,
        'runtime.progress': False, 'runtime.device': 'cpu', 'runtime.threads': 1, 'tokenizer.size': 'tiny',
        'tokenizer.max_steps': 3, 'tokenizer.batch_size': 4, 'data.val_windows': 16, 'predictor.size': 'tiny'})
    data = sample_klines('GOOG').iloc[:300]
    for weight in (0., WEIGHT):
        fit(data, cfg.replace(**{'tokenizer.difference_weight': weight}), tmp_path/str(weight), judge=False)
    assert Config.load(tmp_path/str(WEIGHT)/'config.yaml').tokenizer.difference_weight == WEIGHT
    weights = [(tmp_path/str(w)/'tokenizer'/'final_model'/'model.safetensors').read_bytes() for w in (0., WEIGHT)]
    assert weights[0] != weights[1]
