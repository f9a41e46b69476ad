"""What the controller learns of a replica from its telemetry, and the thresholds it draws from that."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_engine import LIMITS, PAPER, SyntheticEngine

from scheduler.fluid_params import FluidParams
from scheduler.messages import Apply, Delivered, RunningLengths
from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.wait_thresholds import WaitSolution, running_cap, wait_thresholds
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.survival import Survival
from scheduler.thresholds import (
    EngineLimits,
    SegmentThreshold,
    Thresholds,
    TypeThreshold,
    parse_thresholds,
    thresholds_as_dict,
)
from scheduler.tuning.difference import FLUID_TOLERANCES, materially_different
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import MOST_TYPES

SETTINGS = TuningSettings(min_finished=20, window_s=60.0, validity_s=120.0)
WAIT, NESTED = Thresholds(policy="wait"), Thresholds(policy="nested_wait")


def model_of(configured: Thresholds = NESTED, **changes: Any) -> ReplicaModel:
    return ReplicaModel(replace(SETTINGS, **changes), PAPER, configured)


def proposal_for(
    engine: SyntheticEngine, configured: Thresholds, lengths: list[tuple[int, int]], *, every_s: float,
    seconds: float = 60.0, declared: bool = False,
) -> Proposal:
    """The proposal of a model that observed `engine` from the start of this traffic."""
    model = model_of(configured)
    model.observe(engine.report())
    engine.traffic(lengths, every_s=every_s, seconds=seconds, declared=declared)
    model.observe(engine.report(model.cursor))
    return model.propose()


def knowledge(model: ReplicaModel) -> tuple[Any, ...]:
    return (
        model.rate_rps,
        model.finished_seen,
        model.time_model.records,
        model.time_model.time_model,
        model.cursor,
        model.propose(),
    )


def test_a_report_seen_before_changes_nothing() -> None:
    engine, model = SyntheticEngine(), model_of()
    engine.traffic([(58, 147), (20, 400)], every_s=0.25, seconds=30)
    for batch in range(40):
        engine.iterate(10, batch, 100 * batch, 0.02)
    model.observe(engine.report())
    before = knowledge(model)
    assert before[1] == 120
    assert before[2] == 40
    model.observe(engine.report(0))
    assert knowledge(model) == before
    model.observe(engine.report(model.cursor))
    assert knowledge(model) == before


def test_only_what_is_new_is_counted() -> None:
    engine, model = SyntheticEngine(), model_of()
    model.observe(engine.report())
    engine.traffic([(58, 147)], every_s=0.5, seconds=10)
    model.observe(engine.report(model.cursor))
    engine.traffic([(58, 147)], every_s=0.5, seconds=10)
    model.observe(engine.report(0))  # overlaps what is known
    assert model.finished_seen == 40
    assert model.rate_rps == pytest.approx(2.0)


@pytest.mark.parametrize("aborted", [False, True])
def test_an_answer_that_its_client_cut_short_has_the_length_that_it_had(aborted: bool) -> None:
    """Where three in ten clients leave at 500 tokens, capacity was taken for several times what it is."""
    engine, model = SyntheticEngine(), model_of()
    for _ in range(100):
        for output, leaves in ((50, False), (500, aborted)):
            engine.arrive(58)
            engine.finish(58, output, aborted=leaves)
    engine.finish(58, 0, aborted=True)
    model.observe(engine.report())
    assert model.finished_seen == 200, "one that left, or was rejected, before its first token has no length"
    assert model.estimates.lengths.mean_output_tokens == pytest.approx(275, rel=0.05)


def test_a_restarted_engine_starts_the_window_anew() -> None:
    model = model_of()
    engine = SyntheticEngine(engine_id="engine-1")
    engine.traffic([(58, 147)], every_s=0.125, seconds=60)
    model.observe(engine.report())
    assert model.rate_rps == pytest.approx(8.0, rel=0.02)
    cursor = model.cursor

    restarted = SyntheticEngine(engine_id="engine-2")  # its clock and its sequence start over
    model.observe(restarted.report(cursor))
    assert model.rate_rps == 0
    assert model.cursor == 0
    restarted.traffic([(58, 147)], every_s=0.5, seconds=10)
    model.observe(restarted.report(model.cursor))
    assert model.rate_rps == pytest.approx(2.0)
    assert model.finished_seen == 480 + 20  # what is known of lengths stays


def test_rate_is_over_the_time_observed_then_over_the_window() -> None:
    engine, model = SyntheticEngine(), model_of()
    model.observe(engine.report())
    engine.traffic([(58, 147)], every_s=0.5, seconds=16)
    model.observe(engine.report(model.cursor))
    assert model.rate_rps == pytest.approx(2.0)  # 32 requests in 16 s
    engine.traffic([(58, 147)], every_s=0.25, seconds=120)
    model.observe(engine.report(model.cursor))
    assert model.rate_rps == pytest.approx(4.0, rel=0.01)


def test_silence_after_traffic_is_a_change_and_not_half_the_rate() -> None:
    engine, model = SyntheticEngine(), model_of()
    engine.traffic([(58, 147)], every_s=0.25, seconds=60)
    model.observe(engine.report())
    engine.now_s += 30
    model.observe(engine.report(model.cursor))
    assert model.rate_rps < 0.1
    assert model.propose().equilibrium is not None


def test_a_window_without_arrivals_brings_the_configured_thresholds_back() -> None:
    engine, model = SyntheticEngine(), model_of()
    engine.traffic([(58, 147)], every_s=0.5, seconds=60)
    model.observe(engine.report())
    assert model.propose().equilibrium is not None
    engine.now_s += 61
    model.observe(engine.report(model.cursor))
    proposal = model.propose()
    assert proposal.thresholds == NESTED
    assert "no arrivals in the last 60 s" in proposal.reason


def test_no_rate_is_made_up_from_a_first_moment() -> None:
    engine, model = SyntheticEngine(), model_of()
    engine.now_s = 5.0
    engine.arrive(58)
    model.observe(engine.report())  # observed for no time
    assert model.rate_rps <= 1.0


def test_the_time_model_follows_a_slower_engine() -> None:
    engine, model = SyntheticEngine(), model_of()
    slow = IterationTimeModel(d0_s=2 * PAPER.d0_s, d1_s_per_kv_token=3 * PAPER.d1_s_per_kv_token)
    for step in range(1500):
        kv = 1000 + (step * 7919) % 90_000
        engine.iterate(0, 50, kv, slow.iteration_s(0, 50, kv))
    model.observe(engine.report())
    for kv in (5_000, 40_000, 80_000):
        wanted, prior = slow.iteration_s(0, 50, kv), PAPER.iteration_s(0, 50, kv)
        assert model.time_model.time_model.iteration_s(0, 50, kv) == pytest.approx(wanted, rel=0.05)
        assert wanted > 1.9 * prior


def test_nothing_is_known_without_telemetry() -> None:
    proposal = model_of().propose()
    assert proposal.thresholds == NESTED
    assert proposal.equilibrium is None
    assert "no telemetry yet" in proposal.reason


def test_too_little_data_keeps_the_configured_thresholds_and_says_how_much_is_missing() -> None:
    engine = SyntheticEngine()
    proposal = proposal_for(engine, NESTED, [(58, 147)], every_s=0.5, seconds=9.5)  # 19 requests
    assert proposal.thresholds == NESTED
    assert proposal.equilibrium is None
    assert "19 finished requests seen, 20 needed" in proposal.reason
    enough = proposal_for(SyntheticEngine(), NESTED, [(58, 147)], every_s=0.5, seconds=10)
    assert enough.equilibrium is not None


def test_the_proposal_says_how_long_it_holds_and_leaves_the_version_to_the_controller() -> None:
    configured = replace(NESTED, max_hold_s=0.5, token_budget=1000)
    thresholds = proposal_for(SyntheticEngine(configured), configured, [(58, 147)], every_s=0.125).thresholds
    assert thresholds.valid_for_s == SETTINGS.validity_s
    assert thresholds.version == configured.version
    assert not thresholds.pinned
    assert (thresholds.policy, thresholds.max_hold_s, thresholds.token_budget) == ("nested_wait", 0.5, 1000)


def test_the_equilibrium_is_the_fluid_model_s() -> None:
    proposal = proposal_for(SyntheticEngine(), NESTED, [(58, 147)], every_s=1 / 32)
    expected = solve_fluid(WorkloadMix.from_lengths(Lengths.point(58, 147), 32.0), PAPER, LIMITS.kv_capacity_tokens)
    assert proposal.equilibrium is not None
    assert proposal.equilibrium.load == pytest.approx(expected.load, rel=0.01)
    assert "32.00 requests/s, load 0.24" in proposal.reason
    assert proposal.thresholds.reason == proposal.reason


def test_wait_with_declared_lengths_has_the_solver_s_thresholds_by_type() -> None:
    lengths = [(58, 147), (100, 50)]
    proposal = proposal_for(SyntheticEngine(), WAIT, lengths, every_s=1 / 64, declared=True)
    mix = WorkloadMix(
        (RequestType("short", 32.0, Lengths.point(100, 50)), RequestType("long", 32.0, Lengths.point(58, 147)))
    )
    solution = wait_thresholds(mix, PAPER, LIMITS.kv_capacity_tokens)
    assert isinstance(solution, WaitSolution)
    types = proposal.thresholds.types
    assert tuple(entry.n for entry in types) == solution.n
    assert [(entry.name, entry.max_output_tokens) for entry in types] == [("output<=50", 50), ("output<=147", None)]
    assert proposal.thresholds.segments == ()
    assert proposal.thresholds.max_running == LIMITS.max_num_seqs < running_cap(mix, LIMITS.kv_capacity_tokens)
    assert f"WAIT n = {solution.n[0]}, {solution.n[1]}" in proposal.reason


def test_many_declared_lengths_become_few_types_that_cover_all() -> None:
    lengths = [(50, output) for output in range(10, 1000, 7)]
    types = proposal_for(SyntheticEngine(), WAIT, lengths, every_s=0.25, declared=True).thresholds.types
    bounds = [entry.max_output_tokens for entry in types]
    assert 1 < len(types) <= MOST_TYPES
    assert bounds[-1] is None
    inner = [bound for bound in bounds[:-1] if bound is not None]
    assert len(inner) == len(types) - 1
    assert inner == sorted(set(inner))
    assert all(any(output <= bound for bound in inner) for output in (10, 100))


def test_declared_and_undeclared_lengths_get_types_and_segments() -> None:
    engine, model = SyntheticEngine(), model_of(WAIT)
    model.observe(engine.report())
    for _ in range(120):
        engine.traffic([(58, 147)], every_s=0.25, seconds=0.25, declared=True)
        engine.traffic([(30, 90)], every_s=0.25, seconds=0.25, declared=False)
    model.observe(engine.report(model.cursor))
    thresholds = model.propose().thresholds
    assert [entry.name for entry in thresholds.types] == ["output<=147"]
    assert thresholds.types[0].max_output_tokens is None
    assert thresholds.segments[-1].end_output_tokens >= 147


def test_an_absurd_declared_length_does_not_stop_tuning() -> None:
    engine, model = SyntheticEngine(), model_of(WAIT)
    model.observe(engine.report())
    engine.traffic([(58, 147)], every_s=0.25, seconds=30, declared=True)
    engine.arrive(58, declared=10**30)
    model.observe(engine.report(model.cursor))
    proposal = model.propose()
    assert proposal.equilibrium is not None
    assert proposal.thresholds.types[-1].max_output_tokens is None


def test_nested_wait_has_growing_segments_that_cover_all_and_fit() -> None:
    limits = replace(LIMITS, kv_capacity_tokens=2_000_000, max_num_seqs=4096)
    lengths = [(50, output) for output in (20, 40, 80, 160)]
    thresholds = proposal_for(SyntheticEngine(limits=limits), NESTED, lengths, every_s=1 / 128).thresholds
    ends = [segment.end_output_tokens for segment in thresholds.segments]
    per_stage = [
        segment.total / (end - start)
        for segment, start, end in zip(thresholds.segments, (0, *ends), ends, strict=False)
    ]
    assert len(ends) > 1
    assert ends == sorted(set(ends))
    assert ends[-1] == 160, "never beyond the longest answer"
    assert per_stage == sorted(per_stage, reverse=True)
    held = 0.0
    for start, end, n in zip([-1, *ends], ends, per_stage, strict=False):
        held += sum(n * (50 + stage) for stage in range(start + 1, end + 1))
    assert 0 < held <= limits.kv_capacity_tokens
    assert thresholds.types == ()


def test_outputs_longer_than_a_hundred_thousand_tokens_do_not_stop_tuning() -> None:
    limits = replace(LIMITS, kv_capacity_tokens=10_000_000, max_model_len=1_000_000)
    engine = SyntheticEngine(limits=limits)
    engine.traffic([(50, 200), (50, 120_000)], every_s=2.0, seconds=60)
    model = ReplicaModel(SETTINGS, IterationTimeModel(d0_s=1e-3, d1_s_per_kv_token=1e-11), NESTED)
    model.observe(engine.report())
    proposal = model.propose()
    assert proposal.equilibrium is not None
    assert proposal.equilibrium.fits_memory
    assert proposal.thresholds.max_running is not None


def test_fcfs_gets_a_cap_and_no_counts() -> None:
    thresholds = proposal_for(SyntheticEngine(), Thresholds(policy="fcfs"), [(58, 147)], every_s=0.125).thresholds
    assert (thresholds.policy, thresholds.types, thresholds.segments) == ("fcfs", (), ())
    assert thresholds.max_running == min(LIMITS.max_num_seqs, running_cap(
        WorkloadMix.from_lengths(Lengths.point(58, 147), 8.0), LIMITS.kv_capacity_tokens
    ))


def test_overload_leaves_types_unheld_and_still_caps_memory() -> None:
    small = replace(LIMITS, kv_capacity_tokens=6000)
    proposal = proposal_for(SyntheticEngine(limits=small), NESTED, [(58, 147)], every_s=1 / 160)
    assert proposal.equilibrium is not None
    assert not proposal.equilibrium.fits_memory
    assert proposal.thresholds.segments == ()
    cap = proposal.thresholds.max_running
    assert cap is not None
    assert 1 <= cap * (58 + 147 / 2) <= 6000
    assert "load 1.21" in proposal.reason
    assert "Nested WAIT is infeasible" in proposal.reason
    assert "no type is held" in proposal.reason
    assert f"cap {cap} from memory" in proposal.reason


def test_overload_with_declared_lengths_holds_no_type() -> None:
    small = replace(LIMITS, kv_capacity_tokens=6000)
    lengths = [(58, 147), (100, 50)]
    proposal = proposal_for(SyntheticEngine(limits=small), WAIT, lengths, every_s=1 / 128, declared=True)
    assert [entry.n for entry in proposal.thresholds.types] == [None, None]
    assert "WAIT is infeasible" in proposal.reason
    assert proposal.thresholds.max_running is not None


def test_configured_thresholds_above_the_cap_do_not_stop_tuning() -> None:
    small = replace(LIMITS, kv_capacity_tokens=2000)
    configured = Thresholds(policy="wait", types=(TypeThreshold(name="all", n=100),))
    engine = SyntheticEngine(configured, limits=small)
    proposal = proposal_for(engine, configured, [(58, 147)], every_s=0.5)
    assert proposal.thresholds.max_running is not None
    assert proposal.thresholds.max_running < 100


_LENGTH = st.integers(1, 300) | st.integers(300, 200_000)
_ARRIVAL = st.tuples(st.integers(1, 4000), _LENGTH, st.booleans())


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    policy=st.sampled_from(["fcfs", "wait", "nested_wait"]),
    arrivals=st.lists(_ARRIVAL, min_size=1, max_size=12),
    every_s=st.sampled_from([0.01, 0.1, 1.0]),
    slots=st.integers(1, 2000),
    blocks=st.integers(1, 60_000),
    block_tokens=st.sampled_from([1, 16, 128]),
    configured_n=st.integers(0, 3),
)
def test_an_engine_accepts_every_proposal(
    policy: str, arrivals: list[tuple[int, int, bool]], every_s: float, slots: int, blocks: int, block_tokens: int,
    configured_n: int,
) -> None:
    limits = EngineLimits(
        kv_capacity_tokens=blocks * block_tokens, block_tokens=block_tokens, max_num_seqs=slots,
        max_num_batched_tokens=2048, max_model_len=300_000,
    )
    types = (TypeThreshold(name="all", n=configured_n),) if configured_n else ()
    configured = Thresholds(policy=policy, types=types)
    model = model_of(configured, min_finished=1)
    engine = SyntheticEngine(limits=limits)
    for prompt, output, declared in itertools.chain.from_iterable(itertools.repeat(arrivals, 3)):
        engine.traffic([(prompt, output)], every_s=every_s, seconds=every_s, declared=declared)
    model.observe(engine.report())
    proposal = model.propose()

    assert proposal.equilibrium is not None
    proposal.thresholds.check_fits(limits)
    assert parse_thresholds(thresholds_as_dict(proposal.thresholds)) == proposal.thresholds
    assert proposal.thresholds.max_running is not None
    assert proposal.reason
    if proposal.thresholds.types:
        assert proposal.thresholds.types[-1].max_output_tokens is None


def nested(*counts: int, cap: int | None = 100, first_end: int = 32, **changes: Any) -> Thresholds:
    segments = tuple(
        SegmentThreshold(end_output_tokens=first_end * (index + 1), total=total) for index, total in enumerate(counts)
    )
    return Thresholds(policy="nested_wait", segments=segments, max_running=cap, **changes)


def longest(end: int) -> Thresholds:
    ends = (SegmentThreshold(end_output_tokens=32, total=50), SegmentThreshold(end_output_tokens=end, total=20))
    return Thresholds(policy="nested_wait", segments=ends, max_running=100)


@pytest.mark.parametrize(
    ("proposed", "active", "different"),
    [
        (nested(50, 20), nested(50, 20), False),
        (nested(50, 20), nested(50, 20, version=7, valid_for_s=5.0, reason="other"), False),
        (nested(55, 20), nested(50, 20), False),  # a tenth
        (nested(56, 20), nested(50, 20), True),
        (nested(45, 20), nested(50, 20), False),
        (nested(44, 20), nested(50, 20), True),
        (nested(4, 3), nested(5, 2), False),  # one, where a tenth is less
        (nested(5, 1), nested(5, 3), True),
        (nested(50, 20, cap=110), nested(50, 20, cap=100), False),
        (nested(50, 20, cap=111), nested(50, 20, cap=100), True),
        (nested(50), nested(50, 20), True),
        (nested(50, 20, first_end=48), nested(50, 20), True),
        (longest(68), longest(64), False),  # a new longest answer: no request waits at the last end
        (longest(80), longest(64), True),
        (nested(50, 20, max_hold_s=0.5), nested(50, 20), True),
        (nested(50, 20, cap=None), nested(50, 20), True),
        (Thresholds(max_running=1), Thresholds(), True),
        (Thresholds(), Thresholds(max_running=1), True),
        (Thresholds(policy="wait"), Thresholds(), True),
        (Thresholds(policy="wait", types=(TypeThreshold(name="a", n=None),)),
         Thresholds(policy="wait", types=(TypeThreshold(name="a", n=1),)), True),
    ],
)
def test_only_changes_beyond_noise_are_material(proposed: Thresholds, active: Thresholds, different: bool) -> None:
    assert materially_different(proposed, active) is different


PARAMS = FluidParams(
    time_model=IterationTimeModel(0.004, 4e-7, 6e-5, 6e-5, 0.011), survival=Survival(((0, 1.0), (99, 1.0), (100, 0.0))),
    kv_limit_tokens=100_000, iteration_s=0.05, ttft_s=2.0, queue_limit=20, prompt_flow_tokens=200.0,
)


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, False), ({"iteration_s": 0.052}, False), ({"iteration_s": 0.053}, True), ({"iteration_s": None}, True),
        ({"queue_limit": 22}, False), ({"queue_limit": 23}, True), ({"queue_limit": None}, True),
        ({"prompt_flow_tokens": 219.0}, False), ({"prompt_flow_tokens": 221.0}, True),
        ({"time_model": replace(PARAMS.time_model, d1_s_per_kv_token=4.2e-7)}, False),
        ({"time_model": replace(PARAMS.time_model, d1_s_per_kv_token=5e-7)}, True),
        ({"survival": Survival(((0, 1.0), (50, 0.96), (99, 0.96), (100, 0.0)))}, False),
        ({"survival": Survival(((0, 1.0), (50, 0.9), (99, 0.9), (100, 0.0)))}, True),
        ({"ttft_s": 2.5}, True), ({"kv_limit_tokens": 99_000}, True),
    ],
)
def test_fluid_parameters_are_left_alone_while_they_hardly_differ(changes: dict[str, Any], different: bool) -> None:
    new, old = (Thresholds(policy="fluid", fluid=params) for params in (replace(PARAMS, **changes), PARAMS))
    assert materially_different(new, old) is different


def test_rates_that_move_within_a_period_count_with_their_worst_window() -> None:
    engine, model = SyntheticEngine(NESTED), model_of(NESTED)
    model.observe(engine.report())
    for every_s in (1 / 32,) * 6 + (1 / 8,):  # six periods at 32 requests/s, then one at 8
        engine.traffic([(58, 147)], every_s=every_s, seconds=5.0)
        model.observe(engine.report(model.cursor))
    moving = model.propose()
    assert moving.equilibrium is not None
    assert "rates move, the worst of 2 stretches counts" in moving.reason
    engine.traffic([(58, 147)], every_s=1 / 8, seconds=5.0)
    model.observe(engine.report(model.cursor))
    settled = model.propose()
    assert "rates move" not in settled.reason, "a single step is none"
    before, after = (proposal.thresholds.segments[0] for proposal in (moving, settled))
    assert before.total / before.end_output_tokens > 2 * after.total / after.end_output_tokens


CHANGED: dict[str, Any] = {
    "time_model": replace(PARAMS.time_model, d2_s_per_prefill_token=2e-4),
    "survival": Survival(((0, 1.0), (50, 1.0), (51, 0.0))),
    "kv_limit_tokens": 99_984, "block_tokens": 32, "overflow_z": 1.64, "miss_probability": 0.05, "iteration_s": 0.054,
    "tpot_s": 0.06, "ttft_s": 2.1, "latency_s": 30.0, "first_token_within_s": 1.5, "delivery_s": 0.2, "queue_limit": 23,
    "prompt_flow_tokens": 230.0, "capacity_rps": 2.0, "steady_s": 0.03, "variability": 1.2, "tokens_per_step": 1.2,
    "computed_per_step": 1.2, "pipeline_depth": 2, "cold": True,
}
"""For each fluid parameter, a value that changes an engine's decisions."""


