"""`HeadraceEngine`: Ray's vLLM engine; rejections and early errors become errors with an HTTP status.

The engine core answers a rejected request with an empty output. vLLM's OpenAI layer would pass that on as a success
with no text, and reports errors of a stream inside the stream, with status 200. Here a request that fails before its
first token fails as a whole.

This module is the fence around the non-public surface of Ray Serve LLM's engine and of vLLM's OpenAI layer that this
needs: `tests/replicas/test_engine_seam.py` fails when an upgrade moves any of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError

from replicas.delivery import noting
from replicas.engine_client import EngineClient
from replicas.engine_health import EngineHealth
from replicas.failed_answers import ERROR_EVENT, failing_clearly
from scheduler.rejection import Rejection

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
        self.status_code = self.http_status = HTTPStatus.TOO_MANY_REQUESTS


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
    """`AsyncLLM.generate`, raising `RequestRejected` where the engine core rejected the request: all of its choices.

    The engine core rejects or serves all choices of a request together. If one is rejected although another was served,
    it ends as aborted, and the finished choice is kept.
    """

    @functools.wraps(generate)
    async def generating(*args: Any, **kwargs: Any) -> Outputs:
        begun = False
        async with aclosing(generate(*args, **kwargs)) as outputs:  # closed at once, else other choices run on
            async for output in outputs:
                if not begun and (rejection := _rejection_of(output)):
                    raise RequestRejected(rejection)
                begun = True
                yield output

    return generating


def _rejection_of(output: Any) -> Rejection | None:
    rejections = [Rejection.of_answer(choice.finish_reason, choice.stop_reason) for choice in output.outputs]
    return rejections[0] if rejections and all(rejections) else None


async def errors_first(chunks: Outputs) -> Outputs:
    """The same chunks; a stream that begins with an error event becomes that one ErrorResponse."""
    first = True
    async with aclosing(chunks):
        async for chunk in chunks:
            if first and isinstance(chunk, str) and chunk.startswith(ERROR_EVENT):
                error = json.loads(chunk.removeprefix("data: "))["error"]
                yield ErrorResponse(error=ErrorInfo(**error))
                return
            first = False
            yield chunk
