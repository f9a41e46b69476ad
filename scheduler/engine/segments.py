"""Shared-memory segments of an engine, which a killed process leaves in /dev/shm: found while it lives, removed after.

vLLM's processes exchange messages through segments of hundreds of megabytes. They remove them when they end by
themselves; killed, they cannot, and the helper process in which Python tracks them is killed together with them.
A segment counts as ours only while one of our own processes has it mapped, and is removed later only if the file of
that name is still the same one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where the system keeps it, no temporary file of ours
_NOTE = "segments.json"
_PYTHONS_OWN = ("psm_", "sem.mp-")
"""The names that Python's multiprocessing gives to segments and semaphores."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A file in /dev/shm; inode and size tell it from a later one of the same name."""

    name: str
    inode: int
    size_bytes: int


def mapped_by(pids: Iterable[int]) -> set[Segment]:
    """The segments that these processes have mapped now; processes that are gone have none."""
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # gone, or another user's
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{_SHARED_MEMORY}/"):
                    inodes.add(int(fields[4]))
    if not inodes:
        return set()
    # By inode: a semaphore gets its final name only after its maker has mapped it.
    there = (_now(path.name) for path in _SHARED_MEMORY.iterdir())
    return {segment for segment in there if segment is not None and segment.inode in inodes}


def remove(segments: Iterable[Segment]) -> int:
    """Remove the segments that still exist; returns how many. Their processes must be gone."""
    removed = 0
    for segment in segments:
        if _now(segment.name) == segment:
            with contextlib.suppress(OSError):
                (_SHARED_MEMORY / segment.name).unlink()
                removed += 1
    return removed


def note(folder: Path, pids: Iterable[int]) -> None:
    """Write down in `folder` which segments these processes have mapped."""
    (folder / _NOTE).write_text(as_json(mapped_by(pids)))


def remove_noted(folder: Path) -> int:
    """Remove the segments written down in `folder`; returns how many there still were."""
    try:
        return remove(from_json((folder / _NOTE).read_text()))
    except OSError:
        return 0


def as_json(segments: Iterable[Segment]) -> str:
    """The list that `from_json` reads."""
    return json.dumps([asdict(segment) for segment in sorted(segments, key=lambda one: one.name)])


def from_json(text: str) -> set[Segment]:
    """The segments in a list; none where it cannot be read, as after a write that was cut."""
    try:
        return {Segment(str(one["name"]), int(one["inode"]), int(one["size_bytes"])) for one in json.loads(text)}
    except (ValueError, TypeError, KeyError):
        return set()


def _now(name: str) -> Segment | None:
    if Path(name).name != name or not name.startswith(_PYTHONS_OWN):
        return None
    try:
        found = (_SHARED_MEMORY / name).stat()
    except OSError:
        return None
    return Segment(name, found.st_ino, found.st_size)
