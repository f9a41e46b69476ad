"""The iteration-time model and the profiles."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile, profile_names
from scheduler.model.workload import Lengths, WorkloadMix

TIME_MODEL = IterationTimeModel(
    d0_s=0.0034, d1_s_per_kv_token=4.5e-7, d2_s_per_prefill_token=6e-5, d3_s_per_decode_token=5e-5, floor_s=0.01
)


def test_small_batch_takes_the_floor_and_its_kv():
    assert TIME_MODEL.iteration_s(20, 10, 1000) == pytest.approx(0.01 + 1000 * 4.5e-7)


def test_large_batch_takes_its_prefill_decode_and_kv():
    assert TIME_MODEL.iteration_s(500, 100, 40_000) == pytest.approx(0.0034 + 500 * 6e-5 + 100 * 5e-5 + 40_000 * 4.5e-7)


def test_two_term_model_ignores_computed_tokens():
    time_model = IterationTimeModel(0.0112, 4.24e-7)
    assert time_model.iteration_s(5000, 300, 10_000) == pytest.approx(0.0112 + 4.24e-3)


def test_arrays_and_numbers_agree():
    prefill, decode, kv = np.array([0, 500, 64]), np.array([1, 0, 200]), np.array([10, 0, 90_000])
    seconds = TIME_MODEL.iteration_s(prefill, decode, kv)
    assert seconds.shape == (3,)
    for i in range(3):
        assert seconds[i] == TIME_MODEL.iteration_s(int(prefill[i]), int(decode[i]), int(kv[i]))
    assert TIME_MODEL.iteration_s(prefill, 0, kv)[1] == TIME_MODEL.iteration_s(500, 0, 0)
    assert TIME_MODEL.iteration_s(0, 0, kv)[2] == TIME_MODEL.iteration_s(0, 0, 90_000)


def test_shortest_iteration_is_the_empty_batch():
    assert TIME_MODEL.shortest_iteration_s == TIME_MODEL.iteration_s(0, 0, 0) == 0.01
    assert IterationTimeModel(0.02, 0.0, floor_s=0.01).shortest_iteration_s == 0.02


@pytest.mark.parametrize(
    "field", ["d0_s", "d1_s_per_kv_token", "d2_s_per_prefill_token", "d3_s_per_decode_token", "floor_s"]
)
@pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf])
def test_bad_coefficient_is_named(field, value):
    coefficients = {"d0_s": 0.01, "d1_s_per_kv_token": 1e-7, field: value}
    with pytest.raises(ValueError, match=rf"{field} is .*>= 0"):
        IterationTimeModel(**coefficients)


def test_an_iteration_takes_time():
    with pytest.raises(ValueError, match="d0_s and floor_s"):
        IterationTimeModel(0.0, 1e-7)
    assert IterationTimeModel(0.0, 1e-7, floor_s=0.01).iteration_s(0, 1, 0) == 0.01


def test_presets_load_under_their_names():
    assert {"a100-llama2-7b", "a100-llama2-7b-paper"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.provenance
        assert profile.kv_capacity_tokens >= 1


def test_a100_presets_have_their_published_numbers():
    measured, paper = load_profile("a100-llama2-7b"), load_profile("a100-llama2-7b-paper")
    assert measured.time_model == IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
    assert paper.time_model == IterationTimeModel(0.0102484863577943, 3.877682025836559e-07)
    assert measured.kv_capacity_tokens == paper.kv_capacity_tokens == 137_000


def test_the_paper_profile_gives_the_published_equilibrium_memory():
    paper = load_profile("a100-llama2-7b-paper")
    # Any lengths with the published mean weight do: M* depends on nothing else.
    outputs = np.array([147, 200])
    short, long = (Lengths.point(58, int(output)).kv_token_iterations for output in outputs)
    share = (29159.356583593526 - short) / (long - short)
    lengths = Lengths(np.array([58, 58]), outputs, np.array([1 - share, share]))

    def fluid(rate_rps):
        return solve_fluid(WorkloadMix.from_lengths(lengths, rate_rps), paper.time_model, paper.kv_capacity_tokens)

    published = {50: 34_377, 60: 55_758, 70: 100_327, 80: 250_509}
    assert {rate: round(fluid(rate).memory_tokens) for rate in published} == published
    assert fluid(1.0).critical_rate_scale == pytest.approx(74.1378885771586, rel=1e-12)


# Iteration times in ms that Vidur predicts, as published; prompt tokens, decodes and KV tokens of the batch.
VIDUR = [((0, 32, 48384), 24.5), ((0, 32, 24384), 17.7), ((0, 64, 34560), 21.1), ((2560, 100, 56090), 201.2)]


def test_the_fitted_profile_prices_what_the_default_one_overprices():
    default, fitted = load_profile("a100-llama2-7b").time_model, load_profile("a100-llama2-7b-vidur").time_model
    errors = [
        [1000 * time_model.iteration_s(*batch) / ms - 1 for batch, ms in VIDUR] for time_model in (default, fitted)
    ]
    assert all(0.24 < error < 0.36 for error in errors[0][:3])
    assert all(abs(error) < 0.08 for error in errors[1])
    assert abs(errors[0][3]) < 0.02


def test_unknown_profile_lists_the_known_ones_and_offers_a_path():
    with pytest.raises(ValueError, match=r"'h1000'.*a100-llama2-7b.*path"):
        load_profile("h1000")


def test_profile_from_a_path(tmp_path):
    content = {
        "name": "mine", "description": "d", "law": {"d0_s": 0.01, "d1_s_per_kv_token": 0}, "kv_capacity_tokens": 5,
        "provenance": ["measured"],
    }  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    assert load_profile(path).time_model == IterationTimeModel(0.01, 0)
    assert load_profile(str(path)).provenance == ("measured",)
    for change in ({"kv_capacity_tokens": 0}, {"law": {"d0": 1}}, {"law": {"d0_s": -1, "d1_s_per_kv_token": 0}},
                   {"provenance": "x"}, {"extra": 1}):  # fmt: skip
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=r"mine\.json"):
            load_profile(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_profile(path)


@given(st.floats(0, 5000), st.floats(0, 500), st.floats(0, 1e5), st.floats(0, 0.02))
def test_prompt_tokens_within_is_the_inverse_of_iteration_s(prompt, decodes, kv, floor_s):
    model = IterationTimeModel(0.004, 4e-7, 6e-5, 5e-5, floor_s)
    seconds = model.iteration_s(prompt, decodes, kv + prompt)  # a prompt token is also read
    room = model.prompt_tokens_within(seconds, decodes, kv)
    above_floor = 0.004 + 6e-5 * prompt + 5e-5 * decodes > floor_s
    assert room == pytest.approx(prompt, abs=1e-6) if above_floor else room > prompt - 1e-6


def test_no_time_and_free_prompts_are_infinities():
    model = IterationTimeModel(0.004, 4e-7, 6e-5, 5e-5, 0.011)
    assert model.prompt_tokens_within(0.0109, 0.0, 0.0) == -math.inf
    assert IterationTimeModel(0.01, 0.0).prompt_tokens_within(0.02, 100.0, 1e5) == math.inf
    assert model.prompt_tokens_within(0.02, 10.0, 0.0, other_s=0.001) == pytest.approx(
        model.prompt_tokens_within(0.019, 10.0, 0.0)
    )


def test_tokens_add_the_same_time_to_any_iteration_above_the_floor():
    model = IterationTimeModel(0.004, 4e-7, 6e-5, 5e-5, 0.011)
    full = model.iteration_s(1000.0, 50.0, 1e4)
    more = model.iteration_s(1100.0, 60.0, 3e4)
    assert model.added_s(prefill_tokens=100.0, decode_tokens=10.0, kv_tokens=2e4) == pytest.approx(more - full)
    assert model.prefill_s(100.0) == pytest.approx(model.added_s(prefill_tokens=100.0, kv_tokens=100.0))


def test_a_faster_engine_takes_so_much_less_whatever_its_batch():
    model = IterationTimeModel(0.004, 4e-7, 6e-5, 5e-5, 0.011)
    for batch in ((0.0, 1.0, 10.0), (500.0, 80.0, 1e5)):
        assert model.faster(4).iteration_s(*batch) == pytest.approx(model.iteration_s(*batch) / 4)
