"A stage that is trained and not finished, and whose best model was damaged"
import shutil

import pytest
import torch

from kronos_nb.core import RunError
from kronos_nb.train import fit
from kronos_nb.training.checkpoint import checkpoints
from tests.helpers import bars, cfg, equal, final, one_epoch


@pytest.mark.parametrize('how', ['cut', 'other weights', 'deleted'])
def test_a_best_model_that_is_damaged_is_trained_again_as_the_error_says(one_epoch_run, tmp_path, how):
    from safetensors.torch import load_file, save_file
    out = tmp_path/'run'
    shutil.copytree(one_epoch_run, out)
    stage, file = out/'tokenizer', out/'tokenizer'/'best_model'/'model.safetensors'
    for path in (stage/'final_model', stage/'averaged', out/'predictor'):
        shutil.rmtree(path, ignore_errors=True)
    (stage/'weights.json').unlink()
    if how == 'cut':
        file.write_bytes(file.read_bytes()[:500])
    elif how == 'deleted':
        file.unlink()
    else:
        (file.parent/'SHA256SUMS').unlink()
        weights = load_file(file)
        file.unlink()
        save_file({k: torch.zeros_like(v) for k, v in weights.items()}, file)
    only = cfg.replace(**one_epoch | {'runtime.only': 'tokenizer'})
    with pytest.raises(RunError, match='Delete the checkpoints from step') as e:
        fit(bars, only, out)
    step = int(str(e.value).partition('from step ')[2].split()[0])
    for p in checkpoints(stage/'checkpoints'):
        if int(p.name[5:]) >= step:
            shutil.rmtree(p)
    fit(bars, only, out)
    assert equal(final(out), final(one_epoch_run))
