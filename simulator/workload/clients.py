"""Clients that come back when they are rejected: those that wait as long as they are told to, and those that do not."""

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
"""The openai client's defaults (`openai/_base_client.py`): how often it tries again, and the longest wait it obeys."""
_BACKOFF_S, _LONGEST_BACKOFF_S, _BACKOFF_JITTER = 0.5, 8.0, 0.25
IMPATIENT_RETRIES, IMPATIENT_PAUSE_S = 5, 0.5
SHORTEST_PAUSE_S = 0.25
"""Nobody comes back sooner: every rejection earlier than this before a moment is known by then."""


class Attempt(NamedTuple):
    """A request's next attempt: when its client comes back, for the how-manieth time, and whether as it was told."""

    at_s: float
    request_number: int
    number: int
    told: bool
    request: SimRequest


class _Pause(NamedTuple):
    seconds: float
    told: bool


@dataclass
class ReturnTotals:
    """attempts: times that clients came back; told: those that waited as told, and of these, `rejected_again`."""

    attempts: int = 0
    told: int = 0
    rejected_again: int = 0

    @property
    def admitted_fraction(self) -> float | None:
        """Of those who came back when they were told to, the share that was not rejected again."""
        return 1 - self.rejected_again / self.told if self.told else None


class Returns:
    """What becomes of rejected requests: their clients come back by a rule, or do not; `seed` is for their jitter."""

    def __init__(self, retries: Retries, seed: int) -> None:
        self._rule: Callable[[int, float | None, random.Random], _Pause | None] = _RULES[retries]
        self._rng = random.Random(seed)
        self._coming: list[Attempt] = []
        self.totals = ReturnTotals()

    @property
    def next_s(self) -> float:
        """When the next client comes back; infinite if none does."""
        return self._coming[0].at_s if self._coming else math.inf

    def waiting(self) -> Iterator[Attempt]:
        """The attempts that are still to come, in no order."""
        return iter(self._coming)

    def due(self, now_s: float) -> Iterator[Attempt]:
        """The attempts until now, each once."""
        while self.next_s <= now_s:
            attempt = heapq.heappop(self._coming)
            self.totals.attempts += 1
            self.totals.told += attempt.told
            yield attempt

    def rejected(
        self, request_number: int, request: SimRequest, attempt: int, told: bool, at_s: float,
        retry_after_s: float | None,
    ) -> bool:
        """A client hears that this attempt (0: its first) was rejected; whether it will come back."""
        self.totals.rejected_again += told
        pause = self._rule(attempt, retry_after_s, self._rng)
        if pause is None:
            return False
        coming = Attempt(at_s + pause.seconds, request_number, attempt + 1, pause.told, request)
        heapq.heappush(self._coming, coming)
        return True


def _openai(attempt: int, retry_after_s: float | None, rng: random.Random) -> _Pause | None:
    if attempt >= OPENAI_RETRIES or (retry_after_s is not None and retry_after_s > OPENAI_LONGEST_S):
        return None
    if retry_after_s is not None and retry_after_s > 0:
        return _Pause(max(retry_after_s, SHORTEST_PAUSE_S), told=True)
    seconds: float = min(_BACKOFF_S * 2**attempt, _LONGEST_BACKOFF_S)
    return _Pause(seconds * (1 - _BACKOFF_JITTER * rng.random()), told=False)


def _impatient(attempt: int, retry_after_s: float | None, rng: random.Random) -> _Pause | None:
    return _Pause(IMPATIENT_PAUSE_S, told=False) if attempt < IMPATIENT_RETRIES else None


_RULES: dict[str, Callable[[int, float | None, random.Random], _Pause | None]] = {
    "openai": _openai, "impatient": _impatient,
}
