"""`headrace plan`: numbers against the fluid model worked out by hand, and inputs that cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.plan import parse_type
from headrace import cli
from scheduler.model.workload import Lengths, RequestType

DOCUMENTED = (
    "--type", "rate=50,prompt=58,output=147", "--d0", "0.0112", "--d1", "4.24e-7", "--d2", "0", "--kv-tokens", "137000",
)
TIME_MODEL = ("--d0", "0.0112", "--d1", "4.24e-7", "--kv-tokens", "137000")
WORKLOAD = ("--type", "rate=50,prompt=58,output=147")
REQUIRED_KEYS = {
    "load", "iteration_time_s", "memory_tokens", "throughput_tokens_per_s", "stable", "fits_memory",
    "critical_rate_scale", "thresholds",
}
# One request of 58 + 147 tokens: (147 + 1) iterations holding 58 + 147/2 tokens on average.
W = 148 * (58 + 147 / 2)


def planned(*arguments: str) -> dict[str, Any]:
    """The plan as a program reads it; anything that is not strict JSON fails."""
    result = CliRunner().invoke(cli.app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=_reject)  # type: ignore[no-any-return]


def _reject(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def rejected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command to its end as the shell does: nothing on stdout, exit code 2, and the message."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["headrace", "plan", *arguments, "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        return captured.err

    return run


def test_documented_command_gives_the_numbers_of_the_paper_s_equilibrium() -> None:
    plan = planned(*DOCUMENTED)
    load = 4.24e-7 * 50 * W
    iteration_s = 0.0112 / (1 - load)
    assert plan.keys() >= REQUIRED_KEYS
    assert plan["load"] == pytest.approx(load, rel=1e-12)
    assert plan["load"] == pytest.approx(0.412594, rel=1e-5)
    assert plan["iteration_time_s"] == pytest.approx(iteration_s, rel=1e-12)
    assert plan["memory_tokens"] == pytest.approx(0.0112 * 50 * W / (1 - load), rel=1e-12)
    assert plan["throughput_tokens_per_s"] == 50 * 147
    assert plan["stable"] is True
    assert plan["fits_memory"] is True
    assert plan["reason"] is None
    # M*(s) = s rate w d0/(1 - s load) reaches the capacity at this multiple of the rate.
    assert plan["critical_rate_scale"] == pytest.approx(137000 / (50 * W * 0.0112 + load * 137000), rel=1e-12)


def test_documented_command_s_thresholds_keep_up_and_fit() -> None:
    thresholds = planned(*DOCUMENTED)["thresholds"]
    # ceil(50 * 1.05 * 0.01907) = 2 prompts a stage: 50 * (d0 + d1 * 2 w) = 1.4 arrive while 2 are served.
    assert thresholds["wait"]["n"] == {"type-1": 2}
    assert thresholds["wait"]["memory_tokens"] == pytest.approx(2 * W)
    assert thresholds["wait"]["iteration_s"] == pytest.approx(0.0112 + 4.24e-7 * 2 * W)
    nested = thresholds["nested_wait"]
    assert nested["boundaries"] == [147]
    assert nested["memory_tokens"] + nested["buffer_tokens"] <= 137000
    assert thresholds["max_in_service"] * (W / 148) < 137000


def test_the_critical_rate_is_where_memory_fills_up() -> None:
    critical = planned(*DOCUMENTED)["critical_rate_scale"]
    at_edge = planned("--type", f"rate={50 * critical},prompt=58,output=147", *TIME_MODEL)
    assert at_edge["memory_tokens"] == pytest.approx(137000, rel=1e-9)


def test_unstable_is_an_answer_with_a_reason() -> None:
    plan = planned("--type", "rate=500,prompt=58,output=147", *TIME_MODEL)
    assert plan["stable"] is False
    assert plan["fits_memory"] is False
    assert plan["iteration_time_s"] is None
    assert plan["memory_tokens"] is None
    assert plan["load"] == pytest.approx(4.24e-7 * 500 * W)
    assert "load is 4.126" in plan["reason"]
    assert plan["thresholds"]["wait"]["infeasible"] == plan["reason"]
    assert plan["thresholds"]["max_in_service"] >= 1


def test_too_little_memory_is_an_answer_with_a_reason() -> None:
    plan = planned(*WORKLOAD, "--d0", "0.0112", "--d1", "4.24e-7", "--kv-tokens", "5000")
    assert plan["stable"] is True
    assert plan["fits_memory"] is False
    assert plan["memory_tokens"] > 5000
    assert "KV capacity of 5000 tokens" in plan["reason"]
    assert plan["critical_rate_scale"] < 1


def test_a_request_larger_than_memory_is_an_answer_with_a_reason() -> None:
    plan = planned(*WORKLOAD, "--d0", "0.0112", "--d1", "4.24e-7", "--kv-tokens", "204")
    assert plan["fits_memory"] is False
    assert "one request of 205 tokens" in plan["reason"]
    assert plan["critical_rate_scale"] == 0


@pytest.mark.parametrize("kv_tokens", ["137000", "5000", "204"])
@pytest.mark.parametrize("rate", ["50", "500"])
def test_people_get_the_verdict_in_words(rate: str, kv_tokens: str) -> None:
    arguments = ["plan", "--type", f"rate={rate},prompt=58,output=147", *TIME_MODEL[:4], "--kv-tokens", kv_tokens]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    feasible = rate == "50" and kv_tokens == "137000"
    assert ("stable, fits memory" in result.stdout) == feasible
    assert ("infeasible" in result.stdout) == (not feasible)


def test_types_add_up_and_keep_their_names() -> None:
    plan = planned(
        "--type", "rate=10,prompt=58,output=147,name=chat", "--type", "rate=5,prompt=200,output=20", *TIME_MODEL
    )
    w_second = 21 * (200 + 10)
    assert plan["load"] == pytest.approx(4.24e-7 * (10 * W + 5 * w_second))
    assert plan["throughput_tokens_per_s"] == pytest.approx(10 * 147 + 5 * 20)
    assert [entry["name"] for entry in plan["types"]] == ["chat", "type-2"]
    assert plan["thresholds"]["wait"]["n"].keys() == {"chat", "type-2"}


def test_two_types_of_equal_lengths_need_no_names() -> None:
    plan = planned(*WORKLOAD, *WORKLOAD, *TIME_MODEL)
    assert [entry["name"] for entry in plan["types"]] == ["type-1", "type-2"]


def test_a_profile_gives_law_and_memory_and_options_override_it() -> None:
    time_model = ("--d0", "0.0102484863577943", "--d1", "3.877682025836559e-07", "--kv-tokens", "137000")
    profile = planned(*WORKLOAD, "--profile", "a100-llama2-7b-paper")
    stated = planned(*WORKLOAD, *time_model)
    assert [one["sizing"]["candidates"][0].pop("name") for one in (profile, stated)] == [
        "a100-llama2-7b-paper", "as stated",
    ]
    assert profile == stated
    assert profile["kv_capacity_tokens"] == 137000
    faster = planned(*WORKLOAD, "--profile", "a100-llama2-7b-paper", "--d1", "0", "--kv-tokens", "50000")
    assert faster["load"] == 0
    assert faster["iteration_time_s"] == pytest.approx(0.0102484863577943)
    assert faster["kv_capacity_tokens"] == 50000


def test_prefill_cost_counts_as_load() -> None:
    plan = planned(*WORKLOAD, "--d0", "0.0112", "--d1", "4.24e-7", "--d2", "1e-5", "--kv-tokens", "137000")
    assert plan["load"] == pytest.approx(4.24e-7 * 50 * W + 1e-5 * 50 * 58)


def test_a_trace_with_bad_rows_is_used_without_them_and_says_so(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n58,147\n0,5\n58,many\n58,147\n")
    result = CliRunner().invoke(cli.app, ["plan", "--trace", str(trace), "--rate", "50", *TIME_MODEL, "--json"])
    assert result.exit_code == 0
    assert "2 of 4 rows left out" in result.stderr
    assert "line 3" in result.stderr
    assert "warnings" not in json.loads(result.stdout)
    assert json.loads(result.stdout)["load"] == pytest.approx(4.24e-7 * 50 * W)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:00:00,58,147\n"
BURSTGPT = "Timestamp,Request tokens,Response tokens\n0,58,147\n"
MOONCAKE = json.dumps({"timestamp": 0, "input_length": 58, "output_length": 147, "hash_ids": [0]})
SHAREGPT = json.dumps(
    [{"conversations": [{"from": "human", "value": "x" * 4 * 58}, {"from": "gpt", "value": "y" * 4 * 147}]}]
)


@pytest.mark.parametrize(
    ("name", "content"),
    [("azure.csv", AZURE), ("burst.csv", BURSTGPT), ("mooncake.jsonl", MOONCAKE), ("sharegpt.json", SHAREGPT)],
    ids=("azure", "burstgpt", "mooncake", "sharegpt"),
)
def test_a_trace_may_have_any_format_that_simulate_reads(tmp_path: Path, name: str, content: str) -> None:
    trace = tmp_path / name
    trace.write_text(content)
    plan = planned("--trace", str(trace), "--rate", "50", *TIME_MODEL)
    same = planned(*WORKLOAD, *TIME_MODEL)
    assert plan["load"] == pytest.approx(same["load"])
    assert plan["types"] == [same["types"][0] | {"name": "all"}]


def test_a_parquet_trace_is_read_too(tmp_path: Path) -> None:
    trace = tmp_path / "trace.parquet"
    pq.write_table(pa.table({"num_prefill_tokens": [58], "num_decode_tokens": [147]}), trace)
    assert planned("--trace", str(trace), "--rate", "50", *TIME_MODEL)["load"] == pytest.approx(4.24e-7 * 50 * W)


def test_a_clean_trace_says_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n58,147\n")
    result = CliRunner().invoke(cli.app, ["plan", "--trace", str(trace), "--rate", "50", *TIME_MODEL, "--json"])
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--type", "rte=50,prompt=58,output=147", *TIME_MODEL), ["--type", "rte=50", "name, rate, prompt, output"]),
        (("--type", "rate=50,prompt=58", *TIME_MODEL), ["--type", "output missing", "required"]),
        (("--type", "rate=fast,prompt=58,output=147", *TIME_MODEL), ["--type", "rate is 'fast'"]),
        (("--type", "rate=-50,prompt=58,output=147", *TIME_MODEL), ["--type", "rate_rps is -50.0", ">= 0"]),
        (("--type", "rate=nan,prompt=58,output=147", *TIME_MODEL), ["--type", "rate_rps is nan", "finite"]),
        (("--type", "rate=inf,prompt=58,output=147", *TIME_MODEL), ["--type", "rate_rps is inf", "finite"]),
        (("--type", "rate=0,prompt=58,output=147", *TIME_MODEL), ["rate_rps is 0 for every type", "> 0"]),
        (("--type", "rate=50,prompt=0,output=147", *TIME_MODEL), ["--type", "prompt is '0'", "between 1 and"]),
        (("--type", "rate=50,prompt=58,output=1.5", *TIME_MODEL), ["--type", "output is '1.5'", "integer"]),
        (("--type", "rate=1e308,prompt=58,output=147", *TIME_MODEL), ["too large"]),
        (
            ("--type", "rate=1,prompt=5,output=5,name=a", "--type", "rate=2,prompt=6,output=6,name=a", *TIME_MODEL),
            ["'a', 'a'", "distinct names"],
        ),
        (TIME_MODEL, ["--type", "--trace"]),
        ((*WORKLOAD, "--trace", "trace.csv", "--rate", "5", *TIME_MODEL), ["--type", "--trace"]),
        (WORKLOAD, ["--profile", "--d0", "--d1"]),
        ((*WORKLOAD, "--d0", "0.01"), ["--profile", "--d0", "--d1"]),
        ((*WORKLOAD, "--d0", "0.01", "--d1", "1e-7"), ["--kv-tokens", "--profile"]),
        ((*WORKLOAD, *TIME_MODEL[:4], "--kv-tokens", "0"), ["--kv-tokens = 0", ">= 1"]),
        ((*WORKLOAD, "--d0", "-1", *TIME_MODEL[2:]), ["--d0 = -1.0", ">= 0"]),
        ((*WORKLOAD, *TIME_MODEL, "--d2", "nan"), ["--d2 = nan", "finite"]),
        ((*WORKLOAD, *TIME_MODEL, "--floor", "inf"), ["--floor = inf", "finite"]),
        ((*WORKLOAD, "--d0", "0", *TIME_MODEL[2:]), ["d0_s and floor_s are both 0"]),
        ((*WORKLOAD, "--profile", "a100"), ["profile 'a100'", "a100-llama2-7b-paper"]),
        ((*WORKLOAD, *TIME_MODEL, "--overflow-probability", "0"), ["overflow_probability", "is 0.0"]),
        ((*WORKLOAD, *TIME_MODEL, "--overflow-probability", "0.6"), ["--overflow-probability", "0.5"]),
        ((*WORKLOAD, *TIME_MODEL, "--segments", "0"), ["--segments", "equal to 1"]),
        ((*WORKLOAD, *TIME_MODEL, "--kv-tokens", "many"), ["--kv-tokens", "integer"]),
        (("--trace", "/nowhere/trace.csv", "--rate", "5", *TIME_MODEL), ["/nowhere/trace.csv", "No such file"]),
    ],
)
def test_bad_inputs_are_rejected_with_what_is_allowed(
    rejected: Any, arguments: tuple[str, ...], said: list[str]
) -> None:
    message = rejected(*arguments)
    for part in said:
        assert part in message


@pytest.mark.parametrize("rate", [(), ("--rate", "0"), ("--rate", "-1"), ("--rate", "nan"), ("--rate", "inf")])
def test_a_trace_needs_a_rate(rejected: Any, tmp_path: Path, rate: tuple[str, ...]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n58,147\n")
    message = rejected("--trace", str(trace), *rate, *TIME_MODEL)
    assert "--rate = " in message
    assert "requests per second > 0" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,output\n58,147\n", "num_prefill_tokens"),
        ("num_prefill_tokens,num_decode_tokens\n0,0\n", "no usable row; trace.csv: 1 of 1 rows left out"),
        ("", "not those of a known format"),
    ],
)
def test_an_unusable_trace_is_named(rejected: Any, tmp_path: Path, content: str, said: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)
    message = rejected("--trace", str(trace), "--rate", "5", *TIME_MODEL)
    assert str(trace) in message
    assert said in message


def test_a_type_is_written_in_one_text() -> None:
    assert parse_type("rate=50,prompt=58,output=147") == RequestType("p58d147", 50.0, Lengths.point(58, 147))
    assert parse_type(" name=chat, output=2 ,prompt=3,rate=0.5").name == "chat"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate=50,promt=58,output=147", "'promt=58'.*name, rate, prompt, output"),
        ("rate=50,prompt=58", "output missing"),
        ("rate=50,prompt=58,output=1,output=2", "output is given twice"),
        ("rate=fast,prompt=58,output=147", "rate is 'fast'"),
        ("rate=-1,prompt=58,output=147", "rate_rps is -1"),
        ("rate=1,prompt=5.5,output=147", "prompt is '5.5'"),
        ("rate=1,prompt=5,output=0", "output is '0'"),
        ("rate,prompt=5,output=1", "'rate'"),
        ("", "''"),
    ],
)
def test_a_type_that_is_none_is_named_with_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_type(text)


SIZED = ("--type", "rate=10,prompt=900,output=230", "--ttft", "3", "--tpot", "0.08")
LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14_336, "vocab_size": 128_256, "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama3(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA3))
    return str(path)


def test_replicas_for_targets_on_a_profile() -> None:
    plan = planned("--type", "rate=9.5,prompt=900,output=230", *SIZED[2:], "--profile", "a100-llama2-7b")
    (one,) = plan["sizing"]["candidates"]
    assert plan["sizing"]["targets"] == {"ttft_s": 3.0, "tpot_s": 0.08, "latency_s": None}
    assert one["replicas"] == 2 and one["now"]["goodput_rps"] == pytest.approx(9.5)
    assert one["one_less"]["goodput_rps"] < 6 and one["one_less"]["load"] > 1
    assert one["one_more"]["load"] == pytest.approx(one["now"]["load"] * 2 / 3, rel=1e-6)
    assert (one["binds"], one["limit"]) == ("first token", "time")
    assert 4.5 < one["most_rps"] < 5.36 and one["estimated"] is False and one["replicas_low"] is None


def test_candidates_stand_side_by_side(llama3: str) -> None:
    plan = planned(
        *SIZED, "--profile", "a100-llama2-7b", "--model-config", llama3, "--accelerator", "a100-80", "--accelerator",
        "h100:2", "--accelerator", "l4:3",
    )
    found = {one["name"]: one for one in plan["sizing"]["candidates"]}
    assert list(found) == ["a100-llama2-7b", "a100-80:1", "h100:2", "l4:3"]
    assert "does not divide" in found["l4:3"]["error"] and found["l4:3"]["replicas"] is None
    two = found["h100:2"]
    assert two["accelerators_in_all"] == 2 * two["replicas"] and two["estimated"] is True
    assert two["replicas_low"] <= two["replicas"] <= two["replicas_high"]
    assert two["most_rps"] > found["a100-80:1"]["most_rps"] > 0
    assert plan["law"] == found["a100-llama2-7b"]["law"], "the other keys are the first candidate's"


def test_tensor_parallel_and_the_engine_s_limits_are_options(llama3: str) -> None:
    asked = (*SIZED, "--model-config", llama3, "--accelerator", "h100")
    (few,) = planned(*asked, "--tp", "2", "--max-num-seqs", "8")["sizing"]["candidates"]
    (many,) = planned(*asked, "--tp", "2")["sizing"]["candidates"]
    assert few["name"] == "h100:2" and few["binds"] in ("slots", "first token") and few["limit"] == "slots"
    assert few["most_rps"] < many["most_rps"]


def test_an_estimated_profile_s_file_keeps_its_interval(llama3: str, tmp_path: Path) -> None:
    path = tmp_path / "estimate.json"
    asked = ["profile", "estimate", "--model-config", llama3, "--accelerator", "a100-80", "--output", str(path)]
    assert CliRunner().invoke(cli.app, asked).exit_code == 0
    (one,) = planned(*SIZED, "--profile", str(path))["sizing"]["candidates"]
    assert one["estimated"] and one["replicas_low"] <= one["replicas"] <= one["replicas_high"]


@pytest.mark.parametrize(("more", "said"), [
    (("--profile", "a100-llama2-7b", "--ttft", "0"), "--ttft = 0.0 is not allowed; allowed: seconds > 0"),
    (("--accelerator", "h100"), "--model-config and --accelerator go together"),
    (("--profile", "a100-llama2-7b", "--model", "m"), "leave it out, or give --from URL"),
    (("--profile", "a100-llama2-7b", "--from", "http://127.0.0.1:1"), "or as --from URL"),
])
def test_options_of_sizing_that_cannot_be_used(rejected: Any, more: tuple[str, ...], said: str) -> None:
    assert said in " ".join(rejected(*SIZED, *more).split())


def test_a_single_accelerator_that_cannot_run_it_is_an_error(rejected: Any, llama3: str) -> None:
    said = rejected(*SIZED, "--model-config", llama3, "--accelerator", "h100:two")
    assert "allowed: NAME or NAME:TP" in said
    assert "is not known" in rejected(*SIZED, "--model-config", llama3, "--accelerator", "tpu")


def test_targets_that_cannot_be_met_are_an_answer(llama3: str) -> None:
    (one,) = planned(*SIZED[:2], "--tpot", "0.001", "--profile", "a100-llama2-7b")["sizing"]["candidates"]
    assert one["replicas"] is None and "below the" in one["reason"] and one["now"] is None


def test_people_see_how_many_and_what_one_more_buys(llama3: str) -> None:
    arguments = ["plan", *SIZED, "--model-config", llama3, "--accelerator", "a100-80", "--accelerator", "l4:3"]
    said = " ".join(CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "160"}).stdout.split())
    for part in (
        "replicas for 10 requests/s, TTFT 3 s, TPOT 0.08 s", "first token (time)", "one more: load", "l4:3: tensor",
        "in brackets: the ends of an estimate's interval; nothing was measured",
    ):
        assert part in said
