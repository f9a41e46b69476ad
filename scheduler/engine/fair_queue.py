"""The order of waiting requests: by weight among tenants, by priority and then age within a tenant.

Every tenant has a counter of the tokens it was served, divided by its weight; the tenant with the lowest counter is
next. A prompt is charged when it enters, output tokens as they are produced. A tenant that was idle restarts at the
lowest counter among waiting tenants, so idle time earns no credit. Source: the Virtual Token Counter of "Fairness in
Serving Large Language Models" (arXiv 2401.00588), whose prices of a prompt and an output token are used here. With one
tenant and one priority this is first come, first served.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

OUTPUT_PRICE = 2.0
"""Price of an output token in prompt tokens."""
_DIGITS = 6
"""Counters within a millionth of a token are equal: sums of shares differ in their last bits."""


_MOST_IN_DEBT = 256
"""Most tenants without a request whose debt is remembered; the smallest debts are dropped first."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant. Tenants with waiting requests are served in proportion to their weights (> 0)."""

    name: str
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight of tenant {self.name!r} is {self.weight}; it must be > 0")


DEFAULT_TENANT = Tenant("", 1.0)
"""The tenant of requests that name none."""


@dataclass(slots=True)
class _Account:
    """One tenant: its counter, its number of waiting requests, and its running requests.

    charged_tokens: output tokens of running requests already charged; ended_tokens: output tokens of requests that
    ended since the last charge.
    """

    weight: float
    counter: float
    waiting: int = 0
    running: dict[str, Request] = field(default_factory=dict)
    charged_tokens: int = 0
    ended_tokens: int = 0

    def charge(self, tokens: float) -> None:
        self.counter += tokens / self.weight

    def charge_outputs(self) -> None:
        """Charge the output tokens produced since the last call. A session may turn outputs into a prompt."""
        produced = self.produced_tokens()
        if (new := produced + self.ended_tokens - self.charged_tokens) > 0:
            self.charge(OUTPUT_PRICE * new)
        self.charged_tokens, self.ended_tokens = produced, 0

    def produced_tokens(self) -> int:
        return sum([request.num_output_tokens for request in self.running.values()])


class TenantLedger:
    """The counters of one engine; `of` names a request's tenant.

    A single tenant costs nothing per iteration; several cost O(tenants + running requests). A tenant without a request
    is forgotten once the waiting tenants have reached its counter, since it would restart at that level anyway. Tenant
    names that are used only once can accumulate; `_MOST_IN_DEBT` bounds them.
    """

    def __init__(self, of: Callable[[Request], Tenant]) -> None:
        self._of = of
        self._accounts: dict[str, _Account] = {}
        self._floor = 0.0  # where a tenant starts at the least
        self._waiting: set[str] = set()  # tenants with requests that wait
        self._some_ended = False

    def of(self, request: Request) -> Tenant:
        """The tenant of a request."""
        return self._of(request)

    def counter(self, name: str) -> float:
        """Service of a tenant in prompt-token equivalents, divided by its weight."""
        return self._accounts[name].counter

    def weight(self, name: str) -> float:
        """The weight of a tenant, from its latest request."""
        return self._accounts[name].weight

    def __len__(self) -> int:
        return len(self._accounts)

    def enter(self, request: Request) -> None:
        """A request starts to wait. O(waiting tenants) for the first of its tenant, else O(1)."""
        tenant = self._of(request)
        account = self._account(tenant)
        account.weight = tenant.weight
        if not account.waiting:
            account.counter = max(account.counter, self._level())
            self._waiting.add(tenant.name)
        account.waiting += 1

    def leave(self, request: Request) -> None:
        """A request leaves the queue unserved."""
        name = self._of(request).name
        account = self._accounts[name]
        account.waiting -= 1
        if not account.waiting:
            self._waiting.remove(name)

    def serve(self, request: Request) -> None:
        """A waiting request enters the engine: its prompt is charged now, its output tokens as they are produced."""
        account = self._accounts[self._of(request).name]
        account.charge(request.num_prompt_tokens)
        account.running[request.request_id] = request
        self.leave(request)
        if not self._waiting:
            self._floor = max(self._floor, account.counter)

    def end(self, request: Request) -> None:
        """A request has left the engine, served or not; its uncharged output tokens are charged next."""
        account = self._accounts.get(self._of(request).name)
        if account is not None and account.running.pop(request.request_id, None) is not None and len(self) > 1:
            account.ended_tokens += request.num_output_tokens
        self._some_ended = True

    def settle(self) -> None:
        """Charge the output tokens produced since the last call, and forget absent tenants."""
        if len(self._accounts) < 2:
            return  # a single tenant has no debt
        for account in self._accounts.values():
            if account.running or account.ended_tokens:
                account.charge_outputs()
        if self._some_ended:
            self._some_ended = False
            self._forget_gone()

    def charge(self, tenant: Tenant, tokens: float) -> None:
        """Add `tokens`, in prompt-token equivalents, to the tenant's service."""
        self._account(tenant).charge(tokens)

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            if len(self._accounts) == 1:  # service of a single tenant is not charged
                (alone,) = self._accounts.values()
                alone.charged_tokens, alone.ended_tokens = alone.produced_tokens(), 0
            account = self._accounts[tenant.name] = _Account(tenant.weight, self._level())
        return account

    def _level(self) -> float:
        """The counter at which a tenant starts to wait: the lowest among the waiting tenants."""
        return max(self._floor, min((self._accounts[name].counter for name in self._waiting), default=self._floor))

    def _forget_gone(self) -> None:
        level = self._level()
        gone = sorted(
            (account.counter, name) for name, account in self._accounts.items()
            if not account.waiting and not account.running
        )
        paid_up = bisect_right(gone, level, key=itemgetter(0))
        for _, name in gone[:max(paid_up, len(gone) - _MOST_IN_DEBT)]:
            del self._accounts[name]
        if paid_up:
            self._floor = level  # or a dropped tenant would restart below its counter


