"""Rejection in the ingress: a request for which no replica has room is answered before it costs anything. No Ray.

Every replica publishes the room of its admission queue (`Stats.room`): how many more requests it takes before it
rejects one. Between two reports the ingress keeps count: a request that it sends takes a place, one that ends gives its
place back. A model is full when all of its replicas reported lately and their room is used up; a replica that is
silent, new or rejects nothing counts as having room. A request that is let through can still be rejected by the engine.

Several ingresses: each uses an equal share of the reported room, rounded up or down by lot at each report. So n of them
send as much as there is room on average, at most n - 1 requests more, and none is shut out for long.

Tenants: while several ask, one that has had less than its share of what was let through is never rejected here. The
engine takes its request before others, and may reject theirs.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from router.places import CountedPlaces
from router.replica_watch import FRESH_S
from scheduler.messages import Stats
from scheduler.rejection import Rejection

FULL = "the queues of all replicas are full"
_SAME_REPORT_S = 1e-3
_SHARES_FORGET_S = 10.0
_ACTIVE_S = 5.0
_LARGEST_GAP_S = 60.0


class Report(Protocol):
    """The latest answer of one engine of a model, and when it came; None: none yet. model: the model's id."""

    @property
    def model(self) -> str: ...
    @property
    def stats(self) -> Stats | None: ...
    @property
    def answered_s(self) -> float | None: ...


class Reports(Protocol):
    """The latest answer of every engine. revision: another one whenever one of them has changed."""

    @property
    def revision(self) -> int: ...
    def answers(self) -> Iterable[Report]: ...


class _NoReports:
    revision = 0

    def answers(self) -> Iterable[Report]:
        return ()


NO_REPORTS = _NoReports()
"""Nothing is known, so nothing is rejected here."""


class Tenant(NamedTuple):
    """name; weight: its share among the tenants that ask."""

    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Said:
    """What the engines of a model say together. answered_s: when each of them did, the oldest first."""

    room: int
    queueless: bool
    retry_after_s: float
    answered_s: Sequence[float]


class _Model(CountedPlaces):
    """Places taken and given back lately, of one model."""

    def __init__(self) -> None:
        super().__init__(FRESH_S + 1.0)
        self.turned_away = 0
        self.drawn, self.drawn_at_s = 0.0, -math.inf
        self._counted: tuple[_Said, float] | None = None

    def change(self, now_s: float, requests: int, tokens: float = 0.0) -> None:
        """See `CountedPlaces.change`."""
        super().change(now_s, requests, tokens)
        self._counted = None

    def taken_since(self, said: _Said) -> float:
        """Places taken since an engine's report, on average; counted once between two changes or reports."""
        if self._counted is None or self._counted[0] is not said:
            self._counted = said, self.requests_since(said.answered_s) / len(said.answered_s)
        return self._counted[1]


@dataclass(slots=True)
class _Share:
    weight: float = 1.0
    served: float = 0.0
    served_at_s: float = 0.0
    asked_at_s: float = -math.inf

    def now(self, now_s: float) -> float:
        """Requests let through lately; older ones fade."""
        self.served *= math.exp(-min(now_s - self.served_at_s, _LARGEST_GAP_S) / _SHARES_FORGET_S)
        self.served_at_s = now_s
        return self.served


