"""The configuration: one YAML file that `headrace up`, `serve deploy` and KubeRay all read.

The file is Ray Serve's own deployment file with one application. Its `args` are an `AppConfig`: Ray Serve LLM's own
arguments, and `headrace` beside them; `ray` beside the application says which Ray cluster `headrace up` joins or
starts. Unknown keys are errors with a name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from cluster import haproxy
from cluster.llm_entry import WITHOUT_ENGINE, LLMEntry
from cluster.ports import LOCALHOST
from cluster.ray_environment import prepare
from cluster.settings import PROFILE_MISSING, HeadraceSettings, ModelSettings, Strict, overridden
from router.limits import FOR_ALL
from scheduler.config_errors import Complaint, UsageError, complaints, describe, described
from scheduler.model.accelerators import is_known_to_ray_as
from scheduler.model.profiles import load_profile
from scheduler.support import EngineSetup, UnsupportedSetting, require_supported
from scheduler.tuning.slo import UnreachableTarget, require_reachable

APP_NAME = "headrace"
METRICS_PORT = 8090
IMPORT_PATH = "headrace:build"
_MOVED = {
    "model": "llm_configs[].model_loading_config: {model_id: …, model_source: …}",
    "replicas": "llm_configs[].deployment_config: {num_replicas: …}, or autoscaling_config there",
    "accelerator": "llm_configs[].accelerator_config: {kind: …} and accelerator_type; CPU cores into "
    "deployment_config: {ray_actor_options: {num_cpus: …}}",
    "engine": "llm_configs[].engine_kwargs",
    "env": "llm_configs[].runtime_env: {env_vars: {…}}",
    "max_ongoing_requests": "llm_configs[].deployment_config: {max_ongoing_requests: …}",
    **{key: f"headrace: {{{key}: …}}" for key in ("targets", "thresholds", "scheduler", "controller", "tenants")},
}
"""By key of the short form that was: where its value goes now."""


class ConfigError(UsageError):
    """The configuration cannot be used; the message names the key, the value and what is allowed."""


class AppConfig(Strict):
    """Arguments of the Serve application: those of `ray.serve.llm.build_openai_app`, and `headrace`.

    llm_configs: the models, each described as for Ray Serve LLM; headrace: settings for all of them, which an entry's
    own `headrace` overrides field by field; ingress_deployment_config: options of the ingress deployment.
    """

    llm_configs: list[LLMEntry] = Field(min_length=1)
    headrace: HeadraceSettings = HeadraceSettings()
    ingress_deployment_config: dict[str, Any] = Field(default_factory=dict)
    _settings: dict[str, ModelSettings] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _no_keys_of_the_short_form(cls, value: Any) -> Any:
        given = value if isinstance(value, dict) else {}
        found = [Complaint((key,), f"no such key; its value goes into {_MOVED[key]}") for key in given if key in _MOVED]
        if "ingress_cls_config" in given:
            found.append(Complaint(("ingress_cls_config",), "set by Headrace itself; remove it"))
        if found:
            raise complaints(cls.__name__, found)
        return value

    @model_validator(mode="after")
    def _each_model_s_settings(self) -> Self:
        """Resolve them, and check what they need together."""
        found = list(self._resolve())
        if found:
            raise complaints(type(self).__name__, found)
        return self

    def _resolve(self) -> Iterator[Complaint]:
        self._settings.clear()  # pydantic checks an object again that is validated again
        wrong = self.headrace.limits.wrong_holders(tenant.name for tenant in self.headrace.tenants)
        yield from (Complaint(("headrace", "limits", "keys", name), why) for name, why in wrong.items())
        profiles_missing = False
        for number, entry in enumerate(self.llm_configs):
            place = ("llm_configs", number)
            if entry.model_id in self._settings:
                yield Complaint(
                    (*place, "model_loading_config", "model_id"), "another entry has this name; each needs its own",
                    entry.model_id,
                )
                continue
            for name in sorted(FOR_ALL & entry.headrace.limits.model_fields_set):
                said = "this limit is for all models; it goes into the headrace beside llm_configs"
                yield Complaint((*place, "headrace", "limits", name), said)
            try:
                settings = ModelSettings.model_validate(overridden(self.headrace.given, entry.headrace.given))
            except ValidationError as error:  # each alone is right, but not both together
                yield from (described(item, ModelSettings, (*place, "headrace")) for item in error.errors())
                continue
            self._settings[entry.model_id] = settings
            if settings.controller.profile or _can_be_estimated(entry):
                if why := unfit(entry.engine_kwargs, settings):
                    yield Complaint(place, f"model {entry.model_id}: {why}")
            elif not profiles_missing:
                profiles_missing = True
                yield Complaint(("headrace", "controller", "profile"), PROFILE_MISSING)

    @property
    def drain_s(self) -> float:
        """Seconds in which requests may finish when all models stop: those of the model that allows most."""
        return max(settings.drain_s for settings in self._settings.values())

    def settings_of(self, model_id: str) -> ModelSettings:
        """The settings of one model: the top-level ones, overridden by the model's own."""
        return self._settings[model_id]


