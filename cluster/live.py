"""The live part of a configuration: settings that change while everything runs, as Serve's `user_config` carries them.

    ingress             {"tenants": […], "models": {MODEL_ID: settings}}
    a model's replicas  settings

Settings are `ModelSettings` without `scheduler`, which is part of the engine, and without defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cluster.config import AppConfig, unfit
from cluster.settings import ModelSettings, overridden
from scheduler.config_errors import describe

OF_THE_ENGINE = {"scheduler"}
"""Settings that need a new engine."""
_DEPLOYED = OF_THE_ENGINE | {"drain_s"}
"""Settings that only a deployment changes; Serve itself waits for `drain_s`."""
_NOT_TUNED = (
    "controller.enabled = true is not allowed: automatic tuning is off for all models in the configuration, so no "
    "controller runs; turn it on there and deploy it"
)


def live_settings(settings: ModelSettings) -> dict[str, Any]:
    """The live part of one model's settings, as JSON."""
    return settings.model_dump(mode="json", exclude=OF_THE_ENGINE, exclude_defaults=True)


def complete_settings(settings: ModelSettings) -> dict[str, Any]:
    """The live part of one model's settings with every default written out, as JSON."""
    return settings.model_dump(mode="json", exclude=OF_THE_ENGINE)


def ingress_user_config(args: AppConfig) -> dict[str, Any]:
    """What the ingress is told."""
    models = {entry.model_id: live_settings(args.settings_of(entry.model_id)) for entry in args.llm_configs}
    tenants = [tenant.model_dump(mode="json", exclude_defaults=True) for tenant in args.headrace.tenants]
    return {"tenants": tenants, "models": models}


@dataclass(frozen=True, slots=True)
class SettingsJudge:
    """What settings may be, judged as a configuration file is. engine_kwargs: of each model, by its name.
    has_controller: whether the application was deployed with one."""

    engine_kwargs: Mapping[str, dict[str, Any]]
    has_controller: bool = True

    def changed(self, model_id: str, present: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
        """The present settings of a model with a change of the fields that it names; null takes a field's default.

        Raises:
            ValueError: in a sentence, the field, its value and what is allowed.
        """
        if deployed := _DEPLOYED & change.keys():
            raise ValueError(f"{', '.join(deployed)} is set by a deployment: change it in the configuration, deploy it")
        try:
            settings = ModelSettings.model_validate(overridden(present, change))
        except ValidationError as error:
            raise ValueError(describe(error, ModelSettings)) from error
        if settings.controller.enabled and not self.has_controller:
            raise ValueError(_NOT_TUNED)
        if why := unfit(self.engine_kwargs[model_id], settings):
            raise ValueError(why)
        return live_settings(settings)

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with every default written out."""
        return complete_settings(ModelSettings.model_validate(settings))
