"""The settings of one engine's scheduler, as they travel in vLLM's `additional_config["headrace"]`."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.thresholds import Thresholds, parse_thresholds, shortened
from scheduler.tuning.slo import NO_SLO, Slo

SETTINGS_KEY = "headrace"
EXPECTED_OUTPUT_TOKENS = "expected_output_tokens"
"""The key under which a request declares its output length (`SamplingParams.extra_args`, OpenAI `vllm_xargs`)."""

TENANT, TENANT_WEIGHT = "headrace_tenant", "headrace_weight"
"""The keys of the same place in which the ingress writes the tenant of a request and the tenant's weight."""
TURNED_AWAY = "headrace_turned_away"
"""The key of the same place for the requests that the ingress has rejected itself before this one."""
LONGEST_TENANT_NAME, LARGEST_TENANT_WEIGHT = 64, 1000.0


class LiveSettings(BaseModel):
    """The settings that may change while an engine runs; `scheduler.wire` carries them to it.

    thresholds: active until others are pushed, and when those lapse.
    profile, targets, overflow_probability: the source of the first fluid parameters, when `thresholds` has none (see
        `cold_thresholds`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    thresholds: Thresholds = Field(default_factory=Thresholds)
    profile: str | None = None
    targets: Slo = NO_SLO
    overflow_probability: float = Field(default=ACCEPTED_MISSES, gt=0, lt=1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the inverse of `parse`."""
        return self.model_dump(mode="json")

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

    channel: the control endpoint (None: no live control); ranks above 0 derive theirs from it (`rank_endpoint`).
    allow_strict: allow the paper's strict mode, which may starve requests; for simulation only.
    audit_share: share of the requests to be rejected that are served anyway, to measure wrong rejections.
    trust_tenants: every request comes through an ingress that writes its tenant.
    """

    channel: str | None = None
    allow_strict: bool = False
    audit_share: float = Field(default=0.005, ge=0, le=1)
    trust_tenants: bool = False

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SchedulerSettings:
        """The settings in vLLM's `additional_config`; the defaults when there are none; errors as `parse`."""
        raw = additional_config.get(SETTINGS_KEY, {}) if isinstance(additional_config, dict) else {}
        return cls.parse(raw, f"additional_config.{SETTINGS_KEY}")

    @property
    def live(self) -> LiveSettings:
        """The part that may change."""
        return LiveSettings(**{name: getattr(self, name) for name in LiveSettings.model_fields})
