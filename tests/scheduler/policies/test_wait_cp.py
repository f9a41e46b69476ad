"""`wait_cp`: caps on segments, entries by rotation, the wait gate, the token gate, and chunks on vLLM's scheduler."""

import math
import random
from dataclasses import dataclass

import pytest

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.policies import UNKNOWN_TYPE, QueueView, RunningBatch, Snapshot, make_policy
from scheduler.policies.wait_cp import token_gate
from scheduler.thresholds import EngineLimits, InvalidThresholds, SegmentThreshold, Thresholds, parse_thresholds
from scheduler.tuning.solve import tune_by_cap, tune_counts

STEP_S = 1 / 64
TIME_MODEL = IterationTimeModel(d0_s=0.011, d1_s_per_kv_token=4e-7)
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096
)


@dataclass
class RunningRequest:
    request_id: str
    stage: int
    tokens_in_flight: int = 0
    type_name: str = UNKNOWN_TYPE
    kv_tokens: int = 0


def thresholds(*ends_and_totals, **fields):
    segments = tuple(SegmentThreshold(end_output_tokens=end, total=total) for end, total in ends_and_totals)
    return Thresholds(policy="wait_cp", segments=segments, **{"max_hold_s": 60.0} | fields)


def snapshot(running, waiting=0, *, now_s=0.0, since_s=0.0):
    views = {UNKNOWN_TYPE: QueueView(waiting, since_s)} if waiting else {}
    return Snapshot(
        now_s=now_s, waiting=views, released=0, running=RunningBatch(running), kv_used_tokens=0, kv_capacity_tokens=4096
    )


def at(*stages):
    return [RunningRequest(f"{place}@{stage}", stage) for place, stage in enumerate(stages)]


def decide(policy, *args, **fields):
    decision = policy.decide(snapshot(*args, **fields))
    return decision.admit.get(UNKNOWN_TYPE, 0), set(decision.sit_out)


@pytest.mark.parametrize(
    ("cap", "chunks", "output", "chunk_tokens", "tokens"),
    [(21, 2, 20, 256, 508), (20, 2, 20, 256, 484), (30, 4, 29, 128, 492), (120, 2, 1000, 256, 182)],
)
def test_token_gate_is_the_experiments_formula(cap, chunks, output, chunk_tokens, tokens):
    per_stage = cap / (chunks + output)
    by_hand = math.ceil((cap - per_stage * chunks) + per_stage * chunks * chunk_tokens)
    admission_queue = token_gate(cap, prefill_chunks=chunks, output_tokens=output, chunk_tokens=chunk_tokens)
    assert admission_queue == by_hand == tokens


class Run:
    """Requests of random lengths go through a policy, one token an iteration."""

    def __init__(self, values, seed, per_step=2, longest=12):
        self.policy, self.rng = make_policy(values), random.Random(seed)
        self.running, self.output, self.waiting, self.now_s = [], {}, 0, 0.0
        self.per_step, self.longest, self.entered = per_step, longest, []

    def step(self, *, arrivals=True):
        self.waiting += self.rng.randint(0, self.per_step) if arrivals else 0
        decision = self.policy.decide(snapshot(self.running, self.waiting, now_s=self.now_s, since_s=-100.0))
        entering = decision.admit.get(UNKNOWN_TYPE, 0)
        assert entering <= self.waiting
        self.waiting -= entering
        self.entered.append(entering)
        for _ in range(entering):
            name = f"r{len(self.output)}"
            self.output[name] = self.rng.randint(1, self.longest)
            self.running.append(RunningRequest(name, 0))
        for request in self.running:
            request.stage += request.request_id not in decision.sit_out
        self.running = [one for one in self.running if one.stage < self.output[one.request_id]]
        self.now_s += STEP_S
        return decision

    def inside(self, start, end):
        return sum(start < one.stage < end for one in self.running)


@pytest.mark.parametrize("mode", ["strict", "serving"])
@pytest.mark.parametrize("wait_gate", [True, False])
def test_no_segment_ever_holds_more_than_its_cap_nor_takes_more_than_its_share(mode, wait_gate):
    for seed in range(5):
        run = Run(thresholds((4, 6), (8, 5), (12, 3), mode=mode, wait_gate=wait_gate, max_running=40), seed)
        most = [0, 0, 0]
        for _ in range(300):
            run.step()
            for index, (start, end, cap) in enumerate(((-1, 4, 6), (4, 8, 5), (8, 13, 3))):
                assert run.inside(start, end) <= cap, (index, seed)
                most[index] = max(most[index], run.inside(start, end))
            assert len(run.running) <= 40
        assert most[0] >= 3 and most[1] >= 2 and most[2] >= 1, "the caps were of concern"
        assert max(sum(run.entered[first : first + 4]) for first in range(296)) <= 6, "6 in any 4 iterations"


def test_the_cap_on_running_requests_is_never_exceeded():
    run = Run(thresholds((4, 28), (12, 56), max_running=7, wait_gate=False), seed=1, per_step=9)
    for _ in range(200):
        run.step()
        assert len(run.running) <= 7


def test_entries_are_spread_over_the_iterations():
    policy = make_policy(thresholds((20, 21), max_running=21))
    entries = [decide(policy, [], waiting=9)[0] for _ in range(20)]
    assert sorted(entries) == [1] * 19 + [2], "21 over 20 stages"


def test_the_wait_gate_holds_a_boundary_until_as_many_stand_there_as_may_enter():
    on, off = (make_policy(thresholds((4, 8), (8, 8), wait_gate=admission_queue)) for admission_queue in (True, False))
    assert decide(on, at(2, 4))[1] == {"1@4"}, "one of two"
    assert decide(off, at(2, 4))[1] == set()
    assert decide(on, at(2, 4, 4))[1] == set()


