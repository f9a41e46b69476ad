"""The product-limit estimate against known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.estimation.output_lengths import Answers, cold_lengths, have_changed
from scheduler.estimation.output_lengths import product_limit as limit
from scheduler.model.workload import Lengths


def product_limit(finished, running, longest):
    return limit(Answers.of(finished, running), longest)


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


def test_no_output_is_extrapolated_beyond_the_longest() -> None:
    assert product_limit([(1, 10)], [(1, 3000)], 4096).output_quantile(1) == 4096


def test_prompts_stay_with_their_outputs() -> None:
    lengths = product_limit([(100, 5), (900, 50)], [(900, 40)] * 3, 4096)
    assert lengths.mean_prompt_tokens_beyond(20) == pytest.approx(900)


def test_nothing_finished_is_an_error() -> None:
    with pytest.raises(ValueError, match="finished is empty"):
        product_limit([], [(1, 2)], 4096)


def observe_outputs(generator, mean, *, from_s, until_s, changes_at_s=None, later_mean=None):
    """Geometric answers, begun at a steady rate long before, observed from `from_s` until `until_s`."""
    begun = np.sort(generator.uniform(0, until_s, round(0.4 * until_s)))
    outputs = generator.geometric(1 / mean, begun.size)
    if changes_at_s is not None:
        outputs = np.where(begun > changes_at_s, generator.geometric(1 / later_mean, begun.size), outputs)
    seen = begun + outputs > from_s
    begun, outputs = begun[seen], outputs[seen]
    ended = begun + outputs <= until_s
    now = np.where(ended, outputs, np.floor(until_s - begun)).astype(np.int64)
    entry = np.floor(np.maximum(0.0, from_s - begun))
    inside = now > entry
    return Answers(np.full(inside.sum(), 50), now[inside], ended[inside], entry[inside])


def test_requests_under_way_when_observation_began_count_only_from_then_on() -> None:
    """A short window sees mostly long answers; without late entry they would all count."""
    generator = np.random.default_rng(1)
    seen = [observe_outputs(generator, 300, from_s=3000, until_s=3300) for _ in range(30)]
    naive = [Answers(a.prompt_tokens, a.output_tokens, a.ended, np.zeros(a.entry.size)) for a in seen]
    for x in (100, 300, 600):
        truth = (1 - 1 / 300) ** x
        assert np.mean([limit(a, 8192).survival(x) for a in seen]) == pytest.approx(truth, abs=0.03)
    assert np.mean([limit(a, 8192).survival(300) for a in naive]) > 0.5 > 0.37


def test_outputs_of_one_distribution_are_not_taken_for_a_change() -> None:
    generator, alarms = np.random.default_rng(2), 0
    for _ in range(200):
        earlier = observe_outputs(generator, 300, from_s=1500, until_s=2400)
        later = observe_outputs(generator, 300, from_s=2400, until_s=2800)
        alarms += have_changed(earlier, later)
    assert alarms <= 3


@pytest.mark.parametrize("later_mean", [100, 900])
def test_other_answers_are_a_change(later_mean: int) -> None:
    generator, found = np.random.default_rng(3), 0
    for _ in range(20):
        earlier = observe_outputs(generator, 300, from_s=1500, until_s=2400)
        later = observe_outputs(generator, 300, from_s=2400, until_s=2900, changes_at_s=2400, later_mean=later_mean)
        found += have_changed(earlier, later)
    assert found >= 18


def test_too_few_answers_are_no_change() -> None:
    few = Answers.of([(10, 5)] * 19, [])
    many = Answers.of([(10, 500)] * 200, [])
    assert not have_changed(few, many)
    assert not have_changed(many, few)


def test_a_guess_of_lengths_rejects_no_request() -> None:
    """Of what nothing is known: as likely to double as not, so that a new request counts for a few tokens only."""
    lengths = cold_lengths(131_072)
    assert [lengths.survival(x) for x in (2, 5, 10)] == pytest.approx([0.45, 0.2, 0.1], abs=0.051)
    assert lengths.mean_output_tokens < 20
    assert lengths.max_total_tokens <= 131_072
    assert cold_lengths(8).max_total_tokens == 8
    assert cold_lengths(1) == Lengths.point(1, 1)
