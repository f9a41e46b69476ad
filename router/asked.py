"""What a request router knows of a request before its prompt is tokenised."""

from __future__ import annotations

import math
from typing import Any

from router.ranking import Asked
from scheduler.settings import EXPECTED_OUTPUT_TOKENS

_CHARACTERS_A_TOKEN = 4.0
"""Of English text, roughly; only differences between replicas count."""
_BOUNDS = ("max_completion_tokens", "max_tokens")


def asked_of(body: Any) -> Asked:
    """From a request body of OpenAI's form; of another, nothing is known."""
    declared = (getattr(body, "vllm_xargs", None) or {}).get(EXPECTED_OUTPUT_TOKENS)
    bounds = [declared, *(getattr(body, bound, None) for bound in _BOUNDS)]
    prompt = getattr(body, "messages", None) or getattr(body, "prompt", None)
    return Asked(_tokens(prompt), min((float(bound) for bound in bounds if bound), default=math.inf))


def _tokens(part: Any) -> float:
    """Of a text, a list of token ids, a message, or several of these."""
    if isinstance(part, str):
        return len(part) / _CHARACTERS_A_TOKEN
    if isinstance(part, int):
        return 1.0
    if isinstance(part, list):
        return float(len(part)) if part and isinstance(part[0], int) else sum(map(_tokens, part))
    if isinstance(part, dict):
        return _tokens(part.get("content") or part.get("text"))
    return _tokens(getattr(part, "content", None)) if hasattr(part, "content") else 0.0
