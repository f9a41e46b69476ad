"""The one rule from a workload to thresholds, called as the controller and the simulator call it."""

from dataclasses import replace

import pytest

from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.wait_thresholds import running_cap
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.thresholds import (
    UNKNOWN_TYPE,
    EngineLimits,
    SegmentThreshold,
    Thresholds,
    TypeThreshold,
    parse_thresholds,
    thresholds_as_dict,
)
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import MOST_TYPES, cold_thresholds, mix_by_length, tune_by_cap, tune_counts

TIME_MODEL = IterationTimeModel(d0_s=0.0112, d1_s_per_kv_token=4.24e-7)
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=2048, max_num_batched_tokens=2048, max_model_len=4096
)
SMALL = replace(LIMITS, kv_capacity_tokens=6000)


def undeclared(*pairs, rate_rps=10.0):
    return mix_by_length([], len(pairs), Lengths.from_pairs(pairs), rate_rps=rate_rps, longest=4096)


def declared(*pairs, rate_rps=10.0, longest=4096):
    return mix_by_length(list(pairs), 0, None, rate_rps=rate_rps, longest=longest)


def solved(policy, mix, limits=LIMITS, overflow_probability=0.01, **configured):
    return tune_counts(
        Thresholds(policy=policy, **configured), mix, TIME_MODEL, limits, overflow_probability=overflow_probability
    )


def tuned(*args, **fields):
    return solved(*args, **fields)[0]


# tune_counts


@pytest.mark.parametrize("policy", ["fcfs", "wait", "nested_wait"])
def test_the_cap_is_what_memory_holds_whatever_the_policy(policy):
    mix = undeclared((58, 147), (500, 300))
    thresholds, equilibrium = solved(policy, mix)
    cap = running_cap(mix, LIMITS.kv_capacity_tokens, overflow_probability=0.01)
    assert 1 < cap < LIMITS.slots
    assert thresholds.max_running == cap
    assert f"cap {cap} from memory" in thresholds.reason
    assert equilibrium == solve_fluid(mix, TIME_MODEL, LIMITS.kv_capacity_tokens)


def test_less_risk_of_overflow_means_a_lower_cap():
    mix = undeclared((58, 147), (500, 300))
    caps = [
        tuned("fcfs", mix, overflow_probability=probability).max_running
        for probability in (0.2, 0.01, 1e-6)
    ]
    assert caps == sorted(caps, reverse=True)
    assert len(set(caps)) == 3


@pytest.mark.parametrize(
    ("limits", "cap"), [(replace(LIMITS, max_num_seqs=7), 7), (replace(LIMITS, kv_capacity_tokens=64), 1)]
)
def test_the_cap_is_at_least_one_and_at_most_the_engine_s_slots(limits, cap):
    assert tuned("fcfs", undeclared((58, 147)), limits).max_running == cap


@pytest.mark.parametrize("policy", ["fcfs", "wait", "nested_wait"])
def test_what_the_operator_configured_otherwise_is_kept(policy):
    result = tuned(policy, declared((58, 147)), max_hold_s=0.75, token_budget=700, mode="strict")
    assert (result.policy, result.max_hold_s, result.token_budget, result.mode) == (policy, 0.75, 700, "strict")


def test_old_counts_give_way_to_solved_ones():
    configured = {
        "types": (TypeThreshold(name="old", n=3),), "segments": (SegmentThreshold(end_output_tokens=5, total=3),),
        "max_running": 3,
    }
    result = tuned("fcfs", undeclared((58, 147)), **configured)
    assert (result.types, result.segments) == ((), ())
    assert result.max_running > 3


def test_declared_lengths_get_types_and_the_last_one_takes_all_that_is_longer():
    roomy = replace(LIMITS, kv_capacity_tokens=2_000_000)
    result = tuned("wait", declared((100, 50), (58, 147), (58, 147), rate_rps=120.0), roomy)
    assert [(t.name, t.max_output_tokens, t.max_prompt_tokens) for t in result.types] == [
        ("output<=50", 50, None), ("output<=147", None, None)
    ]
    short, long = (t.n for t in result.types)
    assert short < long, "twice as many of them arrive"
    assert result.segments == ()
    assert f"WAIT n = {short}, {long}" in result.reason


