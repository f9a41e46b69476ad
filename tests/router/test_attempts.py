"""One request over replicas that fail in every way, before and after the client has seen some of the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")

from fastapi import HTTPException
from ray.exceptions import ActorUnavailableError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse, OpenAIHTTPException

from replicas.engine_health import RECALLED, REPLICA_FAILED
from router.attempts import Attempts, ending_at_an_error, error_event_in
from router.errors import Unavailable
from router.rotation import Rotation

A, B = 'data: {"id": 1}\n\n', 'data: {"id": 2}\n\n'
DONE = "data: [DONE]\n\n"
GONE = ActorUnavailableError("gone", b"0" * 16)


def error(code: int, kind: str = "server_error") -> ErrorResponse:
    return ErrorResponse(error=ErrorInfo(message=f"{kind} at /root/secret.py", type=kind, code=code))


def event(kind: str) -> str:
    return f'data: {json.dumps({"error": {"message": "m", "type": kind, "code": 503}})}\n\n'


FAILED, RECALL = error(503, REPLICA_FAILED), error(503, RECALLED)


class Replicas:
    """Each attempt is routed to the first replica offered, which answers with its next script: chunks, or an exception
    to raise; `...` waits for ever."""

    def __init__(self, max_wait_s: float = 600.0, **scripts: list[list[Any]]) -> None:
        self.scripts = scripts
        self.sent: list[str] = []
        self.cancelled: list[str] = []
        self.rotation = Rotation(lambda: 0.0)
        self.is_stopping = False
        self.max_wait_s = max_wait_s
        self.attempts = Attempts(self.rotation, is_stopping=lambda: self.is_stopping)

    async def send(self) -> AsyncGenerator[Any, None]:
        offered = self.rotation.offered(sorted(self.scripts), str, "r")
        name = offered[0] if offered else "nobody"
        if not offered:
            await asyncio.Event().wait()
        self.sent.append(name)
        self.rotation.routed("r", name, lambda: self.cancelled.append(name))
        for item in self.scripts[name].pop(0):
            if isinstance(item, Exception):
                raise item
            if item is ...:
                await asyncio.Event().wait()
            yield item

    async def answer(self) -> list[Any]:
        return [chunk async for chunk in self.attempts.answer(self.send, "r", self.max_wait_s)]

    def ask(self) -> list[Any]:
        return asyncio.run(self.answer())


WHOLE = [[A], [B, DONE]]


@pytest.mark.parametrize("failure", [[FAILED], [[FAILED]], [GONE], [error(500)], [RuntimeError("x")], []], ids=str)
def test_a_failure_before_the_first_chunk_is_tried_once_elsewhere(failure: list[Any]) -> None:
    replicas = Replicas(a=[failure], b=[WHOLE])
    assert replicas.ask() == WHOLE
    assert replicas.sent == ["a", "b"]
    assert replicas.rotation.offered(["a", "b"], str, "next") == ["b"], "the first failed: nothing new goes there"


def test_an_answer_without_streaming_is_tried_elsewhere_too() -> None:
    answer = object()
    replicas = Replicas(a=[[GONE]], b=[[answer]])
    assert replicas.ask() == [answer]


@pytest.mark.parametrize("failure", [FAILED, GONE, error(500), RuntimeError("at /root/secret.py")], ids=str)
def test_two_failures_are_the_end(failure: Any) -> None:
    replicas = Replicas(a=[[failure]], b=[[failure]], c=[WHOLE])
    try:
        (last,) = replicas.ask()
        assert last.error.code == 500
    except OpenAIHTTPException as raised:
        assert raised.status_code == (503 if isinstance(raised, Unavailable) else 500)
        assert "secret" not in raised.message
    assert replicas.sent == ["a", "b"]


@pytest.mark.parametrize("failure", [error(500), RuntimeError("x")], ids=str)
def test_a_request_that_fails_everywhere_takes_no_replica_out(failure: Any) -> None:
    replicas = Replicas(a=[[failure]], b=[[failure]])
    with suppress(OpenAIHTTPException):
        replicas.ask()
    assert replicas.rotation.offered(["a", "b"], str, "next") == ["a", "b"]


def test_a_request_given_back_is_tried_elsewhere_up_to_three_times_and_has_not_failed() -> None:
    replicas = Replicas(a=[[RECALL]], b=[[RECALL]], c=[[RECALL]], d=[[error(500)]], e=[WHOLE])
    assert replicas.ask() == WHOLE
    assert replicas.sent == list("abcde")
    replicas = Replicas(a=[[RECALL]], b=[[RECALL]], c=[[RECALL]], d=[[RECALL]], e=[WHOLE])
    with pytest.raises(Unavailable):
        replicas.ask()
    assert replicas.sent == list("abcd")


def test_while_the_application_stops_a_request_given_back_is_told_so_at_once() -> None:
    replicas = Replicas(a=[[RECALL]], b=[WHOLE])
    replicas.is_stopping = True
    with pytest.raises(Unavailable) as error:
        replicas.ask()
    assert error.value.status_code == 503 and replicas.sent == ["a"]


@pytest.mark.parametrize("code", [400, 404, 429])
def test_what_the_client_did_wrong_and_rejections_are_final(code: int) -> None:
    refused = error(code)
    replicas = Replicas(a=[[refused]], b=[WHOLE])
    assert replicas.ask() == [refused]
    replicas = Replicas(a=[[HTTPException(code)]], b=[WHOLE])
    with pytest.raises(HTTPException):
        replicas.ask()
    assert replicas.sent == ["a"] and replicas.rotation.out() == set()


@pytest.mark.parametrize("failure", [GONE, RuntimeError("at /root/secret.py")], ids=str)
def test_a_stream_that_loses_its_replica_ends_with_an_error_event(failure: Exception) -> None:
    replicas = Replicas(a=[[[A], failure]], b=[WHOLE])
    first, last = replicas.ask()
    assert first == [A]
    assert (error_event_in(last) or {})["code"] == 503 and "secret" not in last
    assert replicas.sent == ["a"], "the client has part of it"
    assert replicas.rotation.out() == ({"a"} if failure is GONE else set())


def test_a_stream_whose_engine_fails_ends_there_and_takes_its_replica_out() -> None:
    replicas = Replicas(a=[[[A], [B, event(REPLICA_FAILED)], [DONE]]], b=[])
    assert replicas.ask() == [[A], [B, event(REPLICA_FAILED)]]
    assert replicas.rotation.out() == {"a"}


def test_a_wait_is_bounded_and_the_replica_is_told() -> None:
    replicas = Replicas(max_wait_s=0.01, a=[[...]])
    with pytest.raises(Unavailable) as raised:
        replicas.ask()
    assert (raised.value.status_code, raised.value.retry_after_s) == (503, 1)
    assert replicas.cancelled == ["a"]


def test_a_client_that_goes_ends_the_attempt_before_and_after_the_first_chunk() -> None:
    async def main() -> None:
        waiting = Replicas(a=[[...]])
        task = asyncio.create_task(waiting.answer())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert waiting.cancelled == ["a"]
        begun = Replicas(a=[[[A], ...]])
        async with aclosing(begun.attempts.answer(begun.send, "r")) as chunks:
            assert await anext(chunks) == [A]
        assert begun.cancelled == ["a"]

    asyncio.run(main())


def test_a_whole_answer_is_not_cancelled() -> None:
    replicas = Replicas(a=[WHOLE, [object()]])
    replicas.ask()
    replicas.ask()
    assert replicas.cancelled == []


def test_nothing_follows_an_error_not_even_the_end_that_ray_appends() -> None:
    async def packets() -> AsyncGenerator[str, None]:
        for packet in (A, B + event(REPLICA_FAILED), DONE):
            yield packet

    async def main() -> list[str]:
        return [packet async for packet in ending_at_an_error(packets())]

    assert asyncio.run(main()) == [A, B + event(REPLICA_FAILED)]
    said = json.dumps({"choices": [{"text": 'data: {"error": 1}'}]})
    assert error_event_in([f"data: {said}\n\n"]) is None, "an error that the model writes is text"
    assert 'data: {"error":' not in said
