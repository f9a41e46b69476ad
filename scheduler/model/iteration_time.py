"""The iteration-time model: seconds of one engine iteration as a function of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Tokens = float | NDArray[Any]
Seconds = float | NDArray[np.float64]


def require_number(name: str, value: float, *, allow_zero: bool = True) -> None:
    """Raise ValueError, naming the field, unless `value` is finite and >= 0 (> 0 without `allow_zero`)."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        raise ValueError(f"{name} is {value!r}; it must be a finite number {'>= 0' if allow_zero else '> 0'}")


@dataclass(frozen=True, slots=True)
class IterationTimeModel:
    """Seconds per iteration as a function of the tokens in its batch.

        τ = max(floor, d0 + d2·prefill_tokens + d3·decode_tokens) + d1·kv_tokens

    `prefill_tokens` and `decode_tokens` are the tokens computed this iteration (one per decoding request),
    `kv_tokens` the KV-cache tokens that the batch's attention reads, Σ (l + s) over its requests.

    With d2 = d3 = floor = 0 this is the model of arXiv 2504.11320, τ = d0 + d1·Σ(l + s). d2 prices prefill compute.
    d3 exists because decode tokens pass through the same linear layers, so d3 = d2 on a GPU; d3 = 0 gives the paper's
    model with its prefill extension. The floor is the time to stream the weights, whatever the batch size.

    Fields are seconds, or seconds per token. Raises ValueError for a negative or non-finite field, and when d0 and
    floor are both zero (an iteration would then take no time).
    """

    d0_s: float
    d1_s_per_kv_token: float
    d2_s_per_prefill_token: float = 0.0
    d3_s_per_decode_token: float = 0.0
    floor_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            require_number(field.name, getattr(self, field.name))
        if self.shortest_iteration_s <= 0:
            raise ValueError("d0_s and floor_s are both 0; at least one must be > 0")

    def of_stage(self, stages: int) -> IterationTimeModel:
        """The model of one pipeline stage out of `stages`, each with an equal share of the layers."""
        return self.faster(stages)

    def faster(self, times: float) -> IterationTimeModel:
        """The model of an engine that is `times` as fast."""
        return IterationTimeModel(**{field.name: getattr(self, field.name) / times for field in fields(self)})

    @property
    def is_the_papers(self) -> bool:
        """Whether an iteration takes just d0 + d1·kv_tokens, as in arXiv 2504.11320."""
        return not (self.d2_s_per_prefill_token or self.d3_s_per_decode_token or self.floor_s)

    @property
    def shortest_iteration_s(self) -> float:
        """Seconds of an empty batch, the lower bound of every iteration."""
        return max(self.d0_s, self.floor_s)

    @overload
    def iteration_s(self, prefill_tokens: float, decode_tokens: float, kv_tokens: float) -> float: ...

    @overload
    def iteration_s(self, prefill_tokens: Tokens, decode_tokens: Tokens, kv_tokens: Tokens) -> Seconds: ...

    def iteration_s(self, prefill_tokens: Tokens, decode_tokens: Tokens, kv_tokens: Tokens) -> Seconds:
        """Seconds of an iteration; numbers give a float, numpy arrays broadcast. Token counts are not validated."""
        linear_s = self.d0_s + self.d2_s_per_prefill_token * prefill_tokens + self.d3_s_per_decode_token * decode_tokens
        # Simulators call this a million times, so plain numbers must not pass through numpy.
        if isinstance(linear_s, float):
            return max(linear_s, self.floor_s) + self.d1_s_per_kv_token * kv_tokens
        return np.maximum(linear_s, self.floor_s) + self.d1_s_per_kv_token * kv_tokens

    @overload
    def added_s(
        self, *, prefill_tokens: float = 0.0, decode_tokens: float = 0.0, kv_tokens: float = 0.0
    ) -> float: ...

    @overload
    def added_s(
        self, *, prefill_tokens: Tokens = 0.0, decode_tokens: Tokens = 0.0, kv_tokens: Tokens = 0.0
    ) -> Seconds: ...

    def added_s(
        self, *, prefill_tokens: Tokens = 0.0, decode_tokens: Tokens = 0.0, kv_tokens: Tokens = 0.0
    ) -> Seconds:
        """Seconds that these tokens add to an iteration above its floor."""
        return (
            self.d2_s_per_prefill_token * prefill_tokens + self.d3_s_per_decode_token * decode_tokens
            + self.d1_s_per_kv_token * kv_tokens
        )

    def prompt_tokens_within(
        self, seconds: float, decode_tokens: float, kv_tokens: float, *, other_s: float = 0.0
    ) -> float:
        """Prompt tokens that fit into an iteration of `seconds` beside these tokens and `other_s` seconds of work.

        The inverse of `iteration_s` in its prompt tokens, each of which is also read. Negative if the batch alone takes
        longer (minus infinity if no number of prompt tokens changes that); infinite if prompts take no time.
        """
        per_token_s = self.d2_s_per_prefill_token + self.d1_s_per_kv_token
        read_s = self.d1_s_per_kv_token * kv_tokens
        if read_s + self.floor_s > seconds:
            return -math.inf
        if per_token_s == 0:
            return math.inf
        return (seconds - self.d0_s - other_s - self.d3_s_per_decode_token * decode_tokens - read_s) / per_token_s

    def prefill_s(self, prompt_tokens: float) -> float:
        """Seconds that these prompt tokens, computed and read, add to an iteration above its floor."""
        return prompt_tokens * (self.d2_s_per_prefill_token + self.d1_s_per_kv_token)
