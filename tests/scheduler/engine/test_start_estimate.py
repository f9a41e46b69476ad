"""An engine without a profile starts from an estimate of its own, where it knows its device and its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_harness import Engine, add_many, telemetry

from scheduler.engine import start_estimate as module
from scheduler.engine.channel import new_endpoint, remove_endpoint
from scheduler.engine.settings_in_force import configured_thresholds
from scheduler.engine.start_estimate import start_estimate
from scheduler.model.accelerators import accelerator
from scheduler.model.estimate import Setup, law
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.language_model import language_model
from scheduler.model.profiles import load_profile
from scheduler.settings import LiveSettings
from scheduler.thresholds import EngineLimits, Thresholds
from scheduler.tuning.slo import Slo

H100 = "NVIDIA H100 80GB HBM3"
LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14_336, "vocab_size": 128_256,
}
LIMITS = EngineLimits(
    kv_capacity_tokens=400_000, block_tokens=16, max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=8192
)


def vllm_config(config: dict[str, Any] | None = None, *, tensor_parallel: int = 1, cache: str = "auto") -> Any:
    """The parts of vLLM's VllmConfig that are read."""
    hf_config = SimpleNamespace(to_dict=lambda: LLAMA3 if config is None else config)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, dtype="torch.bfloat16", max_model_len=8192),
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel),
        cache_config=SimpleNamespace(cache_dtype=cache, num_gpu_blocks=1000, block_size=16),
    )


@pytest.mark.parametrize(("tensor_parallel", "cache", "setup"), [
    (1, "auto", Setup()), (2, "auto", Setup(tensor_parallel=2)), (1, "fp8_e4m3", Setup(kv_cache_dtype="fp8")),
])
def test_the_estimate_is_that_of_the_engine_s_configuration(tensor_parallel: int, cache: str, setup: Setup) -> None:
    found = start_estimate(vllm_config(tensor_parallel=tensor_parallel, cache=cache), H100)
    assert found.time_model == law(language_model(LLAMA3, "bfloat16"), accelerator("h100"), setup)
    kv_cache = "KV cache of 1000 blocks of 16 tokens"
    for part in ("estimated for 8.03e9 parameters", f"on {tensor_parallel} x NVIDIA H100", kv_cache):
        assert part in found.said


def test_weights_that_are_quantised_at_loading_count_as_such() -> None:
    config = vllm_config()
    config.model_config.quantization = "fp8"
    whole, half = start_estimate(vllm_config(), H100).time_model, start_estimate(config, H100).time_model
    assert whole is not None and half is not None
    assert half.d3_s_per_decode_token == pytest.approx(whole.d3_s_per_decode_token / 2, rel=0.001)


@pytest.mark.parametrize(("config", "device", "said"), [
    (LLAMA3, "NVIDIA GeForce RTX 4090", "first iterations are measured: the device 'NVIDIA GeForce RTX 4090' is not"),
    (LLAMA3, "", "the device '' is not a known accelerator"),
    ({"model_type": "mamba2"}, H100, "first iterations are measured: model_type 'mamba2' is not known"),
    (LLAMA3 | {"quantization_config": {"quant_method": "awq", "bits": None}}, H100, "bits of the quantisation is None"),
    (LLAMA3 | {"quantization_config": "fp8"}, H100, "quantization_config is 'fp8'"),
])
def test_what_is_not_known_is_no_estimate(config: dict[str, Any], device: str, said: str) -> None:
    found = start_estimate(vllm_config(config), device)
    assert found.time_model is None and said in found.said


def test_a_configuration_that_cannot_be_read_ends_no_engine() -> None:
    broken = vllm_config()
    broken.parallel_config = None
    found = start_estimate(broken, H100)
    assert found.time_model is None and "first iterations are measured: " in found.said


ESTIMATE = IterationTimeModel(0.004, 6e-8, 2e-5, 2e-5, 0.008)
TARGETS = Slo(3.0, 0.08)


def test_the_first_thresholds_follow_from_the_estimate() -> None:
    settings = LiveSettings(thresholds=Thresholds(policy="fluid"), targets=TARGETS)
    found = configured_thresholds(settings, LIMITS, ESTIMATE)
    assert found.fluid is not None and found.fluid.time_model == ESTIMATE and found.fluid.cold
    assert found.fluid.queue_limit is None and "from an estimate" in found.reason
    assert configured_thresholds(settings, LIMITS) == settings.thresholds


def test_a_profile_goes_before_the_estimate() -> None:
    settings = LiveSettings(thresholds=Thresholds(policy="fluid"), targets=TARGETS, profile="a100-llama2-7b")
    found = configured_thresholds(settings, LIMITS, ESTIMATE)
    assert found.fluid is not None and found.fluid.time_model == load_profile("a100-llama2-7b").time_model


def test_a_guess_by_which_no_request_is_in_time_closes_no_gate() -> None:
    settings = LiveSettings(thresholds=Thresholds(policy="fluid"), targets=Slo(tpot_s=0.005))
    assert configured_thresholds(settings, LIMITS, ESTIMATE) == settings.thresholds


def _engine(**settings: Any) -> Engine:
    return Engine(settings={"targets": {"ttft_s": 3.0, "tpot_s": 0.08}} | settings)


def test_a_real_engine_s_first_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_device", lambda: H100)
    endpoint = new_endpoint()
    engine = _engine(channel=endpoint)
    try:
        active = engine.scheduler.active.current().thresholds
        assert active.fluid is not None and 0 < active.fluid.time_model.floor_s < 0.01
        add_many(engine, 20, output=10)
        engine.run()
        assert len(engine.finished) == 20 and telemetry(engine).counters.rejected == 0
    finally:
        engine.scheduler.shutdown()
        remove_endpoint(endpoint)


@pytest.mark.parametrize("device", ["", H100])
def test_none_is_made_on_a_cpu_or_beside_a_profile(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Nor where the caller sets the thresholds, as in a simulation."""
    monkeypatch.setattr(module, "this_device", lambda: device)
    endpoint = new_endpoint()
    more = {"profile": "cpu-smollm2"} if device else {}
    engine = _engine(channel=endpoint, **more)
    try:
        fluid = engine.scheduler.active.current().thresholds.fluid
        expected = load_profile("cpu-smollm2").time_model if device else None
        assert (fluid.time_model if fluid else None) == expected
        assert _engine().scheduler.active.current().thresholds.fluid is None
    finally:
        engine.scheduler.shutdown()
        remove_endpoint(endpoint)