def test_every_fluid_parameter_has_a_tolerance_and_a_change_that_exceeds_it() -> None:
    """A new field fails here until it is decided what change of it matters."""
    names = {field.name for field in fields(FluidParams)}
    assert set(FLUID_TOLERANCES) == names
    assert set(CHANGED) == names


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_of_any_field_that_matters_is_pushed(name: str) -> None:
    new, old = (
        Thresholds(policy="fluid", fluid=params) for params in (replace(PARAMS, **{name: CHANGED[name]}), PARAMS)
    )
    assert materially_different(new, old)


@pytest.mark.parametrize("field", ["d0_s", "d1_s_per_kv_token", "d2_s_per_prefill_token", "d3_s_per_decode_token"])
def test_the_time_model_matters_without_a_planned_iteration_time_too(field: str) -> None:
    """Without a TPOT target no flow of prompts is known."""
    params = replace(
        PARAMS, iteration_s=None, prompt_flow_tokens=0.0, time_model=replace(PARAMS.time_model, floor_s=0.0)
    )
    time_model = replace(params.time_model, **{field: 3 * getattr(params.time_model, field)})
    new, old = (Thresholds(policy="fluid", fluid=one) for one in (replace(params, time_model=time_model), params))
    assert materially_different(new, old)


# Lengths that no request can have.


