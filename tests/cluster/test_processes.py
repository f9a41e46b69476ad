"""Waiting for processes that are not our children."""

from __future__ import annotations

import subprocess
import sys

import psutil

from cluster.processes import ends_within

PARENT = """
import os, sys, time
child = os.fork()
if child == 0:
    sys.stdin.readline()
    os._exit(0)
print(child, flush=True)
time.sleep(600)
"""


def test_a_process_that_its_parent_never_reaps_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdin is not None and parent.stdout is not None
            process = psutil.Process(int(parent.stdout.readline()))
            assert not ends_within(process, 0.0)
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            assert ends_within(process, 60.0)
            assert process.is_running(), "its entry is still there"
        finally:
            parent.kill()
    assert ends_within(process, 60.0), "and one that is gone too"
