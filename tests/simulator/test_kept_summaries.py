"""The summaries beside an evidence page: runs of other machines count, and only if they are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grids(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "evidence"))
    import grids

    return grids


@pytest.fixture
def made(grids, monkeypatch):
    """The runs made, by the folder they were made in; a run says its own options."""
    made: list[Path] = []

    def run_points(points, out, run_point, workers, console):
        made.extend(out / point.name for point in points)
        summary = {"goodput_rps": 1.23456789, "notes": ["x"], "wall_s": 3.0, "ttft_p99_s": None}
        return [grids.PointResult(one.name, out / one.name, one.options, "done", dict(summary)) for one in points]

    monkeypatch.setattr(grids, "run_points", run_points)
    return made


def table(grids, folder: str, **changes):
    return {"a": grids.Grid({"trace": f"{folder}/trace.csv", "rate_rps": 2.0} | changes, {}, (1, 2))}


def test_a_page_is_continued_on_another_machine(grids, made, tmp_path):
    file = tmp_path / "page.json"
    first = grids.run_grids(tmp_path / "here", table(grids, "/here"), None, file)
    again = grids.run_grids(tmp_path / "there", table(grids, "/there"), None, file)
    assert len(made) == 2, "nothing was run again"
    assert [one.name for one in again["a"]] == [one.name for one in first["a"]]
    assert again["a"][0].summary == {"goodput_rps": 1.23457, "ttft_p99_s": None}
    assert again["a"][0].options["trace"] == "/there/trace.csv"


def test_a_run_of_other_options_does_not_count(grids, made, tmp_path):
    file = tmp_path / "page.json"
    grids.run_grids(tmp_path / "here", table(grids, "/here"), None, file)
    grids.run_grids(tmp_path / "there", table(grids, "/here", rate_rps=3.0), None, file)
    assert len(made) == 4
    assert {one["options"]["rate_rps"] for one in json.loads(file.read_text()).values()} == {3.0}


def test_what_is_to_be_run_anew_is(grids, made, tmp_path):
    file = tmp_path / "page.json"
    grids.run_grids(tmp_path / "here", table(grids, "/here"), None, file)
    grids.run_grids(tmp_path / "here", table(grids, "/here"), grids.Choice(1, again=grids.re.compile("a")), file)
    assert len(made) == 4


def test_without_workers_the_page_is_written_from_what_is_known(grids, made, tmp_path):
    file = tmp_path / "page.json"
    grids.run_grids(tmp_path / "here", table(grids, "/here"), grids.Choice(1, seeds=1), file)
    found = grids.run_grids(tmp_path / "there", table(grids, "/here"), grids.Choice(0), file)
    assert [one.options["seed"] for one in found["a"]] == [1] and len(made) == 1


def test_the_file_names_no_machine(grids, made, tmp_path):
    file = tmp_path / "page.json"
    grids.run_grids(tmp_path / "here", table(grids, "/somewhere/private"), None, file)
    assert "private" not in file.read_text() and "wall_s" not in file.read_text()
