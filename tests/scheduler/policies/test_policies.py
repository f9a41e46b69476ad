"""The policies as pure objects: admissions and pauses, in serving and strict mode."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.model.rotation import stage_limit
from scheduler.policies import UNKNOWN_TYPE, Decision, QueueView, RunningBatch, Snapshot, make_policy
from scheduler.thresholds import SegmentThreshold, Thresholds, TypeThreshold

STEP_S = 1 / 64  # exact in binary: no rounding in sums of steps


@dataclass
class RunningRequest:
    request_id: str
    type_name: str = UNKNOWN_TYPE
    stage: int = 0
    tokens_in_flight: int = 0


def types(**n_by_name):
    return tuple(TypeThreshold(name=name, n=n) for name, n in n_by_name.items())


def segments(*ends_and_n):
    """Segments with whole n_k per stage."""
    starts = (0, *(end for end, _ in ends_and_n))
    return tuple(
        SegmentThreshold(end_output_tokens=end, total=n * (end - start))
        for (end, n), start in zip(ends_and_n, starts, strict=False)
    )


def policy_of(policy, **fields):
    return make_policy(Thresholds(policy=policy, **fields))


def running(*stages, type_name=UNKNOWN_TYPE):
    return [RunningRequest(f"{type_name}-{place}@{stage}", type_name, stage) for place, stage in enumerate(stages)]


def snapshot(*, now_s=0.0, released=0, running=(), **waiting):
    """`waiting` by type: a count, or a pair of a count and since when the oldest waits."""
    views = {}
    for name, view in waiting.items():
        length, since_s = view if isinstance(view, tuple) else (view, now_s)
        if length:
            views[name] = QueueView(length, since_s)
    return Snapshot(
        now_s=now_s, waiting=views, released=released, running=RunningBatch(running), kv_used_tokens=0,
        kv_capacity_tokens=4096,
    )


BUSY = running(1)  # one running request, inside a segment


# A tiny engine: prefill takes one step, then one token a step.


@dataclass
class TinyEngine:
    """Steps a policy; every request waits in the queue of its type, then runs `output` steps."""

    policy: object
    now_s: float = 0.0
    queues: dict = field(default_factory=dict)
    running: list = field(default_factory=list)
    output: dict = field(default_factory=dict)
    arrived_s: dict = field(default_factory=dict)
    place_at_arrival: dict = field(default_factory=dict)
    entered_s: dict = field(default_factory=dict)
    finished: list = field(default_factory=list)

    def arrive(self, output, type_name=UNKNOWN_TYPE):
        name = f"r{len(self.output)}"
        queue = self.queues.setdefault(type_name, [])
        self.place_at_arrival[name] = (type_name, len(queue))
        queue.append(name)
        self.output[name], self.arrived_s[name] = output, self.now_s

    def snapshot(self):
        waiting = {
            type_name: QueueView(len(queue), self.arrived_s[queue[0]])
            for type_name, queue in self.queues.items() if queue
        }
        return Snapshot(
            now_s=self.now_s, waiting=waiting, released=0, running=RunningBatch(self.running), kv_used_tokens=0,
            kv_capacity_tokens=4096,
        )

    def step(self):
        """One iteration; returns the snapshot the policy saw and its decision."""
        seen = self.snapshot()
        decision = self.policy.decide(seen)
        for type_name, count in decision.admit.items():
            queue = self.queues[type_name]
            assert count <= len(queue), "more admitted than wait"
            for name in queue[:count]:
                self.entered_s[name] = self.now_s
                self.running.append(RunningRequest(name, type_name))
            del queue[:count]
        for request in self.running:
            if request.request_id not in decision.sit_out:
                request.stage += 1
        self.finished += [r.request_id for r in self.running if r.stage >= self.output[r.request_id]]
        self.running = [r for r in self.running if r.stage < self.output[r.request_id]]
        self.now_s += STEP_S
        return seen, decision

    @property
    def empty(self):
        return not self.running and not any(self.queues.values())


@st.composite
def serving_thresholds(draw, capped=True):
    cap = draw(st.none() | st.integers(1, 12)) if capped else None
    most = cap or 12
    ends = sorted(draw(st.sets(st.integers(1, 12), max_size=3)))
    n = sorted(draw(st.lists(st.integers(1, most), min_size=len(ends), max_size=len(ends))), reverse=True)
    return Thresholds(
        policy=draw(st.sampled_from(["fcfs", "wait", "nested_wait"])),
        types=types(short=draw(st.integers(1, most)), long=draw(st.integers(1, most))),
        segments=segments(*zip(ends, n, strict=True)),
        max_running=cap,
        max_hold_s=draw(st.sampled_from([0.0, STEP_S, 3 * STEP_S, 10.5 * STEP_S])),
    )


# Per step: a list of requests (output length, type).
workloads = st.lists(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from(["short", "long", UNKNOWN_TYPE])), max_size=6),
    min_size=1, max_size=25,
)


def drive(thresholds, workload, check):
    """Run a workload to the end; `check` sees every step. Fails when a request starves."""
    engine = TinyEngine(make_policy(thresholds))
    known = thresholds.policy == "wait"
    requests = 0
    for arrivals in workload:
        for output, type_name in arrivals:
            engine.arrive(output, type_name if known else UNKNOWN_TYPE)
            requests += 1
        check(engine, *engine.step())
    # Every request needs at most a hold at the entry and at each boundary, its tokens, and a turn under the cap.
    holds = (1 + len(thresholds.segments)) * (thresholds.max_hold_s / STEP_S + 1)
    for _ in range(int(requests * (holds + 21)) + 1):
        if engine.empty:
            break
        check(engine, *engine.step())
    assert engine.empty, "stranded"
    assert sorted(engine.finished) == sorted(engine.output)
    return engine


@settings(max_examples=150, deadline=None, derandomize=True)
@given(serving_thresholds(), workloads)
def test_serving_admits_the_oldest_in_time_and_respects_the_cap(thresholds, workload):
    cap = thresholds.max_running

    def check(engine, seen, decision):
        admitted = sum(decision.admit.values())
        if cap is not None:
            assert len(seen.running) + admitted <= cap
        waiting = sum(view.length for view in seen.waiting.values())
        slots_left = waiting if cap is None else min(waiting, cap - len(seen.running)) - admitted
        if waiting and not seen.running:
            assert admitted, "an idle engine admits at once"
        overdue = {
            name: view for name, view in seen.waiting.items()
            if seen.now_s - view.oldest_since_s >= thresholds.max_hold_s
        }
        for name in overdue:
            assert decision.admit.get(name) or slots_left <= 0, "overdue, a slot is free, and not admitted"
        if overdue and (cap is None or len(seen.running) < cap):
            oldest = min(overdue, key=lambda name: overdue[name].oldest_since_s)
            since = overdue[oldest].oldest_since_s
            assert any(decision.admit.get(n) for n, v in overdue.items() if v.oldest_since_s == since), oldest

    drive(thresholds, workload, check)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(serving_thresholds(capped=False), workloads)
def test_every_hold_at_the_entry_is_bounded(thresholds, workload):
    """Without a cap: the hold, one step, and one more for each full group that stood in front."""
    engine = drive(thresholds, workload, lambda *_: None)
    n = {entry.name: entry.n for entry in thresholds.types} if thresholds.policy == "wait" else {}
    unknown_n = 10**9
    if thresholds.segments and thresholds.policy != "fcfs":
        unknown_n = thresholds.segments[0].total // thresholds.segments[0].end_output_tokens
    for name, (type_name, place) in engine.place_at_arrival.items():
        groups_in_front = place // n.get(type_name, unknown_n)
        waited_s = engine.entered_s[name] - engine.arrived_s[name]
        most_s = max(thresholds.max_hold_s + STEP_S, (groups_in_front + 1) * STEP_S)
        assert waited_s < most_s or waited_s == 0, (name, waited_s)
        if thresholds.policy == "fcfs":
            assert waited_s == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(serving_thresholds(), workloads)
def test_running_requests_wait_only_at_boundaries_and_never_long(thresholds, workload):
    boundaries = {segment.end_output_tokens for segment in thresholds.segments[:-1]}
    stood_since = {}

    def check(engine, seen, decision):
        stage_at_decision = {r.request_id: r.stage for r in engine.running}  # paused requests have not moved
        for name in decision.sit_out:
            request = next(r for r in engine.running if r.request_id == name)
            assert request.type_name == UNKNOWN_TYPE, "a request of known length never sits out"
            assert stage_at_decision[name] in boundaries, "only at a boundary"
            since = stood_since.setdefault((name, request.stage), seen.now_s)
            assert seen.now_s - since < thresholds.max_hold_s, "held too long at one boundary"
        if seen.running and len(decision.sit_out) == len(seen.running):
            assert decision.admit, "all held and none entering: the engine would stall"
        assert len(decision.sit_out) <= len(seen.running)

    drive(thresholds, workload, check)


# Serving mode, case by case.


@pytest.mark.parametrize("policy", ["fcfs", "wait", "nested_wait"])
def test_an_empty_queue_admits_no_request(policy):
    assert policy_of(policy, segments=segments((8, 4))).decide(snapshot(running=BUSY)) == Decision({}, set())


@pytest.mark.parametrize(
    "policy",
    [policy_of("fcfs"), policy_of("wait", types=types(short=8)), policy_of("nested_wait", segments=segments((8, 8)))],
    ids=lambda policy: policy.name,
)
def test_idle_engine_admits_at_once(policy):
    waiting = "short" if policy.name == "wait" else UNKNOWN_TYPE
    assert policy.decide(snapshot(**{waiting: 1})).admit == {waiting: 1}


def test_fcfs_admits_all_requests_up_to_the_cap():
    assert policy_of("fcfs").decide(snapshot(running=BUSY, unknown=7)).admit == {UNKNOWN_TYPE: 7}
    capped = policy_of("fcfs", max_running=4)
    assert capped.decide(snapshot(running=BUSY, released=1, unknown=7)).admit == {UNKNOWN_TYPE: 2}
    assert capped.decide(snapshot(running=running(1, 1, 1, 1), unknown=7)).admit == {}
    assert capped.decide(snapshot(running=running(*[1] * 6), unknown=7)).admit == {}, "a cap lowered below"


def test_wait_opens_for_a_group_of_n():
    policy = policy_of("wait", types=types(short=4), max_hold_s=1.0)
    assert policy.decide(snapshot(running=BUSY, short=3)).admit == {}
    assert policy.decide(snapshot(running=BUSY, short=4)).admit == {"short": 4}
    assert policy.decide(snapshot(running=BUSY, short=9)).admit == {"short": 4}, "one group an iteration"


def test_wait_lets_an_incomplete_group_in_when_its_hold_is_over():
    policy = policy_of("wait", types=types(short=4), max_hold_s=0.5)
    assert policy.decide(snapshot(now_s=10.49, running=BUSY, short=(3, 10.0))).admit == {}
    assert policy.decide(snapshot(now_s=10.5, running=BUSY, short=(3, 10.0))).admit == {"short": 3}


@pytest.mark.parametrize("mode", ["serving", "strict"])
def test_wait_admits_a_type_without_a_count_at_once(mode):
    policy = policy_of("wait", types=types(free=None, short=4), mode=mode, max_hold_s=1.0)
    batch = [*running(1, 1, 5, type_name="free"), *running(2, type_name="short")]
    decision = policy.decide(snapshot(running=batch, free=9, short=4))
    assert decision.admit == {"free": 9, "short": 4} and not decision.sit_out
    assert policy.decide(snapshot(running=batch, free=1)).admit == {"free": 1}
    assert {name for name in policy.decide(snapshot(running=batch)).sit_out if name.startswith("free")} == set()
    capped = policy_of("wait", types=types(free=None), mode=mode, max_running=6)
    assert capped.decide(snapshot(running=running(1, 1, type_name="free"), free=9)).admit == {"free": 4}


def test_wait_keeps_a_group_together_while_slots_are_short_but_not_beyond_its_hold():
    policy = policy_of("wait", types=types(short=4), max_running=5, max_hold_s=0.5)
    three = running(1, 1, 1)
    assert policy.decide(snapshot(now_s=10.0, running=three, short=(4, 10.0))).admit == {}
    assert policy.decide(snapshot(now_s=10.5, running=three, short=(4, 10.0))).admit == {"short": 2}


def test_wait_gives_scarce_slots_to_the_oldest_type_first():
    policy = policy_of("wait", types=types(a=2, b=2), max_running=3, max_hold_s=9.0)
    decide = policy.decide
    assert decide(snapshot(now_s=5.0, running=BUSY, a=(2, 4.0), b=(2, 3.0))).admit == {"b": 2}
    assert decide(snapshot(now_s=5.0, running=BUSY, a=(2, 3.0), b=(2, 4.0))).admit == {"a": 2}


def test_wait_types_do_not_wait_for_each_other():
    policy = policy_of("wait", types=types(a=2, b=3), max_hold_s=1.0)
    assert policy.decide(snapshot(running=BUSY, a=2, b=2)).admit == {"a": 2}
    assert policy.decide(snapshot(running=BUSY, a=2, b=3)).admit == {"a": 2, "b": 3}


def test_wait_classifies_by_bounds_first_match_wins():
    policy = policy_of(
        "wait",
        types=(
            TypeThreshold(name="short", n=1, max_prompt_tokens=100, max_output_tokens=10),
            TypeThreshold(name="brief", n=1, max_output_tokens=10),
            TypeThreshold(name="small", n=1, max_prompt_tokens=100, max_output_tokens=50),
        ),
    )
    assert policy.classify(100, 10) == "short", "bounds are inclusive"
    assert policy.classify(101, 10) == "brief"
    assert policy.classify(100, 11) == "small"
    assert policy.classify(101, 11) == UNKNOWN_TYPE
    assert policy.classify(1, None) == UNKNOWN_TYPE, "no declared length is no type"


def test_type_without_bounds_takes_every_declared_length():
    policy = policy_of("wait", types=types(all=4))
    assert policy.classify(10**6, 10**6) == "all" and policy.classify(1, None) == UNKNOWN_TYPE


@pytest.mark.parametrize("policy", ["fcfs", "nested_wait"])
def test_other_policies_know_one_queue(policy):
    assert policy_of(policy, types=types(all=4)).classify(5, 5) == UNKNOWN_TYPE


def test_unknown_lengths_enter_at_once_under_wait_without_segments():
    policy = policy_of("wait", types=types(short=4), max_hold_s=1.0)
    assert policy.decide(snapshot(running=BUSY, short=1, unknown=3)).admit == {UNKNOWN_TYPE: 3}
    capped = policy_of("wait", types=types(short=2), max_running=3, max_hold_s=1.0)
    assert capped.decide(snapshot(running=BUSY, unknown=9)).admit == {UNKNOWN_TYPE: 2}, "every free slot, at once"


def test_unknown_lengths_follow_the_segments_under_wait():
    policy = policy_of("wait", types=types(short=4), segments=segments((8, 3), (64, 2)), max_hold_s=1.0)
    assert policy.decide(snapshot(running=BUSY, unknown=2)).admit == {}
    assert policy.decide(snapshot(running=BUSY, unknown=5)).admit == {UNKNOWN_TYPE: 3}
    standing = RunningRequest("u", UNKNOWN_TYPE, 8)
    known = RunningRequest("k", "short", 8)
    assert policy.decide(snapshot(running=[standing, known, *BUSY])).sit_out == {"u"}


def test_nested_wait_enters_in_groups_of_the_first_segment():
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 2)), max_hold_s=0.5)
    assert policy.decide(snapshot(running=BUSY, unknown=3)).admit == {}
    assert policy.decide(snapshot(running=BUSY, unknown=9)).admit == {UNKNOWN_TYPE: 4}
    assert policy.decide(snapshot(now_s=1.0, running=BUSY, unknown=(3, 0.5))).admit == {UNKNOWN_TYPE: 3}


def test_nested_wait_without_segments_admits_as_fcfs():
    policy = policy_of("nested_wait", max_running=4)
    assert policy.decide(snapshot(running=BUSY, unknown=9)).admit == {UNKNOWN_TYPE: 3}


def test_boundary_opens_when_n_stand_there():
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 2)), max_hold_s=1.0)
    inside = RunningRequest("inside", stage=3)
    first, second = RunningRequest("first", stage=8), RunningRequest("second", stage=8)
    assert policy.decide(snapshot(running=[first, inside])).sit_out == {"first"}
    assert policy.decide(snapshot(running=[first, second, inside])).sit_out == set()
    late = RunningRequest("late", stage=8)
    assert policy.decide(snapshot(running=[first, second, late, inside])).sit_out == {"late"}, (
        "a request that passed goes on; later ones start a new group"
    )


def test_a_last_token_in_flight_does_not_count_at_a_boundary():
    """It may turn out to be the end of the answer; one iteration later that is known."""
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 2)), max_hold_s=1.0)
    inside, first = RunningRequest("inside", stage=3), RunningRequest("first", stage=8)
    maybe_over = RunningRequest("maybe over", stage=8, tokens_in_flight=1)
    assert policy.decide(snapshot(running=[first, maybe_over, inside])).sit_out == {"first", "maybe over"}
    maybe_over.tokens_in_flight = 0
    assert policy.decide(snapshot(running=[first, maybe_over, inside])).sit_out == set()

    strict = policy_of("nested_wait", mode="strict", segments=segments((2, 3), (8, 2)))
    running = [
        RunningRequest("a", stage=2),
        RunningRequest("b", stage=2, tokens_in_flight=1),
        RunningRequest("c", stage=1),
    ]
    assert strict.decide(snapshot(running=running, unknown=3)).sit_out == {"a", "b"}
    running[1].tokens_in_flight = 0
    assert strict.decide(snapshot(running=running, unknown=3)).sit_out == set()


def less_than_one_per_stage(total, stages, **fields):
    ends = tuple(SegmentThreshold(end_output_tokens=end, total=total) for end in (stages, 64))
    return policy_of("nested_wait", segments=ends, max_hold_s=60.0, **fields)


def test_below_one_request_per_stage_entries_take_turns():
    """Two requests in ten stages: one enters in two of every ten iterations, and a place that is free keeps."""
    policy = less_than_one_per_stage(2, 10)
    admitted = [sum(policy.decide(snapshot(running=BUSY, unknown=5)).admit.values()) for _ in range(40)]
    assert all(sum(admitted[at : at + 10]) == 2 for at in range(31))
    assert max(admitted) == 1
    for _ in range(50):
        assert policy.decide(snapshot(running=BUSY)).admit == {}
    first, second = (policy.decide(snapshot(running=BUSY, unknown=1)).admit for _ in range(2))
    assert (first, second) == ({UNKNOWN_TYPE: 1}, {}), "no more than one place is kept"


def test_below_one_request_per_stage_a_boundary_lets_one_pass_at_a_time():
    policy = less_than_one_per_stage(14, 8)  # beyond 8 tokens: 14 requests in 56 stages, one in four iterations
    here = [RunningRequest(f"r{place}", stage=8) for place in range(3)]
    passed_after = []
    for iteration in range(10):
        sit_out = policy.decide(snapshot(running=[*here, *BUSY])).sit_out
        passed_after += [iteration] * (len(here) - len(sit_out))
        here = [one for one in here if one.request_id in sit_out]
    assert passed_after == [0, 4, 8]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(-100, 100))
def test_a_total_is_spread_evenly_over_iterations_and_stages(total, stages, start):
    limits = [stage_limit(total, stages, start + step) for step in range(3 * stages)]
    assert sum(limits[:stages]) == total
    assert set(limits) <= {total // stages, -(-total // stages)}
    for width in range(1, len(limits) + 1):
        for at in range(len(limits) - width + 1):
            assert abs(sum(limits[at : at + width]) - width * total / stages) <= 1
    assert stage_limit(total, stages, 0) >= 1


def test_strict_totals_hold_no_request():
    """Three requests in seven stages: requests that enter together find room in every stage, and none waits."""
    ends = (SegmentThreshold(end_output_tokens=7, total=3),)
    engine = TinyEngine(policy_of("nested_wait", mode="strict", segments=ends))
    for _ in range(30):
        engine.arrive(7)
    for _ in range(50):
        _, decision = engine.step()
        assert not decision.sit_out
        assert len(engine.running) <= 3
    assert engine.queues[UNKNOWN_TYPE], "there is always a full group"
    assert len(engine.finished) == sum(stage_limit(3, 7, step) for step in range(50 - 6))


def test_boundary_holds_for_max_hold_s_counted_from_reaching_it():
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 2)), max_hold_s=1.0)
    running = [RunningRequest("a", stage=8), RunningRequest("b", stage=3)]
    assert policy.decide(snapshot(now_s=5.0, running=running)).sit_out == {"a"}
    assert policy.decide(snapshot(now_s=5.9, running=running)).sit_out == {"a"}
    assert policy.decide(snapshot(now_s=6.0, running=running)).sit_out == set()


def test_last_boundary_and_prefill_hold_no_request():
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 2)), max_hold_s=1.0)
    running = [
        RunningRequest("end", stage=64),
        RunningRequest("past", stage=100),
        RunningRequest("prefill", stage=0),
        *BUSY,
    ]
    assert policy.decide(snapshot(running=running)).sit_out == set()


def test_each_boundary_has_its_own_queue():
    policy = policy_of("nested_wait", segments=segments((8, 4), (16, 2), (64, 2)), max_hold_s=1.0)
    running = [RunningRequest("a", stage=8), RunningRequest("b", stage=16), *BUSY]
    assert policy.decide(snapshot(running=running)).sit_out == {"a", "b"}, "one at each is no group of two"


def test_no_request_is_held_when_all_would_be():
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 3)), max_hold_s=1.0)
    both = [RunningRequest("a", stage=8), RunningRequest("b", stage=8)]
    assert policy.decide(snapshot(running=both)).sit_out == set()
    assert policy.decide(snapshot(running=both, unknown=4)).sit_out == {"a", "b"}, "entering requests keep it busy"


def test_boundary_memory_is_given_up_with_the_requests():
    policy = policy_of("nested_wait", segments=segments((8, 4), (64, 2)), max_hold_s=0.0)
    for place in range(100):
        policy.decide(snapshot(running=[RunningRequest(f"r{place}", stage=8), *BUSY]))
    policy.decide(snapshot(running=BUSY))
    assert not policy._segments._holds._since_s and not policy._segments._holds._passed


# Strict mode: the paper's rule.


def test_strict_wait_worked_case_keeps_its_balance():
    """paper.md: l = 1, l' = 1, C = 12, four arrivals an iteration. WAIT with n = 4 holds 4 + 4 prompts, 12 tokens."""
    policy = policy_of("wait", mode="strict", types=types(all=4))
    waiting, decoding, completed = 6, 3, []
    for iteration in range(20):
        decision = policy.decide(snapshot(running=running(*[1] * decoding, type_name="all"), all=waiting))
        entering = decision.admit.get("all", 0)
        processed = decoding - len(decision.sit_out)
        kv_tokens = entering * 1 + decoding * 2
        assert kv_tokens <= 12, "memory is never exceeded"
        completed.append(processed)
        waiting, decoding = waiting - entering + 4, decoding - processed + entering
        if iteration > 0:
            assert (decoding, kv_tokens) == (4, 12)
    assert completed[1:] == [4] * 19, "four completions an iteration, the fluid optimum"


