"""The processes of a running stack, by what each is: found with psutil by the titles that Ray and vLLM give them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from enum import StrEnum

import psutil

_KILLED_WITHIN_S = 5.0


class Role(StrEnum):
    """What a process is."""

    ENGINE_CORE = "engine core"
    ENGINE_WORKER = "engine worker"
    REPLICA = "replica actor"
    INGRESS = "ingress actor"
    PROXY = "Serve proxy"
    HAPROXY = "HAProxy"
    CONTROLLER = "our controller"
    SERVE_CONTROLLER = "Serve's controller"
    RAYLET = "raylet"
    GCS = "GCS"
    OTHER = "other"


_TITLES = (
    ("VLLM::EngineCore", Role.ENGINE_CORE), ("VLLM::Worker", Role.ENGINE_WORKER),
    ("ray::ProxyActor", Role.PROXY), ("ray::ServeController", Role.SERVE_CONTROLLER),
    ("ray::ControllerActor", Role.CONTROLLER),
)


def role_of(command_line: list[str]) -> Role:
    """The role that a command line shows."""
    if not command_line:
        return Role.OTHER
    title = command_line[0]
    if title.startswith("ray::ServeReplica:"):
        deployment = title.split(":", 4)[4] if title.count(":") >= 4 else ""
        return Role.INGRESS if "Ingress" in deployment else Role.REPLICA
    for start, role in _TITLES:
        if title.startswith(start):
            return role
    program = title.rpartition("/")[2]
    return {"raylet": Role.RAYLET, "gcs_server": Role.GCS, "haproxy": Role.HAPROXY}.get(program, Role.OTHER)


class Family:
    """A process and all that it ever started, also what outlives the process that started it.

    A process is known once `refresh` has seen it; call it every second or so.
    """

    def __init__(self, root: int) -> None:
        self._known = {process.pid: process for process in (psutil.Process(root),)}

    def adopt(self, pid: int) -> None:
        """Count another process, and what it starts, to the family."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known[pid] = psutil.Process(pid)

    def refresh(self) -> list[psutil.Process]:
        """All members that run now."""
        parents: dict[int, list[int]] = {}
        for process in psutil.process_iter(["ppid"]):
            parents.setdefault(process.info["ppid"], []).append(process.pid)
        # is_running compares start times, so that a process id used again is not taken for ours.
        self._known = {pid: process for pid, process in self._known.items() if _runs(process)}
        at_hand = list(self._known)
        while at_hand:
            for pid in parents.get(at_hand.pop(), ()):
                if pid not in self._known:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        self._known[pid] = psutil.Process(pid)
                        at_hand.append(pid)
        return list(self._known.values())

    def by_role(self) -> Iterator[tuple[Role, psutil.Process]]:
        """Every member that runs, with its role."""
        for process in self.refresh():
            with contextlib.suppress(psutil.Error):
                yield role_of(process.cmdline()), process

    def of(self, role: Role) -> list[psutil.Process]:
        """The members of a role, the oldest first."""
        found = [process for one, process in self.by_role() if one is role]
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def below(self, process: psutil.Process) -> list[psutil.Process]:
        """A process and its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [process, *process.children(recursive=True)]
        return []


def end_all(processes: list[psutil.Process], grace_s: float = 10.0) -> list[str]:
    """Kill what does not end by itself within `grace_s`; returns a line for each that had to be."""
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    killed = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            line = f"{process.pid} {' '.join(process.cmdline())[:100]}"
            if process.status() != psutil.STATUS_ZOMBIE:
                killed.append(line)
            process.kill()
    until_s = time.monotonic() + _KILLED_WITHIN_S
    while any(map(_runs, alive)) and time.monotonic() < until_s:  # a kill takes a moment on a busy machine
        time.sleep(0.01)
    return killed


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
