"""Start and stop an application: on a local Ray started for it, or on a running cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import haproxy
from cluster.config import ApplicationEntry, ClusterConfig, ConfigError
from cluster.joining import is_refusal, use_the_user_s_token, why_not_joined
from cluster.keys import NOT_OPENED, require_key_beyond_loopback
from cluster.model import BUNDLED_MODEL_NAME, is_prepared, prepare_bundled_model
from cluster.ports import LOCALHOST, free_port, port_is_free
from cluster.processes import ends_within
from cluster.ray_environment import prepare, use
from cluster.run_folder import RunFolder, clear_stale, folder_for, running_note
from cluster.shutdown import finish_requests, stop_local_ray

READY_TIMEOUT_S = 600.0
_STOP_S = 90.0
"""Bound on a stop once its requests have ended."""
_REMEMBER_EVERY_S = 10.0
_HEARD_S = 1.0
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("headrace", "cluster", "router", "replicas", "scheduler", "simulator", "loadgen")


class LaunchError(RuntimeError):
    """The application could not be brought up or down; the message says what to do."""


def curl_line(config: ClusterConfig) -> str:
    """A curl command for a chat request."""
    body = json.dumps(
        {
            "model": config.application.args.llm_configs[0].model_id,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 24,
            "temperature": 0,
        }
    )
    return f"curl -s {config.base_url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def prepare_model(config: ClusterConfig, say: Callable[[str], None]) -> None:
    """Write the bundled model where the configuration expects it, when that is what it names.

    Raises:
        ConfigError: a model is a local path that does not exist.
        ModelUnavailable: the bundled model's package is missing.
    """
    for entry in config.application.args.llm_configs:
        source = entry.local_folder
        if source is None:
            continue
        if source.name == BUNDLED_MODEL_NAME:
            if not is_prepared(source):
                say(f"preparing {BUNDLED_MODEL_NAME} in {source} (once, about half a minute)")
                prepare_bundled_model(source)
        elif not source.exists():
            raise ConfigError(
                f"model_loading_config.model_source = {str(source)!r} of {entry.model_id} does not exist; "
                "allowed: a folder, or a hub id ORG/NAME"
            )


class Launcher:
    """One application on one Ray: `start`, then `wait` in the foreground or leave, then `stop`.

    progress: called with one line at each change of state; folder: of a Ray of its own. insecure: other machines may
    reach it without an API key. running_at: the address of a local Ray that another process started for this
    application; `start` then updates it.
    whats_new: after `start`, what it changed of what ran before; empty if nothing ran.
    """

    def __init__(
        self, config: ClusterConfig, progress: Callable[[str], None], folder: RunFolder | None = None, *,
        insecure: bool = False, running_at: str | None = None,
    ) -> None:
        self._config, self._say, self._folder, self._insecure = config, progress, folder, insecure
        self._running_at = running_at
        self.whats_new: list[str] = []
        self._serves = False

    @property
    def owns_ray(self) -> bool:
        """True when Ray is started, and stopped, with the application."""
        return self._config.ray.address == "local" and self._running_at is None

    def start(self) -> None:
        """Start (or join) Ray, deploy, and return once a replica answers.

        Raises:
            LaunchError: the port is taken, the cluster cannot be reached, the deployment failed, or other machines
                could use it without an API key.
        """
        options = self._config.http_options
        self._require_key(options.host)
        if self.owns_ray:
            _require_free(options.host, options.port, "http_options.port")
            _require_free(LOCALHOST, self._config.ray.metrics_port, "ray.metrics_port")
        if self.owns_ray and self._config.with_haproxy:
            folder = None if self._folder is None else self._folder.hold_haproxy()
            use(haproxy.environment(folder, [free_port(""), free_port("")]))
        prepare(local=self._config.ray.address == "local", with_haproxy=self._config.with_haproxy)
        if self._folder is not None:
            self._folder.hold_temporary_files()
        logging.disable(logging.WARNING)  # in this process; replicas and engines write their own files
        import ray
        from ray import serve

        from cluster import deployed
        from cluster.app import versions_of
        from replicas.cluster_store import ClusterStore

        self._connect(ray)
        logs = self._config.logging_config.model_dump()
        serve.start(
            proxy_location=self._config.proxy_location, http_options=options.model_dump(), logging_config=logs
        )
        self._require_key(_address_of_serve())  # Serve keeps the address with which it was first started
        entry = self._config.application
        built = self._application(entry)
        store, new = ClusterStore(entry.name), deployed.deployed(entry.args, versions_of(built))
        if deployed.opens(store, new) and not self._insecure:
            raise LaunchError(NOT_OPENED)
        self.whats_new = deployed.whats_new(store, new)
        with self._watching_progress():
            try:
                serve.run(built, name=entry.name, route_prefix=entry.route_prefix, logging_config=logs)
            except RuntimeError as error:
                raise LaunchError(f"the deployment failed: {error}{self._where_logs_are()}") from error
        deployed.note(store, new)
        self._wait_until_ready()
        self._serves = True
        if self._folder is not None:  # where another `up` finds it
            self._folder.note_ray(str(ray.get_runtime_context().gcs_address))

    def _application(self, entry: ApplicationEntry) -> Any:
        """What is deployed."""
        from cluster.app import application

        return application(entry.args, entry.runtime_env)

    def _require_key(self, host: str) -> None:
        wrong = require_key_beyond_loopback(host, self._config.application.args.headrace.tenants)
        if wrong and not self._insecure:
            raise LaunchError(wrong)

    def wait(self) -> None:
        """Stay in the foreground; a signal's exception ends it."""
        while True:
            self._remember()
            time.sleep(_REMEMBER_EVERY_S)

    def _remember(self) -> None:
        if self._folder is not None:
            self._folder.remember(psutil.Process().children(recursive=True))

    def drain(self, at_once: Callable[[], bool]) -> int:
        """Let the requests finish that have begun (`finish_requests`); returns how many were cut."""
        application = self._config.application
        return finish_requests(application.name, application.args.drain_s, self._say, at_once)

    @property
    def serves(self) -> bool:
        """True once `start` has succeeded."""
        return self._serves

    def stop(self) -> None:
        """Take the application down; with a Ray of its own, every process of it too."""
        import ray
        from ray import serve

        if self.owns_ray:
            stop_local_ray(serve, ray)
        elif ray.is_initialized():
            from replicas.cluster_store import ClusterStore

            serve.delete(self._config.application.name)
            ClusterStore(self._config.application.name).forget()
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        if self.owns_ray:
            self._say("starting Ray on this machine")
            ray.init(
                address="local", num_cpus=self._config.ray.num_cpus, include_dashboard=False, log_to_driver=False,
                logging_level="ERROR", _metrics_export_port=self._config.ray.metrics_port,
            )
            return
        use_the_user_s_token()
        self.join(ray)

    def join(self, ray: Any) -> None:
        """Connect to the configured cluster.

        Raises:
            LaunchError: it cannot be reached.
        """
        address = self._running_at or self._config.ray.address
        self._say(f"joining the Ray cluster at {address}")
        # On a local Ray every process has this one's code already.
        runtime_env = {} if self._running_at else _our_code(_ROOT) | self._config.application.runtime_env
        try:
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            if not is_refusal(error):
                raise
            raise LaunchError(why_not_joined(address, error)) from error

    @contextlib.contextmanager
    def _watching_progress(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            from ray import serve

            last = ""
            while not done.wait(1.0):
                self._remember()
                with contextlib.suppress(Exception):  # a failed status query must not end the start
                    line = _progress_line(serve.status().applications[self._config.application.name])
                    if line != last:
                        self._say(line)
                        last = line

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=5.0)

    def _where_logs_are(self) -> str:
        return f"; the logs are in {self._folder.logs}" if self._folder is not None else ""

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(base_url=self._config.base_url, timeout=10.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/readyz").status_code == 200:
                        return
                time.sleep(0.5)
        raise LaunchError(
            f"{self._config.base_url}/readyz did not answer within {READY_TIMEOUT_S:g} s{self._where_logs_are()}"
        )


def _address_of_serve() -> str:
    """Where the running Serve listens."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host)


def _our_code(root: Path) -> dict[str, Any]:
    """Ray's runtime environment that makes this checkout importable on all nodes. Empty for an installed package: it
    lies in site-packages, which must not be uploaded, and the nodes have it installed too."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text()).get("project", {})
    except (OSError, ValueError):
        return {}
    if project.get("name") != "headrace":
        return {}
    # The packages alone: Serve restarts everything when the folder's content changes, such as a configuration in it.
    return {"working_dir": str(root), "excludes": ["/*", *(f"!/{name}" for name in _PACKAGES), "__pycache__"]}


def _progress_line(application: Any) -> str:
    parts = []
    for name, deployment in application.deployments.items():
        states = ", ".join(f"{count} {state.lower()}" for state, count in deployment.replica_states.items())
        parts.append(f"{name.split(':')[0]}: {states or 'waiting'}")
    return "; ".join(parts) or f"application {application.status.lower()}"


def _require_free(host: str, port: int, key: str) -> None:
    if not port_is_free(host, port):
        raise LaunchError(
            f"port {port} on {host} is taken by a program that is none of ours; stop it, or set {key} in the "
            "configuration"
        )


def metrics_urls() -> list[str]:
    """Where the metrics agent of each node of the joined Ray cluster serves its metrics."""
    import ray

    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes() if node["Alive"]
    ]


