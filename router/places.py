"""Places taken and given back lately: what an ingress knows better than a report that is some time old. No Ray."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

ON_THE_WAY_S = 0.03
"""A request sent this long before a report may not have been in the engine yet; one that ended this long after may
already have left it."""


class Taken(NamedTuple):
    """Places taken less those given back, and the prompt tokens that were sent."""

    requests: int
    tokens: float


class _Change(NamedTuple):
    at_s: float
    requests: int
    tokens: float


class Places:
    """The changes of one queue, kept for `keep_s` seconds."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._changes: deque[_Change] = deque()

    def change(self, now_s: float, requests: int, tokens: float = 0.0) -> None:
        """So many places are taken, or given back when negative; `tokens`: of the prompts that take them."""
        while self._changes and self._changes[0].at_s < now_s - self._keep_s:
            self._changes.popleft()
        self._changes.append(_Change(now_s, requests, tokens))

    def since(self, at_s: float) -> Taken:
        """What has changed since a report."""
        requests, tokens = 0, 0.0
        for change in reversed(self._changes):
            if change.at_s < at_s - ON_THE_WAY_S:
                break
            if change.requests > 0 or change.at_s > at_s + ON_THE_WAY_S:
                requests += change.requests
                tokens += change.tokens
        return Taken(requests, tokens)