@pytest.mark.parametrize("digested", [False, True])
@pytest.mark.parametrize(("unfinished", "lengths"), [
    ((2500, 2400), [(58, 147)]),
    ((4000, 0), [(58, 147), (58, 2500)]),
], ids=["a long answer goes on", "a class of prompts without an answer yet"])
def test_an_estimate_that_no_engine_could_hold_does_not_make_its_capacity_nothing(
    unfinished: tuple[int, int], lengths: list[tuple[int, int]], digested: bool
) -> None:
    """Twice its age, or with the answers of other prompts, it would be longer than the context and the KV cache."""
    configured = Thresholds(policy="fluid")
    engine = SyntheticEngine(configured, replace(LIMITS, kv_capacity_tokens=6000))
    model = model_of(configured, targets=Slo(ttft_s=3.0, tpot_s=0.08))
    engine.traffic(lengths, every_s=0.25, seconds=30)
    engine.arrive(unfinished[0])
    report = replace(engine.report(), running=(RunningLengths(*unfinished),))
    model.observe(report)
    if digested:
        digest, model = model.digest(), model_of(configured, targets=Slo(ttft_s=3.0, tpot_s=0.08))
        model.observe(replace(report, digest=digest, iterations=(), arrivals=(), finished=(), running=()))
    proposal = model.propose()
    assert proposal.thresholds.fluid is not None and proposal.thresholds.fluid.capacity_rps > 0.2
    assert model.estimates.lengths.max_total_tokens <= 4096
    assert "exceeds the KV capacity" not in str(proposal.equilibrium)


