"""A small run for the tests of several processes, under any launcher: python, torchrun, accelerate launch, Ray.

    accelerate launch --multi_gpu --num_processes 2 tests/scaling_run.py OUT
"""
import json, os, sys
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from safetensors.torch import save_file
from kronos_nb.config import Config
from kronos_nb.data.kline import sample_klines
from kronos_nb.learner import Callback
from kronos_nb.model import kernels
from kronos_nb.train import fit

class Ranks(Callback):
    "Keeps what each process has at the end of a stage, for comparing them"
    order = 200
    def __init__(self, out): self.out = Path(out)
    def after_fit(self, learn):
        name, rank = type(learn.model).__name__.removesuffix('Task').lower(), learn.engine.rank
        self.out.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in learn.model.model.state_dict().items()}, self.out/f'{name}_{rank}_of_{learn.engine.world}.safetensors')
        (self.out/f'{name}_{rank}_of_{learn.engine.world}.json').write_text(json.dumps(dict(step=learn.step, stop=learn.stop_reason)))

def main(out, changes='{}'):
    torch.set_num_threads(n := int(os.environ.get('WORKERS', 1)))
    used, real = [], kernels.side_by_side
    if n > 1: kernels.PIECE, kernels.LEAST, kernels.side_by_side = 3*20*16, 1, lambda f, k: used.append(k) or real(f, k)   # even these batches are worth several
    from tests.test_train import bars, cfg, no_test
    fit(bars, cfg.replace(**no_test, **json.loads(changes)), out, callbacks=[Ranks(Path(out).with_name(Path(out).name + '_ranks'))])
    assert set(used) == ({n} if n > 1 else set())

if __name__ == '__main__': main(*sys.argv[1:])
