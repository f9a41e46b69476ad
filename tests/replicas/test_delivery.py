"""What leaves a replica, beside the engine's own times; and the surface of vLLM and Ray that tells of it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from ray.llm._internal.serve.utils.batcher import Batcher
from ray.serve.llm.deployment import LLMServer
from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.metrics.stats import RequestStateStats

from replicas.delivery import KEPT_DELIVERIES, Deliveries, noting
from replicas.server import HeadraceServer
from scheduler.messages import Delivered

Steps = list[tuple[float, Any]]


class Replica:
    """An engine that gives outputs at chosen seconds, the OpenAI layer that makes a chunk of each, Ray's batching."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.observed: list[tuple[str, float, float | None]] = []
        self.deliveries = Deliveries(lambda *seen: self.observed.append(seen), lambda: self.now_s)

    async def _engine(self, steps: Steps) -> AsyncGenerator[Any, None]:
        for at_s, output in steps:
            self.now_s = at_s
            yield output

    async def _chunks(self, steps: Steps) -> AsyncGenerator[str, None]:
        async for output in noting(self._engine)(steps):
            yield f"data: {output.request_id}"

    async def serve(self, steps: Steps, *, streamed: bool = True, taken: int | None = None) -> None:
        delivery = self.deliveries.begin()
        # Ray reads the engine's stream in a task of its own.
        chunks = Batcher(self._chunks(steps), interval_ms=0).stream() if streamed else self._chunks(steps)
        async with aclosing(self.deliveries.timed(delivery, chunks, streamed=streamed)) as left:
            async for _ in left:
                if taken is not None and (taken := taken - 1) <= 0:
                    return


def output(name: str = "r", *, choice: int = 0, stats: Any = None) -> Any:
    return SimpleNamespace(request_id=name, outputs=[SimpleNamespace(index=choice)], metrics=stats)


def engine_times(first_s: float, last_s: float, tokens: int) -> RequestStateStats:
    return RequestStateStats(num_generation_tokens=tokens, first_token_ts=first_s, last_token_ts=last_s)


def delivered(steps: Steps, **options: Any) -> tuple[Delivered, ...]:
    replica = Replica()
    asyncio.run(replica.serve(steps, **options))
    return replica.deliveries.latest()


def test_a_stream_is_timed_where_it_leaves() -> None:
    """The engine gave 5 tokens from 10.0 to 12.0; the first left at 10.4, the last at 12.2."""
    stats = engine_times(10.0, 12.0, 5)
    (done,) = delivered([(10.4, output(stats=stats)), (11.0, output(stats=stats)), (12.2, output(stats=stats))])
    assert done == Delivered(1, pytest.approx(0.4), pytest.approx(1.8 / 4))


def test_an_answer_in_one_piece_has_the_engine_s_time_per_token_and_no_delay() -> None:
    (done,) = delivered([(12.2, output(stats=engine_times(10.0, 12.0, 5)))], streamed=False)
    assert done == Delivered(1, None, pytest.approx(0.5))


def test_a_single_token_has_no_time_per_token() -> None:
    (done,) = delivered([(10.1, output(stats=engine_times(10.0, 10.0, 1)))])
    assert done == Delivered(1, pytest.approx(0.1), None)


@pytest.mark.parametrize("first_s", [500.0, 10.0])
def test_a_clock_of_another_machine_gives_no_delay(first_s: float) -> None:
    stats = engine_times(first_s, first_s + 1, 3)
    (done,) = delivered([(100.0, output(stats=stats)), (101.0, output(stats=stats))])
    assert done.delay_s is None


@pytest.mark.parametrize("others", [
    [(2.0, output(choice=1, stats=engine_times(1.0, 2.0, 2)))], [(2.0, output("s", stats=engine_times(1.0, 2.0, 2)))],
], ids=["choices", "prompts"])
def test_several_answers_to_one_request_are_left_out(others: Steps) -> None:
    assert delivered([(1.0, output(stats=engine_times(1.0, 2.0, 2))), *others]) == ()


@pytest.mark.parametrize("stats", [None, engine_times(0.0, 0.0, 0)], ids=["without statistics", "rejected"])
def test_what_the_engine_tells_nothing_of_is_left_out(stats: Any) -> None:
    assert delivered([(1.0, output(stats=stats))]) == ()


def test_a_client_that_leaves_leaves_no_record() -> None:
    stats = engine_times(1.0, 3.0, 3)
    assert delivered([(at_s, output(stats=stats)) for at_s in (1.0, 2.0, 3.0)], taken=1) == ()


def test_requests_side_by_side_are_not_mixed_up_and_the_latest_are_kept() -> None:
    replica, times = Replica(), [engine_times(1.0, 2.0, tokens) for tokens in range(2, KEPT_DELIVERIES + 12)]

    async def main() -> None:
        await asyncio.gather(*(
            replica.serve([(1.0, output(str(place), stats=stats)), (2.0, output(str(place), stats=stats))])
            for place, stats in enumerate(times)
        ))

    asyncio.run(main())
    kept = replica.deliveries.latest()
    assert len(kept) == KEPT_DELIVERIES and [done.seq for done in kept] == list(range(11, KEPT_DELIVERIES + 11))


def test_vllm_hands_its_own_times_on_with_every_output() -> None:
    names = {one.name for one in fields(RequestStateStats)}
    assert {"num_generation_tokens", "first_token_ts", "last_token_ts"} <= names
    assert "metrics=self.stats" in inspect.getsource(RequestState._new_request_output)
    assert "metrics" in inspect.signature(RequestOutput).parameters


@pytest.mark.parametrize("method", ["chat", "completions"])
def test_ray_s_server_answers_with_a_generator_where_this_times_it(method: str) -> None:
    for owner in (LLMServer, HeadraceServer):
        assert list(inspect.signature(getattr(owner, method)).parameters) == ["self", "request", "raw_request_info"]
        assert inspect.iscoroutinefunction(getattr(owner, method))
