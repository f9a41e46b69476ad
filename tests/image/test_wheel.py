"""The wheel, made of what reaches an image's build, holds all of our packages' files and the files for operators."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from image_file import let_through
from import_graph import PACKAGES, ROOT

from headrace import __version__
from router.dashboard.files import _TYPES
from scheduler.model.profiles import profile_names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    for path in let_through():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run(
        [uv, "build", "--wheel", "--no-build-isolation", "--offline", "--python", sys.executable, "--out-dir", "made"],
        cwd=folder, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "made").glob("*.whl")
    return ZipFile(made)


def test_every_tracked_file_of_our_packages_is_in_it_and_no_other_package(wheel: ZipFile) -> None:
    held = {name for name in wheel.namelist() if not name.split("/")[0].startswith("headrace-")}
    assert held == {path for path in let_through() if path.split("/")[0] in PACKAGES}


def test_it_has_what_is_no_code(wheel: ZipFile) -> None:
    held = set(wheel.namelist())
    assert {f"router/dashboard/static/{name}" for name in _TYPES} <= held and "uplot/LICENSE" in _TYPES
    assert {f"scheduler/profiles/{name}.json" for name in profile_names()} <= held and len(profile_names()) >= 4
    assert {f"{package}/py.typed" for package in PACKAGES} <= held
    assert f"headrace-{__version__}.dist-info/licenses/LICENSE" in held


def test_it_has_the_rules_and_the_dashboard_for_operators(wheel: ZipFile) -> None:
    placed = f"headrace-{__version__}.data/data/share/headrace"
    for name in ("rules.yaml", "grafana-dashboard.json"):
        assert wheel.read(f"{placed}/{name}") == (ROOT / "helm/headrace/files" / name).read_bytes()
    assert json.loads(wheel.read(f"{placed}/grafana-dashboard.json"))["panels"]


def test_it_makes_the_command(wheel: ZipFile) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"headrace-{__version__}.dist-info/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {
        "headrace": "headrace.cli:main", "headrace-haproxy": "cluster.haproxy:main",
    }
