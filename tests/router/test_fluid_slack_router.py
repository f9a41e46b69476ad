"""Which replica a request goes to: the one with the largest share of free slots."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

from ray.serve._private.common import DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from replicas.routing_stats import RoutingStats
from router import rotation
from router.request_router import FluidSlackRouter

DEPLOYMENT = DeploymentID(name="HeadraceServer:m", app_name="headrace")


def replica(name: str, *, slots: int = 0, occupied: int = 0, models: tuple[str, ...] = ()) -> SimpleNamespace:
    """A replica as Serve's routers see it; one without slots has not reported yet."""
    stats = RoutingStats(slots=slots, occupied=occupied, kv_used_fraction=0.5).as_dict() if slots else {}
    return SimpleNamespace(
        replica_id=ReplicaID(name, DEPLOYMENT), routing_stats=stats, multiplexed_model_ids=set(models)
    )


class Router(FluidSlackRouter):
    """The router with its replicas given, instead of a Serve controller that tells them."""

    def __init__(self, *replicas: Any, ongoing: dict[str, int] | None = None) -> None:
        self._replicas = {entry.replica_id: entry for entry in replicas}
        self._replica_id_set = set(self._replicas)
        self._replica_queue_len_cache = {
            ReplicaID(name, DEPLOYMENT): count for name, count in (ongoing or {}).items()
        }
        self._prefer_local_node_routing = self._prefer_local_az_routing = False
        self._multiplexed_model_id_fallback_match: set[str] = set()
        self._multiplexed_model_id_to_replica_ids = {}
        self._update_multiplexed_model_ids_with_replicas(list(replicas))


def ranks(router: FluidSlackRouter, model_id: str | None = None) -> list[list[str]]:
    async def choose() -> list[list[str]]:
        pending = None
        if model_id is not None:
            metadata = RequestMetadata(request_id="r", internal_request_id="r", multiplexed_model_id=model_id)
            pending = PendingRequest(args=[], kwargs={}, metadata=metadata)
        chosen = await router.choose_replicas(list(router.curr_replicas.values()), pending)
        return [[entry.replica_id.unique_id for entry in rank] for rank in chosen]

    return asyncio.run(choose())


def test_the_largest_share_of_free_seats_comes_first() -> None:
    router = Router(
        replica("busy", slots=10, occupied=9), replica("idle", slots=10, occupied=1),
        replica("large", slots=100, occupied=50),
    )
    assert ranks(router) == [["idle"], ["large"], ["busy"]]
    assert ranks(router, "") == [["idle"], ["large"], ["busy"]]


def test_stale_stats_are_corrected_by_what_was_sent_since() -> None:
    replicas = (replica("a", slots=10, occupied=1), replica("b", slots=10, occupied=4))
    assert ranks(Router(*replicas)) == [["a"], ["b"]]
    assert ranks(Router(*replicas, ongoing={"a": 7})) == [["b"], ["a"]]
    assert ranks(Router(*replicas, ongoing={"a": 0, "b": 2})) == [["a"], ["b"]]  # the engine knows of more


def test_replicas_that_have_not_reported_come_last_least_busy_first() -> None:
    router = Router(
        replica("new"), replica("full", slots=10, occupied=15), replica("newer"), ongoing={"new": 3}
    )
    assert ranks(router) == [["full"], ["newer"], ["new"]]


def test_a_full_replica_passes_on_to_the_next() -> None:
    names = [f"r{number}" for number in range(8)]
    chosen = ranks(Router(*(replica(name, slots=10, occupied=number) for number, name in enumerate(names))))
    assert chosen == [[name] for name in names]  # one to a rank, so every other is tried in turn


def test_equal_replicas_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(*(replica(name, slots=10, occupied=5) for name in ("a", "b")))
    first = []
    for seed in range(20):
        monkeypatch.setattr(random, "shuffle", random.Random(seed).shuffle)
        first.append(ranks(router)[0][0])
    assert set(first) == {"a", "b"}


def test_a_replica_with_the_wanted_adapter_is_preferred() -> None:
    router = Router(
        replica("plain", slots=10), replica("adapted", slots=10, occupied=9, models=("lora",)),
    )
    assert ranks(router, "lora") == [["adapted"]]


def test_a_replica_that_left_meanwhile_is_not_chosen() -> None:
    router = Router(replica("a", slots=10), replica("b", slots=10))
    del router._replicas[ReplicaID("a", DEPLOYMENT)]
    assert ranks(router) == [["b"]]
    assert ranks(Router()) == []


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> rotation.Rotation:
    """The record of failures of this process, empty."""
    fresh = rotation.Rotation(lambda: 0.0)
    monkeypatch.setattr(rotation, "ROTATION", fresh)
    return fresh


def test_a_failed_replica_is_not_chosen_though_it_looks_freest(record: rotation.Rotation) -> None:
    router = Router(replica("black hole", slots=10), replica("busy", slots=10, occupied=9))
    assert ranks(router)[0] == ["black hole"]
    record.take_out("black hole")
    assert ranks(router) == [["busy"]]
    record.take_out("busy")
    assert ranks(router) == []


def pending(name: str) -> PendingRequest:
    return PendingRequest(args=[], kwargs={}, metadata=RequestMetadata(request_id="", internal_request_id=name))


def test_the_record_learns_which_replica_accepted_a_request(record: rotation.Rotation) -> None:
    cancelled: list[str] = []
    with record.following("r") as trail:
        request = SimpleNamespace(metadata=RequestMetadata(request_id="", internal_request_id="r"))
        result = SimpleNamespace(cancel=lambda: cancelled.append("r"))
        Router().on_request_routed(request, ReplicaID("a", DEPLOYMENT), result)
        assert trail.replica == "a" and trail.cancel is not None
        trail.cancel()
    assert cancelled == ["r"]


@pytest.mark.parametrize(("tries_again", "served"), [(False, "first"), (True, "second")])
def test_first_in_first_out_but_for_requests_that_are_tried_elsewhere(
    record: rotation.Rotation, tries_again: bool, served: str
) -> None:
    """The replica was chosen for the second request."""

    async def main() -> list[str]:
        router, waiting = Router(), {name: pending(name) for name in ("first", "second")}
        router._pending_requests_to_fulfill = deque(waiting.values())
        router._pending_requests_by_id = dict(waiting)
        router._pending_requests_by_model_id = defaultdict(deque)
        router._routing_task_by_pending_request_future = {}
        router.queue_wait_time_ms_histogram = SimpleNamespace(observe=lambda waited_ms: None)
        with record.following("second"):
            if tries_again:
                record.try_again("second")
            router._fulfill_next_pending_request(replica("a"), waiting["second"].metadata)
        return [name for name, one in waiting.items() if one.future.done()]

    assert asyncio.run(main()) == [served]
