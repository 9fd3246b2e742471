"""Teacher forcing against an s1 that the model samples: the same start, the same windows, real bars, the quickstart's size.

    OMP_NUM_THREADS=1 python benchmarks/teacher_forcing.py

The second token of a bar (s2) is conditioned on the first (s1). `forced` conditions it on the s1 that the bar has, `sampled` on one
drawn from the model's own distribution, which is how the reference's fine-tuning scripts train. Both models are judged in both ways.
"""
import argparse, copy, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from kronos_nb.callback.train import Clip, Schedule, adamw
from kronos_nb.config import Config
from kronos_nb.learner import Learner
from kronos_nb.task import PredictorTask, TokenizerTask, TokenSource, WindowSource, build_model, encode_windows
from kronos_nb.train import prepare

class Task(PredictorTask):
    "Trains one way; in validation it reports s2 given the true s1, and given a sampled one"
    def __init__(self, model, sampled): super().__init__(model); self.sampled = sampled
    def forward(self, s1, s2, stamp):
        s1, s2 = s1.long(), s2.long()
        if self.training: return self.model.loss(s1, s2, stamp, sample_s1=self.sampled)
        forced, drawn = self.model.loss(s1, s2, stamp), self.model.loss(s1, s2, stamp, sample_s1=True)
        return forced | dict(ce_s2_sampled=drawn['ce_s2'])

def frequencies(train, val, bits):
    "Cross-entropy of knowing nothing but how often each token occurs"
    out = {}
    for i, name in enumerate(('ce_s1', 'ce_s2')):
        p = np.bincount(train[..., i].ravel(), minlength=2**bits[i]) + 1.
        out[name] = float(-np.log(p/p.sum())[val[:, 1:, i].ravel()].mean())
    return out

def main():
    a = argparse.ArgumentParser()
    a.add_argument('--seeds', type=int, default=3)
    a.add_argument('--epochs', type=int, default=8)
    a.add_argument('--symbols', nargs='+', default=['GOOG'], help='of the bundled daily bars')
    a = a.parse_args()
    cfg = Config.preset('quickstart', **{'data.symbols': tuple(a.symbols)})
    data, rows = prepare('sample', cfg), []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); {data.train}; {len(data.val):,} validation windows", flush=True)
    torch.manual_seed(0)
    tok = TokenizerTask(build_model('tokenizer', 'scratch', 'tiny'))
    Learner(tok, WindowSource(data.train, 64, seed=0), None, adamw(tok, 2e-3), callbacks=[Schedule('onecycle', .1), Clip(2.)]).fit(4)
    train, val = encode_windows(tok.model, data.train), encode_windows(tok.model, data.val)
    rows.append(dict(seed='', s1='frequencies', epoch=0, step=0) | frequencies(train, val, (7, 7)))
    print(rows[-1], flush=True)
    for seed in range(a.seeds):
        torch.manual_seed(seed)
        start = build_model('predictor', 'scratch', 'tiny')
        for name in ('forced', 'sampled'):
            task, began = Task(copy.deepcopy(start), name == 'sampled'), time.time()
            learn = Learner(task, TokenSource(data.train, train, 64, seed=seed), TokenSource(data.val, val, 64, mode='sequential'), adamw(task, 2e-3, weight_decay=.05),
                callbacks=[Schedule('onecycle', .1), Clip(3.)], seed=seed, log_every=50).fit(a.epochs)
            rows += [dict(seed=seed, s1=name, epoch=v['epoch'], step=v['step'], ce_s1=v['val_ce_s1'], ce_s2=v['val_ce_s2'], ce_s2_sampled=v['val_ce_s2_sampled']) for v in learn.history.validations]
            print(f"seed {seed}, {name}: {rows[-1]}, {time.time()-began:.0f} s", flush=True)
    df = pd.DataFrame(rows)
    print('\nValidation cross-entropy per token level (nats), by epoch, mean of the seeds:')
    print(df[df.s1 != 'frequencies'].pivot_table(index='epoch', columns='s1', values=['ce_s1', 'ce_s2', 'ce_s2_sampled']).round(3).to_string())
    last = df[df.epoch.isin((0, a.epochs))]
    print(f'\nAfter {a.epochs} epochs:')
    print(last.drop(columns=['epoch', 'step']).round(4).to_string(index=False))
    print(last.groupby('s1', sort=False)[['ce_s1', 'ce_s2', 'ce_s2_sampled']].agg(['mean', 'std']).round(4).to_string())

if __name__ == '__main__': main()
