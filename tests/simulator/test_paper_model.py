"""The paper's own model: its rules one by one, a simulation prompt by prompt beside it, and the evidence from it."""

import json
import math
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from scheduler.model.fluid import batch_memory_tokens, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.varying_rates import Stretch
from scheduler.model.wait_thresholds import NestedWaitSolution, nested_wait_thresholds, wait_thresholds
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from simulator.paper_model import (
    PaperFcfs,
    PaperModel,
    PaperNestedWait,
    PaperNestedWaitByTotals,
    PaperRun,
    PaperWait,
    PerIteration,
    SteppedArrivals,
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence" / "theory.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
TIME_MODEL = IterationTimeModel(1 / 4, 1 / 16)
ONE_TYPE = WorkloadMix.from_lengths(Lengths.point(1, 1), 4.0)
LONGER = WorkloadMix.from_lengths(Lengths.point(2, 3), 3.0)
TWO_TYPES = WorkloadMix((RequestType("a", 4.0, Lengths.point(1, 1)), RequestType("b", 2.0, Lengths.point(2, 3))))
TWO_TYPES_LAW = IterationTimeModel(3 / 8, 1 / 64)
UNKNOWN = WorkloadMix.from_lengths(Lengths(np.array([4, 4, 4]), np.array([2, 4, 8]), np.array([0.3, 0.3, 0.4])), 20.0)
UNKNOWN_LAW = IterationTimeModel(1 / 4, 1 / 4800)
NESTED = PaperNestedWait((2, 4, 8), (7, 6, 4))


class Watched:
    """A policy, and what it was shown and chose."""

    def __init__(self, policy):
        self.policy, self.seen = policy, []

    def batch(self, counts):
        batch = self.policy.batch(counts)
        self.seen.append((counts.copy(), batch))
        return batch


class Scripted:
    """Arrivals of one type in one row: the next of `counts` with every iteration, and one after a second of idling."""

    def __init__(self, counts):
        self.counts = iter(counts)

    def during(self, seconds):
        return np.array([[next(self.counts) if seconds[0] > 0 else 0]])

    def following(self):
        return np.ones(1), np.zeros(1, dtype=np.int64)


def first_come_first_served(prompt, output, capacity, script, steps):
    """Prompt by prompt: per step (waiting, running, completed so far, evicted so far) after its arrivals."""
    waiting, request, completed, evicted, number = [], [], 0, 0, 0
    script = iter(script)
    for _ in range(steps):
        while sum(prompt + stage for _, stage in request) > capacity:
            waiting.insert(0, request.pop()[0])
            evicted += 1
        while waiting and sum(prompt + stage for _, stage in request) + prompt <= capacity:
            request.append((waiting.pop(0), 0))
        assert [name for name, _ in request] == sorted(name for name, _ in request)
        arriving = next(script) if request else 1
        completed += sum(stage == output for _, stage in request)
        request = [(name, stage + 1) for name, stage in request if stage < output]
        waiting += range(number, number + arriving)
        number += arriving
        yield len(waiting), len(request), completed, evicted


@pytest.mark.parametrize(("prompt", "output", "capacity", "mean"), [(1, 1, 12, 4), (2, 3, 40, 3), (3, 5, 61, 2)])
def test_fcfs_is_what_a_simulation_prompt_by_prompt_does(prompt, output, capacity, mean):
    script = np.random.default_rng(1).poisson(mean, 400).tolist()
    model = PaperModel(WorkloadMix.from_lengths(Lengths.point(prompt, output), 1.0), TIME_MODEL)
    run = PaperRun(model, PaperFcfs(), seed=0, capacity_tokens=capacity, arrivals=Scripted(script))
    for expected in first_come_first_served(prompt, output, capacity, script, 400):
        run.step()
        found = run.counts[0, 0, 0], run.counts[0, 0, 1:].sum(), run.completed[0, 0], run.evicted[0]
        assert found == expected
    assert run.evicted[0] > 100


def two_types_in_order(script, steps):
    """The paper's two-type instance prompt by prompt, evicted prompts first in line: completed tokens and evictions."""
    waiting, request, tokens, evicted = deque(), [], 0, 0
    for arriving in script[:steps]:
        while sum(1 + stage for _, stage in request) > 9:
            waiting.appendleft(request.pop()[0])
            evicted += 1
        while waiting and sum(1 + stage for _, stage in request) + 1 <= 9:
            request.append((waiting.popleft(), 0))
        tokens += sum(output for output, stage in request if stage == output)
        request = [(output, stage + 1) for output, stage in request if stage < output]
        waiting.extend(arriving)
    return tokens / steps, evicted / steps


@pytest.mark.slow
def test_fcfs_of_two_types_is_close_to_a_simulation_prompt_by_prompt():
    rng = np.random.default_rng(3)
    script = [rng.permutation([1] * rng.poisson(1) + [2] * rng.poisson(1)).tolist() for _ in range(4000)]
    tokens, evicted = two_types_in_order(script, 4000)
    mix = WorkloadMix((RequestType("a", 1.0, Lengths.point(1, 1)), RequestType("b", 1.0, Lengths.point(1, 2))))
    time_model = IterationTimeModel(7 / 16, 1 / 16)
    assert solve_fluid(mix, time_model, 9).memory_tokens == 9
    run = PaperRun(PaperModel(mix, time_model), PaperFcfs(), seed=0, rows=10, capacity_tokens=9)
    while run.iterations.min() < 4000:
        run.step()
    # Restarts first in line or in random order: they keep what is offered only in part, and about the same part.
    assert tokens < 2.8
    assert run.output_tokens.sum() / run.iterations.sum() == pytest.approx(tokens, rel=0.05)
    assert run.evicted.sum() / run.iterations.sum() == pytest.approx(evicted, rel=0.15)


def test_prompt_seconds_are_latency_by_little_s_law():
    """Prompts that come one by one into an idle system: no wait, then l' + 1 iterations of known times."""
    model = PaperModel(LONGER, TIME_MODEL)
    run = PaperRun(model, PaperFcfs(), seed=0, arrivals=Scripted([0] * 400))
    for _ in range(101):
        run.step()
    assert run.completed[0, 0] == 20
    stages = [float(TIME_MODEL.iteration_s(0, 0, 2 + stage)) for stage in range(4)]
    assert run.prompt_s[0, 0] / 20 == pytest.approx(stages, rel=0.06)
    assert run.prompt_s.sum() / run.completed.sum() == pytest.approx(sum(stages), rel=0.06)


def worked_case(policy):
    start, model = np.array([[6, 3]]), PaperModel(ONE_TYPE, TIME_MODEL)
    return PaperRun(model, policy, seed=0, capacity_tokens=12, arrivals=PerIteration((4,)), start=start)


def completions(run, iterations):
    counted = [0]
    for _ in range(iterations):
        run.step()
        counted.append(int(run.completed[0, 0]))
    return np.diff(counted).tolist()


def test_worked_case():
    fcfs, wait = worked_case(PaperFcfs()), worked_case(PaperWait((4,)))
    assert completions(fcfs, 12) == [3, 6] + [0, 6] * 5
    assert fcfs.evicted[0] == 2 + 4 + 6 * 3
    assert completions(wait, 12) == [3] + [4] * 11
    assert wait.evicted[0] == 0
    assert (
        wait.clock_s[0]
        == TIME_MODEL.iteration_s(0, 0, 4 + 6) + 11 * solve_fluid(ONE_TYPE, TIME_MODEL, 12).iteration_time_s
    )


RUNS = {
    "fcfs": (LONGER, TIME_MODEL, PaperFcfs(), 40),
    "fcfs, two types": (TWO_TYPES, TWO_TYPES_LAW, PaperFcfs(), 40),
    "wait": (TWO_TYPES, TWO_TYPES_LAW, PaperWait((4, 2)), 40),
    "nested wait, ample": (UNKNOWN, UNKNOWN_LAW, NESTED, math.inf),
    "nested wait, too little memory": (UNKNOWN, UNKNOWN_LAW, NESTED, 363),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_request_is_lost_and_memory_is_kept(name):
    mix, time_model, policy, capacity = RUNS[name]
    watched, model = Watched(policy), PaperModel(mix, time_model)
    run = PaperRun(model, watched, seed=3, rows=20, capacity_tokens=capacity)
    run.run(60.0)
    assert np.array_equal(run.arrived, run.completed + run.counts.sum(axis=2))
    assert run.completed.min() > 0
    assert np.all(run.clock_s == 60.0)
    for counts, batch in watched.seen:
        assert counts.min() >= 0
        assert batch.min() >= 0
        assert np.all(batch <= counts)
        # Held prompts count as much as processed ones; newcomers hold their prompt.
        used = (counts[:, :, 1:] * model.tokens[:, 1:]).sum(axis=(1, 2)) + batch[:, :, 0] @ model.prompt_tokens
        assert np.all(used <= capacity)
    assert run.peak_tokens.max() <= capacity
    assert (run.evicted.sum() > 0) == (name in ("fcfs", "fcfs, two types", "nested wait, too little memory"))
    assert run.arrived.sum(axis=0) == pytest.approx(20 * 60 * model.rates_rps, rel=0.06)


def test_wait_runs_a_type_only_when_enough_wait_and_takes_no_more_per_stage():
    counts = np.random.default_rng(0).integers(0, 8, (500, 2, 4))
    n = (5, 2)
    for held, batch in zip(counts, PaperWait(n).batch(counts), strict=True):
        for j in range(2):
            assert batch[j].tolist() == ([min(n[j], k) for k in held[j]] if held[j, 0] >= n[j] else [0] * 4)


def test_wait_idles_until_the_threshold_and_holds_what_is_resident():
    model = PaperModel(ONE_TYPE, TIME_MODEL)
    run = PaperRun(model, PaperWait((5,)), seed=1, start=np.array([[0, 3]]))
    for arrived in range(1, 6):
        run.step()
        assert run.counts[0, 0].tolist() == [arrived, 3]
        assert run.iterations[0] == 0
    run.step()
    assert run.iterations[0] == 1
    assert run.completed[0, 0] == 3
    assert run.counts[0, 0, 1] == 5


def test_nested_wait_runs_a_prefix_of_segments():
    boundaries, n = (2, 3, 6), (6, 4, 2)
    counts = np.random.default_rng(0).integers(0, 10, (500, 1, 7))
    seen = set()
    for held, batch in zip(counts[:, 0], PaperNestedWait(boundaries, n).batch(counts)[:, 0], strict=True):
        running = 0
        for first, threshold in zip((0, 3, 4), n, strict=True):
            if held[first] < threshold:
                break
            running += 1
        segment = [0, 0, 0, 1, 2, 2, 2]
        assert batch.tolist() == [min(n[k], q) if k < running else 0 for k, q in zip(segment, held, strict=True)]
        seen.add(running)
    assert seen == {0, 1, 2, 3}


def test_lengths_come_out_as_they_went_in():
    run = PaperRun(PaperModel(UNKNOWN, UNKNOWN_LAW), NESTED, seed=0, rows=50)
    run.run(200.0)
    mean = run.output_tokens.sum() / run.completed.sum()
    # At the horizon long answers are still under way a little more often than short ones.
    assert mean == pytest.approx(UNKNOWN.types[0].lengths.mean_output_tokens, rel=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_same_seed_same_run(name):
    mix, time_model, policy, capacity = RUNS[name]
    runs = [PaperRun(PaperModel(mix, time_model), policy, seed=s, rows=5, capacity_tokens=capacity) for s in (1, 1, 2)]
    for run in runs:
        run.run(30.0)
    assert np.array_equal(runs[0].counts, runs[1].counts)
    assert np.array_equal(runs[0].arrived, runs[1].arrived)
    assert not np.array_equal(runs[0].arrived, runs[2].arrived)


@pytest.mark.parametrize(
    ("mix", "time_model", "capacity"), [(ONE_TYPE, TIME_MODEL, 15), (TWO_TYPES, TWO_TYPES_LAW, 60)]
)
def test_wait_never_needs_more_than_its_memory(mix, time_model, capacity):
    """From empty, no stage ever holds more than n_j, so that M(n) <= C rules evictions out, held types included."""
    solution = wait_thresholds(mix, time_model, capacity)
    watched = Watched(PaperWait(solution.n))
    run = PaperRun(PaperModel(mix, time_model), watched, seed=5, rows=50, capacity_tokens=capacity)
    run.run(200.0)
    assert run.evicted.sum() == 0
    assert run.peak_tokens.max() == batch_memory_tokens(solution.n, mix) <= capacity
    assert all(np.all(counts[:, :, 1:] <= np.array(solution.n)[:, None]) for counts, _ in watched.seen)


def test_wait_with_slack_delivers_the_fluid_throughput_and_fcfs_does_not():
    fluid = solve_fluid(ONE_TYPE, TIME_MODEL, 15).throughput_tokens_per_s
    achieved = []
    for policy in (PaperWait(wait_thresholds(ONE_TYPE, TIME_MODEL, 15).n), PaperFcfs()):
        run = PaperRun(PaperModel(ONE_TYPE, TIME_MODEL), policy, seed=2, rows=40, capacity_tokens=15)
        run.run(1000.0)
        achieved.append(run.output_tokens.mean() / 1000 / fluid)
    assert achieved[0] == pytest.approx(1, abs=0.015)
    assert achieved[1] < 0.9


def test_scaling_arrivals_and_speeds_is_a_longer_horizon():
    scaled_time_model = IterationTimeModel(TIME_MODEL.d0_s / 4, TIME_MODEL.d1_s_per_kv_token / 4)
    fast = PaperRun(PaperModel(ONE_TYPE.scaled(4), scaled_time_model), PaperWait((4,)), seed=7, rows=10)
    slow = PaperRun(PaperModel(ONE_TYPE, TIME_MODEL), PaperWait((4,)), seed=7, rows=10)
    fast.run(50.0)
    slow.run(200.0)
    assert np.array_equal(fast.counts, slow.counts)
    assert np.array_equal(fast.completed, slow.completed)


@pytest.mark.slow
def test_the_buffer_keeps_nested_wait_from_overflowing():
    wanted = {"boundaries": (2, 4, 8), "overflow_probability": 0.1, "horizon_s": 100.0}
    solution = nested_wait_thresholds(UNKNOWN, UNKNOWN_LAW, 10**6, **wanted)
    capacity = math.ceil(solution.memory_tokens + solution.buffer_tokens)
    assert nested_wait_thresholds(UNKNOWN, UNKNOWN_LAW, capacity, **wanted) == solution
    assert isinstance(solution, NestedWaitSolution)
    model, policy = PaperModel(UNKNOWN, UNKNOWN_LAW), PaperNestedWait(solution.boundaries, solution.n)
    unlimited = PaperRun(model, policy, seed=0, rows=300)
    unlimited.run(100.0)
    assert np.mean(unlimited.peak_tokens > capacity) <= 0.1
    assert np.mean(unlimited.peak_tokens > solution.memory_tokens) > 0.9
    # Memory that is never exceeded changes nothing.
    limited = PaperRun(model, policy, seed=0, rows=300, capacity_tokens=float(unlimited.peak_tokens.max()))
    limited.run(100.0)
    assert np.array_equal(limited.counts, unlimited.counts)
    assert limited.evicted.sum() == 0


def test_whole_totals_are_whole_thresholds():
    counts = np.random.default_rng(0).integers(0, 10, (200, 1, 9))
    by_totals = PaperNestedWaitByTotals((2, 4, 8), (14, 12, 16), 200).batch(counts)
    assert np.array_equal(by_totals, NESTED.batch(counts))


@pytest.mark.slow
def test_the_buffer_holds_for_less_than_one_prompt_per_stage():
    """A fifth of a prompt per stage: the queues of rotating thresholds stay within the buffer too."""
    mix = WorkloadMix.from_lengths(Lengths(np.array([4, 4]), np.array([20, 60]), np.array([0.4, 0.6])), 0.6)
    time_model, horizon_s = IterationTimeModel(1 / 4, 1 / 48000), 400.0
    wanted = {"boundaries": (20, 60), "overflow_probability": 0.1, "horizon_s": horizon_s, "whole": False}
    solution = nested_wait_thresholds(mix, time_model, 10**6, **wanted)
    assert max(solution.n) < 0.5
    rows = 200
    run = PaperRun(
        PaperModel(mix, time_model), PaperNestedWaitByTotals(solution.boundaries, solution.totals, rows),
        seed=0, rows=rows,
    )
    run.run(horizon_s)
    assert np.mean(run.peak_tokens > solution.needed_tokens) <= 0.1
    arrived, done = run.arrived.sum(), run.completed.sum()
    assert done > 0.85 * arrived, "they keep up"


@pytest.mark.slow
def test_thresholds_of_the_worst_window_keep_up_when_the_rate_moves():
    """Twelve prompts/s for 40 s, then 28: thresholds of the mean fall behind in a surge, those of the worst do not."""
    slow, fast = (Stretch(40.0, UNKNOWN.scaled(rate / 20)) for rate in (12.0, 28.0))
    wanted = {"boundaries": (2, 4, 8), "horizon_s": 160.0, "overflow_probability": 0.1}
    waiting = []
    for over_time in ((), (slow, fast)):
        solution = nested_wait_thresholds(UNKNOWN, UNKNOWN_LAW, 10**6, over_time=over_time, **wanted)
        arrivals = SteppedArrivals([(40.0, (12.0,)), (40.0, (28.0,))], np.random.default_rng(4))
        policy = PaperNestedWait(solution.boundaries, solution.n)
        run = PaperRun(PaperModel(UNKNOWN, UNKNOWN_LAW), policy, seed=4, rows=50, arrivals=arrivals)
        arrivals.follow(run)
        run.run(80.0)
        waiting.append(float(run.counts[:, 0, 0].mean()))
        assert run.arrived.mean() == pytest.approx(80 * 20, rel=0.02)
        run.run(160.0)
        assert np.mean(run.peak_tokens > solution.needed_tokens) <= 0.1
    assert waiting[1] < 3 * solution.n[0] < waiting[0]


def test_what_the_model_does_not_cover_is_an_error():
    with pytest.raises(ValueError, match="only d0 and d1"):
        PaperModel(ONE_TYPE, IterationTimeModel(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="several prompt lengths"):
        PaperModel(WorkloadMix.from_lengths(Lengths.from_pairs([(1, 1), (2, 1)]), 1.0), TIME_MODEL)
    with pytest.raises(ValueError, match="20 tokens overflows after prompts were held"):
        PaperRun(PaperModel(TWO_TYPES, TIME_MODEL), PaperWait((4, 2)), seed=0, capacity_tokens=20).run(100.0)
    with pytest.raises(RuntimeError, match="idle"):
        PaperRun(PaperModel(ONE_TYPE, TIME_MODEL), PaperWait((4,)), seed=0, arrivals=PerIteration((4,))).step()


@pytest.mark.slow
def test_evidence_is_written_by_its_command(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path, "--quick"], check=True, timeout=300, env=ENVIRONMENT)
    numbers = json.loads((tmp_path / "theory.json").read_text())
    slopes = {curve["label"]: curve["slope"] for curve in numbers["gap"]}
    assert slopes["FCFS, C = 12"] > -0.2 > slopes["WAIT at the boundary, n = 4, C = 12"]
    assert slopes["WAIT with slack, n = 5, C = 15"] == pytest.approx(-1, abs=0.2)
    assert all(row["interval_95"][0] <= row["delta"] for row in numbers["overflow"])
    assert all(round(row["computed"]) == row["published"] for row in numbers["memory"]["rows"])
    delays = {curve["label"]: curve["latency_slope"][0] for curve in numbers["gap"]}
    assert delays["FCFS, C = 12"] > 0.7 > delays["WAIT at the boundary, n = 4, C = 12"] > 0.15
    assert all(abs(slope) < 0.15 for label, slope in delays.items() if label.startswith("Nested"))
    assert all(row["gaps"][-1] > 0.04 for row in numbers["limits"])
    # Rates that move: thresholds for the mean rate let the queue grow in every peak, those of the worst windows do not.
    mean, worst = (row["slopes"]["latency"][0] for row in numbers["varying"])
    assert mean > 0.4 > 0.2 > worst
    for panel in numbers["segments"]:
        total = [point["base"] + point["certain"] + point["random"] for point in panel["points"]]
        assert min(total) < min(total[0], total[-1])
    text = (tmp_path / "theory.md").read_text()
    for name in ("gap", "overflow", "memory", "worked-case", "segments"):
        assert f"figures/theory-{name}.svg" in text
        assert all((tmp_path / "figures" / f"theory-{name}.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
