"""How long answers will be, from those that have ended and those that go on.

Ended answers alone are too short a sample: while load or lengths change, the long ones are still running. Those count
as right-censored observations, and those under way when observation began count only from then on. Sources: the
product-limit estimator of Kaplan and Meier (1958) with delayed entry (Tsai, Jewell and Wang 1987), and the one-sample
log-rank test.
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
    """Lengths for a replica that has seen nothing: P(output >= x) = 1/x, prompts log-uniform from 1 to `longest`.

    With this prior an output of x tokens is as likely to double as not, and a new one counts for little: a guess closes
    no gate, what has been produced does. Prompts and outputs are independent.
    """
    shares = (np.arange(_GUESSES) + 0.5) / _GUESSES
    prompt_tokens, output_tokens = (
        np.clip(np.round(marks), 1, longest).astype(np.int64)
        for marks in (np.exp(shares * math.log(longest)), 1 / (1 - shares))
    )
    prompts, outputs = np.meshgrid(prompt_tokens, output_tokens, indexing="ij")
    return Lengths(prompts.ravel(), outputs.ravel(), np.ones(prompts.size))


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers observed for a while, one element each: prompt tokens, output tokens when they were last seen, whether
    they have `ended`, and the output tokens they had when observation began (`entry`, 0 for those that came later)."""

    prompt_tokens: Ints
    output_tokens: Ints
    ended: NDArray[np.bool_]
    entry: Floats

    @classmethod
    def of(cls, finished: Pairs, running: Pairs, entry: Floats | None = None) -> Answers:
        """From (prompt, output) pairs; `entry` has the finished ones first. One without output says nothing."""
        pairs = np.array([*finished, *running], dtype=np.int64).reshape(-1, 2)
        ended = np.arange(len(pairs)) < len(finished)
        begun = np.zeros(len(pairs)) if entry is None else entry
        seen = pairs[:, 1] > begun
        return cls(pairs[seen, 0], pairs[seen, 1], ended[seen], begun[seen])

    def with_ended(self, pairs: Pairs) -> Answers:
        """These, and more that have ended."""
        more = Answers.of(pairs, [])
        return Answers(*(
            np.concatenate([getattr(self, name), getattr(more, name)])
            for name in ("prompt_tokens", "output_tokens", "ended", "entry")
        ))

    def only(self, mask: NDArray[np.bool_]) -> Answers:
        """Those that `mask` marks."""
        return Answers(self.prompt_tokens[mask], self.output_tokens[mask], self.ended[mask], self.entry[mask])

    def hazards(self) -> tuple[Ints, Floats, Floats]:
        """Lengths at which answers ended, how many ended there, and how many were at risk of it.

        An answer that goes on with x tokens is at risk of ending with x: the next token is not out. Few at risk where
        many end later can only come from late entries, and would decide over all of them: such sets count as larger.
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

    At each length x that an answer ended with, the share 1 − ended/at risk goes on. What outlives all that ended is
    spread over those still going on, at twice their output so far but at most `longest`: the median of what is left
    when nothing more is known than the age. Prompts stay those of the requests themselves. Raises ValueError when
    none has ended.
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
    """Whether later answers end at other rates than earlier ones: the log-rank test at `FALSE_ALARM` over `tests`.

    Compares how many of the later ones ended with how many would have by the earlier ones' hazards, whose own
    uncertainty counts too.
    """
    if min(int(earlier.ended.sum()), int(later.ended.size)) < _LEAST_AT_RISK:
        return False
    lengths, events, at_risk = earlier.hazards()
    cumulated = np.concatenate([[0.0], np.cumsum(events / at_risk)])

    def hazard_until(tokens: Floats | Ints) -> Floats:
        return np.asarray(cumulated[np.searchsorted(lengths, tokens, side="right")], dtype=np.float64)

    # An answer that goes on with x tokens has not passed the hazard at x yet.
    until = np.where(later.ended, later.output_tokens, later.output_tokens - 1)
    expected = float(np.sum(hazard_until(until) - hazard_until(np.minimum(later.entry, until))))
    # Beyond all that ended earlier there is nothing to compare with.
    ended = int(np.sum(later.ended & (later.output_tokens <= lengths[-1])))
    if expected <= 0:
        return False
    variance = expected + expected**2 / float(events.sum())
    return (ended - expected) ** 2 / variance > float(chdtri(1, FALSE_ALARM / tests))


def mean_of(tokens: Ints, weights: Floats, samples: float) -> Estimate:
    """A weighted mean with its interval, from so many observations."""
    mean = float(weights @ tokens)
    return mean_estimate(mean, math.sqrt(max(float(weights @ tokens**2) - mean**2, 0.0)), samples)