def test_undeclared_lengths_get_segments():
    outputs = [20, 40, 80, 160]
    roomy = replace(LIMITS, kv_capacity_tokens=2_000_000)
    result = tuned("nested_wait", undeclared(*[(50, n) for n in outputs], rate_rps=150.0), roomy)
    ends, totals = zip(*((s.end_output_tokens, s.total) for s in result.segments), strict=True)
    assert 1 < len(ends) <= 4
    assert set(ends) <= set(outputs), "where lengths are few they are the boundaries"
    assert ends[-1] == max(outputs), "the last one is the longest answer"
    per_stage = [total / (end - start) for total, start, end in zip(totals, (0, *ends), ends, strict=False)]
    assert per_stage == sorted(per_stage, reverse=True)
    assert result.types == ()
    said = ", ".join(f"{n:.3g} to {end}" for n, end in zip(per_stage, ends, strict=True))
    assert f"Nested WAIT n = {said}" in result.reason


def test_counts_never_exceed_the_cap():
    limits = replace(LIMITS, max_num_seqs=3)
    mix = declared((10, 20), (10, 40), rate_rps=1000.0)
    assert min(t.n for t in tuned("wait", mix).types) > 3
    result = tuned("wait", mix, limits)
    assert [t.n for t in result.types] == [3, 3]
    result.check_fits(limits)


def test_a_rate_beyond_memory_leaves_types_unheld_and_says_so():
    for policy, mix, words in (
        ("wait", declared((58, 147), (100, 50), rate_rps=200.0), "WAIT is infeasible"),
        ("nested_wait", undeclared((58, 147), (100, 50), rate_rps=200.0), "Nested WAIT is infeasible"),
    ):
        result, equilibrium = solved(policy, mix, SMALL)
        assert not equilibrium.fits_memory
        assert [t.n for t in result.types] == [None] * (2 if policy == "wait" else 0)
        assert result.segments == ()
        assert f"{words} (" in result.reason
        assert "no type is held" in result.reason
        assert "200.00 requests/s, load " in result.reason
        assert 1 <= result.max_running <= 6000 // 100


def test_the_result_fits_the_engine_and_travels_as_json():
    for policy in ("fcfs", "wait", "nested_wait"):
        for limits in (LIMITS, SMALL):
            result = tuned(policy, declared((58, 147), (100, 50)), limits)
            result.check_fits(limits)
            assert parse_thresholds(thresholds_as_dict(result)) == result


# mix_by_length


def test_few_lengths_are_a_group_each():
    mix = declared((10, 5), (20, 9), (30, 9), rate_rps=6.0)
    assert [(t.name, t.rate_rps, t.lengths) for t in mix.types] == [
        ("output<=5", 2.0, Lengths.point(10, 5)), ("output<=9", 4.0, Lengths.from_pairs([(20, 9), (30, 9)]))
    ]


def test_many_lengths_become_a_few_groups_that_share_them_out():
    pairs = [(10, output) for output in range(1, 401)]
    mix = declared(*pairs, rate_rps=40.0)
    assert 1 < len(mix.types) <= MOST_TYPES
    assert mix.rate_rps == pytest.approx(40.0)
    bounds = [int(t.name.removeprefix("output<=")) for t in mix.types]
    assert bounds == sorted(set(bounds))
    for low, high, t in zip([0, *bounds], bounds, mix.types, strict=False):
        assert t.lengths.output_tokens.min() > low
        assert t.lengths.output_tokens.max() <= high
    assert max(t.rate_rps for t in mix.types) < 25.0, "no group has nearly all"


def test_group_bounds_stay_put_when_lengths_move_a_little():
    def names(shift):
        return [t.name for t in declared(*[(10, output + shift) for output in range(100, 500)]).types]

    assert names(0) == names(3)


def test_undeclared_requests_count_with_the_lengths_of_finished_ones():
    finished = Lengths.from_pairs([(7, 70), (8, 80)])
    mix = mix_by_length([(10, 5)], 3, finished, rate_rps=8.0, longest=4096)
    assert [(t.name, t.rate_rps) for t in mix.types] == [("output<=5", 2.0), (UNKNOWN_TYPE, 6.0)]
    assert mix.types[1].lengths == finished
    result = tuned("wait", mix)
    assert [t.name for t in result.types] == ["output<=5"]
    assert result.types[0].max_output_tokens is None
    assert result.segments[-1].end_output_tokens >= 80


