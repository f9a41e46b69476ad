"""The rules of others for the number of replicas, and the one that knows the future."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from scheduler.tuning.slo import Slo
from simulator.scenario.autoscalers import (
    AUTOSCALERS,
    RIVALS,
    Autoscaler,
    FleetView,
    OngoingRequests,
    Oracle,
    SloKeda,
    parse_autoscaler,
)

TARGETS = Slo(1.0, 0.1, None)


def follow(rule: Autoscaler, ready: int, seconds: float, ongoing: Callable[[int], int], **view: object) -> int:
    """The number of replicas after so long; those that are asked for are there at once."""
    for number in range(int(seconds / rule.every_s)):
        now_s = (number + 1) * rule.every_s
        ready = rule.wanted(FleetView(now_s, ready, 0, ongoing(ready), **view))  # type: ignore[arg-type]
    return ready


def test_ongoing_requests_asks_for_more_after_30_s_and_for_fewer_after_10_minutes() -> None:
    def busy(_: int) -> int:
        return 40

    rule = OngoingRequests(target=10)
    assert follow(rule, 2, 29, busy) == 2
    assert follow(OngoingRequests(target=10), 2, 31, busy) == 4
    assert follow(OngoingRequests(target=10), 8, 599, busy) == 8
    assert follow(OngoingRequests(target=10), 8, 601, busy) == 4
    assert follow(OngoingRequests(target=10), 0, 2, busy) == 1, "from none at once"


@pytest.mark.parametrize(("ongoing", "ready", "target"), [(40, 2, 10.0), (7, 3, 2.0), (0, 2, 4.0), (19, 5, 4.0)])
def test_ongoing_requests_wants_what_ray_s_own_rule_wants(ongoing: int, ready: int, target: float) -> None:
    config = pytest.importorskip("ray.serve.config")
    policy = pytest.importorskip("ray.serve.autoscaling_policy")
    names = ("deployment_id", "deployment_name", "app_name", "running_replicas", "aggregated_metrics", "raw_metrics")
    context = config.AutoscalingContext(
        **dict.fromkeys(names), current_num_replicas=ready, target_num_replicas=ready, total_num_requests=ongoing,
        total_queued_requests=0, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=99, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=None,
        config=config.AutoscalingConfig(min_replicas=1, max_replicas=99, target_ongoing_requests=target),
    )
    desired, _ = policy.default_autoscaling_policy(context)
    now = OngoingRequests(target=target, up=0.0, down=0.0).wanted(FleetView(1.0, ready, 0, ongoing))
    assert now == max(1, math.ceil(desired))


def test_slo_keda_follows_the_slowest_of_the_two_targets() -> None:
    slow, fast = ((0.9, 0.02),) * 20, ((0.1, 0.02),) * 20
    up = SloKeda(TARGETS)
    assert up.wanted(FleetView(15.0, 4, 0, 9, slow)) == 4 + math.ceil(4 * (0.9 / 0.55 - 1))
    assert up.wanted(FleetView(30.0, 4, 3, 9, slow)) == 7, "once a minute"
    credit = SloKeda(TARGETS)
    assert credit.wanted(FleetView(15.0, 2, 2, 9, slow)) == 4, "those that come are counted on"
    down = SloKeda(TARGETS)
    assert down.wanted(FleetView(15.0, 4, 0, 9, fast)) == 3
    assert down.wanted(FleetView(30.0, 3, 0, 9, fast)) == 3, "one in two minutes"
    assert SloKeda(TARGETS).wanted(FleetView(15.0, 4, 0, 9, ((math.nan, math.nan),))) == 3, "nothing is slow"
    assert SloKeda(TARGETS).wanted(FleetView(15.0, 0, 0, 1)) == 1


def test_the_oracle_asks_in_time_for_what_will_come() -> None:
    arrivals_s = [*(step / 2 for step in range(600)), *(300 + step / 8 for step in range(2400))]  # 2/s, then 8/s
    rule = Oracle(arrivals_s, each_rps=2.0, start_up_s=60.0, fewest=1)
    assert rule.wanted(FleetView(60.0, 1, 0, 0)) == 1
    assert rule.wanted(FleetView(275.0, 1, 0, 0)) == 4
    assert rule.wanted(FleetView(400.0, 4, 0, 0)) == 4


@pytest.mark.parametrize(("text", "said"), [
    ("hpa", "the rules are fluid, ongoing-requests, slo-keda, oracle"), ("oracle:x=1", "each key once"),
    ("fluid:late_costs=1", "above 1"), ("ongoing-requests:target=0", "above 0"), ("slo-keda:up=much", "a number"),
])
def test_a_rule_that_is_none_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_autoscaler(text)


def test_every_rule_can_be_asked_for_by_its_name() -> None:
    assert {parse_autoscaler(name)[0] for name in AUTOSCALERS} == set(AUTOSCALERS)
    assert parse_autoscaler("ongoing-requests:target=32,down=60") == ("ongoing-requests", {"target": 32, "down": 60})
    assert all(isinstance(make(TARGETS), Autoscaler) for make in RIVALS.values())
