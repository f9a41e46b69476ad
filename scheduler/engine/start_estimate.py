"""The iteration-time model of an engine that starts without a profile: an estimate from its own configuration.

Used for its first thresholds, and as the model that its controller refines; where the device or the model is not known,
there is none, and the first iterations are measured instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.model.accelerators import Accelerator, accelerator_of_device
from scheduler.model.estimate import CONTEXT_TOKENS, Setup, law
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.language_model import LanguageModel, language_model


@dataclass(frozen=True, slots=True)
class StartEstimate:
    """time_model: of the whole language model, all pipeline stages; None: there is no estimate. said: what is known of
    the engine and why, for its log."""

    time_model: IterationTimeModel | None
    said: str


NO_ESTIMATE = StartEstimate(None, "")
_MEASURED = "no profile, so the first iterations are measured: {}"


def start_estimate(vllm_config: Any, device_name: str | None = None) -> StartEstimate:
    """The estimate for vLLM's configuration of an engine. device_name: as its driver says it; None: asked of vLLM."""
    name = this_device() if device_name is None else device_name
    device = accelerator_of_device(name)
    if device is None:
        return StartEstimate(None, _MEASURED.format(f"the device {name!r} is not a known accelerator"))
    try:
        model = language_model(_config_of(vllm_config.model_config), str(vllm_config.model_config.dtype))
        setup = _setup(vllm_config, model)
        time_model = law(model, device, setup)
        return StartEstimate(time_model, _said(model, device, setup, time_model, vllm_config))
    except Exception as error:  # an engine starts whatever its model's configuration holds
        return StartEstimate(None, _MEASURED.format(str(error) or type(error).__name__))


def this_device() -> str:
    """The accelerator's name, as vLLM's platform has it; empty where there is none."""
    from vllm.platforms import current_platform

    try:
        return "" if current_platform.is_cpu() else str(current_platform.get_device_name())
    except Exception:  # a platform without names, or one that this process may not ask
        return ""


def _config_of(model_config: Any) -> Mapping[str, Any]:
    """The model's config.json, with the quantisation that vLLM makes at loading where the checkpoint has none."""
    hf_config = model_config.hf_config
    found = dict(hf_config) if isinstance(hf_config, Mapping) else dict(hf_config.to_dict())
    quantised = getattr(model_config, "quantization", None)
    if quantised and not (found.get("quantization_config") or found.get("compression_config")):
        found["quantization_config"] = {"quant_method": str(quantised)}
    return found


def _setup(vllm_config: Any, model: LanguageModel) -> Setup:
    longest = int(vllm_config.model_config.max_model_len)
    return Setup(
        tensor_parallel=int(vllm_config.parallel_config.tensor_parallel_size),
        kv_cache_dtype=_cache_dtype(str(vllm_config.cache_config.cache_dtype)),
        context_tokens=max(1, min(CONTEXT_TOKENS, longest // 2)),
    )


def _cache_dtype(name: str) -> str:
    """fp8_ds_mla and others of their kind are 8-bit too."""
    return "fp8" if name.startswith("fp8") else name


def _said(
    model: LanguageModel, device: Accelerator, setup: Setup, time_model: IterationTimeModel, vllm_config: Any
) -> str:
    blocks = vllm_config.cache_config.num_gpu_blocks or 0
    return (
        f"no profile: iteration times are estimated for {model.parameters / 1e9:.3g}e9 parameters on "
        f"{setup.tensor_parallel} x {device.description} (at least {1000 * time_model.floor_s:.1f} ms, "
        f"{1e6 * time_model.d2_s_per_prefill_token:.0f} us a prompt token), weights of "
        f"{model.weight_bytes / setup.tensor_parallel / 1e9:.1f} GB on each, a KV cache of {blocks} blocks of "
        f"{vllm_config.cache_config.block_size} tokens; refined while it serves"
    )
