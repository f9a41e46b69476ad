"""The admission queue: vLLM's waiting queue, split into held requests and released ones.

vLLM's scheduler takes requests from `self.waiting` while the queue is truthy. `AdmissionQueue` counts and lists all
waiting requests, so that totals, aborts and metrics stay vLLM's own, but is truthy only for requests that the policy
has released. Requests that vLLM puts back (preempted, skipped) were released before and are not held again.

A held request costs what `FairQueue` states, and a policy's view O(types); only `reclassify` visits all requests.
Source: `vllm.v1.core.sched.request_queue`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from scheduler.engine.choices import Choices
from scheduler.engine.fair_queue import DEFAULT_TENANT, FairQueue, Tenant, TenantLedger
from scheduler.policies import QueueView, Waiting

Classify = Callable[[Request], str]


def _plainly(request: Request, since_s: float) -> Waiting:
    return Waiting(request.num_prompt_tokens, since_s, request.request_id)


class AdmissionQueue(RequestQueue):
    """A RequestQueue whose held requests are sorted by type.

    Within a type the order is that of `FairQueue`: by weight among tenants, then by vLLM's priority and by age.
    order: the engine's own, for released requests. classify: the type of a request. tenant_of: its tenant.
    on_release: called with the seconds that a released request was held. describe: a request waiting since a clock
    second, as policies see it. arrived: that clock second (left out: when the request enters this queue).
    """

    def __init__(
        self,
        order: SchedulingPolicy,
        classify: Classify,
        clock: Callable[[], float],
        on_release: Callable[[float], None],
        tenant_of: Callable[[Request], Tenant] = lambda request: DEFAULT_TENANT,
        describe: Callable[[Request, float], Waiting] = _plainly,
        arrived: Callable[[Request], float] | None = None,
    ) -> None:
        self._describe = describe
        self._arrived = arrived or (lambda request: self._clock())
        self._tokens: dict[str, int] = {}
        self._tokens_of: dict[str, int] = {}
        self._order, self._classify, self._clock, self._on_release = order, classify, clock, on_release
        self._open = create_request_queue(order)
        self._ledger = TenantLedger(tenant_of)
        self._closed: dict[str, FairQueue] = {}
        self._by_age: dict[str, OrderedDict[str, tuple[Request, float]]] = {}
        self._since_s: dict[str, float] = {}
        self._new: set[str] = set()
        self._type_of: dict[str, str] = {}
        self.choices = Choices()

    # The policy's side.

    def views(self) -> dict[str, QueueView]:
        """The non-empty queues of held requests, by type."""
        return {
            name: QueueView(
                len(queue), next(iter(self._by_age[name].values()))[1], partial(self._waiting, queue),
                partial(self._aged, name), partial(self._tail, queue), self._tokens[name], self._new,
            )
            for name, queue in self._closed.items() if queue
        }

    def seen(self) -> None:
        """A decision has seen all requests that are held now."""
        self._new = set()

    def _waiting(self, queue: FairQueue) -> Iterator[Waiting]:
        return (self._describe(request, self._since_s[request.request_id]) for request in queue)

    def _tail(self, queue: FairQueue) -> Iterator[Waiting]:
        committed = self.choices.committed
        for request in queue.backwards():
            waiting = self._describe(request, self._since_s[request.request_id])
            yield waiting._replace(is_committed=True) if request.request_id in committed else waiting

    def _aged(self, name: str) -> Iterator[Waiting]:
        committed = self.choices.committed
        return (
            self._describe(request, since_s) for request_id, (request, since_s) in self._by_age[name].items()
            if request_id not in committed
        )

    def last(self, type_name: str, count: int) -> list[Request]:
        """The last `count` requests of a type, by turn, that may be rejected; left in place."""
        queue, committed = self._closed.get(type_name), self.choices.committed
        if not queue or not count:
            return []
        farthest = queue.last(count + len(committed))
        return [request for request in farthest if request.request_id not in committed][:count]

    def release(self, type_name: str, count: int) -> None:
        """Release the first `count` requests of a type, or as many as wait."""
        queue = self._closed.get(type_name)
        now_s = self._clock()
        for _ in range(min(count, len(queue) if queue else 0)):
            assert queue is not None
            request = queue.pop()
            self._on_release(now_s - self._leave(type_name, request))
            self.choices.let_through(request.request_id)
            self._open.add_request(request)

    def let_through(self, request: Request) -> None:
        """Release one request out of turn."""
        name = self._type_of[request.request_id]
        self._closed[name].take(request)
        self._on_release(self._clock() - self._leave(name, request))
        self.choices.let_through(request.request_id)
        self._open.add_request(request)

    def take_back(self, request: Request) -> None:
        """Hold a released request again, as if it had just arrived."""
        self._open.remove_request(request)
        self._hold(request, self._clock()).add(request)
        self._new.add(request.request_id)

    @property
    def held(self) -> int:
        """Number of held requests."""
        return len(self._since_s)

    def released_requests(self) -> Iterator[Request]:
        """Released requests that vLLM has not started yet."""
        return iter(self._open)

    @property
    def released(self) -> int:
        """Number of released requests that vLLM has not started yet."""
        return len(self._open)

    def type_of(self, request_id: str) -> str | None:
        """The type of a request; None once forgotten."""
        return self._type_of.get(request_id)

    def forget(self, request: Request) -> None:
        """Drop the records of a request that has left the engine."""
        if request.request_id in self._since_s:  # held again with its last token in flight
            self.remove_request(request)
        self._type_of.pop(request.request_id, None)
        self._ledger.end(request)

    def settle(self) -> None:
        """Charge each tenant for the output tokens of the iteration that has just ended."""
        self._ledger.settle()

    def reclassify(self, requests: Iterable[Request]) -> None:
        """Classify all requests anew: held, released, and `requests` (the running ones). No tenant's turn changes."""
        held = [self._by_age[self._type_of[name]][name] for name in self._since_s]
        self._closed, self._by_age = {}, {}
        for request, since_s in held:
            self._hold(request, since_s).move_in(request)
        for request in chain(requests, self._open):
            self._type_of[request.request_id] = self._classify(request)

    def _hold(self, request: Request, since_s: float) -> FairQueue:
        """Record that a request has waited since `since_s`; returns the queue of its type."""
        name = self._classify(request)
        if name not in self._closed:
            self._closed[name], self._by_age[name] = FairQueue(self._ledger), OrderedDict()
            self._tokens[name] = 0
        self._by_age[name][request.request_id] = (request, since_s)
        self._type_of[request.request_id] = name
        self._since_s[request.request_id] = since_s
        self.choices.hold(request.request_id)
        tokens = self._tokens_of[request.request_id] = self._describe(request, since_s).tokens_to_compute
        self._tokens[name] += tokens
        return self._closed[name]

    def _leave(self, name: str, request: Request) -> float:
        """Record that a request no longer waits; returns the clock second since which it did."""
        del self._by_age[name][request.request_id]
        self._tokens[name] -= self._tokens_of.pop(request.request_id)
        return self._since_s.pop(request.request_id)

    # vLLM's side: RequestQueue.

    def add_request(self, request: Request) -> None:
        """Hold a new request; one that was released before goes back to the released ones."""
        if request.request_id in self._type_of:
            self._open.add_request(request)
        else:
            self._hold(request, self._arrived(request)).add(request)
            self._new.add(request.request_id)

    def pop_request(self) -> Request:
        """The next released request."""
        return self._open.pop_request()

    def peek_request(self) -> Request:
        """The next released request, left in place."""
        return self._open.peek_request()

    def prepend_request(self, request: Request) -> None:
        """Put a request back at the head of the released ones."""
        self._open.prepend_request(request)

    def prepend_requests(self, requests: RequestQueue) -> None:
        """Put requests back at the head of the released ones."""
        self._open.prepend_requests(requests)

    def remove_request(self, request: Request) -> None:
        """Remove one request, held or released."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove requests, held or released; others are ignored, as vLLM expects."""
        requests = list(requests)
        held = [request for request in requests if request.request_id in self._since_s]
        for request in held:
            name = self._type_of[request.request_id]
            self._closed[name].remove(request)
            self._leave(name, request)
            self.choices.leave(request.request_id)
        if len(held) < len(requests):
            self._open.remove_requests(requests)

    def __bool__(self) -> bool:
        return bool(self._open)

    def __len__(self) -> int:
        return len(self._open) + len(self._since_s)

    def __iter__(self) -> Iterator[Request]:
        return chain(self._open, *self._closed.values())
