"""What Ray Serve LLM and vLLM say about an entry of `llm_configs`, as complaints with a place in the file.

Ray reports some mistakes inside others, and lets unknown deployment options and engine arguments pass until a replica
starts; here each is found, with its key, before anything starts. On a machine without Ray or vLLM, which only renders
charts, nothing is found. A broken installation raises anything when imported, which `headrace doctor` names.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from scheduler.config_errors import Complaint, Place, described, did_you_mean


def judge(entry: Mapping[str, Any], never: Collection[str], beside: Collection[str]) -> Iterator[Complaint]:
    """What is wrong with an entry's keys. Nothing is, where Ray Serve LLM cannot be imported.

    never: Ray's keys that a configuration may not have; beside: further keys that it may have.
    """
    try:
        from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    except Exception:
        return
    allowed = [*(key for key in LLMConfig.model_fields if key not in never), *beside]
    for key in entry.keys() - allowed:
        yield Complaint((key,), f"no such key; allowed here: {', '.join(allowed)}{did_you_mean(key, allowed)}")
    yield from _unknown(entry, "engine_kwargs", engine_argument_names(), "engine argument of vLLM")
    yield from _unknown(entry, "deployment_config", _deployment_options(), "option of a Ray Serve deployment")
    try:
        LLMConfig.model_validate({key: value for key, value in entry.items() if key in allowed})
    except ValidationError as error:
        yield from _of_ray(error, LLMConfig, ())


def hardware_kind(entry: Mapping[str, Any]) -> str:
    """cpu, gpu or tpu: what a valid entry's replicas run on, as Ray infers it. Where Ray is not installed, what the
    entry says, else gpu, Ray's default."""
    try:
        from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    except Exception:
        return str((entry.get("accelerator_config") or {}).get("kind", "gpu"))
    return str(LLMConfig.model_validate(dict(entry)).accelerator_config.kind)


@cache
def engine_argument_names() -> tuple[str, ...]:
    """The keys that `engine_kwargs` may have; none where vLLM is not installed (a laptop that only plans)."""
    try:
        from ray.llm._internal.serve.engines.vllm.vllm_models import AsyncEngineArgs, FrontendArgs
    except Exception:
        return ()
    return tuple(field.name for kind in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(kind))


def _deployment_options() -> tuple[str, ...]:
    from ray import serve

    return tuple(name for name in inspect.signature(serve.deployment).parameters if not name.startswith("_"))


def _unknown(entry: Mapping[str, Any], key: str, known: tuple[str, ...], what: str) -> Iterator[Complaint]:
    for name in entry.get(key, {}):
        if known and name not in known:
            yield Complaint((key, name), f"no {what}{did_you_mean(name, known)}")


def _of_ray(error: ValidationError, model: type[BaseModel], place: Place) -> Iterator[Complaint]:
    """Ray's errors; one that hides another model's errors is replaced by those."""
    for item in error.errors(include_url=False):
        inner = getattr(item.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(inner, ValidationError):
            yield from _of_ray(inner, _part(str(item["loc"][-1])), (*place, *item["loc"]))
        else:
            found = described(item, model, place)
            if found.place[-1:] == ("dynamic_lora_loading_path",):
                schemes = "file:///, s3://, gs://, abfss:// or azure://"
                found = dataclasses.replace(found, message=f"not an address of LoRA adapters; allowed: {schemes}")
            yield found


def _part(key: str) -> type[BaseModel]:
    """Ray's model of the object under a key of an entry."""
    from ray.llm._internal.serve.core.configs import llm_config
    from ray.serve._private.config import DeploymentConfig

    parts = {
        "model_loading_config": llm_config.ModelLoadingConfig, "lora_config": llm_config.LoraConfig,
        "deployment_config": DeploymentConfig,
    }
    part: type[BaseModel] = parts.get(key, llm_config.LLMConfig)
    return part
