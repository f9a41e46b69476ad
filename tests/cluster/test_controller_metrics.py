"""What the controller records, the replicas that the load needs, and the page that lists all metrics."""

from __future__ import annotations

from typing import Any

import pytest
from fake_meter import FakeMeter
from import_graph import ROOT

from cluster.measured import ControllerMeter, replicas_wanted
from cluster.metrics_page import page
from scheduler.metrics import ALL, CHANNEL_SECONDS, CONTROLLER_AGE, CYCLE_SECONDS, REPLICAS, REPLICAS_WANTED

PAGE = ROOT / "docs" / "reference" / "metrics.md"


def planned(load: float | None, limit: str = "memory") -> dict[str, Any]:
    return {"rate_rps": 1.0, "fluid": {"load": 0.1, "limit": "fluid"}, "forecast": {"load": load, "limit": limit}}


@pytest.mark.parametrize(("shown", "wanted"), [
    ([planned(0.4), planned(0.5)], 1),
    ([planned(0.6), planned(0.6, "slots")], 2),
    ([planned(1.4), planned(1.8, "TPOT target")], 4),
    ([planned(1.0), planned(1.0)], 2),
    ([planned(0.0)], 1),
    ([{"fluid": {"load": 1.5, "limit": "iteration time"}, "forecast": None}], 2),
    ([planned(None), {"fluid": None, "forecast": None}], None),
])
def test_replicas_wanted_is_the_sum_of_the_loads_rounded_up(
    shown: list[dict[str, Any]], wanted: int | None
) -> None:
    assert replicas_wanted(shown) == wanted


def test_the_controller_tells_of_the_engines_it_has_heard_and_of_its_own_pace() -> None:
    meter, now_s = FakeMeter(), [100.0]
    controller = ControllerMeter(meter, lambda: now_s[0])
    with controller.cycle():
        now_s[0] += 0.5
        with controller.channel("m"):
            now_s[0] += 0.25
    now_s[0] += 3.0
    controller.tell({"a": ("m", planned(0.9)), "b": ("m", planned(0.9)), "c": ("other", {})})
    assert meter.seconds(CYCLE_SECONDS) == [0.75] and meter.seconds(CHANNEL_SECONDS, model="m") == [0.25]
    assert meter.value(CONTROLLER_AGE) == 3.0
    assert meter.value(REPLICAS, model="m") == 2 and meter.value(REPLICAS, model="other") == 1
    assert meter.value(REPLICAS_WANTED, model="m") == 2
    offered = {labels for (name, labels) in meter.values if name == "headrace_offered_rate"}
    assert {dict(labels)["replica"] for labels in offered} == {"a", "b"}


def test_a_cycle_that_fails_does_not_make_the_controller_look_alive() -> None:
    meter, now_s = FakeMeter(), [0.0]
    controller = ControllerMeter(meter, lambda: now_s[0])
    with pytest.raises(RuntimeError), controller.cycle():
        now_s[0] = 90.0
        raise RuntimeError
    controller.tell({})
    assert meter.value(CONTROLLER_AGE) == 90.0 and not meter.seconds(CYCLE_SECONDS)


def test_an_engine_that_is_gone_is_told_no_more() -> None:
    meter = FakeMeter()
    controller = ControllerMeter(meter)
    controller.tell({"a": ("m", planned(0.9)), "b": ("m", planned(0.9))})
    meter.values.clear()
    controller.tell({"a": ("m", planned(0.9))})
    assert {dict(labels).get("replica", "a") for _, labels in meter.values} == {"a"}


def test_the_reference_page_is_the_one_that_the_code_gives() -> None:
    assert PAGE.read_text() == page(), "run python -m cluster.metrics_page > docs/reference/metrics.md"
    assert all(f"`{metric.exposed}`" in page() for metric in ALL)
