"""What became of a request, from its response alone, and the account of many. No Ray, no processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from loadgen.client import CANCELLED, TIMED_OUT, Ending, Exchange
from loadgen.results import is_good
from scheduler.tuning.slo import Slo
from simulator.output.rows import COMPLETED, REJECTED


class Outcome(StrEnum):
    """One per request.

    COMPLETE: every token that was asked for. REJECTED: HTTP 429. ERROR_BEFORE, ERROR_WITHIN: an error that the server
    states, before the first token or after it. CUT: looks complete and is not. LOST: the connection broke, with neither
    an answer nor an error. HUNG: none of these by its deadline. HUNG_UP: the client left.
    """

    COMPLETE = "complete"
    REJECTED = "rejected"
    ERROR_BEFORE = "error before the first token"
    ERROR_WITHIN = "error in the stream"
    CUT = "silently cut"
    LOST = "lost"
    HUNG = "hung"
    HUNG_UP = "client left"


ERRORS = (Outcome.ERROR_BEFORE, Outcome.ERROR_WITHIN)
FAILURES = (*ERRORS, Outcome.CUT, Outcome.LOST, Outcome.HUNG)


def outcome_of(exchange: Exchange) -> Outcome:
    """The outcome of a request that asked for exactly `asked.output_tokens` tokens."""
    if exchange.outcome == REJECTED:
        return Outcome.REJECTED
    if exchange.outcome == TIMED_OUT:
        return Outcome.HUNG
    if exchange.outcome == CANCELLED or exchange.ending is None:
        return Outcome.HUNG_UP
    if exchange.ending is Ending.BROKEN:
        return Outcome.LOST
    if exchange.ending is Ending.ERROR:
        return Outcome.ERROR_WITHIN if exchange.token_s else Outcome.ERROR_BEFORE
    whole = exchange.outcome == COMPLETED and len(exchange.token_s) >= exchange.asked.output_tokens
    return Outcome.COMPLETE if whole else Outcome.CUT


@dataclass(frozen=True)
class Seen:
    """One request as the client saw it; seconds since the load began. good: complete within the targets."""

    arrival_s: float
    ended_s: float
    outcome: Outcome
    good: bool = False
    tokens: int = 0
    message: str | None = None
    status: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"outcome": self.outcome.value}


def seen_of(exchange: Exchange, targets: Slo) -> Seen:
    """A request that has ended. Raises ValueError for one under way."""
    if exchange.ended_s is None:
        raise ValueError(f"request {exchange.index} is under way")
    outcome = outcome_of(exchange)
    good = outcome is Outcome.COMPLETE and is_good(exchange, targets)
    return Seen(
        exchange.asked.arrival_s, exchange.ended_s, outcome, good, len(exchange.token_s), exchange.message,
        exchange.status,
    )


def in_flight_at(requests: Iterable[Seen], at_s: float) -> list[Seen]:
    """Those that had arrived and not ended."""
    return [seen for seen in requests if seen.arrival_s < at_s <= seen.ended_s]


def arrived_from(requests: Iterable[Seen], at_s: float) -> list[Seen]:
    """The new ones."""
    return [seen for seen in requests if seen.arrival_s >= at_s]


def account(requests: Iterable[Seen], sent: int) -> dict[str, int]:
    """How many ended in which way; `unaccounted` are sent requests without any outcome."""
    counts = Counter(seen.outcome for seen in requests)
    return {outcome.value: counts[outcome] for outcome in Outcome} | {"unaccounted": sent - counts.total()}


def to_the_last(counts: dict[str, int]) -> bool:
    """Every request ended in all of its tokens, an error that says so, a rejection, or left by itself."""
    never = (Outcome.CUT.value, Outcome.LOST.value, Outcome.HUNG.value, "unaccounted")
    return not any(counts[name] for name in never)
