"""The routers of other projects, and which replicas they choose."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from simulator.config import SimulationError, simulation_config
from simulator.scenario.routers import RIVAL_ROUTERS, ROUTERS, RivalRouter, parse_speeds

OPTIONS = {"lengths": "p64d8", "rate_rps": 4.0, "requests": 10, "replicas": 4}


@dataclass
class Replica:
    index: int
    ongoing: int = 0
    queued: int = 0
    kv_used_fraction: float = 0.0


def made(name: str) -> RivalRouter:
    return RIVAL_ROUTERS[name](random.Random(1))


def replicas(*ongoing: int) -> list[Replica]:
    return [Replica(index, count) for index, count in enumerate(ongoing)]


def chosen(router: RivalRouter, among: list[Replica], times: int = 100, prompt: str = "") -> Counter[int]:
    return Counter(router.choose(among, prompt).index for _ in range(times))


def test_round_robin_takes_them_in_turn() -> None:
    assert chosen(made("round-robin"), replicas(9, 0, 5, 1)) == {0: 25, 1: 25, 2: 25, 3: 25}


def test_power_of_two_never_takes_the_busiest_and_not_always_the_idlest() -> None:
    counts = chosen(made("power-of-two"), replicas(9, 0, 5, 1), 600)
    assert counts[0] == 0 and counts[1] > counts[3] > counts[2] > 50


def test_least_requests_takes_the_idlest_and_breaks_ties_at_random() -> None:
    counts = chosen(made("least-requests"), replicas(3, 1, 1, 2))
    assert set(counts) == {1, 2} and min(counts.values()) > 20


@pytest.mark.ray
def test_ray_s_rule_follows_a_prefix_and_else_the_fewest_texts() -> None:
    router, among = made("ray-prefix"), replicas(0, 0, 0)
    first = router.choose(among, "a" * 100)
    assert all(router.choose(among, "a" * 100 + tail).index == first.index for tail in "xyz")
    second = router.choose(among, "b" * 100)
    third = router.choose(among, "c" * 100)
    assert {first.index, second.index, third.index} == {0, 1, 2}
    assert router.choose(among, "b" * 20 + "d" * 100).index == second.index, "a sixth of the prompt is a match"


def test_llm_d_weighs_prefix_queue_and_memory() -> None:
    router, among = made("llm-d"), replicas(0, 0)
    home = router.choose(among, "a" * 160)
    assert all(router.choose(among, "a" * 160).index == home.index for _ in range(5))
    home.queued = 9
    assert router.choose(among, "a" * 160).index == home.index, "3 for the prefix, 2 for the queue"
    home.kv_used_fraction = 0.6
    assert router.choose(among, "a" * 160).index != home.index
    assert router.choose([home, *among[1 - home.index : 2 - home.index]], "z" * 160).index != home.index


@pytest.mark.parametrize(("text", "speeds"), [
    ("1", (1, 1, 1, 1)), ("1,0.5", (1, 0.5, 1, 0.5)), ("2,1,1,4", (2, 1, 1, 4)),
])
def test_speeds_repeat_until_each_replica_has_one(text: str, speeds: tuple[float, ...]) -> None:
    assert parse_speeds(text, 4) == speeds


@pytest.mark.parametrize(("option", "said"), [
    ({"speeds": "1,0"}, "above 0"), ({"speeds": "fast"}, "numbers with commas"),
    ({"speeds": "1,1,1,1,1"}, "at most one"),
    ({"speeds": "1,inf"}, "finite"), ({"router": "best"}, "the routers are fluid, round-robin"),
    ({"ingresses": 0}, "ingresses"), ({"stats_age_s": 0.0}, "stats_age_s"),
])
def test_what_is_no_router_and_no_speed_is_named(option: dict[str, object], said: str) -> None:
    with pytest.raises(SimulationError, match=said):
        simulation_config(OPTIONS | option)


def test_every_router_is_named_once() -> None:
    assert ROUTERS[0] == "fluid" and set(ROUTERS[1:]) == set(RIVAL_ROUTERS)
