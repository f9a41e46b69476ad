"""The chart's README has every value with its default and a meaning; the wrapper with the operator hangs together."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from chart_examples import CHART, CI, EVERYTHING
from helm_python import Chart, HelmValuesError

ROOT = CHART.parents[1]
WRAPPER = ROOT / "helm" / "headrace-with-operator"


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("chart_readme", ROOT / "helm" / "readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chart_readme"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["chart_readme"]


def leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path


def test_the_readme_is_up_to_date(generator: ModuleType) -> None:
    assert (CHART / "README.md").read_text("utf-8") == generator.page(), f"run: {generator.COMMAND}"


def test_every_value_is_in_it_with_a_meaning(generator: ModuleType) -> None:
    text = (CHART / "values.yaml").read_text("utf-8")
    shown = {value.path: value for group in generator.groups(text) for value in group.values}
    without = [path for path, value in shown.items() if not value.meaning]
    assert not without, "say in a comment above each what it is"
    missing = [
        path for path in leaves(yaml.safe_load(text))
        if not any(path == one or path.startswith(f"{one}.") for one in shown)
    ]
    assert missing == []


def test_a_comment_and_a_default_make_a_row(generator: ModuleType) -> None:
    text = "# A.\n# B | c.\na: 1\n\n# Loose.\n\ngroup:\n  # In it.\n  one: [x]\n# A whole.\nwhole: {b: 2}\n"
    first, second = generator.groups(text)
    assert [(one.path, one.default, one.meaning) for one in first.values] == [
        ("a", "1", "A. B | c."), ("whole", '{"b": 2}', "A whole."),
    ]
    assert (second.key, second.meaning, second.values[0].path) == ("group", "", "group.one")
    assert "| `a` | `1` | A. B \\| c. |" in generator.table(text)


def test_every_example_is_named_in_it() -> None:
    text = (CHART / "README.md").read_text("utf-8")
    assert all(f"`ci/{name}.yaml`" in text for name in CI)


# --- the wrapper ------------------------------------------------------------------------------------------------


def test_the_wrapper_s_chart_is_this_one_and_the_operator_is_optional() -> None:
    wrapper = yaml.safe_load((WRAPPER / "Chart.yaml").read_text("utf-8"))
    own = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    ours, operator = wrapper["dependencies"]
    assert (ours["name"], ours["version"], ours["repository"]) == ("headrace", own["version"], "file://../headrace")
    assert (operator["name"], operator["condition"]) == ("kuberay-operator", "kuberay-operator.enabled")
    assert wrapper["version"] == own["version"] and wrapper["appVersion"] == own["appVersion"]


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chart]:
    """The wrapper with our chart, and in the operator's place one that only shows its values."""
    folder = tmp_path_factory.mktemp("wrapper") / "headrace-with-operator"
    shutil.copytree(WRAPPER, folder)
    shutil.copytree(CHART, folder / "charts" / "headrace")
    stub = folder / "charts" / "kuberay-operator"
    (stub / "templates").mkdir(parents=True)
    version = yaml.safe_load((WRAPPER / "Chart.yaml").read_text("utf-8"))["dependencies"][1]["version"]
    (stub / "Chart.yaml").write_text(f"apiVersion: v2\nname: kuberay-operator\nversion: {version}\n")
    (stub / "templates" / "shown.yaml").write_text("kind: Operator\nvalues: {{ toJson .Values }}\n")
    with Chart.load(folder) as loaded:
        yield loaded


def test_values_below_headrace_reach_the_chart(wrapped: Chart, chart: Chart) -> None:
    rendered = wrapped.render({"headrace": EVERYTHING}, name="demo", namespace="llm")
    alone = chart.render(EVERYTHING, name="demo", namespace="llm")
    found = {path.rpartition("charts/")[2]: text for path, text in rendered.items() if "charts/headrace/" in path}
    assert found == alone


def test_the_operator_is_left_out_by_its_condition(wrapped: Chart) -> None:
    key = {"headrace": {"auth": {"apiKey": "k"}}}
    for enabled in (True, False):
        rendered = wrapped.render(key | {"kuberay-operator": {"enabled": enabled}}, name="demo", namespace="llm")
        assert any("kuberay-operator" in path and text.strip() for path, text in rendered.items()) is enabled


def test_typos_below_headrace_are_refused_too(wrapped: Chart) -> None:
    with pytest.raises(HelmValuesError, match="'modles' not allowed"):
        wrapped.render({"headrace": {"modles": []}}, name="demo")


def test_the_wrapper_has_nothing_vendored() -> None:
    assert {path.name for path in Path(WRAPPER).iterdir()} == {"Chart.yaml", "README.md", "values.yaml", ".helmignore"}
