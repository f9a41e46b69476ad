"""Which process is meant by a process id, told from an earlier or later one with the same id."""

from __future__ import annotations

from pathlib import Path

import psutil


def identity_of(pid: int) -> str:
    """The id and when the process started, in the machine's ticks since it started: unlike seconds since 1970, the same
    for every reader at any time, also after the clock has been set. Without /proc in seconds; 0 where there is none."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = _start_without_proc(pid)
    return f"{pid}.{start}"


def _start_without_proc(pid: int) -> str:
    try:
        return str(int(psutil.Process(pid).create_time()))
    except psutil.Error:
        return "0"
