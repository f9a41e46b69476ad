"""Serve's side of the choice of a replica: what the router is told, and the ranks that it returns."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

from ray.serve._private.common import DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from replicas.routing_stats import RoutingStats
from router import rotation
from router.asked import asked_of
from router.request_router import FluidRouter

DEPLOYMENT = DeploymentID(name="HeadraceServer:m", app_name="headrace")


def replica(name: str, *, slots: int = 0, occupied: int = 0, models: tuple[str, ...] = ()) -> SimpleNamespace:
    """A replica as Serve's routers see it; one without slots has not reported yet."""
    reported = RoutingStats(slots=slots, occupied=occupied, kv_used_fraction=0.5, at_s=time.time() - 0.5)
    stats = reported.as_dict() if slots else {}
    return SimpleNamespace(
        replica_id=ReplicaID(name, DEPLOYMENT), routing_stats=stats, multiplexed_model_ids=set(models)
    )


class Router(FluidRouter):
    """The router with its replicas given, instead of a Serve controller that tells them."""

    def __init__(self, *replicas: Any) -> None:
        self._replicas = {entry.replica_id: entry for entry in replicas}
        self._replica_id_set = set(self._replicas)
        self._replica_queue_len_cache: dict[Any, int] = {}
        self._prefer_local_node_routing = self._prefer_local_az_routing = False
        self._multiplexed_model_id_fallback_match: set[str] = set()
        self._multiplexed_model_id_to_replica_ids = {}
        self._update_multiplexed_model_ids_with_replicas(list(replicas))
        self.initialize_state()


def ranks(router: FluidRouter, model_id: str | None = None) -> list[list[str]]:
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


def test_a_request_counts_from_its_choice_until_it_is_over() -> None:
    router = Router(replica("a", slots=10, occupied=1), replica("b", slots=10, occupied=3))

    async def chosen(name: str) -> str:
        ranked = await router.choose_replicas(list(router.curr_replicas.values()), pending(name))
        return str(ranked[0][0].replica_id.unique_id)

    async def main() -> None:
        assert [await chosen(name) for name in ("1", "2")] == ["a", "a"]
        assert await chosen("4") in "ab"
        router.on_request_routed(pending("4"), ReplicaID("a", DEPLOYMENT), SimpleNamespace(cancel=None))

    asyncio.run(main())
    assert ranks(router) == [["b"], ["a"]], "the fourth went there after all"
    for name in ("1", "2", "4", "of another router"):
        router.on_request_completed(ReplicaID("a", DEPLOYMENT), name)
    assert ranks(router) == [["a"], ["b"]]


def test_replicas_that_have_not_reported_come_last() -> None:
    router = Router(replica("new"), replica("full", slots=10, occupied=15))
    assert ranks(router) == [["full"], ["new"]]


@pytest.mark.parametrize(("body", "tokens", "output"), [
    ({"prompt": "a" * 400}, 100.0, float("inf")), ({"prompt": [1] * 70, "max_tokens": 16}, 70.0, 16.0),
    ({"prompt": ["a" * 40, "a" * 40]}, 20.0, float("inf")), ({"prompt": [[1] * 5, [2] * 6]}, 11.0, float("inf")),
    ({"messages": [{"role": "user", "content": "a" * 80}, {"content": [{"type": "text", "text": "ab"}]}],
      "max_tokens": 90, "vllm_xargs": {"expected_output_tokens": 12}}, 20.5, 12.0),
    ({"messages": [SimpleNamespace(content="a" * 8)], "max_completion_tokens": 9}, 2.0, 9.0),
    ({"input": "an embedding"}, 3.0, float("inf")), ({"messages": [None, 3.5, {}]}, 0.0, float("inf")),
    ({"prompt": "a", "max_tokens": 10**400}, 0.25, float("inf")),
    ({"prompt": "a", "max_tokens": "9"}, 0.25, float("inf")),
    ({"prompt": "a", "max_tokens": 0}, 0.25, float("inf")), ({"prompt": []}, 0.0, float("inf")),
    ({"prompt": "a", "vllm_xargs": 7}, 0.0, float("inf")),
])
def test_what_is_known_of_a_request_before_it_is_tokenised(
    body: dict[str, Any], tokens: float, output: float
) -> None:
    asked = asked_of(SimpleNamespace(**body))
    assert (asked.prompt_tokens, asked.output_tokens) == (tokens, output)


@pytest.mark.parametrize(("body", "requests"), [
    ({"prompt": "a", "n": 3}, 3), ({"prompt": ["a", "b"], "n": 3}, 6), ({"prompt": [1, 2]}, 1),
    ({"prompt": [[1], [2]]}, 2), ({"messages": [{"content": "a"}, {"content": "b"}], "n": 2}, 2), ({"n": None}, 1),
])
def test_choices_times_prompts_are_requests(body: dict[str, Any], requests: int) -> None:
    assert asked_of(SimpleNamespace(**body)).requests == requests


def test_a_full_replica_passes_on_to_the_next() -> None:
    names = [f"r{number}" for number in range(8)]
    chosen = ranks(Router(*(replica(name, slots=10, occupied=number) for number, name in enumerate(names))))
    assert chosen == [[name] for name in names]  # one to a rank, so every other is tried in turn


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
        request = SimpleNamespace(args=[], metadata=RequestMetadata(request_id="", internal_request_id="r"))
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
