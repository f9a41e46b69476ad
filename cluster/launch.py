"""Start and stop an application: on a local Ray started for it, or on a running cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
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
from cluster.model import BUNDLED_MODEL_NAME, is_prepared, prepare_bundled_model

READY_TIMEOUT_S = 600.0
_SHUTDOWN_GRACE_S = 10.0
_ROOT = Path(__file__).resolve().parent.parent


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

    progress: called with one line at each change of state.
    """

    def __init__(self, config: ClusterConfig, progress: Callable[[str], None]) -> None:
        self._config, self._say = config, progress

    @property
    def owns_ray(self) -> bool:
        """True when Ray is started, and stopped, with the application."""
        return self._config.ray.address == "local"

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
        if self.owns_ray:
            _bind_ray_to_localhost()
        _quieten()
        import ray
        from ray import serve

        from cluster.app import build

        self._connect(ray)
        serve.start(proxy_location=self._config.proxy_location, http_options=options.model_dump())
        application = self._config.application
        with self._watching_progress():
            try:
                serve.run(build(application.args), name=application.name, route_prefix=application.route_prefix)
            except RuntimeError as error:
                raise LaunchError(f"the deployment failed: {error}; the logs are in {_log_folder()}") from error
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
            serve.delete(self._config.application.name)
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
        self.join(ray)

    def join(self, ray: Any) -> None:
        """Connect to the configured cluster.

        Raises:
            LaunchError: it cannot be reached.
        """
        self._say(f"joining the Ray cluster at {self._config.ray.address}")
        runtime_env = _our_code(_ROOT) | self._config.application.runtime_env
        try:
            ray.init(
                address=self._config.ray.address, runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR"
            )
        except ConnectionError as error:
            raise LaunchError(
                f"no Ray cluster answers at {self._config.ray.address}: {error}; start one with 'ray start --head', "
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


def _our_code(root: Path) -> dict[str, str]:
    """Ray's runtime environment that makes this checkout importable on all nodes. Empty for an installed package: it
    lies in site-packages, which must not be uploaded, and the nodes have it installed too."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text()).get("project", {})
    except (OSError, ValueError):
        return {}
    return {"working_dir": str(root)} if project.get("name") == "headrace" else {}


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
    """Record that this process serves `config`; returns the file."""
    path = _note_path(config)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(json.dumps({"pid": os.getpid(), "started_s": psutil.Process().create_time()}))
    return path


def stop_running(config: ClusterConfig, timeout_s: float = 60.0) -> bool:
    """Ask the process that serves `config` to stop and wait for it; False when there is none.

    Raises:
        LaunchError: it does not stop in time.
    """
    try:
        note = json.loads(_note_path(config).read_text())
        process = psutil.Process(note["pid"])
        if process.create_time() != note["started_s"]:  # the process id was reused
            return False
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return False
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired as error:
        raise LaunchError(f"process {process.pid} did not stop within {timeout_s:g} s; stop it by hand") from error
    return True


def _note_path(config: ClusterConfig) -> Path:
    folder = Path(tempfile.gettempdir()) / f"headrace-run-{os.getuid()}"
    return folder / f"{config.application.name}-{config.http_options.port}.json"


