"""Request lengths, types and mixes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.model.workload import Lengths, RequestType, WorkloadMix

modest = settings(derandomize=True, deadline=None, max_examples=50)
pairs_strategy = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12)


def observed_kv(pairs):
    """KV tokens of every iteration of every request: as sampled from running requests at random iterations."""
    return np.array([prompt + s for prompt, output in pairs for s in range(output + 1)], dtype=float)


@modest
@given(pairs_strategy)
def test_derived_values_match_the_requests_life_step_by_step(pairs):
    lengths, seen = Lengths.from_pairs(pairs), observed_kv(pairs)
    assert lengths.kv_token_iterations == pytest.approx(seen.sum() / len(pairs))
    assert lengths.mean_running_kv_tokens == pytest.approx(seen.mean())
    assert lengths.running_kv_std == pytest.approx(seen.std(), abs=1e-9)
    assert lengths.mean_prompt_tokens == pytest.approx(np.mean([p for p, _ in pairs]))
    assert lengths.mean_output_tokens == pytest.approx(np.mean([o for _, o in pairs]))
    assert lengths.max_total_tokens == max(p + o for p, o in pairs)


@modest
@given(pairs_strategy, st.integers(0, 41), st.floats(0, 1))
def test_survival_quantile_and_conditional_prompt(pairs, tokens, q):
    lengths, outputs = Lengths.from_pairs(pairs), [o for _, o in pairs]
    assert lengths.survival(tokens) == pytest.approx(np.mean([o > tokens for o in outputs]))
    x = lengths.output_quantile(q)
    assert np.mean([o <= x for o in outputs]) >= q - 1e-9
    assert x == min(outputs) or np.mean([o < x for o in outputs]) < q
    longer = [p for p, o in pairs if o > tokens]
    if longer:
        assert lengths.mean_prompt_tokens_beyond(tokens) == pytest.approx(np.mean(longer))
    else:
        assert lengths.survival(tokens) == 0.0
        with pytest.raises(ValueError, match="output_tokens"):
            lengths.mean_prompt_tokens_beyond(tokens)


def test_point_of_the_worked_example():
    lengths = Lengths.point(1, 1)
    assert lengths.kv_token_iterations == 3
    assert lengths.mean_running_kv_tokens == 1.5
    assert lengths.running_kv_std == 0.5


def test_equal_distributions_are_equal():
    a = Lengths.from_pairs([(3, 4), (1, 2), (3, 4)])
    b = Lengths(np.array([1, 3]), np.array([2, 4]), np.array([10.0, 20.0]))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Lengths.from_pairs([(3, 4), (1, 2)])
    assert a != "lengths"
    assert repr(a).startswith("Lengths(2 pairs, mean_prompt_tokens=2.33333")


@modest
@given(pairs_strategy, st.integers(2, 110))
def test_no_request_within_a_bound_is_longer_and_what_fits_stays(pairs, longest):
    cut = Lengths.from_pairs(pairs).within(longest)
    assert cut.max_total_tokens <= longest
    prompts = [min(p, longest - 1) for p, _ in pairs]
    outputs = [min(o, longest - p) for p, (_, o) in zip(prompts, pairs, strict=True)]
    assert cut.mean_prompt_tokens == pytest.approx(np.mean(prompts))
    assert cut.mean_output_tokens == pytest.approx(np.mean(outputs))
    assert (cut == Lengths.from_pairs(pairs)) is all(p + o <= longest for p, o in pairs)


def test_arrays_are_read_only_and_normalised():
    lengths = Lengths(np.array([5, 1, 9]), np.array([1, 1, 9]), np.array([3.0, 1.0, 0.0]))
    assert lengths.prompt_tokens.tolist() == [1, 5]
    assert lengths.weights.tolist() == [0.25, 0.75]
    for array in (lengths.prompt_tokens, lengths.output_tokens, lengths.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "prompt_tokens .*non-empty"),
        ([(0, 5)], "prompt_tokens holds 0"),
        ([(5, 0)], "output_tokens holds 0"),
        ([(5, 2**31)], "output_tokens holds 2147483648"),
        ([(1.5, 2)], "prompt_tokens holds float64 values such as .*1.5"),
    ],
)
def test_bad_lengths_are_named(pairs, words):
    with pytest.raises(ValueError, match=words):
        Lengths.from_pairs(pairs)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
def test_bad_weights_raise(weights):
    with pytest.raises(ValueError, match="weights"):
        Lengths(np.array([1, 2]), np.array([1, 2]), np.array(weights))


def test_quantile_outside_zero_to_one_raises():
    with pytest.raises(ValueError, match=r"q is 1\.5"):
        Lengths.point(1, 1).output_quantile(1.5)


def test_mix_rates_scale_and_merge():
    mix = WorkloadMix((RequestType("a", 3.0, Lengths.point(10, 2)), RequestType("b", 1.0, Lengths.point(50, 6)),
                       RequestType("idle", 0.0, Lengths.point(900, 900))))  # fmt: skip
    assert mix.rate_rps == 4
    assert mix.max_total_tokens == 56
    assert [t.rate_rps for t in mix.scaled(2).types] == [6, 2, 0]
    merged = mix.merged()
    assert merged.rate_rps == 4
    assert merged.lengths == Lengths.from_pairs([(10, 2)] * 3 + [(50, 6)])


def test_merging_keeps_the_flow_of_kv_tokens():
    mix = WorkloadMix((RequestType("short", 2, Lengths.point(7, 9)), RequestType("long", 0.5, Lengths.point(100, 33))))
    merged = mix.merged()
    expected = sum(t.rate_rps * t.lengths.kv_token_iterations for t in mix.types)
    assert merged.rate_rps * merged.lengths.kv_token_iterations == pytest.approx(expected)


def test_invalid_mixes_raise():
    one = RequestType("a", 0.0, Lengths.point(1, 1))
    for types in ((), (one, one)):
        with pytest.raises(ValueError, match="distinct names"):
            WorkloadMix(types)
    with pytest.raises(ValueError, match="rate_rps is 0"):
        WorkloadMix((one,)).merged()
    for rate in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate_rps is"):
            WorkloadMix.from_lengths(Lengths.point(1, 1), rate)
    with pytest.raises(ValueError, match="factor is -1"):
        WorkloadMix((one,)).scaled(-1)
