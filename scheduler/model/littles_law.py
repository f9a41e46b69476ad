"""Little's law, N = λ·W: the number of running requests."""

from __future__ import annotations


def requests_running(rate_rps: float, stages: float, stage_s: float) -> float:
    """Mean running requests when `rate_rps` enter and each stays for `stages` stages of `stage_s` seconds.

    A stage is an iteration or an output token, and stage_s the seconds from one to the next. A request has one stage
    for its prompt and one for each token (or for each step, where a step gains several tokens).
    """
    return rate_rps * stage_s * stages
