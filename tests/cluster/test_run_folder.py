"""The folder of a run: one for a port, its note, what a killed run leaves, and that nothing of others is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from cluster import launch, run_folder
from cluster.config import ClusterConfig
from cluster.run_folder import AlreadyRunning, Note, RunFolder, claim, clear_stale, folder_for, running_note
from scheduler.config_errors import CommandFailed
from scheduler.engine import segments
from scheduler.engine.process_identity import identity_of


def config_for(port: int = 8123, name: str = "headrace", drain_s: float = 600.0) -> ClusterConfig:
    args = {
        "llm_configs": [{"model_loading_config": {"model_id": "m", "model_source": "org/model"}}],
        "headrace": {"controller": {"profile": "cpu-smollm2"}, "drain_s": drain_s},
    }
    applications = [{"name": name, "args": args}]
    return ClusterConfig.model_validate({"http_options": {"port": port}, "applications": applications})


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def said() -> list[str]:
    return []


SERVES = """
import signal
received = []
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, lambda number, frame: received.append(number))
print("serving", flush=True)
while len(received) < {signals}:
    signal.pause()
"""


@pytest.fixture
def serving() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the first signal."""
    with subprocess.Popen([sys.executable, "-c", SERVES.format(signals=1)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serving\n"
        yield process
        process.kill()


def noted(config: ClusterConfig, pid: int, identity: str | None = None) -> None:
    """The note of another process that serves."""
    folder = folder_for(config)
    folder.path.mkdir(parents=True)
    note = {"pid": pid, "identity": identity or identity_of(pid), "application": "headrace", "url": config.base_url}
    (folder.path / "note.json").write_text(json.dumps(note))


def test_a_run_has_one_private_folder_that_its_end_removes(said: list[str], temporary_files: Path) -> None:
    config = config_for()
    assert running_note(config) is None
    folder = claim(config, said.append)
    assert running_note(config) == Note(os.getpid(), identity_of(os.getpid()), "headrace", "http://127.0.0.1:8123")
    assert folder.path.stat().st_mode & 0o077 == 0 and temporary_files in folder.path.parents
    assert folder.path.parent.stat().st_mode & 0o077 == 0
    folder.remove()
    assert running_note(config) is None and not folder.path.exists() and said == []


def test_a_second_run_is_told_of_the_first_and_leaves_its_note_alone(said: list[str]) -> None:
    folder = claim(config_for(), said.append)
    note = (folder.path / "note.json").read_text()
    for name in ("headrace", "another"):
        with pytest.raises(AlreadyRunning, match=rf"headrace already runs at \S+:8123 as process {os.getpid()};"):
            claim(config_for(name=name), said.append)
    assert (folder.path / "note.json").read_text() == note
    claim(config_for(8124), said.append)


def test_temporary_files_of_all_processes_go_into_the_folder(
    said: list[str], monkeypatch: pytest.MonkeyPatch, temporary_files: Path
) -> None:
    monkeypatch.setenv("TMPDIR", "elsewhere")
    folder = claim(config_for(), said.append)
    monkeypatch.setattr(run_folder, "_LONGEST_ROOT", len(str(folder.temporary)) - 1)
    folder.hold_temporary_files()
    assert os.environ["TMPDIR"] == "elsewhere", "a socket's path would be too long"
    monkeypatch.setattr(run_folder, "_LONGEST_ROOT", len(str(folder.temporary)))
    folder.hold_temporary_files()
    assert Path(os.environ["TMPDIR"]) == folder.temporary and folder.temporary.is_dir()
    assert folder.path in folder.logs.parents


def test_a_torn_note_counts_as_none(said: list[str]) -> None:
    folder = claim(config_for(), said.append)
    (folder.path / "note.json").write_text('{"pid": ')
    assert running_note(config_for()) is None


def test_another_user_s_folder_is_not_used(
    said: list[str], temporary_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = os.stat_result([0o40700, 1, 1, 1, os.getuid() + 1, 0, 0, 0, 0, 0])
    (temporary_files / f"headrace-{os.getuid()}").mkdir()
    monkeypatch.setattr(Path, "stat", lambda self, **_: theirs)
    with pytest.raises(AlreadyRunning, match="belongs to another user"):
        claim(config_for(), said.append)


# What a killed run leaves.


def test_what_a_killed_run_left_is_ended_removed_and_told_of(
    said: list[str], serving: subprocess.Popen[bytes]
) -> None:
    memory = SharedMemory(create=True, size=4096)
    try:
        folder = claim(config_for(), said.append)
        folder.remember([psutil.Process(serving.pid)])
        shared = segments.as_json(segments.mapped_by([os.getpid()]))
        assert memory.name in shared
        record = folder.path / "processes.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"segments": shared}))
        killed = json.loads((folder.path / "note.json").read_text()) | {"identity": "1.1"}
        (folder.path / "note.json").write_text(json.dumps(killed))

        assert clear_stale(config_for(), said.append)
        assert serving.wait(5) == 0, "it was asked, not killed"
        assert not folder.path.exists() and not (Path("/dev/shm") / memory.name).exists()
        assert said == ["cleared away what a killed headrace up had left: 1 processes, 1 shared-memory segments"]
        assert not clear_stale(config_for(), said.append)
        memory = SharedMemory(memory.name, create=True, size=4096)
    finally:
        memory.close()
        memory.unlink()


def test_a_clock_that_is_set_makes_no_stranger_of_a_process(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step of the clock `headrace down` removed the files of an application, which then served on without."""
    folder = claim(config_for(), said.append)
    folder.remember([psutil.Process()])
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 1.0)
    assert running_note(config_for()) is not None
    assert not clear_stale(config_for(), said.append) and folder.path.exists()


def test_a_process_that_got_the_id_since_is_left_alone(said: list[str], serving: subprocess.Popen[bytes]) -> None:
    folder = claim(config_for(), said.append)
    (folder.path / "processes.json").write_text(
        json.dumps({"processes": [{"pid": serving.pid, "identity": "1.1"}], "segments": "[]"})
    )
    (folder.path / "note.json").unlink()
    assert not clear_stale(config_for(), said.append), "nothing of it was there, so there is nothing to tell"
    assert serving.poll() is None and not folder.path.exists()


def test_the_next_run_clears_away_and_takes_the_place(said: list[str]) -> None:
    noted(config_for(), os.getpid(), identity="1.1")
    assert claim(config_for(), said.append).path.is_dir()
    assert running_note(config_for()) is not None


# headrace down.


def test_nothing_to_stop_without_a_run(said: list[str]) -> None:
    assert launch.stop_running(config_for(), said.append, now=False) is False


def test_a_process_that_got_the_id_of_a_run_is_not_signalled(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(*_: object) -> None:
        raise AssertionError("a signal was sent to another's process")

    monkeypatch.setattr(psutil.Process, "send_signal", sent)
    noted(config_for(), os.getpid(), identity="1.1")
    assert launch.stop_running(config_for(), said.append, now=False) is False


def test_the_process_of_the_note_is_asked_to_stop_waited_for_and_heard(
    said: list[str], serving: subprocess.Popen[bytes]
) -> None:
    noted(config_for(), serving.pid)
    assert launch.stop_running(config_for(), said.append, now=False) is True
    assert serving.poll() is not None


def test_what_a_stopping_process_says_is_passed_on(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_STOP_S", 1.0)
    with subprocess.Popen([sys.executable, "-c", SERVES.format(signals=9)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serving\n"
        noted(config_for(), process.pid)
        folder_for(config_for()).say("finishing 3 requests")
        try:
            with pytest.raises(launch.LaunchError, match=rf"process {process.pid} did not stop within 1 s"):
                launch.stop_running(config_for(drain_s=0.0), said.append, now=False)
        finally:
            process.kill()
    assert said == ["finishing 3 requests"]


def test_now_asks_twice(said: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVES.format(signals=2)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serving\n"
        noted(config_for(), process.pid)
        try:
            assert launch.stop_running(config_for(), said.append, now=True) is True
        finally:
            process.kill()
    assert process.returncode == 0 != -signal.SIGTERM


def test_haproxy_s_folder_is_this_user_s_alone_and_short_enough_for_sockets(tmp_path, monkeypatch):
    deep = RunFolder(tmp_path / "a-folder-with-a-long-name" / "48123")
    deep.path.mkdir(parents=True)
    held = deep.hold_haproxy()
    try:
        assert len(str(held)) <= 26 and str(os.getuid()) in str(held)
        assert held.stat().st_mode & 0o777 == 0o700
        assert deep.hold_haproxy() == held, "begun again"
        stranger = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: stranger)
        other = RunFolder(deep.path)
        monkeypatch.setattr(RunFolder, "haproxy", held)
        with pytest.raises(CommandFailed, match="another user"):
            other.hold_haproxy()
        monkeypatch.undo()
    finally:
        deep.remove()
    assert not held.exists()
