"""The Dockerfile as stages of instructions, and the files that `.dockerignore` lets through to a build."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from import_graph import ROOT

DOCKERFILE = ROOT / "Dockerfile"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. value: what follows its name, continued lines joined, comments left out."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value as the words of its JSON list, or of its line."""
        return [str(word) for word in json.loads(self.value)] if self.value.startswith("[") else shlex.split(self.value)


@dataclass(frozen=True, slots=True)
class Copy:
    """A COPY. stage: whose files are copied; None: the build's own."""

    stage: str | None
    sources: list[str]
    target: str

    @classmethod
    def of(cls, step: Step) -> Copy:
        flags = [word for word in step.words if word.startswith("--")]
        *sources, target = [word for word in step.words if not word.startswith("--")]
        stages = [flag.removeprefix("--from=") for flag in flags]
        assert len(stages) < 2 and all("--" not in stage for stage in stages), f"no COPY with {flags} is understood"
        return cls(stages[0] if stages else None, sources, target)


@dataclass(frozen=True, slots=True)
class Stage:
    """base: the image or the stage that it begins with."""

    name: str
    base: str
    steps: list[Step]


def read(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments in front of the first stage, with their defaults, and the stages in order."""
    defaults: dict[str, str] = {}
    stages: list[Stage] = []
    parser = DockerfileParser(fileobj=io.BytesIO(text.encode()))
    for part in parser.structure:
        step = Step(part["instruction"], part["value"])
        if step.name == "FROM":
            base, _, name = step.value.partition(" AS ")
            stages.append(Stage(name, substituted(base, defaults), []))
        elif stages and step.name != "COMMENT":
            stages[-1].steps.append(step)
        elif step.name == "ARG":
            name, _, default = step.value.partition("=")
            defaults[name] = default
    return defaults, stages


def stages_of(path: Path = DOCKERFILE) -> dict[str, Stage]:
    """The stages by name."""
    return {stage.name: stage for stage in read(path.read_text("utf-8"))[1]}


def lineage(target: str, stages: dict[str, Stage]) -> list[Stage]:
    """A stage and those that it begins with, the first one first."""
    found = [stages[target]]
    while found[0].base in stages:
        found.insert(0, stages[found[0].base])
    return found


def substituted(text: str, variables: dict[str, str]) -> str:
    """With $NAME and ${NAME} replaced, as the builder itself does outside of RUN and CMD."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), text)


def let_through() -> set[str]:
    """The tracked files that `.dockerignore` lets through, as paths from the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split("\0")) & not_ignored(ROOT)


def not_ignored(root: Path) -> set[str]:
    """The files below `root` that the root's `.dockerignore` lets through."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    added = {DOCKERFILE.name, ".dockerignore"}  # the client sends them along; COPY does not see them
    kept = exclude_paths(str(root), patterns) - added
    return {path for path in kept if (root / path).is_file()}
