"""Sweeps: which points there are, what they are called, and what happens when one fails, dies or is interrupted."""

import multiprocessing
import os
import signal

import pytest
import yaml

from simulator.config import SimulationError
from simulator.output.rows import RequestRow
from simulator.output.run_files import RunWriter, read_run
from simulator.sweep import SweepPlan, load_sweep, run_sweep

FILE = """
base: {profile: a100-llama2-7b, slo: {ttft_s: 1.0}}
grid:
  policy: [vllm, wait]
  slo.tpot_s: [0.1, 0.2]
seeds: [1, 2]
out: results
"""


def run_one(options, folder):
    """A run with one request that encodes the options, written as the real simulator does."""
    if options.get("fails"):
        raise ValueError(f"fails is {options['fails']!r}")
    if options.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{folder.name}\n")
    options["changed"] = "by the run itself"
    with RunWriter(folder, {"config": {"rate": options["rate"]}, "versions": {}}) as writer:
        writer.request(RequestRow(0, 0, "all", 0.0, 1.0, 2.0, options["rate"], 5, 0, "completed"))
        writer.close({"rate_rps": options["rate"]})
    return {"rate_rps": options["rate"]}


def interrupt_and_wait(options, folder):
    """What Ctrl-C finds: a run half written, which nothing but a signal ends."""
    with RunWriter(folder, {"config": {}, "versions": {}}) as writer:
        writer.request(RequestRow(0, 0, "all", 0.0, 1.0, 2.0, 1, 5, 0, "completed"))
        os.kill(os.getppid(), signal.SIGINT)
        while True:
            signal.pause()


def plan_in(folder, **grid):
    return SweepPlan(grid=grid, out=folder)


def calls(folder):
    return sorted((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else []


def write(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_points_are_the_grid_in_file_order(tmp_path):
    points = load_sweep(write(tmp_path, FILE)).points()
    assert [point.name for point in points] == [
        f"policy={policy},slo.tpot_s={tpot},seed={seed}"
        for policy in ("vllm", "wait") for tpot in (0.1, 0.2) for seed in (1, 2)
    ]
    assert points[3].options == {
        "profile": "a100-llama2-7b", "slo": {"ttft_s": 1.0, "tpot_s": 0.2}, "policy": "vllm", "seed": 2,
    }


def test_points_do_not_share_their_options(tmp_path):
    points = load_sweep(write(tmp_path, FILE)).points()
    points[0].options["slo"]["ttft_s"] = 9.0
    assert points[1].options["slo"]["ttft_s"] == 1.0


def test_grid_overrides_base_and_no_grid_is_one_point(tmp_path):
    assert SweepPlan(base={"rate": 1}, grid={"rate": [2]}, out=tmp_path).points()[0].options == {"rate": 2}
    assert [tuple(point) for point in SweepPlan(base={"rate": 1}, out=tmp_path).points()] == [("base", {"rate": 1})]


def test_names_are_stable_and_fit_for_files(tmp_path):
    values = [22, 0.5, None, True, "p58d147", "a/b", "a b", {"n": 8}, "x" * 300]
    names = [point.name for point in plan_in(tmp_path, rate=values).points()]
    assert names[:5] == ["rate=22", "rate=0.5", "rate=null", "rate=true", "rate=p58d147"]
    assert names[5:8] == ["rate=a_b-c14cddc0", "rate=a_b-c8687a08", "rate=n_:8-b3006330"]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name.encode()) < 255 for name in names)


def test_many_keys_make_a_name_that_fits(tmp_path):
    grid = {f"option_{i}": ["a-rather-long-value", "b"] for i in range(8)}
    names = [point.name for point in plan_in(tmp_path, **grid).points()]
    assert len(set(names)) == 256
    assert max(map(len, names)) <= 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, r"grids: no such key; allowed here: base, grid, seeds, out; did you mean grid\?"),
        ({"out": None}, r"out = None: "),
        ({"grid": {"policy": "wait"}}, r"grid.policy = 'wait': Input should be a valid list"),
        ({"grid": {"policy": []}}, r"grid.policy = \[\]: List should have at least 1 item"),
        ({"grid": {"policy": ["wait", "vllm", "wait"]}}, r"grid: policy has the value wait more than once"),
        ({"grid": {"profile.d0": [1]}}, r"profile.d0 is within profile, which is 'a100-llama2-7b'; .* a mapping"),
        ({"grid": {"seed": [1]}}, r"seeds = \[1, 2\]: grid has seed as well"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\]: seed has the value 1 more than once"),
        ({"base": {"rate": float("inf")}}, r"base: rate is inf; it must be finite numbers"),
    ],
)
def test_a_bad_file_names_the_key(tmp_path, change, message):
    path = write(tmp_path, yaml.safe_dump(yaml.safe_load(FILE) | change))
    with pytest.raises(SimulationError, match=message):
        load_sweep(path)


