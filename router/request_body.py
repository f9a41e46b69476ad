"""Reads the body of a request within its limits, and finds in it what the front door needs. No Ray.

A body is parsed once here, strictly: what a later stage could only fail on (a lone surrogate, a number beyond 64 bits,
hundreds of nested arrays) is a client's error with a sentence that says so.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic_core import from_json

from replicas.prompt_blocks import CHARACTERS_PER_TOKEN
from router.limits import Limits
from router.refusal import Refusal

_USUAL_OUTPUT_TOKENS = 256
"""Counted for a choice without `max_tokens`."""
_LARGE = re.compile(rb"\d{19}|\d[eE]\+?\d{3}")
"""Only a body with such digits can have a number that does not fit 64 bits."""
_MOST = 2**63
_SCHEMAS = (("structured_outputs", "json"), ("guided_json",))
"""Where vLLM accepts a JSON schema as a string."""


class Disconnected(Exception):
    """The client left before its body was complete."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request demands of the limits of its key. requests: `n` times the number of prompts, as the engine counts
    them; tokens: prompt and output tokens, estimated as `KeyLimits` says."""

    requests: int = 1
    tokens: int = 0


async def read_body(
    headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[Any]], limits: Limits
) -> bytes:
    """The whole body of a request.

    Raises:
        Refusal: it is too large (413) or comes too slowly (408).
        Disconnected: the client left.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
        raise _too_large(limits)
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limits.body_s
    pieces: list[bytes] = []
    received, more = 0, True
    while more:
        try:
            async with asyncio.timeout_at(min(end_s, loop.time() + limits.chunk_s)):
                message = await receive()
        except TimeoutError:
            slow = f"nothing came for {limits.chunk_s:g} s" if loop.time() < end_s else f"it took {limits.body_s:g} s"
            raise Refusal(408, f"the body of the request did not arrive in time: {slow}", closes=True) from None
        if message["type"] != "http.request":
            raise Disconnected
        pieces.append(message.get("body", b""))
        received += len(pieces[-1])
        if received > limits.body_bytes:
            raise _too_large(limits)
        more = message.get("more_body", False)
    return b"".join(pieces)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body of the request is larger than {limits.body_bytes} bytes",
        closes=True,
    )


def require_json(headers: Mapping[bytes, bytes]) -> None:
    """415 unless the content type is JSON."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        raise Refusal(415, "the body must be JSON with the header Content-Type: application/json")


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        Refusal: 400 with what is wrong and where.
    """
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON that can be read: {_without_input(str(error))}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body must be a JSON object")
    _require_shallow(found, limits.json_depth)
    for path in _SCHEMAS:
        _require_shallow_text(found, path, limits.json_depth)
    if _LARGE.search(body):
        _require_small_numbers(found)
    return found


def _without_input(error: str) -> str:
    return error.replace("recursion limit exceeded", "it is nested too deeply")[:100]


def _require_shallow(found: Any, most: int) -> None:
    level: list[Any] = [found]
    for _ in range(most):
        level = [child for parent in level for child in _children(parent) if type(child) in (dict, list)]
        if not level:
            return
    raise Refusal(400, f"the body is nested too deeply; allowed: {most} objects and arrays within each other")


def _require_shallow_text(found: Any, path: tuple[str, ...], most: int) -> None:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, str):
        return
    try:
        schema = from_json(found)
    except ValueError as error:
        field = ".".join(path)
        raise Refusal(400, f"{field} is not a JSON schema: {_without_input(str(error))}") from None
    _require_shallow([schema], most)


def _children(parent: Any) -> Iterable[Any]:
    return parent.values() if type(parent) is dict else parent


def _require_small_numbers(found: Any) -> None:
    level: list[Any] = [found]
    while level:
        deeper: list[Any] = []
        for parent in level:
            for child in _children(parent):
                if type(child) in (dict, list):
                    deeper.append(child)
                elif (type(child) is int and not -_MOST <= child < _MOST) or (
                    type(child) is float and not math.isfinite(child)
                ):
                    raise Refusal(400, "a number in the body is out of range; allowed: numbers that fit 64 bits")
        level = deeper


def asked_for(found: Mapping[str, Any], limits: Limits) -> Demand:
    """What a request to generate asks for.

    Raises:
        Refusal: 400, more than the limits allow.
    """
    prompts, prompt_tokens = _prompts(found.get("prompt"))
    choices = _whole(found.get("n")) or 1
    requests = max(1, prompts) * max(1, choices)
    if requests > limits.choices:
        raise Refusal(
            400, f"n = {choices} for {prompts} prompt{'s' * (prompts != 1)} makes {requests} choices; "
            f"allowed: {limits.choices} in one request",
        )
    most = _whole(found.get("max_completion_tokens")) or _whole(found.get("max_tokens"))
    if limits.max_tokens is not None and most is not None and most > limits.max_tokens:
        raise Refusal(400, f"max_tokens = {most} is not allowed; allowed: at most {limits.max_tokens}")
    if limits.prompt_tokens is not None and prompt_tokens > limits.prompt_tokens:
        raise Refusal(400, f"a prompt has {prompt_tokens} tokens; allowed: at most {limits.prompt_tokens}")
    outputs = requests * max(0, _USUAL_OUTPUT_TOKENS if most is None else most)
    return Demand(requests, _text_tokens(found) * choices + outputs)


def _prompts(prompt: Any) -> tuple[int, int]:
    """The number of prompts of a completion, and the tokens of the longest that is given as token ids."""
    if not isinstance(prompt, list) or not prompt:
        return 1, 0
    if type(prompt[0]) is int:
        return 1, len(prompt)
    return len(prompt), max((len(one) for one in prompt if isinstance(one, list)), default=0)


def _text_tokens(found: Mapping[str, Any]) -> int:
    """Prompt tokens: ids counted, text estimated by its length."""
    prompt = found.get("prompt", found.get("messages"))
    level, tokens, characters = [prompt], 0, 0
    while level:
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, str):
                characters += len(one)
            elif isinstance(one, dict | list):
                deeper.extend(_children(one))
            elif type(one) is int:
                tokens += 1
        level = deeper
    return tokens + characters // CHARACTERS_PER_TOKEN


def _whole(value: Any) -> int | None:
    """A whole number as vLLM's request models read it: also 3.0 and "3"."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
