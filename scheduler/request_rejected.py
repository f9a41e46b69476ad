"""A rejection on its way from the engine core through vLLM's OpenAI layer, raised by `generate`.

The engine core answers a request that it turns away with an empty output. vLLM's OpenAI layer would pass that on as a
success with no text; a stream would not even carry the stop reason.

Part of the fence around vLLM's OpenAI layer: `tests/scheduler/alone/test_frontend_seam.py` and
`tests/replicas/test_engine_seam.py` fail when an upgrade moves it.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError

from scheduler.rejection import Kind, Rejection

Outputs = AsyncGenerator[Any, None]


class RequestRejected(GenerationError, GracefulHTTPError, VLLMClientError):
    """A rejection, as an error.

    Its message is the marked JSON (or `message`), the only part of an error that every path passes on unchanged. Each
    base class is expected by one path: streams report a GenerationError without a traceback in the log, the others take
    the status of a GracefulHTTPError, and Ray's engine answers a VLLMClientError instead of failing.
    """

    def __init__(self, rejection: Rejection, message: str = "") -> None:
        message = message or rejection.as_json()
        Exception.__init__(self, message)  # the base classes take different arguments
        self.rejection, self.message = rejection, message
        self.status_code = self.http_status = rejection.kind.http_status


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
