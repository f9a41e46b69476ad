"""Arrival and first-token times and declared lengths of each request, from its arrival until it leaves the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scheduler.engine.client_input import declared_lengths
from scheduler.tuning.slo import Slo

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_LONGEST_WAY_S = 60.0
"""A longer way from the API process means that another machine's clock stamped the request."""


@dataclass(slots=True)
class Life:
    """One request in the engine: clock seconds, declared lengths, prompt tokens found cached.

    expected, most: output tokens (infinite: not declared); first_token_s: NaN before the first token.
    """

    arrived_s: float
    expected: float
    most: float
    first_token_s: float = math.nan
    cached_tokens: int = 0
    shared_tokens: int = 0
    audited: bool = False

    def missed(self, targets: Slo, first_s: float, now_s: float, outputs: int) -> dict[str, bool]:
        """The targets missed by a request that completes at `now_s` with `outputs` tokens, the first at `first_s`."""
        took_s = {
            "ttft": (first_s - self.arrived_s, targets.ttft_s), "latency": (now_s - self.arrived_s, targets.latency_s),
            "tpot": ((now_s - first_s) / max(outputs - 1, 1), targets.tpot_s),
        }
        return {name: target is not None and seconds > target for name, (seconds, target) in took_s.items()}


class Lives(dict[str, Life]):
    """The requests in the engine, by id.

    clock: the engine's seconds; arrival_clock: the clock of `Request.arrival_time`; longest: the context, in tokens.
    """

    def __init__(self, clock: Callable[[], float], arrival_clock: Callable[[], float], longest: int) -> None:
        super().__init__()
        self._clock, self._arrival_clock, self._longest = clock, arrival_clock, longest
        self._awaiting_first_token: dict[str, Request] = {}

    def begin(self, request: Request) -> None:
        """Remember a request that has just arrived."""
        self[request.request_id] = self._new(request)

    def arrived_s(self, request: Request) -> float:
        """When the request reached the API process, on the engine's clock."""
        life = self.get(request.request_id)
        return self._clock() if life is None else life.arrived_s

    def note_first_tokens(self) -> None:
        """Set `first_token_s` of the scheduled requests that have got their first output token."""
        if not self._awaiting_first_token:
            return
        now_s = self._clock()
        for name in [name for name, request in self._awaiting_first_token.items() if request.num_output_tokens]:
            self[name].first_token_s = now_s
            del self._awaiting_first_token[name]

    def scheduled(
        self, output: SchedulerOutput, requests: Mapping[str, Request], shared_now: Callable[[str, int], int],
        totals: Any,
    ) -> None:
        """Note and count what an iteration found cached of the requests that it begins, and what it computes again of
        those that run again after a preemption. shared_now: of a request's first tokens, those that others hold too."""
        cached, resumed = output.scheduled_cached_reqs, []
        if cached.resumed_req_ids:
            computed_of = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            resumed = [one for one in computed_of if one[0] in cached.resumed_req_ids]
        for new in output.scheduled_new_reqs:
            request = requests[new.req_id]
            if request.num_preemptions:  # vLLM's second model runner is sent these as new ones
                resumed.append((new.req_id, new.num_computed_tokens))
                continue
            self._awaiting_first_token[new.req_id] = request
            life, prompt_tokens = self[new.req_id], request.num_prompt_tokens
            life.cached_tokens = min(new.num_computed_tokens, prompt_tokens)
            life.shared_tokens = shared_now(new.req_id, life.cached_tokens)
            totals.prompt_tokens += prompt_tokens
            totals.cached_tokens += life.cached_tokens
        for name, computed in resumed:
            tokens = requests[name].num_tokens
            # Other requests may share its blocks than before its preemption.
            self[name].shared_tokens = min(shared_now(name, tokens), requests[name].num_prompt_tokens)
            totals.recomputed_tokens += max(0, tokens - computed)

    def end(self, request: Request) -> Life:
        """Forget a request that leaves the engine, and return its life."""
        self._awaiting_first_token.pop(request.request_id, None)
        return self.pop(request.request_id, None) or self._new(request)

    def _new(self, request: Request) -> Life:
        expected, most = declared_lengths(request, self._longest)
        return Life(
            self._clock() - self._age_s(request), math.inf if expected is None else expected,
            math.inf if most is None else most,
        )

    def _age_s(self, request: Request) -> float:
        """Seconds since the request reached the API process: tokenizing, the way here, the iteration under way.

        0 where the clocks of the two processes disagree.
        """
        age_s = self._arrival_clock() - request.arrival_time
        return age_s if 0 <= age_s <= _LONGEST_WAY_S else 0.0
