"Files of a run, in the cases that teach nothing: second fits, short logs, steps between rows"
import copy, json
import pytest, torch
from torch import nn
from kronos_nb.callback.monitor import LossPlot, Progress, RunFiles
from kronos_nb.learner import Callback, Learner, TensorSource
from kronos_nb.watch import read_history, read_lines

class Line(nn.Module):
    def __init__(self): super().__init__(); self.w, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    def forward(self, x, y): return dict(loss=((x*self.w + self.b - y)**2).mean())

x = torch.randn(100, generator=torch.Generator().manual_seed(0))
data = dict(x=x, y=3*x + 1)
def line(*callbacks, **kw):
    task = Line()
    return Learner(task, TensorSource(data, 16, seed=0), TensorSource(data, 50), torch.optim.SGD(task.parameters(), lr=.1), callbacks=callbacks, **kw)

class At(Callback):
    "Keep the state after `keep` steps, raise after `die`"
    def __init__(self, keep=None, die=None, order=0): self.keep, self.die, self.order = keep, die, order
    def after_step(self, learn):
        if learn.step == self.keep: self.state = copy.deepcopy(learn.state_dict())
        if learn.step == self.die: raise KeyboardInterrupt

def test_second_fit_appends(tmp_path):
    learn = line(RunFiles(tmp_path, 'predictor')).fit(1)
    learn.fit(2)
    log = (tmp_path/'logs/predictor.log').read_text()
    assert log.count('[Epoch 1/1, Step 1/7]') == 1 and log.count('[Epoch 2/2, Step 7/7] LR') == 1
    assert read_history(tmp_path/'predictor').steps == learn.history.steps

def test_new_run_in_an_old_folder_starts_anew(tmp_path):
    line(RunFiles(tmp_path, 'predictor')).fit(2)
    line(RunFiles(tmp_path, 'predictor')).fit(1)
    assert [o['step'] for o in read_lines(tmp_path/'predictor/steps.jsonl')] == list(range(1, 8))
    assert (tmp_path/'logs/predictor.log').read_text().count('start') == 1

@pytest.mark.parametrize('order', [0, 200])   # before and after the files have the row
@pytest.mark.parametrize('log_every', [1, 3])
def test_resume_leaves_no_row_twice(tmp_path, order, log_every):
    keep = At(keep=10, die=13, order=order)
    with pytest.raises(KeyboardInterrupt): line(keep, RunFiles(tmp_path, 'tokenizer'), log_every=log_every).fit(3)
    assert json.loads((tmp_path/'tokenizer/status.json').read_text())['state'] == 'interrupted'
    learn = line(RunFiles(tmp_path, 'tokenizer'), log_every=log_every)
    learn.load_state_dict(keep.state)
    learn.fit(3)
    whole = line(log_every=log_every).fit(3)
    h = read_history(tmp_path/'tokenizer')
    assert h.to_dict() == whole.history.to_dict()
    lines = [o for o in (tmp_path/'logs/tokenizer.log').read_text().splitlines() if 'LR' in o]
    assert len(lines) == len(set(lines)) == len(whole.history.steps)

def test_log_that_was_deleted_begins_again(tmp_path):
    keep = At(keep=5)
    line(keep, RunFiles(tmp_path, 'tokenizer')).fit(1)
    (tmp_path/'logs/tokenizer.log').unlink()
    learn = line(RunFiles(tmp_path, 'tokenizer'))
    learn.load_state_dict(keep.state)
    learn.fit(1)
    assert 'from step 5' in (tmp_path/'logs/tokenizer.log').read_text().splitlines()[0]

def test_every_callback_is_inert(tmp_path):
    bare = line().fit(2)
    watched = line(Progress('silent'), RunFiles(tmp_path, 'tokenizer'), LossPlot(tmp_path, 'tokenizer', every=5)).fit(2)
    assert all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), watched.model.parameters()))
