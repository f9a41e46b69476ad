"""Retries after a rejection: clients that wait as `Retry-After` says, and clients that do not."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from simulator.workload.requests import SimRequest

Retries = Literal["openai", "impatient"]

OPENAI_RETRIES, OPENAI_LONGEST_S = 2, 120.0
"""The openai client's defaults (`openai/_base_client.py`): retries, and the longest `Retry-After` obeyed, s."""
_BACKOFF_S, _LONGEST_BACKOFF_S, _BACKOFF_JITTER = 0.5, 8.0, 0.25
IMPATIENT_RETRIES, IMPATIENT_PAUSE_S = 5, 0.5
SHORTEST_PAUSE_S = 0.25
"""Seconds before the earliest retry: all rejections older than this are known."""


class Attempt(NamedTuple):
    """A retry of a request: its time (virtual seconds), its number, and whether it comes when `Retry-After` said."""

    at_s: float
    request_number: int
    number: int
    as_advised: bool
    request: SimRequest


class _Pause(NamedTuple):
    seconds: float
    as_advised: bool


@dataclass
class ReturnTotals:
    """attempts: retries; as_advised: those at the time that `Retry-After` gave; of these, `rejected_again`."""

    attempts: int = 0
    as_advised: int = 0
    rejected_again: int = 0

    @property
    def admitted_fraction(self) -> float | None:
        """Of the retries at the time that `Retry-After` gave, the share that was not rejected again."""
        return 1 - self.rejected_again / self.as_advised if self.as_advised else None


class Returns:
    """Schedules the retries of rejected requests by a rule; `seed` is for their jitter."""

    def __init__(self, retries: Retries, seed: int) -> None:
        self._rule: Callable[[int, float | None, random.Random], _Pause | None] = _RULES[retries]
        self._rng = random.Random(seed)
        self._coming: list[Attempt] = []
        self.totals = ReturnTotals()

    @property
    def next_s(self) -> float:
        """Time of the next retry; infinite if there is none."""
        return self._coming[0].at_s if self._coming else math.inf

    def waiting(self) -> Iterator[Attempt]:
        """The retries still to come, in no order."""
        return iter(self._coming)

    def due(self, now_s: float) -> Iterator[Attempt]:
        """The attempts until now, each once."""
        while self.next_s <= now_s:
            attempt = heapq.heappop(self._coming)
            self.totals.attempts += 1
            self.totals.as_advised += attempt.as_advised
            yield attempt

    def rejected(
        self, request_number: int, request: SimRequest, attempt: int, as_advised: bool, at_s: float,
        retry_after_s: float | None,
    ) -> bool:
        """Record that this attempt (0: the first) was rejected; returns whether the request will be retried."""
        self.totals.rejected_again += as_advised
        pause = self._rule(attempt, retry_after_s, self._rng)
        if pause is None:
            return False
        coming = Attempt(at_s + pause.seconds, request_number, attempt + 1, pause.as_advised, request)
        heapq.heappush(self._coming, coming)
        return True


def _openai(attempt: int, retry_after_s: float | None, rng: random.Random) -> _Pause | None:
    if attempt >= OPENAI_RETRIES or (retry_after_s is not None and retry_after_s > OPENAI_LONGEST_S):
        return None
    if retry_after_s is not None and retry_after_s > 0:
        return _Pause(max(retry_after_s, SHORTEST_PAUSE_S), as_advised=True)
    seconds: float = min(_BACKOFF_S * 2**attempt, _LONGEST_BACKOFF_S)
    return _Pause(seconds * (1 - _BACKOFF_JITTER * rng.random()), as_advised=False)


def _impatient(attempt: int, retry_after_s: float | None, rng: random.Random) -> _Pause | None:
    return _Pause(IMPATIENT_PAUSE_S, as_advised=False) if attempt < IMPATIENT_RETRIES else None


_RULES: dict[str, Callable[[int, float | None, random.Random], _Pause | None]] = {
    "openai": _openai, "impatient": _impatient,
}
