"""`headrace simulate` as the shell sees it: what goes to stdout, what to stderr, and the exit code."""

import json
import sys

import pytest
from rich.console import Console

from headrace import cli
from simulator import cli as simulator_cli
from simulator.output.run_files import read_run

ESTIMATE = ("profile", "estimate")
QUICK = ("simulate", "--workload", "p40d8", "--rate", "20", "--requests", "20")


@pytest.fixture
def headrace(monkeypatch, capsys):
    """Runs the command as the shell does: exit code, stdout, stderr."""
    monkeypatch.setattr(simulator_cli, "out", Console(width=200))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.engine
def test_json_is_one_object_and_nothing_else_on_stdout(headrace):
    code, out, _ = headrace(*QUICK, "--json")
    assert code == 0
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert (summary["policy"], summary["rate_rps"], summary["completed"]) == ("vllm", 20.0, 20)
    assert "notes" not in summary


@pytest.mark.engine
def test_people_get_a_table(headrace):
    code, out, _ = headrace(*QUICK, "--policy", "wait", "--slo-ttft", "0.5")
    assert code == 0
    rows = {line.strip("│ ").partition("│")[0].strip(): line for line in out.splitlines()}
    for name in ("policy", "goodput_rps", "latency_p99_s", "preemptions"):
        assert name in rows
    assert "wait" in rows["policy"]


@pytest.mark.engine
def test_notes_go_to_stderr(headrace):
    lengths = "0.5:p40d8+0.5:p9000d8"
    code, out, err = headrace("simulate", "--workload", lengths, "--rate", "20", "--requests", "9", "--json")
    assert code == 0
    assert json.loads(out)["completed"] == 9
    assert "note: 100.0% of p9000d8 left out" in err


@pytest.mark.engine
def test_every_option_reaches_the_run(headrace, tmp_path):
    code, _, _ = headrace(
        *QUICK, "--arrivals", "uniform", "--seed", "5", "--policy", "wait", "--profile", "a100-llama2-7b-paper",
        "--kv-tokens", "20000", "--token-budget", "1024", "--cap", "6", "--slo-ttft", "0.5", "--slo-tpot", "0.1",
        "--slo-latency", "9", "--replicas", "2", "--set", "max_hold_s=0.5", "--set", "max_num_seqs=64",
        "--set", "types=[{name: all, n: 2}]", "--out", str(tmp_path / "run"), "--json",
    )
    assert code == 0
    run = read_run(tmp_path / "run")
    assert run.has_iterations
    assert run.requests().num_rows == 20
    config = run.config
    assert (config["workload"]["lengths"], config["workload"]["rate_rps"]) == ("p40d8", 20.0)
    assert (config["workload"]["arrivals"], config["workload"]["seed"]) == ("uniform", 5)
    assert (config["policy"], config["profile"], config["kv_tokens"]) == ("wait", "a100-llama2-7b-paper", 20_000)
    assert (config["token_budget"], config["cap"], config["replicas"], config["max_num_seqs"]) == (1024, 6, 2, 64)
    assert config["slo"] == {"ttft_s": 0.5, "tpot_s": 0.1, "latency_s": 9.0}
    active = config["thresholds_in_force"]
    assert (active["max_hold_s"], active["max_running"]) == (0.5, 6)
    assert [(entry["name"], entry["n"]) for entry in active["types"]] == [("all", 2)]


@pytest.mark.engine
def test_a_trace_is_replayed(headrace, tmp_path):
    trace = tmp_path / "day.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,40,8\n1,50,9\n3,60,7\n")
    code, out, _ = headrace("simulate", "--trace", str(trace), "--arrivals", "replay", "--json")
    assert code == 0
    summary = json.loads(out)
    assert (summary["workload"], summary["completed"]) == ("day", 3)
    assert 3 < summary["virtual_s"] < 4


