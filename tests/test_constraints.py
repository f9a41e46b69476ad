"""The constraints of the CPU environment agree with what pyproject.toml asks for."""

from __future__ import annotations

import tomllib

import pytest
from import_graph import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ELSEWHERE = {"gpu", "model"}
"""Extras of other environments, and the model, which pyproject.toml pins itself."""
WANTED = [
    *PROJECT["dependencies"],
    *(one for name, extra in EXTRAS.items() if name not in ELSEWHERE for one in extra if "headrace[" not in one),
]
LINES = [line for line in (ROOT / "constraints-cpu.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
PINNED = {canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)}


@pytest.mark.parametrize("text", WANTED)
def test_every_dependency_is_pinned_within_its_bounds(text: str) -> None:
    wanted = Requirement(text)
    version = PINNED[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version, prereleases=True), f"{wanted} but {version} in constraints-cpu.txt"


def test_each_package_has_one_plain_version() -> None:
    assert len(PINNED) == len(LINES)
    assert all(line.count("==") == 1 and "://" not in line and " " not in line for line in LINES)
