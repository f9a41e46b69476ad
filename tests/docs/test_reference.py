"""The reference pages are what the code says today, and every key of a configuration has a meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from simulator.config import SimulationConfig
from simulator.workload.config import WorkloadConfig
from tools.docs.keys import keys_of, summary_of
from tools.docs.reference import COMMAND, FOLDER, PAGES, Section, sections


@pytest.mark.parametrize("name", ["configuration.md", "simulation.md", "command-line.md"])
def test_a_page_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == PAGES[name](), f"run: {COMMAND}"


def test_every_key_has_a_meaning() -> None:
    without = [
        f"{section.path}.{key.name} (docstring of {section.owner.__name__})"
        for section in [*sections(), Section("simulation", SimulationConfig), Section("workload", WorkloadConfig)]
        for key in keys_of(section.owner) if not key.meaning
    ]
    assert not without, "say what these keys mean, as `name: meaning.`"


def test_every_object_of_the_file_has_its_table() -> None:
    owners = {section.owner.__name__ for section in sections()}
    assert owners >= {
        "ClusterConfig", "AppConfig", "LLMEntry", "HeadraceSettings", "Slo", "Thresholds", "ControllerConfig", "Limits",
        "KeyLimits", "TenantConfig", "SchedulerSettings",
    }


class Engine(BaseModel):
    """An engine.

    wait_s: how long it waits; None: not at all. one, other: share a meaning.
    """

    model_config = ConfigDict(frozen=True)

    wait_s: Annotated[float, Field(gt=0, le=60)] | None = None
    one: int = 3
    other: int = 4
    bare: str = ""


@dataclass(frozen=True)
class Wheel:
    """A wheel.

    spokes: how many it has.
    """

    spokes: int
    engine: Engine


def test_a_key_is_read_from_its_class() -> None:
    wait, one, other, bare = keys_of(Engine)
    assert (wait.kind, wait.default, wait.unit) == ("number, > 0 and ≤ 60 or null", "null", "seconds")
    assert wait.meaning == "how long it waits; None: not at all"
    assert one.meaning == other.meaning == "share a meaning" and one.default == "3"
    assert bare.meaning == ""
    spokes, engine = keys_of(Wheel)
    assert (spokes.default, spokes.kind, engine.inner) == ("required", "whole number", Engine)
    assert summary_of(Engine) == "An engine."
