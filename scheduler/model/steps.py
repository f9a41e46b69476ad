"""Output tokens per step: more than one with speculative decoding.

A step is an iteration that advances a decoding request. It computes the request's latest token and its draft tokens,
accepts a prefix of the drafts, and gains one token more than it accepts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a request.

    tokens, tokens_std: mean and standard deviation of the output tokens gained per step; computed: mean tokens computed
    per step; depth: iterations from one step of a request to the next (pipeline stages).
    """

    tokens: float = 1.0
    computed: float = 1.0
    depth: int = 1
    tokens_std: float = 0.0

    @classmethod
    def of_acceptance(cls, rate: float, draft_tokens: int) -> Steps:
        """The steps with `draft_tokens` drafts each, a draft being accepted with probability `rate` after its
        predecessor. Source: Leviathan, Kalman and Matias (2023)."""
        gains = [rate**accepted for accepted in range(draft_tokens + 1)]  # P(more than so many tokens)
        mean, square = sum(gains), sum((2 * place + 1) * gain for place, gain in enumerate(gains))
        return cls(mean, 1.0 + draft_tokens, tokens_std=math.sqrt(max(square - mean**2, 0.0)))

    @property
    def computed_per_token(self) -> float:
        """Tokens computed for each output token."""
        return self.computed / self.tokens

    def life(self, output_tokens: float) -> float:
        """Steps of a request with `output_tokens`: one for its prompt, and the steps that gain the tokens."""
        return output_tokens / self.tokens + 1


ONE_TOKEN_A_STEP = Steps()
