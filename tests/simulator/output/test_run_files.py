"""Runs on disk: what is written is what is read, and a run that ends badly leaves nothing."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simulator.output import run_files as results
from simulator.output.rows import (
    CONTROL_SCHEMA,
    ITERATION_SCHEMA,
    REQUEST_SCHEMA,
    ControlRow,
    IterationRow,
    RequestRow,
)
from simulator.output.run_files import RunError, RunWriter, read_run, versions

HEADER = {"config": {"policy": "wait", "workload": {"rate_rps": 2.0}}, "versions": {"python": "3.11"}}
SUMMARY = {"goodput_rps": 1.5, "latency_p99_s": None}
SERVED = RequestRow(0, 1, "chat", 0.5, 1.0, 3.25, 58, 147, 2, "completed")
REJECTED_ROW = RequestRow(1, 0, "code", 0.75, None, None, 5000, 1, 0, "rejected")
CAPPED = IterationRow(0, 0.5, 0.0112, 58, 0, 58, 64, 1, 1, 0, 0, 0, 32, 2048)
UNCAPPED = IterationRow(1, 0.6, 0.0113, 0, 4, 99, 128, 4, 5, 6, 7, 8, None, None)


def write_run(folder, requests=(SERVED, REJECTED_ROW), iterations=(CAPPED, UNCAPPED), **options):
    with RunWriter(folder, HEADER, **options) as writer:
        for row in requests:
            writer.request(row)
        for row in iterations:
            writer.iteration(row)
        writer.close(SUMMARY)
    return folder


def rows(table):
    return [tuple(row.values()) for row in table.to_pylist()]


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    run = read_run(write_run(tmp_path / "a" / "run"))
    assert (run.config, run.versions, run.summary) == (HEADER["config"], HEADER["versions"], SUMMARY)
    assert rows(run.requests()) == [SERVED, REJECTED_ROW]
    assert rows(run.iterations()) == [CAPPED, UNCAPPED]
    assert run.requests().schema.equals(REQUEST_SCHEMA)
    assert run.iterations().schema.equals(ITERATION_SCHEMA)
    assert file_names(run.folder) == ["iterations.parquet", "requests.parquet"]


def test_rows_have_the_schemas_fields():
    assert RequestRow._fields == tuple(REQUEST_SCHEMA.names)
    assert IterationRow._fields == tuple(ITERATION_SCHEMA.names)
    assert ControlRow._fields == tuple(CONTROL_SCHEMA.names)


def test_each_file_carries_the_whole_header(tmp_path):
    write_run(tmp_path)
    for name in ("requests.parquet", "iterations.parquet"):
        metadata = pq.read_metadata(tmp_path / name).metadata
        assert json.loads(metadata[b"headrace"]) == HEADER | {"summary": SUMMARY}


def test_some_columns_only(tmp_path):
    run = read_run(write_run(tmp_path))
    assert run.requests(["arrival_s", "type"]).to_pydict() == {"arrival_s": [0.5, 0.75], "type": ["chat", "code"]}
    with pytest.raises(ValueError, match=r"'latency' is not a column of requests.parquet; it has index, "):
        run.requests(["latency"])


def test_row_groups_are_flushed_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROWS_PER_GROUP", 4)
    served = [SERVED._replace(index=i, type=f"type-{i}") for i in range(10)]
    run = read_run(write_run(tmp_path, requests=served))
    file = pq.ParquetFile(tmp_path / "requests.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert rows(run.requests()) == served


def test_requests_can_be_read_before_the_run_is_closed(tmp_path):
    with RunWriter(tmp_path, HEADER) as writer:
        writer.request(SERVED)
        assert rows(pq.read_table(writer.written_requests())) == [SERVED]
        writer.close(SUMMARY)
    assert rows(read_run(tmp_path).requests()) == [SERVED]


def test_without_a_folder_rows_live_until_the_end():
    with RunWriter(None, HEADER) as writer:
        writer.request(SERVED)
        writer.iteration(CAPPED)
        path = writer.written_requests()
        assert pq.read_table(path).num_rows == 1
        writer.close(SUMMARY)
    assert not path.parent.exists()


def test_without_iterations(tmp_path):
    write_run(tmp_path)
    run = read_run(write_run(tmp_path, iterations=[CAPPED]))
    assert run.has_iterations
    with RunWriter(tmp_path, HEADER, iterations=False) as writer:
        writer.iteration(CAPPED)
        writer.close(SUMMARY)
    assert not read_run(tmp_path).has_iterations
    with pytest.raises(RunError, match="without iterations"):
        read_run(tmp_path).iterations()


def test_an_empty_run_is_a_run(tmp_path):
    run = read_run(write_run(tmp_path, requests=[], iterations=[]))
    assert run.requests().num_rows == run.iterations().num_rows == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_file(tmp_path, error):
    with pytest.raises(error), RunWriter(tmp_path, HEADER) as writer:
        writer.request(SERVED)
        writer.written_requests()
        writer.iteration(CAPPED)
        raise error
    assert file_names(tmp_path) == []


def test_an_exception_leaves_the_older_run(tmp_path):
    write_run(tmp_path)
    with pytest.raises(RuntimeError), RunWriter(tmp_path, HEADER) as writer:
        writer.request(REJECTED_ROW)
        raise RuntimeError
    assert rows(read_run(tmp_path).requests()) == [SERVED, REJECTED_ROW]


def test_a_block_left_without_close_leaves_no_file(tmp_path):
    with RunWriter(tmp_path, HEADER) as writer:
        writer.request(SERVED)
    assert file_names(tmp_path) == []


def test_a_killed_run_is_no_run(tmp_path):
    writer = RunWriter(tmp_path, HEADER)
    writer.request(SERVED)
    writer.written_requests()
    with pytest.raises(RunError, match=r"it has no requests.parquet"):
        read_run(tmp_path)
    assert all(name.startswith(".") for name in file_names(tmp_path))
    assert read_run(write_run(tmp_path)).requests().num_rows == 2
    writer.discard()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SERVED._replace(arrival_s=None), "arrival_s is None"),
        (SERVED._replace(replica=40_000), "replica must be int16"),
        (SERVED._replace(prompt_tokens="many"), "prompt_tokens must be int32"),
    ],
)
def test_a_bad_row_names_its_field(tmp_path, row, message):
    with RunWriter(tmp_path, HEADER) as writer:
        writer.request(row)
        with pytest.raises(ValueError, match=message):
            writer.close(SUMMARY)
    assert file_names(tmp_path) == []


def test_a_header_json_cannot_carry_is_rejected_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="finite JSON values"):
        RunWriter(tmp_path / "run", {"config": {"max_hold_s": float("inf")}, "versions": {}})
    assert not (tmp_path / "run").exists()


def test_a_bad_summary_leaves_no_file(tmp_path):
    with RunWriter(tmp_path, HEADER) as writer, pytest.raises(ValueError, match="finite JSON values"):
        writer.close({"goodput_rps": float("nan")})
    assert file_names(tmp_path) == []


def test_what_is_not_a_run_is_said(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it has no requests.parquet"):
        read_run(tmp_path / "absent")
    write_run(tmp_path)
    path = tmp_path / "requests.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"requests.parquet is not a whole Parquet file"):
        read_run(tmp_path)
    pq.write_table(pa.table({"index": pa.array([1], pa.int64())}), path)
    with pytest.raises(RunError, match="it has no column replica of int16"):
        read_run(tmp_path)
    pq.write_table(REQUEST_SCHEMA.empty_table(), path)
    with pytest.raises(RunError, match="metadata has no config, versions and summary"):
        read_run(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "iterations.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"iterations.parquet is not a whole Parquet file"):
        read_run(tmp_path)


def test_versions_name_the_installed_packages():
    found = versions()
    assert {"python", "headrace", "numpy", "pyarrow"} <= found.keys()
    assert found["numpy"].startswith("2.")
