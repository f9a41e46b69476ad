"""Which policy goes with which engine setting: the page's table is the code's, and every "no" in it is rejected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from scheduler.support import (
    DATA_PARALLEL_HERE,
    KV_TRANSFER_ARGS,
    SETTINGS,
    SPECULATIVE_ARGS,
    EngineSetup,
    UnsupportedSetting,
    policy_in_effect,
    require_supported,
    support_matrix,
)
from scheduler.thresholds import POLICY_NAMES, SegmentThreshold, Thresholds
from scheduler.tuning.slo import NO_SLO, Slo

PAGE = Path(__file__).resolve().parents[2] / "docs" / "policies.md"
TPOT = Slo(tpot_s=0.05)
SETUPS = {
    "data parallel across nodes": EngineSetup(data_parallel_across_nodes=True),
    "KV transfer (P/D, offloading)": EngineSetup(kv_transfer=True),
    "targets with `controller.enabled: false`": EngineSetup(targets=Slo(ttft_s=2.0), controller=False),
    "speculative decoding": EngineSetup(speculative_decoding=True),
}
NOTHING_OF_CONCERN = (
    "tensor parallel", "data parallel within a replica", "pipeline parallel", "prefix caching", "structured output",
    "LoRA", "several choices (n > 1)",
)


def is_rejected(setup: EngineSetup, thresholds: Thresholds) -> bool:
    try:
        require_supported(setup, thresholds)
    except UnsupportedSetting:
        return True
    return False


def test_the_documentation_shows_the_table() -> None:
    assert support_matrix() in PAGE.read_text(), f"put this into {PAGE}:\n{support_matrix()}"


def test_every_setting_is_tried_here() -> None:
    assert [setting.name for setting in SETTINGS if setting.in_use] == list(SETUPS)
    assert {setting.name for setting in SETTINGS if not setting.in_use} == set(NOTHING_OF_CONCERN)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting.in_use], ids=lambda one: one.name)
def test_a_policy_is_rejected_where_the_table_says_no(setting: Any, policy: str) -> None:
    assert is_rejected(SETUPS[setting.name], Thresholds(policy=policy)) == (not setting.answer(policy).allowed)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_an_engine_without_any_of_it_takes_every_policy(policy: str) -> None:
    require_supported(EngineSetup(targets=TPOT), Thresholds(policy=policy))


@pytest.mark.parametrize(
    ("setup", "policy", "what_to_do"),
    [
        (EngineSetup(data_parallel_across_nodes=True), "fcfs", "give data_parallel_size alone"),
        (EngineSetup(kv_transfer=True), "fluid", "leave kv_transfer_config and kv_offloading_size out"),
        (EngineSetup(targets=TPOT, controller=False), "fluid", "leave controller.enabled at true"),
        (EngineSetup(speculative_decoding=True), "wait_cp", "leave speculative decoding out, or take another policy"),
    ],
)
def test_the_error_is_one_sentence_that_says_what_to_do(setup: EngineSetup, policy: str, what_to_do: str) -> None:
    with pytest.raises(UnsupportedSetting) as error:
        require_supported(setup, Thresholds(policy=policy))
    said = str(error.value)
    assert what_to_do in said and "\n" not in said and ". " not in said
    assert f"policy {policy}" in said or "any policy" in said


def test_wait_with_segments_holds_at_boundaries_as_nested_wait_does() -> None:
    segments = (SegmentThreshold(end_output_tokens=8, total=2), SegmentThreshold(end_output_tokens=64, total=1))
    assert policy_in_effect(Thresholds(policy="wait", segments=segments)) == "nested_wait"
    assert policy_in_effect(Thresholds(policy="wait")) == "wait"


@pytest.mark.parametrize(
    ("engine_args", "found"),
    [
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, "data_parallel_across_nodes"),
        ({"data_parallel_size": 2, "data_parallel_backend": "ray"}, "data_parallel_across_nodes"),
        ({"data_parallel_size": 2, "data_parallel_rank": 1}, "data_parallel_across_nodes"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, "speculative_decoding"),
        ({"spec_tokens": 3}, "speculative_decoding"),
        ({"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}, "kv_transfer"),
        ({"kv_offloading_size": 8.0}, "kv_transfer"),
    ],
    ids=str,
)
def test_a_configuration_tells_what_it_asks_of_the_engine(engine_args: dict[str, Any], found: str) -> None:
    expected = dataclasses.replace(EngineSetup(targets=TPOT), **{found: True})
    assert EngineSetup.from_engine_args(engine_args, TPOT) == expected


@pytest.mark.parametrize(
    "engine_args",
    [
        {}, {"tensor_parallel_size": 8, "enable_prefix_caching": True, "enable_lora": True},
        {"data_parallel_size": 2, "data_parallel_backend": "mp"}, {"data_parallel_size": 1, "data_parallel_rank": 0},
        {"pipeline_parallel_size": 4}, {"data_parallel_size": 1, "pipeline_parallel_size": 1},
        {"speculative_config": None, "kv_transfer_config": None},
    ],
    ids=str,
)
def test_other_engine_arguments_concern_no_policy(engine_args: dict[str, Any]) -> None:
    assert EngineSetup.from_engine_args(engine_args, NO_SLO) == EngineSetup()


def test_the_engine_arguments_looked_at_are_vllm_s() -> None:
    arguments = pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed").AsyncEngineArgs
    names = {field.name for field in dataclasses.fields(arguments)}
    assert {"data_parallel_size", *SPECULATIVE_ARGS, *KV_TRANSFER_ARGS} <= names
    assert DATA_PARALLEL_HERE.keys() <= names
