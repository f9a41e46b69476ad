"""Start and stop an application: on a local Ray started for it, or on a running cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.config import ClusterConfig, ConfigError
from cluster.joining import use_the_user_s_token
from cluster.model import BUNDLED_MODEL_NAME, is_prepared, prepare_bundled_model

READY_TIMEOUT_S = 600.0
_SHUTDOWN_GRACE_S = 10.0
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

    progress: called with one line at each change of state. running_at: the address of a local Ray that another process
    started for this application; `start` then updates it.
    whats_new: after `start`, what it changed of what ran before; empty if nothing ran.
    """

    def __init__(
        self, config: ClusterConfig, progress: Callable[[str], None], running_at: str | None = None
    ) -> None:
        self._config, self._say, self._running_at = config, progress, running_at
        self.whats_new: list[str] = []

    @property
    def owns_ray(self) -> bool:
        """True when Ray is started, and stopped, with the application."""
        return self._config.ray.address == "local" and self._running_at is None

    def start(self) -> None:
        """Start (or join) Ray, deploy, and return once a replica answers.

        Raises:
            LaunchError: the port is taken, the cluster cannot be reached, or the deployment failed.
        """
        options = self._config.http_options
        if self.owns_ray and not port_is_free(options.host, options.port):
            raise LaunchError(
                f"port {options.port} on {options.host} is taken; stop what uses it (headrace down?) "
                "or set http_options.port in the configuration"
            )
        if self._config.ray.address == "local":
            _bind_ray_to_localhost()
        _quieten()
        import ray
        from ray import serve

        from cluster import deployed
        from cluster.app import application, versions_of
        from replicas.cluster_store import ClusterStore

        self._connect(ray)
        serve.start(proxy_location=self._config.proxy_location, http_options=options.model_dump())
        entry = self._config.application
        built = application(entry.args, entry.runtime_env)
        store, new = ClusterStore(entry.name), deployed.deployed(entry.args, versions_of(built))
        self.whats_new = deployed.whats_new(store, new)
        with self._watching_progress():
            try:
                serve.run(built, name=entry.name, route_prefix=entry.route_prefix)
            except RuntimeError as error:
                raise LaunchError(f"the deployment failed: {error}; the logs are in {_log_folder()}") from error
        deployed.note(store, new)
        self._wait_until_ready()

    def wait(self) -> None:
        """Stay in the foreground; a signal's exception ends it."""
        while True:
            time.sleep(0.5)

    def stop(self) -> None:
        """Take the application down; with a Ray of its own, every process of it too."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        if not self.owns_ray:
            from replicas.cluster_store import ClusterStore

            serve.delete(self._config.application.name)
            ClusterStore(self._config.application.name).forget()
            ray.shutdown()
            return
        ours = psutil.Process().children(recursive=True)
        with contextlib.suppress(Exception):  # if this fails, the processes below are still ended
            serve.shutdown()
            ray.shutdown()
        _end_processes(ours)

    def _connect(self, ray: Any) -> None:
        if self.owns_ray:
            self._say("starting Ray on this machine")
            ray.init(
                address="local", num_cpus=self._config.ray.num_cpus, include_dashboard=False, log_to_driver=False,
                logging_level="ERROR",
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
        except ConnectionError as error:
            raise LaunchError(
                f"no Ray cluster answers at {address}: {error}; start one with 'ray start --head', "
                "or set ray.address in the configuration"
            ) from error

    @contextlib.contextmanager
    def _watching_progress(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            from ray import serve

            last = ""
            while not done.wait(1.0):
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

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(base_url=self._config.base_url, timeout=10.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/readyz").status_code == 200:
                        return
                time.sleep(0.5)
        raise LaunchError(f"{self._config.base_url}/readyz did not answer within {READY_TIMEOUT_S:g} s")


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


def _bind_ray_to_localhost() -> None:
    # Ray's own switch for machines that are no cluster (its default on macOS and Windows): all of its services then
    # listen on 127.0.0.1. Read when ray is imported.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _quieten() -> None:
    """Silence the libraries' logs on the terminal; they are in Ray's session folder."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.WARNING)  # in this process; replicas and engines write their own files
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # A hook that only sets up logging, and makes every idle Ray worker import vLLM for it.
    os.environ.setdefault("RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK", "0")


def _progress_line(application: Any) -> str:
    parts = []
    for name, deployment in application.deployments.items():
        states = ", ".join(f"{count} {state.lower()}" for state, count in deployment.replica_states.items())
        parts.append(f"{name.split(':')[0]}: {states or 'waiting'}")
    return "; ".join(parts) or f"application {application.status.lower()}"


def _end_processes(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_SHUTDOWN_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_SHUTDOWN_GRACE_S)


def port_is_free(host: str, port: int) -> bool:
    """True when a server may bind there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _log_folder() -> str:
    return os.path.join(tempfile.gettempdir(), "ray", "session_latest", "logs", "serve")


def delete_application(config: ClusterConfig) -> None:
    """Delete the application from the cluster that the configuration joins.

    Raises:
        LaunchError: the cluster cannot be reached.
    """
    import ray

    launcher = Launcher(config, progress=lambda _: None)
    launcher.join(ray)
    launcher.stop()


# One file for each foreground `headrace up`; `headrace down` reads it.


def note_running(config: ClusterConfig) -> Path:
    """Record that this process serves `config`, and where its Ray is once it has one; returns the file."""
    path = _note_path(config)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    note = {"pid": os.getpid(), "started_s": psutil.Process().create_time(), "ray_address": _ray_address()}
    path.write_text(json.dumps(note))
    return path


def _ray_address() -> str | None:
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def running_at(config: ClusterConfig) -> str | None:
    """Where the local Ray is on which another process serves this application at this port; None when none does.

    Raises:
        LaunchError: that process is still starting.
    """
    found = _running(config) if config.ray.address == "local" else None
    if found is None:
        return None
    process, note = found
    if not note.get("ray_address"):
        raise LaunchError(
            f"process {process.pid} is starting {config.application.name} at port {config.http_options.port}; "
            "try again when it is ready, or stop it with headrace down"
        )
    return str(note["ray_address"])


def _running(config: ClusterConfig) -> tuple[psutil.Process, dict[str, Any]] | None:
    try:
        note = json.loads(_note_path(config).read_text())
        process = psutil.Process(note["pid"])
        if process.create_time() != note["started_s"]:  # the process id was reused
            return None
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None
    return process, note


def stop_running(config: ClusterConfig, timeout_s: float = 60.0) -> bool:
    """Ask the process that serves `config` to stop and wait for it; False when there is none.

    Raises:
        LaunchError: it does not stop in time.
    """
    found = _running(config)
    if found is None:
        return False
    process, _ = found
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired as error:
        raise LaunchError(f"process {process.pid} did not stop within {timeout_s:g} s; stop it by hand") from error
    return True


def _note_path(config: ClusterConfig) -> Path:
    folder = Path(tempfile.gettempdir()) / f"headrace-run-{os.getuid()}"
    return folder / f"{config.application.name}-{config.http_options.port}.json"