def delete_application(config: ClusterConfig, say: Callable[[str], None], at_once: Callable[[], bool]) -> None:
    """Delete the application from the cluster that the configuration joins, once its requests have finished.

    Raises:
        LaunchError: the cluster cannot be reached.
    """
    import ray

    launcher = Launcher(config, progress=say)
    use_the_user_s_token()
    launcher.join(ray)
    launcher.drain(at_once)
    launcher.stop()


def stop_running(config: ClusterConfig, say: Callable[[str], None], *, now: bool) -> bool:
    """Ask the process that serves `config` to stop and wait for it; False when there is none.

    now: end requests at once. What a killed process has left is removed.

    Raises:
        LaunchError: it does not stop in time.
    """
    note = running_note(config)
    process = note.process() if note else None
    if process is None:
        return clear_stale(config, say)
    folder, said = folder_for(config), ""
    process.send_signal(signal.SIGINT)
    if now:
        if ends_within(process, _HEARD_S):  # two signals at once would be one
            return True
        process.send_signal(signal.SIGINT)
    allowed_s = config.application.args.drain_s + _STOP_S
    deadline_s = time.monotonic() + allowed_s
    while time.monotonic() < deadline_s:
        if ends_within(process, 0.5):
            return True
        if (line := folder.said()) and line != said:
            said = line
            say(line)
    raise LaunchError(f"process {process.pid} did not stop within {allowed_s:g} s; stop it by hand")
