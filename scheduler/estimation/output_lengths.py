"""Output lengths, estimated from finished and running requests.

Finished outputs alone are biased to short ones: while load or lengths change, long outputs are still running. Running
requests count as right-censored observations, and requests that ran before observation began as left-truncated ones.
Sources: the product-limit estimator of Kaplan and Meier (1958) with delayed entry (Tsai, Jewell and Wang 1987), and the
one-sample log-rank test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from scheduler.estimation.intervals import FALSE_ALARM, Estimate, mean_estimate
from scheduler.model.workload import Lengths

_GUESSES = 20
_LEAST_AT_RISK = 20
Pairs = Sequence[tuple[int, int]]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def cold_lengths(longest: int) -> Lengths:
    """Prior lengths before any observation: P(output >= x) = 1/x, prompts log-uniform from 1 to `longest`.

    With this prior an output of x tokens is as likely to double as not, and a new request counts for little: the prior
    rejects no request, tokens already produced limit admission. Prompts and outputs are independent.
    """
    shares = (np.arange(_GUESSES) + 0.5) / _GUESSES
    prompt_tokens, output_tokens = (
        np.clip(np.round(marks), 1, longest).astype(np.int64)
        for marks in (np.exp(shares * math.log(longest)), 1 / (1 - shares))
    )
    prompts, outputs = np.meshgrid(prompt_tokens, output_tokens, indexing="ij")
    return Lengths(prompts.ravel(), outputs.ravel(), np.ones(prompts.size)).within(longest)


@dataclass(frozen=True, slots=True)
class Answers:
    """Observed outputs, one element each: prompt tokens, output tokens when last observed, whether the output has
    `ended`, and its output tokens when observation began (`entry`, 0 for later arrivals)."""

    prompt_tokens: Ints
    output_tokens: Ints
    ended: NDArray[np.bool_]
    entry: Floats

    @classmethod
    def of(cls, finished: Pairs, running: Pairs, entry: Floats | None = None) -> Answers:
        """From (prompt, output) pairs; `entry` has the finished ones first. Requests without output are left out."""
        pairs = np.array([*finished, *running], dtype=np.int64).reshape(-1, 2)
        ended = np.arange(len(pairs)) < len(finished)
        begun = np.zeros(len(pairs)) if entry is None else entry
        seen = pairs[:, 1] > begun
        return cls(pairs[seen, 0], pairs[seen, 1], ended[seen], begun[seen])

    def with_ended(self, pairs: Pairs) -> Answers:
        """These outputs and `pairs` as ended ones."""
        more = Answers.of(pairs, [])
        return Answers(*(
            np.concatenate([getattr(self, name), getattr(more, name)])
            for name in ("prompt_tokens", "output_tokens", "ended", "entry")
        ))

    def only(self, mask: NDArray[np.bool_]) -> Answers:
        """The outputs that `mask` selects."""
        return Answers(self.prompt_tokens[mask], self.output_tokens[mask], self.ended[mask], self.entry[mask])

    def hazards(self) -> tuple[Ints, Floats, Floats]:
        """Lengths at which outputs ended, the number that ended there, and the number at risk.

        A running request with x tokens may still end at length x. Left truncation can leave very small risk sets at
        short lengths; they are enlarged so that one event cannot dominate the estimate.
        """
        lengths, events = np.unique(self.output_tokens[self.ended], return_counts=True)
        reached = len(self.output_tokens) - np.searchsorted(np.sort(self.output_tokens), lengths)
        # At risk from the first length beyond the entry on.
        late = len(self.entry) - np.searchsorted(np.sort(self.entry), lengths)
        later_ends = np.cumsum(events[::-1])[::-1]
        at_risk = np.maximum(reached - late, np.minimum(later_ends, _LEAST_AT_RISK))
        return lengths, events.astype(np.float64), np.maximum(at_risk, events).astype(np.float64)


def product_limit(answers: Answers, longest: int) -> Lengths:
    """The joint lengths (prompt, output) of the requests behind `answers`.

    At each length x at which an output ended, the share 1 − ended/at risk continues. The mass beyond all ended outputs
    is spread over the running ones, at twice their output so far but at most `longest`: the median given only the age.
    Prompts stay with their requests. Raises ValueError when none has ended.
    """
    if not answers.ended.any():
        raise ValueError("finished is empty; at least one finished request is needed")
    lengths, events, at_risk = answers.hazards()
    surviving = np.concatenate([[1.0], np.cumprod(1.0 - events / at_risk)])
    ended, running = answers.only(answers.ended), answers.only(~answers.ended)
    # Every ended request carries an equal part of the mass at its length.
    place = np.searchsorted(lengths, ended.output_tokens)
    prompts, outputs = ended.prompt_tokens, ended.output_tokens
    weights = (-np.diff(surviving) / events)[place]
    beyond = running.only(running.output_tokens >= lengths[-1])
    if surviving[-1] > 0 and beyond.ended.size:
        prompts = np.concatenate([prompts, beyond.prompt_tokens])
        outputs = np.concatenate([outputs, np.minimum(2 * beyond.output_tokens, longest)])
        weights = np.concatenate([weights, np.full(beyond.ended.size, surviving[-1] / beyond.ended.size)])
    return Lengths(prompts, outputs, weights)


def have_changed(earlier: Answers, later: Answers, *, tests: int = 1) -> bool:
    """Whether later outputs end at other rates than earlier ones: the log-rank test at `FALSE_ALARM` over `tests`.

    Compares the number of later outputs that ended with the number expected from the earlier ones' hazards, including
    the uncertainty of these.
    """
    if min(int(earlier.ended.sum()), int(later.ended.size)) < _LEAST_AT_RISK:
        return False
    lengths, events, at_risk = earlier.hazards()
    cumulated = np.concatenate([[0.0], np.cumsum(events / at_risk)])

    def hazard_until(tokens: Floats | Ints) -> Floats:
        return np.asarray(cumulated[np.searchsorted(lengths, tokens, side="right")], dtype=np.float64)

    # A running output of x tokens has not passed the hazard at x yet.
    until = np.where(later.ended, later.output_tokens, later.output_tokens - 1)
    expected = float(np.sum(hazard_until(until) - hazard_until(np.minimum(later.entry, until))))
    # Beyond the longest earlier output there is no hazard to compare with.
    ended = int(np.sum(later.ended & (later.output_tokens <= lengths[-1])))
    if expected <= 0:
        return False
    variance = expected + expected**2 / float(events.sum())
    return (ended - expected) ** 2 / variance > float(chdtri(1, FALSE_ALARM / tests))


def mean_of(tokens: Ints, weights: Floats, samples: float) -> Estimate:
    """A weighted mean with its interval, from `samples` observations."""
    mean = float(weights @ tokens)
    return mean_estimate(mean, math.sqrt(max(float(weights @ tokens**2) - mean**2, 0.0)), samples)
