"""The `headrace` object of a configuration: what Headrace adds to Ray Serve LLM's own keys.

It stands at the top level, for all models, and in an entry of `llm_configs`, for that model alone. `overridden` puts
the two together, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from replicas.engine_health import ENGINE_TIMEOUT_S
from router.limits import MAX_WAIT_S, Limits
from router.tenants import TenantConfig
from scheduler.model.profiles import profile_names
from scheduler.settings import ControllerSettings
from scheduler.thresholds import Thresholds, parse_thresholds
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import NO_SLO, Slo
from scheduler.tuning.wanted_replicas import ScalingTerms

SCHEDULER = "headrace.HeadraceScheduler"
PROFILE_MISSING = (
    "name the profile of this model on this device; its iteration times are used until the engine's own are measured "
    "(they are estimated without one where accelerator_type names a known accelerator): "
    f"{', '.join(profile_names())}, or the path of a profile's JSON file; compute one with "
    "headrace profile estimate, or measure one with headrace profile measure"
)
_OF_ALL_MODELS = ("tenants", "tracing")
LONGEST_DRAIN_S = 86_400.0
INGRESS_OUTLASTS_S = 15.0
"""An ingress stops so much later than the replicas whose last answers it passes on."""
_TERMS = ScalingTerms()


class Strict(BaseModel):
    """A part of the configuration: unknown keys are errors, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ControllerConfig(ControllerSettings):
    """The central controller, which tunes every replica.

    Its profile is required unless the entry's accelerator_type is one whose iteration times can be estimated.
    """

    @field_validator("profile")
    @classmethod
    def _profile_named(cls, name: str) -> str:
        if not name:
            raise ValueError(PROFILE_MISSING)
        return name


class AutoscalingSettings(Strict):
    """How many replicas the controller wants; Ray Serve follows where a model has an `autoscaling_config`.

    late_costs_requests: a request that is late or rejected costs as much as serving so many; one more replica pays
    while the load exceeds what the others take with a probability above 1 / late_costs_requests. start_up_s: seconds
    until a replica that is asked for serves, until that has been measured.
    """

    late_costs_requests: float = Field(default=_TERMS.late_costs_requests, gt=1, le=1e6, allow_inf_nan=False)
    start_up_s: float = Field(default=_TERMS.start_up_s, gt=0, le=7200, allow_inf_nan=False)

    def terms(self) -> ScalingTerms:
        """As the decision takes them."""
        return ScalingTerms(late_costs_requests=self.late_costs_requests, start_up_s=self.start_up_s)


def _thresholds(value: Any) -> Any:
    return parse_thresholds(value) if isinstance(value, dict) else value


class ModelSettings(Strict):
    """Settings of one model.

    targets: the SLO in seconds (ttft_s, tpot_s, latency_s), each optional.
    thresholds: active until the controller pushes its own, `policy` among them.
    controller: how thresholds are tuned.
    autoscaling: how many replicas the controller wants.
    scheduler: each engine's scheduler class, as for vLLM's --scheduler-cls; it may be a subclass of `HeadraceScheduler`
        with another policy (examples/own_policy.py).
    limits: what one request, and one API key, may ask for.
    drain_s: seconds in which a replica that leaves may finish its requests.
    engine_timeout_s: seconds without progress after which an engine that has requests is replaced; 12 times as many in
        its first iterations, which may compile kernels.
    max_wait_s: seconds a request may wait for its first token when no target bounds it; null: without end.
    """

    targets: Slo = NO_SLO
    thresholds: Annotated[Thresholds, BeforeValidator(_thresholds)] = Thresholds()
    scheduler: str = Field(default=SCHEDULER, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    controller: ControllerConfig = ControllerConfig()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    limits: Limits = Limits()
    drain_s: float = Field(default=600.0, ge=0, le=LONGEST_DRAIN_S, allow_inf_nan=False)
    engine_timeout_s: float = Field(default=ENGINE_TIMEOUT_S, gt=0, le=3600, allow_inf_nan=False)
    max_wait_s: float | None = Field(default=MAX_WAIT_S, gt=0, allow_inf_nan=False)
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_given(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        settings = handler(value)
        settings._given = dict(value) if isinstance(value, Mapping) else settings.model_dump(exclude_unset=True)
        return settings

    @field_validator("thresholds")
    @classmethod
    def _for_serving(cls, thresholds: Thresholds) -> Thresholds:
        thresholds.check_serves()
        return thresholds

    @property
    def given(self) -> Mapping[str, Any]:
        """The keys that were written, without defaults."""
        return self._given

    def tuning(self) -> TuningSettings:
        """How the controller tunes a replica of this model."""
        return self.controller.settings(self.targets)


class TracingSettings(Strict):
    """OpenTelemetry.

    otlp_endpoint: of a collector, OTLP over gRPC, http://HOST:4317; null: nothing is traced.
    sampling_ratio: share of the requests that are traced, where a request brings no decision of its own (W3C
    `traceparent`).
    """

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]+$")
    sampling_ratio: float = Field(default=1.0, ge=0, le=1)


class HeadraceSettings(ModelSettings):
    """The top-level object: `ModelSettings` for all models, the tenants, and tracing; both at the top level only.

    tenants: weighted shares of the replicas, with one API key each. tracing: whether requests are traced, and where to.
    """

    tenants: tuple[TenantConfig, ...] = ()
    tracing: TracingSettings = TracingSettings()

    @field_validator("tenants")
    @classmethod
    def _tenants_differ(cls, tenants: tuple[TenantConfig, ...]) -> tuple[TenantConfig, ...]:
        for field in ("name", "api_key_env", "api_key_file"):
            values = [value for tenant in tenants if (value := getattr(tenant, field)) is not None]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two tenants have {field} = {twice!r}; each needs its own")
        return tenants


def overridden(general: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The written settings of one model: the general ones, with each field that `own` names in its place.

    Fields of objects (`targets`, `controller` …) count one by one; `thresholds` that name a policy are taken whole, as
    thresholds of one policy mean nothing to another.
    """
    merged = dict(general)
    for key, value in own.items():
        whole = key == "thresholds" and "policy" in value
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = dict(merged[key]) | dict(value) if both and not whole else value
    for key in _OF_ALL_MODELS:
        merged.pop(key, None)
    return merged
