"""Models fitted to measured iterations, at once and online."""

import math

import numpy as np
import pytest

from scheduler.estimation.iteration_time_fit import FitRejected, IterationTimeFit, fit_iteration_time
from scheduler.estimation.iteration_time_online import OnlineIterationTimeModel
from scheduler.model.iteration_time import IterationTimeModel

GPU = IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
TWO_TERM = IterationTimeModel(0.0112, 4.24e-7)
PROBES = [(0, 10, 10_000), (0, 150, 120_000), (400, 60, 60_000), (512, 0, 0)]
"""(prefill, decode, kv): a small decode batch, a large one, a mixed one, a lone prefill."""


def batches(records, seed=0):
    """Batches like a server's: KV grows with the decodes, four in ten carry prefill."""
    rng = np.random.default_rng(seed)
    decode = rng.integers(1, 200, records)
    prefill = np.where(rng.random(records) < 0.4, rng.integers(1, 512, records), 0)
    kv = np.rint(decode * np.clip(rng.normal(1200, 250, records), 100, None))
    return prefill, decode, kv


def measured(time_model, tokens, noise=0.02, seed=1):
    return time_model.iteration_s(*tokens) * (1 + noise * np.random.default_rng(seed).standard_normal(tokens[0].size))


def worst_error(time_model, truth):
    return max(abs(time_model.iteration_s(*probe) / truth.iteration_s(*probe) - 1) for probe in PROBES)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_recovers_a_model_with_a_floor(scale):
    truth = IterationTimeModel(0.0034 * scale, 4.5e-7 * scale, 6.47e-5 * scale, 6.47e-5 * scale, 0.0112 * scale)
    tokens = batches(1000)
    fit = fit_iteration_time(*tokens, measured(truth, tokens))
    assert isinstance(fit, IterationTimeFit)
    assert fit.time_model.floor_s == pytest.approx(truth.floor_s, rel=0.03)
    assert fit.time_model.d1_s_per_kv_token == pytest.approx(truth.d1_s_per_kv_token, rel=0.03)
    assert fit.time_model.d2_s_per_prefill_token == pytest.approx(truth.d2_s_per_prefill_token, rel=0.03)
    assert fit.time_model.d3_s_per_decode_token == pytest.approx(truth.d3_s_per_decode_token, rel=0.1)
    assert worst_error(fit.time_model, truth) < 0.03
    assert fit.r2 > 0.99
    assert fit.mape == pytest.approx(0.02 * math.sqrt(2 / math.pi), rel=0.1)
    assert fit.records == 1000
    assert set(fit.identified) == {
        "floor_s", "d0_s", "d1_s_per_kv_token", "d2_s_per_prefill_token", "d3_s_per_decode_token"
    }  # fmt: skip


def test_without_noise_the_fitted_model_is_exact():
    tokens = batches(200)
    fit = fit_iteration_time(*tokens, GPU.iteration_s(*tokens))
    assert isinstance(fit, IterationTimeFit)
    assert worst_error(fit.time_model, GPU) < 1e-6


@pytest.mark.parametrize(("records", "trials"), [(32, 40), (100, 20), (1000, 5)])
def test_no_floor_is_invented(records, trials):
    for trial in range(trials):
        tokens = batches(records, seed=trial)
        fit = fit_iteration_time(*tokens, measured(TWO_TERM, tokens, seed=1000 + trial))
        assert isinstance(fit, IterationTimeFit)
        assert fit.time_model.floor_s == 0
        assert "floor_s" not in fit.identified
    assert fit_iteration_time(*tokens, TWO_TERM.iteration_s(*tokens)).time_model.floor_s == 0


def test_recovers_the_two_term_model():
    tokens = batches(1000)
    assert worst_error(fit_iteration_time(*tokens, measured(TWO_TERM, tokens)).time_model, TWO_TERM) < 0.03


def test_prefill_that_never_occurs_is_left_out():
    _, decode, kv = tokens = (np.zeros(300), *batches(300)[1:])
    fit = fit_iteration_time(np.zeros(300), decode, kv, measured(TWO_TERM, tokens))
    assert isinstance(fit, IterationTimeFit)
    assert fit.time_model.d2_s_per_prefill_token == 0
    assert "d2_s_per_prefill_token" not in fit.identified
    assert {"d0_s", "d1_s_per_kv_token", "d3_s_per_decode_token"} <= set(fit.identified)


def test_coefficients_are_never_negative():
    tokens = batches(200)
    falling = 0.05 - 1e-7 * tokens[2] + 1e-5 * tokens[0]
    fit = fit_iteration_time(*tokens, falling)
    assert isinstance(fit, IterationTimeFit)
    assert fit.time_model.d1_s_per_kv_token == 0


