"""One stack under test: Headrace, or plain Ray Serve LLM with the same engine, as processes of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.faults.channel_orders import FOLDER_VARIABLE
from benchmarks.faults.processes import Family, Role, end_all
from benchmarks.faults.stack_config import ROOT, Settings, write
from cluster.ports import LOCALHOST, free_port, port_is_free

HEADRACE, RAY = STACKS = ("headrace", "ray")
READY_TIMEOUT_S, STOP_TIMEOUT_S, REDEPLOY_TIMEOUT_S = 420.0, 90.0, 450.0
_PROBES = 4
_DEFAULT = Settings()
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # what is left behind there is looked for, nothing is written


class StackFailed(RuntimeError):
    """The stack did not start, or not get healthy again; the message has the end of its log."""


@dataclass
class Leftovers:
    """What a stopped stack left: processes that had to be killed, shared memory, listening sockets, files."""

    exit_code: int | None
    processes: list[str] = field(default_factory=list)
    shared_memory: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Stack:
    """Start, look at, change and stop one stack. Everything that it writes goes below a temporary folder of its own.

    two_nodes: on a Ray cluster of two nodes on this machine instead of one node.

    It runs in the session of the caller: with Linux's autogroup, a session that fills the CPUs can starve others, and
    then clients and `headrace up` would be measured instead of the stack.
    """

    def __init__(self, kind: str, work: Path, settings: Settings = _DEFAULT, *, two_nodes: bool = False) -> None:
        self.kind, self.settings, self.two_nodes = kind, settings, two_nodes
        work.mkdir(parents=True, exist_ok=True)
        self._work = work
        self.log = work / f"{kind}.log"
        # Short: Ray's sockets lie below it, and a socket's path has at most 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="hrf-", dir="/tmp"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._shared_memory: set[str] = set()
        self._nodes: subprocess.Popen[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._family: Family | None = None

    @property
    def family(self) -> Family:
        """The stack's processes. Raises StackFailed before `start`."""
        if self._family is None:
            raise StackFailed("the stack has not been started")
        return self._family

    def start(self) -> None:
        """Return when every replica serves.

        Raises:
            StackFailed: it does not within READY_TIMEOUT_S.
        """
        with self.log.open("w") as log:
            if self.two_nodes:
                self._start_nodes(log)
            config = write(self.settings, self.port, self._work / f"{self.kind}.yaml")
            self._process = subprocess.Popen(
                self._command(config), cwd=ROOT, stdout=log, stderr=log, process_group=0, env=self._environment()
            )
        if self._family is None:
            self._family = Family(self._process.pid)
        self.family.adopt(self._process.pid)
        if self.two_nodes:
            self._wait(lambda: bool(self.family.of(Role.ENGINE_CORE) and self.family.of(Role.INGRESS)), "one replica")
            self.add_node()
        self._wait(lambda: "ready at" in self.log.read_text(), "'ready at' in the log")
        self.wait_until_healthy(READY_TIMEOUT_S)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            ended = self._process is not None and self._process.poll() not in (None, 0)
            if ended or time.monotonic() > deadline:
                raise StackFailed(f"{self.kind}: no {what}; its log ends:\n{self.log.read_text()[-2000:]}")
            self.family.refresh()
            time.sleep(0.5)

    def _start_nodes(self, log: Any) -> None:
        self._nodes = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.two_nodes"], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log, text=True, process_group=0, env=self._environment(),
        )
        self._family = Family(self._nodes.pid)
        self.settings = dataclasses.replace(self.settings, address=self._said("address"))

    def _said(self, word: str) -> str:
        assert self._nodes and self._nodes.stdout
        for line in self._nodes.stdout:
            first, _, rest = line.strip().partition(" ")
            if first == word:
                return rest
        raise StackFailed(f"the two-node cluster ended; its log ends:\n{self.log.read_text()[-2000:]}")

    def add_node(self) -> None:
        """Start a worker node of a two-node cluster."""
        assert self._nodes and self._nodes.stdin
        self._nodes.stdin.write("add\n")
        self._nodes.stdin.flush()
        self._said("added")

    def _command(self, config: Path) -> list[str]:
        if self.kind == HEADRACE:
            return [sys.executable, "-c", "from headrace.cli import main; main()", "up", str(config)]
        return [sys.executable, "-m", "benchmarks.evidence.plain_ray_llm", str(config), str(free_port())]

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary),
            FOLDER_VARIABLE: str(self.temporary),
            # Compiled kernels are a cache between starts, not something that a start leaves behind.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"),
        }

    def admin_state(self) -> dict[str, Any]:
        """`/admin/state` of Headrace. Raises httpx.HTTPError while nothing answers."""
        answer = httpx.get(f"{self.url}/admin/state", timeout=10.0, trust_env=False)
        answer.raise_for_status()
        return dict(answer.json())

    def wait_until_healthy(self, timeout_s: float) -> float:
        """Seconds until every replica has an engine and completions come back whole; then wait until the machine is
        quiet, so that what one fault restarts is not counted against the next.

        Raises:
            StackFailed: not within `timeout_s`.
        """
        begun = time.monotonic()
        trouble = "not looked yet"
        while time.monotonic() - begun < timeout_s:
            trouble = self.trouble()
            if not trouble:
                self.note_shared_memory()
                healthy_s = time.monotonic() - begun
                wait_until_quiet()
                return healthy_s
            time.sleep(1.0)
        raise StackFailed(f"{self.kind} is not healthy after {timeout_s:g} s: {trouble}")

    def trouble(self) -> str:
        """What is not as it should be; empty when healthy."""
        cores = self.family.of(Role.ENGINE_CORE)
        if len(cores) != self.settings.replicas:
            return f"{len(cores)} engine cores"
        try:
            with httpx.Client(base_url=self.url, timeout=20.0, trust_env=False) as client:
                model = client.get("/v1/models").json()["data"][0]["id"]
                body = {"model": model, "prompt": "One two", "max_tokens": 2, "ignore_eos": True}
                for _ in range(_PROBES):
                    answer = client.post("/v1/completions", json=body)
                    if answer.status_code != 200:
                        return f"HTTP {answer.status_code}: {answer.text[:200]}"
            if self.kind == HEADRACE:
                replicas = self.admin_state()["replicas"]
                reachable = sum(replica["reachable"] for replica in replicas.values())
                if reachable != self.settings.replicas:
                    return f"{reachable} reachable replicas of {len(replicas)}"
        except (httpx.HTTPError, ValueError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def redeploy(self, settings: Settings) -> None:
        """Deploy the same application with other settings over the running one, as its user would.

        Raises:
            StackFailed: it fails or takes longer than REDEPLOY_TIMEOUT_S.
        """
        config = write(settings, self.port, self._work / f"{self.kind}.yaml")
        command = self._command(config)  # `headrace up` updates what runs
        if self.kind == RAY:
            command = [sys.executable, "-m", "benchmarks.faults.redeploy", str(config), self._gcs_address()]
        self.settings = settings  # Serve goes on with it, however long that takes
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=self._environment(), capture_output=True, text=True, timeout=REDEPLOY_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StackFailed(f"the redeploy took more than {REDEPLOY_TIMEOUT_S:g} s") from error
        if done.returncode:
            raise StackFailed(f"the redeploy failed: {(done.stderr or done.stdout)[-800:]}")

    def _gcs_address(self) -> str:
        for raylet in self.family.of(Role.RAYLET):
            for argument in raylet.cmdline():
                if argument.startswith("--gcs-address="):
                    return argument.partition("=")[2]
        raise StackFailed("no raylet runs")

    def note_shared_memory(self) -> None:
        """Remember which segments the stack's processes map, to look for them when it is stopped."""
        for process in self.family.refresh():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                    path = line.partition(f"{_SHARED_MEMORY}/")[2]
                    if path and not path.endswith("(deleted)"):
                        self._shared_memory.add(path)

    def stop(self) -> Leftovers:
        """Ctrl-C, then the account of what is left; whatever is left is ended and removed."""
        if self._family is None:
            self._remove_files()
            return Leftovers(None)
        self.note_shared_memory()
        self._keep_logs()
        members = self.family.refresh()
        for member in members:  # a stopped process would not take a signal
            with contextlib.suppress(psutil.NoSuchProcess):
                if member.status() == psutil.STATUS_STOPPED:
                    member.send_signal(signal.SIGCONT)
        left = Leftovers(_end(self._process))
        if self._nodes:
            assert self._nodes.stdin
            self._nodes.stdin.close()
            _end(self._nodes)
        left.processes = end_all(list({*members, *self.family.refresh()}))
        left.shared_memory = sorted(name for name in self._shared_memory if (_SHARED_MEMORY / name).exists())
        left.sockets = [] if port_is_free(LOCALHOST, self.port) else [f"{LOCALHOST}:{self.port}"]
        left.files = sorted(
            str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")
            if not path.is_dir() and path.relative_to(self.temporary).parts[0] != "ray"  # Ray keeps its logs
        )
        self._remove_files()
        return left

    def _keep_logs(self) -> None:
        """Copy the logs of Serve and its replicas, which go with the temporary folder."""
        kept = self._work / f"{self.kind}-serve"
        shutil.rmtree(kept, ignore_errors=True)
        for folder in self.temporary.glob("**/session_latest/logs/serve"):
            with contextlib.suppress(shutil.Error, OSError):  # files that are being written or turned over
                shutil.copytree(folder, kept, dirs_exist_ok=True)

    def _remove_files(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


def wait_until_quiet(busy_percent: float = 30.0, at_most_s: float = 60.0) -> None:
    """Return when the machine's cores are busy for less than that share of two seconds, or after `at_most_s`."""
    until_s = time.monotonic() + at_most_s
    while psutil.cpu_percent(interval=2.0) > busy_percent and time.monotonic() < until_s:
        pass


def _end(process: subprocess.Popen[Any] | None) -> int | None:
    if process is None:
        return None
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    return process.poll()