class FrontDoor:
    """The places that one ingress still has at the replicas of each model.

    reports: of all engines. clock: seconds, as in the reports. draw: a random number from 0 to 1. `ingresses` is the
    number of ingress replicas that share the room.
    """

    def __init__(
        self, reports: Reports, clock: Callable[[], float], draw: Callable[[], float] = random.random
    ) -> None:
        self._reports, self._clock, self._draw = reports, clock, draw
        self._places: dict[str, _Model] = {}
        self._shares: dict[str, _Share] = {}
        self._read: int | None = None
        self._said: dict[str, _Said | None] = {}
        self.ingresses = 1
        self.rejected = 0

    def full(self, model: str, request_id: str, requests: int = 1, tenant: Tenant | None = None) -> Rejection | None:
        """The rejection of so many requests that come together; None: let them through, and call `sent`.

        More requests than there is room for are still let through to an engine without a queue: it alone knows.
        """
        now_s = self._clock()
        if tenant is not None:
            share = self._shares.setdefault(tenant.name, _Share())
            share.weight, share.asked_at_s = tenant.weight, now_s
        said = self._said_of(model, now_s)
        if said is None:
            return None
        room = self._room(model, said)
        queueless = room >= 1 and said.queueless
        if room >= requests or queueless or (tenant is not None and self._below_share(tenant, now_s)):
            return None
        self.rejected += requests
        self._places_of(model).turned_away += requests
        return Rejection.for_drain_time(FULL, said.retry_after_s, request_id)

    def sent(self, model: str, requests: int = 1, tenant: Tenant | None = None) -> None:
        """These requests go to a replica."""
        now_s = self._clock()
        self._places_of(model).change(now_s, requests)
        if tenant is not None:
            share = self._shares.setdefault(tenant.name, _Share(tenant.weight))
            share.now(now_s)
            share.served += requests

    def ended(self, model: str, requests: int = 1) -> None:
        """These requests have ended, other than by an engine's rejection: as many others can take their place."""
        self._places_of(model).change(self._clock(), -requests)

    def take_turned_away(self, model: str, engine_requests: int = 1) -> int:
        """Requests rejected here since the last call, as many for each of the engine requests that carry the number;
        the engines count them as arrivals that they rejected. What cannot be shared out evenly waits for the next."""
        places = self._places_of(model)
        each, places.turned_away = divmod(places.turned_away, engine_requests)
        return each

    def room(self, model: str) -> float | None:
        """Requests that this ingress may still send; None: not known, or not limited."""
        said = self._said_of(model, self._clock())
        return None if said is None else self._room(model, said)

    def _said_of(self, model: str, now_s: float) -> _Said | None:
        """What the engines of a model say; None unless all of them said lately what room they have."""
        if self._read != self._reports.revision:
            self._read, self._said = self._reports.revision, _said_by_model(self._reports.answers())
        said = self._said.get(model)
        return None if said is None or now_s - said.answered_s[0] > FRESH_S else said

    def _room(self, model: str, said: _Said) -> float:
        places = self._places_of(model)
        taken = places.taken_since(said)
        if self.ingresses == 1:
            return said.room - taken
        newest_s = said.answered_s[-1]
        if abs(newest_s - places.drawn_at_s) > _SAME_REPORT_S:
            places.drawn, places.drawn_at_s = self._draw(), newest_s
        return math.floor(said.room / self.ingresses + places.drawn) - taken

    def _below_share(self, tenant: Tenant, now_s: float) -> bool:
        asking = {name: share for name, share in self._shares.items() if now_s - share.asked_at_s <= _ACTIVE_S}
        served = {name: share.now(now_s) for name, share in asking.items()}
        weights = sum(share.weight for share in asking.values())
        return len(asking) > 1 and served[tenant.name] < sum(served.values()) * tenant.weight / weights

    def _places_of(self, model: str) -> _Model:
        return self._places.setdefault(model, _Model())


def _said_by_model(reports: Iterable[Report]) -> dict[str, _Said | None]:
    """None: an engine of the model has not answered, or says of no room."""
    answers: defaultdict[str, list[tuple[Stats, float]]] = defaultdict(list)
    unknown: set[str] = set()
    for report in reports:
        stats, answered_s = report.stats, report.answered_s
        if stats is None or stats.room is None or answered_s is None:
            unknown.add(report.model)
        else:
            answers[report.model].append((stats, answered_s))
    return {
        model: None if model in unknown else _Said(
            sum(stats.room or 0 for stats, _ in of_it), any(stats.waiting == 0 for stats, _ in of_it),
            min(stats.retry_after_s for stats, _ in of_it), sorted(answered_s for _, answered_s in of_it),
        ) for model, of_it in answers.items()
    }