def rejection(prefill, decode, kv, seconds):
    result = fit_iteration_time(prefill, decode, kv, seconds)
    assert isinstance(result, FitRejected)
    assert result.records == len(seconds)
    return result.reason


def test_degenerate_records_are_rejected():
    prefill, decode, kv = batches(200)
    seconds = measured(GPU, (prefill, decode, kv))
    same = np.full(200, 8)
    assert "d3_s_per_decode_token, d1_s_per_kv_token" in rejection(prefill, decode, decode * 1000, seconds)
    assert "d0_s, d3_s_per_decode_token" in rejection(prefill, same, kv, seconds)
    assert "tell apart" in rejection(same, same, same, np.full(200, 0.02))
    assert "tell apart" in rejection(prefill, decode, 2 * prefill + 5, seconds)


def test_too_few_or_unusable_records_are_rejected():
    tokens = batches(40)
    seconds = measured(GPU, tokens)
    assert "31 records" in rejection(*(a[:31] for a in tokens), seconds[:31])
    for bad in (math.nan, math.inf, 0.0, -1.0):
        spoiled = seconds.copy()
        spoiled[3] = bad
        assert "1 of 40" in rejection(*tokens, spoiled)


def test_records_without_a_base_time_are_rejected():
    prefill, _, _ = batches(200)
    assert "empty batch" in rejection(prefill + 100, np.zeros(200), np.zeros(200), 1e-4 * (prefill + 50.0))