def test_declared_lengths_that_do_not_fit_are_planned_for_as_what_they_can_come_to() -> None:
    engine, model = SyntheticEngine(WAIT, replace(LIMITS, kv_capacity_tokens=6000)), model_of(WAIT)
    engine.traffic([(58, 147)], every_s=0.25, seconds=30, declared=True)
    engine.arrive(2500, declared=10**9)
    model.observe(engine.report())
    proposal = model.propose()
    assert proposal.equilibrium is not None and proposal.equilibrium.critical_rate_scale > 0


# What clients got, as the replica saw it leave.


def with_targets(**targets: float) -> tuple[SyntheticEngine, ReplicaModel]:
    """A replica under `fluid` with targets, and a model that knows its lengths."""
    configured = Thresholds(policy="fluid")
    engine, model = SyntheticEngine(configured), model_of(configured, targets=Slo(**targets))
    engine.traffic([(58, 147)], every_s=0.25, seconds=30)
    model.observe(engine.report())
    thresholds = model.propose().thresholds
    assert thresholds.fluid is not None and not thresholds.fluid.cold
    assert engine.active.offer(Apply(thresholds=thresholds)).accepted
    return engine, model


def params_after(engine: SyntheticEngine, model: ReplicaModel, delivered: list[Delivered]) -> FluidParams:
    model.observe(replace(engine.report(model.cursor), delivered=tuple(delivered)))
    params = model.propose().thresholds.fluid
    assert params is not None
    return params


