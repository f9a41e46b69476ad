"""A prompt as blocks: how routers and replicas, in processes of their own, speak of the beginning of a prompt. No Ray.

A prompt is cut into blocks, each known by a hash of it and all before it, as vLLM knows blocks of the KV cache. It is
read from a request's body, before it is tokenised, so a text counts by its characters.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any
from zlib import crc32

BLOCK_TOKENS = 64
CHARACTERS_PER_TOKEN = 4


def blocks_of(prompt: str | Sequence[int], each: int, start: object = None) -> list[int]:
    """The hash of each whole block of `each` characters or token ids, chained from `start` on: two prompts agree in one
    only if they agree in `start` and in all blocks before it.

    The same in every process, which Python's own hash is not. Of 32 bits, which are enough for an estimate.

    Raises:
        struct.error: a token id beyond 64 bits.
    """
    hashes, before = [], _hash(repr(start))
    if isinstance(prompt, str):
        for begin in range(0, len(prompt) - each + 1, each):
            before = _hash(prompt[begin : begin + each], before)
            hashes.append(before)
        return hashes
    as_bytes = struct.Struct(f"<{each}q").pack
    for begin in range(0, len(prompt) - each + 1, each):
        before = crc32(as_bytes(*prompt[begin : begin + each]), before)
        hashes.append(before)
    return hashes


def prompt_in(body: Any) -> Any:
    """What a request's body of OpenAI's form asks with: its messages, or else its prompt or input in any form."""
    return getattr(body, "messages", None) or getattr(body, "prompt", None) or getattr(body, "input", None)


def blocks_in(body: Any) -> Sequence[int]:
    """Of a request's body of OpenAI's form: the blocks of a chat, or of the first prompt of a completion; none where it
    has no usable form. Never raises: a request whose routing fails would hold up those behind it."""
    try:
        return _blocks_in(body)
    except Exception:  # the engine says what is wrong with such a body
        return ()


def _blocks_in(body: Any) -> Sequence[int]:
    prompt = prompt_in(body)
    if getattr(body, "messages", None) is not None:
        prompt = "".join(map(_text, prompt)) if isinstance(prompt, list) else ""
    elif isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, str | list):
        return ()
    start = (str(getattr(body, "model", None)), str(getattr(body, "cache_salt", None)))  # caches are apart by these
    return blocks_of(prompt, BLOCK_TOKENS * (CHARACTERS_PER_TOKEN if isinstance(prompt, str) else 1), start)


def _text(message: Any) -> str:
    """Of a message; a part that is no text, such as a picture, is known by a hash."""
    role, content = (_field(message, name) for name in ("role", "content"))
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [_field(part, "text") for part in parts]
    said = [text if isinstance(text, str) else str(_hash(str(part))) for text, part in zip(texts, parts, strict=True)]
    return f"{role}\n{''.join(said)}\n"


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)


def _hash(text: str, before: int = 0) -> int:
    return crc32(text.encode("utf-8", "surrogatepass"), before)
