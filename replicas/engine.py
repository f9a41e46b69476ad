"""`HeadraceEngine`: Ray's vLLM engine; rejections and early errors become errors with an HTTP status.

A rejection is raised where vLLM's OpenAI layer asks for the first output (`scheduler.request_rejected`). That layer
reports errors of a stream inside the stream, with status 200. Here a request that fails before its first token fails
as a whole.

This module is the fence around the non-public surface of Ray Serve LLM's engine that this needs:
`tests/replicas/test_engine_seam.py` fails when an upgrade moves any of it.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from replicas.delivery import noting
from scheduler.request_rejected import Outputs, raising_rejections

_ERROR_EVENT = 'data: {"error":'


class HeadraceEngine(VLLMEngine):
    """The engine of one replica."""

    def _start_async_llm_engine(self, *args: Any, **kwargs: Any) -> Any:
        client = super()._start_async_llm_engine(*args, **kwargs)
        client.generate = noting(raising_rejections(client.generate))
        return client

    async def chat(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async with aclosing(errors_first(super().chat(*args, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def completions(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async with aclosing(errors_first(super().completions(*args, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def transcriptions(self, *args: Any, **kwargs: Any) -> Outputs:
        """Ray's own; an error before the first token is yielded as an ErrorResponse."""
        async with aclosing(errors_first(super().transcriptions(*args, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk


async def errors_first(chunks: Outputs) -> Outputs:
    """The same chunks; a stream that begins with an error event becomes that one ErrorResponse."""
    first = True
    async with aclosing(chunks):
        async for chunk in chunks:
            if first and isinstance(chunk, str) and chunk.startswith(_ERROR_EVENT):
                error = json.loads(chunk.removeprefix("data: "))["error"]
                yield ErrorResponse(error=ErrorInfo(**error))
                return
            first = False
            yield chunk
