"""Ending processes that this application started: asked first, killed after a while."""

from __future__ import annotations

import contextlib
import time

import psutil

_GRACE_S = 10.0
_POLL_S = 0.1


def end_processes(processes: list[psutil.Process]) -> int:
    """Terminate, wait, kill what is left; returns how many were there. An engine that ends by itself leaves nothing."""
    there = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            there.append(process)
    _, alive = psutil.wait_procs(there, timeout=_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_GRACE_S)
    return len(there)


def ends_within(process: psutil.Process, seconds: float) -> bool:
    """Wait until a process has ended, also one that its parent never reaps, as where the parent is a container's first
    process."""
    deadline_s = time.monotonic() + seconds
    while True:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_POLL_S)
