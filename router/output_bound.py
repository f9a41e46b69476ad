"""The most output tokens of a choice: where a request states them, as vLLM reads it, and the limit written in. No Ray.

A completion states them in `max_tokens` alone; a chat in `max_completion_tokens`, or else in `max_tokens`. What else a
body carries is a further field, which no engine looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_OF_A_COMPLETION = 16
"""vLLM's own, where a completion states nothing. A chat may then fill the model's context."""
_EVERYWHERE, _OF_CHAT = "max_tokens", "max_completion_tokens"


def stated_output(fields: Mapping[str, Any], *, is_chat: bool) -> Any:
    """What a request states, as it was written; None: nothing."""
    stated = fields.get(_OF_CHAT) if is_chat else None
    return fields.get(_EVERYWHERE) if stated is None else stated


def bound_output(body: Any, most: int | None) -> None:
    """Write the limit into a request, read by its class, that states no smaller number. most: tokens; None: no limit.
    """
    known = getattr(type(body), "model_fields", {})
    if most is None or _EVERYWHERE not in known:
        return  # nothing is generated
    is_chat = _OF_CHAT in known
    stated = stated_output(vars(body), is_chat=is_chat)
    if stated is None or stated > most:
        setattr(body, _OF_CHAT if is_chat else _EVERYWHERE, most)
