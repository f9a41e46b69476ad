"""The configuration: one YAML file that `headrace up`, `serve deploy` and KubeRay all read.

The file is Ray Serve's own deployment file with one application; its `args` are an `AppConfig`; `ray` beside it says
which Ray cluster `headrace up` joins or starts. Every object forbids unknown keys, so a typo is an error with a name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from router.tenants import TenantConfig
from scheduler.config_errors import UsageError, describe, did_you_mean
from scheduler.model.profiles import load_profile, profile_names
from scheduler.settings import ControllerSettings
from scheduler.support import EngineSetup, require_supported
from scheduler.thresholds import Thresholds, parse_thresholds
from scheduler.tuning.slo import NO_SLO, Slo, require_reachable

APP_NAME = "headrace"
IMPORT_PATH = "headrace:build"
SCHEDULER = "headrace.HeadraceScheduler"
_OURS_TO_SET = ("scheduler_cls", "additional_config", "model", "async_scheduling")
_WITHOUT_VLLM = {"engine": "unchecked"}


class ConfigError(UsageError):
    """The configuration cannot be used; the message names the key, the value and what is allowed."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """id: the name clients use; source: a local folder (relative to the working directory) or a hub id."""

    id: str = Field(min_length=1)
    source: str = Field(min_length=1)

    @property
    def local_folder(self) -> Path | None:
        """The folder that `source` names when it looks like a path (./, ../, /, ~, .models/…); None for a hub id."""
        return Path(self.source).expanduser() if self.source.startswith((".", "/", "~")) else None


class AcceleratorConfig(_Strict):
    """kind: cpu or gpu; type: Ray's accelerator type such as A100 (optional); cpus: CPU cores a replica reserves."""

    kind: Literal["cpu", "gpu"]
    type: str | None = None
    cpus: float = Field(default=1.0, ge=0)


class ControllerConfig(ControllerSettings):
    """The central controller: see `ControllerSettings`; its profile is required."""

    profile: str = Field(default="", validate_default=True)

    @field_validator("profile")
    @classmethod
    def _profile_exists(cls, name: str) -> str:
        if not name:
            raise ValueError(
                "name the profile of this model on this device; its iteration times are used until the engine's "
                f"own are measured: {', '.join(profile_names())}, or the path of a profile's JSON file; measure one "
                "with python benchmarks/measure_law.py --model MODEL --name NAME"
            )
        load_profile(name)
        return name


def _thresholds(value: Any) -> Any:
    return parse_thresholds(value) if isinstance(value, dict) else value


class AppConfig(_Strict):
    """Arguments of the Serve application.

    targets: the SLO in seconds (ttft_s, tpot_s, latency_s), each optional; replicas: number of
    replicas; engine: vLLM engine arguments by their own names; thresholds: active until the controller pushes its own;
    scheduler: each engine's scheduler class, as for vLLM's --scheduler-cls; it may be a subclass of `HeadraceScheduler`
    with another policy (examples/own_policy.py); tenants: weighted shares of the replicas, one API key each; env:
    environment variables of the replicas.
    """

    model: ModelConfig
    replicas: int = Field(default=1, ge=1, le=1024)
    accelerator: AcceleratorConfig
    engine: dict[str, Any] = Field(default_factory=dict)
    targets: Slo = NO_SLO
    thresholds: Annotated[Thresholds, BeforeValidator(_thresholds)] = Thresholds()
    scheduler: str = Field(default=SCHEDULER, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    controller: ControllerConfig = Field(default_factory=dict, validate_default=True)
    tenants: tuple[TenantConfig, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    max_ongoing_requests: int = Field(default=1024, ge=1)

    @field_validator("engine")
    @classmethod
    def _engine_keys(cls, engine: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for key in engine:
            if key in _OURS_TO_SET:
                raise ValueError(f"{key} is set by Headrace itself; remove it")
        known = [] if info.context == _WITHOUT_VLLM else _engine_argument_names()
        for key in engine:
            if known and key not in known:
                raise ValueError(f"{key} is not an engine argument of vLLM{did_you_mean(key, known)}")
        return engine

    @field_validator("thresholds")
    @classmethod
    def _for_serving(cls, thresholds: Thresholds) -> Thresholds:
        thresholds.check_serves()
        return thresholds

    @field_validator("tenants")
    @classmethod
    def _tenants_differ(cls, tenants: tuple[TenantConfig, ...]) -> tuple[TenantConfig, ...]:
        for field in ("name", "api_key_env"):
            values = [getattr(tenant, field) for tenant in tenants]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two tenants have {field} = {twice!r}; each needs its own")
        return tenants

    @model_validator(mode="after")
    def _supported(self) -> Self:
        setup = EngineSetup.from_engine_args(self.engine, self.targets, controller=self.controller.enabled)
        require_supported(setup, self.thresholds)
        return self

    @model_validator(mode="after")
    def _targets_can_be_met(self) -> Self:
        """Checked against the profile's iteration-time model.

        With speculative decoding TPOT is not checked: the tokens gained per step are not known before a run.
        """
        drafts = EngineSetup.from_engine_args(self.engine, self.targets).speculative_decoding
        targets = dataclasses.replace(self.targets, tpot_s=None) if drafts else self.targets
        require_reachable(targets, load_profile(self.controller.profile).time_model)
        return self


class RayConfig(_Strict):
    """address: "local" starts Ray on this machine and stops it at the end; "auto", host:port or ray://… joins one.
    num_cpus: logical CPU cores of a local Ray (Serve's own actors need a few more than the machine may have)."""

    address: str = "local"
    num_cpus: int = Field(default=8, ge=1)


class HttpOptions(_Strict):
    """Address of the HTTP server, 127.0.0.1 by default."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)


class ApplicationEntry(_Strict):
    """One entry of Serve's `applications`."""

    name: str = APP_NAME
    import_path: str = IMPORT_PATH
    route_prefix: Literal["/"] = "/"
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    args: AppConfig


class ClusterConfig(_Strict):
    """The whole file."""

    ray: RayConfig = Field(default_factory=RayConfig)
    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    http_options: HttpOptions = Field(default_factory=HttpOptions)
    applications: list[ApplicationEntry] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> ApplicationEntry:
        """The one application."""
        return self.applications[0]

    @property
    def base_url(self) -> str:
        """The URL requests go to, as seen from this machine."""
        host = "127.0.0.1" if self.http_options.host in ("0.0.0.0", "::") else self.http_options.host
        return f"http://{host}:{self.http_options.port}"


def load_config(path: Path, *, with_engine: bool = True) -> ClusterConfig:
    """Read and check a configuration file; `with_engine` also checks vLLM's own arguments, which imports vLLM.

    Raises:
        ConfigError: naming the file, the key and what is allowed.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is empty or not a mapping; see configs/local.yaml for an example")
    try:
        return ClusterConfig.model_validate(data, context=None if with_engine else _WITHOUT_VLLM)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, ClusterConfig)}") from error


def _engine_argument_names() -> list[str]:
    """vLLM's engine arguments; empty where vLLM is not installed (a laptop that only plans or renders charts)."""
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
    except ImportError:
        return []
    return [field.name for field in dataclasses.fields(AsyncEngineArgs)]
