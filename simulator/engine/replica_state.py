"""The state of a virtual replica: its requests, its iterations under way, and totals of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from scheduler.tuning.slo import Slo
from simulator.output.metrics import delays_of, meets
from simulator.output.rows import IterationRow, RequestRow
from simulator.workload.clients import Attempt
from simulator.workload.requests import SimRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class Sink(Protocol):
    """Receives finished requests and iterations; `RunWriter` is one."""

    wants_iterations: bool

    def request(self, row: RequestRow) -> None: ...

    def iteration(self, row: IterationRow) -> None: ...


@dataclass(slots=True)
class Totals:
    """Totals of one replica over the whole run; KV as a share of capacity.

    decode_steps: with speculation, steps of decoding requests that gained tokens; gained_tokens: their tokens.
    """

    iterations: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    kv_peak_fraction: float = 0.0
    rejected: int = 0
    decode_steps: int = 0
    gained_tokens: int = 0


@dataclass(slots=True)
class LiveRequest:
    """A request under way; `since_s` is when its latest attempt was sent, in virtual seconds."""

    number: int
    request: Request
    sent: SimRequest
    since_s: float
    attempt: Attempt | None = None
    first_token_s: float | None = None
    cached_tokens: int | None = None

    def can_meet(self, now_s: float, targets: Slo) -> bool:
        """Whether this request, not over yet, may still end within the targets."""
        first_s = now_s if self.first_token_s is None else self.first_token_s
        return bool(meets(delays_of(self.since_s, first_s, now_s, self.request.max_tokens), targets))


@dataclass(slots=True)
class ExecutingIteration:
    """An iteration under way: `silent` requests get no token from it, `first_tokens` get their first."""

    output: SchedulerOutput
    silent: list[str]
    first_tokens: list[LiveRequest]
    ends_s: float
