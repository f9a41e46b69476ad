"""Turns among tenants and priorities in an engine, whatever its clients write into their requests."""

import math

import pytest
from engine_harness import Engine, add_many, fluid_params, telemetry, wait

from scheduler.engine.fair_queue import _Account
from scheduler.settings import TENANT, TENANT_WEIGHT


def test_of_two_tenants_in_an_overload_each_is_served_by_its_weight():
    params = fluid_params(ttft_s=0.5, queue_limit=12, kv_limit_tokens=900)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params}, settings={"trust_tenants": True})
    for round_ in range(900):
        for tenant, weight in (("big", 3), ("small", 1)):
            if round_ % 3 == 0:
                extra = {TENANT: tenant, TENANT_WEIGHT: weight}
                engine.add(f"{tenant}{round_}", prompt=100, output=50, extra_args=extra)
        engine.step()
    under_way = dict(engine.first_scheduled)
    engine.run()
    rejected = {name for answer in engine.answers if answer.stop_reason for name in [answer.request_id]}
    served = [sum(name.startswith(tenant) for name in under_way) for tenant in ("big", "small")]
    assert served[0] / served[1] == pytest.approx(3, rel=0.15)
    assert rejected and not rejected & under_way.keys()
    assert telemetry(engine).counters.rejected == len(rejected)


def of_tenant(name):
    return {TENANT: name}


@pytest.mark.parametrize("as_choices", [False, True])
def test_how_one_tenant_sends_has_no_other_tenant_s_requests_rejected(as_choices):
    """Of sixteen choices that had begun all counted as ahead of a request whose turn came first."""
    params = fluid_params(ttft_s=0.6, capacity_rps=30.0, queue_limit=3, kv_limit_tokens=60_000)
    engine = Engine(
        thresholds={"policy": "fluid", "fluid": params}, settings={"trust_tenants": True, "audit_share": 0.0},
        blocks=4000, max_num_seqs=16,
    )
    for step in range(600):
        if step % 40 == 0:
            for choice in range(16):
                name = f"{choice}_chatcmpl-a{step}" if as_choices else f"chatcmpl-a{step}x{choice}"
                engine.add(f"{name}-{step:08x}", prompt=40, output=50, extra_args=of_tenant("a"))
        if step % 10 == 5:
            engine.add(f"chatcmpl-b{step}-{step:08x}", prompt=40, output=50, extra_args=of_tenant("b"))
        engine.step()
    rejected = [answer.request_id for answer in engine.answers if answer.stop_reason]
    assert any("-a" in name for name in rejected)
    assert sum("-b" in name for name in rejected) <= 3


@pytest.mark.parametrize("pushed", [
    {"max_running": 1, "max_hold_s": 0.1}, {"max_running": 1, "valid_for_s": 0.015}, wait(1, max_running=1),
])
def test_a_push_of_thresholds_changes_no_tenants_turn(pushed):
    """Tenant a pays for a long answer when thresholds are pushed, iteration after iteration."""
    orders = []
    for push in (False, True):
        engine = Engine(thresholds={"max_running": 1}, settings={"trust_tenants": True})
        engine.add("a-long", output=60, extra_args=of_tenant("a"))
        engine.step()
        for number in range(6):
            for name in "ba":
                engine.add(f"{name}{number}", output=2, extra_args=of_tenant(name))
        while engine.scheduler.admission_queue.held:
            if push:
                assert engine.apply({"version": 0} | pushed).accepted
            engine.step()
        orders.append("".join(name[0] for name in engine.first_scheduled if "-" not in name))
    assert orders[0] == orders[1] == "bbbbababaaaa"


def test_long_answers_of_one_tenant_are_paid_for_while_they_run():
    """Ten answers of 400 tokens of a run; of the short ones that then wait, b's enter until a's are paid for."""
    engine = Engine(blocks=1024, thresholds={"max_running": 12}, settings={"trust_tenants": True})
    for number in range(10):
        engine.add(f"a-long{number}", output=400, extra_args=of_tenant("a"))
    engine.add("b-long", output=400, extra_args=of_tenant("b"))
    engine.steps(50)
    for number in range(10):
        for name in "ba":
            engine.add(f"{name}{number}", prompt=100, output=1, extra_args=of_tenant(name))
    while len(engine.finished) < 10:
        engine.step()
    assert set(engine.finished) == {f"b{number}" for number in range(10)}
    engine.run()
    assert len(engine.finished) == 31


def test_with_one_tenant_an_iteration_counts_no_tokens(monkeypatch):
    engine = Engine(settings={"trust_tenants": True})
    add_many(engine, 8, output=20)
    engine.steps(3)
    monkeypatch.setattr(_Account, "charge_outputs", None)
    engine.steps(3)
    engine.add("other", extra_args=of_tenant("other"))
    with pytest.raises(TypeError):
        engine.steps(2)


# What clients say of their requests.

NONSENSE = [
    0, -1, 1e300, 10**400, math.nan, math.inf, -math.inf, True, "x", "3", "", "n" * 1000, None, [], [1], {"a": 1},
]


@pytest.mark.parametrize("trust_tenants", [False, True])
def test_no_value_that_a_client_writes_raises_in_the_engine_s_loop(trust_tenants):
    engine = Engine(thresholds={"policy": "fcfs"}, settings={"trust_tenants": trust_tenants}, blocks=1024)
    for place, value in enumerate(NONSENSE):
        engine.add(f"name{place}", extra_args={TENANT: value})
        engine.add(f"weight{place}", extra_args={TENANT: "team", TENANT_WEIGHT: value})
        engine.add(f"length{place}", extra_args={"expected_output_tokens": value})
    engine.add("no arguments at all", extra_args=None)
    engine.run()
    assert len(engine.finished) == 3 * len(NONSENSE) + 1


@pytest.mark.parametrize(
    ("trust_tenants", "first"), [(False, ["a0", "a1", "a2", "a3"]), (True, ["a0", "b0", "b1", "b2"])]
)
def test_a_client_cannot_give_itself_a_weight_unless_an_ingress_signs_requests(trust_tenants, first):
    engine = Engine(thresholds={"policy": "fcfs", "max_running": 1}, settings={"trust_tenants": trust_tenants})
    add_many(engine, 4, "a", extra_args={TENANT: "a", TENANT_WEIGHT: 1})
    add_many(engine, 4, "b", extra_args={TENANT: "b", TENANT_WEIGHT: 1000})
    engine.run()
    assert sorted(engine.first_scheduled, key=engine.first_scheduled.__getitem__)[:4] == first


@pytest.mark.parametrize(("scheduling_policy", "first"), [("fcfs", "polite"), ("priority", "pushy")])
def test_a_client_jumps_the_queue_by_priority_only_where_the_operator_lets_priorities_count(scheduling_policy, first):
    engine = Engine(thresholds={"policy": "fcfs", "max_running": 1}, scheduling_policy=scheduling_policy)
    engine.add("busy", output=4)
    engine.step()
    engine.add("polite", priority=0)
    engine.add("pushy", priority=-(2**31))
    engine.run()
    assert sorted(engine.finished, key=engine.finished_s.__getitem__)[1] == first
