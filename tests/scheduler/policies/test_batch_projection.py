"""What admitted requests will grow into, against exact growth."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scheduler.fluid_params import FluidParams
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths
from scheduler.policies import Waiting
from scheduler.policies.batch_projection import BatchProjection, Columns
from scheduler.survival import Survival

TIME_MODEL = IterationTimeModel(0.004, 4e-7, 6e-5, 6e-5, 0.011)
BLOCK = 16


def params_of(lengths: Lengths, *, memory: int, iteration_s: float | None = None) -> FluidParams:
    return FluidParams(
        time_model=TIME_MODEL,
        survival=Survival.of(lengths),
        kv_limit_tokens=memory,
        block_tokens=BLOCK,
        iteration_s=iteration_s,
    )


def columns(stages, kv, *, shared=0.0, expected=math.inf, most=math.inf) -> Columns:
    made = Columns()
    made.stages, made.kv = np.asarray(stages, dtype=np.int64), np.asarray(kv, dtype=np.float64)
    made.shared, made.expected, made.most = (np.full(len(made.stages), value) for value in (shared, expected, most))
    return made


def admit_all_that_fit(projection: BatchProjection, params: FluidParams, waiting: Waiting) -> int:
    admitted = 0
    while projection.fits(waiting, params.iteration_s):
        projection.add(waiting)
        admitted += 1
    return admitted


def fit_into(params: FluidParams, prompt: int, running: Columns | None = None, **declared: float) -> int:
    """How many requests of that prompt are admitted beside the running ones."""
    projection = BatchProjection(params)
    if running is not None:
        projection.reset(running, 0.0)
    return admit_all_that_fit(projection, params, Waiting(prompt, 0.0, **declared))


@settings(max_examples=80, deadline=None)
@given(
    output=st.integers(2, 700), prompt=st.integers(1, 900), memory=st.integers(5_000, 60_000),
    ages=st.lists(st.floats(0, 0.999), max_size=20),
)
def test_admitted_requests_never_overflow_the_memory(output: int, prompt: int, memory: int, ages: list[float]):
    """With answers of one length the growth is certain: block by block it must stay within the limit."""
    stages = np.array([int(age * output) for age in ages], dtype=int)
    admitted = fit_into(
        params_of(Lengths.point(prompt, output), memory=memory), prompt, columns(stages, stages + prompt)
    )
    assume(admitted)
    all_stages = np.concatenate([stages, np.zeros(admitted, dtype=int)])

    def blocks_after(ahead: int) -> int:
        there = all_stages[all_stages + ahead < output]
        return int(np.sum(np.ceil((prompt + there + ahead) / BLOCK))) * BLOCK

    assert max(blocks_after(ahead) for ahead in range(output)) <= memory


@settings(max_examples=40, deadline=None)
@given(output=st.integers(2, 400), prompt=st.integers(1, 900), iteration_s=st.floats(0.015, 0.2))
def test_requests_admitted_together_fill_the_iteration_and_no_more(output: int, prompt: int, iteration_s: float):
    admitted = fit_into(params_of(Lengths.point(prompt, output), memory=10**9, iteration_s=iteration_s), prompt)
    longest_s = TIME_MODEL.iteration_s(0.0, float(admitted), float(admitted * (prompt + output)))
    assume(admitted)
    assert longest_s <= iteration_s * 1.05
    assert TIME_MODEL.iteration_s(0.0, admitted + 1.0, (admitted + 1.0) * (prompt + output)) > iteration_s * 0.93


def test_iteration_time_is_held_at_the_stated_probability_and_not_on_average():
    """Long answers of uncertain length: their growth varies, and time must be kept for that, as memory is."""
    lengths = Lengths.from_pairs([(800, 200)] * 5 + [(800, 9_000)])

    def admitted(z: float) -> int:
        return fit_into(replace(params_of(lengths, memory=10**9, iteration_s=0.05), overflow_z=z), 800)

    assert admitted(2.33) < 0.9 * admitted(0.0)


def test_old_requests_count_for_what_they_have_left():
    params = params_of(Lengths.point(100, 500), memory=60_000)
    old, young = (fit_into(params, 100, columns([stage] * 50, [100.0 + stage] * 50)) for stage in (450, 0))
    assert old > young


def test_unknown_lengths_count_by_their_survival():
    """Nine of ten answers are short: many more fit than if all were long."""
    short_mostly = Lengths.from_pairs([(50, 10)] * 9 + [(50, 1000)])
    by_survival = fit_into(params_of(short_mostly, memory=50_000), 50)
    assert by_survival > 3 * fit_into(params_of(Lengths.point(50, 1000), memory=50_000), 50)


def test_more_risk_of_overflow_lets_more_in():
    lengths = Lengths.from_pairs([(50, 10), (50, 1000)])
    counts = [fit_into(replace(params_of(lengths, memory=40_000), overflow_z=z), 50) for z in (0.0, 2.0, 4.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_a_request_longer_than_every_length_seen_still_counts_now():
    params = params_of(Lengths.point(10, 20), memory=1000)
    assert fit_into(params, 90, columns([500], [900.0])) == 0
    assert fit_into(params, 90) > 0


def test_shared_blocks_count_once():
    """Ten requests over one cached prefix of 4 000 tokens: memory has it once, iterations read it ten times."""
    lengths = Lengths.point(4_100, 100)
    params = params_of(lengths, memory=20_000)
    assert fit_into(params, 4_100) == 4
    projection = BatchProjection(params)
    projection.reset(columns([1], [4_101.0], shared=4_000.0), 4_000.0)
    assert admit_all_that_fit(projection, params, Waiting(4_100, 0.0, cached_tokens=4_000, shared_tokens=4_000)) > 50
    timed = replace(params, kv_limit_tokens=10**9, iteration_s=0.05)
    sharing = BatchProjection(timed)
    sharing.reset(columns([1], [4_101.0], shared=4_000.0), 4_000.0)
    with_equal_reads = admit_all_that_fit(sharing, timed, Waiting(4_100, 0.0, cached_tokens=4_000, shared_tokens=4_000))
    assert with_equal_reads == fit_into(timed, 4_100, columns([1], [4_101.0]))


def test_a_declared_length_bounds_the_growth():
    """Clients that say how long their answers are leave room for more of them than an unknown length does."""
    params = params_of(Lengths.from_pairs([(50, 10), (50, 1000)]), memory=30_000)
    unknown, short = fit_into(params, 50), fit_into(params, 50, most_output_tokens=20.0)
    assert short > 2 * unknown
    assert fit_into(params, 50, expected_output_tokens=20.0) > unknown
    running = columns([5] * 40, [55.0] * 40, most=20.0)
    assert fit_into(params, 50, running) > fit_into(params, 50, columns([5] * 40, [55.0] * 40))


def test_a_wrong_declaration_hurts_only_its_own_request():
    """A request that has outrun what it expected counts as one of unknown length again."""
    params = params_of(Lengths.from_pairs([(50, 10), (50, 1000)]), memory=30_000)
    outrun = columns([100] * 20, [150.0] * 20, expected=20.0)
    assert fit_into(params, 50, outrun) == fit_into(params, 50, columns([100] * 20, [150.0] * 20))


def test_a_long_context_costs_neither_memory_nor_time():
    lengths = Lengths(np.array([1000] * 200), np.geomspace(1, 131_071, 200).astype(np.int64), np.ones(200))
    params = params_of(lengths, memory=10**6)
    tracemalloc.start()
    made = BatchProjection(params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert made.fits(Waiting(1000, 0.0), None)


def test_nothing_seen_yet_is_an_error_in_words():
    with pytest.raises(ValueError, match="survival"):
        Survival(())