@pytest.mark.engine
def test_a_thousand_requests_unless_told_otherwise(headrace):
    code, out, _ = headrace("simulate", "--workload", "p8d1", "--rate", "50", "--json")
    assert code == 0
    assert json.loads(out)["requests"] == 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "wiat"), "the policies are vllm,"),
        (("--profile", "a200"), "known profiles: a100-llama2-7b,"),
        (("--set", "max_holds=1"), "no option 'max_holds'; did you mean max_hold_s?"),
        (("--set", "cap"), "'cap' is not KEY=VALUE"),
        (("--set", "cap=many"), "cap = 'many'"),
        (("--set", "types=["), "the value of types is not YAML"),
        (("--set", "give_up_s=.inf"), "the value of give_up_s is not YAML that JSON can carry"),
        (("--trace", "x.csv"), "give exactly one of them"),
        (("--workload", "p40"), "workload.lengths = 'p40'"),
        (("--rate", "-1"), "workload.rate_rps = -1.0"),
        pytest.param(("--policy", "fcfs", "--cap", "600"), "max_running = 600", marks=pytest.mark.engine),
        pytest.param(
            ("--policy", "vllm-v0", "--token-budget", "512"), "max_num_batched_tokens (512)", marks=pytest.mark.engine
        ),
        pytest.param(("--kv-tokens", "32"), "no request of p40d8 is left", marks=pytest.mark.engine),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(headrace, arguments, said, tmp_path):
    code, out, err = headrace(*QUICK, *arguments, "--out", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "requests.parquet").exists()


@pytest.mark.engine
@pytest.mark.parametrize(("arguments", "said"), [
    (("--policy", "fluid", "--set", "prefill_chunk_tokens=0"), "prefill_chunk_tokens = 0 is not allowed"),
    (("--policy", "sarathi", "--set", "max_running=4"), "vLLM's own scheduler, which has no max_running"),
    (("--set", "counts=by_cap", "--cap", "4"), "policy vllm is vLLM's own scheduler, which has no counts"),
    (("--policy", "fluid", "--solve-once", "--set", "law_error=1e300"), "law_error = '1e300'"),
    (("--set", "speculative_tokens=3"), "error: speculative_tokens and acceptance_rate go together"),
    (("--out", "{folder}/file"), "cannot be written: File exists"),
])
def test_what_cannot_be_run_is_one_line_and_exit_code_2(headrace, arguments, said, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = headrace(*QUICK, *(one.format(folder=tmp_path) for one in arguments))
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


@pytest.mark.engine
@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_a_trace_that_nests_too_deeply_has_bad_rows(headrace, tmp_path, name):
    deep = "[" * 100_000
    (tmp_path / name).write_text(f'{{"timestamp": 0, "x": {deep}\n' if name.endswith("l") else f'[{{"x": {deep}')
    code, _, err = headrace("simulate", "--trace", str(tmp_path / name), "--rate", "1", "--requests", "5")
    assert code == 2 and "bad" in err and "Traceback" not in err


@pytest.mark.parametrize("command", [
    ("report", "{folder}"),
    (*ESTIMATE, "--model-config", "{folder}/config.json", "--accelerator", "h100", "--output", "{folder}/x/y"),
])
def test_folders_that_do_not_serve_are_one_line_and_exit_code_2(headrace, tmp_path, command):
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
             "num_hidden_layers": 2, "num_key_value_heads": 4, "vocab_size": 1000, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"architectures": ["LlamaForCausalLM"]}))
    code, _, err = headrace(*(one.format(folder=tmp_path) for one in command))
    assert code == 2 and str(tmp_path) in err.replace("\n", "")


def test_nothing_asked_for_says_what_is_missing(headrace):
    code, out, err = headrace("simulate")
    assert (code, out) == (2, "")
    assert "lengths is None and trace is None" in err


def test_an_option_that_does_not_exist_is_asked_wrongly(headrace):
    code, out, err = headrace("simulate", "--polcy", "wait")
    assert (code, out) == (2, "")
    assert "--polcy" in err
