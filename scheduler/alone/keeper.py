"""Starts the controller process of an engine without a cluster, and starts it again when it ends.

All of it happens in a thread that sleeps until that process ends; the engine's loop never waits for it, and an engine
serves with the thresholds it has while there is none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic_core import to_json

from scheduler.alone.place import new_place
from scheduler.engine.channel import rank_endpoint, remove_endpoint
from scheduler.settings import SchedulerSettings
from scheduler.thresholds import thresholds_as_dict

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
_COMMAND = (sys.executable, "-P", "-m", "scheduler.alone.controller")
_END_S = 2.0
logger = logging.getLogger(f"vllm.headrace.{__name__}")  # below vLLM's logger, so that its handlers and level apply


def settings_for_child(settings: SchedulerSettings, endpoint: str) -> bytes:
    """What the process reads first: one line of JSON."""
    assert settings.controller is not None
    told = {
        "channel": endpoint, "thresholds": thresholds_as_dict(settings.thresholds), "profile": settings.profile,
        "targets": asdict(settings.targets), "controller": settings.controller.model_dump(),
    }
    return to_json(told) + b"\n"


class ControllerKeeper:
    """Keeps one process running until closed.

    command: the process; told: what it reads from its standard input, which stays open while this process lives.
    first_delay_s: pause before it is started again; doubled, up to a minute, while it ends sooner than a minute.
    """

    def __init__(self, command: Sequence[str], told: bytes, *, first_delay_s: float = FIRST_DELAY_S) -> None:
        self._command, self._told, self._first_delay_s = command, told, first_delay_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="headrace-controller", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        delay_s = self._first_delay_s
        while not self._closing.is_set():
            begun_s = time.monotonic()
            ended = self._run_once()
            if self._closing.is_set():
                return
            if time.monotonic() - begun_s > LONGEST_DELAY_S:
                delay_s = self._first_delay_s
            logger.warning("Headrace: the controller process %s; it is started again in %g s", ended, delay_s)
            self._closing.wait(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)

    def _run_once(self) -> str:
        """One life of the process; returns how it ended."""
        try:
            with self._lock:
                if self._closing.is_set():
                    return "was not started"
                # A group of its own: Ctrl-C in a terminal is for the server, which then ends this process.
                process = self.process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=_environment(),
                    process_group=0,
                )
        except OSError as error:
            return f"cannot be started: {error}"
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            process.stdin.write(self._told)
            process.stdin.flush()
        code = process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        return f"ended with exit code {code}"

    def close(self) -> None:
        """End the process; at most a few seconds."""
        self._closing.set()
        with self._lock:
            process = self.process
        if process is not None and process.poll() is None:
            process.terminate()
            self._thread.join(_END_S)
            if self._thread.is_alive():
                process.kill()
        self._thread.join(_END_S)


class EngineControl:
    """The channel's endpoint of one engine, and the process that tunes it where no replica owns the channel.

    endpoint: the replica's, or one of its own; empty: neither, and there is no channel.

    Raises:
        OSError: there is no place for the endpoint.
    """

    def __init__(self, settings: SchedulerSettings, rank: int) -> None:
        self._settings = settings
        self._keeper: ControllerKeeper | None = None
        if settings.has_own_controller:
            self.endpoint = new_place(rank)
        else:
            self.endpoint = rank_endpoint(settings.channel, rank) if settings.channel else ""

    def start(self) -> None:
        """Start the process, once the channel is open; a replica has none."""
        if self._settings.has_own_controller:
            self._keeper = ControllerKeeper(_COMMAND, settings_for_child(self._settings, self.endpoint))

    def close(self) -> None:
        """End the process and remove the endpoint; a replica removes its own."""
        if self._keeper is not None:
            self._keeper.close()
        if self._settings.has_own_controller:
            remove_endpoint(self.endpoint)


def _environment() -> dict[str, str]:
    """This process's, with its import path, as its modules may not be found without, and one thread for numerics."""
    path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
