"""The shape of a model out of its config.json: published sizes, the KV cache, and what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
from published_models import CONFIGS

from scheduler.model.language_model import known_model_types, language_model
from scheduler.model.weight_format import UnknownModel, weight_format

# Parameters in all, as their makers publish them, in 1e9; and per token, where there are experts.
PUBLISHED = {
    "llama-2-7b": (6.74, None), "llama-3-8b": (8.03, None), "mixtral-8x7b": (46.7, 12.9), "deepseek-v3": (671, 37),
    "gpt-oss-20b": (20.9, 3.6), "qwen3-30b-a3b": (30.5, 3.3), "gemma-2-9b": (9.24, None), "qwen2.5-7b": (7.62, None),
    "llama-3.1-70b-fp8": (70.6, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    model = language_model(CONFIGS[name])
    total, active = PUBLISHED[name]
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.003)
    if active is not None:  # some count the input table too
        with_tables = (model.parameters_per_token + model.head + model.embedding) / 1e9
        assert (model.parameters_per_token + model.head) / 1e9 - 0.01 <= active * 1.03
        assert with_tables >= active * 0.97


@pytest.mark.parametrize(("name", "kv_bytes", "tensor_parallel", "each"), [
    ("llama-2-7b", 2, 1, 512 * 1024),  # 2 x 32 layers x 32 heads x 128 x 2 bytes
    ("llama-3-8b", 2, 1, 128 * 1024),  # a quarter of the heads
    ("llama-3-8b", 1, 1, 64 * 1024),
    ("llama-3-8b", 2, 8, 16 * 1024),
    ("llama-3-8b", 2, 16, 16 * 1024),  # at least one head each
    ("deepseek-v3", 2, 1, 61 * (512 + 64) * 2),
    ("deepseek-v3", 2, 8, 61 * (512 + 64) * 2),  # a latent cache is whole on each
])
def test_kv_bytes_per_token(name: str, kv_bytes: float, tensor_parallel: int, each: float) -> None:
    assert language_model(CONFIGS[name]).kv_bytes_per_token(kv_bytes, tensor_parallel, 2048) == each


def test_a_window_holds_no_more_than_itself() -> None:
    model = language_model(CONFIGS["gemma-2-9b"])
    whole = 2 * 42 * 8 * 256 * 2.0
    assert model.windows.count(4096) == 21 and model.windows.count(None) == 21
    assert model.kv_bytes_per_token(2, 1, 4096) == whole
    assert model.kv_bytes_per_token(2, 1, 16_384) == whole * (0.5 + 0.5 / 4)
    assert language_model(CONFIGS["gpt-oss-20b"]).windows == (128, None) * 12


def test_windows_of_a_config_that_leaves_their_pattern_to_its_class() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
            "sliding_window": 1024}
    model = language_model({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": text})
    assert model.windows.count(None) == 5 and model.windows[5] is None and model.windows[0] == 1024
    assert model.parameters / 1e9 == pytest.approx(3.88, rel=0.01)  # Gemma 3 4B without its vision tower


@pytest.mark.parametrize(("changed", "windows"), [
    ({"use_sliding_window": False, "sliding_window": 4096}, {None}), ({"sliding_window": None}, {None}),
])
def test_a_window_that_is_switched_off(changed: dict[str, Any], windows: set[int | None]) -> None:
    assert set(language_model(CONFIGS["qwen2.5-7b"] | changed).windows) == windows


def test_a_batch_reads_the_experts_that_it_reaches() -> None:
    model = language_model(CONFIGS["mixtral-8x7b"])
    one, many = model.read_bytes(1), model.read_bytes(1000)
    assert one == pytest.approx(2 * (model.parameters_per_token + model.head), rel=1e-12)
    assert many == pytest.approx(model.weight_bytes - 2 * model.embedding, rel=1e-9)
    assert one < model.read_bytes(4) < many
    dense = language_model(CONFIGS["llama-2-7b"])
    assert dense.read_bytes(1) == dense.read_bytes(1000) == dense.weight_bytes - 2 * dense.embedding


@pytest.mark.parametrize(("given", "bits", "eight_bit"), [
    ({}, 16, False),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8, True),
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128, False),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, False),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.3, False),
    ({"quant_method": "mxfp4"}, 4.25, False),
    ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, 4.5, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, 8, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "weights": {"num_bits": 4, "group_size": 128}, "input_activations": None}}}, 4.125, False),
])
def test_formats_of_weights(given: dict[str, Any], bits: float, eight_bit: bool) -> None:
    found = weight_format({"quantization_config": given}, "bfloat16")
    assert found.weight_bits == pytest.approx(bits, rel=0.01)
    assert found.eight_bit_compute is eight_bit


def test_a_quantised_model_takes_the_bytes_of_its_checkpoint() -> None:
    assert language_model(CONFIGS["gpt-oss-20b"]).weight_bytes / 1e9 == pytest.approx(13.76, rel=0.01)
    assert language_model(CONFIGS["llama-3.1-70b-fp8"]).weight_bytes / 1e9 == pytest.approx(72.7, rel=0.01)
    eight_bit_cache = {"quantization_config": {
        "quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}}
    assert language_model(CONFIGS["llama-3-8b"] | eight_bit_cache).weights.kv_bytes == 1.0


def _without(name: str, key: str) -> dict[str, Any]:
    return {k: v for k, v in CONFIGS[name].items() if k != key}


def _quantised(given: Any) -> dict[str, Any]:
    return CONFIGS["llama-2-7b"] | {"quantization_config": given}


def _compressed(weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(("config", "said"), [
    ({"model_type": "mamba2"}, "model_type 'mamba2' is not known; known: .*llama.*; measure the model"),
    ({}, "model_type '' is not known"),
    ([], "found list"),
    (_without("llama-2-7b", "hidden_size"), "has no hidden_size; take the config.json that lies beside"),
    (_without("mixtral-8x7b", "num_experts_per_tok"), "has no num_experts_per_tok"),
    (CONFIGS["llama-2-7b"] | {"num_hidden_layers": 0}, "num_hidden_layers is 0 .* whole number >= 1"),
    (CONFIGS["llama-2-7b"] | {"vocab_size": "many"}, "vocab_size is 'many'"),
    (CONFIGS["llama-2-7b"] | {"torch_dtype": "int3"}, "dtype 'int3' is not known; allowed: float16"),
    (CONFIGS["llama-2-7b"] | {"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' is not known"),
    (CONFIGS["llama-2-7b"] | {"quantization_config": {"quant_method": "compressed-tensors"}}, "no config_groups"),
    (CONFIGS["llama-2-7b"] | {"layer_types": ["linear_attention"] * 32}, "layer_types has linear_attention"),
    (CONFIGS["llama-2-7b"] | {"layer_types": ["full_attention"] * 31}, "layer_types has 31 layers of 32"),
    (CONFIGS["llama-2-7b"] | {"layer_types": 32}, "a value in the config is of another kind .*; measure the model"),
    (_quantised("fp8"), "quantization_config is 'fp8'; it must be an object"),
    (_quantised({"quant_method": "gptq", "bits": None}), "bits of the quantisation is None; it must be a number"),
    (_quantised(_compressed({"num_bits": None})), "num_bits of the quantisation is None"),
    (_quantised(_compressed("int4")), "weights is 'int4'"),
    (CONFIGS["qwen3-30b-a3b"] | {"mlp_only_layers": 3}, "mlp_only_layers is 3 in the config; it must be a list"),
])
def test_what_cannot_be_read_is_one_sentence_that_says_what_to_do(config: Any, said: str) -> None:
    with pytest.raises(UnknownModel, match=said) as error:
        language_model(config)
    assert "\n" not in str(error.value)


def test_weights_of_32_bits_are_served_in_16_unless_32_are_asked_for() -> None:
    config = CONFIGS["llama-2-7b"]
    halves = [language_model(config | {"torch_dtype": "float32"}), language_model(config, "torch.bfloat16")]
    whole = language_model(config, "torch.float32")
    assert [whole.weight_bytes / model.weight_bytes for model in halves] == [2.0, 2.0]
    assert whole.dtype_bytes == 4.0 and whole.weights.weight_bits == 32.0


def test_known_types_are_named_in_order() -> None:
    assert list(known_model_types()) == sorted(known_model_types())
