"""`headrace up` as a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from cluster.ports import free_port

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL = CHECKOUT / ".models" / "SmolLM2-135M-Instruct"
HEADRACE = Path(sys.executable).with_name("headrace")
READY_TIMEOUT_S = 420.0
BUSY_S = 30.0


def merge(data: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change a nested dictionary in place, key by key."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            merge(data[key], value)
        else:
            data[key] = value


class ClusterProcess:
    """The local configuration on a free port, in the foreground of a child process.

    llm: changes of its one entry of `llm_configs`; changes: of the application's other arguments; both key by key.
    """

    def __init__(
        self, folder: Path, *, env: dict[str, str] | None = None, llm: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        config = yaml.safe_load((CHECKOUT / "configs" / "local.yaml").read_text())
        self.port = free_port()
        config["http_options"]["port"] = self.port
        self.metrics_port = free_port()
        config["ray"]["metrics_port"] = self.metrics_port
        args = config["applications"][0]["args"]
        (entry,) = args["llm_configs"]
        entry["model_loading_config"]["model_source"] = str(MODEL)
        merge(entry, llm or {})
        merge(args, changes)
        self.period_s: float = args["headrace"]["controller"]["period_s"]
        self.config = folder / "cluster.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.log = folder / "up.log"
        self.url = f"http://127.0.0.1:{self.port}"
        key = (env or {}).get("HEADRACE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False, headers=headers)
        with self.log.open("w") as log:
            # In this session: with autogroup, Linux lets a session that fills the CPUs starve others, this test too.
            self.process = subprocess.Popen(
                [HEADRACE, "up", str(self.config)], cwd=CHECKOUT, stdout=log, stderr=log, process_group=0,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
            )

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"headrace up ended:\n{self.log.read_text()}"
            return "ready at" in self.log.read_text()

        until(ready, READY_TIMEOUT_S, lambda: self.log.read_text())

    def state(self, *, at_once: bool = False) -> dict[str, Any]:
        """`/admin/state`; asked again while a replica is too busy to answer, unless `at_once`."""
        deadline_s = time.monotonic() + BUSY_S
        while True:
            state = self._get("/admin/state")
            is_whole = all(one["reachable"] for one in state["replicas"].values())
            if at_once or is_whole or time.monotonic() > deadline_s:
                return state

    def events(self) -> list[dict[str, Any]]:
        return list(self._get("/admin/events")["events"])

    def _get(self, path: str) -> dict[str, Any]:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def put(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.put("/admin/thresholds", json=body)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> tuple[int, list[str]]:
        """Ctrl-C, and again for requests in flight; returns the exit code and what still runs of all that was started.
        """
        if self.process.poll() is not None:
            return self.process.returncode, []
        started = self.children()
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.process.send_signal(signal.SIGINT)
        self.process.wait(90)
        _, alive = psutil.wait_procs(started, timeout=10)
        leftovers = [_describe(process) for process in alive]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return self.process.returncode, leftovers


def until(condition: Callable[[], Any], timeout_s: float, describe: Callable[[], str] = str) -> Any:
    """The first true value of `condition`, polled; fails with `describe()` when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s:g} s: {describe()}")


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended, with its children, whatever happens."""
    try:
        yield process
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] \
            if process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for member in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    return f"{process.pid} gone"
