"""The Dockerfile: linted, pinned, not root, healthy by a command that it has; and what reaches a build of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from image_file import DOCKERFILE, Copy, Stage, let_through, lineage, not_ignored, stages_of
from import_graph import PACKAGES, ROOT

STAGES = stages_of()
TARGETS = ("cpu", "gpu")
COMPILERS = ("gcc", "g++", "make", "cmake", "build-essential", "git", "curl", "python3-pip", "python3-venv", "-dev")


def values(stages: list[Stage], name: str) -> list[str]:
    return [step.value for stage in stages for step in stage.steps if step.name == name]


def installed_by_apt(stages: list[Stage]) -> set[str]:
    listed = [re.findall(r"apt-get install ([^&]+)", value) for value in values(stages, "RUN")]
    return {word for found in listed for text in found for word in text.split() if not word.startswith("--")}


def test_the_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = "FROM debian:latest\nRUN sudo ls\n"
    done = subprocess.run([hadolint, "--no-color", "-"], input=bad, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "DL3007" in done.stdout and "DL3004" in done.stdout, "elsewhere it finds something"


def test_the_targets_are_there_and_the_gpu_is_the_default() -> None:
    assert list(STAGES)[-1] == "gpu" and set(TARGETS) < set(STAGES)
    used = {stage.name for target in TARGETS for stage in lineage(target, STAGES)}
    assert used == {"base", "cpu", "gpu"}, "what builds is in no final image"


def test_every_base_and_tool_has_its_version() -> None:
    outside = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert outside and all(re.fullmatch(r"debian:12\.\d+-slim(@sha256:[0-9a-f]{64})?", base) for base in outside)
    for value in values(list(STAGES.values()), "RUN"):
        for packages in re.findall(r"pip install --no-cache-dir ([^&]+)", value):
            assert all("==" in package for package in packages.split()), value
        if "pip install" in value and "--extra" in value:
            assert "--constraints constraints-" in value, value


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_not_root_and_says_how_it_is_run(target: str) -> None:
    stages = lineage(target, STAGES)
    assert stages[-1].steps[-1].name == "USER" and stages[-1].steps[-1].value == "1000:1000"
    assert any("useradd --uid 1000 --user-group --create-home" in value for value in values(stages, "RUN"))
    (entrypoint,), (command,) = values(stages, "ENTRYPOINT"), values(stages, "CMD")
    assert entrypoint.startswith("[") and command.startswith("["), "no shell between the signal and the process"
    assert values(stages, "WORKDIR") == ["/home/headrace"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_what_its_health_check_and_the_pods_run(target: str) -> None:
    stages = lineage(target, STAGES)
    (health,) = values(stages, "HEALTHCHECK")
    assert '"wget"' in health and "/healthz" in health and "--interval" in health
    assert {"wget", "procps", "tini", "ca-certificates", "python3"} <= installed_by_apt(stages)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_small(target: str) -> None:
    """Triton compiles at run time, so that the target for GPUs has a C compiler, and no other tool."""
    stages = lineage(target, STAGES)
    tools = {name for name in installed_by_apt(stages) if name.endswith(COMPILERS)}
    assert tools == ({"gcc", "libc6-dev", "libpython3-dev"} if target == "gpu" else set())
    for value in values(list(STAGES.values()), "RUN"):
        assert "apt-get install" not in value or ("--no-install-recommends" in value and "/var/lib/apt/lists" in value)
        assert not re.search(r"(?<!uv )pip install(?! --no-cache-dir)", value), "no cache of pip"
    assert not [value for value in values(stages, "COPY") if "--from=" not in value], "from stages only"


def test_every_file_that_is_copied_is_there_and_reaches_the_build() -> None:
    kept = let_through()
    copies = [(stage, Copy.of(step)) for stage in STAGES.values() for step in stage.steps if step.name == "COPY"]
    assert len(copies) >= 8
    for stage, copy in copies:
        if copy.stage is not None:
            assert list(STAGES).index(copy.stage) < list(STAGES).index(stage.name)
            continue
        for source in copy.sources:
            assert any(source in (".", path) or path.startswith(f"{source}/") for path in kept), source


def test_all_of_our_code_reaches_the_build_and_nothing_else_does() -> None:
    kept = let_through()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path for path in tracked if path.split("/")[0] in PACKAGES} <= kept
    assert {path.split("/")[0] for path in kept} == {
        *PACKAGES, "configs", "helm", "LICENSE", "README.md", "pyproject.toml",
        "constraints-cpu.txt", "constraints-gpu.txt",
    }
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["data-files"]
    assert {path for paths in data.values() for path in paths} <= kept


def test_what_lies_about_does_not_reach_the_build(tmp_path: Path) -> None:
    stray = (
        ".env", "key.pem", "router/.env", "router/__pycache__/a.pyc", "runs/x", ".git/config", ".models/m",
        "Dockerfile", "docs/x.md",
    )
    for name in (*stray, "router/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert not_ignored(tmp_path) == {"router/a.py"}
