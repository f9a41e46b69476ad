"""`HeadraceEngine`: Ray's vLLM engine; rejections and early errors become errors with an HTTP status.

A request that the engine core turns away is raised where vLLM's OpenAI layer asks for its outputs
(`scheduler.request_rejected`). That layer reports errors of a stream inside the stream, with status 200. Here a request
that fails before its first token fails as a whole, and an answer that a stopping engine cuts ends with an error.

This module is the fence around the non-public surface of Ray Serve LLM's engine that this needs:
`tests/replicas/test_engine_seam.py` fails when an upgrade moves any of it.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from replicas.delivery import noting
from replicas.engine_client import EngineClient
from replicas.engine_health import EngineHealth
from replicas.failed_answers import ERROR_EVENT, failing_clearly
from scheduler.rejection import Kind, Rejection
from scheduler.request_rejected import Outputs, raising_rejections

_ENGINE_ENDS_S = 15.0
"""Bound on the engine core's own end; after it vLLM kills the process."""


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
