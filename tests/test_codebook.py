"Codebook use is counted where the validation computes it: one pass of the windows, the same numbers"
import pytest
import torch

from kronos_nb.model.tokenizer import KronosTokenizer
from kronos_nb.training import monitor
from kronos_nb.training.learner import Learner, TensorSource
from kronos_nb.training.monitor import Codebook
from kronos_nb.training.task import TokenizerTask

walks = torch.randn(130, 12, 6, generator=torch.Generator().manual_seed(1)).cumsum(1)/4


def learner(**kw) -> Learner:
    torch.manual_seed(0)
    size = dict(d_in=6, d_model=16, n_heads=2, ff_dim=32, n_enc_layers=2, n_dec_layers=2, s1_bits=4, s2_bits=4,
                beta=.05, gamma0=1., gamma=1.1, zeta=.05, group_size=4)
    still = dict(ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
    task = TokenizerTask(KronosTokenizer(**size, **still))
    sources = TensorSource(dict(x=walks), 40, seed=0), TensorSource(dict(x=walks), 40)
    return Learner(task, *sources, torch.optim.AdamW(task.parameters(), lr=3e-3), **kw)


def passes(learn) -> list:
    "Count how many windows go through the encoder without a gradient"
    seen = []
    def count(module, inputs, out):
        if not out.requires_grad:
            seen.append(len(inputs[0]))
    learn.model.model.embed.register_forward_hook(count)
    return seen


def fit(windows=60, **kw):
    learn = learner(callbacks=[Codebook(windows=windows)], **kw)
    seen = passes(learn)
    learn.fit(2)
    return [{k: v for k, v in row.items() if k.startswith('val_')} for row in learn.history.validations], seen


@pytest.mark.parametrize('windows', [30, 60, 512])   # less than a batch, batches and a part, all
def test_the_same_numbers_in_one_pass(monkeypatch, windows):
    once, seen = fit(windows)
    monkeypatch.setattr(monitor, '_can_watch', lambda learn: False)
    twice, more = fit(windows)
    assert once == twice and 'val_s1_perplexity' in once[0] and 'val_mse_close' in once[0]
    assert sum(seen) == 2*len(walks) and sum(more) > sum(seen)


def test_what_a_validation_in_pieces_gives_is_measured_again(monkeypatch):
    "Memory ran out in the middle of a batch: its first windows were counted already"
    whole, _ = fit(512)
    real, failed = KronosTokenizer.loss, []
    def loss(self, x, watch=None, *weights):
        out = real(self, x, watch, *weights)
        if not torch.is_grad_enabled() and not failed:
            failed.append(1)
            raise MemoryError
        return out
    monkeypatch.setattr(KronosTokenizer, 'loss', loss)
    pieces, _ = fit(512)
    assert failed and pieces[0]['val_s1_used'] == whole[0]['val_s1_used']
    assert pieces[0]['val_s2_perplexity'] == pytest.approx(whole[0]['val_s2_perplexity'])


def test_a_monitor_with_a_tokenizer_of_its_own_measures_with_that():
    learn = learner(callbacks=[Codebook(learner().model.model)])
    learn.fit(1)
    assert learn.history.validations[0]['val_s1_used'] > 0 and learn.model.watch is None
