"""`pytest --fast`: which tests it runs, and that none of them can import vLLM or Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import markers
from import_graph import ROOT

TESTS = ROOT / "tests"
ALL_FAST = (
    "scheduler/model", "scheduler/estimation", "scheduler/policies", "scheduler/tuning", "simulator/output",
    "simulator/workload", "loadgen",
)


HIDDEN = """
import pytest

def hidden(package):
    __import__(package)

@pytest.mark.parametrize("package", ["vllm", "ray"])
def test_hidden(package):
    hidden(package)

def test_lazy():
    import vllm

def test_harmless(): ...
"""


def test_a_hidden_import_of_an_engine_fails_and_a_plain_one_is_left_out(tmp_path: Path) -> None:
    test = tmp_path / "test_some.py"
    test.write_text(HIDDEN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--fast", "-q", "-p", "no:cacheprovider", "-p", "conftest",
         "--import-mode=importlib", "--rootdir", tmp_path, test],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), *sys.path])},
    )
    assert "2 failed, 1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
    assert all(f"the fast check imports {package}" in done.stdout for package in ("vllm", "ray"))


def test_what_a_module_imports_by_whatever_way_is_its_marker(tmp_path: Path) -> None:
    test = tmp_path / "test_direct.py"
    test.write_text("import ray\nfrom scheduler.vllm_scheduler import HeadraceScheduler\n")
    assert markers(test) == {"engine", "ray"}
    test = tmp_path / "test_through_ours.py"
    test.write_text("from router.request_router import FluidRouter\n")
    assert markers(test) == {"ray"}


@pytest.mark.parametrize("folder", ALL_FAST)
def test_rooms_without_an_engine_are_tested_without_one(folder: str) -> None:
    """An import of vLLM or Ray in one of them would take its tests out of the fast check."""
    files = sorted((TESTS / folder).glob("test_*.py"))
    assert files
    assert {file.name: markers(file) for file in files if markers(file)} == {}
