"""The quickest of each kind of fault that no replica dies of, on a real stack under load; `make faults` runs them all.

Replicas and engines that die or freeze are in test_engine_faults.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cluster_process import MODEL, until

from benchmarks.faults.experiment import run_fault
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.outcomes import to_the_last
from benchmarks.faults.stack import HEADRACE, Stack
from benchmarks.faults.stack_config import Settings
from cluster.model import prepare_bundled_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
RATE_RPS = 1.5
WATCH_S = 15
HEAL_S = 90.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    prepare_bundled_model(MODEL)
    started = Stack(HEADRACE, tmp_path_factory.mktemp("faults"), Settings(faulty_channel=True))
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.mark.parametrize("name", [
    "hang-ups", "kill-controller", "kill-serve-controller", "channel-garbage", "channel-silent",
])
def test_requests_do_not_notice(stack: Stack, name: str) -> None:
    stack.wait_until_healthy(HEAL_S)
    result = run_fault(stack, FAULTS[name], RATE_RPS, watch_s=WATCH_S)
    assert "na" not in result, result
    for some in (result["in_flight"], result["new"]):
        assert some["failed"] == 0, result["messages"]
        assert some["complete"] + some["rejected"] == some["requests"]
    assert result["new"]["complete"] > 0 and to_the_last(result["account"])
    assert result["replaced_s"] is not None or not name.startswith("kill"), "it has been started again"
    until(lambda: under_way(stack) == 0, 15.0, lambda: str(stack.admin_state()["replicas"]))


def under_way(stack: Stack) -> int:
    """Requests that the engines still know of: those of clients that left must not stay."""
    replicas: dict[str, dict[str, Any]] = stack.admin_state()["replicas"]
    return sum(one["running"] + one["waiting"] + one["held"] for one in replicas.values() if one["reachable"])


def test_nothing_is_left_behind(stack: Stack) -> None:
    stack.wait_until_healthy(HEAL_S)
    left = stack.stop()
    assert (left.exit_code, left.processes, left.shared_memory, left.sockets, left.files) == (0, [], [], [], [])
