"""How many replicas a model should have: the smallest number whose capacity the offered load will not exceed.

What counts is the load at the time when a replica that is started now has come up
(`scheduler.estimation.offered_load`), admitted and rejected requests alike: behind a gate that rejects, neither latency
nor concurrency says that more are asked for. Two costs are stated and everything else follows from them. A replica
costs its seconds; a request that is not served in time costs as much as serving `late_costs_requests` of them. So one
more replica pays while the load exceeds what the others take with a probability above 1 / `late_costs_requests` (the
newsvendor's rule). And a replica that is not needed any more stays as long as a new one would take to come up: then
keeping it has cost what getting it back would (the rule of ski rental, never worse than twice the best).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scheduler.estimation.offered_load import OfferedLoad, RateAhead

_MEASURED = 5
_LEAST_HORIZON_S = 10.0
_LONGEST_START_UP_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingTerms:
    """What the number of replicas follows from, beside the load.

    late_costs_requests: a request that is late or rejected costs as much as serving so many, above 1. start_up_s:
    seconds until a replica that is asked for serves, until that has been measured.
    """

    late_costs_requests: float = 10.0
    start_up_s: float = 120.0

    @property
    def confidence(self) -> float:
        """Probability with which the load stays within the capacity."""
        return 1 - 1 / self.late_costs_requests


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests per second that one replica serves in time (0: none), and what it runs out of first, in words."""

    most_rps: float
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many replicas, and why.

    offered_rps: requests per second at present, rejected ones too; ahead_rps: expected when a replica started now has
    come up; high_rps: not exceeded then with probability `confidence` (None: nothing counted yet). each_rps: what one
    replica takes (None: not known, or without limit); limit: what it runs out of. needed: before the number is held.
    decided: False when too little is known, or no number is right: as many as there are. start_up_s, measured: seconds
    that a replica takes to come up, and whether that was seen.
    """

    replicas: int
    needed: int
    decided: bool
    reason: str
    offered_rps: float | None = None
    ahead_rps: float | None = None
    high_rps: float | None = None
    confidence: float
    each_rps: float | None = None
    limit: str = ""
    start_up_s: float
    measured: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class WantedReplicas:
    """The decision for one model; a clock in seconds comes with each call. start_ups_s: measured earlier."""

    def __init__(self, terms: ScalingTerms, start_ups_s: Sequence[float] = ()) -> None:
        self._terms = terms
        self._start_ups: deque[float] = deque(start_ups_s, maxlen=_MEASURED)
        self._load = OfferedLoad(self._horizon_s)
        self._needed: deque[tuple[float, int]] = deque()
        self._asked_s: float | None = None
        self._observed_s: float | None = None

    @property
    def start_up_s(self) -> float:
        """Seconds until a replica that is asked for serves: the median of the latest ones, as one may have waited long
        for a node."""
        return statistics.median(self._start_ups) if self._start_ups else self._terms.start_up_s

    @property
    def start_ups_s(self) -> tuple[float, ...]:
        """The latest measured ones."""
        return tuple(self._start_ups)

    def follow(self, terms: ScalingTerms) -> None:
        """Other terms from now on; what was counted stays."""
        self._terms = terms
        self._load.follow(self._horizon_s)

    def came_up(self, now_s: float, seconds: float) -> None:
        """A replica that was asked for serves after so long; somebody has asked then, though nothing was counted."""
        self._asked_s = now_s
        self._start_ups.append(min(max(0.0, seconds), _LONGEST_START_UP_S))
        self._load.follow(self._horizon_s)

    def observe(self, now_s: float, seconds: float, requests: float, *, busy: bool = False) -> None:
        """So many requests were offered in the `seconds` until now; busy: some run or wait."""
        self._load.observe(seconds, requests)
        self._observed_s = now_s
        if requests > 0 or busy or self._asked_s is None:
            self._asked_s = now_s

    def decide(self, now_s: float, capacity: Capacity | None, present: int) -> Wanted:
        """The number for now. capacity: of one replica; None: not known. present: replicas there are, or coming up."""
        ahead = self._load.ahead()
        if capacity is None or ahead is None:
            what = "what one replica serves" if capacity is None else "how much is asked for"
            return self._undecided(present, f"{what} is not known yet: as many as there are", ahead, capacity)
        if capacity.most_rps <= 0:
            reason = f"no number of replicas meets the targets ({capacity.limit}): as many as there are"
            return self._undecided(present, reason, ahead, capacity)
        if not self._needed:
            self._needed.append((now_s, present))  # nothing is taken away before a start-up time has been watched
        needed, why = self._needed_for(ahead, capacity)
        while len(self._needed) > 1 and self._needed[1][0] <= now_s - self.start_up_s:
            self._needed.popleft()
        if self._needed[0][0] <= now_s - self.start_up_s:
            self._needed.popleft()
        self._needed.append((now_s, needed))
        held = max(number for _, number in self._needed)
        if held > needed:
            why += f"; {held} were needed within the last {self.start_up_s:.0f} s, and stay so long"
        return self._wanted(held, needed, why, ahead, capacity)

    def _needed_for(self, ahead: RateAhead, capacity: Capacity) -> tuple[int, str]:
        terms, most_rps = self._terms, capacity.most_rps
        asked_s, observed_s = self._asked_s or 0.0, self._observed_s or 0.0
        idle_s = max(0.0, observed_s - asked_s)  # of what has been counted: silence of the engines is no idleness
        if (idle_s - self.start_up_s) * most_rps >= terms.late_costs_requests:
            return 0, f"nobody has asked for {idle_s:.0f} s"
        high_rps = ahead.quantile(terms.confidence)
        needed = 1 if math.isinf(most_rps) else max(1, math.ceil(high_rps / most_rps - 1e-9))
        takes = f"one replica takes {most_rps:.3g} ({capacity.limit})" if math.isfinite(most_rps) else "one takes all"
        return needed, (
            f"{ahead.now_rps:.3g} requests/s are offered, rejected ones included; in {self.start_up_s:.0f} s, when a "
            f"replica started now serves, {ahead.mean_rps:.3g} are expected and at most {high_rps:.3g} with "
            f"probability {terms.confidence:.3g}; {takes}: {needed} needed"
        )

    def _undecided(self, present: int, reason: str, ahead: RateAhead | None, capacity: Capacity | None) -> Wanted:
        return replace(self._wanted(present, present, reason, ahead, capacity), decided=False)

    def _wanted(
        self, replicas: int, needed: int, reason: str, ahead: RateAhead | None, capacity: Capacity | None
    ) -> Wanted:
        each = capacity.most_rps if capacity and math.isfinite(capacity.most_rps) else None
        confidence = self._terms.confidence
        return Wanted(
            replicas=replicas, needed=needed, decided=True, reason=reason, offered_rps=ahead.now_rps if ahead else None,
            ahead_rps=ahead.mean_rps if ahead else None, high_rps=ahead.quantile(confidence) if ahead else None,
            confidence=confidence, each_rps=each, limit=capacity.limit if capacity else "",
            start_up_s=self.start_up_s, measured=bool(self._start_ups),
        )

    @property
    def _horizon_s(self) -> float:
        return max(_LEAST_HORIZON_S, self.start_up_s)
