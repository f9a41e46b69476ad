"""An iteration-time model and a KV capacity from first principles, where nothing has been measured.

For n_p prompt and n_d decode tokens of a model on t accelerators,

    floor = W/(t·e_w·B) + host + comm        weights W read from memory at bandwidth B
    d0    = layers·launch + host + comm      what an iteration takes that computes
    d2    = F_p/(t·e_c·F) + link             operations F_p of a prompt token at the rate F
    d3    = F_d/(t·e_c·F) + link             of a decode token, with the output projection
    d1    = K/(e_k·B)                        K bytes of KV cache of a token on one accelerator
    comm  = 2·layers·a,   link = 2·layers·2(t−1)/t·bytes/(e_l·L)      0 for t = 1

`comm` and `link` are the two all-reduces that each layer has under tensor parallelism, of the hidden size's numbers for
every token: a start of `a` seconds each, and a ring's traffic over links of L bytes/s. The efficiency factors e, with
their sources and intervals, are `FACTORS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from scheduler.model.accelerators import Accelerator
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.language_model import LanguageModel, language_model
from scheduler.model.profiles import Interval, Profile
from scheduler.model.weight_format import bytes_of_dtype

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM 0.29's default."""
CONTEXT_TOKENS = 2048
"""Tokens of a request in the middle of its life, where none are stated: they decide what a sliding window saves."""
REFERENCE_TOKENS = 32
"""Tokens of the iteration whose experts are read: few leave most experts alone, many reach all."""
_LOGITS_BYTES = 10  # the output projection's 2, and the sampler's copies in 32 bits
_KV_BYTES = {"fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}
_BLOCK_TOKENS = 16


class DoesNotFit(ValueError):
    """The model does not fit on the accelerators; the message says what would."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A number that no data sheet states: its value, its interval, and where it comes from."""

    value: float
    low: float
    high: float
    source: str


FACTORS: Mapping[str, Factor] = {
    "weights": Factor(
        0.70, 0.55, 0.85, "share of the memory bandwidth at which weights are read. Check: Vidur's published linear "
        "layers of Llama-2-7B on an A100 80GB take 9.2 ms for 13.2 GB, 0.70 of 2,039 GB/s",
    ),
    "kv": Factor(
        0.68, 0.55, 0.80, "share of the memory bandwidth at which the KV cache is read. Check: the published laws of "
        "Llama-2-7B on an A100 80GB imply 0.57 (a100-llama2-7b), 0.66 (the paper's) and 0.78 (Vidur's times)",
    ),
    "compute": Factor(
        0.65, 0.45, 0.75, "share of the dense operations a second that the layers reach. Check: Vidur's published "
        "0.0647 ms a token for Llama-2-7B on an A100 80GB is 0.65 of 312 TFLOP/s",
    ),
    "host_s": Factor(
        0.002, 0.0005, 0.004, "seconds of an iteration that the accelerator waits for the host: the 2 ms of the "
        "profile a100-llama2-7b, which is an assumption",
    ),
    "launch_s": Factor(
        44e-6, 20e-6, 80e-6, "seconds of a layer that do not depend on its tokens. Check: Vidur's published linear "
        "layers of Llama-2-7B start at 1.4 ms for 32 layers",
    ),
    "link": Factor(0.70, 0.50, 0.85, "share of a link's bandwidth that an all-reduce reaches: an assumption"),
    "start_s": Factor(12e-6, 6e-6, 30e-6, "seconds before an all-reduce over NVLink moves data: an assumption"),
    "start_pcie_s": Factor(35e-6, 20e-6, 70e-6, "the same over PCIe: an assumption"),
    "overhead_bytes": Factor(
        1.5e9, 0.75e9, 3e9, "bytes of an accelerator for the driver's context, CUDA graphs and communication: an "
        "assumption",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How the engine is started: vLLM's own arguments by name, and the tokens of a typical request in its middle.

    kv_cache_dtype: "auto" (the model's), or fp8. max_num_batched_tokens, max_num_seqs: None: vLLM's own on the
    accelerator. dtype: of weights that are not quantised; None: the config's.
    """

    tensor_parallel: int = 1
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    dtype: str | None = None
    context_tokens: int = CONTEXT_TOKENS


def estimate(config: Mapping[str, Any], on: Accelerator, setup: Setup | None = None, name: str = "") -> Profile:
    """The profile of the model with this `config.json` on these accelerators, with an interval.

    name: of the model, for people.

    Raises:
        UnknownModel: see `language_model`; or a type of KV cache that is not known.
        DoesNotFit: weights and activations leave no room for a KV cache, or heads cannot be divided.
    """
    setup = setup or Setup()
    model = language_model(config, setup.dtype)
    _check(model, setup)
    laws = {end: law(model, on, setup, end) for end in ("value", "low", "high")}
    room = {end: _kv_tokens(model, on, setup, end) for end in ("value", "low", "high")}
    if room["value"] < _BLOCK_TOKENS:
        raise DoesNotFit(_what_would_fit(model, on, setup))
    called = name or f"{model.model_type}-{model.parameters / 1e9:.3g}b"
    return Profile(
        name=f"{on.name}x{setup.tensor_parallel}-{called.rpartition('/')[2].lower()}-estimate",
        description=f"{called} on {setup.tensor_parallel} x {on.description}, estimated: nothing was measured",
        time_model=laws["value"], kv_capacity_tokens=room["value"],
        provenance=tuple(_provenance(model, on, setup)),
        interval=Interval(laws["low"], laws["high"], max(_BLOCK_TOKENS, room["high"]), room["low"]),
    )


def law(model: LanguageModel, on: Accelerator, setup: Setup, end: str = "value") -> IterationTimeModel:
    """The iteration-time model. end: "low" and "high" are the shortest and longest seconds within the interval."""
    times = setup.tensor_parallel
    bandwidth, flops = on.memory_bytes_per_s, on.bf16_flops
    if model.weights.eight_bit_compute and on.fp8_flops:
        flops = on.fp8_flops
    # A share that is high makes the time low.
    other = {"value": "value", "low": "high", "high": "low"}[end]
    weights, kv, compute, link = (getattr(FACTORS[name], other) for name in ("weights", "kv", "compute", "link"))
    start = FACTORS["start_pcie_s" if on.link == "PCIe" else "start_s"]
    host_s, launch_s, start_s = (getattr(one, end) for one in (FACTORS["host_s"], FACTORS["launch_s"], start))
    tokens = {"value": REFERENCE_TOKENS, "low": 1, "high": math.inf}[end]
    comm_s = link_s = 0.0
    if times > 1:
        comm_s = 2 * model.layers * start_s
        traffic = 2 * (times - 1) / times * model.hidden * model.dtype_bytes
        link_s = 2 * model.layers * traffic / (link * on.link_bytes_per_s)
    rate = times * compute * on.compute_share * flops
    prompt = 2.0 * model.parameters_per_token + model.attention_flops_per_token(setup.context_tokens)
    decode = 2.0 * (model.parameters_per_token + model.head)
    return IterationTimeModel(
        d0_s=model.layers * launch_s + host_s + comm_s,
        d1_s_per_kv_token=_kv_bytes(model, setup) / (kv * bandwidth),
        d2_s_per_prefill_token=prompt / rate + link_s,
        d3_s_per_decode_token=decode / rate + link_s,
        floor_s=model.read_bytes(tokens) / (times * weights * bandwidth) + host_s + comm_s,
    )


def _kv_bytes(model: LanguageModel, setup: Setup) -> float:
    """Bytes that one token takes in the KV cache of one accelerator."""
    if setup.kv_cache_dtype == "auto":
        each = model.weights.kv_bytes or model.dtype_bytes
    elif setup.kv_cache_dtype in _KV_BYTES:
        each = _KV_BYTES[setup.kv_cache_dtype]
    else:
        each = bytes_of_dtype(setup.kv_cache_dtype)
    return model.kv_bytes_per_token(each, setup.tensor_parallel, setup.context_tokens)


def _activation_bytes(model: LanguageModel, on: Accelerator, setup: Setup) -> float:
    """The most that one accelerator needs beside weights: a full iteration's activations, and the sampler's logits."""
    tokens, requests = on.engine_defaults
    tokens, requests = setup.max_num_batched_tokens or tokens, setup.max_num_seqs or requests
    inner = 3 * model.widest / setup.tensor_parallel
    return tokens * (4 * model.hidden + inner) * 2.0 + requests * model.vocabulary * _LOGITS_BYTES


def _kv_tokens(model: LanguageModel, on: Accelerator, setup: Setup, end: str = "value") -> int:
    """(memory × gpu_memory_utilization − weights − activations − overhead) / KV bytes per token.

    end: "low" with the least overhead, so the most tokens; "high" the least.
    """
    overhead = getattr(FACTORS["overhead_bytes"], end)
    left = (
        on.memory_bytes * setup.gpu_memory_utilization - model.weight_bytes / setup.tensor_parallel
        - _activation_bytes(model, on, setup) - overhead
    )
    return int(left / _kv_bytes(model, setup))


def _check(model: LanguageModel, setup: Setup) -> None:
    times = setup.tensor_parallel
    if times < 1 or model.heads % times:
        raise DoesNotFit(
            f"tensor parallel {times} does not divide the model's {model.heads} attention heads; allowed: "
            f"{', '.join(str(size) for size in _sizes(model))}"
        )
    if not 0 < setup.gpu_memory_utilization <= 1:
        raise DoesNotFit(f"gpu_memory_utilization is {setup.gpu_memory_utilization}; it must be above 0 and at most 1")
    if setup.context_tokens < 1:
        raise DoesNotFit(f"context_tokens is {setup.context_tokens}; it must be at least 1")


def _sizes(model: LanguageModel) -> list[int]:
    """Degrees of tensor parallelism that divide the heads, in one machine."""
    return [size for size in (1, 2, 4, 8) if model.heads % size == 0]


def _what_would_fit(model: LanguageModel, on: Accelerator, setup: Setup) -> str:
    need = model.weight_bytes / 1e9
    said = (
        f"the weights take {need:.1f} GB and {setup.tensor_parallel} x {on.name} have "
        f"{setup.tensor_parallel * on.memory_bytes * setup.gpu_memory_utilization / 1e9:.1f} GB for them, for "
        "activations and for the KV cache, which leaves no room for the cache"
    )
    larger = [
        size for size in _sizes(model) if size > setup.tensor_parallel
        and _kv_tokens(model, on, replace(setup, tensor_parallel=size)) >= _BLOCK_TOKENS
    ]
    if larger:
        return f"{said}; give a tensor parallel size of at least {larger[0]}"
    return f"{said}; take an accelerator with more memory, or quantised weights"


def _provenance(model: LanguageModel, on: Accelerator, setup: Setup) -> list[str]:
    active = model.parameters_per_token + model.head
    tokens, requests = on.engine_defaults
    experts = ""
    if model.experts:
        experts = (
            f" ({model.experts_per_token} of {model.experts} experts a token; the floor reads those that "
            f"{REFERENCE_TOKENS} tokens reach, {model.read_bytes(REFERENCE_TOKENS) / 1e9:.1f} GB)"
        )
    windows = sum(window is not None for window in model.windows)
    seen = f", {windows} of {model.layers} layers with a window, for requests of {setup.context_tokens} tokens" * bool(
        windows
    )
    used = [
        "weights", "kv", "compute", "host_s", "launch_s", "overhead_bytes",
        *(["link", "start_pcie_s" if on.link == "PCIe" else "start_s"] if setup.tensor_parallel > 1 else []),
    ]
    return [
        "An estimate from first principles by headrace profile estimate (scheduler/model/estimate.py); nothing was "
        "measured. A running engine refines it from its own iterations.",
        f"Model: {model.model_type}, {model.parameters / 1e9:.2f}e9 parameters, {active / 1e9:.2f}e9 of them active"
        f"{experts}, weights {model.weights.name}, {model.weight_bytes / 1e9:.1f} GB.",
        f"KV cache: {_kv_bytes(model, setup) / 1024:.1f} KiB a token on each accelerator"
        f"{' (latent, whole on each)' if model.latent else ''}{seen}, kv_cache_dtype {setup.kv_cache_dtype}.",
        f"Accelerator: {on.source}.",
        f"Engine: tensor parallel {setup.tensor_parallel}, gpu_memory_utilization {setup.gpu_memory_utilization:g}, "
        f"max_num_batched_tokens {setup.max_num_batched_tokens or tokens}, "
        f"max_num_seqs {setup.max_num_seqs or requests}; activations "
        f"{_activation_bytes(model, on, setup) / 1e9:.1f} GB.",
        *(
            f"{name} = {FACTORS[name].value:g} ({FACTORS[name].low:g} to {FACTORS[name].high:g}): "
            f"{FACTORS[name].source}."
            for name in used
        ),
    ]
