"""`headrace profile`: estimates out of files, and what a measurement makes of an engine's records."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.measure_profile import CPU_GRID, GPU_GRID, Engine, Grid, fitted_profile
from headrace import cli
from scheduler.config_errors import CommandFailed
from scheduler.messages import Counters, Gauges, Iteration, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.thresholds import EngineLimits, Thresholds

LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14_336, "vocab_size": 128_256, "torch_dtype": "bfloat16",
    "_name_or_path": "meta-llama/Meta-Llama-3-8B",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3))
    return folder


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli.app, ["profile", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_estimate_is_a_profile_s_file(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "estimate.json"
    asked = ("estimate", "--model-config", checkpoint, "--accelerator", "H100", "--tp", "2", "--output", output)
    printed = json.loads(run(*asked, "--json"))
    assert printed == json.loads(output.read_text())
    profile = load_profile(output)
    assert profile.name == "h100x2-meta-llama-3-8b-estimate" and profile.interval is not None
    assert profile.as_dict() == printed


def test_options_reach_the_estimate(checkpoint: Path) -> None:
    asked = ("estimate", "--model-config", checkpoint / "config.json", "--accelerator", "h100", "--json")
    plain = json.loads(run(*asked))
    eight = json.loads(run(*asked, "--kv-cache-dtype", "fp8", "--gpu-memory-utilization", "0.5", "--name", "mine"))
    assert eight["law"]["d1_s_per_kv_token"] == plain["law"]["d1_s_per_kv_token"] / 2
    assert eight["kv_capacity_tokens"] < plain["kv_capacity_tokens"] and eight["name"] == "h100x1-mine-estimate"


def test_people_see_values_with_their_intervals_and_sources(checkpoint: Path) -> None:
    said = " ".join(run("estimate", "--model-config", checkpoint, "--accelerator", "l4").split())
    for part in ("nothing was measured", "value low high", "KV cache, tokens", "datasheet", "Check: Vidur's"):
        assert part in said


@pytest.mark.parametrize(("file", "options", "said"), [
    (None, (), "cannot read .*; give the config.json of the model's checkpoint"),
    ("not json", (), "is not JSON"),
    ("[]", (), "holds list"),
    ('{"model_type": "whisper"}', (), "model_type 'whisper' is not known"),
    (json.dumps(LLAMA3), ("--accelerator", "v100"), "accelerator 'v100' is not known"),
    (json.dumps(LLAMA3 | {"num_hidden_layers": 400}), (), "; give a tensor parallel size of at least 4"),
])
def test_what_cannot_be_estimated_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str | None,
    options: tuple[str, ...], said: str,
) -> None:
    path = tmp_path / "model.json"
    if file is not None:
        path.write_text(file)
    asked = ["headrace", "profile", "estimate", "--model-config", str(path), "--accelerator", "h100", *options]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.startswith("error: ")
    assert __import__("re").search(said, captured.err.replace("\n", " "))


def test_the_grids_reach_their_ends() -> None:
    assert {batch for batch, _ in CPU_GRID.points} == {1, 2, 4, 8, 16, 32}
    assert {prompt for _, prompt in CPU_GRID.points} == {16, 64, 256, 512}
    assert max(b * p for b, p in GPU_GRID.points) == 65_536 and (256, 256) in GPU_GRID.points
    assert Grid(largest_batch=3, longest_prompt=16, most_prompt_tokens=100).points == [(1, 16), (2, 16), (3, 16)]


LAW = IterationTimeModel(0.004, 1e-7, 7e-5, 7e-5, 0.011)


def telemetry(seed: int, count: int = 300) -> Telemetry:
    """An engine's report with iterations under a known law, each 2 % off at most."""
    rng = random.Random(seed)
    iterations: list[Any] = []
    for seq in range(1, count + 1):
        prefill, decode = rng.choice([0, 16, 256, 2048]), rng.choice([1, 8, 64, 256])
        kv = decode * rng.choice([100, 1000, 4000]) + prefill
        seconds = LAW.iteration_s(float(prefill), float(decode), float(kv)) * rng.uniform(0.98, 1.02)
        iterations.append(Iteration(
            seq=seq, at_s=float(seq), seconds=seconds, prefill_tokens=prefill, decode_tokens=decode, kv_tokens=kv,
            batch_size=decode,
        ))
    limits = EngineLimits(
        kv_capacity_tokens=400_000, block_tokens=16, max_num_seqs=256, max_num_batched_tokens=4096, max_model_len=8192
    )
    return Telemetry(
        engine_id="e", clock_s=count, cursor=count, limits=limits, thresholds=Thresholds(), from_config=True,
        gauges=Gauges(), counters=Counters(), iterations=tuple(iterations),
    )


def test_a_measurement_finds_the_law_and_says_how_well() -> None:
    engine = Engine(model="/models/Some-8B", arguments={"dtype": "bfloat16"})
    profile = fitted_profile(engine, "mine", "NVIDIA H100 80GB HBM3", telemetry(1), telemetry(2))
    for batch in ((0.0, 8.0, 8000.0), (2048.0, 64.0, 66_000.0), (0.0, 256.0, 1e6)):
        assert profile.time_model.iteration_s(*batch) == pytest.approx(LAW.iteration_s(*batch), rel=0.03)
    assert profile.kv_capacity_tokens == 400_000 and profile.interval is None
    said = " ".join(profile.provenance)
    assert "--model Some-8B --name mine --dtype bfloat16" in said and "Held out: 300 iterations, R2 0.99" in said


def test_too_few_iterations_give_no_profile() -> None:
    engine = Engine(model="m", arguments={})
    for count, why in ((0, "recorded no iteration"), (2, "no iteration-time model: .*; measure on an idle machine")):
        with pytest.raises(CommandFailed, match=why):
            fitted_profile(engine, "mine", "cpu", telemetry(1, count), telemetry(2))
