"""Reports from synthetic runs: every figure and row is there, and equal data give equal bytes."""

import re

import numpy as np
import pytest

from simulator.output import figures, report
from simulator.output.figures import MOST_POINTS, ecdf, thin
from simulator.output.metrics import summarise
from simulator.output.report import find_runs, make_report
from simulator.output.rows import IterationRow, RequestRow
from simulator.output.run_files import RunError, RunWriter


def write_run(folder, policy="wait", rate_rps=2.0, seed=1, n=60, iterations=True, workload="p58d147", **config):
    """A run with delays that grow with the rate, differ by seed, and are the same every time."""
    rng = np.random.default_rng([seed, int(10 * rate_rps), *policy.encode()])
    arrivals_s = np.cumsum(rng.exponential(1 / rate_rps, n)).tolist()
    waits_s = rng.exponential(0.1 * rate_rps, n).tolist()
    header = {
        "config": {
            "policy": policy, "profile": "a100-llama2-7b", "replicas": 1, "kv_tokens": 1000, "token_budget": 256,
            "workload": {"name": workload, "rate_rps": rate_rps, "seed": seed, "requests": n},
            "slo": {"ttft_s": 1.0, "tpot_s": 0.2, "latency_s": None}, **config,
        },
        "versions": {"python": "3.11.0", "vllm": "0.29.0"},
    }
    with RunWriter(folder, header, iterations) as writer:
        for i, (arrival_s, wait_s) in enumerate(zip(arrivals_s, waits_s, strict=True)):
            first_s = arrival_s + wait_s
            writer.request(RequestRow(i, 0, "all", arrival_s, first_s, first_s + 1 + wait_s, 58, 11, 0, "completed"))
        for i in range(3 * n):
            writer.iteration(
                IterationRow(0, i / 6, 0.1, 20, i % 30, 100, 10 * (i % 90), 10, i % 30, i % 7, i % 3, 0, 32, None)
            )
        summary = summarise(writer.written_requests(), slo_ttft_s=1.0, slo_tpot_s=0.2)
        writer.close(
            summary | {
                "policy": policy, "rate_rps": rate_rps, "preemptions": 3, "recomputed_tokens": 12_345,
                "kv_peak_fraction": 0.89, "iterations": 3 * n, "virtual_s": 30.0, "wall_s": 0.1,
            }
        )
    return folder


