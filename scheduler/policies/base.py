"""What a policy sees and what it says: no engine, no clock of its own, no I/O.

The engine (and the simulator) builds a `Snapshot` before each iteration, asks `decide`, and carries the `Decision` out.
A policy may keep state between calls, and only through them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from scheduler.messages import Iteration
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class RunningRequest(Protocol):
    """A request in service, as a policy sees it."""

    @property
    def request_id(self) -> str: ...

    @property
    def type_name(self) -> str:
        """What `Policy.classify` said of it."""

    @property
    def stage(self) -> int:
        """Output tokens so far, those in flight included; 0 while its prompt is still being computed (paper: s)."""

    @property
    def tokens_in_flight(self) -> int:
        """Of `stage`, output tokens that an iteration under way computes: one of them may turn out to be the last."""

    @property
    def kv_tokens(self) -> int:
        """KV tokens that an iteration reads for it once its prompt is computed: prompt and output so far."""


class RunningBatch(Sequence[RunningRequest]):
    """Requests in service; whole columns of them cost far less than one object each."""

    @abstractmethod
    def stages(self) -> list[int]:
        """`RunningRequest.stage` of all."""

    @abstractmethod
    def kv_tokens(self) -> list[int]:
        """`RunningRequest.kv_tokens` of all."""

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


def stages_of(running: Sequence[RunningRequest]) -> list[int]:
    """The stages of all."""
    return running.stages() if isinstance(running, RunningBatch) else [one.stage for one in running]


def kv_tokens_of(running: Sequence[RunningRequest]) -> list[int]:
    """The KV tokens of all."""
    return running.kv_tokens() if isinstance(running, RunningBatch) else [one.kv_tokens for one in running]


class Waiting(NamedTuple):
    """A request that waits at the gate, since a clock second.

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


def _nobody() -> Iterator[Waiting]:
    return iter(())


@dataclass(frozen=True, slots=True)
class QueueView:
    """The requests of one type that wait at the gate: how many, and since when the oldest does (clock seconds).

    `heads` goes through them from the head of the queue, `aged` from the oldest on, `tail` from the one farthest from
    its turn; a policy takes no more of them than it may admit or refuse. tokens_to_compute: prompt tokens of all of
    them, less what the prefix cache held when each arrived.
    """

    length: int
    oldest_since_s: float
    heads: Callable[[], Iterator[Waiting]] = field(default=_nobody, compare=False)
    aged: Callable[[], Iterator[Waiting]] = field(default=_nobody, compare=False)
    tail: Callable[[], Iterator[Waiting]] = field(default=_nobody, compare=False)
    tokens_to_compute: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one engine just before an iteration.

    waiting: the gate's queues by type, empty ones left out; released: requests already let through the gate that do not
    run (not taken up yet, preempted, or unable to start: a grammar compiles, adapters are full); released_requests: the
    same, one by one; running: the requests in service, oldest first. KV in tokens: kv_used_tokens is what is allocated
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
    running: Sequence[RunningRequest]
    kv_used_tokens: int
    kv_capacity_tokens: int
    prompt_backlog_tokens: int = 0
    prompt_tokens_under_way: int = 0
    released_requests: Sequence[RunningRequest] = ()
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


_NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of each type may enter (from the head of its queue), and who sits this iteration out (request ids).

    evict_first: of those who sit out, whose KV cache is given up before the others' where memory runs short.
    token_budget: tokens of this iteration (None: the thresholds' own). refuse: who is refused before anybody enters
    (request ids); refuse_last: how many of the unknown type are refused afterwards, those farthest from their turn;
    drain_s: seconds after which those who wait will have been served, for who is refused.
    """

    admit: Mapping[str, int] = field(default_factory=dict)
    sit_out: Collection[str] = _NOBODY
    token_budget: int | None = None
    reject: Collection[str] = _NOBODY
    reject_last: int = 0
    drain_s: float = 0.0
    evict_first: Collection[str] = _NOBODY


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
        """Who may enter and who sits out, for the iteration about to run."""

    def free_slots(self, snapshot: Snapshot) -> int:
        """Requests that may still enter under the cap on requests in service."""
        cap = self.thresholds.max_running
        taken = len(snapshot.running) + snapshot.released
        waiting = sum(view.length for view in snapshot.waiting.values())
        return waiting if cap is None else max(0, min(waiting, cap - taken))

    def hold_is_over(self, view: QueueView, snapshot: Snapshot) -> bool:
        """True when the oldest request of a queue has been held for as long as any may be."""
        return snapshot.now_s - view.oldest_since_s >= self.thresholds.max_hold_s
