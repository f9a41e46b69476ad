"""How output tokens and iterations go together: several tokens a step with speculative decoding.

A step is an iteration that advances a decoding request. It computes the request's latest token and its draft tokens, of
which the model accepts a prefix, and gains one token more than it accepts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Steps:
    """How output tokens and iterations go together, as measured.

    tokens: output tokens that a request gains in an iteration that advances it, tokens_std their standard deviation;
    computed: tokens computed for it then; depth: iterations from one of its steps to the next (pipeline stages).
    """

    tokens: float = 1.0
    computed: float = 1.0
    depth: int = 1
    tokens_std: float = 0.0

    @classmethod
    def of_acceptance(cls, rate: float, draft_tokens: int) -> Steps:
        """Of a drafter that always drafts so many tokens, each accepted with this probability unless one before it was
        not. Source: Leviathan, Kalman and Matias (2023)."""
        gains = [rate**accepted for accepted in range(draft_tokens + 1)]  # P(more than so many tokens)
        mean, square = sum(gains), sum((2 * place + 1) * gain for place, gain in enumerate(gains))
        return cls(mean, 1.0 + draft_tokens, tokens_std=math.sqrt(max(square - mean**2, 0.0)))

    @property
    def computed_per_token(self) -> float:
        """Tokens computed for each output token."""
        return self.computed / self.tokens

    def life(self, output_tokens: float) -> float:
        """Steps of a request with so many output tokens: one for its prompt, and those that gain the tokens."""
        return output_tokens / self.tokens + 1


ONE_TOKEN_A_STEP = Steps()
