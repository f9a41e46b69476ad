"""What each key has used: requests under way, and rates per minute as token buckets. No HTTP and no Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from router.limits import KeyLimits
from router.refusal import Refusal
from scheduler.rejection import Rejection

_MINUTE_S = 60.0


@dataclass(slots=True)
class _Bucket:
    """Fills at `per_minute` and holds a minute's worth; `used` is what is missing from the full bucket."""

    used: float = 0.0
    at_s: float = 0.0

    def wait_s(self, amount: float, per_minute: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0: now. A full bucket gives any amount, and is overdrawn."""
        self.used = max(0.0, self.used - (now_s - self.at_s) * per_minute / _MINUTE_S)
        self.at_s = now_s
        missing = self.used + min(amount, per_minute) - per_minute
        return 0.0 if missing <= 1e-9 else missing * _MINUTE_S / per_minute


class _Used:
    __slots__ = ("requests", "tokens", "under_way")

    def __init__(self) -> None:
        self.under_way, self.requests, self.tokens = 0, _Bucket(), _Bucket()


class KeyUsage:
    """The counts of all keys; they stay when the limits change.

    ingresses: ingress replicas that share the limits.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys: dict[str, _Used] = {}
        self.ingresses = 1

    def enter(self, holder: str, limits: KeyLimits) -> None:
        """A request of this key begins; `leave` must follow.

        Raises:
            Refusal: 429, too many are under way.
        """
        used = self._keys.setdefault(holder, _Used())
        if limits.concurrent_requests is not None and used.under_way >= self._share(limits.concurrent_requests):
            raise _refused(f"{limits.concurrent_requests} requests of this key are under way", 1.0, holder)
        used.under_way += 1

    def leave(self, holder: str) -> None:
        """A request of this key has ended."""
        self._keys[holder].under_way -= 1

    def under_way(self, holder: str) -> int:
        """Requests of a key that have not ended."""
        return self._keys[holder].under_way if holder in self._keys else 0

    def take(self, holder: str, limits: KeyLimits, tokens: int, request_id: str) -> None:
        """Count a request of so many tokens against the rates.

        Raises:
            Refusal: 429, and nothing is counted.
        """
        used, now_s = self._keys.setdefault(holder, _Used()), self._clock()
        rates = [
            (used.requests, 1, limits.requests_per_minute, "requests"),
            (used.tokens, tokens, limits.tokens_per_minute, "tokens"),
        ]
        for bucket, amount, per_minute, what in rates:
            wait_s = bucket.wait_s(amount, per_minute / self.ingresses, now_s) if per_minute is not None else 0.0
            if wait_s:
                raise _refused(f"this key may use {per_minute} {what} a minute", wait_s, request_id)
        for bucket, amount, per_minute, _ in rates:
            bucket.used += amount if per_minute is not None else 0.0

    def give_back(self, holder: str, tokens: int) -> None:
        """Undo `take` for a request that was not served."""
        used = self._keys[holder]
        used.requests.used = max(0.0, used.requests.used - 1)
        used.tokens.used = max(0.0, used.tokens.used - tokens)

    def _share(self, most: int) -> int:
        return math.ceil(most / self.ingresses)


def _refused(reason: str, wait_s: float, request_id: str) -> Refusal:
    # The jitter is a quarter either way; none is told to come back too early.
    rejection = Rejection.for_drain_time(reason, wait_s / 0.75, request_id)
    return Refusal(429, rejection.text, retry_after_s=rejection.retry_after_s, reason="key_limit")
