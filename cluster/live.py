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
    """What settings may be, judged as a configuration file is. engine_kwargs: of each model, by its name."""

    engine_kwargs: Mapping[str, dict[str, Any]]

    def changed(self, model_id: str, present: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
        """The present settings of a model with a change of the fields that it names; null takes a field's default.

        Raises:
            ValueError: in a sentence, the field, its value and what is allowed.
        """
        if engine := OF_THE_ENGINE & change.keys():
            raise ValueError(f"{', '.join(engine)} is part of the engine: change it in the configuration and deploy it")
        try:
            settings = ModelSettings.model_validate(overridden(present, change))
        except ValidationError as error:
            raise ValueError(describe(error, ModelSettings)) from error
        if why := unfit(self.engine_kwargs[model_id], settings):
            raise ValueError(why)
        return live_settings(settings)

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with every default written out."""
        return complete_settings(ModelSettings.model_validate(settings))