class _TenantQueue:
    """The requests of one tenant by priority (lower first), then by age; and the sum of their prompt tokens."""

    __slots__ = ("_by_priority", "_priorities", "prompt_tokens")

    def __init__(self) -> None:
        self._priorities: list[int] = []  # sorted
        self._by_priority: dict[int, OrderedDict[str, Request]] = {}
        self.prompt_tokens = 0

    def add(self, request: Request) -> None:
        """O(1) if the priority has waiting requests already, else O(priorities)."""
        level = self._by_priority.get(request.priority)
        if level is None:
            insort(self._priorities, request.priority)
            level = self._by_priority[request.priority] = OrderedDict()
        level[request.request_id] = request
        self.prompt_tokens += request.num_prompt_tokens

    def remove(self, request: Request) -> None:
        level = self._by_priority[request.priority]
        del level[request.request_id]
        self.prompt_tokens -= request.num_prompt_tokens
        if not level:
            del self._by_priority[request.priority]
            del self._priorities[bisect_left(self._priorities, request.priority)]

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._by_priority[priority].values()

    def __reversed__(self) -> Iterator[Request]:
        for priority in reversed(self._priorities):
            yield from reversed(self._by_priority[priority].values())

    def __bool__(self) -> bool:
        return bool(self._priorities)


class FairQueue:
    """The waiting requests of one type.

    Costs do not grow with the number of requests: `add` and `remove` are O(1) if the tenant and the priority have
    waiting requests already (else see `TenantLedger.enter` and `_TenantQueue.add`), `pop` is O(tenants); in `last` and
    in iteration the first request is O(tenants) and each further one O(log tenants).
    """

    def __init__(self, ledger: TenantLedger) -> None:
        self._ledger = ledger
        self._tenants: dict[str, _TenantQueue] = {}
        self._size = 0

    def add(self, request: Request) -> None:
        """A request starts to wait, behind those of its tenant and priority."""
        self._ledger.enter(request)
        self.move_in(request)

    def move_in(self, request: Request) -> None:
        """Take over a waiting request from another queue; its tenant's turn stays the same."""
        self._tenants.setdefault(self._ledger.of(request).name, _TenantQueue()).add(request)
        self._size += 1

    def pop(self) -> Request:
        """The next request, charged to its tenant. Raises IndexError when no request waits."""
        if not self._tenants:
            raise IndexError("no request waits")
        name = min(self._tenants, key=lambda name: (_turn(self._ledger.counter(name)), name))
        request = next(iter(self._tenants[name]))
        self.take(request)
        return request

    def take(self, request: Request) -> None:
        """Remove a request that enters the engine out of turn, and charge its tenant."""
        self._move_out(request)
        self._ledger.serve(request)

    def remove(self, request: Request) -> None:
        """A request no longer waits."""
        self._move_out(request)
        self._ledger.leave(request)

    def _move_out(self, request: Request) -> None:
        name = self._ledger.of(request).name
        self._tenants[name].remove(request)
        if not self._tenants[name]:
            del self._tenants[name]
        self._size -= 1

    def last(self, count: int) -> list[Request]:
        """The last `count` requests by turn, the very last first."""
        return list(islice(self.backwards(), count))

    def backwards(self) -> Iterator[Request]:
        """All requests, the last turn first."""
        if len(self._tenants) == 1:
            return reversed(next(iter(self._tenants.values())))
        return self._by_turns(backwards=True)

    def __iter__(self) -> Iterator[Request]:
        """All requests in the order of their turns, if no other arrives."""
        if len(self._tenants) == 1:
            return iter(next(iter(self._tenants.values())))
        return self._by_turns()

    def _by_turns(self, *, backwards: bool = False) -> Iterator[Request]:
        turns = [self._turns_of(name, backwards=backwards) for name in self._tenants]
        return (request for *_, request in merge(*turns, key=itemgetter(0, 1), reverse=backwards))

    def _turns_of(self, name: str, *, backwards: bool) -> Iterator[tuple[float, str, Request]]:
        """A request's turn is its tenant's counter once the tenant's earlier requests have been served."""
        counter, weight = self._ledger.counter(name), self._ledger.weight(name)
        queue = self._tenants[name]
        before = queue.prompt_tokens if backwards else 0
        for request in reversed(queue) if backwards else queue:
            if backwards:
                before -= request.num_prompt_tokens
            yield _turn(counter + before / weight), name, request
            if not backwards:
                before += request.num_prompt_tokens

    def __len__(self) -> int:
        return self._size


def _turn(counter: float) -> float:
    return round(counter, _DIGITS)
