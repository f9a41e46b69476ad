"""Turns among tenants, priorities and ages."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from scheduler.client_input import tenant_of
from scheduler.fair_queue import FairQueue, Tenant, TenantLedger
from scheduler.settings import TENANT, TENANT_WEIGHT


def request(name, tenant=None, *, weight=1.0, prompt=100, priority=0):
    extra = None if tenant is None else {TENANT: tenant, TENANT_WEIGHT: weight}
    return Request(
        request_id=name, prompt_token_ids=[1] * prompt, sampling_params=SamplingParams(max_tokens=4, extra_args=extra),
        pooling_params=None, priority=priority,
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


def test_nobody_saves_service_up_by_staying_away():
    queue = queue_of(*(request(f"busy{n}", "busy") for n in range(30)))
    popped(queue, 20)
    for n in range(10):
        queue.add(request(f"idle{n}", "idle"))
    assert Counter(name[:4] for name in popped(queue, 10)) == {"busy": 5, "idle": 5}


def test_the_last_are_those_farthest_from_their_turn():
    queue = queue_of(*(request(f"a{n}", "a", weight=3) for n in range(6)), *(request(f"b{n}", "b") for n in range(6)),
                     request("late", "a", weight=3, priority=9))
    order = names(queue)
    assert names(queue.last(4)) == order[::-1][:4]
    assert "b5" in names(queue.last(1))
    alone = queue_of(request("x"), request("low", priority=5), request("y"))
    assert names(alone.last(2)) == ["low", "y"] and alone.last(0) == []


def test_a_removed_request_is_gone_and_costs_its_tenant_nothing():
    gone = request("gone", "a")
    queue = queue_of(gone, request("a1", "a"), request("b1", "b"))
    queue.remove(gone)
    assert len(queue) == 2 and popped(queue) == ["a1", "b1"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.integers(-1, 1), st.booleans()), max_size=40))
def test_the_listed_order_is_the_order_of_service_and_everybody_gets_a_turn(arrivals):
    queue = queue_of()
    for number, (tenant, prompt, priority, pops) in enumerate(arrivals):
        queue.add(request(f"{tenant}{number}", tenant, weight=ord(tenant) - 96, prompt=prompt, priority=priority))
        if pops:
            queue.pop()
    listed = names(queue)
    assert popped(queue) == listed
    assert len(queue) == 0 and list(queue) == []


def test_a_request_that_names_no_tenant_has_one_like_everybody_else():
    assert tenant_of(request("r")) == Tenant("", 1.0)
    assert tenant_of(request("r", "team", weight=2)) == Tenant("team", 2.0)
    with pytest.raises(ValueError, match=r"weight of tenant 'team' is 0"):
        Tenant("team", 0.0)
