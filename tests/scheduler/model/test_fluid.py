"""The fluid equilibrium against brute force and against the paper's published numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.model.fluid import batch_memory_tokens, batch_time_s, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, RequestType, WorkloadMix

modest = settings(derandomize=True, deadline=None, max_examples=60)

time_models = st.builds(
    IterationTimeModel,
    d0_s=st.floats(1e-3, 0.02),
    d1_s_per_kv_token=st.floats(1e-8, 1e-6),
    d2_s_per_prefill_token=st.just(0.0) | st.floats(1e-6, 1e-4),
    d3_s_per_decode_token=st.just(0.0) | st.floats(1e-6, 1e-4),
    floor_s=st.just(0.0) | st.floats(1e-3, 0.03),
)
lengths = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)), min_size=1, max_size=4).map(Lengths.from_pairs)
mixes = st.lists(st.tuples(st.floats(0.1, 30), lengths), min_size=1, max_size=3).map(
    lambda types: WorkloadMix(tuple(RequestType(str(i), rate, ls) for i, (rate, ls) in enumerate(types)))
)


def life_sums(request_type):
    """Tokens of one mean request, added up over the iterations of its life, without any closed form."""
    ls = request_type.lengths
    rows = list(zip(ls.prompt_tokens.tolist(), ls.output_tokens.tolist(), ls.weights.tolist(), strict=True))
    kv = sum(w * sum(p + s for s in range(o + 1)) for p, o, w in rows)
    return kv, sum(w * p for p, _, w in rows), sum(w * o for _, o, w in rows)


def batch_seconds(time_model, per_stage, mix):
    sums = [life_sums(t) for t in mix.types]
    kv, prefill, decode = (sum(n * s[i] for n, s in zip(per_stage, sums, strict=True)) for i in range(3))
    work = time_model.d0_s + time_model.d2_s_per_prefill_token * prefill + time_model.d3_s_per_decode_token * decode
    return max(time_model.floor_s, work) + time_model.d1_s_per_kv_token * kv, kv


def iterate_to_the_fixed_point(time_model, mix):
    """ΔT by repetition: the batch holds what arrived during the last iteration. Infinite when it runs away."""
    seconds = time_model.iteration_s(0, 0, 0)
    sums = [life_sums(t) for t in mix.types]
    kv, prefill, decode = (sum(t.rate_rps * s[i] for t, s in zip(mix.types, sums, strict=True)) for i in range(3))
    for _ in range(20_000):
        work = (
            time_model.d0_s
            + (time_model.d2_s_per_prefill_token * prefill + time_model.d3_s_per_decode_token * decode) * seconds
        )
        following = max(time_model.floor_s, work) + time_model.d1_s_per_kv_token * kv * seconds
        if following > 1e6:
            return math.inf, math.inf
        if following == pytest.approx(seconds, rel=1e-13):
            return following, kv * following
        seconds = following
    return seconds, kv * seconds


@modest
@given(mixes, time_models)
def test_equilibrium_is_the_fixed_point_of_the_time_model(mix, time_model):
    fluid = solve_fluid(mix, time_model, 10**7)
    if abs(fluid.load - 1) < 0.01:
        return
    seconds, memory = iterate_to_the_fixed_point(time_model, mix)
    assert fluid.stable == (seconds < math.inf)
    assert fluid.iteration_time_s == pytest.approx(seconds, rel=1e-6)
    assert fluid.memory_tokens == pytest.approx(memory, rel=1e-6)
    assert fluid.throughput_tokens_per_s == pytest.approx(sum(t.rate_rps * life_sums(t)[2] for t in mix.types))
    for n, t in zip(fluid.inventories, mix.types, strict=True):
        assert n == pytest.approx(t.rate_rps * seconds, rel=1e-6)
    assert fluid.running == pytest.approx(
        sum(t.rate_rps * seconds * (life_sums(t)[2] + 1) for t in mix.types), rel=1e-6
    )


@modest
@given(mixes, time_models, st.lists(st.floats(0, 20), min_size=3, max_size=3))
def test_a_batch_costs_what_its_stages_add_up_to(mix, time_model, per_stage):
    per_stage = per_stage[: len(mix.types)]
    seconds, kv = batch_seconds(time_model, per_stage, mix)
    assert batch_time_s(per_stage, mix, time_model) == pytest.approx(seconds)
    assert batch_memory_tokens(per_stage, mix) == pytest.approx(kv)


def simulate_stages(mix, time_model, iterations=4000):
    """A deterministic flow through explicit stages: each iteration moves all running prompts one stage on."""
    stages = [np.zeros(int(t.lengths.output_tokens[0]) + 1) for t in mix.types]
    prompts = [int(t.lengths.prompt_tokens[0]) for t in mix.types]
    seconds = time_model.shortest_iteration_s
    for _ in range(iterations):
        for held, t in zip(stages, mix.types, strict=True):
            held[1:] = held[:-1].copy()
            held[0] = t.rate_rps * seconds
        kv = sum(float(held @ (p + np.arange(held.size))) for held, p in zip(stages, prompts, strict=True))
        prefill = sum(held[0] * p for held, p in zip(stages, prompts, strict=True))
        seconds = time_model.iteration_s(prefill, sum(held[1:].sum() for held in stages), kv)
    return seconds, kv, sum(held.sum() for held in stages)


@pytest.mark.parametrize(
    "mix",
    [
        WorkloadMix((RequestType("p512d20", 12, Lengths.point(512, 20)),)),
        WorkloadMix(
            (RequestType("p512d20", 10, Lengths.point(512, 20)), RequestType("p512d50", 3, Lengths.point(512, 50)))
        ),
        WorkloadMix((RequestType("p30d40", 0.5, Lengths.point(30, 40)),)),
    ],
)
def test_equilibrium_is_where_a_simulated_flow_settles(mix):
    time_model = IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
    fluid = solve_fluid(mix, time_model, 137_000)
    seconds, memory, running = simulate_stages(mix, time_model)
    assert fluid.stable
    assert fluid.iteration_time_s == pytest.approx(seconds, rel=1e-6)
    assert fluid.memory_tokens == pytest.approx(memory, rel=1e-6)
    assert fluid.running == pytest.approx(running, rel=1e-6)


def paper_mix(rate_rps):
    return WorkloadMix((RequestType("lmsys", rate_rps, Lengths.point(58, 147)),))


def paper_time_model():
    """The two-term model whose d0·E[w] and d1/d0 the published M*(λ) imply, for these lengths."""
    d0_s = 299 / paper_mix(1).types[0].lengths.kv_token_iterations
    return IterationTimeModel(d0_s, 3.78e-5 * d0_s)


@pytest.mark.parametrize(("rate_rps", "published"), [(50, 34_377), (60, 55_758), (70, 100_327), (80, 250_509)])
def test_published_memory(rate_rps, published):
    fluid = solve_fluid(paper_mix(rate_rps), paper_time_model(), 137_000)
    assert fluid.memory_tokens == pytest.approx(published, rel=0.01)
    assert fluid.stable
    assert fluid.fits_memory == (rate_rps <= 70)
    assert (fluid.reason is None) == fluid.fits_memory


def test_published_crossing():
    fluid = solve_fluid(paper_mix(1), paper_time_model(), 137_000)
    assert fluid.critical_rate_scale == pytest.approx(74.1, abs=0.2)
    assert fluid.limit == "memory"


@modest
@given(mixes, time_models, st.integers(2000, 10**6))
def test_critical_rate_is_where_memory_is_full(mix, time_model, capacity):
    scale = solve_fluid(mix, time_model, capacity).critical_rate_scale
    at, above = (solve_fluid(mix.scaled(scale * f), time_model, capacity) for f in (1 - 1e-9, 1 + 1e-3))
    assert at.fits_memory
    assert at.memory_tokens == pytest.approx(capacity, rel=1e-5)
    assert not above.fits_memory
    assert at.critical_rate_scale == pytest.approx(1, rel=1e-6)
    unlimited = solve_fluid(mix, time_model, 10**15).critical_rate_scale
    assert at.limit == ("compute" if unlimited < 1.05 * scale else "memory")


def test_unstable_demand_is_a_result_with_a_reason():
    fluid = solve_fluid(paper_mix(100), paper_time_model(), 137_000)
    assert not fluid.stable
    assert not fluid.fits_memory
    assert fluid.load == pytest.approx(100 * 299 * 3.78e-5)
    assert fluid.iteration_time_s == fluid.memory_tokens == fluid.running == math.inf
    assert "load is 1.130" in fluid.reason
    assert "0.742 of the rate fits" in fluid.reason


def test_stable_up_to_load_one():
    just_above, just_below = (solve_fluid(paper_mix(rate), paper_time_model(), 10**9) for rate in (88.7, 88.3))
    assert 1 < just_above.load < 1.01
    assert not just_above.stable
    assert 0.99 < just_below.load < 1
    assert just_below.stable


def test_memory_shortage_is_a_result_with_a_reason():
    fluid = solve_fluid(paper_mix(80), paper_time_model(), 137_000)
    assert fluid.stable
    assert not fluid.fits_memory
    assert "above the KV capacity of 137000" in fluid.reason


def test_a_request_larger_than_memory_never_fits():
    fluid = solve_fluid(
        WorkloadMix.from_lengths(Lengths.from_pairs([(1, 1)] * 99 + [(90, 11)]), 1e-9), paper_time_model(), 100
    )
    assert fluid.stable
    assert not fluid.fits_memory
    assert fluid.critical_rate_scale == 0
    assert "101 tokens exceeds the KV capacity of 100" in fluid.reason


def test_loads_are_shares_of_the_load():
    time_model = IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 3e-5, 0.0112)
    fluid = solve_fluid(WorkloadMix((RequestType("p512d20", 12, Lengths.point(512, 20)),)), time_model, 137_000)
    assert fluid.prefill_load == pytest.approx(12 * 512 * 6.47e-5)
    assert fluid.kv_load == pytest.approx(12 * 21 * 522 * 4.5e-7)
    assert fluid.load == pytest.approx(fluid.prefill_load + fluid.kv_load + 12 * 20 * 3e-5)


def test_nonsensical_inputs_are_errors():
    idle = WorkloadMix((RequestType("p5d5", 0, Lengths.point(5, 5)),))
    with pytest.raises(ValueError, match="rate_rps is 0"):
        solve_fluid(idle, paper_time_model(), 100)
    for capacity in (0, -1, math.nan):
        with pytest.raises(ValueError, match="kv_capacity_tokens is"):
            solve_fluid(paper_mix(1), paper_time_model(), capacity)
    with pytest.raises(ValueError, match="per_stage has 2 entries; the mix has 1"):
        batch_time_s((1, 2), idle, paper_time_model())
