"""A small run in processes of its own, under any launcher: python, torchrun, accelerate launch.

    accelerate launch --multi_gpu --num_processes 2 tests/scaling_run.py OUT ['{"tokenizer.lr": 1e-3}']

WORKERS=n lets n threads of a process share a batch. HOLD='TokenizerTask 6' waits after step 6 of that stage.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronos_nb.kernels import parallel
from kronos_nb.train import fit
from kronos_nb.training.learner import Callback
from tests.helpers import bars, cfg, no_test


class KeepRanks(Callback):
    "Write what each process has at the end of a stage, to compare them"
    order = 200

    def __init__(self, out):
        self.out = Path(f'{out}_ranks')

    def after_fit(self, learn):
        stage = type(learn.model).__name__.removesuffix('Task').lower()
        file = self.out/f'{stage}_{learn.backend.rank}_of_{learn.backend.world}.safetensors'
        self.out.mkdir(parents=True, exist_ok=True)
        state = learn.model.model.state_dict()
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, file)
        file.with_suffix('.json').write_text(json.dumps(dict(step=learn.step, stop=learn.stop_reason)))


class Hold(Callback):
    "Wait after a step until the process is killed or told to stop: the test decides when, not the machine"
    def __init__(self, out):
        self.mark, self.at = Path(f'{out}.held'), os.environ.get('HOLD')

    def after_step(self, learn):
        if f'{type(learn.model).__name__} {learn.step}' != self.at:
            return
        self.mark.touch()
        while not learn.interrupted:
            time.sleep(.01)


def share_batches(n) -> list:
    "Let `n` threads share even these small batches; return a list that records each time they do"
    used, real = [], parallel.side_by_side
    parallel.PIECE, parallel.MIN_PIECE = 3*20*16, 1
    parallel.side_by_side = lambda f, k: used.append(k) or real(f, k)
    return used


def main(out, changes='{}'):
    n = int(os.environ.get('WORKERS', 1))
    torch.set_num_threads(n)
    used = share_batches(n) if n > 1 else None
    fit(bars, cfg.replace(**no_test, **json.loads(changes)), out, callbacks=[KeepRanks(out), Hold(out)])
    assert used is None or set(used) == {n}


if __name__ == '__main__':
    main(*sys.argv[1:])
