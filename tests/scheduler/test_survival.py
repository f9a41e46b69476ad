"""The product-limit estimate against known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.mix import Lengths
from scheduler.survival import product_limit


def test_without_running_requests_it_is_the_finished_ones() -> None:
    pairs = [(10, 5), (20, 5), (30, 9)]
    estimate, counted = product_limit(pairs, [], 4096), Lengths.from_pairs(pairs)
    assert estimate.weights == pytest.approx(counted.weights)
    assert estimate.prompt_tokens.tolist() == counted.prompt_tokens.tolist()


def test_a_textbook_case() -> None:
    """Ended at 2, 4, 4; running at 3, 5: S = 4/5 after 2, then two of three at risk end at 4."""
    lengths = product_limit([(1, 2), (1, 4), (1, 4)], [(1, 3), (1, 5)], 4096)
    assert lengths.survival(2) == pytest.approx(0.8)
    assert lengths.survival(4) == pytest.approx(0.8 / 3)
    assert lengths.survival(9) == pytest.approx(0.8 / 3)
    assert lengths.survival(10) == 0.0  # the one that outlives all is taken to end at twice its age


@pytest.mark.parametrize("seed", range(3))
def test_censored_answers_are_not_forgotten(seed: int) -> None:
    """Geometric lengths, all begun within one mean life: the finished alone look far too short."""
    generator = np.random.default_rng(seed)
    outputs = generator.geometric(1 / 200, 8000)
    ages = generator.integers(1, 300, 8000)
    finished = [(50, int(o)) for o, age in zip(outputs, ages, strict=True) if o <= age]
    running = [(50, int(age)) for o, age in zip(outputs, ages, strict=True) if o > age]
    estimate = product_limit(finished, running, 4096)
    for x in (50, 100, 200, 280):
        assert estimate.survival(x) == pytest.approx((1 - 1 / 200) ** x, abs=0.03)
    naive = Lengths.from_pairs(finished)
    assert naive.survival(100) < 0.75 * estimate.survival(100)


def test_nobody_is_taken_beyond_the_longest() -> None:
    assert product_limit([(1, 10)], [(1, 3000)], 4096).output_quantile(1) == 4096


def test_prompts_stay_with_their_outputs() -> None:
    lengths = product_limit([(100, 5), (900, 50)], [(900, 40)] * 3, 4096)
    assert lengths.mean_prompt_tokens_beyond(20) == pytest.approx(900)


def test_nothing_finished_is_an_error() -> None:
    with pytest.raises(ValueError, match="finished is empty"):
        product_limit([], [(1, 2)], 4096)
