"""The interface of a policy: a snapshot in, a decision out; no engine, no clock, no I/O.

The engine (and the simulator) builds a `Snapshot` before each iteration, calls `decide`, and carries out the
`Decision`. A policy may keep state between calls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from scheduler.messages import Iteration, Outlook
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class RunningRequest(NamedTuple):
    """A running request, as a policy sees it.

    type_name: the result of `Policy.classify`.
    stage: output tokens so far, including those in flight; 0 during prefill (paper: s).
    tokens_in_flight: the part of `stage` that iterations under way compute; one of these tokens may be the last.
    kv_tokens: KV tokens that an iteration reads for it, prompt and output so far.
    """

    request_id: str
    type_name: str = UNKNOWN_TYPE
    stage: int = 0
    tokens_in_flight: int = 0
    kv_tokens: int = 0


class RunningBatch(Sequence[RunningRequest]):
    """Running requests, oldest first; columns cost far less than one object per request.

    This class holds `RunningRequest` objects without declared lengths; the engine's is `EngineBatch`.
    """

    __slots__ = ("_requests",)

    def __init__(self, requests: Iterable[RunningRequest] = ()) -> None:
        self._requests: Sequence[Any] = tuple(requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: Any) -> Any:
        return self._requests[index]

    def stages(self) -> list[int]:
        """`RunningRequest.stage` of all."""
        return [one.stage for one in self._requests]

    def kv_tokens(self) -> list[int]:
        """`RunningRequest.kv_tokens` of all."""
        return [one.kv_tokens for one in self._requests]

    def shared_kv_tokens(self) -> list[int]:
        """The part of `kv_tokens` in cached blocks that other requests already held at admission."""
        return [0] * len(self)

    def first_token_s(self) -> list[float]:
        """Clock second of each first output token; NaN before it."""
        return [math.nan] * len(self)

    def expected_output_tokens(self) -> list[float]:
        """Declared output length of each request; infinite if not declared."""
        return [math.inf] * len(self)

    def most_output_tokens(self) -> list[float]:
        """Longest allowed output of each request (max_tokens); infinite if only the context bounds it."""
        return [math.inf] * len(self)


NO_REQUESTS = RunningBatch()


class Waiting(NamedTuple):
    """A request in the admission queue, waiting since a clock second.

    cached_tokens: prompt tokens in the prefix cache, which need no compute. shared_tokens: of these, the tokens in
    blocks that running requests hold, which add no memory. Declared lengths as in `RunningBatch`. is_committed: it may
    not be rejected, such as a choice of a request that has begun; set in `QueueView.tail`.
    """

    prompt_tokens: int
    since_s: float
    request_id: str = ""
    cached_tokens: int = 0
    shared_tokens: int = 0
    expected_output_tokens: float = math.inf
    most_output_tokens: float = math.inf
    is_committed: bool = False

    @property
    def tokens_to_compute(self) -> int:
        """Prompt tokens that the engine will compute."""
        return self.prompt_tokens - self.cached_tokens


def _none() -> Iterator[Waiting]:
    return iter(())


@dataclass(frozen=True, slots=True)
class QueueView:
    """The waiting requests of one type: their number, and since when the oldest waits (clock seconds).

    heads, aged, tail: iterate from the head of the queue, from the oldest request, and from the last turn; a policy
    takes no more of them than it may admit or reject. tokens_to_compute: prompt tokens of all of them, less the tokens
    found cached at each arrival. new: the requests that no decision has seen yet, by id (None: all).
    """

    length: int
    oldest_since_s: float
    heads: Callable[[], Iterator[Waiting]] = field(default=_none, compare=False)
    aged: Callable[[], Iterator[Waiting]] = field(default=_none, compare=False)
    tail: Callable[[], Iterator[Waiting]] = field(default=_none, compare=False)
    tokens_to_compute: int = field(default=0, compare=False)
    new: Collection[str] | None = field(default=None, compare=False)

    def is_new(self, waiting: Waiting) -> bool:
        """Whether no decision has seen this request yet."""
        return self.new is None or waiting.request_id in self.new


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one engine just before an iteration.

    waiting: the non-empty admission queues by type. running: running requests, oldest first.
    released, released_requests: admitted requests that do not run (not started, preempted, or unable to start: a
        grammar compiles, adapters are full), as a number and one by one.
    kv_used_tokens: allocated KV tokens (shared blocks once). kv_read_tokens: KV tokens that the next iteration reads
        (None: the same). kv_capacity_tokens: size of the KV cache.
    prompt_backlog_tokens: prompt tokens left to compute of running and released requests. prompt_tokens_under_way:
        prompt tokens that the iterations under way compute.
    slots: most running requests. most_tokens: most tokens in an iteration (None: no limit).
    latest: the latest executed iteration.
    decode_tokens: tokens to compute in the next iteration for all requests that it advances, drafts included (None: one
        per running request). most_step_tokens: most output tokens that a request gains in an iteration.
    next_is_fuller: the next iteration of a pipeline decodes for more requests than the average one.
    """

    now_s: float
    waiting: Mapping[str, QueueView]
    released: int
    running: RunningBatch
    kv_used_tokens: int
    kv_capacity_tokens: int
    prompt_backlog_tokens: int = 0
    prompt_tokens_under_way: int = 0
    released_requests: RunningBatch = NO_REQUESTS
    kv_read_tokens: int | None = None
    slots: int | None = None
    most_tokens: int | None = None
    latest: Iteration | None = None
    decode_tokens: int | None = None
    most_step_tokens: int = 1
    next_is_fuller: bool = False

    @property
    def read_tokens(self) -> int:
        """KV tokens that the next iteration's attention reads."""
        return self.kv_used_tokens if self.kv_read_tokens is None else self.kv_read_tokens

    @property
    def tokens_to_decode(self) -> int:
        """Decode tokens of the next iteration, drafts included."""
        return len(self.running) if self.decode_tokens is None else self.decode_tokens

    @property
    def idle(self) -> bool:
        """True when the engine has no running and no released request."""
        return not self.running and not self.released