def test_what_clients_got_sets_the_margin_and_not_what_the_engine_saw() -> None:
    engine, model = with_targets(tpot_s=0.08)
    before = engine.active.current().thresholds.fluid
    assert before is not None and before.token_s is not None
    for _ in range(400):
        engine.finish(58, 147, tpot_s=before.token_s)
    late = [Delivered(seq, None, 1.2 * before.token_s) for seq in range(1, 401)]
    after = params_after(engine, model, late)
    assert after.token_s == pytest.approx(0.08 / 1.2)
    again = params_after(engine, model, late)
    assert again == after, "answers seen before change nothing"


def test_without_a_replica_that_tells_the_engine_s_times_count() -> None:
    engine, model = with_targets(tpot_s=0.08)
    before = engine.active.current().thresholds.fluid
    assert before is not None and before.token_s is not None
    for _ in range(400):
        engine.finish(58, 147, tpot_s=1.1 * before.token_s)
    assert params_after(engine, model, []).token_s == pytest.approx(0.08 / 1.1)


@pytest.mark.parametrize(("delay_s", "left_s"), [(0.2, 1.8), (30.0, 1.0)], ids=["measured", "bounded"])
def test_first_tokens_are_due_as_much_earlier_as_they_take_to_leave(delay_s: float, left_s: float) -> None:
    engine, model = with_targets(ttft_s=2.0, tpot_s=0.08)
    few = [Delivered(seq, delay_s, None) for seq in range(1, 300)]
    assert params_after(engine, model, few).first_token_limit_s == 2.0, "few answers say nothing"
    more = [Delivered(seq, delay_s, None) for seq in range(300, 401)]
    params = params_after(engine, model, more)
    assert (params.first_token_limit_s, params.ttft_s) == (pytest.approx(left_s), 2.0)
    assert params.delivery_s == pytest.approx(2.0 - left_s)


def test_a_change_of_speed_does_not_make_the_margin_forget() -> None:
    """At permanently varying speed, each change would otherwise reset the count too early."""
    engine, model = with_targets(tpot_s=0.08)
    before = engine.active.current().thresholds.fluid
    assert before is not None and before.token_s is not None
    for factor in (2.0, 0.5, 2.0, 0.5):
        for _ in range(100):
            engine.finish(58, 147, tpot_s=1.2 * before.token_s)
        changes, seconds = model.time_model.changes, factor * model.time_model.time_model.iteration_s(0, 10, 1000)
        for _ in range(60):
            engine.iterate(0, 10, 1000, seconds)
        model.observe(engine.report(model.cursor))
        assert model.time_model.changes > changes
    params = model.propose().thresholds.fluid
    assert params is not None and params.token_s is not None and params.token_s <= 0.08 / 1.2 * (1 + 1e-9)
