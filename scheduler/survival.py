"""How long answers will be, from those that have ended and those that go on.

Ended answers alone are too short a sample: while load or lengths change, the long ones are still running. Those count
as right-censored observations. Source: the product-limit estimator of Kaplan and Meier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scheduler.mix import Lengths

_GUESSES = 64
Pairs = Sequence[tuple[int, int]]


def cold_lengths(longest: int) -> Lengths:
    """A guess for a replica that has seen nothing: answers of a sixteenth of the longest on average, exponential."""
    mean = longest / 16
    quantiles = (np.arange(_GUESSES) + 0.5) / _GUESSES
    outputs = np.clip(np.round(-mean * np.log1p(-quantiles)), 1, longest).astype(np.int64)
    return Lengths(np.full(_GUESSES, max(1, int(mean))), outputs, np.ones(_GUESSES))


def product_limit(finished: Pairs, running: Pairs, longest: int) -> Lengths:
    """The joint lengths (prompt, output) of requests, of which `running` ones have their output so far.

    The outputs follow the product-limit estimate: at each length x that an answer ended with, the share 1 − ended/at
    risk goes on, those at risk being all whose output reached x. Whoever outlives all that ended is spread over the
    running ones, at twice their output so far but at most `longest`: the median of what is left when nothing more is
    known than the age. Prompts stay those of the requests themselves. Raises ValueError without any finished request.
    """
    if not finished:
        raise ValueError("finished is empty; at least one finished request is needed")
    ended = np.array(finished, dtype=np.int64)
    censored = np.array([(p, o) for p, o in running if o > 0], dtype=np.int64).reshape(-1, 2)
    lengths, events = np.unique(ended[:, 1], return_counts=True)
    # Someone still running with x tokens is at risk of ending with x: its next token is not out.
    at_risk = sum(len(some) - np.searchsorted(np.sort(some[:, 1]), lengths) for some in (ended, censored))
    surviving = np.concatenate([[1.0], np.cumprod(1.0 - events / at_risk)])
    mass = -np.diff(surviving)
    # Every ended request carries an equal part of the mass at its length.
    share = mass[np.searchsorted(lengths, ended[:, 1])] / events[np.searchsorted(lengths, ended[:, 1])]
    prompts, outputs, weights = ended[:, 0], ended[:, 1], share
    beyond = censored[censored[:, 1] >= lengths[-1]]
    if surviving[-1] > 0 and len(beyond):
        prompts = np.concatenate([prompts, beyond[:, 0]])
        outputs = np.concatenate([outputs, np.minimum(2 * beyond[:, 1], longest)])
        weights = np.concatenate([weights, np.full(len(beyond), surviving[-1] / len(beyond))])
    return Lengths(prompts, outputs, weights)