_NO_IDS: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for one iteration; requests are named by id.

    admit: number of requests to admit, by type, from the head of the queue.
    sit_out: running requests that pause for this iteration; evict_first: the ones of these to preempt first.
    token_budget: tokens of this iteration (None: the thresholds' own).
    reject: requests to reject before any is admitted. reject_last: number of requests of the unknown type to reject
        afterwards, from the tail of the queue. drain_s: seconds until the queue is served, for their Retry-After.
    room: called later, and from another thread: how many more requests the queue takes before it rejects one (None:
        this policy rejects none).
    outlook: called in the same way with the number of requests that have arrived since, and whether the engine has none
        now: what the next one has to expect (None: this policy does not predict it).
    """

    admit: Mapping[str, int] = field(default_factory=dict)
    sit_out: Collection[str] = _NO_IDS
    token_budget: int | None = None
    reject: Collection[str] = _NO_IDS
    reject_last: int = 0
    drain_s: float = 0.0
    evict_first: Collection[str] = _NO_IDS
    room: Callable[[], int] | None = field(default=None, compare=False)
    outlook: Callable[[int, bool], Outlook] | None = field(default=None, compare=False)


class Policy(ABC):
    """One scheduling policy under fixed thresholds; new thresholds make a new object."""

    name: ClassVar[str]

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.strict = thresholds.mode == "strict"

    def classify(self, prompt_tokens: int, known_output_tokens: int | None) -> str:
        """The queue a request waits in; by default one queue for all."""
        return UNKNOWN_TYPE

    @abstractmethod
    def decide(self, snapshot: Snapshot) -> Decision:
        """The admissions, pauses and rejections of the next iteration."""

    def free_slots(self, snapshot: Snapshot) -> int:
        """Free slots under the cap on running requests."""
        cap = self.thresholds.max_running
        taken = len(snapshot.running) + snapshot.released
        waiting = sum(view.length for view in snapshot.waiting.values())
        return waiting if cap is None else max(0, min(waiting, cap - taken))

    def hold_is_over(self, view: QueueView, snapshot: Snapshot) -> bool:
        """True when the oldest request of a queue has been held for `max_hold_s`."""
        return snapshot.now_s - view.oldest_since_s >= self.thresholds.max_hold_s
