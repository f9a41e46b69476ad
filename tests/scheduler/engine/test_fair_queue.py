"""Turns among tenants, priorities and ages."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.engine.client_input import tenant_of
from scheduler.engine.fair_queue import FairQueue, Tenant, TenantLedger
from scheduler.settings import TENANT, TENANT_WEIGHT


def request(name, tenant=None, *, weight=1.0, prompt=100, priority=0):
    extra = None if tenant is None else {TENANT: tenant, TENANT_WEIGHT: weight}
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=prompt, num_output_tokens=0, priority=priority,
        sampling_params=SimpleNamespace(max_tokens=4, extra_args=extra),
    )


def queue_of(*requests):
    queue = FairQueue(TenantLedger(tenant_of))
    for each in requests:
        queue.add(each)
    return queue


def names(requests):
    return [each.request_id for each in requests]


def popped(queue, count=None):
    return [queue.pop().request_id for _ in range(len(queue) if count is None else count)]


def test_one_tenant_is_served_first_come_first_served():
    queue = queue_of(*(request(f"r{n}") for n in range(5)))
    assert names(queue) == popped(queue) == [f"r{n}" for n in range(5)]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_lower_priority_value_goes_first_and_equals_keep_their_order():
    queue = queue_of(request("a", priority=1), request("b"), request("c", priority=-1), request("d", priority=1))
    assert names(queue) == popped(queue) == ["c", "b", "a", "d"]


@pytest.mark.parametrize("weight", [1, 3])
def test_two_tenants_that_both_wait_are_served_by_weight(weight):
    queue = queue_of(*(request(f"{t}{n}", t, weight=weight if t == "big" else 1) for t in ("big", "small")
                       for n in range(40)))
    first = Counter(name.rstrip("0123456789") for name in popped(queue, 40))
    assert first["big"] == pytest.approx(40 * weight / (weight + 1), abs=1)


def test_a_tenant_with_long_prompts_gets_fewer_of_them():
    queue = queue_of(*(request(f"l{n}", "long", prompt=300) for n in range(20)),
                     *(request(f"s{n}", "short", prompt=100) for n in range(20)))
    first = Counter(name[0] for name in popped(queue, 20))
    assert first == {"s": 15, "l": 5}


def test_a_long_answer_counts_too():
    ledger = TenantLedger(tenant_of)
    queue = FairQueue(ledger)
    for each in (request("a0", "a"), request("b0", "b"), request("a1", "a"), request("b1", "b")):
        queue.add(each)
    assert popped(queue, 2) == ["a0", "b0"]
    ledger.charge(Tenant("a", 1.0), 500)
    assert popped(queue) == ["b1", "a1"]


def test_an_idle_tenant_earns_no_credit():
    queue = queue_of(*(request(f"busy{n}", "busy") for n in range(30)))
    popped(queue, 20)
    for n in range(10):
        queue.add(request(f"idle{n}", "idle"))
    assert Counter(name[:4] for name in popped(queue, 10)) == {"busy": 5, "idle": 5}


def test_last_returns_the_requests_with_the_latest_turns():
    queue = queue_of(*(request(f"a{n}", "a", weight=3) for n in range(6)), *(request(f"b{n}", "b") for n in range(6)),
                     request("late", "a", weight=3, priority=9))
    order = names(queue)
    assert names(queue.last(4)) == order[::-1][:4]
    assert "b5" in names(queue.last(1))
    alone = queue_of(request("x"), request("low", priority=5), request("y"))
    assert names(alone.last(2)) == ["low", "y"] and alone.last(0) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.integers(-1, 1)), max_size=30),
    st.integers(0, 35), st.integers(0, 5),
)
def test_the_last_are_the_listed_order_from_its_end(arrivals, count, served):
    queue = queue_of(*(
        request(f"{tenant}{number}", tenant, weight=ord(tenant) - 96, prompt=prompt, priority=priority)
        for number, (tenant, prompt, priority) in enumerate(arrivals)
    ))
    popped(queue, min(served, len(queue)))
    assert names(queue.last(count)) == names(queue)[::-1][:count]


class Looked:
    """A request that counts how often the length of any prompt is read."""

    priority = 0
    reads = 0

    def __init__(self, name, tenant):
        self.request_id, self.tenant = name, tenant

    @property
    def num_prompt_tokens(self):
        Looked.reads += 1
        return 100


def test_next_and_last_of_long_queues_are_found_without_going_through_them():
    ledger = TenantLedger(lambda each: Tenant(each.tenant, 1.0))
    queue = FairQueue(ledger)
    for number in range(3000):
        queue.add(Looked(str(number), "abc"[number % 3]))
    Looked.reads = 0
    assert names(queue.last(2)) == ["2999", "2998"]
    assert [queue.pop().request_id for _ in range(3)] == ["0", "1", "2"]
    assert names(islice(queue, 2)) == ["3", "4"]
    assert Looked.reads < 50


# The ledger.


class Answering:
    """A running request, with the output tokens it has so far."""

    priority = 0

    def __init__(self, name, tenant, *, prompt=100):
        self.request_id, self.tenant, self.num_prompt_tokens, self.num_output_tokens = name, tenant, prompt, 0


class Desk:
    """A queue and its ledger; `serve` lets the next one in, `produce` adds output tokens and settles."""

    def __init__(self):
        self.ledger = TenantLedger(lambda each: Tenant(each.tenant, 1.0))
        self.queue = FairQueue(self.ledger)
        self.running = {}

    def add(self, *names, prompt=100):
        for name in names:
            self.queue.add(Answering(name, name[0], prompt=prompt))

    def serve(self):
        each = self.queue.pop()
        self.running[each.request_id] = each
        return each.request_id

    def produce(self, tokens, *names):
        for name in names:
            self.running[name].num_output_tokens += tokens
        self.ledger.settle()

    def end(self, *names):
        for name in names:
            self.ledger.end(self.running.pop(name))
        self.ledger.settle()


def test_an_answer_is_paid_for_while_it_is_produced():
    desk = Desk()
    desk.add("a0", "b0", "a1", "a2", "b1", "b2")
    assert [desk.serve(), desk.serve()] == ["a0", "b0"]
    desk.produce(40, "a0")
    desk.produce(10, "a0")
    assert desk.ledger.counter("a") - desk.ledger.counter("b") == 2 * 50
    assert [desk.serve() for _ in range(4)] == ["b1", "a1", "b2", "a2"], "a has had a prompt's worth more"
    desk.running["a0"].num_output_tokens += 5
    desk.end("a0")
    assert desk.ledger.counter("a") == 3 * 100 + 2 * 55, "nothing is charged twice or left out"


def test_what_a_tenant_got_while_it_was_alone_is_not_held_against_it():
    desk = Desk()
    desk.add("a0", "a1")
    desk.serve()
    desk.produce(1000, "a0")
    desk.add("b0", "a2")
    desk.produce(0)
    assert [desk.serve() for _ in range(3)] == ["a1", "b0", "a2"]
    desk.produce(7, "a0")
    assert desk.ledger.counter("a") == 300 + 2 * 7


def test_an_aborted_request_raises_no_level():
    desk = Desk()
    desk.add("a0", "b0", "b1")
    for _ in range(2):
        desk.serve()
    desk.produce(500, "a0")
    late = Answering("a1", "a")
    desk.queue.add(late)
    desk.queue.remove(next(each for each in desk.queue if each.request_id == "b1"))
    desk.queue.remove(late)
    desk.add("b2", "a2")
    assert [desk.serve(), desk.serve()] == ["b2", "a2"], "a owes its long answer still"


def test_tenants_that_are_gone_are_forgotten():
    """Ten thousand names, each used once while others wait, or alone."""
    desk = Desk()
    most = 0
    for number in range(10_000):
        busy = number % 400 < 200
        if busy and not desk.queue:
            desk.queue.add(Answering(f"waiting{number}", "steady"))
            desk.queue.add(Answering(f"more{number}", "steady"))
        desk.queue.add(Answering(f"r{number}", f"t{number}"))
        while len(desk.queue) > busy:
            name = desk.serve()
            desk.produce(number % 7, name)
            desk.end(name)
        most = max(most, len(desk.ledger))
    assert most <= 260


def test_a_tenant_that_still_owes_is_remembered_and_comes_back_owing():
    desk = Desk()
    desk.add("a0", "b0")
    desk.serve(), desk.serve()
    desk.produce(200, "a0")
    desk.end("a0", "b0")
    desk.add("b1", "a1", "b2", "b3", "b4")
    assert [desk.serve() for _ in range(5)] == ["b1", "b2", "b3", "b4", "a1"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.integers(1, 300)), max_size=60))
def test_forgetting_moves_no_tenant_by_more_than_a_turn(events):
    """The same events with and without a ledger that forgets: at any time each tenant was served as often, or one less.

    Those that are forgotten and a newcomer start level, where a ledger that remembers may put the newcomer first.
    """
    forgets, remembers = Desk(), Desk()
    remembers.ledger._forget_gone = lambda: None
    for desk in (forgets, remembers):
        desk.order = []
        for number, (tenant, kind, tokens) in enumerate(events):
            if kind < 2:
                desk.add(f"{tenant}{number}", prompt=tokens)
            elif kind == 2 and desk.queue:
                desk.order.append(desk.serve())
                desk.produce(tokens, desk.order[-1])
            elif desk.running:
                desk.end(next(iter(desk.running)))
    for served in range(len(remembers.order)):
        counts = [Counter(name[0] for name in desk.order[: served + 1]) for desk in (forgets, remembers)]
        assert all(abs(counts[0][tenant] - counts[1][tenant]) <= 1 for tenant in "abcd")


def test_a_removed_request_is_gone_and_costs_its_tenant_nothing():
    gone = request("gone", "a")
    queue = queue_of(gone, request("a1", "a"), request("b1", "b"))
    queue.remove(gone)
    assert len(queue) == 2 and popped(queue) == ["a1", "b1"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.integers(-1, 1), st.booleans()), max_size=40))
def test_the_listed_order_is_the_order_of_service_and_every_request_gets_a_turn(arrivals):
    queue = queue_of()
    for number, (tenant, prompt, priority, pops) in enumerate(arrivals):
        queue.add(request(f"{tenant}{number}", tenant, weight=ord(tenant) - 96, prompt=prompt, priority=priority))
        if pops:
            queue.pop()
    listed = names(queue)
    assert popped(queue) == listed
    assert len(queue) == 0 and list(queue) == []


def test_a_request_that_names_no_tenant_has_the_default_one():
    assert tenant_of(request("r")) == Tenant("", 1.0)
    assert tenant_of(request("r", "team", weight=2)) == Tenant("team", 2.0)
    with pytest.raises(ValueError, match=r"weight of tenant 'team' is 0"):
        Tenant("team", 0.0)
