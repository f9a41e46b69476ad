"""Orders to an engine process to let its control channel misbehave: a file that it reads. No vLLM.

The file `channel` in the folder of the environment variable FOLDER_VARIABLE holds the id of an engine process and one
of WAYS; while it is there, that engine's channel answers so (`faulty_engine`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

FOLDER_VARIABLE = "HEADRACE_FAULTS_FOLDER"
GARBAGE, LATE, SILENT = WAYS = ("garbage", "late", "silent")


def tell(folder: Path, pid: int, way: str | None) -> None:
    """Make the channel of an engine process misbehave, or (None) behave again."""
    file = folder / "channel"
    if way is None:
        file.unlink(missing_ok=True)
        return
    partial = file.with_suffix(".partial")
    partial.write_text(f"{pid} {way}")
    partial.replace(file)


def told(folder: str | None, pid: int) -> str | None:
    """The way in which a process's channel is to misbehave now."""
    if folder:
        with contextlib.suppress(OSError, ValueError):
            told_pid, way = (Path(folder) / "channel").read_text().split()
            return way if int(told_pid) == pid else None
    return None
