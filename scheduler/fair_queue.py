"""Who is next when several tenants wait: by weight among tenants, by priority and then age within one.

Every tenant has a counter of the tokens it was served, divided by its weight; the one with the lowest counter is next.
A prompt is charged when it enters, its answer when it ends. Who comes back after a pause starts level with those who
wait, so that nobody saves service up. Source: the Virtual Token Counter of "Fairness in Serving Large Language Models"
(arXiv 2401.00588), whose prices of a prompt and an output token are used here. With one tenant and one priority this is
first come, first served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

OUTPUT_PRICE = 2.0
"""Prompt tokens that one output token counts for."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a request belongs to. Of two that both wait, each is served in proportion to its weight (> 0)."""

    name: str
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight of tenant {self.name!r} is {self.weight}; it must be > 0")


NOBODY_IN_PARTICULAR = Tenant("", 1.0)
"""The tenant of requests that name none."""


@dataclass(slots=True)
class TenantLedger:
    """The counters of one engine; `of` names a request's tenant."""

    of: Callable[[Request], Tenant]
    counters: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    _latest: float = 0.0

    def enter(self, tenant: Tenant) -> None:
        """One more request of this tenant waits."""
        if not self.waiting.get(tenant.name):
            others = [self.counters[name] for name, count in self.waiting.items() if count]
            level = min(others) if others else self._latest
            self.counters[tenant.name] = max(self.counters.get(tenant.name, level), level)
        self.waiting[tenant.name] = self.waiting.get(tenant.name, 0) + 1

    def leave(self, tenant: Tenant) -> None:
        """One request of this tenant no longer waits."""
        self.waiting[tenant.name] -= 1
        if not self.waiting[tenant.name]:
            self._latest = self.counters[tenant.name]

    def charge(self, tenant: Tenant, tokens: float) -> None:
        """This tenant was served so many prompt tokens, or their worth."""
        self.counters[tenant.name] = self.counters.get(tenant.name, self._latest) + tokens / tenant.weight


class FairQueue:
    """The requests of one type that wait; every change costs O(log tenants), whatever their number."""

    def __init__(self, ledger: TenantLedger) -> None:
        self._ledger = ledger
        self._levels: dict[str, dict[int, OrderedDict[str, Request]]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._size = 0

    def add(self, request: Request) -> None:
        """A request starts to wait, behind those of its tenant and priority."""
        tenant = self._ledger.of(request)
        self._ledger.enter(tenant)
        self._tenants[tenant.name] = tenant
        levels = self._levels.setdefault(tenant.name, {})
        if request.priority not in levels:
            levels[request.priority] = OrderedDict()
            self._levels[tenant.name] = dict(sorted(levels.items()))
        self._levels[tenant.name][request.priority][request.request_id] = request
        self._size += 1

    def pop(self) -> Request:
        """The next request, charged to its tenant. Raises IndexError when nobody waits."""
        request = next(iter(self), None)
        if request is None:
            raise IndexError("nobody waits")
        self._ledger.charge(self._ledger.of(request), request.num_prompt_tokens)
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """A request no longer waits."""
        tenant = self._ledger.of(request)
        levels = self._levels[tenant.name]
        del levels[request.priority][request.request_id]
        if not levels[request.priority]:
            del levels[request.priority]
        if not levels:
            del self._levels[tenant.name]
        self._ledger.leave(tenant)
        self._size -= 1

    def clear(self) -> None:
        """Nobody waits here any more."""
        for request in list(self):
            self.remove(request)

    def last(self, count: int) -> list[Request]:
        """The `count` requests that are farthest from their turn, the very last first."""
        if len(self._levels) == 1:
            return list(islice(_backwards(next(iter(self._levels.values()))), count))
        return list(self)[-count:][::-1] if count else []

    def backwards(self) -> Iterator[Request]:
        """All requests, the one farthest from its turn first."""
        if len(self._levels) == 1:
            return _backwards(next(iter(self._levels.values())))
        return reversed(list(self))

    def __iter__(self) -> Iterator[Request]:
        """Everybody in the order of their turns, if nobody else comes."""
        if len(self._levels) == 1:
            return _forwards(next(iter(self._levels.values())))
        return self._by_turns()

    def _by_turns(self) -> Iterator[Request]:
        turns = [(self._ledger.counters[name], name, _forwards(levels)) for name, levels in self._levels.items()]
        heapify(turns)
        while turns:
            counter, name, requests = heappop(turns)
            request = next(requests, None)
            if request is not None:
                yield request
                heappush(turns, (counter + request.num_prompt_tokens / self._tenants[name].weight, name, requests))

    def __len__(self) -> int:
        return self._size


def _forwards(levels: dict[int, OrderedDict[str, Request]]) -> Iterator[Request]:
    return chain.from_iterable(level.values() for level in levels.values())


def _backwards(levels: dict[int, OrderedDict[str, Request]]) -> Iterator[Request]:
    return chain.from_iterable(reversed(level.values()) for level in reversed(levels.values()))
