"""What a policy sees and what it says: no engine, no clock of its own, no I/O.

The engine (and the simulator) builds a `Snapshot` before each iteration, asks `decide`, and carries the `Decision` out.
A policy may keep state between calls, and only through them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class Resident(Protocol):
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
    def kv_tokens(self) -> int:
        """KV tokens it holds once its prompt is computed: prompt and output so far."""


class Residents(Sequence[Resident]):
    """Requests in service; whole columns of them cost far less than one object each."""

    @abstractmethod
    def stages(self) -> list[int]:
        """`Resident.stage` of all."""

    @abstractmethod
    def kv_tokens(self) -> list[int]:
        """`Resident.kv_tokens` of all."""


def stages_of(residents: Sequence[Resident]) -> list[int]:
    """The stages of all."""
    return residents.stages() if isinstance(residents, Residents) else [one.stage for one in residents]


def kv_tokens_of(residents: Sequence[Resident]) -> list[int]:
    """The KV tokens of all."""
    return residents.kv_tokens() if isinstance(residents, Residents) else [one.kv_tokens for one in residents]


class Waiting(NamedTuple):
    """A request that waits at the gate, since a clock second."""

    prompt_tokens: int
    since_s: float
    request_id: str = ""


def _nobody() -> Iterator[Waiting]:
    return iter(())


@dataclass(frozen=True, slots=True)
class QueueView:
    """The requests of one type that wait at the gate: how many, and since when the oldest does (clock seconds).

    `heads` goes through them from the head of the queue, `aged` from the oldest on; a policy takes no more of them than
    it may admit or refuse.
    """

    length: int
    oldest_since_s: float
    heads: Callable[[], Iterator[Waiting]] = field(default=_nobody, compare=False)
    aged: Callable[[], Iterator[Waiting]] = field(default=_nobody, compare=False)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one engine just before an iteration.

    waiting: the gate's queues by type, empty ones left out; released: requests already let through the gate that the
    engine has not taken up yet; running: the requests in service, oldest first; KV in tokens; prompt_backlog_tokens:
    what is left to compute of the prompts of those in service.
    """

    now_s: float
    waiting: Mapping[str, QueueView]
    released: int
    running: Sequence[Resident]
    kv_used_tokens: int
    kv_capacity_tokens: int
    prompt_backlog_tokens: int = 0

    @property
    def idle(self) -> bool:
        """True when the engine has nothing at all to run."""
        return not self.running and not self.released


_NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of each type may enter (from the head of its queue), and who sits this iteration out (request ids).

    token_budget: tokens of this iteration (None: the thresholds' own). refuse: who is refused before anybody enters
    (request ids); refuse_last: how many of the unknown type are refused afterwards, those farthest from their turn;
    drain_s: seconds after which those who wait will have been served, for who is refused.
    """

    admit: Mapping[str, int] = field(default_factory=dict)
    sit_out: Collection[str] = _NOBODY
    token_budget: int | None = None
    refuse: Collection[str] = _NOBODY
    refuse_last: int = 0
    drain_s: float = 0.0


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

    def seats(self, snapshot: Snapshot) -> int:
        """Requests that may still enter under the cap on requests in service."""
        cap = self.thresholds.max_in_service
        taken = len(snapshot.running) + snapshot.released
        waiting = sum(view.length for view in snapshot.waiting.values())
        return waiting if cap is None else max(0, min(waiting, cap - taken))

    def hold_is_over(self, view: QueueView, snapshot: Snapshot) -> bool:
        """True when the oldest request of a queue has been held for as long as any may be."""
        return snapshot.now_s - view.oldest_since_s >= self.thresholds.max_hold_s
