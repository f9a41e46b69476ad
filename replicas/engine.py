"""`HeadraceEngine`: Ray's vLLM engine; rejections and early errors become errors with an HTTP status.

The engine core answers a request that it turns away with an empty output. vLLM's OpenAI layer would pass that on as a
success with no text, and reports errors of a stream inside the stream, with status 200. Here a request that fails
before its first token fails as a whole, and an answer that a stopping engine cuts ends with an error.

This module is the fence around the non-public surface of Ray Serve LLM's engine and of vLLM's OpenAI layer that this
needs: `tests/replicas/test_engine_seam.py` fails when an upgrade moves any of it.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError

from replicas.delivery import noting
from replicas.engine_client import EngineClient
from replicas.engine_health import EngineHealth
from replicas.failed_answers import ERROR_EVENT, failing_clearly
from scheduler.rejection import Kind, Rejection

_ENGINE_ENDS_S = 15.0
"""Bound on the engine core's own end; after it vLLM kills the process."""
Outputs = AsyncGenerator[Any, None]


class RequestRejected(GenerationError, GracefulHTTPError, VLLMClientError):
    """A rejection on its way through vLLM's OpenAI layer.

    Its message is the marked JSON, the only part of an error that every path passes on unchanged. Each base class is
    expected by one path: streams report a GenerationError without a traceback in the log, the others take the
    status of a GracefulHTTPError, and Ray's engine answers a VLLMClientError instead of failing.
    """

    def __init__(self, rejection: Rejection) -> None:
        Exception.__init__(self, rejection.as_json())  # the base classes take different arguments
        self.message = rejection.as_json()
        self.status_code = self.http_status = rejection.kind.http_status


class HeadraceEngine(VLLMEngine):
    """The engine of one replica."""

    _health: EngineHealth | None = None

    def be_watched(self, health: EngineHealth) -> None:
        """Have `health` watch the engine, and mark the errors of requests that its failure ends."""
        self._health = health
        health.watch(EngineClient(self._engine_client))

    def _start_async_llm_engine(self, *args: Any, **kwargs: Any) -> Any:
        client = super()._start_async_llm_engine(*args, **kwargs)
        client.generate = noting(raising_rejections(client.generate))
        return client

    async def shutdown(self) -> None:
        """Ray's own, then vLLM's: an engine core that is killed with its replica leaves its shared memory behind."""
        await super().shutdown()
        if self._engine_client is not None:
            await asyncio.to_thread(self._engine_client.shutdown, timeout=_ENGINE_ENDS_S)

    async def chat(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async with aclosing(self._answered(super().chat(*args, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def completions(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async with aclosing(self._answered(super().completions(*args, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def transcriptions(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async with aclosing(self._answered(super().transcriptions(*args, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    def _answered(self, chunks: Outputs) -> Outputs:
        answered = errors_first(chunks)
        return failing_clearly(answered, self._health) if self._health else answered


def raising_rejections(generate: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """`AsyncLLM.generate`, raising `RequestRejected` where the engine core turned the request away: all its choices.

    The engine core rejects or serves all choices of a request together. If one is rejected although another was served,
    it ends as aborted, and the finished choice is kept. An engine that stops may end a request at any time.
    """

    @functools.wraps(generate)
    async def generating(*args: Any, **kwargs: Any) -> Outputs:
        begun = False
        async with aclosing(generate(*args, **kwargs)) as outputs:  # closed at once, else other choices run on
            async for output in outputs:
                if (rejection := _rejection_of(output)) and (not begun or rejection.kind is Kind.ENDED):
                    raise RequestRejected(rejection)
                begun = True
                yield output

    return generating


def _rejection_of(output: Any) -> Rejection | None:
    rejections = [Rejection.of_answer(choice.finish_reason, choice.stop_reason) for choice in output.outputs]
    ended = next((one for one in rejections if one and one.kind is Kind.ENDED), None)
    return ended or (rejections[0] if rejections and all(rejections) else None)


async def errors_first(chunks: Outputs) -> Outputs:
    """The same chunks; a stream that begins with an error event becomes that one ErrorResponse.

    An answer that was begun and then cut ends with an error event in words, and with nothing that makes it look whole.
    """
    first = True
    async with aclosing(chunks):
        async for chunk in chunks:
            if isinstance(chunk, str) and chunk.startswith(ERROR_EVENT):
                error = json.loads(chunk.removeprefix("data: "))["error"]
                rejection = Rejection.from_json(error.get("message"))
                if first:
                    yield ErrorResponse(error=ErrorInfo(**_with_kind(error, rejection)))
                    return
                if rejection is not None:
                    in_words = _with_kind(error, rejection) | {"message": rejection.text}
                    yield f"data: {json.dumps({'error': in_words})}\n\n"
                    return
            elif first and isinstance(chunk, ErrorResponse):
                given = chunk.error.model_dump()
                chunk = ErrorResponse(error=ErrorInfo(**_with_kind(given, Rejection.from_json(given["message"]))))
            first = False
            yield chunk


def _with_kind(error: dict[str, Any], rejection: Rejection | None) -> dict[str, Any]:
    """The error with the type and status by which the ingress knows a request that it may send elsewhere."""
    if rejection is None or rejection.kind is Kind.REJECTED:
        return error
    return error | {"type": rejection.kind.value, "code": rejection.kind.http_status.value}


def recalled(rejection: Rejection) -> ErrorResponse:
    """The answer to a request that comes to a stopping replica."""
    error = {"message": rejection.as_json(), "type": "", "code": 0}
    return ErrorResponse(error=ErrorInfo(**_with_kind(error, rejection)))
