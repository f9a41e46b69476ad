"""The parameters of policy `fluid`: hardware, latency targets and output lengths. A part of `Thresholds`.

The controller solves for them; the engine applies new ones between two iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, overload

from pydantic import ConfigDict, Strict

from scheduler.model.iteration_time import IterationTimeModel, Seconds, Tokens, require_number
from scheduler.model.littles_law import requests_running
from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.survival import Survival

Real = Annotated[float, Strict()]
Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
ITERATIONS_UNDER_WAY = 2
"""Iterations ahead of a new prompt's first one: the one that runs and the one already composed."""
LEAST_PROMPT_SHARE = 0.05
"""Share of an iteration's time that prompts have at least, however many requests decode."""
_FULL_DECODES = 100.0
"""Decoding requests of a full iteration; used to compare iteration times, which hardly depend on it."""


class Batch(NamedTuple):
    """The tokens of an iteration, as `IterationTimeModel.iteration_s` takes them."""

    prefill_tokens: float
    decode_tokens: float
    kv_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FluidParams:
    """One engine's parameters.

    time_model: its iteration-time model. survival: of the output lengths of new requests, in tokens.
    iteration_s: longest iteration (None: no limit). tpot_s: the target per output token. latency_s: the target end to
        end. ttft_s: the target for the first token. first_token_within_s: ttft_s, or less where the latency target
        leaves less. delivery_s: from a token in the engine until its client has it; first_token_within_s is shorter by
        it, the targets are not.
    kv_limit_tokens: memory that admitted requests may grow into. block_tokens: size of a block of it.
    miss_probability: accepted share of requests that miss a target. overflow_z: standard deviations of that
        growth kept free beside its mean, in memory and in time, so that overflow has a probability of about
        miss_probability.
    queue_limit: most waiting requests (None: unlimited).
    prompt_flow_tokens: prefill tokens per iteration at capacity. capacity_rps: requests per second at capacity (0: not
        known). steady_s: expected iteration time at the present load (0: not known).
    variability: variance over mean of the requests served in a time window.
    tokens_per_step, computed_per_step: output tokens gained and tokens computed when an iteration advances a request
        (above 1 with speculative decoding). pipeline_depth: iterations from one step of a request to the next.
    cold: lengths are a prior and the model is the profile's, so no queue limit applies.
    Raises ValueError for values out of range.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    time_model: IterationTimeModel
    survival: Survival
    kv_limit_tokens: int
    block_tokens: int = 16
    overflow_z: Real = 2.33
    iteration_s: Real | None = None
    tpot_s: Real | None = None
    ttft_s: Real | None = None
    latency_s: Real | None = None
    first_token_within_s: Real | None = None
    delivery_s: Real = 0.0
    miss_probability: Real = ACCEPTED_MISSES
    queue_limit: Count | None = None
    prompt_flow_tokens: Real = 0.0
    capacity_rps: Real = 0.0
    steady_s: Real = 0.0
    variability: Real = 1.0
    tokens_per_step: Real = 1.0
    computed_per_step: Real = 1.0
    pipeline_depth: Count = 1
    cold: Flag = False

    def __post_init__(self) -> None:
        if self.kv_limit_tokens < 1 or self.block_tokens < 1:
            raise ValueError(
                f"kv_limit_tokens is {self.kv_limit_tokens} and block_tokens {self.block_tokens}; both must be >= 1"
            )
        for name in ("iteration_s", "tpot_s", "ttft_s", "latency_s", "first_token_within_s"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, allow_zero=False)
        for name in (
            "overflow_z", "prompt_flow_tokens", "capacity_rps", "steady_s", "variability", "miss_probability",
            "delivery_s",
        ):
            require_number(name, getattr(self, name))
        for name in ("tokens_per_step", "computed_per_step", "pipeline_depth"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number >= 1")
        if self.iteration_s is not None and self.decode_iteration_s(1.0, 1.0) > self.iteration_s:
            alone_s = self.decode_iteration_s(1.0, 1.0)
            raise ValueError(f"iteration_s is {self.iteration_s}; a single request alone takes {alone_s:.4g} s")
        if self.queue_limit is not None and self.queue_limit < 1:
            raise ValueError(f"queue_limit is {self.queue_limit}; it must be >= 1, or null for unlimited")

    @property
    def first_token_limit_s(self) -> float | None:
        """Seconds within which a first token must come; None: no limit."""
        return self.ttft_s if self.first_token_within_s is None else self.first_token_within_s

    @property
    def token_s(self) -> float | None:
        """Seconds per output token of a request when every iteration takes `iteration_s`."""
        return None if self.iteration_s is None else self.iteration_s * self.pipeline_depth / self.tokens_per_step

    @property
    def steady_token_s(self) -> float:
        """Seconds per output token at the present load (0: not known)."""
        return self.steady_s * self.pipeline_depth / self.tokens_per_step

    @property
    def running_at_capacity(self) -> float | None:
        """Running requests at capacity, with a stage per output token and for the prompt; None: not known."""
        if self.token_s is None or not self.capacity_rps:
            return None
        return requests_running(self.capacity_rps, self.survival.mean + 1, self.token_s)

    @property
    def full_batch(self) -> Batch:
        """A full iteration: the prompts of capacity, and decodes that read all KV tokens."""
        return Batch(self.prompt_flow_tokens, _FULL_DECODES, float(self.kv_limit_tokens))

    @overload
    def decode_iteration_s(self, requests: float, kv_tokens: float) -> float: ...

    @overload
    def decode_iteration_s(self, requests: Tokens, kv_tokens: Tokens) -> Seconds: ...

    def decode_iteration_s(self, requests: Tokens, kv_tokens: Tokens) -> Seconds:
        """Seconds of a decode-only iteration with these requests and KV tokens, spread over a pipeline."""
        computed = requests * (self.computed_per_step / self.pipeline_depth)
        return self.time_model.iteration_s(0.0 * computed, computed, kv_tokens * (1 / self.pipeline_depth))

    def prompt_tokens_within(self, seconds: float, requests: float, kv_tokens: float) -> float:
        """Prompt tokens that fit into an iteration of `seconds` beside this batch of decodes; may be negative."""
        return self.time_model.prompt_tokens_within(seconds, requests * self.computed_per_step, kv_tokens)