def _can_be_estimated(entry: LLMEntry) -> bool:
    """Whether the entry's engines know their device, so that they estimate iteration times themselves."""
    return is_known_to_ray_as(str((entry.model_extra or {}).get("accelerator_type") or ""))


def unfit(engine_kwargs: dict[str, Any], settings: ModelSettings) -> str | None:
    """Settings that the engine does not support, or targets that the profile says no request can meet, in a sentence.

    With speculative decoding TPOT is not checked: the tokens gained per step are not known before a run.
    """
    controlled = settings.controller.enabled
    setup = EngineSetup.from_engine_args(engine_kwargs, settings.targets, controller=controlled)
    drafts = setup.speculative_decoding
    targets = dataclasses.replace(settings.targets, tpot_s=None) if drafts else settings.targets
    try:
        require_supported(setup, settings.thresholds)
        if settings.controller.profile:
            require_reachable(targets, load_profile(settings.controller.profile).time_model)
    except (UnsupportedSetting, UnreachableTarget) as error:
        return str(error)
    return None


class RayConfig(Strict):
    """address: "local" starts Ray on this machine and stops it at the end; "auto", host:port or ray://… joins one.
    num_cpus: logical CPU cores of a local Ray (Serve's own actors need a few more than the machine may have).
    metrics_port: where a local Ray's metrics agent serves /metrics, on 127.0.0.1; a cluster that is joined has its own.
    haproxy: whether a local Ray takes HTTP in through HAProxy, which Ray brings along on Linux, else through Serve's
    own proxy in Python (as always at an http_options.host other than 0.0.0.0, 127.0.0.1 or localhost); on a cluster
    that is joined, its environment says so.
    """

    address: str = "local"
    num_cpus: int = Field(default=8, ge=1)
    metrics_port: int = Field(default=METRICS_PORT, ge=1, le=65535)
    haproxy: bool = True


class HttpOptions(Strict):
    """Where the HTTP server listens.

    host: its address; other machines reach 0.0.0.0, which needs an API key. port: its TCP port.
    """

    host: str = LOCALHOST
    port: int = Field(default=8000, ge=1, le=65535)


class LoggingConfig(Strict):
    """Ray Serve's own key, for all logs of the application.

    encoding: TEXT for people, JSON for programs. log_level: the least that is written. enable_access_log: one line for
    each request.
    """

    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    enable_access_log: bool = False


class ApplicationEntry(Strict):
    """One entry of Serve's `applications`.

    name: the application's name in Serve. import_path: the function that builds it. route_prefix: below which path it
    answers. runtime_env: the environment of its processes, as Ray documents it. args: the models and our settings.
    """

    name: str = APP_NAME
    import_path: str = IMPORT_PATH
    route_prefix: Literal["/"] = "/"
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    args: AppConfig


class ClusterConfig(Strict):
    """The whole file, as `serve deploy` takes it, with `ray` beside it.

    ray: which Ray cluster `headrace up` joins or starts. proxy_location: on which nodes Serve answers HTTP.
    http_options: where it listens. logging_config: how Serve, and we with it, write logs. applications: exactly one.
    """

    ray: RayConfig = Field(default_factory=RayConfig)
    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    http_options: HttpOptions = Field(default_factory=HttpOptions)
    logging_config: LoggingConfig = Field(default_factory=LoggingConfig)
    applications: list[ApplicationEntry] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> ApplicationEntry:
        """The one application."""
        return self.applications[0]

    @property
    def with_haproxy(self) -> bool:
        """Whether a local Ray's Serve takes HTTP in through HAProxy."""
        return self.ray.haproxy and self.http_options.host in haproxy.HOSTS

    @property
    def base_url(self) -> str:
        """The URL requests go to, as seen from this machine."""
        host = "127.0.0.1" if self.http_options.host in ("0.0.0.0", "::") else self.http_options.host
        return f"http://{host}:{self.http_options.port}"


def load_config(path: Path, *, with_engine: bool = True) -> ClusterConfig:
    """Read and check a configuration file; `with_engine` also has Ray and vLLM check their keys, which imports both.

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
    if with_engine:  # the check imports Ray
        ray, http = (data[key] if isinstance(data.get(key), dict) else {} for key in ("ray", "http_options"))
        wanted = ray.get("haproxy", True) is True and http.get("host", LOCALHOST) in haproxy.HOSTS
        prepare(local=ray.get("address", "local") == "local", with_haproxy=wanted)
    try:
        return ClusterConfig.model_validate(data, context=None if with_engine else WITHOUT_ENGINE)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, ClusterConfig)}") from error