def test_the_wait_gate_opens_when_the_segment_is_full():
    policy = make_policy(thresholds((4, 8), (8, 8)))
    assert decide(policy, at(4, 5, 5, 6, 6, 7, 7))[1] == {"0@4"}, "seven of eight, and one where two may enter"
    policy = make_policy(thresholds((4, 8), (8, 8)))
    assert decide(policy, at(4, 5, 5, 6, 6, 7, 7, 7))[1] == set(), "open, with room for one"
    policy = make_policy(thresholds((4, 8), (8, 8), mode="strict"))
    assert "1@5" not in decide(policy, at(4, 5, 5, 6, 6, 7, 7, 7))[1], "a full segment moves on in strict mode"


def test_the_wait_gate_of_the_entry_holds_a_group_within_max_hold_s():
    policy = make_policy(thresholds((4, 12), max_hold_s=1.0))
    assert decide(policy, at(1), waiting=2) == (0, set())
    assert decide(policy, at(1), waiting=3) == (3, set())
    assert decide(policy, at(1), waiting=2, now_s=1.0) == (2, set()), "its hold is over"
    assert decide(policy, [], waiting=1)[0] == 1, "an idle engine takes what is there"
    assert decide(make_policy(thresholds((4, 12), wait_gate=False)), at(1), waiting=2)[0] == 2


def test_each_segment_is_judged_alone():
    for mode in ("strict", "serving"):
        policy = make_policy(thresholds((4, 8), (8, 4), mode=mode))
        assert "1@4" not in decide(policy, at(2, 4))[1], "segment 1 waits, segment 2 goes on"


def test_a_closed_wait_gate_stops_the_segment_in_strict_mode_and_never_in_serving():
    strict, serving = (make_policy(thresholds((4, 8), (8, 8), mode=mode)) for mode in ("strict", "serving"))
    running = at(0, 1, 3, 4, 6)
    assert decide(strict, running, waiting=0)[1] == {"1@1", "2@3", "3@4", "4@6"}, "but prompts in progress go on"
    assert decide(serving, running, waiting=0)[1] == {"3@4"}


def test_a_hold_at_a_boundary_is_bounded_in_serving_whatever_the_cap_says():
    policy = make_policy(thresholds((4, 8), (8, 2), max_hold_s=0.5))
    running = at(4, 5, 6)
    assert decide(policy, running)[1] == {"0@4"}, "the segment is full"
    assert decide(policy, running, now_s=0.4)[1] == {"0@4"}
    assert decide(policy, running, now_s=0.5)[1] == set()


def test_a_boundary_token_in_flight_does_not_count_yet():
    policy = make_policy(thresholds((4, 8), (8, 4)))
    running = [*at(2), RunningRequest("coming", 4, tokens_in_flight=1)]
    assert decide(policy, running)[1] == {"coming"}
    assert decide(policy, [*at(2), RunningRequest("coming", 4)])[1] == set()


@pytest.mark.parametrize("seed", range(4))
def test_serving_starves_no_request(seed):
    run = Run(thresholds((3, 2), (7, 1), (9, 1), max_hold_s=4 * STEP_S, max_running=5), seed)
    for _ in range(60):
        run.step()
    for _ in range(3000):
        if not run.running and not run.waiting:
            break
        run.step(arrivals=False)
    assert not run.running and not run.waiting


def test_without_segments_it_is_a_cap_alone():
    policy = make_policy(thresholds(max_running=3))
    assert decide(policy, at(1), waiting=9) == (2, set())


def one_type(prompt, output, rate_rps=20.0):
    return WorkloadMix((RequestType(UNKNOWN_TYPE, rate_rps, Lengths.point(prompt, output)),))


def test_parameters_follow_from_the_cap_as_in_the_experiments():
    tuned = tune_by_cap(Thresholds(policy="wait_cp", prefill_chunk_tokens=256), one_type(512, 20), 21)
    assert [(one.end_output_tokens, one.total) for one in tuned.segments] == [(20, 21)]
    assert (tuned.max_running, tuned.token_budget, tuned.prefill_chunk_tokens) == (21, 508, 256)
    without = tune_by_cap(Thresholds(policy="wait_cp"), one_type(512, 20), 21)
    assert without.token_budget is None, "without chunks there is no token gate"


@pytest.mark.parametrize(("cap", "budget"), [(21, 508), (None, None)])
def test_the_controller_keeps_to_the_operators_cap_and_else_to_what_memory_holds(cap, budget):
    configured = Thresholds(policy="wait_cp", prefill_chunk_tokens=256, max_running=cap)
    tuned, _ = tune_counts(configured, one_type(512, 20), TIME_MODEL, LIMITS, overflow_probability=0.01)
    tuned.check_fits(LIMITS)
    assert tuned.token_budget == budget, "a token gate beyond the engine's own limit is none"
    assert tuned.max_running == (cap or tuned.segments[-1].total) and tuned.segments[-1].end_output_tokens == 20


def test_names_and_fields_as_they_are_typed():
    assert parse_thresholds({"policy": "wait-cp", "prefill_chunk_tokens": 256, "wait_gate": False}).policy == "wait_cp"
    assert parse_thresholds('{"policy": "nested-wait"}').policy == "nested_wait"
    for fields in ({"prefill_chunk_tokens": 0}, {"wait_gate": "no"}, {"policy": "wait-c"}):
        with pytest.raises(InvalidThresholds, match=next(iter(fields))):
            parse_thresholds(fields)
