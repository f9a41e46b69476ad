"""`headrace bench` as the shell sees it: what goes to stdout, what to stderr, the files, and the exit code."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from aiohttp import web
from fake_server import FakeServer, answer_all
from rich.console import Console

from headrace import cli
from loadgen import cli as bench_cli
from simulator.output.run_files import read_run

LOAD = ("--lengths", "p6d3", "--rate", "200")


@pytest.fixture
def headrace(monkeypatch, capsys):
    """Runs the command as the shell does: exit code, stdout, stderr."""
    monkeypatch.setattr(bench_cli, "out", Console(width=200))
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
    monkeypatch.delenv("HEADRACE_URL", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["headrace", "bench", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def test_json_is_one_object_and_nothing_else_on_stdout(headrace, server):
    code, out, _ = headrace("--url", server.url, *LOAD, "--requests", "12", "--json")
    assert code == 0
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert (summary["model"], summary["workload"], summary["rate_rps"]) == ("tiny", "p6d3", 200.0)
    assert (summary["requests"], summary["completed"], summary["good"]) == (12, 12, 12)
    assert not summary["interrupted"]
    assert "notes" not in summary


def test_people_get_a_table(headrace, server):
    code, out, _ = headrace("--url", server.url, *LOAD, "--requests", "12", "--slo-ttft", "30", "--warmup", "2")
    assert code == 0
    rows = {line.strip("│ ").partition("│")[0].strip(): line for line in out.splitlines()}
    for name in ("goodput", "time to first token", "time per output token", "latency", "send lag"):
        assert name in rows
    assert " 10 " in rows["requests"]
    assert "p90" in rows["time to first token"]


def test_every_option_reaches_the_server_and_the_files(headrace, server, tmp_path):
    code, out, _ = headrace(
        "--url", server.url + "/v1", "--model", "large", "--api-key", "secret", "--lengths", "p6d3", "--rate", "100",
        "--arrivals", "uniform", "--requests", "5", "--seed", "9", "--slo-ttft", "30", "--slo-tpot", "20",
        "--slo-latency", "40", "--warmup", "1", "--timeout", "50", "--declare-lengths", "--label", "ours",
        "--out", str(tmp_path / "run"), "--json",
    )
    assert code == 0
    assert {call["model"] for call in server.calls} == {"large"}
    assert server.keys == ["Bearer secret"] * 5
    assert server.calls[0]["vllm_xargs"] == {"expected_output_tokens": 3}
    run = read_run(tmp_path / "run")
    assert run.requests()["arrival_s"].to_pylist() == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert run.config["policy"] == "ours"
    assert run.config["slo"] == {"ttft_s": 30.0, "tpot_s": 20.0, "latency_s": 40.0}
    assert (run.config["workload"]["seed"], run.config["workload"]["arrivals"]) == (9, "uniform")
    assert (run.config["timeout_s"], run.config["declare_lengths"]) == (50.0, True)
    assert run.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(out) == {key: value for key, value in run.summary.items() if key != "notes"}
    assert "secret" not in (tmp_path / "run" / "summary.json").read_text() + json.dumps(run.config)


def test_the_key_comes_from_the_environment_too(headrace, server, monkeypatch):
    monkeypatch.setenv("HEADRACE_API_KEY", "from-there")
    monkeypatch.setenv("HEADRACE_URL", server.url)
    assert headrace(*LOAD, "--requests", "1")[0] == 0
    assert server.keys == ["Bearer from-there"]


def test_the_same_seed_sends_the_same_load(headrace, server):
    for seed in ("1", "1", "2"):
        headrace("--url", server.url, "--lengths", "lmsys", "--rate", "500", "--requests", "9", "--seed", seed)
    lengths = [(len(call["prompt"]), call["max_tokens"]) for call in server.calls]
    first, again, other = (sorted(lengths[i : i + 9]) for i in (0, 9, 18))
    assert first == again != other


def test_a_duration_ends_the_arrivals(headrace, server):
    code, out, _ = headrace(
        "--url", server.url, "--lengths", "p6d3", "--rate", "100", "--arrivals", "uniform", "--duration", "0.105",
        "--json",
    )
    assert (code, json.loads(out)["requests"]) == (0, 10)


def test_a_trace_is_replayed_whole(headrace, server, tmp_path):
    trace = tmp_path / "day.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,40,8\n0.1,50,9\n0.2,60,7\n")
    code, out, _ = headrace("--url", server.url, "--trace", str(trace), "--arrivals", "replay", "--json")
    assert code == 0
    assert (json.loads(out)["workload"], json.loads(out)["requests"]) == ("day", 3)
    assert sorted((len(call["prompt"]), call["max_tokens"]) for call in server.calls) == [(40, 8), (50, 9), (60, 7)]


def test_what_the_model_cannot_hold_is_left_out_and_told(headrace):
    with FakeServer(max_model_len=100) as server:
        code, out, err = headrace(
            "--url", server.url, "--lengths", "0.5:p6d3+0.5:p99d9", "--rate", "500", "--requests", "8", "--json"
        )
    assert (code, json.loads(out)["completed"]) == (0, 8)
    assert "100.0% of p99d9 left out" in err


def test_rejections_and_failures_are_counted_apart(headrace):
    async def answer(call):
        if call.number == 1:
            return web.json_response({"message": "full"}, status=429, headers={"Retry-After": "4"})
        if call.number == 2:
            return web.json_response({"message": "broken"}, status=500)
        return await answer_all(call)

    with FakeServer(answer) as server:
        code, out, err = headrace("--url", server.url, *LOAD, "--requests", "5", "--json")
    summary = json.loads(out)
    assert code == 0
    assert (summary["completed"], summary["rejected"], summary["failed"]) == (3, 1, 1)
    assert summary["retry_after_p50_s"] == 4.0
    assert "1 times: HTTP 500: broken" in err


def test_nothing_but_failures_is_a_failure(headrace):
    async def fail(call):
        return web.json_response({"message": "broken"}, status=500)

    with FakeServer(fail) as server:
        code, out, _ = headrace("--url", server.url, *LOAD, "--requests", "3", "--json")
    assert (code, json.loads(out)["failed"]) == (1, 3)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    async def interrupt_at_the_third(call):
        if call.number < 3:
            return await answer_all(call)
        if call.number == 3:
            process.send_signal(signal.SIGINT)
        return await asyncio.Event().wait()

    with FakeServer(interrupt_at_the_third) as server:
        command = [
            sys.executable, "-c", "from headrace.cli import main; main()", "bench", "--url", server.url, "--json",
            "--lengths", "p6d3", "--rate", "4", "--arrivals", "uniform", "--requests", "100000",
            "--out", str(tmp_path / "run"),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads(out)
    assert summary["interrupted"]
    # On a busy machine more are sent before the signal arrives.
    assert summary["cancelled"] >= 1 and summary["requests"] - summary["cancelled"] == 2
    rows = read_run(tmp_path / "run").requests()
    assert rows["outcome"].to_pylist()[-1] == "cancelled"


def test_nothing_answers(headrace):
    with FakeServer() as server:
        url = server.url
    code, out, err = headrace("--url", url, *LOAD, "--requests", "3")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: nothing answers at {url} (")
    assert "headrace up" in err


def test_an_unknown_model_lists_the_known_ones(headrace, server):
    code, out, err = headrace("--url", server.url, "--model", "huge", *LOAD, "--requests", "3")
    assert (code, out) == (1, "")
    assert "has no model 'huge'; its models are: tiny, large" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "p6d3", "--rate", "1"), "neither --requests nor --duration"),
        ((*LOAD, "--requests", "3", "--duration", "3"), "give one of them"),
        ((*LOAD, "--requests", "3", "--trace", "x.csv"), "give exactly one of them"),
        (("--trace", "x.csv", "--rate", "1"), "cannot read x.csv: No such file"),
        (("--requests", "3", "--rate", "1"), "lengths is None and trace is None"),
        (("--lengths", "p6d3", "--requests", "3"), "rate_rps is None"),
        ((*LOAD, "--requests", "3", "--slo-ttft", "0"), "slo.ttft_s = 0.0: Input should be greater than 0"),
        ((*LOAD, "--requests", "3", "--slo-tpot", "-1"), "slo.tpot_s = -1.0"),
        ((*LOAD, "--requests", "3", "--slo-latency", "nan"), "slo.latency_s = nan"),
        ((*LOAD, "--requests", "3", "--timeout", "0"), "timeout_s = 0.0"),
        ((*LOAD, "--duration", "-1"), "duration_s = -1.0"),
        ((*LOAD, "--requests", "3", "--warmup", "3"), "--warmup = 3, but there are only 3 requests"),
        (("--lengths", "p6", "--rate", "1", "--requests", "3"), "workload.lengths = 'p6'"),
        ((*LOAD, "--requests", "3", "--arrivals", "sometimes"), "workload.arrivals = 'sometimes'"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(headrace, server, arguments, said):
    code, out, err = headrace("--url", server.url, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert server.calls == []


def test_a_url_that_is_none(headrace):
    code, _, err = headrace("--url", "localhost", *LOAD, "--requests", "3")
    assert code == 1
    assert "--url = 'localhost' is not a URL" in err


def test_the_command_does_not_import_the_engine():
    check = "import headrace.cli, sys; sys.exit(bool({'vllm', 'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], env=os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }).returncode == 0
