"""Reads the body of a request within its limits, and finds in it what the front door needs. No Ray.

A body is parsed once here, strictly: what a later stage could only fail on (a lone surrogate, a number beyond 64 bits,
hundreds of nested arrays) is a client's error with a sentence that says so.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain, islice
from typing import Any, TypeVar

from pydantic_core import from_json

from replicas.prompt_blocks import CHARACTERS_PER_TOKEN
from router.limits import Limits
from router.output_bound import DEFAULT_OF_A_COMPLETION, stated_output
from router.refusal import Refusal

_USUAL_OUTPUT_TOKENS = 256
_PROMPT_OF_CHAT = ("messages", "tools", "documents", "chat_template_kwargs")
"""Counted for a choice of a chat that states no number, where there is no limit."""
_AT_ONCE_BYTES = 64 * 1024
"""In a body of this size everything is found within some milliseconds."""
_LARGE_BODIES = ThreadPoolExecutor(1, "large-bodies")
"""One thread: large bodies wait for each other, and the event loop shares the interpreter with one of them only."""
_Found = TypeVar("_Found")
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


async def apart(body: bytes, work: Callable[[], _Found]) -> _Found:
    """What `work` finds in a body; a large one has it done beside the event loop, which goes on with other requests."""
    if len(body) <= _AT_ONCE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_LARGE_BODIES, work)


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


def _levels(found: Any) -> Iterator[list[Any]]:
    """All values of a JSON text from the outermost inwards, those of one depth together.

    Whole lists at a time: a body may have millions of values.
    """
    level = [found]
    while level:
        yield level
        kinds = set(map(type, level))
        lists = [one for one in level if type(one) is list] if list in kinds else []
        objects = [one for one in level if type(one) is dict] if dict in kinds else []
        level = [*chain.from_iterable(lists), *chain.from_iterable(map(dict.values, objects))]


def _require_shallow(found: Any, most: int) -> None:
    too_deep: list[Any] = next(islice(_levels(found), most, None), [])
    if not {list, dict}.isdisjoint(map(type, too_deep)):
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


def _require_small_numbers(found: Any) -> None:
    for level in _levels(found):
        for one in level:
            if (type(one) is int and not -_MOST <= one < _MOST) or (type(one) is float and not math.isfinite(one)):
                raise Refusal(400, "a number in the body is out of range; allowed: numbers that fit 64 bits")


def asked_for(found: Mapping[str, Any], limits: Limits, *, is_chat: bool) -> Demand:
    """What a request to generate asks for, by the fields that vLLM makes a prompt of: of a chat its messages, tools and
    documents, of a completion its prompts.

    Raises:
        Refusal: 400, more than the limits allow.
    """
    prompts, prompt_tokens = (1, 0) if is_chat else _prompts(found.get("prompt"))
    choices = _whole(found.get("n")) or 1
    requests = max(1, prompts) * max(1, choices)
    if requests > limits.choices:
        raise Refusal(
            400, f"n = {choices} for {prompts} prompt{'s' * (prompts != 1)} makes {requests} choices; "
            f"allowed: {limits.choices} in one request",
        )
    most = _whole(stated_output(found, is_chat=is_chat))
    if limits.max_tokens is not None and most is not None and most > limits.max_tokens:
        raise Refusal(400, f"max_tokens = {most} is not allowed; allowed: at most {limits.max_tokens}")
    if limits.prompt_tokens is not None and prompt_tokens > limits.prompt_tokens:
        raise Refusal(400, f"a prompt has {prompt_tokens} tokens; allowed: at most {limits.prompt_tokens}")
    outputs = requests * max(0, _unstated(limits, is_chat=is_chat) if most is None else most)
    chat = [found.get(name) for name in _PROMPT_OF_CHAT] if is_chat else []
    text = _tokens_of_text(chat) if is_chat else _tokens_of_prompt(found.get("prompt"))
    return Demand(requests, text * choices + outputs)


def asked_to_embed(found: Mapping[str, Any]) -> Demand:
    """What a request to embed or to score asks for: the tokens of its input, or of all its text."""
    return Demand(tokens=_tokens_of_prompt(found["input"]) if "input" in found else _tokens_of_text(found))


def _unstated(limits: Limits, *, is_chat: bool) -> int:
    """Output tokens counted for a choice of a request that states no number: the limit where it is written in."""
    if is_chat:
        return limits.max_tokens or _USUAL_OUTPUT_TOKENS
    return min(DEFAULT_OF_A_COMPLETION, limits.max_tokens or DEFAULT_OF_A_COMPLETION)


def _prompts(prompt: Any) -> tuple[int, int]:
    """The number of prompts of a completion, and the tokens of the longest that is given as token ids."""
    if not isinstance(prompt, list) or not prompt:
        return 1, 0
    if type(prompt[0]) is int:
        return 1, len(prompt)
    return len(prompt), max((len(one) for one in prompt if isinstance(one, list)), default=0)


def _tokens_of_prompt(prompt: Any) -> int:
    """Of all prompts of a completion: ids counted, whatever vLLM reads as one; text estimated by its length."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if prompts and type(prompts[0]) is int:
        return len(prompts)
    ids = sum(len(one) for one in prompts if isinstance(one, list))
    return ids + sum(len(one) for one in prompts if isinstance(one, str)) // CHARACTERS_PER_TOKEN


def _tokens_of_text(found: Any) -> int:
    """Of all text in it, estimated by its length."""
    characters = sum(len(one) for level in _levels(found) for one in level if type(one) is str)
    return characters // CHARACTERS_PER_TOKEN


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
