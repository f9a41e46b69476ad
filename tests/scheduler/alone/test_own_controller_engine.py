"""vLLM's real scheduler with a controller process of its own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_harness import Engine

from scheduler.alone.place import engines_here
from scheduler.alone.state import controller_state
from scheduler.support import UnsupportedSetting

TARGETS = {"ttft_s": 3.0, "tpot_s": 0.2}


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    Engine()  # makes the folder of the model, which later tests of the session use too
    short = Path(tempfile.mkdtemp(prefix="hr-"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    yield short
    left = [path.name for path in short.iterdir() if "channel" in path.name]
    shutil.rmtree(short)
    assert left == []


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60.0
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_an_engine_that_no_replica_owns_is_tuned_and_leaves_nothing() -> None:
    controller = {"profile": "a100-llama2-7b", "period_s": 0.1, "min_finished": 5}
    engine = Engine(settings={"targets": TARGETS, "controller": controller})
    scheduler = engine.scheduler
    try:
        assert scheduler.active.current().thresholds.fluid.cold, "the first thresholds are those of the profile"
        (endpoint,) = engines_here().values()
        for number in range(8):
            engine.add(f"r{number}", output=6)
        engine.run()
        until(lambda: scheduler.active.current().lapses_at_s is not None)
        state = until(lambda: controller_state(endpoint) if controller_state(endpoint)["finished_seen"] >= 5 else None)
        assert state["controller"]["alive"] and scheduler.active.current().thresholds.version >= 1
        child = psutil.Process(state["controller"]["pid"])
    finally:
        scheduler.shutdown()
    assert not child.is_running() and engines_here() == {}


@pytest.mark.parametrize("settings", [
    {"thresholds": {"policy": "fcfs"}, "controller": {}}, {"thresholds": {"policy": "wait"}, "controller": None},
    {"thresholds": {"policy": "wait"}, "controller": {"enabled": False}},
], ids=["nothing to tune", "the caller tunes", "switched off"])
def test_an_engine_without_need_of_one_starts_none(settings: dict[str, Any]) -> None:
    engine = Engine(settings=settings)
    assert engines_here() == {}
    engine.scheduler.shutdown()


def test_targets_that_nothing_would_follow_are_an_error() -> None:
    with pytest.raises(UnsupportedSetting, match=r"leave controller.enabled at true"):
        Engine(settings={"targets": TARGETS, "controller": {"enabled": False}})
