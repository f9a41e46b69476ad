"""`fluid` as a pure object: admissions, the tokens of an iteration, rejections."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.fluid_params import FluidParams
from scheduler.messages import Iteration
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths
from scheduler.policies import UNKNOWN_TYPE, QueueView, RunningBatch, RunningRequest, Snapshot, Waiting, make_policy
from scheduler.survival import Survival
from scheduler.thresholds import Thresholds

TIME_MODEL = IterationTimeModel(0.004, 4e-7, 6e-5, 6e-5, 0.011)
PARAMS = FluidParams(
    time_model=TIME_MODEL,
    survival=Survival.of(Lengths.point(500, 100)),
    kv_limit_tokens=100_000,
    iteration_s=0.05,
    ttft_s=2.0,
    queue_limit=5,
    prompt_flow_tokens=200.0,
)


def crowd(count: int, stage: int = 50) -> list[RunningRequest]:
    return [RunningRequest(f"r{number}", stage=stage, kv_tokens=500 + stage) for number in range(count)]


def snapshot(running=(), waiting=(), *, now_s=0.0, backlog=0):
    heads = [Waiting(prompt, since_s, f"w{place}") for place, (prompt, since_s) in enumerate(waiting)]
    aged = sorted(heads, key=lambda each: each.since_s)
    view = aged and QueueView(
        len(heads), aged[0].since_s, lambda: iter(heads), lambda: iter(aged), lambda: reversed(heads),
        sum(each.tokens_to_compute for each in heads),
    )
    views = {UNKNOWN_TYPE: view} if view else {}
    return Snapshot(
        now_s=now_s, waiting=views, released=0, running=RunningBatch(running), prompt_backlog_tokens=backlog,
        kv_used_tokens=sum(request.kv_tokens for request in running), kv_capacity_tokens=100_000, most_tokens=2048,
    )


def decide(*args, fluid=PARAMS, policy=None, **fields):
    return (policy or make_policy(Thresholds(policy="fluid", fluid=fluid))).decide(snapshot(*args, **fields))


def entering(decision):
    return decision.admit.get(UNKNOWN_TYPE, 0)


def test_an_idle_replica_admits_at_once():
    assert entering(decide((), [(500, 0.0)])) == 1
    hopeless = replace(PARAMS, kv_limit_tokens=1)
    assert entering(decide((), [(500, 0.0)], fluid=hopeless)) == 1  # alone it harms no other request


SLOW_STEPS = replace(
    PARAMS, time_model=IterationTimeModel(0.05, 0.0, 2e-3, 1e-2, 0.0), iteration_s=1.9, tpot_s=2.0, ttft_s=5.0,
    prompt_flow_tokens=60.0, capacity_rps=1.0, queue_limit=None,
)
"""A TTFT target of less than three planned iterations."""


def test_an_idle_replica_serves_a_prompt_that_has_time_although_full_iterations_would_be_too_long():
    decision = decide((), [(100, 0.0)], fluid=SLOW_STEPS)  # 0.25 s alone
    assert entering(decision) == 1 and not decision.reject
    busy = decide(crowd(150), [(100, 0.0)], fluid=SLOW_STEPS)
    assert busy.reject == {"w0"}


def test_a_model_that_calls_every_request_late_is_tried_again_once_an_idle_replica_has_waited():
    wrong = replace(PARAMS, time_model=IterationTimeModel(0.004, 4e-7, 6e-2, 6e-5, 0.011), iteration_s=None)
    policy = make_policy(Thresholds(policy="fluid", fluid=wrong))
    waiting = [(500, 10.0)]  # 30 s by this model
    assert decide((), waiting, policy=policy, now_s=10.0).reject == {"w0"}
    assert decide((), [(500, 11.0)], policy=policy, now_s=11.0).reject == {"w0"}
    tried = decide((), [(500, 12.1), (500, 12.1)], policy=policy, now_s=12.1)
    assert entering(tried) == 1 and tried.reject == {"w1"}


def test_a_plan_under_which_a_single_request_could_not_run_is_no_plan():
    with pytest.raises(ValueError, match="single request"):
        replace(PARAMS, iteration_s=0.0012)


def test_at_light_load_every_request_whose_prompt_has_time_enters():
    assert entering(decide(crowd(5), [(200, 0.0)] * 3)) == 3
    assert decide(crowd(5), [(200, 0.0)] * 3).reject_last == 0


def test_an_iteration_never_computes_more_than_its_time_allows():
    for count in (1, 20, 60):
        running = crowd(count)
        budget = decide(running).token_budget
        prompts = budget - count
        kv = sum(request.kv_tokens for request in running)
        assert TIME_MODEL.iteration_s(prompts, count, kv + prompts) <= PARAMS.iteration_s * (1 + 1e-9)
    assert decide(crowd(300)).token_budget == 300 + 16  # all decodes, and prompts under way still progress


def test_prompts_get_on_without_taking_the_time_of_the_decodes_where_each_token_is_slow():
    """On a CPU 16 prompt tokens take 63 ms; a twentieth of this iteration is time for two."""
    cpu = IterationTimeModel(0.0715, 1.17e-5, 0.00395, 0.00524)
    budget = decide(crowd(30), fluid=replace(PARAMS, time_model=cpu, iteration_s=0.2)).token_budget
    assert budget == 30 + 2


def test_an_engine_slower_than_its_margin_allows_is_held_to_the_target_at_once():
    """The margin is a fifth: an engine a tenth slower than its model has the planned time, a slower one less."""
    params = replace(PARAMS, tpot_s=0.06)
    planned = decide(crowd(20), fluid=params).token_budget
    for factor, fewer in ((1.1, False), (1.5, True)):
        policy = make_policy(Thresholds(policy="fluid", fluid=params))
        for seq in range(1, 21):
            latest = Iteration(seq, 0.05 * seq, factor * TIME_MODEL.iteration_s(0, 20, 11_000), 0, 20, 11_000, 20)
            decision = policy.decide(replace(snapshot(crowd(20)), latest=latest))
        assert (decision.token_budget < planned) is fewer
        prompts = decision.token_budget - 20
        assert factor * TIME_MODEL.iteration_s(prompts, 20, 11_000 + prompts) <= params.tpot_s * 1.01


def test_no_request_enters_while_prompts_under_way_fill_the_iteration():
    assert entering(decide(crowd(5), [(200, 0.0)], backlog=10_000)) == 0
    assert entering(decide(crowd(5), [(200, 0.0)], backlog=0)) == 1


def test_a_full_replica_admits_no_request_until_one_leaves():
    policy = make_policy(Thresholds(policy="fluid", fluid=PARAMS))
    full = crowd(170, stage=1)
    assert entering(decide(full, [(500, 0.0)], policy=policy)) == 0
    assert entering(decide(full, [(500, 0.0)], policy=policy)) == 0
    assert entering(decide(crowd(20, stage=1), [(500, 0.0)], policy=policy)) == 1


def test_time_makes_room_too():
    """None has ended, but all are long: they end soon."""
    policy = make_policy(Thresholds(policy="fluid", fluid=replace(PARAMS, iteration_s=None, kv_limit_tokens=30_100)))
    assert entering(decide(crowd(48, stage=1), [(500, 0.0)], policy=policy)) == 0
    later = [entering(decide(crowd(48, stage=98), [(300, 0.0)], policy=policy)) for _ in range(9)]
    assert max(later) == 1


def test_a_late_request_is_rejected_and_the_next_one_enters():
    decision = decide(crowd(5), [(500, 0.0), (500, 0.1), (500, 2.5)], now_s=2.6)
    assert (set(decision.reject), entering(decision)) == ({"w0", "w1"}, 1)


def test_a_long_prompt_is_late_earlier():
    fits = decide(crowd(60), [(100, 0.0)], now_s=1.7)
    too_long = decide(crowd(60), [(40_000, 0.0)], now_s=1.7)
    assert (len(fits.reject), len(too_long.reject)) == (0, 1)


def test_late_requests_are_rejected_wherever_the_turn_order_puts_them():
    """With tenants or priorities the oldest need not be at the head."""
    decision = decide(crowd(5), [(200, 2.5), (200, 0.0), (200, 2.5)], now_s=2.6)
    assert (set(decision.reject), entering(decision)) == ({"w1"}, 2)


def test_rejections_carry_the_queue_drain_time():
    params = replace(PARAMS, capacity_rps=3.0)
    decision = decide(crowd(170, stage=1), [(500, 0.0)] * 9, fluid=params)
    assert decision.reject_last and decision.drain_s == (9 - decision.reject_last) / 3, "of those that stay"
    assert decide(crowd(170, stage=1), [(500, 0.0)] * 9).drain_s == 0.0  # not known


def test_the_tail_beyond_the_queue_limit_is_rejected():
    decision = decide(crowd(170, stage=1), [(500, 0.0)] * 9)
    assert (entering(decision), len(decision.reject), decision.reject_last) == (0, 0, 4)


@pytest.mark.parametrize("late", [
    [(5000, 0.0)] * 5,
    [(500, 0.0)] * 40,
])
@pytest.mark.parametrize("last", [True, False])
def test_requests_that_are_rejected_as_late_make_no_other_late(late, last):
    """Wherever they stand: at the tail by their priority, or in front after a stall."""
    params, good = replace(PARAMS, queue_limit=None, capacity_rps=20.0), [(100, 2.5)] * 6
    alone = decide(crowd(170, stage=1), good, fluid=params, now_s=2.6)
    decision = decide(crowd(170, stage=1), [*good, *late] if last else [*late, *good], fluid=params, now_s=2.6)
    assert (len(decision.reject), decision.reject_last, entering(decision)) == (len(late), 0, 0)
    assert (decision.drain_s, decision.room()) == (alone.drain_s, alone.room())
    assert decision.outlook(0, False) == alone.outlook(0, False)


def test_without_targets_no_request_is_rejected_and_no_budget_is_set():
    free = replace(PARAMS, iteration_s=None, ttft_s=None, queue_limit=None)
    decision = decide(crowd(400, stage=1), [(500, 0.0)] * 50, fluid=free, now_s=1000.0)
    assert (len(decision.reject), decision.reject_last, decision.token_budget) == (0, 0, None)
    assert entering(decision) == 0


def test_without_fluid_parameters_every_request_is_admitted():
    decision = decide(crowd(400), [(500, 0.0)] * 50, fluid=None)
    assert (len(decision.reject), decision.reject_last, decision.token_budget) == (0, 0, None)
    assert entering(decision) == 50


def test_the_cap_holds_as_well():
    policy = make_policy(Thresholds(policy="fluid", fluid=PARAMS, max_running=6))
    assert entering(decide(crowd(5), [(100, 0.0)] * 3, policy=policy)) == 1


@pytest.mark.parametrize("bad", [{"kv_limit_tokens": 0}, {"iteration_s": 0.0}])
def test_invalid_fluid_parameters_raise(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(PARAMS, **bad)


def test_the_last_prompts_may_use_more_slack_than_the_first_of_many():
    """Two requests without slack, of which one in 200 ends with each token: a prompt that nothing follows may cost more
    than one behind which others wait, which will want the slack as well."""
    lengths = Lengths.from_pairs([(500, tokens) for tokens in range(1, 201)])
    params = replace(PARAMS, survival=Survival.of(lengths), tpot_s=0.055, steady_s=0.02, miss_probability=0.007)

    def budget(backlog):
        policy = make_policy(Thresholds(policy="fluid", fluid=params))
        for seq in range(1, 200):  # as short as iterations of few requests are
            quick = Iteration(seq, 0.012 * seq, 0.012, 0, 2, 1002, 2)
            policy.decide(replace(snapshot(crowd(2)), latest=quick))
        return decide(crowd(2, stage=1), backlog=backlog, policy=policy, now_s=10.0).token_budget

    assert budget(4100) < budget(4000) == 2048
