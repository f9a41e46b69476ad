"""The settings of one engine's scheduler, as they travel in vLLM's `additional_config["headrace"]`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scheduler.thresholds import Thresholds, parse_thresholds
from scheduler.tuning.slo import NO_SLO, Slo

SETTINGS_KEY = "headrace"
EXPECTED_OUTPUT_TOKENS = "expected_output_tokens"
"""The key under which a request declares its output length (`SamplingParams.extra_args`, OpenAI `vllm_xargs`)."""

TENANT, TENANT_WEIGHT = "headrace_tenant", "headrace_weight"
"""Under which keys of the same place the ingress says whose a request is, and that tenant's weight."""
LONGEST_TENANT_NAME, LARGEST_TENANT_WEIGHT = 64, 1000.0


class SchedulerSettings(BaseModel):
    """thresholds: in force until others are pushed; profile, targets, overflow_probability: from which the policy
    `fluid` solves its first pace, when the thresholds hold none (see `cold_thresholds`); channel: the control endpoint
    (None: no live control), beside which those of data-parallel ranks above 0 are
    (`scheduler.engine.channel.rank_endpoint`); allow_strict: let run what is for simulation only, the paper's literal
    rule, which may strand requests; audit_share: of the requests to be rejected, those that are served all the same to
    see whether the rejection was right; trust_tenants: every request comes through an ingress that writes its tenant
    itself, so that it is believed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    thresholds: Thresholds = Field(default_factory=Thresholds)
    profile: str | None = None
    targets: Slo = NO_SLO
    overflow_probability: float = Field(default=0.01, gt=0, lt=1)
    channel: str | None = None
    allow_strict: bool = False
    audit_share: float = Field(default=0.005, ge=0, le=1)
    trust_tenants: bool = False

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SchedulerSettings:
        """The settings in vLLM's `additional_config`; the defaults when there are none.

        Raises:
            ValueError: naming the key and what is allowed.
        """
        raw = additional_config.get(SETTINGS_KEY, {}) if isinstance(additional_config, dict) else {}
        if not isinstance(raw, dict):
            raise ValueError(f"additional_config.{SETTINGS_KEY} = {raw!r} is not allowed; allowed: an object")
        if "thresholds" in raw and not isinstance(raw["thresholds"], Thresholds):
            raw = raw | {"thresholds": parse_thresholds(raw["thresholds"])}
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            allowed = ", ".join(cls.model_fields)
            raise ValueError(
                f"additional_config.{SETTINGS_KEY}.{key} = {first['input']!r}: {first['msg']}; the keys are {allowed}"
            ) from error
