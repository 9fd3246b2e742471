"What one origin, or dates that all share bars, can show: nothing, and the words say so"
import numpy as np
import pytest

from kronos_nb.judging.baselines import Drift, GeometricBrownian, LastValue, random_walks
from kronos_nb.judging.evaluation import skill
from kronos_nb.ledger import Ledger


@pytest.mark.parametrize('n, overlap', [(1, 0), (3, 5), (5, 2)])
def test_fewer_than_two_blocks_detect_nothing(n, overlap):
    rng = np.random.default_rng(0)
    found = skill(rng.random(n), rng.random(n), overlap)
    assert np.isnan(found['low']) and np.isinf(found['detectable']) and np.isinf(found['needed'])
    enough = skill(rng.random(20), rng.random(20), 2)
    assert 0 < enough['detectable'] < np.inf


def test_the_words(tmp_path):
    "A ledger reports from its first grade on"
    walk, ledger = random_walks(60, seed=5), Ledger(tmp_path)
    ledger.append(GeometricBrownian().predict_many([walk[:40]], 4, futures=[walk.timestamps[40:44]], paths=20), 'gbm')
    ledger.grade(walk, [LastValue(), Drift()])
    report = ledger.report()
    text = report.to_markdown()
    assert report.evaluation.n == 1 and 'not detectable' in text
    assert not [o for o in ('unknown to unknown', 'nan', 'difference of unknown') if o in text.replace('Finance', '')]
