"""Speculative decoding with a stated acceptance: how many of a request's draft tokens the model takes.

Each draft token is accepted with the same probability, and the first rejected one ends the step (a geometric prefix, as
Leviathan, Kalman and Matias (2023) have it). Draws belong to a request and not to a batch, so that the same request
accepts the same drafts under any scheduler that gives it as many.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.steps import Steps


@dataclass(slots=True)
class Speculation:
    """draft_tokens: drafts that a decoding request has in every iteration; acceptance_rate: of each, from 0 to 1."""

    draft_tokens: int
    acceptance_rate: float
    seed: int = 0
    _draws: dict[str, random.Random] = field(default_factory=dict)

    @property
    def steps(self) -> Steps:
        """What a step gains and costs by expectation."""
        return Steps.of_acceptance(self.acceptance_rate, self.draft_tokens)

    def gained_tokens(self, request_id: str, drafts: int) -> int:
        """Output tokens of a step with so many drafts: those accepted, and one more."""
        draws = self._draws.setdefault(request_id, random.Random(f"{self.seed}:{request_id}"))
        for accepted in range(drafts):
            if draws.random() >= self.acceptance_rate:
                return 1 + accepted
        return 1 + drafts

    def forget(self, request_id: str) -> None:
        """A request has left."""
        self._draws.pop(request_id, None)


def speculative_args(draft_tokens: int, *, async_scheduling: bool) -> dict[str, Any]:
    """vLLM's engine arguments for so many drafts: scheduled ahead, they come from the device, else from the host."""
    method = "ngram_gpu" if async_scheduling else "ngram"
    return {"speculative_config": {"method": method, "num_speculative_tokens": draft_tokens}}