def test_a_floor_can_be_the_only_base_time():
    truth = IterationTimeModel(0.0, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
    tokens = batches(300)
    fit = fit_iteration_time(*tokens, measured(truth, tokens))
    assert isinstance(fit, IterationTimeFit)
    assert fit.time_model.floor_s == pytest.approx(0.0112, rel=0.03)


def test_nonsensical_tokens_are_errors():
    prefill, decode, kv = batches(40)
    seconds = measured(GPU, (prefill, decode, kv))
    with pytest.raises(ValueError, match="decode_tokens has 39 entries"):
        fit_iteration_time(prefill, decode[1:], kv, seconds)
    with pytest.raises(ValueError, match="kv_tokens holds negative"):
        fit_iteration_time(prefill, decode, -kv, seconds)
    with pytest.raises(ValueError, match="prefill_tokens holds negative or non-finite"):
        fit_iteration_time(prefill * math.nan, decode, kv, seconds)


def feed(online, time_model, records, noise=0.02, seed=2):
    tokens = batches(records, seed)
    for record in zip(*tokens, measured(time_model, tokens, noise, seed + 1), strict=True):
        online.update(*(float(x) for x in record))


def test_online_model_starts_at_its_prior_and_stays_there_when_it_is_right():
    online = OnlineIterationTimeModel(GPU)
    assert online.time_model == GPU
    feed(online, GPU, 31)
    assert (online.r2, online.mape, online.relative_error_std) == (None, None, None)
    feed(online, GPU, 1000)
    assert worst_error(online.time_model, GPU) < 0.03
    assert online.records == 1031
    assert online.relative_error_std == pytest.approx(0.02, rel=0.15)
    assert online.mape == pytest.approx(0.016, rel=0.15)
    assert online.r2 > 0.99


@pytest.mark.parametrize("factor", [1.5, 2.0, 0.5])
def test_online_model_follows_an_engine_that_changes_speed(factor):
    online = OnlineIterationTimeModel(GPU)
    feed(online, GPU, 500)
    changed = IterationTimeModel(*(factor * x for x in (0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)))
    feed(online, changed, 300, seed=5)
    assert worst_error(online.time_model, changed) < 0.3
    feed(online, changed, 500, seed=7)
    assert worst_error(online.time_model, changed) < 0.08
    feed(online, changed, 1000, seed=9)
    assert online.mape < 0.03


@pytest.mark.parametrize(
    "prior", [TWO_TERM, IterationTimeModel(1.0, 1e-4, 1e-3, 1e-3, 1.2), IterationTimeModel(1e-4, 0.0)]
)
def test_online_model_learns_from_a_wrong_prior(prior):
    online = OnlineIterationTimeModel(prior)
    truth = IterationTimeModel(0.0112, 4.5e-7, 6.47e-5, 2e-5)
    feed(online, truth, 3000)
    assert worst_error(online.time_model, truth) < 0.1
    assert online.mape < 0.05


def test_garbage_records_change_nothing():
    online = OnlineIterationTimeModel(GPU)
    feed(online, GPU, 100)
    before = online.time_model
    for bad in (math.nan, math.inf, -1.0):
        online.update(bad, 1, 1, 0.02)
        online.update(1, bad, 1, 0.02)
        online.update(1, 1, bad, 0.02)
        online.update(1, 1, 1, bad)
    online.update(1, 1, 1, 0.0)
    assert (online.time_model, online.ignored, online.records) == (before, 13, 100)


def test_one_outlier_moves_the_model_little():
    online = OnlineIterationTimeModel(GPU)
    feed(online, GPU, 500)
    for probe in PROBES:
        online.update(*probe, 100 * GPU.iteration_s(*probe))
    assert worst_error(online.time_model, GPU) < 0.1
    feed(online, GPU, 200, seed=8)
    assert worst_error(online.time_model, GPU) < 0.05
    assert online.relative_error_std < 0.15


@pytest.mark.parametrize(
    "record", [(1e300, 0, 0, 0.02), (0, 1e12, 0, 1e-9), (1e308, 1e308, 1e308, 1e308), (0, 0, 0, 5e-324)]
)
def test_absurd_records_leave_a_valid_model_that_recovers(record):
    online = OnlineIterationTimeModel(GPU)
    feed(online, GPU, 200)
    for _ in range(20):
        online.update(*record)
    coefficients = [getattr(online.time_model, name) for name in IterationTimeModel.__slots__]
    assert all(math.isfinite(c) and c >= 0 for c in coefficients)
    feed(online, GPU, 2000, seed=4)
    assert worst_error(online.time_model, GPU) < 0.1


def test_one_absurd_record_does_not_stop_the_learning_of_a_term():
    online = OnlineIterationTimeModel(TWO_TERM)
    online.update(1e9, 0, 0, 0.0112)
    truth = IterationTimeModel(0.0112, 4.24e-7, 6.47e-5)
    feed(online, truth, 4000)
    assert worst_error(online.time_model, truth) < 0.15


def test_a_long_idle_phase_does_not_wind_up_the_other_terms():
    online = OnlineIterationTimeModel(GPU)
    feed(online, GPU, 500)
    for _ in range(1500):
        online.update(0, 1, 100, GPU.iteration_s(0, 1, 100))
    online.update(500, 100, 90_000, 100 * GPU.iteration_s(500, 100, 90_000))
    # One outlier, clipped to twice the prediction, may not take over terms that have long not been seen.
    assert worst_error(online.time_model, GPU) < 0.2
    feed(online, GPU, 500, seed=6)
    assert worst_error(online.time_model, GPU) < 0.05


def test_online_parameters_are_checked():
    for forgetting in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="forgetting is"):
            OnlineIterationTimeModel(GPU, forgetting=forgetting)
    for prior_records in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="prior_records is"):
            OnlineIterationTimeModel(GPU, prior_records=prior_records)
    feed(online := OnlineIterationTimeModel(GPU, forgetting=1.0, prior_records=1.0), GPU, 300)
    assert worst_error(online.time_model, GPU) < 0.03


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_a_change_of_speed_is_followed_at_once_and_left_out_of_the_error(factor):
    online = OnlineIterationTimeModel(GPU)
    feed(online, GPU, 1000)
    before = online.error
    changed = IterationTimeModel(*(factor * getattr(GPU, name) for name in IterationTimeModel.__slots__))
    feed(online, changed, 60, seed=5)
    assert worst_error(online.time_model, changed) < 0.1
    assert online.error.std < 1.5 * before.std
    assert abs(online.error.mean) < 0.02


def test_the_error_statistics_match_the_iterations():
    online = OnlineIterationTimeModel(GPU)
    assert online.error.std == pytest.approx(0.019 * math.sqrt(math.pi / 2))
    feed(online, GPU, 1500, noise=0.03)
    errors_seen = online.error
    assert errors_seen.std_estimate.covers(0.03)
    assert abs(errors_seen.correlation) < 0.15
    assert 400 < errors_seen.iterations <= 500
    mean_s, std_s = online.iteration_time_s
    assert 0 < std_s < mean_s


def test_errors_that_resemble_the_last_ones_show():
    online, error = OnlineIterationTimeModel(GPU), 0.0
    generator = np.random.default_rng(6)
    for _ in range(1500):
        error = 0.8 * error + 0.6 * 0.02 * generator.standard_normal()
        tokens = (int(generator.integers(0, 500)), 80, int(generator.integers(10_000, 90_000)))
        online.update(*tokens, GPU.iteration_s(*tokens) * (1 + error))
    assert online.error.correlation > 0.5
