"""Shared memory left by killed processes: found while they live, removed afterwards, and never another's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from scheduler.engine import channel, segments
from scheduler.engine.segments import Segment

SHARED_MEMORY = Path("/dev/shm")
ENGINE = """
import multiprocessing, os, sys
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
lock = multiprocessing.get_context("spawn").Lock()
print(memory.name, lock._semlock.name, flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="shared memory is not in /dev/shm here")


@pytest.fixture
def engine() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a segment of its own, and the segment's name."""
    command = [sys.executable, "-c", ENGINE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, _ = process.stdout.readline().split()
        yield process, name
        process.kill()
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def test_what_a_killed_engine_leaves_is_removed(engine: tuple[subprocess.Popen[str], str]) -> None:
    process, name = engine
    mapped = segments.mapped_by([process.pid])
    assert name in {segment.name for segment in mapped}
    assert any(segment.name.startswith("sem.mp-") for segment in mapped)
    process.kill()
    process.wait()
    assert (SHARED_MEMORY / name).exists(), "nothing removes it by itself"
    assert segments.remove(segments.from_json(segments.as_json(mapped))) >= 1
    assert not any((SHARED_MEMORY / segment.name).exists() for segment in mapped)
    assert segments.remove(mapped) == 0 and segments.mapped_by([process.pid]) == set()


def test_another_s_segment_of_the_same_name_is_left_alone() -> None:
    memory = SharedMemory(create=True, size=4096)
    try:
        found = (SHARED_MEMORY / memory.name).stat()
        others = [
            Segment(memory.name, found.st_ino + 1, found.st_size), Segment(memory.name, found.st_ino, 1),
            Segment(f"../shm/{memory.name}", found.st_ino, found.st_size),
        ]
        assert segments.remove(others) == 0 and (SHARED_MEMORY / memory.name).exists()
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize("text", ["", "[", "{}", "3", '[{"name": "psm_1"}]', '[{"name": "psm_1", "inode": null}]'])
def test_a_note_that_was_cut_names_nothing(text: str) -> None:
    assert segments.from_json(text) == set()


def test_the_next_replica_removes_the_segments_of_one_that_was_killed(
    engine: tuple[subprocess.Popen[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process, name = engine
    killed = tmp_path / f"{channel.FOLDER}-killed"
    killed.mkdir()
    segments.note(killed, [process.pid])
    process.kill()
    process.wait()
    channel.remove_endpoint(channel.new_endpoint())
    assert not killed.exists() and not (SHARED_MEMORY / name).exists()