def test_strict_wait_stops_all_requests_when_no_type_is_eligible():
    policy = policy_of("wait", mode="strict", types=types(all=4), max_hold_s=0.0)
    batch = running(1, 1, 2, type_name="all")
    decision = policy.decide(snapshot(now_s=99.0, running=batch, all=(3, 0.0)))
    assert decision.admit == {} and decision.sit_out == {r.request_id for r in batch}


def test_strict_wait_advances_at_most_n_per_stage():
    policy = policy_of("wait", mode="strict", types=types(all=2))
    batch = running(1, 1, 1, 2, 2, 2, type_name="all")
    decision = policy.decide(snapshot(running=batch, all=5))
    assert decision.admit == {"all": 2}
    assert decision.sit_out == {batch[2].request_id, batch[5].request_id}, "the earlier admitted go first"


def test_strict_wait_judges_each_type_alone():
    policy = policy_of("wait", mode="strict", types=types(a=2, b=2))
    of_a, of_b = running(1, 3, type_name="a"), running(1, 3, type_name="b")
    decision = policy.decide(snapshot(running=of_a + of_b, a=2, b=1))
    assert decision.admit == {"a": 2} and decision.sit_out == {r.request_id for r in of_b}


def test_strict_lets_a_prefill_finish():
    for policy in (policy_of("wait", mode="strict", types=types(all=4)),
                   policy_of("nested_wait", mode="strict", segments=segments((2, 4)))):
        batch = running(0, type_name="all" if policy.name == "wait" else UNKNOWN_TYPE)
        assert policy.decide(snapshot(running=batch)).sit_out == set()


