"""The gate: vLLM's waiting queue, with a closed part in front of the open one.

vLLM's scheduler takes requests from `self.waiting` for as long as the queue is truthy. A `GatedQueue` counts and lists
everything that waits, so that totals, aborts and metrics stay vLLM's own, but is truthy only for what a policy has let
through. Requests that vLLM itself puts back (preempted, skipped) were let through before and never wait here again.

Costs O(1) per request and per decision: nothing scans the queue. Source: `vllm.v1.core.sched.request_queue`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from scheduler.policies import QueueView, Waiting

Classify = Callable[[Request], str]


class GatedQueue(RequestQueue):
    """A RequestQueue whose closed part is sorted by type.

    Within a type the engine's own order holds (arrival, or priority); `classify` names a request's type, `clock` tells
    since when it waits, `on_release` hears how many seconds each was held.
    """

    def __init__(
        self,
        order: SchedulingPolicy,
        classify: Classify,
        clock: Callable[[], float],
        on_release: Callable[[float], None],
    ) -> None:
        self._order, self._classify, self._clock, self._on_release = order, classify, clock, on_release
        self._open = create_request_queue(order)
        self._closed: dict[str, RequestQueue] = {}
        self._since_s: dict[str, float] = {}
        self._oldest: dict[str, deque[tuple[str, float]]] = {}
        self._type_of: dict[str, str] = {}

    # What a policy needs to know and to do.

    def views(self) -> dict[str, QueueView]:
        """The closed queues that are not empty, by type."""
        return {
            name: QueueView(len(queue), self._oldest_since_s(name), partial(self._heads, queue))
            for name, queue in self._closed.items() if queue
        }

    def _heads(self, queue: RequestQueue) -> Iterator[Waiting]:
        return (Waiting(request.num_prompt_tokens, self._since_s[request.request_id]) for request in queue)

    def oldest(self, type_name: str, count: int) -> list[Request]:
        """The first `count` requests of a type, left in place."""
        return list(islice(self._closed.get(type_name, ()), count))

    def newest(self, type_name: str, count: int) -> list[Request]:
        """The last `count` requests of a type, left in place."""
        queue = self._closed.get(type_name)
        return list(islice(reversed(queue), count)) if queue and count else []

    def release(self, type_name: str, count: int) -> None:
        """Let the first `count` requests of a type through; fewer when fewer wait."""
        queue = self._closed.get(type_name)
        now_s = self._clock()
        for _ in range(min(count, len(queue) if queue else 0)):
            assert queue is not None
            request = queue.pop_request()
            self._on_release(now_s - self._since_s.pop(request.request_id))
            self._open.add_request(request)

    @property
    def held(self) -> int:
        """Requests behind the gate."""
        return len(self._since_s)

    @property
    def released(self) -> int:
        """Requests let through that the engine has not taken up yet."""
        return len(self._open)

    def type_of(self, request_id: str) -> str | None:
        """The type under which a request came in; None once forgotten."""
        return self._type_of.get(request_id)

    def forget(self, request_id: str) -> None:
        """Drop what is remembered of a request that has left the engine."""
        self._type_of.pop(request_id, None)

    def reclassify(self, requests: Iterable[Request]) -> None:
        """Sort everything anew after a change of policy: the held, the let through, and `requests` (in service)."""
        held = [request for queue in self._closed.values() for request in queue]
        held.sort(key=lambda request: self._since_s[request.request_id])
        self._closed, self._oldest = {}, {}
        for request in held:
            self._hold(request, self._since_s[request.request_id])
        for request in chain(requests, self._open):
            self._type_of[request.request_id] = self._classify(request)

    def _hold(self, request: Request, since_s: float) -> None:
        name = self._classify(request)
        if name not in self._closed:
            self._closed[name], self._oldest[name] = create_request_queue(self._order), deque()
        self._closed[name].add_request(request)
        self._oldest[name].append((request.request_id, since_s))
        self._type_of[request.request_id] = name
        self._since_s[request.request_id] = since_s

    def _oldest_since_s(self, name: str) -> float:
        # The head of a priority queue need not be the oldest; those who left are dropped from this list lazily.
        order = self._oldest[name]
        while self._since_s.get(order[0][0]) != order[0][1]:
            order.popleft()
        return order[0][1]

    # vLLM's side: RequestQueue.

    def add_request(self, request: Request) -> None:
        """A new request waits behind the gate; one that was let through before goes to the open part."""
        if request.request_id in self._type_of:
            self._open.add_request(request)
        else:
            self._hold(request, self._clock())

    def pop_request(self) -> Request:
        """The next request of the open part."""
        return self._open.pop_request()

    def peek_request(self) -> Request:
        """The next request of the open part, left in place."""
        return self._open.peek_request()

    def prepend_request(self, request: Request) -> None:
        """Put a request back at the head of the open part."""
        self._open.prepend_request(request)

    def prepend_requests(self, requests: RequestQueue) -> None:
        """Put requests back at the head of the open part."""
        self._open.prepend_requests(requests)

    def remove_request(self, request: Request) -> None:
        """Take one request out, wherever it waits."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take requests out, wherever they wait; those that do not wait here are left alone, as vLLM expects."""
        requests = list(requests)
        held = [request for request in requests if self._since_s.pop(request.request_id, None) is not None]
        for request in held:
            self._closed[self._type_of[request.request_id]].remove_request(request)
        if len(held) < len(requests):
            self._open.remove_requests(requests)

    def __bool__(self) -> bool:
        return bool(self._open)

    def __len__(self) -> int:
        return len(self._open) + len(self._since_s)

    def __iter__(self) -> Iterator[Request]:
        return chain(self._open, *self._closed.values())