def table_rows(written):
    lines = [line for line in written.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for policy in ("vllm", "wait"):
        for rate_rps in (1.0, 4.0):
            for seed in (1, 2):
                write_run(folder / f"{policy}-{rate_rps:g}-{seed}", policy, rate_rps, seed)
    return folder


@pytest.fixture(scope="module")
def report_of_sweep(sweep_folder, tmp_path_factory):
    return make_report([sweep_folder], tmp_path_factory.mktemp("report") / "out")


@pytest.fixture
def without_figures(monkeypatch):
    """Everything but the slow part: figures are made and dropped."""
    monkeypatch.setattr(figures, "_save", lambda figure, stem: None)


@pytest.mark.slow
@pytest.mark.slow
def test_report_of_a_sweep(report_of_sweep):
    drawn = {
        "p58d147-goodput", "p58d147-latency-mean", "p58d147-ttft-p99", "p58d147-tpot", "p58d147-latency-ecdf",
        "p58d147-ttft-ecdf", "p58d147-tpot-ecdf", "over-time-1-vllm-p58d147-4-requests-s-seed-1",
        "over-time-2-wait-p58d147-4-requests-s-seed-1",
    }
    folder = report_of_sweep.parent
    assert {path.name for path in folder.iterdir()} == {"report.md", "figures"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{stem}{suffix}" for stem in drawn for suffix in (".png", ".svg")
    }
    text = report_of_sweep.read_text()
    assert set(re.findall(r"!\[.*?\]\(figures/(.*?)\.png\)", text)) == drawn
    assert "Run with python 3.11.0, vllm 0.29.0." in text
    assert str(folder.parent) not in text


@pytest.mark.slow
def test_table_has_a_row_a_run(report_of_sweep):
    rows = table_rows(report_of_sweep)
    assert [row[:4] for row in rows] == [
        [policy, "p58d147", rate, seed] for policy in ("vllm", "wait") for rate in ("1", "4") for seed in ("1", "2")
    ]
    assert all(row[4] == "60" and row[-3:] == ["3", "12345", "0.89"] for row in rows)
    assert all(len(row) == 16 for row in rows)


@pytest.mark.slow
@pytest.mark.slow
def test_equal_runs_give_equal_bytes(sweep_folder, report_of_sweep, tmp_path):
    again = make_report([sweep_folder], tmp_path)
    assert again.read_bytes() == report_of_sweep.read_bytes()
    for first in (report_of_sweep.parent / "figures").iterdir():
        assert first.read_bytes() == (tmp_path / "figures" / first.name).read_bytes(), first.name


@pytest.mark.slow
def test_seeds_are_averaged_with_a_band(sweep_folder, tmp_path, monkeypatch, without_figures):
    drawn = {}
    monkeypatch.setattr(report, "draw_against_rate", lambda stem, title, panels: drawn.update({stem.name: panels}))
    make_report([sweep_folder], tmp_path / "out")
    line = drawn["p58d147-goodput"][0].lines[0]
    summaries = [report.read_run(sweep_folder / f"vllm-4-{seed}").summary["goodput_rps"] for seed in (1, 2)]
    assert (line.label, line.rate_rps.tolist()) == ("vllm", [1.0, 4.0])
    assert (line.low[1], line.y[1], line.high[1]) == (min(summaries), np.mean(summaries), max(summaries))
    assert line.low[1] < line.high[1]
    targets = {stem: [panel.target for panel in panels] for stem, panels in drawn.items()}
    assert targets == {
        "p58d147-goodput": [None], "p58d147-latency-mean": [None], "p58d147-ttft-p99": [1.0],
        "p58d147-tpot": [0.2, 0.2],
    }  # fmt: skip


def test_other_settings_are_other_lines_not_other_seeds(tmp_path, without_figures):
    runs = [write_run(tmp_path / str(tokens), kv_tokens=tokens) for tokens in (1000, 2000)]
    # The solved thresholds and the number of requests do not make another system.
    runs.append(write_run(tmp_path / "long", rate_rps=3.0, n=90, thresholds_in_force={"n": 7}))
    rows = table_rows(make_report(runs, tmp_path / "out"))
    assert [row[0] for row in rows] == ["wait (kv_tokens=1000)", "wait (kv_tokens=1000)", "wait (kv_tokens=2000)"]


@pytest.fixture
def figure_names(monkeypatch):
    """The figures in place of their files."""
    names = []
    monkeypatch.setattr(figures, "_save", lambda figure, stem: names.append(stem.name))
    return names


@pytest.mark.slow
def test_each_workload_has_its_figures(tmp_path, figure_names):
    make_report([write_run(tmp_path / name, workload=name) for name in ("p58d147", "lmsys")], tmp_path / "out")
    assert {"p58d147-goodput", "lmsys-goodput"} <= set(figure_names)


@pytest.mark.slow
def test_runs_over_time_can_be_chosen(sweep_folder, tmp_path, figure_names):
    make_report([sweep_folder], tmp_path, over_time=[sweep_folder / "wait-1-2"])
    assert [name for name in figure_names if name.startswith("over-time")] == [
        "over-time-1-wait-p58d147-1-requests-s-seed-2"
    ]


@pytest.mark.slow
def test_few_runs_are_all_drawn_over_time(sweep_folder, tmp_path, figure_names):
    make_report([sweep_folder / f"vllm-{rate}-1" for rate in (1, 4)], tmp_path)
    assert sum(name.startswith("over-time") for name in figure_names) == 2


def test_a_run_without_iterations_or_measures(tmp_path, figure_names):
    written = make_report([write_run(tmp_path / "run", n=0, iterations=False)], tmp_path)
    assert table_rows(written)[0][5:8] == ["–", "–", "–"]
    assert "Kept no iterations: wait, p58d147, 2 requests/s, seed 1." in written.read_text()
    assert len(figure_names) == 7
    assert not any(name.startswith("over-time") for name in figure_names)


def test_a_bare_header_is_enough(tmp_path, without_figures):
    with RunWriter(tmp_path / "run", {"config": {}, "versions": {}}) as writer:
        writer.request(RequestRow(0, 0, "all", 0.0, 1.0, 2.0, 10, 5, 0, "completed"))
        writer.iteration(IterationRow(0, 0.0, 0.1, 10, 0, 10, 10, 1, 1, 0, 0, 0, None, None))
        writer.close({})
    row = table_rows(make_report([tmp_path / "run"], tmp_path / "out"))[0]
    assert row == ["unknown policy", "workload", *["–"] * 14]


def test_runs_are_found_below(tmp_path):
    near, far = write_run(tmp_path / "near", n=1), write_run(tmp_path / "sweep" / "far", n=1)
    write_run(tmp_path / "a" / "b" / "too-far", n=1)
    assert find_runs([near]) == [near]
    assert find_runs([far, tmp_path]) == [far, near]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty neither is a run nor holds one"):
        find_runs([near, tmp_path / "empty"])


def test_thinning_keeps_peaks_and_ends():
    x = np.arange(100_000.0)
    y = np.sin(x / 300)
    y[77_777], y[5] = 50.0, np.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MOST_POINTS
    assert (np.diff(thin_x) > 0).all()
    assert thin_y.max() == 50.0 and thin_x[thin_y.argmax()] == 77_777
    assert thin_y.min() == np.nanmin(y)
    assert thin_x[-1] == x[-1]
    assert thin(x[:MOST_POINTS], y[:MOST_POINTS])[0].tolist() == x[:MOST_POINTS].tolist()


def test_thinning_keeps_gaps():
    x, y = np.arange(9000.0), np.full(9000, np.nan)
    assert np.isnan(thin(x, y)[1]).all()


def test_ecdf_is_the_share_at_or_below():
    values, share = ecdf(np.array([3.0, 1.0, 2.0, 2.0]))
    assert (values.tolist(), share.tolist()) == ([1.0, 2.0, 2.0, 3.0], [0.25, 0.5, 0.75, 1.0])
    values, share = ecdf(np.random.default_rng(1).random(50_000))
    assert len(values) <= MOST_POINTS
    assert np.allclose(values, share, atol=0.01) and share[-1] == 1.0


@pytest.mark.slow
def test_long_runs_give_small_files(tmp_path):
    written = make_report([write_run(tmp_path / "run", n=20_000)], tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (written.parent / "figures").iterdir()}
    assert max(sizes.values()) < 400_000, sizes
