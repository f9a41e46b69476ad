"""Stopping on real engines: scale-down under load loses nothing, Ctrl-C finishes streams, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cluster_process import MODEL, ClusterProcess, until

from cluster.model import prepare_bundled_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
SHARED_MEMORY = Path("/dev/shm")


class Stream(threading.Thread):
    """One streamed completion of so many tokens, and what came of it."""

    def __init__(self, cluster: ClusterProcess, number: int, tokens: int) -> None:
        super().__init__(daemon=True)
        self.body = {
            "model": "smollm2-135m", "prompt": f"{number}: once upon a time", "temperature": 0, "stream": True,
            "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True,
        }
        self.url = f"{cluster.url}/v1/completions"
        self.status = 0
        self.retry_after = ""
        self.lines: list[str] = []
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=300, trust_env=False) as answer:
                self.status, self.retry_after = answer.status_code, answer.headers.get("retry-after", "")
                for line in answer.iter_lines():
                    self.lines.append(line)
        except httpx.HTTPError as error:
            self.failure = error

    @property
    def text(self) -> str:
        self.join(300)
        return "\n".join(self.lines)

    @property
    def is_whole(self) -> bool:
        finished = '"finish_reason":"length"' in self.text and "data: [DONE]" in self.text
        return self.status == 200 and finished and '"error"' not in self.text

    @property
    def is_cut_with_an_error(self) -> bool:
        return self.status == 200 and '"error"' in self.text and "data: [DONE]" not in self.text

    def __repr__(self) -> str:
        return f"{self.status} {self.failure} {self.text[-200:]}"


def begun(streams: list[Stream]) -> None:
    until(lambda: all(stream.lines for stream in streams), 120, lambda: str(streams))


def our_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(("psm_", "sem.mp-"))}


def mapped(processes: list[psutil.Process]) -> set[str]:
    from scheduler.engine.segments import mapped_by

    return {segment.name for segment in mapped_by(process.pid for process in processes)}


def assert_nothing_is_left(cluster: ClusterProcess, started: list[psutil.Process], memory: set[str]) -> None:
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    assert memory and not memory & our_memory(), "shared memory of the engines stays"
    folder = Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}" / str(cluster.port)
    assert not folder.exists(), list(folder.rglob("*"))[:20]


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    prepare_bundled_model(MODEL)
    process = ClusterProcess(tmp_path, llm={"deployment_config": {"num_replicas": 1}})
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


def test_ctrl_c_finishes_what_runs_and_leaves_nothing(cluster: ClusterProcess) -> None:
    streams = [Stream(cluster, number, 400) for number in range(4)]
    begun(streams)
    started = cluster.children()
    memory = mapped(started)
    os.killpg(cluster.process.pid, signal.SIGINT)  # as a terminal does
    until(lambda: "finishing 4 requests, at most 600 s" in cluster.log.read_text(), 30, cluster.log.read_text)
    late = Stream(cluster, 99, 4)
    assert (late.status or 503, late.text and int(late.retry_after or 1) >= 1) == (503, True), late
    assert all(stream.is_whole for stream in streams), streams
    assert cluster.process.wait(120) == 0
    assert_nothing_is_left(cluster, started, memory)


def test_a_second_ctrl_c_cuts_at_once_with_an_error_and_counts(cluster: ClusterProcess) -> None:
    streams = [Stream(cluster, number, 1500) for number in range(3)]
    begun(streams)
    started = cluster.children()
    memory = mapped(started)
    cluster.process.send_signal(signal.SIGINT)
    until(lambda: "finishing 3 requests" in cluster.log.read_text(), 30, cluster.log.read_text)
    asked_s = time.monotonic()
    cluster.process.send_signal(signal.SIGINT)
    assert all(stream.is_cut_with_an_error for stream in streams), streams
    assert time.monotonic() - asked_s < 20
    assert cluster.process.wait(120) == 0
    assert "ended 3 requests before they were complete" in cluster.log.read_text()
    assert_nothing_is_left(cluster, started, memory)