def test_a_file_that_is_no_sweep(tmp_path):
    with pytest.raises(SimulationError, match=r"cannot read .*sweep.yaml: No such file"):
        load_sweep(tmp_path / "sweep.yaml")
    with pytest.raises(SimulationError, match="is not YAML"):
        load_sweep(write(tmp_path, "grid: ["))
    with pytest.raises(SimulationError, match="is empty or not a mapping"):
        load_sweep(write(tmp_path, "[1, 2]"))


def test_workers_must_be_some(tmp_path):
    with pytest.raises(ValueError, match=r"workers is 0; it must be >= 1"):
        run_sweep(plan_in(tmp_path, rate=[1]), run_one, 0)


@pytest.mark.slow
def test_a_sweep_runs_every_point_and_resumes(tmp_path):
    results = run_sweep(plan_in(tmp_path, rate=[3, 1, 2]), run_one, 2)
    assert [(r.name, r.status, r.summary) for r in results] == [
        (f"rate={rate}", "done", {"rate_rps": rate}) for rate in (3, 1, 2)
    ]
    assert read_run(tmp_path / "rate=2").config == {"rate": 2}
    assert calls(tmp_path) == ["rate=1", "rate=2", "rate=3"]

    (tmp_path / "calls").unlink()
    (tmp_path / "rate=1" / "requests.parquet").write_bytes(b"PAR1")
    results = run_sweep(plan_in(tmp_path, rate=[1, 2, 3, 4]), run_one, 1)
    assert [(r.name, r.status) for r in results] == [
        ("rate=1", "done"), ("rate=2", "kept"), ("rate=3", "kept"), ("rate=4", "done"),
    ]
    assert results[1].summary == {"rate_rps": 2}
    assert calls(tmp_path) == ["rate=1", "rate=4"]


@pytest.mark.slow
def test_other_options_run_again_and_equal_ones_need_no_worker(tmp_path):
    plan = SweepPlan(base={"slo": 1}, grid={"rate": [1]}, out=tmp_path)
    assert run_sweep(plan, run_one, 1)[0].status == "done"
    assert run_sweep(plan, None, 1)[0].status == "kept"
    assert run_sweep(plan.model_copy(update={"base": {"slo": 2}}), run_one, 1)[0].status == "done"
    assert calls(tmp_path) == ["rate=1", "rate=1"]


@pytest.mark.slow
def test_a_failing_point_does_not_stop_the_others(tmp_path):
    plan = SweepPlan(base={"rate": 1}, grid={"fails": ["here", False]}, out=tmp_path)
    results = run_sweep(plan, run_one, 1)
    assert [(r.status, r.error) for r in results] == [("failed", "ValueError: fails is 'here'"), ("done", None)]


@pytest.mark.slow
def test_a_dying_process_is_only_its_own_points_failure(tmp_path):
    plan = SweepPlan(base={"rate": 1}, grid={"dies": [True, False], "x": [1, 2]}, out=tmp_path)
    results = run_sweep(plan, run_one, 2)
    assert [(r.status, r.error) for r in results] == [
        ("failed", "its process died, perhaps for want of memory"),
        ("failed", "its process died, perhaps for want of memory"),
        ("done", None),
        ("done", None),
    ]
    assert not multiprocessing.active_children()


@pytest.fixture
def ctrl_c_is_heard():
    """A shell starts background commands deaf to Ctrl-C, and the tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_leaves_no_half_run(tmp_path, ctrl_c_is_heard):
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan_in(tmp_path, rate=[1, 2, 3]), interrupt_and_wait, 1)
    assert not multiprocessing.active_children()
    assert [path.name for path in tmp_path.rglob("*")] == ["rate=1"]