STRICT_NESTED = policy_of("nested_wait", mode="strict", segments=segments((2, 3), (4, 2), (8, 1)), max_hold_s=0.0)


@pytest.mark.parametrize(
    ("waiting", "stages", "admitted", "sitting_stages"),
    [
        (3, [1, 2, 2, 3, 4, 5], 3, []),  # every queue full: all run
        (2, [1, 2, 2, 3, 4, 5], 0, [1, 2, 2, 3, 4, 5]),  # the first segment is held, and with it all others
        (3, [1, 2, 3, 4, 5], 3, [2, 3, 4, 5]),  # one at the second queue: segments two and three are held
        (3, [1, 2, 2, 3, 5, 6], 3, [5, 6]),  # none at the third queue
        (9, [1, 1, 1, 1, 1], 3, [1, 1]),  # at most n_1 = 3 per stage
        (3, [2, 2, 2, 2, 3, 3, 3], 3, [2, 2, 3]),  # at most n_2 = 2 per stage
        (3, [2, 2, 4, 4, 9, 9], 3, [4, 9]),  # past the last boundary the last segment's n holds
    ],
)
def test_strict_nested_wait_prefix_rule_and_stage_limits(waiting, stages, admitted, sitting_stages):
    batch = running(*stages)
    decision = STRICT_NESTED.decide(snapshot(now_s=99.0, running=batch, unknown=(waiting, 0.0)))
    assert decision.admit.get(UNKNOWN_TYPE, 0) == admitted
    stage_of = {r.request_id: r.stage for r in batch}
    assert Counter(stage_of[name] for name in decision.sit_out) == Counter(sitting_stages)


