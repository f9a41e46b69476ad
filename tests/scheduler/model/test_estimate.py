"""Estimates against every law that there is: the published ones, the published M*, and files of measured profiles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pytest
from published_models import CONFIGS

from scheduler.model.accelerators import UnknownAccelerator, accelerator, accelerator_of_device, accelerators
from scheduler.model.estimate import FACTORS, DoesNotFit, Setup, estimate, law
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.language_model import language_model
from scheduler.model.profiles import Profile, load_profile
from scheduler.model.weight_format import UnknownModel

A100 = accelerator("a100-80")
LLAMA2 = estimate(CONFIGS["llama-2-7b"], A100)
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "profiles"
BALANCED = [(512 * n, 20 * n, 11_218 * n) for n in range(1, 6)]
DECODES = [(0, n, n * context) for n in (1, 8, 32, 64) for context in (200, 500, 1000, 1500)]


def errors(ours: IterationTimeModel, theirs: IterationTimeModel, batches: list[tuple[int, int, int]]) -> list[float]:
    return [ours.iteration_s(*map(float, b)) / theirs.iteration_s(*map(float, b)) - 1 for b in batches]


@pytest.mark.parametrize("name", ["a100-llama2-7b", "a100-llama2-7b-vidur"])
def test_within_20_percent_of_the_published_law(name: str) -> None:
    published = load_profile(name)
    ours, theirs = LLAMA2.time_model, published.time_model
    for term in fields(IterationTimeModel):
        assert getattr(ours, term.name) == pytest.approx(getattr(theirs, term.name), rel=0.2), term.name
    assert max(map(abs, errors(ours, theirs, BALANCED + DECODES))) < 0.2
    assert LLAMA2.kv_capacity_tokens == pytest.approx(published.kv_capacity_tokens, rel=0.2)


def test_within_20_percent_of_the_paper_s_law_where_it_holds() -> None:
    """It has no term for computing, so only decodes are compared: an iteration reads weights and KV."""
    paper = load_profile("a100-llama2-7b-paper").time_model
    ours = LLAMA2.time_model
    assert ours.floor_s == pytest.approx(paper.d0_s, rel=0.2)
    assert ours.d1_s_per_kv_token == pytest.approx(paper.d1_s_per_kv_token, rel=0.2)
    assert max(map(abs, errors(ours, paper, DECODES))) < 0.2


def test_the_published_memory_table() -> None:
    """M* = Λ_W ΔT* with the estimate's floor and d1 in place of the paper's d0 and d1, which has no other term."""
    mean_weight = 29159.356583593526

    def memory(rate_rps: float) -> float:
        flow = rate_rps * mean_weight
        return flow * LLAMA2.time_model.floor_s / (1 - LLAMA2.time_model.d1_s_per_kv_token * flow)

    for rate_rps, published in {50: 34_377, 60: 55_758, 70: 100_327}.items():
        assert memory(rate_rps) == pytest.approx(published, rel=0.2)
    # The rate at which memory is full: r = C / (E[w] (d0 + d1 C)), published 74.1 /s for C = 137 000.
    full = 137_000 / (mean_weight * (LLAMA2.time_model.floor_s + LLAMA2.time_model.d1_s_per_kv_token * 137_000))
    assert full == pytest.approx(74.1, rel=0.05)


def test_within_20_percent_of_other_profiles_at_hand() -> None:
    path = SHARED / "a100-llama3-8b-estimate.json"
    if not path.is_file():
        pytest.skip("the extra profile is not on this machine")
    theirs, ours = load_profile(path), estimate(CONFIGS["llama-3-8b"], A100)
    assert ours.kv_capacity_tokens == pytest.approx(theirs.kv_capacity_tokens, rel=0.2)
    # It prices a decode at less than half a prompt token, though both pass the same layers; so no large batches.
    few = [(prompt, n, n * 1000 + prompt) for prompt in (0, 512, 2048) for n in (1, 8, 32, 64)]
    assert max(map(abs, errors(ours.time_model, theirs.time_model, few))) < 0.2


@pytest.mark.parametrize("name", ["a100-llama2-7b", "a100-llama2-7b-vidur"])
def test_the_interval_holds_the_published_law(name: str) -> None:
    published, interval = astuple(load_profile(name).time_model), LLAMA2.interval
    assert interval is not None
    for low, value, high in zip(astuple(interval.fast), published, astuple(interval.slow), strict=True):
        assert low <= value <= high


@pytest.mark.parametrize("on", accelerators())
@pytest.mark.parametrize("model", ["llama-3-8b", "gpt-oss-20b", "gemma-2-9b"])
def test_every_estimate_lies_in_its_interval_and_is_a_profile_s_file(model: str, on: str, tmp_path: Path) -> None:
    found = estimate(CONFIGS[model], accelerator(on), name=model)
    assert found.interval is not None
    ends = found.interval.fast, found.time_model, found.interval.slow
    for low, value, high in zip(*map(astuple, ends), strict=True):
        assert 0 < low <= value <= high
    assert found.interval.kv_low <= found.kv_capacity_tokens <= found.interval.kv_high
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(found.as_dict()))
    assert load_profile(path) == found
    said = " ".join(found.provenance)
    assert "nothing was measured" in said and accelerator(on).source in said


def test_more_bandwidth_memory_and_compute_help_in_proportion() -> None:
    h100, h200 = (law(language_model(CONFIGS["llama-3-8b"]), accelerator(n), Setup()) for n in ("h100", "h200"))
    assert h100.d1_s_per_kv_token / h200.d1_s_per_kv_token == pytest.approx(4.8 / 3.35)
    assert h100.d2_s_per_prefill_token == h200.d2_s_per_prefill_token
    host_s = FACTORS["host_s"].value
    assert (h100.floor_s - host_s) / (h200.floor_s - host_s) == pytest.approx(4.8 / 3.35)


def test_tensor_parallel_divides_the_work_and_adds_two_all_reduces_a_layer() -> None:
    model = language_model(CONFIGS["llama-3.1-70b-fp8"])
    h100 = accelerator("h100")
    two, four = (law(model, h100, Setup(tensor_parallel=size)) for size in (2, 4))
    fixed = FACTORS["host_s"].value + 2 * 80 * FACTORS["start_s"].value
    assert (two.floor_s - fixed) == pytest.approx(2 * (four.floor_s - fixed))
    link = 2 * 80 * 8192 * 2 / (FACTORS["link"].value * 450e9)
    compute = two.d3_s_per_decode_token - link * 2 * (1 / 2)
    assert four.d3_s_per_decode_token - link * 2 * (3 / 4) == pytest.approx(compute / 2)
    assert four.d1_s_per_kv_token == two.d1_s_per_kv_token / 2
    pcie = law(language_model(CONFIGS["llama-3-8b"]), accelerator("l4"), Setup(tensor_parallel=2))
    assert pcie.d0_s == pytest.approx(32 * FACTORS["launch_s"].value + 0.002 + 64 * FACTORS["start_pcie_s"].value)


def test_eight_bit_weights_run_at_the_eight_bit_rate_where_there_is_one() -> None:
    def per_token(name: str, on: str) -> float:
        config = CONFIGS["llama-3-8b"] | ({"quantization_config": {"quant_method": "fp8"}} if name == "fp8" else {})
        return law(language_model(config), accelerator(on), Setup()).d3_s_per_decode_token

    assert per_token("16-bit", "h100") / per_token("fp8", "h100") == pytest.approx(2, rel=0.001)
    assert per_token("16-bit", "a100-80") == per_token("fp8", "a100-80")


def test_an_eight_bit_cache_holds_and_reads_twice_the_tokens() -> None:
    half = estimate(CONFIGS["llama-3-8b"], A100, Setup(kv_cache_dtype="fp8"))
    whole = estimate(CONFIGS["llama-3-8b"], A100)
    assert half.kv_capacity_tokens == pytest.approx(2 * whole.kv_capacity_tokens, abs=2)
    assert half.time_model.d1_s_per_kv_token == whole.time_model.d1_s_per_kv_token / 2


def test_capacity_is_what_memory_leaves() -> None:
    some, more = (
        estimate(CONFIGS["llama-3-8b"], A100, Setup(gpu_memory_utilization=share)).kv_capacity_tokens
        for share in (0.5, 0.9)
    )
    assert more - some == pytest.approx(0.4 * 80 * 2**30 / (128 * 1024), abs=2)
    fewer = estimate(CONFIGS["llama-3-8b"], A100, Setup(max_num_seqs=1024, max_num_batched_tokens=16_384))
    assert fewer.kv_capacity_tokens < estimate(CONFIGS["llama-3-8b"], A100).kv_capacity_tokens


def _deepseek(on: str, size: int) -> Profile:
    return estimate(CONFIGS["deepseek-v3"], accelerator(on), Setup(tensor_parallel=size))


@pytest.mark.parametrize(("ask", "error", "said"), [
    (lambda: _deepseek("h200", 4), DoesNotFit, "672.9 GB and 4 x h200 .*; give a tensor parallel size of at least 8"),
    (lambda: _deepseek("h100", 8), DoesNotFit, "; take an accelerator with more memory, or quantised weights"),
    (lambda: _deepseek("h200", 3), DoesNotFit, "does not divide the model's 128 attention heads; allowed: 1, 2, 4, 8"),
    (lambda: estimate(CONFIGS["llama-3-8b"], A100, Setup(gpu_memory_utilization=1.5)), DoesNotFit, "is 1.5; it must"),
    (lambda: estimate(CONFIGS["llama-3-8b"], A100, Setup(context_tokens=0)), DoesNotFit, "context_tokens is 0"),
    (lambda: estimate(CONFIGS["llama-3-8b"], A100, Setup(kv_cache_dtype="int4")), UnknownModel, "dtype 'int4'"),
    (lambda: accelerator("h10"), UnknownAccelerator, "'h10' is not known; did you mean h100.*known: a100-40, a100-80"),
])
def test_what_cannot_be_estimated_is_one_sentence(
    ask: Callable[[], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_every_figure_has_a_source() -> None:
    assert set(accelerators()) == {"a100-40", "a100-80", "h100", "h200", "l4", "l40s", "b200", "mi300x"}
    for one in accelerators().values():
        assert "datasheet" in one.source or "data sheet" in one.source
        assert one.memory_bytes_per_s < one.bf16_flops and (one.fp8_flops or math.inf) > 1.9 * one.bf16_flops
    for factor in FACTORS.values():
        assert factor.low < factor.value < factor.high
        assert "Check:" in factor.source or "assumption" in factor.source or "the same" in factor.source


@pytest.mark.parametrize(("device", "name"), [
    ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA B200", "b200"),
    ("AMD Instinct MI300X", "mi300x"), ("AMD_Instinct_MI300X", "mi300x"),
    ("NVIDIA GeForce RTX 4090", None), ("NVIDIA A100-PCIE-40GB", None), ("cpu", None), ("NVIDIA L40", None),
])
def test_devices_by_their_drivers_names(device: str, name: str | None) -> None:
    found = accelerator_of_device(device)
    assert (found and found.name) == name