def test_no_request_is_longer_than_the_longest():
    mix = declared((10, 5), (10, 10**30), longest=300)
    assert [(t.name, t.lengths) for t in mix.types] == [
        ("output<=5", Lengths.point(10, 5)), ("output<=300", Lengths.point(10, 290))
    ]


def test_no_requests_and_no_lengths_are_errors():
    with pytest.raises(ValueError, match="declared is empty and unknown is 0"):
        mix_by_length([], 0, Lengths.point(1, 1), rate_rps=1.0, longest=10)
    with pytest.raises(ValueError, match="finished is None"):
        mix_by_length([(1, 1)], 1, None, rate_rps=1.0, longest=10)


def test_types_of_a_mix_keep_their_order_beside_the_unknown():
    mix = WorkloadMix((
        RequestType("output<=50", 1.0, Lengths.point(10, 50)), RequestType(UNKNOWN_TYPE, 1.0, Lengths.point(10, 90)),
        RequestType("output<=99", 1.0, Lengths.point(10, 99)),
    ))
    types = tuned("wait", mix).types
    assert [(t.name, t.max_output_tokens) for t in types] == [("output<=50", 50), ("output<=99", None)]


def test_counts_of_types_follow_from_a_cap_in_proportion_to_their_rates():
    mix = WorkloadMix(
        (RequestType("output<=9", 3.0, Lengths.point(50, 9)), RequestType("output<=19", 1.0, Lengths.point(50, 19)))
    )
    thresholds = tune_by_cap(Thresholds(policy="wait"), mix, 100)  # 10 n_1 + 20 n_2 = 100 with n_1 = 3 n_2
    assert [(t.n, t.max_output_tokens) for t in thresholds.types] == [(6, 9), (2, None)]
    assert thresholds.max_running == 100
    assert [t.n for t in tune_by_cap(Thresholds(policy="wait"), mix.scaled(7.0), 100).types] == [6, 2]
    assert [t.n for t in tune_by_cap(Thresholds(policy="wait"), mix, 3).types] == [1, 1]


def test_counts_of_segments_follow_from_a_cap_and_survival():
    lengths = Lengths.from_pairs([(50, 10), (50, 20)])  # half go on: n_2 = 0.55 n_1, 10 n_1 + 10 n_2 = 310
    mix = WorkloadMix((RequestType(UNKNOWN_TYPE, 5.0, lengths),))
    thresholds = tune_by_cap(Thresholds(policy="nested_wait"), mix, 310)
    assert [(s.end_output_tokens, s.total) for s in thresholds.segments] == [(10, 200), (20, 110)]
    assert thresholds.max_running == 310
    less_than_one_a_stage = tune_by_cap(Thresholds(policy="nested_wait"), mix, 15).segments
    assert [s.total for s in less_than_one_a_stage] == [10, 5]


def test_an_engine_starts_with_parameters_from_profile_and_targets():
    targets = Slo(ttft_s=3.0, tpot_s=0.08)
    cold = cold_thresholds(
        Thresholds(policy="fluid", max_hold_s=0.5), TIME_MODEL, LIMITS, targets, overflow_probability=0.01
    )
    assert cold.max_hold_s == 0.5
    assert cold.fluid is not None
    assert cold.fluid.iteration_s < 0.08  # a model that is not verified yet
    assert cold.fluid.ttft_s == 3.0
    assert cold.fluid.queue_limit is None  # what could be served is a guess
    assert cold.fluid.kv_limit_tokens < LIMITS.kv_capacity_tokens
    cold.check_fits(LIMITS)
    assert parse_thresholds(thresholds_as_dict(cold)) == cold


@pytest.mark.parametrize("policy", ["fcfs", "wait", "nested_wait"])
def test_other_policies_start_as_configured(policy):
    configured = Thresholds(policy=policy)
    assert cold_thresholds(configured, TIME_MODEL, LIMITS, Slo(), overflow_probability=0.01) is configured