def test_strict_wait_with_segments_runs_both_rules_side_by_side():
    policy = policy_of("wait", mode="strict", types=types(all=2), segments=segments((2, 3), (8, 2)))
    batch = running(1, type_name="all") + running(1, 2)
    decision = policy.decide(snapshot(running=batch, all=1, unknown=3))
    assert decision.admit == {UNKNOWN_TYPE: 3}
    assert decision.sit_out == {"all-0@1", "unknown-1@2"}


@pytest.mark.parametrize(
    ("decoding", "admitted"), [(0, {"a": 2, "b": 1}), (2, {"a": 1}), (3, {}), (5, {})],
    ids=["room", "one-slot", "full", "a-cap-lowered-below"],
)
def test_strict_wait_keeps_to_the_cap(decoding, admitted):
    policy = policy_of("wait", mode="strict", types=types(a=2, b=2), max_running=3)
    decision = policy.decide(snapshot(running=running(*[1] * decoding, type_name="a"), a=2, b=4))
    assert {name: count for name, count in decision.admit.items() if count} == admitted


@pytest.mark.parametrize(("decoding", "released", "admitted"), [(0, 0, 3), (2, 0, 2), (2, 1, 1), (4, 0, 0), (6, 0, 0)])
@pytest.mark.parametrize("policy", ["nested_wait", "wait"])
def test_strict_segments_keep_to_the_cap(policy, decoding, released, admitted):
    segmented = policy_of(policy, mode="strict", segments=segments((2, 3), (8, 2)), max_running=4)
    decision = segmented.decide(snapshot(running=running(*[1] * decoding), released=released, unknown=9))
    assert decision.admit.get(UNKNOWN_TYPE, 0) == admitted
