"""One entry of `llm_configs`: Ray Serve LLM's own keys for one model, and `headrace`, Headrace's settings for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from cluster.settings import ModelSettings
from scheduler.config_errors import Complaint, complaints

WITHOUT_ENGINE = {"engine": "unchecked"}
"""The validation context in which Ray and vLLM are not asked: a machine that only renders charts lacks both."""
_ADAPTERS = "dynamic_lora_loading_path"
_SET_BY_US = "set by Headrace itself; remove it"
_NOT_FOR_USERS: dict[str, dict[str, str]] = {
    "": {"server_cls": _SET_BY_US, "llm_engine": f"{_SET_BY_US}: the engine is vLLM"},
    "engine_kwargs": {
        "scheduler_cls": f"{_SET_BY_US}; a scheduler of your own goes into headrace.scheduler",
        "additional_config": f"{_SET_BY_US}; settings go into headrace",
        "model": f"{_SET_BY_US}; the model goes into model_loading_config",
        "served_model_name": f"{_SET_BY_US}; the name goes into model_loading_config.model_id",
        "async_scheduling": _SET_BY_US,
    },
    "deployment_config": {
        "graceful_shutdown_timeout_s": f"{_SET_BY_US}; it is headrace.drain_s",
        "user_config": f"{_SET_BY_US}; settings go into headrace",
        "placement_group_bundles": "belongs into placement_group_config, as bundles",
        "placement_group_strategy": "belongs into placement_group_config, as strategy",
    },
}
"""By key of an entry ("": the entry itself): the keys inside it that a configuration may not set, and why."""


class _RayObject(BaseModel):
    """An object whose further keys are Ray's to judge."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class ModelLoadingConfig(_RayObject):
    """model_id: the name clients use; model_source: a local folder (relative to the working directory), a hub id, or
    Ray's description of a bucket; model_id when missing."""

    model_id: str = Field(min_length=1)
    model_source: str | dict[str, Any] | None = None


class LLMEntry(_RayObject):
    """One model. What is not named here is checked by Ray's `LLMConfig`, and everything but `headrace` goes to it.

    model_loading_config: the model's name and where it is. engine_kwargs: vLLM's engine arguments by their Python
    names. deployment_config: options of Serve's deployment, such as num_replicas. headrace: Headrace's settings of this
    model alone, which go before those of all models.
    """

    model_loading_config: ModelLoadingConfig
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    deployment_config: dict[str, Any] = Field(default_factory=dict)
    headrace: ModelSettings = ModelSettings()

    @model_validator(mode="before")
    @classmethod
    def _from_other_forms(cls, value: Any) -> Any:
        """As Ray takes them: the path of a YAML file with the entry, or an LLMConfig object."""
        if isinstance(value, str):
            try:
                return yaml.safe_load(Path(value).read_text())
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"no entry can be read there: {error}") from error
        return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value

    @model_validator(mode="after")
    def _keys_are_for_users(self) -> Self:
        if found := list(self._refused()):
            raise complaints("LLMEntry", found)
        return self

    @model_validator(mode="after")
    def _ray_and_vllm_take_it(self, info: ValidationInfo) -> Self:
        if info.context != WITHOUT_ENGINE:
            from cluster.ray_llm import judge

            if found := list(judge(self.own, never={"server_cls"}, beside=("headrace",))):
                raise complaints("LLMEntry", found)
        return self

    def _refused(self) -> Iterator[Complaint]:
        for key, refused in _NOT_FOR_USERS.items():
            given: dict[str, Any] = (getattr(self, key) if key else self.model_extra) or {}
            path = (key,) if key else ()
            for inner, why in refused.items():
                if inner in given and (inner, given[inner]) != ("llm_engine", "vLLM"):
                    yield Complaint((*path, inner), why)

    @property
    def model_id(self) -> str:
        """The name clients use."""
        return self.model_loading_config.model_id

    @property
    def own(self) -> dict[str, Any]:
        """Ray's keys as they were written; a folder of LoRA adapters by the address that Ray's own check lets pass."""
        own = self.model_dump(exclude={"headrace"}, exclude_unset=True)
        adapters = own["lora_config"].get(_ADAPTERS) if isinstance(own.get("lora_config"), dict) else None
        if isinstance(adapters, str) and adapters.startswith("file:///"):
            own["lora_config"][_ADAPTERS] = f"pyarrow-{adapters}"
        return own

    @property
    def local_folder(self) -> Path | None:
        """The folder that the source names when it looks like a path (./, ../, /, ~, .models/…); None otherwise."""
        source = self.model_loading_config.model_source
        return Path(source).expanduser() if isinstance(source, str) and source.startswith((".", "/", "~")) else None
