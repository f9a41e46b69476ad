"""The settings of one engine's scheduler, as they travel in vLLM's `additional_config["headrace"]`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scheduler.thresholds import Thresholds, parse_thresholds

SETTINGS_KEY = "headrace"
EXPECTED_OUTPUT_TOKENS = "expected_output_tokens"
"""The key under which a request declares its output length (`SamplingParams.extra_args`, OpenAI `vllm_xargs`)."""


class SchedulerSettings(BaseModel):
    """thresholds: in force until others are pushed; channel: the control endpoint (None: no live control);
    allow_strict: let run what is for simulation only, the paper's literal rule, which may strand requests, and
    `fluid`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    thresholds: Thresholds = Field(default_factory=Thresholds)
    channel: str | None = None
    allow_strict: bool = False

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
