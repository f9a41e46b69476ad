"""What a request router knows of a request before its prompt is tokenised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from router.prefixes import BLOCK_TOKENS, blocks_of
from router.ranking import Asked
from router.request_body import CHARACTERS_PER_TOKEN
from scheduler.settings import EXPECTED_OUTPUT_TOKENS

_BOUNDS = ("max_completion_tokens", "max_tokens")
_LONGEST = 1 << 31


def asked_of(body: Any) -> Asked:
    """From a request body of OpenAI's form; of what it has in no usable form, nothing is known. Never raises: a request
    whose routing fails would hold up those behind it."""
    try:
        return _asked_of(body)
    except Exception:  # the engine says what is wrong with such a body
        return Asked()


def _asked_of(body: Any) -> Asked:
    messages = getattr(body, "messages", None)
    prompt = messages or getattr(body, "prompt", None) or getattr(body, "input", None)
    declared = (getattr(body, "vllm_xargs", None) or {}).get(EXPECTED_OUTPUT_TOKENS)
    bounds = [_count(bound) for bound in (declared, *(getattr(body, name, None) for name in _BOUNDS))]
    requests = _count(getattr(body, "n", None)) or 1
    if isinstance(prompt, list) and messages is None and not isinstance(prompt[0], int):
        requests *= len(prompt)
    output_tokens = min(map(float, filter(None, bounds)), default=math.inf)
    start = (str(getattr(body, "model", None)), str(getattr(body, "cache_salt", None)))  # caches are apart by these
    return Asked(_tokens(prompt), output_tokens, requests, _blocks(prompt, start, is_chat=messages is not None))


def _blocks(prompt: Any, start: tuple[str, ...], *, is_chat: bool) -> Sequence[int]:
    """Of a chat, or of the first prompt of a completion."""
    if is_chat:
        prompt = "".join(map(_text, prompt)) if isinstance(prompt, list) else ""
    elif isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompt = prompt[0]
    each = BLOCK_TOKENS * (CHARACTERS_PER_TOKEN if isinstance(prompt, str) else 1)
    return blocks_of(prompt, each, start) if isinstance(prompt, str | list) else ()


def _text(message: Any) -> str:
    """Of a message; a part that is no text, such as a picture, is known by a hash."""
    role, content = (_field(message, name) for name in ("role", "content"))
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [_field(part, "text") for part in parts]
    said = [
        text if isinstance(text, str) else str(hash(str(part))) for text, part in zip(texts, parts, strict=True)
    ]
    return f"{role}\n{''.join(said)}\n"


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LONGEST else None


def _tokens(part: Any) -> float:
    """Of a text, a list of token ids, a message, or several of these."""
    if isinstance(part, str):
        return len(part) / CHARACTERS_PER_TOKEN
    if isinstance(part, int):
        return 1.0
    if isinstance(part, list):
        return float(len(part)) if part and isinstance(part[0], int) else sum(map(_tokens, part))
    if isinstance(part, dict):
        return _tokens(part.get("content") or part.get("text"))
    return _tokens(getattr(part, "content", None)) if hasattr(part, "content") else 0.0
