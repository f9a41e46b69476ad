"""Little's law, N = λ·W: how many requests run at once."""

from __future__ import annotations


def requests_running(rate_rps: float, stages: float, stage_s: float) -> float:
    """Requests that run at once when so many a second enter and each stays for so many stages of so many seconds.

    A stage is an iteration or an output token, with the seconds from one of a request's to its next; a request has one
    for its prompt and one for each of its tokens (or of its steps, where one gains several tokens).
    """
    return rate_rps * stage_s * stages
