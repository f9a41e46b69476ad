"""What Ray Serve LLM and vLLM would say about an entry of `llm_configs` is said before anything starts, at its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_app_config import ENTRY, Key, with_value

from cluster.config import ConfigError, load_config

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")


def complaint(tmp_path: Path, key: Key, value: Any) -> str:
    path = tmp_path / "headrace.yaml"
    path.write_text(yaml.safe_dump(with_value(key, value)))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "said", "meant"),
    [
        (("engine_kwrgs",), "no such key; allowed here: runtime_env, model_loading_config", "engine_kwargs"),
        (
            ("model_loading_config", "model_sorce"), "allowed here: model_id, model_source, tokenizer_source",
            "model_source",
        ),
        (("deployment_config", "num_replica"), "no option of a Ray Serve deployment", "num_replicas"),
        (("lora_config", "max_num_adapters"), "allowed here: dynamic_lora", "max_num_adapters_per_replica"),
        (("engine_kwargs", "max_num_seq"), "no engine argument of vLLM", "max_num_seqs"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_typo_is_named_with_what_is_meant(tmp_path: Path, key: Key, said: str, meant: str) -> None:
    message = complaint(tmp_path, (*ENTRY, *key), 1)
    assert f"applications.0.args.llm_configs.0.{'.'.join(map(str, key))}: " in message
    assert said in message
    assert f"did you mean {meant}?" in message


def test_the_keys_of_an_entry_are_ray_s_less_what_we_set_and_ours(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*ENTRY, "unlike_any"), 1)
    allowed = message.partition("allowed here: ")[2].split(", ")
    assert {"accelerator_type", "placement_group_config", "lora_config", "experimental_configs"} <= set(allowed)
    assert "headrace" in allowed and "server_cls" not in allowed


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        (("deployment_config", "num_replicas"), -2, "greater than or equal to 0"),
        (("accelerator_type",), "A1000", "Unsupported accelerator type"),
        (("lora_config", "max_num_adapters_per_replica"), 0, "greater than 0"),
        (("lora_config", "dynamic_lora_loading_path"), "adapters", "file:///, s3://"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(
    tmp_path: Path, key: Key, value: Any, allowed: str
) -> None:
    message = complaint(tmp_path, (*ENTRY, *key), value)
    assert f"llm_configs.0.{'.'.join(map(str, key))} = {value!r}: " in message
    assert allowed in message


def test_keys_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*ENTRY, "accelerator_type"), "A100")
    assert "llm_configs.0: accelerator_type='A100' cannot be used with CPU-only configurations" in message


def test_every_mistake_of_an_entry_is_reported_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, (*ENTRY, "engine_kwargs"), {"max_num_seq": 1, "dtyp": "auto"})
    assert "engine_kwargs.max_num_seq: " in message and "engine_kwargs.dtyp: " in message


def test_ray_checks_an_entry_in_the_places_that_we_look_into() -> None:
    """What `cluster/ray_llm.py` stands on: what of Ray's judges which key, and whose arguments an engine takes."""
    import inspect

    from ray.llm._internal.serve.core.configs import llm_config
    from ray.llm._internal.serve.engines.vllm import vllm_models

    source = inspect.getsource(llm_config.LLMConfig)
    for checked in ("ModelLoadingConfig(**value)", "LoraConfig(**value)", "DeploymentConfig(**value)"):
        assert checked in source
    taken = inspect.getsource(vllm_models.VLLMEngineConfig.from_llm_config)
    assert "dataclasses.fields(FrontendArgs)" in taken and "dataclasses.fields(AsyncEngineArgs)" in taken
