"""A refusal: why a request is turned away before it costs anything, and when it may come again.

It leaves the engine as the stop reason of an answer without tokens, and reaches the client as HTTP 429. On the way it
is one line of text, which people read too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_TEXT = re.compile(r"refused: (?P<reason>.*); retry in (?P<seconds>\d+) s", re.DOTALL)
_LONGEST_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """reason: in words; retry_after_s: seconds after which the queue is expected to have drained."""

    reason: str
    retry_after_s: int

    @classmethod
    def for_drain_time(cls, reason: str, drain_s: float) -> Refusal:
        """With whole seconds to wait, from 1 to 60; a drain time that is not known counts as the least."""
        return cls(reason, math.ceil(min(max(drain_s, 1.0), _LONGEST_S)) if drain_s == drain_s else 1)

    @property
    def text(self) -> str:
        """The line that `from_text` reads."""
        return f"refused: {self.reason}; retry in {self.retry_after_s} s"

    @classmethod
    def from_text(cls, text: object) -> Refusal | None:
        """The refusal in a line, or None when it holds none."""
        found = _TEXT.search(text) if isinstance(text, str) else None
        return cls(found["reason"], int(found["seconds"])) if found else None
