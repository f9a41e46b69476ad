"""The settings of one engine's scheduler, as they travel in vLLM's `additional_config["headrace"]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.model.profiles import load_profile
from scheduler.thresholds import Thresholds, parse_thresholds, shortened
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import NO_SLO, Slo

SETTINGS_KEY = "headrace"
EXPECTED_OUTPUT_TOKENS = "expected_output_tokens"
"""The key under which a request declares its output length (`SamplingParams.extra_args`, OpenAI `vllm_xargs`)."""

TENANT, TENANT_WEIGHT = "headrace_tenant", "headrace_weight"
"""The keys of the same place in which the ingress writes the tenant of a request and the tenant's weight."""
TURNED_AWAY = "headrace_turned_away"
"""The key of the same place for the requests that the ingress has rejected itself before this one."""
LONGEST_TENANT_NAME, LARGEST_TENANT_WEIGHT = 64, 1000.0
_DEFAULTS = TuningSettings()


class ControllerSettings(BaseModel):
    """How a controller tunes engines, the cluster's or an engine's own.

    enabled: whether there is a controller; without one the configured thresholds hold, and targets are an error.
    period_s: seconds between two control cycles;
    profile: the iteration-time model to start from, by a preset's name or a JSON file's path; it must fit the model and
    the device. Empty: an engine that knows its device estimates it, under plain vLLM else it is measured first; in a
    cluster a profile is required where `accelerator_type` names no known accelerator.
    min_finished: finished requests before an engine's thresholds are changed; window_s: seconds of arrivals that count;
    validity_s: seconds that pushed thresholds stay active without the controller; overflow_probability: accepted
    probability that memory overflows or that a request misses its TPOT target.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    period_s: float = Field(default=5.0, gt=0, le=3600, allow_inf_nan=False)
    profile: str = ""
    min_finished: int = Field(default=_DEFAULTS.min_finished, ge=1)
    window_s: float = Field(default=_DEFAULTS.window_s, gt=0, allow_inf_nan=False)
    validity_s: float = Field(default=_DEFAULTS.validity_s, gt=0, allow_inf_nan=False)
    overflow_probability: float = Field(default=_DEFAULTS.overflow_probability, gt=0, le=0.5)

    @field_validator("profile")
    @classmethod
    def _profile_exists(cls, name: str) -> str:
        if name:
            load_profile(name)
        return name

    def settings(self, targets: Slo) -> TuningSettings:
        """How an engine is tuned for these targets."""
        return TuningSettings(
            window_s=self.window_s, min_finished=self.min_finished, overflow_probability=self.overflow_probability,
            validity_s=self.validity_s, targets=targets,
        )


class LiveSettings(BaseModel):
    """The settings that may change while an engine runs; `scheduler.wire` carries them to it.

    thresholds: active until others are pushed, and when those lapse.
    targets: the latency targets. profile: the iteration-time model of the first fluid parameters; None: that of the
        controller. overflow_probability: accepted probability that memory overflows or that a request misses its TPOT
        target.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    thresholds: Thresholds = Field(default_factory=Thresholds)
    profile: str | None = None
    targets: Slo = NO_SLO
    overflow_probability: float = Field(default=ACCEPTED_MISSES, gt=0, le=0.5)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the inverse of `parse`."""
        return self.model_dump(mode="json")

    @classmethod
    def reported(cls, raw: Mapping[str, Any]) -> Self:
        """The settings in an engine's report; a later release may say more."""
        return cls.model_validate(raw, extra="ignore")

    def tuning(self, controller: TuningSettings) -> TuningSettings:
        """How a controller with these settings tunes an engine in which ours are in force."""
        return replace(controller, targets=self.targets, overflow_probability=self.overflow_probability)

    @classmethod
    def parse(cls, raw: Any, where: str) -> Self:
        """The settings in a decoded JSON object; `where` names it in errors.

        Raises:
            ValueError: naming the key, the value and what is allowed.
        """
        if not isinstance(raw, dict):
            raise ValueError(f"{where} = {shortened(raw)} is not allowed; allowed: an object")
        if "thresholds" in raw and not isinstance(raw["thresholds"], Thresholds):
            raw = raw | {"thresholds": parse_thresholds(raw["thresholds"])}
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            allowed = ", ".join(cls.model_fields)
            raise ValueError(
                f"{where}.{key} = {shortened(first['input'])}: {first['msg']}; the keys are {allowed}"
            ) from error


class SchedulerSettings(LiveSettings):
    """One engine's settings.

    channel: the control endpoint of the replica that owns this engine; ranks above 0 derive theirs from it
        (`rank_endpoint`). None: the engine has a controller process of its own (`scheduler.alone`).
    controller: that process's settings; None: there is none, and the caller sets the thresholds; for simulation.
    allow_strict: allow the paper's strict mode, which may starve requests; for simulation only.
    audit_share: share of the requests to be rejected that are served anyway, to measure wrong rejections.
    trust_tenants: every request comes through an ingress that writes its tenant.
    """

    channel: str | None = None
    controller: ControllerSettings | None = ControllerSettings()
    allow_strict: bool = False
    audit_share: float = Field(default=0.005, ge=0, le=1)
    trust_tenants: bool = False

    @property
    def first_profile(self) -> str | None:
        """The profile of the first fluid parameters; None: there is none."""
        return self.profile or (self.controller.profile if self.controller else "") or None

    @property
    def is_tuned_somewhere(self) -> bool:
        """Whether a controller follows the targets: a cluster's, the engine's own, or the caller."""
        return self.channel is not None or self.controller is None or self.controller.enabled

    @property
    def has_own_controller(self) -> bool:
        """Whether the engine starts a controller process; `fcfs` without targets has nothing to tune."""
        enabled = self.controller is not None and self.controller.enabled
        return self.channel is None and enabled and (self.thresholds.policy != "fcfs" or self.targets != NO_SLO)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SchedulerSettings:
        """The settings in vLLM's `additional_config`; the defaults when there are none; errors as `parse`."""
        raw = additional_config.get(SETTINGS_KEY, {}) if isinstance(additional_config, dict) else {}
        return cls.parse(raw, f"additional_config.{SETTINGS_KEY}")

    @property
    def live(self) -> LiveSettings:
        """The part that may change, with what the engine's own controller says where the rest says nothing."""
        given = {name: getattr(self, name) for name in LiveSettings.model_fields} | {"profile": self.first_profile}
        if "overflow_probability" not in self.model_fields_set and self.has_own_controller:
            assert self.controller is not None
            given["overflow_probability"] = self.controller.overflow_probability
        return LiveSettings(**given)
