"""A rejection: why a request is turned away before it costs anything, and when it may come again.

It leaves the engine as the stop reason of an answer without tokens: a JSON object under a key that marks it. It stays
that object as far as the ingress, which answers HTTP 429 with a sentence for people and `Retry-After` for programs.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

REJECTION_KEY = "headrace_rejection"
"""Marks the JSON object: `{"headrace_rejection": {"reason": "…", "retry_after_s": 7}}`."""

_ABORT = "abort"
_LONGEST_S = 60.0
"""Clients of the OpenAI kind ignore longer ones or take them for a failure."""
_JITTER = 0.25


@dataclass(frozen=True, slots=True)
class Rejection:
    """reason: in words; retry_after_s: whole seconds after which the queue is expected to have drained."""

    reason: str
    retry_after_s: int

    @classmethod
    def for_drain_time(cls, reason: str, drain_s: float, request_id: str) -> Rejection:
        """With the drain time give or take a quarter, from 1 to 60 s; one that is not known counts as the least.

        The request's id decides how much, so that requests rejected together do not come back together, and a repeated
        simulation repeats itself.
        """
        known_s = drain_s if drain_s == drain_s else 1.0
        # The limits hold for the middle of the range: at the limits too, no two requests need be told the same.
        middle_s = min(max(known_s, 1.0), _LONGEST_S / (1 + _JITTER))
        digest = hashlib.blake2b(request_id.encode(errors="replace"), digest_size=8).digest()
        drawn = int.from_bytes(digest) / 2**64
        return cls(reason, max(1, math.ceil(middle_s * (1 - _JITTER + 2 * _JITTER * drawn))))

    @property
    def text(self) -> str:
        """The sentence for people."""
        return f"rejected: {self.reason}; retry in {self.retry_after_s} s"

    def as_json(self) -> str:
        """The marked object that `from_json` reads."""
        return json.dumps({REJECTION_KEY: {"reason": self.reason, "retry_after_s": self.retry_after_s}})

    @classmethod
    def from_json(cls, text: object) -> Rejection | None:
        """The rejection that a text is as a whole, or None."""
        if not isinstance(text, str) or REJECTION_KEY not in text:
            return None
        try:
            data = json.loads(text)
            told = data[REJECTION_KEY]
            return cls(str(told["reason"]), int(told["retry_after_s"]))
        except (ValueError, TypeError, KeyError):
            return None

    @classmethod
    def of_answer(cls, finish_reason: object, stop_reason: object) -> Rejection | None:
        """The rejection that an answer of the engine is, or None.

        Source: vLLM's CompletionOutput. An answer that ends at a client's own stop string has finish reason "stop", so
        none can pass for a rejection.
        """
        return cls.from_json(stop_reason) if finish_reason == _ABORT else None
