"""Serve's side of the choice of a replica: what the router is told, and the ranks that it returns."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

from ray.serve._private.common import DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from replicas.marks import LatestMarks
from replicas.prompt_blocks import blocks_in
from replicas.routing_stats import RoutingStats
from router import rotation
from router.asked import asked_of
from router.ranking import Sent
from router.request_router import FluidRouter
from scheduler.messages import Outlook

DEPLOYMENT = DeploymentID(name="HeadraceServer:m", app_name="headrace")


def replica(
    name: str, *, slots: int = 0, occupied: int = 0, models: tuple[str, ...] = (), outlook: Outlook | None = None,
) -> SimpleNamespace:
    """A replica as Serve's routers see it; one without slots has not reported yet."""
    reported = RoutingStats(slots, occupied, kv_used_fraction=0.5, outlook=outlook, at_s=time.time() - 0.5)
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


def chat(*said: str, **more: Any) -> SimpleNamespace:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]
    return SimpleNamespace(messages=messages, **more)


def shared_blocks(one: Any, other: Any) -> int:
    same = zip(asked_of(one).blocks, asked_of(other).blocks, strict=False)
    return sum(a == b for a, b in same)


def test_prompts_share_the_blocks_of_their_beginning() -> None:
    first, later = chat("s" * 600, "u" * 600), chat("s" * 600, "u" * 600, "a" * 600, "v" * 600)
    assert shared_blocks(first, later) == len(asked_of(first).blocks) == 4, "of 256 characters, 64 tokens, each"
    assert len(asked_of(later).blocks) == 9
    assert shared_blocks(first, chat("s" * 600, "w" * 600)) == 2
    assert shared_blocks(first, chat("s" * 600, "u" * 600, cache_salt="mine")) == 0
    assert shared_blocks(chat("s" * 600, model="m"), chat("s" * 600, model="m:adapter")) == 0
    ids = SimpleNamespace(prompt=list(range(200)))
    assert shared_blocks(ids, SimpleNamespace(prompt=[*range(150), 7])) == 2
    assert shared_blocks(SimpleNamespace(prompt=["p" * 600, "q"]), SimpleNamespace(prompt="p" * 600)) == 2
    typed = SimpleNamespace(messages=[SimpleNamespace(role="system", content="s" * 600)])
    assert shared_blocks(typed, chat("s" * 600)) == 2


def test_pictures_are_told_apart() -> None:
    def shown(url: str) -> SimpleNamespace:
        picture = {"type": "image_url", "image_url": {"url": url}}
        before, after = ({"type": "text", "text": text} for text in ("s" * 300, "w" * 600))
        return SimpleNamespace(messages=[{"role": "user", "content": [before, picture, after]}])

    assert shared_blocks(shown("one"), shown("one")) == 3
    assert shared_blocks(shown("one"), shown("two")) == 1


@pytest.mark.parametrize("body", [{"messages": []}, {"messages": "text"}, {"prompt": [[]]}, {"prompt": None}, {}])
def test_of_a_body_without_a_prompt_no_blocks_are_known(body: dict[str, Any]) -> None:
    assert list(asked_of(SimpleNamespace(**body)).blocks) == []


def test_a_conversation_goes_where_its_beginning_was_accepted() -> None:
    outlook = Outlook(wait_s=0.0, prompt_s=1e-4, token_s=0.05, added_s=1e-9, limit_s=0.0, output_tokens=100.0)
    router = Router(*(replica(name, slots=10, outlook=outlook) for name in "abc"))
    now_s, body = [time.time()], chat("s" * 4000, "u" * 4000)
    router._sent = Sent(lambda: now_s[0], lambda: now_s[0])

    async def goes(name: str, accepted_by: str | None = None) -> str:
        now_s[0] += 0.4  # the one before has been computed
        request = PendingRequest(
            args=[body], kwargs={}, metadata=RequestMetadata(request_id="", internal_request_id=name)
        )
        ranked = await router.choose_replicas(list(router.curr_replicas.values()), request)
        chosen = str(ranked[0][0].replica_id.unique_id)
        accepted_by = accepted_by or chosen
        router.on_request_routed(request, ReplicaID(accepted_by, DEPLOYMENT), SimpleNamespace(cancel=None))
        router.on_request_completed(ReplicaID(accepted_by, DEPLOYMENT), name)
        return chosen

    asyncio.run(goes("1", accepted_by="b"))
    assert [asyncio.run(goes(str(number))) for number in range(2, 6)] == ["b"] * 4, "not where it was chosen to go"
    router._sent.keep(["a", "c"])
    assert asyncio.run(goes("8", accepted_by="c")) in "abc"
    assert asyncio.run(goes("9")) == "c", "a replica that is gone has taken its cache along"


async def first_of(router: Router, body: Any) -> str:
    request = PendingRequest(
        args=[body], kwargs={}, metadata=RequestMetadata(request_id="", internal_request_id="1")
    )
    ranked = await router.choose_replicas(list(router.curr_replicas.values()), request)
    return str(ranked[0][0].replica_id.unique_id)


def test_the_next_turn_of_a_conversation_goes_where_another_ingress_sent_it() -> None:
    outlook = Outlook(wait_s=0.0, prompt_s=1e-4, token_s=0.05, added_s=1e-9, limit_s=0.0, output_tokens=100.0)
    held, later = chat("s" * 4000, "u" * 4000), chat("s" * 4000, "u" * 4000, "a" * 900, "v" * 900)
    latest = LatestMarks()
    latest.note(blocks_in(held))
    for name in "abc":
        replicas = [replica(one, slots=10, outlook=outlook) for one in "abc"]
        (holder,) = (one for one in replicas if one.replica_id.unique_id == name)
        stats = RoutingStats.from_dict(holder.routing_stats)
        holder.routing_stats = dataclasses.replace(stats, marks=latest.told()).as_dict()
        assert asyncio.run(first_of(Router(*replicas), later)) == name


def test_a_full_replica_passes_on_to_the_next() -> None:
    names = [f"r{number}" for number in range(8)]
    chosen = ranks(Router(*(replica(name, slots=10, occupied=number) for number, name in enumerate(names))))
    assert chosen == [[name] for name in names]  # one to a rank, so every other is tried in turn


def test_a_replica_with_the_wanted_adapter_is_preferred() -> None:
    router = Router(
        replica("plain", slots=10), replica("adapted", slots=10, occupied=9, models=("lora",)),
    )
    assert ranks(router, "lora") == [["adapted"]]


def test_replicas_with_the_wanted_adapter_are_ranked_among_each_other() -> None:
    router = Router(
        replica("plain", slots=10), replica("busy", slots=10, occupied=9, models=("lora",)),
        replica("other", slots=10, models=("another",)), replica("idle", slots=10, occupied=1, models=("lora", "more")),
    )
    assert ranks(router, "lora") == [["idle"], ["busy"]]


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
