"""`HeadraceEngine`: Ray's vLLM engine, whose refusals and early errors become errors with an HTTP status.

The engine core answers a refused request with an empty output. vLLM's OpenAI layer would pass that on as a success with
no text, and reports errors of a stream inside the stream, with status 200. Here a request that fails before its first
token fails as a whole.

This module is the fence around the non-public surface of Ray Serve LLM's engine and of vLLM's OpenAI layer that this
needs: `tests/replicas/test_engine_seam.py` fails when an upgrade moves any of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError

from scheduler.refusal import Refusal

_ERROR_EVENT = 'data: {"error":'
Outputs = AsyncGenerator[Any, None]


class RequestRefused(GenerationError, GracefulHTTPError, VLLMClientError):
    """A refusal on its way through vLLM's OpenAI layer.

    Each base is what one of its paths looks for: streams report a GenerationError without a traceback in the log, the
    others take the status of a GracefulHTTPError, and Ray's engine answers a VLLMClientError instead of failing.
    """

    def __init__(self, refusal: Refusal) -> None:
        Exception.__init__(self, refusal.text)  # the bases' own want different arguments
        self.message = refusal.text
        self.status_code = self.http_status = HTTPStatus.TOO_MANY_REQUESTS


class HeadraceEngine(VLLMEngine):
    """The engine of one replica."""

    def _start_async_llm_engine(self, *args: Any, **kwargs: Any) -> Any:
        client = super()._start_async_llm_engine(*args, **kwargs)
        client.generate = raising_refusals(client.generate)
        return client

    async def chat(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async for chunk in errors_first(super().chat(*args, **kwargs)):
            yield chunk

    async def completions(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async for chunk in errors_first(super().completions(*args, **kwargs)):
            yield chunk


def raising_refusals(generate: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """`AsyncLLM.generate`, raising `RequestRefused` where the engine core refused the request.

    One of several choices that is refused when another has begun ends as aborted instead: nothing is cut.
    """

    @functools.wraps(generate)
    async def generating(*args: Any, **kwargs: Any) -> Outputs:
        begun = False
        async for output in generate(*args, **kwargs):
            refusals = [Refusal.from_text(choice.stop_reason) for choice in output.outputs]
            if not begun and (refusal := next(filter(None, refusals), None)):
                raise RequestRefused(refusal)
            begun = True
            yield output

    return generating


async def errors_first(chunks: Outputs) -> Outputs:
    """The same chunks; a stream whose first event is an error becomes that one ErrorResponse."""
    first = True
    async for chunk in chunks:
        if first and isinstance(chunk, str) and chunk.startswith(_ERROR_EVENT):
            error = json.loads(chunk.removeprefix("data: "))["error"]
            yield ErrorResponse(error=ErrorInfo(**error))
            return
        first = False
        yield chunk
