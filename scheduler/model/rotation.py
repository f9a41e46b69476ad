"""Spreads a segment's total of requests over its stages when it is no multiple of their number.

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

    They sum to `total` over any `stages` consecutive iterations, spread as evenly as whole numbers allow: over m
    iterations at most m·total/stages + 1 and at least m·total/stages − 1. The limit of stage i is that of iteration
    `step` − i, so that requests that enter together have room together in every later stage.
    """
    return -(-(step + 1) * total // stages) + (-step * total // stages)


def stage_lengths(ends: tuple[int, ...]) -> tuple[int, ...]:
    """Stages of each segment on an engine. Prefill yields the first token, so δ_1 = l'_1 has no prompt stage."""
    return tuple(end - start for start, end in pairwise((0, *ends)))
