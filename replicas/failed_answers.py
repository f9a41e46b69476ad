"""What a replica answers when its engine has failed: an error that says so, and never a stream that looks complete.

vLLM's OpenAI layer ends a stream that loses its engine with an error event, and then with `[DONE]` as any other. A
client library may take that for the end of a whole answer, so nothing follows an error here.

Part of the fence around Ray Serve LLM's non-public surface: `tests/replicas/test_engine_seam.py`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from replicas.engine_health import REPLICA_FAILED, EngineHealth

ERROR_EVENT = 'data: {"error":'
"""How the event of an error begins, in vLLM's streams and in ours."""
_MESSAGE = "the replica that had this request has failed and is being replaced; send the request again"
Outputs = AsyncGenerator[Any, None]


def is_error(chunk: Any) -> bool:
    """Whether a chunk of an answer is an error: in place of an answer, or an event in a stream."""
    return isinstance(chunk, ErrorResponse) or (isinstance(chunk, str) and chunk.startswith(ERROR_EVENT))


async def failing_clearly(chunks: Outputs, health: EngineHealth) -> Outputs:
    """The same chunks up to the first error. When the engine has failed, that error is marked `replica_failed`."""
    begun = False
    with health.request():
        try:
            health.check()
            async with aclosing(chunks):
                async for chunk in chunks:
                    failed = is_error(chunk)
                    if failed:
                        health.check()
                    yield chunk
                    if failed:
                        return
                    begun = True
        except Exception:  # vLLM's answer to a request that it has not begun is the exception itself
            if not health.failed:
                raise
            yield _event() if begun else _response()


def _response() -> ErrorResponse:
    return ErrorResponse(
        error=ErrorInfo(message=_MESSAGE, type=REPLICA_FAILED, code=int(HTTPStatus.SERVICE_UNAVAILABLE))
    )


def _event() -> str:
    return f"data: {json.dumps(_response().model_dump(include={'error'}))}\n\n"
