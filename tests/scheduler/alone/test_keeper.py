"""The controller process of one engine: real processes, a real channel, an engine made by hand."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from synthetic_engine import PAPER, SyntheticEngine

from scheduler.alone import keeper as keeper_module
from scheduler.alone.keeper import ControllerKeeper, EngineControl
from scheduler.alone.state import controller_state
from scheduler.engine.channel import ChannelServer
from scheduler.messages import Ack, Telemetry
from scheduler.settings import SETTINGS_KEY, SchedulerSettings
from scheduler.thresholds import Thresholds

SETTINGS = SchedulerSettings.from_additional_config({SETTINGS_KEY: {
    "targets": {"ttft_s": 3, "tpot_s": 0.08}, "controller": {"period_s": 0.2, "min_finished": 5},
}})
ENDLESS = [sys.executable, "-c", "import sys; sys.stdin.read()"]
ENGINE_CORE = """
import sys, time
from scheduler.alone.keeper import EngineControl
from scheduler.settings import SchedulerSettings
own = EngineControl(SchedulerSettings.from_additional_config({"headrace": {"targets": {"ttft_s": 3}}}), 0)
own.start()
while not (own._keeper and own._keeper.process): time.sleep(0.01)
print(own.endpoint, own._keeper.process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    short = Path(tempfile.mkdtemp(prefix="hr-"))  # a socket's path has at most 107 characters
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setenv("TMPDIR", str(short))
    yield short
    shutil.rmtree(short)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What the keeper logs, also when vLLM has been imported, whose logger passes nothing on."""
    caplog.set_level(logging.WARNING, logger=keeper_module.logger.name)
    monkeypatch.setattr(keeper_module.logger, "propagate", False)
    keeper_module.logger.addHandler(caplog.handler)
    yield caplog
    keeper_module.logger.removeHandler(caplog.handler)


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.02)
    return value


class Engine(SyntheticEngine):
    """An engine under load whose clock goes with the questions, half a second each: threads see whole steps."""

    def reported(self, asked: Any) -> Telemetry:
        if asked.cursor is None:
            return self.report(None)
        for number in range(20):
            prefill, decode = (58, 4) if number % 4 == 0 else (0, 8 + number % 5)
            kv = 1000 + 150 * number
            self.now_s += 0.02
            self.iterate(prefill, decode, kv, PAPER.iteration_s(float(prefill), float(decode), float(kv)))
        self.traffic([(58, 40), (120, 90)], every_s=0.02, seconds=0.1)
        return self.report(asked.cursor)


def unasked(question: Any) -> Ack:
    raise AssertionError(f"a controller does not ask this: {question}")


@contextlib.contextmanager
def tuned(engine: Engine, settings: SchedulerSettings = SETTINGS) -> Iterator[EngineControl]:
    own = EngineControl(settings, 0)
    server = ChannelServer(own.endpoint, engine.active.offer, engine.reported, engine.stats, unasked, unasked)
    try:
        own.start()
        yield own
    finally:
        own.close()
        server.close()


def test_an_engine_without_a_profile_is_measured_and_then_tuned(temporary: Path) -> None:
    engine = Engine(Thresholds(policy="fluid"))
    with tuned(engine) as own:
        active = until(lambda: engine.active.current().thresholds if engine.active.current().lapses_at_s else None)
        assert active.version >= 1 and active.fluid is not None and active.fluid.tpot_s == 0.08
        measured = active.fluid.time_model.iteration_s(0.0, 10.0, 2000.0)
        assert measured == pytest.approx(PAPER.iteration_s(0.0, 10.0, 2000.0), rel=0.05)
        state = until(lambda: controller_state(own.endpoint) if controller_state(own.endpoint)["forecast"] else None)
        assert state["controller"]["alive"] and state["controller"]["events"][0]["new_version"] == 1
        until(lambda: not controller_state(own.endpoint)["forecast"]["cold"])
    assert list(temporary.iterdir()) == [], "no socket, no state, no folder"
    assert not psutil.pid_exists(state["controller"]["pid"])


def test_a_pinned_engine_is_left_alone() -> None:
    pinned = Thresholds(policy="fcfs", max_running=3, pinned=True)
    engine = Engine(pinned)
    with tuned(engine, SETTINGS.model_copy(update={"thresholds": pinned})) as own:
        until(lambda: "pinned by an operator" in str(controller_state(own.endpoint)["decision"]))
        assert engine.active.current().thresholds == pinned


def test_a_killed_process_is_started_again_and_goes_on(log: pytest.LogCaptureFixture) -> None:
    engine = Engine(Thresholds(policy="fluid"))
    with tuned(engine) as own:
        until(lambda: engine.active.current().thresholds.version)
        first = until(lambda: controller_state(own.endpoint)["controller"].get("pid"))
        os.kill(first, signal.SIGKILL)
        until(lambda: not controller_state(own.endpoint)["controller"]["alive"])
        second = until(lambda: controller_state(own.endpoint)["controller"]["alive"]
                       and controller_state(own.endpoint)["controller"]["pid"])
        assert second != first
        version = engine.active.current().thresholds.version
        until(lambda: controller_state(own.endpoint)["forecast"])
        assert engine.active.current().thresholds.version >= version, "it goes on from the engine's own version"
    assert "ended with exit code -9; it is started again in 1 s" in log.text


def test_the_pause_before_a_restart_grows(log: pytest.LogCaptureFixture) -> None:
    keeper = ControllerKeeper([sys.executable, "-c", "raise SystemExit(3)"], b"", first_delay_s=0.01)
    try:
        until(lambda: log.text.count("ended with exit code 3") >= 4)
    finally:
        keeper.close()
    pauses = [record.args[1] for record in log.records]  # type: ignore[index]
    assert pauses[:4] == pytest.approx([0.01, 0.02, 0.04, 0.08])


def test_a_program_that_cannot_be_started_does_not_matter(log: pytest.LogCaptureFixture) -> None:
    keeper = ControllerKeeper(["/does/not/exist"], b"", first_delay_s=0.01)
    until(lambda: "cannot be started" in log.text)
    keeper.close()


def test_closing_ends_a_process_that_does_not_listen() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    keeper = ControllerKeeper([sys.executable, "-c", deaf], b"")
    process = until(lambda: keeper.process)
    until(lambda: signal.SIGTERM in _ignored(process.pid))
    keeper.close()
    assert process.returncode == -signal.SIGKILL


def _ignored(pid: int) -> set[int]:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_closing_at_once_leaves_nothing() -> None:
    keeper = ControllerKeeper(ENDLESS, b"")
    keeper.close()
    assert keeper.process is None or keeper.process.poll() is not None
    assert not keeper._thread.is_alive()


def test_a_killed_engine_core_leaves_neither_process_nor_folder(temporary: Path) -> None:
    engine_core = subprocess.Popen([sys.executable, "-c", ENGINE_CORE], stdout=subprocess.PIPE, text=True)
    assert engine_core.stdout is not None
    endpoint, pid = engine_core.stdout.readline().split()
    child = psutil.Process(int(pid))
    until(lambda: controller_state(endpoint)["controller"].get("pid"))  # it asks an engine that does not answer
    engine_core.kill()
    engine_core.wait()
    engine_core.stdout.close()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    until(lambda: not list(temporary.iterdir()))

