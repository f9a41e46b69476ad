"""A virtual replica against hand-computed times, and what holds for every workload: nothing lost, nothing invented."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.settings import EXPECTED_OUTPUT_TOKENS
from scheduler.vllm_scheduler import HeadraceScheduler
from simulator.engine.replica import VirtualReplica
from simulator.engine.vllm_harness import make_scheduler
from simulator.engine.vllm_v0 import VllmV0Scheduler
from simulator.workload.requests import SimRequest

# Every sum of these is exact in binary, so that times are compared to the digit.
TIME_MODEL = IterationTimeModel(
    d0_s=1.0, d1_s_per_kv_token=1 / 1024, d2_s_per_prefill_token=1 / 64, d3_s_per_decode_token=1 / 8
)
PREFILL_64_S = 1 + 64 / 64 + 64 / 1024
BOTH_WAYS = pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])


def decode_s(*kv_tokens):
    return 1 + len(kv_tokens) / 8 + sum(kv_tokens) / 1024


class Recorder:
    """Keeps the rows."""

    wants_iterations = True

    def __init__(self):
        self.requests, self.iterations = {}, []

    def request(self, row):
        assert row.index not in self.requests, "written twice"
        self.requests[row.index] = row

    def iteration(self, row):
        self.iterations.append(row)


def replica_of(
    scheduler_cls=AsyncScheduler, *, asynchronous=True, blocks=257, thresholds=None, give_up_s=None, **engine_args
):
    args = {"max_num_seqs": 16, "max_num_batched_tokens": 1024} | engine_args
    if scheduler_cls is VllmV0Scheduler:
        args["enable_chunked_prefill"] = False
    ours = {"headrace": {"thresholds": thresholds or {}, "allow_strict": True}}
    scheduler = make_scheduler(
        scheduler_cls, blocks=blocks, max_model_len=1024, async_scheduling=asynchronous, additional_config=ours, **args
    )
    return VirtualReplica(3, scheduler, TIME_MODEL, Recorder(), give_up_s=give_up_s)


def feed(replica, *requests, declare=False):
    """Let (arrival, prompt, output) arrive one after another."""
    for number, (arrival_s, prompt, output) in enumerate(requests):
        replica.advance(arrival_s)
        declared = {EXPECTED_OUTPUT_TOKENS: output} if declare else None
        replica.submit(number, SimRequest(arrival_s, prompt, output, "t"), declared=declared)


def run(replica, *requests, declare=False):
    """Feed them and run to the end: the request rows by number, the iteration rows, and the stranded requests."""
    feed(replica, *requests, declare=declare)
    stranded = replica.finish()
    return replica._sink.requests, replica._sink.iterations, stranded


def times(row):
    return row.first_token_s, row.finished_s


# Times, by hand.


@BOTH_WAYS
def test_a_request_alone_takes_its_prefill_and_its_decodes(asynchronous):
    rows, iterations, stranded = run(replica_of(asynchronous=asynchronous), (2.5, 64, 3))
    first_token_s = 2.5 + PREFILL_64_S
    assert times(rows[0]) == (first_token_s, first_token_s + decode_s(65) + decode_s(66))
    assert rows[0][:4] == (0, 3, "t", 2.5)
    assert rows[0][6:] == (64, 3, 0, "completed", None, 0, 1, None)
    assert [(i.prefill_tokens, i.decode_tokens, i.kv_read_tokens, i.batch_size) for i in iterations] == [
        (64, 0, 64, 1), (0, 1, 65, 1), (0, 1, 66, 1)
    ]
    assert not stranded


@BOTH_WAYS
def test_an_answer_of_one_token_ends_with_its_prefill(asynchronous):
    rows, iterations, _ = run(replica_of(asynchronous=asynchronous), (0.0, 64, 1))
    assert times(rows[0]) == (PREFILL_64_S, PREFILL_64_S)
    assert len(iterations) == 1


@BOTH_WAYS
def test_requests_that_come_together_share_their_iterations(asynchronous):
    rows, _, _ = run(replica_of(asynchronous=asynchronous), (0.0, 64, 2), (0.0, 128, 3))
    prefill_s = 1 + (64 + 128) / 64 + (64 + 128) / 1024
    assert times(rows[0]) == (prefill_s, prefill_s + decode_s(65, 129))
    assert times(rows[1]) == (prefill_s, prefill_s + decode_s(65, 129) + decode_s(130))


MIXED_S = [1 + 64 / 64 + 1 / 8 + (64 + kv) / 1024 for kv in (65, 66)]  # a prefill of 64 and one decode


@pytest.mark.parametrize(
    ("asynchronous", "arrival_s", "first_token_s"),
    [
        (False, 1.0, PREFILL_64_S + MIXED_S[0]),  # the very next iteration
        (True, 1.0, PREFILL_64_S + decode_s(65) + MIXED_S[1]),  # the next one was scheduled when this one began
        (False, PREFILL_64_S, PREFILL_64_S + MIXED_S[0]),  # between two iterations
        (True, PREFILL_64_S, PREFILL_64_S + decode_s(65) + MIXED_S[1]),
        (False, 0.0, 1 + 128 / 64 + 128 / 1024),  # with the first
        (True, 0.0, 1 + 128 / 64 + 128 / 1024),
    ],
)
def test_a_request_joins_the_first_iteration_that_is_not_scheduled_yet(asynchronous, arrival_s, first_token_s):
    rows, _, _ = run(replica_of(asynchronous=asynchronous), (0.0, 64, 6), (arrival_s, 64, 1))
    assert times(rows[1]) == (first_token_s, first_token_s)


@BOTH_WAYS
def test_a_prompt_in_pieces_gives_its_first_token_after_the_last(asynchronous):
    replica = replica_of(asynchronous=asynchronous, max_num_batched_tokens=64)
    rows, iterations, _ = run(replica, (0.0, 150, 2))
    pieces_s = [1 + new / 64 + kv / 1024 for new, kv in ((64, 64), (64, 128), (22, 150))]
    assert [i.seconds for i in iterations] == [*pieces_s, decode_s(151)]
    assert times(rows[0]) == (sum(pieces_s), sum(pieces_s) + decode_s(151))


@BOTH_WAYS
def test_an_idle_replica_begins_when_something_arrives(asynchronous):
    rows, iterations, _ = run(replica_of(asynchronous=asynchronous), (1.0, 64, 2), (1000.0, 64, 2))
    assert rows[1].first_token_s == 1000 + PREFILL_64_S
    assert [i.start_s for i in iterations] == [1.0, 1 + PREFILL_64_S, 1000.0, 1000 + PREFILL_64_S]


@BOTH_WAYS
def test_a_busy_device_never_pauses(asynchronous):
    _, iterations, _ = run(replica_of(asynchronous=asynchronous), (0.0, 64, 30), (3.0, 90, 5), (4.0, 20, 9))
    assert all(a.start_s + a.seconds == b.start_s for a, b in pairwise(iterations))


@pytest.mark.parametrize("scheduler_cls", [AsyncScheduler, HeadraceScheduler])
def test_the_clock_goes_as_far_as_asked_and_no_further(scheduler_cls):
    requests = [(0.0, 64, 9), (1.0, 300, 4), (7.5, 20, 6)]
    replica = replica_of(scheduler_cls)
    feed(replica, *requests[:2])
    for tenths in range(11, 75):
        replica.advance(tenths / 10)
        assert replica.now_s <= tenths / 10
        assert all((row.finished_s or 0) <= tenths / 10 for row in replica._sink.requests.values())
    replica.submit(2, SimRequest(*requests[2], "t"))
    replica.finish()
    at_once, iterations, _ = run(replica_of(scheduler_cls), *requests)
    assert replica._sink.requests == at_once
    assert replica._sink.iterations == iterations
    assert replica.now_s == max(row.finished_s for row in at_once.values())


# Memory.


@BOTH_WAYS
@pytest.mark.parametrize("scheduler_cls", [AsyncScheduler, HeadraceScheduler, VllmV0Scheduler])
def test_what_memory_pressure_costs_is_counted_exactly(scheduler_cls, asynchronous):
    requests = [(n / 4, 32, 60) for n in range(5)]  # six blocks each in the end, of twelve
    replica = replica_of(scheduler_cls, asynchronous=asynchronous, blocks=13)
    rows, iterations, stranded = run(replica, *requests)
    assert not stranded
    assert {(row.outcome, row.output_tokens) for row in rows.values()} == {("completed", 60)}
    totals = replica.totals
    assert totals.preemptions == sum(row.preemptions for row in rows.values()) > 0
    computed = sum(i.prefill_tokens + i.decode_tokens for i in iterations)
    assert computed == sum(prompt + output - 1 for _, prompt, output in requests) + totals.recomputed_tokens
    assert totals.kv_peak_fraction == 1.0
    assert totals.iterations == len(iterations)


def test_without_pressure_nothing_is_preempted():
    replica = replica_of(blocks=41)
    run(replica, *[(n / 4, 32, 60) for n in range(5)])
    assert (replica.totals.preemptions, replica.totals.recomputed_tokens) == (0, 0)
    assert 0.5 < replica.totals.kv_peak_fraction < 1


def test_a_preemption_in_an_iteration_that_ends_up_empty_counts():
    """One request that outgrows the whole memory preempts itself, and is then stuck."""
    replica = replica_of(blocks=4)
    rows, _, stranded = run(replica, (0.0, 40, 24))
    assert (rows, stranded) == ({}, [0])
    assert replica.totals.preemptions == 1
    assert replica.totals.recomputed_tokens == 48


# Clients that give up.


@BOTH_WAYS
@pytest.mark.parametrize("scheduler_cls", [AsyncScheduler, HeadraceScheduler])
def test_clients_give_up_waiting_but_never_after_their_first_token(scheduler_cls, asynchronous):
    replica = replica_of(scheduler_cls, asynchronous=asynchronous, max_num_seqs=1, give_up_s=8.0)
    rows, iterations, stranded = run(replica, (0.0, 64, 15), (1.0, 64, 2), (13.5, 64, 2))
    assert not stranded
    assert rows[0].finished_s > 16
    assert (rows[0].outcome, rows[0].output_tokens) == ("completed", 15)
    assert rows[1] == (1, 3, "t", 1.0, None, None, 64, 0, 0, "gave_up", None, None, 1, None)
    assert rows[2].outcome == "completed"
    assert 8.0 > rows[2].first_token_s - 13.5 > 5.0
    assert replica.totals.rejected == 0
    assert [i.waiting for i in iterations if 3 < i.start_s < 9] == [1] * 5
    assert [i.waiting for i in iterations if 12 < i.start_s < 13.5] == [0]
    assert max(i.waiting for i in iterations if i.start_s > 13.5) == 1, "the third waits, the second does not any more"


def test_without_patience_set_nobody_gives_up():
    rows, _, _ = run(replica_of(max_num_seqs=1), (0.0, 64, 40), (1.0, 64, 2))
    assert rows[1].outcome == "completed"
    assert rows[1].first_token_s > 40


def test_clients_give_up_at_a_standstill_too():
    strict = {"policy": "wait", "mode": "strict", "types": [{"name": "all", "n": 3}]}
    replica = replica_of(HeadraceScheduler, thresholds=strict, give_up_s=10.0)
    rows, iterations, stranded = run(replica, (1.0, 64, 2), (2.0, 64, 2), declare=True)
    assert [row.outcome for row in rows.values()] == ["gave_up"] * 2
    assert not iterations
    assert not stranded
    assert replica.now_s == 12.0


# Holds.


@BOTH_WAYS
def test_a_hold_ends_in_virtual_time_though_nothing_else_arrives(asynchronous):
    held = {"policy": "wait", "types": [{"name": "all", "n": 3}], "max_hold_s": 5.0}
    replica = replica_of(HeadraceScheduler, asynchronous=asynchronous, thresholds=held)
    rows, iterations, _ = run(replica, (0.0, 64, 30), (1.0, 64, 2), declare=True)
    assert rows[0].first_token_s == PREFILL_64_S, "an idle engine takes whatever is there"
    (entered,) = [i for i in iterations[1:] if i.prefill_tokens]
    before = iterations[iterations.index(entered) - 1]
    # It is let in by the first scheduling at or after 1 s + 5 s, which is one iteration ahead if asynchronous.
    scheduled_s, too_early_s = (before.start_s, iterations[iterations.index(entered) - 2].start_s)
    if not asynchronous:
        scheduled_s, too_early_s = entered.start_s, before.start_s
    assert too_early_s < 6.0 <= scheduled_s
    assert rows[1].first_token_s == entered.start_s + entered.seconds
    assert {i.held for i in iterations if 3 < i.start_s < 6} == {1}


def test_a_full_group_is_not_held():
    held = {"policy": "wait", "types": [{"name": "all", "n": 2}], "max_hold_s": 50.0}
    replica = replica_of(HeadraceScheduler, asynchronous=False, thresholds=held)
    rows, _, _ = run(replica, (0.0, 64, 30), (0.5, 64, 2), (1.0, 64, 2), declare=True)
    prefill_s = 1 + 128 / 64 + 1 / 8 + (65 + 128) / 1024
    assert rows[1].first_token_s == rows[2].first_token_s == PREFILL_64_S + prefill_s


@BOTH_WAYS
def test_the_paper_s_letter_leaves_the_last_group_stranded(asynchronous):
    strict = {"policy": "wait", "mode": "strict", "types": [{"name": "all", "n": 2}]}
    replica = replica_of(HeadraceScheduler, asynchronous=asynchronous, thresholds=strict)
    rows, _, stranded = run(replica, *[(0.0, 64, 2)] * 7, declare=True)
    assert stranded == [4, 5, 6], "the third group has no group behind it, and the last is incomplete"
    assert sorted(rows) == [0, 1, 2, 3]
    assert replica.ongoing == 3


# Whatever happens.

REQUESTS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 4.0, 40.0]), st.integers(1, 80), st.integers(1, 30)), min_size=1, max_size=8
)
THRESHOLDS = st.sampled_from([
    {}, {"max_running": 2},
    {"policy": "wait", "types": [{"name": "short", "n": 3, "max_output_tokens": 9}], "max_hold_s": 2.5},
    {"policy": "nested_wait", "max_hold_s": 6.0,
     "segments": [{"end_output_tokens": 8, "total": 24}, {"end_output_tokens": 30, "total": 44}]},
])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    gaps=REQUESTS, scheduler_cls=st.sampled_from([AsyncScheduler, HeadraceScheduler, VllmV0Scheduler]),
    thresholds=THRESHOLDS, asynchronous=st.booleans(), blocks=st.integers(9, 20),
    give_up_s=st.sampled_from([None, 6.0]),
)
def test_every_request_ends_once_with_its_own_tokens(gaps, scheduler_cls, thresholds, asynchronous, blocks, give_up_s):
    requests, now_s = [], 0.0
    for gap_s, prompt, output in gaps:
        now_s += gap_s
        requests.append((now_s, prompt, output))
    replica = replica_of(
        scheduler_cls, asynchronous=asynchronous, blocks=blocks, thresholds=thresholds, give_up_s=give_up_s
    )
    rows, iterations, stranded = run(replica, *requests, declare=True)

    assert not stranded
    assert sorted(rows) == list(range(len(requests)))
    assert (replica.ongoing, replica.scheduler.kv_cache_manager.usage) == (0, 0)
    assert not replica.scheduler.requests
    for number, (arrival_s, prompt, output) in enumerate(requests):
        row = rows[number]
        assert (row.arrival_s, row.prompt_tokens) == (arrival_s, prompt)
        if row.outcome == "completed":
            assert row.output_tokens == output
            assert arrival_s < row.first_token_s <= row.finished_s <= replica.now_s
            assert (row.first_token_s == row.finished_s) == (output == 1)
        else:
            assert give_up_s is not None
            assert (row.first_token_s, row.finished_s, row.output_tokens) == (None, None, 0)
    completed = [row for row in rows.values() if row.outcome == "completed"]
    needed = sum(row.prompt_tokens + row.output_tokens - 1 for row in completed)
    computed = sum(i.prefill_tokens + i.decode_tokens for i in iterations)
    totals = replica.totals
    assert totals.preemptions == sum(row.preemptions for row in rows.values())
    assert needed <= computed <= needed + totals.recomputed_tokens
    assert totals.rejected == 0
    assert all(a.start_s + a.seconds <= b.start_s for a, b in pairwise(iterations))


def test_prompts_of_v0_leave_the_watermark_free():
    replica = replica_of(VllmV0Scheduler, blocks=41, watermark=0.25)
    crowd = [(2.0, 48, 8)] * 8
    rows, iterations, stranded = run(replica, (0.0, 384, 40), *crowd)
    assert not stranded
    assert all(row.outcome == "completed" for row in rows.values())
    beside_it = [row for row in iterations if row.prefill_tokens and row.batch_size < 9 and row.start_s > 2]
    assert beside_it
    assert max(row.kv_used_tokens for row in beside_it) <= 41 * 16 * 31 / 40
