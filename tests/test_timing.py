"Threads and number format: decided by timings once in a run, kept with it, and left alone where somebody decided"
import json

import pytest
import torch

from kronos_nb import estimate, speed
from kronos_nb.core import RunError, threads
from kronos_nb.fitting import timing
from kronos_nb.fitting.timing import Work, pick, time_ways, workers_needed
from kronos_nb.machine import machine_for
from kronos_nb.training.learner import Callback
from kronos_nb.training.run import Run
from kronos_nb.train import fit
from tests.helpers import bars, cfg, final, four_steps, notes

FITTING = timing._fitting
FAST, SLOW = dict(fp32=10., bf16=4., medium=5.), dict(fp32=10., bf16=30., medium=10.)
mixed = cfg.replace(**four_steps, **{'runtime.precision': 'mixed', 'runtime.save_steps': 2, 'runtime.workers': 0})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "A cache folder that nobody has written, nothing in memory, and stages that are long enough to be timed"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('KRONOS_NB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(speed, '_tables', {})
    monkeypatch.setattr(timing, 'TIMES', 0)
    monkeypatch.setattr(timing, 'multiplies', lambda precision: True)
    monkeypatch.setattr(timing, '_fitting', lambda work: work)


def machine_says(monkeypatch, times) -> list:
    "Let timings come out as `times`; return the ways that were timed"
    asked = []
    def answer(work, ways):
        asked.append(list(ways))
        return {name: times[name] for name in ways}
    monkeypatch.setattr(timing, 'time_ways', answer)
    return asked


class Watch(Callback):
    "Note threads and autocast of the first step; stop after two steps where asked"
    def __init__(self, stop=False): self.stop, self.seen = stop, None
    def before_step(self, learn):
        self.seen = self.seen or (torch.get_num_threads(), learn.backend.precision)
    def after_step(self, learn):
        if self.stop and learn.step == 2:
            learn.stop('enough', interrupted=True)


def run(folder, settings=mixed, **kw) -> tuple:
    "Return what a run saw, and what run.json says of its tokenizer"
    watch = Watch(**kw)
    fit(bars, settings, folder, callbacks=[watch])
    return watch.seen, Run(folder).timed['tokenizer']


@pytest.mark.parametrize('times, precision', [(FAST, 'bf16'), (SLOW, 'fp32')])
def test_mixed_is_what_the_timing_finds(tmp_path, monkeypatch, times, precision):
    machine_says(monkeypatch, times)
    seen, kept = run(tmp_path/'run')
    assert seen[1] == precision == kept['precision']
    assert f'precision: {precision}' in notes(tmp_path/'run', 'machine')[0]['text']


def test_a_run_goes_on_with_what_it_began_with(tmp_path, monkeypatch):
    "On a machine that times otherwise, with the bits of a run that never stopped"
    machine_says(monkeypatch, FAST)
    run(tmp_path/'whole')
    run(tmp_path/'run', stop=True)
    asked = machine_says(monkeypatch, SLOW)
    seen, kept = run(tmp_path/'run')
    assert seen[1] == kept['precision'] == 'bf16' and not asked and len(notes(tmp_path/'run', 'machine')) == 1
    ours, theirs = final(tmp_path/'run'), final(tmp_path/'whole')
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_stage_that_began_without_timings_goes_on_by_the_rules(tmp_path, monkeypatch):
    "As a run of an earlier version"
    monkeypatch.setenv('KRONOS_NB_MEASURE', '0')
    run(tmp_path/'run', stop=True)
    facts = json.loads((tmp_path/'run'/'run.json').read_text())
    (tmp_path/'run'/'run.json').write_text(json.dumps({k: v for k, v in facts.items() if k != 'timed'}))
    monkeypatch.delenv('KRONOS_NB_MEASURE')
    asked = machine_says(monkeypatch, FAST)
    assert run(tmp_path/'run')[0][1] == 'fp32' and not asked


@pytest.mark.parametrize('off', ['switch', 'optimizations'])
def test_one_switch(tmp_path, monkeypatch, off):
    asked = machine_says(monkeypatch, FAST)
    if off == 'switch':
        monkeypatch.setenv('KRONOS_NB_MEASURE', '0')
    fit(bars, mixed.replace(**{'runtime.optimizations': off == 'switch'}), tmp_path/'run', callbacks=[watch := Watch()])
    assert watch.seen[1] == 'fp32' and not asked


def test_what_somebody_decided_is_not_timed(tmp_path, monkeypatch):
    asked = machine_says(monkeypatch, FAST)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    seen, kept = run(tmp_path/'run', cfg.replace(**four_steps))
    assert not asked and seen[1] == 'fp32' and set(kept.values()) == {None}


def test_threads_of_a_stage(tmp_path, monkeypatch):
    "Fewer threads where that is clearly faster, in the stage alone; all of them where it is not"
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr('kronos_nb.machine.cores', lambda: 2)
    with threads(2):
        asked = machine_says(monkeypatch, {'2 threads': 10., '1 threads': 6.})
        seen, kept = run(tmp_path/'one', cfg.replace(**four_steps))
        assert asked == [['2 threads', '1 threads']] and seen[0] == kept['threads'] == 1
        assert torch.get_num_threads() == 2
        machine_says(monkeypatch, {'2 threads': 10., '1 threads': 9.})
        seen, kept = run(tmp_path/'two', cfg.replace(**four_steps))
        assert seen[0] == kept['threads'] == 2
        assert run(tmp_path/'own', cfg.replace(**four_steps, **{'runtime.threads': 2}))[1]['threads'] is None


def test_a_short_stage_is_not_timed(tmp_path, monkeypatch):
    "It is trained in float32: what has not been timed has not been found faster"
    asked = machine_says(monkeypatch, FAST)
    monkeypatch.setattr(timing, 'TIMES', 20)
    assert run(tmp_path/'run')[0][1] == 'fp32' and not asked


def test_a_processor_without_bfloat16(tmp_path, monkeypatch):
    "Is never asked for it: one pass may take a minute there"
    monkeypatch.setattr(timing, 'multiplies', lambda precision: False)
    asked = machine_says(monkeypatch, FAST)
    assert run(tmp_path/'run')[0][1] == 'fp32' and not any('bf16' in ways for ways in asked)


def test_the_estimate_counts_in_the_format_of_the_run(monkeypatch):
    "And not in bfloat16 where the run would not train in it"
    seen = []
    cost = lambda stage, arch, window, device, precision, *rest: seen.append(precision) or estimate.Cost(1e-3, 1e3)
    monkeypatch.setattr(estimate, 'window_cost', cost)
    estimate.estimate(mixed, bars)
    assert set(seen) == {'fp32'}


@pytest.mark.parametrize('wrong', [
    [], {'tokenizer': 3}, {'tokenizer': dict(threads='two', precision=None, matmul=None)}])
def test_damage_is_an_error(tmp_path, monkeypatch, wrong):
    machine_says(monkeypatch, FAST)
    run(tmp_path/'run', stop=True)
    facts = json.loads((tmp_path/'run'/'run.json').read_text())
    (tmp_path/'run'/'run.json').write_text(json.dumps(facts | dict(timed=wrong)))
    with pytest.raises(RunError, match='run.json'):
        run(tmp_path/'run')


def test_times_are_taken_once_on_a_machine(monkeypatch):
    model = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4, n_layers=1, token_dropout_p=0., learn_te=True,
                 ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
    work = Work('predictor', json.dumps(model), 8, 2)
    ways = dict(fp32=(1, 'fp32', 'highest'), bf16=(1, 'bf16', 'highest'), medium=(1, 'fp32', 'medium'))
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    times = time_ways(work, ways)
    speed._tables.clear()
    monkeypatch.setattr(timing, 'shortest', None)
    assert times == time_ways(work, ways) and times.keys() == ways.keys() and min(times.values()) > 0
    assert before[:2] == (torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert torch.equal(before[2], torch.get_rng_state())


def test_matrix_precision_by_a_timing():
    r = cfg.replace(**{'runtime.matmul_precision': 'auto'}).runtime
    assert machine_for(r, device='cpu').matmul == 'highest'
    assert machine_for(r, device='cpu', timed=dict(matmul='medium')).matmul == 'medium'
    assert machine_for(cfg.runtime, device='cpu', timed=dict(matmul='medium', precision='bf16')).matmul == 'highest'


def test_the_usual_way_stays_unless_another_is_clearly_faster():
    assert pick({'a': 10, 'b': 9}, 'a') == 'a' and pick({'a': 10, 'b': 8}, 'a') == 'b' and pick({'a': 1}, 'a') == 'a'


@pytest.mark.parametrize('load, step, free, n', [(.001, .1, 3, 0), (.01, .1, 3, 1), (.25, .1, 3, 3), (.25, .1, 1, 1)])
def test_loader_processes_follow_the_time_of_a_batch(load, step, free, n):
    assert workers_needed(load, step, free) == n


def test_processes_that_share_the_cores_keep_no_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, 'processes', lambda: 2)
    _, kept = run(tmp_path/'run', stop=True)
    assert kept == dict(threads=None, precision='fp32', matmul=None)
    seen, _ = run(tmp_path/'run')   # and it can be read again
    assert seen[1] == 'fp32'
def test_on_a_busy_machine_threads_are_left_alone_and_nothing_is_kept(monkeypatch):
    model = dict(d_model=16, n_heads=2, ff_dim=32, s1_bits=4, s2_bits=4, n_layers=1, token_dropout_p=0., learn_te=True,
                 ffn_dropout_p=0., attn_dropout_p=0., resid_dropout_p=0.)
    work, ways = Work('predictor', json.dumps(model), 8, 2), {f'{n} threads': (n, 'fp32', 'highest') for n in (2, 1)}
    monkeypatch.setattr(timing, '_others_work', lambda f: True)
    assert time_ways(work, ways) == {}
    monkeypatch.setattr(timing, '_others_work', lambda f: False)
    assert set(time_ways(work, ways)) == set(ways)


def test_the_size_of_a_pass_does_not_depend_on_a_timing():
    work = Work('predictor', json.dumps(dict(cfg.predictor.model) | dict(token_dropout_p=0., learn_te=True)
                | dict.fromkeys(('ffn_dropout_p', 'attn_dropout_p', 'resid_dropout_p'), 0.)), 20, 512)
    assert 16 < FITTING(work).windows <= 512 and FITTING(work) == FITTING(work)
