"""Starts the controller, from any ingress replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.controller import IDLE_PERIOD_S, ControllerActor
from cluster.settings import ModelSettings
from cluster.tuned import TunedModel
from replicas import logs
from replicas.controller_calls import NAMESPACE, controller_name

_MOST_CALLS = 100_000
"""Reports of replicas under way at once; each is stored and answered without waiting."""


@dataclass(frozen=True, slots=True)
class ControllerKeeper:
    """Starts the controller from an ingress replica unless it exists; safe to run in several replicas at once.

    models: by deployment; at least one has its controller enabled.
    """

    models: Mapping[str, TunedModel]

    @property
    def check_every_s(self) -> float:
        """Seconds between two checks: a lost controller is replaced within two of its periods."""
        periods_s = [
            model.settings.controller.period_s for model in self.models.values() if model.settings.controller.enabled
        ]
        return max(0.5, min(periods_s, default=IDLE_PERIOD_S) / 2)

    def with_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> ControllerKeeper:
        """The same, with the settings of the models by name, as `cluster.live.live_settings` writes them."""
        return ControllerKeeper({
            name: replace(one, settings=ModelSettings.model_validate(settings[one.served.model_id]))
            if one.served.model_id in settings else one
            for name, one in self.models.items()
        })

    def ensure(self, app_name: str) -> ActorHandle:
        """The controller of an application, started if there is none.

        The ingress replica that starts it owns it, so the controller ends with the application.
        """
        remote = ray.remote(ControllerActor)
        actor = remote.options(
            name=controller_name(app_name), namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=-1,
            max_concurrency=_MOST_CALLS,
        ).remote(app_name, self.models, logs.form())
        actor.keep_running.remote()
        return actor
