"""What a policy sees and what it says: no engine, no clock of its own, no I/O.

The engine (and the simulator) builds a `Snapshot` before each iteration, asks `decide`, and carries the `Decision` out.
A policy may keep state between calls, and only through them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from scheduler.messages import Iteration
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class RunningRequest(NamedTuple):
    """A running request, as a policy sees it.

    type_name: what `Policy.classify` said of it. stage: output tokens so far, those in flight included; 0 while its
    prompt is still being computed (paper: s). tokens_in_flight: of `stage`, tokens that an iteration under way
    computes: one of them may turn out to be the last. kv_tokens: what an iteration reads for it once its prompt is
    computed, prompt and output so far.
    """

    request_id: str
    type_name: str = UNKNOWN_TYPE
    stage: int = 0
    tokens_in_flight: int = 0
    kv_tokens: int = 0


class RunningBatch(Sequence[RunningRequest]):
    """Running requests, the oldest first; whole columns of them cost far less than one object each.

    This class holds requests given one by one, without declared lengths; the engine's is `EngineBatch`.
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
        """Of those, the tokens in cached blocks that other requests held already when each was admitted."""
        return [0] * len(self)

    def first_token_s(self) -> list[float]:
        """Clock second of each first output token; NaN while it is not out."""
        return [math.nan] * len(self)

    def expected_output_tokens(self) -> list[float]:
        """The output length that each client declared; infinite when it declared none."""
        return [math.inf] * len(self)

    def most_output_tokens(self) -> list[float]:
        """The longest output that each request may have (its max_tokens); infinite when only the context bounds it."""
        return [math.inf] * len(self)


NO_REQUESTS = RunningBatch()


class Waiting(NamedTuple):
    """A request that waits in the admission queue, since a clock second.

    cached_tokens: of its prompt, those that the prefix cache holds, which need not be computed. shared_tokens: of the
    cached ones, those in blocks that running requests hold, which add no memory. Declared lengths as in `RunningBatch`.
    """

    prompt_tokens: int
    since_s: float
    request_id: str = ""
    cached_tokens: int = 0
    shared_tokens: int = 0
    expected_output_tokens: float = math.inf
    most_output_tokens: float = math.inf

    @property
    def tokens_to_compute(self) -> int:
        """Prompt tokens that the engine will compute."""
        return self.prompt_tokens - self.cached_tokens


def _none() -> Iterator[Waiting]:
    return iter(())


@dataclass(frozen=True, slots=True)
class QueueView:
    """The requests of one type that wait for admission: how many, and since when the oldest does (clock seconds).

    `heads` goes through them from the head of the queue, `aged` from the oldest on, `tail` from the one farthest from
    its turn; a policy takes no more of them than it may admit or reject. tokens_to_compute: prompt tokens of all of
    them, less what the prefix cache held when each arrived.
    """

    length: int
    oldest_since_s: float
    heads: Callable[[], Iterator[Waiting]] = field(default=_none, compare=False)
    aged: Callable[[], Iterator[Waiting]] = field(default=_none, compare=False)
    tail: Callable[[], Iterator[Waiting]] = field(default=_none, compare=False)
    tokens_to_compute: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one engine just before an iteration.

    waiting: the admission queues by type, empty ones left out; released: requests already admitted that do not run (not
    taken up yet, preempted, or unable to start: a grammar compiles, adapters are full); released_requests: the
    same, one by one; running: oldest first. KV in tokens: kv_used_tokens is what is allocated
    (shared blocks once), kv_read_tokens what the coming iteration's attention reads (None: the same).
    prompt_backlog_tokens: what is left to compute of the prompts of those running and released;
    prompt_tokens_under_way: what the iterations under way compute of prompts. slots: most requests
    that may run at once; most_tokens: most tokens in an iteration (None: no such limit). latest: the latest executed
    iteration. decode_tokens: what the coming iteration computes to advance those that it can, their drafts included
    (None: one token for each that runs); most_step_tokens: most output tokens that one iteration gives a request.
    next_is_emptier: of the iterations among which a pipeline spreads the requests, the coming one has more than its
    share.
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
    next_is_emptier: bool = False

    @property
    def read_tokens(self) -> int:
        """KV tokens that the coming iteration's attention reads."""
        return self.kv_used_tokens if self.kv_read_tokens is None else self.kv_read_tokens

    @property
    def tokens_to_decode(self) -> int:
        """Tokens that the coming iteration computes to advance those that it can."""
        return len(self.running) if self.decode_tokens is None else self.decode_tokens

    @property
    def idle(self) -> bool:
        """True when the engine has nothing at all to run."""
        return not self.running and not self.released


_NO_IDS: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of each type may enter (from the head of its queue), and which requests sit this iteration out (ids).

    evict_first: of those that sit out, the ones whose KV cache is given up before the others' where memory runs short.
    token_budget: tokens of this iteration (None: the thresholds' own). reject: requests that are rejected before any
    enters (ids); reject_last: how many of the unknown type are rejected afterwards, those farthest from their turn;
    drain_s: seconds after which the waiting requests will have been served, told to the rejected ones.
    """

    admit: Mapping[str, int] = field(default_factory=dict)
    sit_out: Collection[str] = _NO_IDS
    token_budget: int | None = None
    reject: Collection[str] = _NO_IDS
    reject_last: int = 0
    drain_s: float = 0.0
    evict_first: Collection[str] = _NO_IDS


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
        """Which requests may enter and which sit out, for the iteration about to run."""

    def free_slots(self, snapshot: Snapshot) -> int:
        """Requests that may still enter under the cap on running requests."""
        cap = self.thresholds.max_running
        taken = len(snapshot.running) + snapshot.released
        waiting = sum(view.length for view in snapshot.waiting.values())
        return waiting if cap is None else max(0, min(waiting, cap - taken))

    def hold_is_over(self, view: QueueView, snapshot: Snapshot) -> bool:
        """True when the oldest request of a queue has been held for as long as any may be."""
        return snapshot.now_s - view.oldest_since_s >= self.thresholds.max_hold_s
