"""Ending processes that this application started: asked first, killed after a while."""

from __future__ import annotations

import contextlib

import psutil

_GRACE_S = 10.0


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
