"""What a request router knows of a request before its prompt is tokenised."""

from __future__ import annotations

import math
from typing import Any

from replicas.prompt_blocks import CHARACTERS_PER_TOKEN, blocks_in, prompt_in
from router.ranking import Asked
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
    prompt = prompt_in(body)
    declared = (getattr(body, "vllm_xargs", None) or {}).get(EXPECTED_OUTPUT_TOKENS)
    bounds = [_count(bound) for bound in (declared, *(getattr(body, name, None) for name in _BOUNDS))]
    output_tokens = min(map(float, filter(None, bounds)), default=math.inf)
    return Asked(_tokens(prompt), output_tokens, engine_requests(body), blocks_in(body))


def engine_requests(body: Any) -> int:
    """How many requests an engine makes of one: a choice of a prompt each. Never raises, as `asked_of`."""
    choices = _count(getattr(body, "n", None)) or 1
    prompt = prompt_in(body) if getattr(body, "messages", None) is None else None
    return choices * len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else choices


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
