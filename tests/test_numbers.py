"A change of form changes no number: a quickstart with a base of its own gives what it gave when it was stored"
import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch

STORED = json.loads((Path(__file__).parent/'golden'/'quickstart.json').read_text())


def processor() -> str:
    "Return the name of the processor with its family and model, which the name alone may hide"
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        return platform.processor()
    rows = dict([o.strip() for o in line.split(':', 1)] for line in text.split('\n\n')[0].splitlines() if ':' in line)
    return f"{rows.get('model name')}, family {rows.get('cpu family')}, model {rows.get('model')}"


def here() -> dict:
    "Return what the last bits of a result depend on"
    def found(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    libraries = {o: found(o) for o in ('torch', 'numpy', 'numba')}
    return dict(processor=processor(), capability=torch.backends.cpu.get_cpu_capability(), **libraries)


def losses(run: Path) -> dict:
    "Return every loss of every epoch, by stage"
    found = {}
    for path in sorted(run.rglob('training_metrics.json')):
        metrics = json.loads(path.read_text())
        found[path.parent.relative_to(run).as_posix()] = {k: v for k, v in metrics.items() if 'loss' in k}
    return found


def test_losses_of_every_epoch(quickstart):
    "Bit by bit where processor and libraries are those of the stored run, within 3 % elsewhere"
    got, exact = losses(quickstart), here() == STORED['made_on']
    assert got.keys() == STORED['losses'].keys()
    for stage, metrics in STORED['losses'].items():
        for name, values in metrics.items():
            if exact:
                assert got[stage][name] == values, f'{stage} {name}'
            else:
                np.testing.assert_allclose(got[stage][name], values, rtol=.03, atol=.01, err_msg=f'{stage} {name}')


def test_weights_and_paths(quickstart):
    "The weights that were kept, and a forecast at a fixed seed"
    if here() != STORED['made_on']:
        pytest.skip(f"last bits are compared on {STORED['made_on']}, and this is {here()}")
    for stage, digest in STORED['weights'].items():
        file = quickstart/stage/'best_model'/'model.safetensors'
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest, stage
    paths = np.load(quickstart/'paths.npy')
    np.testing.assert_array_equal(paths[:3, :, 3], STORED['closes'])
    assert hashlib.sha256(np.ascontiguousarray(paths).tobytes()).hexdigest() == STORED['paths']
