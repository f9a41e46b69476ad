"""The pace: what the `fluid` policy needs to know of the hardware, the targets and the answers' lengths.

Solved by the controller, obeyed by the engine between two iterations; a part of `Thresholds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Strict

from scheduler.law import Seconds, ServiceTimeLaw, Tokens, require_number

Real = Annotated[float, Strict()]
Count = Annotated[int, Strict()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """law: seconds of an iteration. iteration_s: what none may exceed (None: no such target).

    survival: (output tokens x, P(output > x)) by increasing x from 0 on; beyond the last x nobody goes on.
    kv_limit_tokens: memory that admitted requests may grow into, given out in blocks of block_tokens. overflow_z:
    standard deviations of that growth kept free beside its mean. ttft_s: the target for the first token.
    queue_requests: how many waiting requests are of use (None: any number). prompt_flow_tokens: prompt tokens that an
    iteration computes at capacity; capacity_rps: requests per second served then (0: not known). Raises ValueError for
    values out of range.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    law: ServiceTimeLaw
    survival: tuple[tuple[int, Real], ...]
    kv_limit_tokens: int
    block_tokens: int = 16
    overflow_z: Real = 2.33
    iteration_s: Real | None = None
    ttft_s: Real | None = None
    queue_requests: Count | None = None
    prompt_flow_tokens: Real = 0.0
    capacity_rps: Real = 0.0

    def __post_init__(self) -> None:
        lengths, survival = [x for x, _ in self.survival], [p for _, p in self.survival]
        falling = all(a < b for a, b in pairwise(lengths)) and all(a >= b for a, b in pairwise(survival))
        if not (lengths and lengths[0] == 0 and falling and survival[0] <= 1 and survival[-1] >= 0):
            raise ValueError(
                "survival must be pairs (tokens, probability), tokens rising from 0, probabilities falling from 1 to 0"
            )
        if self.kv_limit_tokens < 1 or self.block_tokens < 1:
            raise ValueError(
                f"kv_limit_tokens is {self.kv_limit_tokens} and block_tokens {self.block_tokens}; both must be >= 1"
            )
        for name in ("iteration_s", "ttft_s"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, allow_zero=False)
        require_number("overflow_z", self.overflow_z)
        require_number("prompt_flow_tokens", self.prompt_flow_tokens)
        require_number("capacity_rps", self.capacity_rps)
        if self.queue_requests is not None and self.queue_requests < 1:
            raise ValueError(f"queue_requests is {self.queue_requests}; it must be >= 1, or null for any number")

    @property
    def in_service_at_capacity(self) -> float | None:
        """Requests in service when the replica is full, by Little's law over l' + 1 iterations; None: not known."""
        if self.iteration_s is None or not self.capacity_rps:
            return None
        return self.capacity_rps * self.iteration_s * (self.mean_output_tokens + 1)

    @property
    def mean_output_tokens(self) -> float:
        """Of the answers that the survival foresees: Σ P(l' > x), linear between its points."""
        lengths, survival = zip(*self.survival, strict=True)
        return float(np.trapezoid(survival, lengths) + survival[0] / 2)

    def room_tokens(self, busy_s: float) -> float:
        """Prompt tokens for which an iteration has time beside `busy_s` of other work; infinite without a target."""
        if self.iteration_s is None or self.seconds_of(1.0) == 0:
            return math.inf
        return (self.iteration_s - busy_s) / self.seconds_of(1.0)

    def seconds_of(self, prompt_tokens: float) -> float:
        """What so many prompt tokens add to an iteration."""
        return prompt_tokens * (self.law.d2_s_per_prefill_token + self.law.d1_s_per_kv_token)

    def first_token_s(self, prompt_tokens: Tokens, room_tokens: float) -> Seconds:
        """Seconds until a request that enters now has its first token, with so much room for prompts an iteration.

        The iteration under way has to end, and the one after it is composed already.
        """
        if self.iteration_s is None:
            return 2 * self.law.shortest_iteration_s + self.law.iteration_s(prompt_tokens, 0.0, prompt_tokens)
        iterations = 2 + np.ceil(prompt_tokens / max(room_tokens, self.prompt_flow_tokens, 1.0))
        return self.iteration_s * iterations
