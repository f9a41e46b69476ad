"""How a segment's total of requests is spread over its stages when it is no multiple of them.

Source: the experiments of arXiv 2504.11320, which keep B_k requests in the δ_k stages of segment k: ⌊B_k/δ_k⌋ in each,
and one more in B_k mod δ_k of every δ_k iterations.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Whole = TypeVar("Whole", int, NDArray[np.int64])


def stage_limit(total: Whole, stages: Whole, step: Whole) -> Whole:
    """Most requests that may leave the first of `stages` stages in iteration `step` of a segment (from 0, any integer).

    Over any `stages` iterations in a row these are `total`, spread as evenly as whole numbers can be: over m of them at
    most m·total/stages + 1 and at least m·total/stages − 1. Iteration `step` − i is the limit of stage i, so that the
    requests that enter together find room together in every later stage.
    """
    return -(-(step + 1) * total // stages) + (-step * total // stages)


def stage_lengths(ends: tuple[int, ...]) -> tuple[int, ...]:
    """Stages of each segment on an engine, whose prefill yields the first token: δ_1 = l'_1 without a stage for it."""
    return tuple(end - start for start, end in pairwise((0, *ends)))
