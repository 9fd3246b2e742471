"Inputs that fuzzing found, fed to what they broke"
from pathlib import Path

import pytest

from tests.faults import fuzz

FINDS = sorted(p for p in (Path(__file__).parent/'finds').glob('*/*') if p.is_file())


@pytest.mark.parametrize('file', FINDS, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_a_find_ends_in_a_typed_error_or_is_read(file, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, 'FOLDER', tmp_path)
    fuzz.TARGETS[file.parent.name](file.read_bytes())


@pytest.mark.parametrize('target', fuzz.TARGETS)
def test_what_fuzzing_begins_with_is_read(target, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, 'FOLDER', tmp_path)
    for data in fuzz.seeds(target):
        fuzz.TARGETS[target](data)
