"""Evidence pages conclude what their own tables show."""

import ast
import re
from pathlib import Path
from string import Formatter

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks" / "evidence").glob("*.py"))
PAGES = (
    "a100-law.md", "autoscaling.md", "change.md", "estimates.md", "faults.md", "fidelity.md", "overload.md",
    "paper-tables.md", "past-capacity.md", "real-traffic.md", "routing.md", "strict-or-serving.md", "theory.md",
)
PAGE = """# Title

<!-- conclusion: begin -->
typed
<!-- conclusion: end -->

## Goodput, all

| load | vllm | fluid |
|---|---|---|
| 1 | – | 4.88 (4.76–5.13) |
| 2 | 0.00 | −1 |
"""


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "evidence"))
    import conclusions
    import page_tables

    return conclusions, page_tables


@pytest.mark.parametrize("name", PAGES)
def test_a_page_concludes_what_its_tables_show(evidence, name):
    conclusions, page_tables = evidence
    text = (ROOT / "docs" / "evidence" / name).read_text()
    assert page_tables.with_conclusion(text, conclusions.CONCLUSIONS[name]) == text
    said = text.split(page_tables.BEGIN)[1].split(page_tables.END)[0]
    assert text.index(said) < 150, "the conclusion comes first"
    assert said.strip() not in ("", conclusions.NOT_RUN)


def test_every_concluded_page_is_checked(evidence):
    assert set(evidence[0].CONCLUSIONS) == set(PAGES)


def test_tables_are_read_as_shown(evidence):
    _, page_tables = evidence
    (table,) = page_tables.tables(PAGE)
    assert table.title == "Goodput, all"
    assert table.numbers("fluid") == [4.88, -1.0]
    assert table.pairs("load", "vllm") == [(2.0, 0.0)]
    assert page_tables.titled([table], "Goodput") is table
    with pytest.raises(LookupError, match="no table under 'Delay'"):
        page_tables.titled([table], "Delay")


def test_a_conclusion_replaces_the_one_that_was_there(evidence):
    _, page_tables = evidence
    text = page_tables.with_conclusion(PAGE, lambda tables: f"best {max(tables[0].numbers('fluid')):g}")
    assert "typed" not in text
    assert "begin -->\nbest 4.88\n<!-- conclusion: end" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_templates_get_every_field_they_name(script):
    tree = ast.parse(script.read_text())
    templates = {
        node.targets[0].id: node.value for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "format"):
            continue
        template = templates.get(getattr(call.func.value, "id", ""))
        given = {keyword.arg for keyword in call.keywords}
        if isinstance(template, ast.Constant) and None not in given:
            named = {re.split(r"[.\[]", field)[0] for _, field, _, _ in Formatter().parse(template.value) if field}
            assert named == given, f"{script.name}, line {call.lineno}"


def test_numbers_of_cells(evidence):
    _, page_tables = evidence
    cells = ("–", "", "137 000 tokens", "34,377.3", "+3.7%", "1.01 (cap 37, budget 1024)")
    assert [page_tables.number(cell) for cell in cells] == [None, None, 137000.0, 34377.3, 3.7, 1.01]
