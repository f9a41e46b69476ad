"""How an API server finds the engines behind it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.alone import place
from scheduler.alone.place import engines_here, new_place, remove_what_engines_left, state_file, write_state
from scheduler.engine.channel import remove_endpoint

IN_ENGINE = "import sys; from scheduler.alone.place import new_place; print(new_place({rank}), flush=True); input()"
IN_SERVER = "from scheduler.alone.place import engines_here; print(engines_here())"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path


def engine_core(rank: int) -> subprocess.Popen[str]:
    """A child of this process with a place; it ends with its standard input."""
    command = [sys.executable, "-c", IN_ENGINE.format(rank=rank)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_server_finds_the_engines_that_it_and_its_parent_started() -> None:
    engines = [engine_core(rank) for rank in (1, 0)]
    try:
        endpoints = {}
        for rank, engine in zip((1, 0), engines, strict=True):
            assert engine.stdout is not None
            endpoints[rank] = engine.stdout.readline().strip()
        assert engines_here() == endpoints and list(engines_here()) == [0, 1]
        another = subprocess.run([sys.executable, "-c", IN_SERVER], capture_output=True, text=True, check=True)
        assert another.stdout.strip() == str(engines_here()), "an API server beside the engines, of the same parent"
    finally:
        for engine in engines:
            engine.communicate("\n")


def test_a_server_sees_no_engine_of_another(temporary: Path) -> None:
    owner = f"{os.getppid()}"
    (temporary / f"{place.FOLDER}-of{owner}.1.0-abc").mkdir()  # an earlier process with the same id
    (temporary / f"{place.FOLDER}-of999999.7.0-abc").mkdir()
    (temporary / f"{place.FOLDER}-abc").mkdir()  # a replica's
    assert engines_here() == {}


def test_an_engine_s_state_is_replaced_whole_and_goes_with_its_folder() -> None:
    endpoint = new_place(3)
    assert list(engines_here()) == [3], "the parent's engines are this process's too"
    write_state(endpoint, b"1")
    write_state(endpoint, b"22")
    assert state_file(endpoint).read_bytes() == b"22"
    assert sorted(path.name for path in state_file(endpoint).parent.iterdir()) == ["controller.json"]
    remove_endpoint(endpoint)
    write_state(endpoint, b"333")
    assert not state_file(endpoint).parent.exists() and engines_here() == {}


def test_a_server_removes_what_its_killed_engines_left_and_nothing_else(temporary: Path) -> None:
    engine = engine_core(0)
    assert engine.stdout is not None
    left = Path(engine.stdout.readline().strip().removeprefix("ipc://")).parent
    mine = new_place(5)  # this process's parent's engine, which lives
    engine.kill()
    asyncio.run(remove_what_engines_left())
    assert not left.exists() and state_file(mine).parent.exists()
    remove_endpoint(mine)
    engine.communicate()


def test_a_server_does_not_wait_long_for_an_engine_that_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_LOOKS", 2)
    engine = engine_core(0)
    assert engine.stdout is not None
    alive = Path(engine.stdout.readline().strip().removeprefix("ipc://")).parent
    asyncio.run(remove_what_engines_left())
    assert alive.exists()
    engine.communicate("\n")
