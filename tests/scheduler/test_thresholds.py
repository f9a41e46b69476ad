"""Thresholds: invalid values and their messages, the JSON form, and the fit to an engine."""

import json
import math
import string
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.thresholds import (
    LONGEST_HOLD_S,
    MODES,
    POLICY_NAMES,
    EngineLimits,
    InvalidThresholds,
    SegmentThreshold,
    Thresholds,
    TypeThreshold,
    parse_thresholds,
    thresholds_as_dict,
)

LIMITS = EngineLimits(
    kv_capacity_tokens=1600, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
)
"""100 KV blocks, 64 slots."""


def _type(name="all", n=4, **bounds):
    return {"name": name, "n": n, **bounds}


def _segments(*ends_and_n):
    return [{"end_output_tokens": end, "total": total} for end, total in ends_and_n]


INVALID = [
    # (what is sent, the field named, the value named, a word of what is allowed)
    ({"version": -1}, "version", -1, ">= 0"),
    ({"policy": "lifo"}, "policy", "lifo", "fcfs, wait, nested_wait"),
    ({"policy": 3}, "policy", 3, "string"),
    ({"mode": "lenient"}, "mode", "lenient", "serving, strict"),
    ({"max_hold_s": -0.1}, "max_hold_s", -0.1, "0 to 60"),
    ({"max_hold_s": 60.5}, "max_hold_s", 60.5, "0 to 60"),
    ({"max_hold_s": math.inf}, "max_hold_s", math.inf, "0 to 60"),
    ({"max_hold_s": "0.5"}, "max_hold_s", "0.5", "number"),
    ({"max_hold_s": True}, "max_hold_s", True, "number"),
    ({"max_hold_s": None}, "max_hold_s", None, "number"),
    ({"valid_for_s": 0}, "valid_for_s", 0.0, "> 0"),
    ({"valid_for_s": math.inf}, "valid_for_s", math.inf, "> 0"),
    ({"max_running": 0}, "max_running", 0, ">= 1"),
    ({"max_running": True}, "max_running", True, "integer"),
    ({"max_running": "8"}, "max_running", "8", "integer"),
    ({"max_running": 8.5}, "max_running", 8.5, "integer"),
    ({"token_budget": 0}, "token_budget", 0, ">= 1"),
    ({"token_budget": -3}, "token_budget", -3, ">= 1"),
    ({"pinned": 1}, "pinned", 1, "boolean"),
    ({"pinned": "yes"}, "pinned", "yes", "boolean"),
    ({"reason": 7}, "reason", 7, "string"),
    ({"types": [_type(n=0)]}, "types[0].n", 0, ">= 1"),
    ({"types": [_type(n=-2)]}, "types[0].n", -2, ">= 1"),
    ({"types": [_type(n=True)]}, "types[0].n", True, "integer"),
    ({"types": [_type(n="4")]}, "types[0].n", "4", "integer"),
    ({"types": [_type(name="")]}, "types[0].name", "", "non-empty"),
    ({"types": [_type("a"), _type("b"), _type("a")]}, "types", ["a", "b", "a"], "distinct"),
    ({"types": [_type(max_prompt_tokens=0)]}, "types[0].max_prompt_tokens", 0, ">= 1"),
    ({"types": [_type("a"), _type("b", max_output_tokens=-1)]}, "types[1].max_output_tokens", -1, ">= 1"),
    ({"types": [_type(n=9)], "max_running": 8}, "types[0].n", 9, "max_running = 8"),
    ({"types": [{"name": "all"}]}, "types[0].n", {"name": "all"}, ">= 1, or null for a type whose requests are never"),
    ({"types": [{"n": 3}]}, "types[0].name", {"n": 3}, "no default"),
    ({"segments": [{"end_output_tokens": 8}]}, "segments[0].total", {"end_output_tokens": 8}, "in all stages"),
    ({"policy": "fluid", "fluid": {"kv_limit_tokens": 9, "survival": [[0, 1.0]]}}, "fluid.time_model",
     {"kv_limit_tokens": 9, "survival": [[0, 1.0]]}, "no default"),
    ({"types": [3]}, "types[0]", 3, "TypeThreshold"),
    ({"segments": _segments((8, 0))}, "segments[0].total", 0, ">= 1"),
    ({"segments": _segments((0, 4))}, "segments[0].end_output_tokens", 0, "> 0"),
    ({"segments": _segments((16, 4), (16, 4))}, "segments[1].end_output_tokens", 16, "> 16"),
    ({"segments": _segments((16, 4), (8, 2))}, "segments[1].end_output_tokens", 8, "> 16"),
    ({"segments": _segments((8, 4), (16, 5))}, "segments[1].total", 5, "1 to 4"),
    ({"segments": _segments((8, 65)), "max_running": 8}, "segments[0].total", 65, "8 stages times max_running"),
    # Unknown keys: the answer lists those of the object they stand in.
    ({"max_hold": 1.0}, "max_hold", 1.0, "max_hold_s"),
    ({"types": [_type(max_tokens=5)]}, "types[0].max_tokens", 5, "max_output_tokens"),
    ({"segments": [{"end_output_tokens": 8, "total": 2, "name": "x"}]}, "segments[0].name", "x", "end_output_tokens"),
]


@pytest.mark.parametrize(("sent", "field", "value", "allowed"), INVALID, ids=lambda part: str(part)[:40])
def test_an_error_names_field_value_and_what_is_allowed(sent, field, value, allowed):
    with pytest.raises(InvalidThresholds) as rejected:
        parse_thresholds(sent)
    error = rejected.value
    assert error.field == field
    assert error.value == value and type(error.value) is type(value)
    assert allowed in error.allowed
    for part in (field, repr(value), allowed):
        assert part in str(error)


def test_a_missing_field_is_said_to_be_missing_and_not_to_be_wrong():
    said = r"^thresholds\.types\[0\]\.n is missing in \{'name': 'all'\}; allowed: "
    with pytest.raises(InvalidThresholds, match=said):
        parse_thresholds({"types": [{"name": "all"}]})


@pytest.mark.parametrize(
    ("sent", "hint"),
    [({"segments": [{"end_output_tokens": 8, "n": 2}]}, "did you mean total? total = n × stages"),
     ({"types": [_type(max_output_token=5)]}, "did you mean max_output_tokens?"),
     ({"max_runing": 3}, "did you mean max_running?")],
)
def test_an_unknown_field_has_a_hint(sent, hint):
    with pytest.raises(InvalidThresholds) as rejected:
        parse_thresholds(sent)
    assert hint in str(rejected.value)


def test_a_field_n_elsewhere_has_no_hint_of_segments():
    with pytest.raises(InvalidThresholds) as rejected:
        parse_thresholds({"n": 3})
    assert "stages" not in str(rejected.value)


def test_not_a_number_is_rejected_from_json_text():
    with pytest.raises(InvalidThresholds) as rejected:
        parse_thresholds('{"max_hold_s": NaN}')
    assert rejected.value.field == "max_hold_s" and math.isnan(rejected.value.value)
    with pytest.raises(InvalidThresholds, match="valid_for_s"):
        parse_thresholds('{"valid_for_s": NaN}')


@pytest.mark.parametrize("body", [[], None, 5, "", "{", b"\xff\xfe", "[1]", '"fcfs"', "null"], ids=repr)
def test_json_other_than_an_object_is_rejected(body):
    with pytest.raises(InvalidThresholds, match=r"\(body\)"):
        parse_thresholds(body)


def test_unknown_key_lists_only_real_fields():
    with pytest.raises(InvalidThresholds) as rejected:
        parse_thresholds({"types": [_type(foo=1)]})
    assert rejected.value.allowed.endswith("are name, n, max_prompt_tokens, max_output_tokens")


def test_python_construction_checks_as_parsing_does():
    with pytest.raises(InvalidThresholds, match=r"types\[0\]\.n = 0"):
        Thresholds(types=(TypeThreshold(name="a", n=0),))
    with pytest.raises(InvalidThresholds, match="max_hold_s = nan"):
        Thresholds(max_hold_s=math.nan)


counts = st.integers(1, 50)
type_thresholds = st.builds(
    TypeThreshold,
    name=st.text(string.printable, min_size=1, max_size=8), n=counts,
    max_prompt_tokens=st.none() | counts, max_output_tokens=st.none() | counts,
)


@st.composite
def thresholds(draw):
    ends = draw(st.lists(st.integers(1, 1000), unique=True, max_size=4).map(sorted))
    n = sorted(draw(st.lists(counts, min_size=len(ends), max_size=len(ends))), reverse=True)
    return Thresholds(
        version=draw(st.integers(0, 10**12)),
        policy=draw(st.sampled_from(POLICY_NAMES)),
        mode=draw(st.sampled_from(MODES)),
        types=tuple(draw(st.lists(type_thresholds, max_size=4, unique_by=lambda entry: entry.name))),
        segments=tuple(
            SegmentThreshold(end_output_tokens=end, total=count * (end - start))
            for start, end, count in zip((0, *ends), ends, n, strict=False)
        ),
        max_running=draw(st.none() | st.integers(50, 10**6)),
        token_budget=draw(st.none() | st.integers(1, 10**6)),
        max_hold_s=draw(st.floats(0, LONGEST_HOLD_S)),
        valid_for_s=draw(st.none() | st.floats(1e-6, 1e6)),
        pinned=draw(st.booleans()),
        reason=draw(st.text(max_size=20)),
    )


@settings(deadline=None, derandomize=True)
@given(thresholds())
def test_dump_and_parse_are_inverse(value):
    dumped = thresholds_as_dict(value)
    assert parse_thresholds(dumped) == value
    assert parse_thresholds(json.dumps(dumped)) == value
    assert parse_thresholds(json.dumps(dumped).encode()) == value


def test_whole_seconds_may_be_written_without_a_point():
    assert parse_thresholds({"max_hold_s": 1, "valid_for_s": 30}) == Thresholds(max_hold_s=1.0, valid_for_s=30.0)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Thresholds(max_running=65), "max_running"),
        (Thresholds(types=(TypeThreshold(name="a", n=1), TypeThreshold(name="b", n=65))), "types[1].n"),
        (Thresholds(segments=(SegmentThreshold(end_output_tokens=8, total=8 * 65),)), "segments[0].total"),
        (Thresholds(token_budget=513), "token_budget"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_more_than_the_engine_can_run_or_compute_does_not_fit(value, field):
    with pytest.raises(InvalidThresholds) as rejected:
        value.check_fits(LIMITS)
    assert rejected.value.field == field
    most = {"token_budget": "512", "segments[0].total": "8 stages times 64"}.get(field, "1 to 64")
    assert most in rejected.value.allowed


def test_memory_allows_fewer_slots_than_max_num_seqs():
    small = replace(LIMITS, kv_capacity_tokens=160)  # ten blocks: ten requests at the very most
    Thresholds(max_running=10).check_fits(small)
    with pytest.raises(InvalidThresholds, match=r"max_running = 11 .* from 1 to 10: .*160 tokens in blocks of 16"):
        Thresholds(max_running=11).check_fits(small)


def test_what_just_fits_is_taken():
    Thresholds(
        types=(TypeThreshold(name="a", n=64),), segments=(SegmentThreshold(end_output_tokens=8, total=8 * 64),),
        max_running=64, token_budget=512,
    ).check_fits(LIMITS)
    Thresholds().check_fits(LIMITS)


def test_same_rule_looks_only_at_what_decides():
    rule = Thresholds(policy="wait", types=(TypeThreshold(name="a", n=4),), max_running=8)
    assert rule.same_rule(replace(rule, version=9, reason="another", valid_for_s=5.0, pinned=True))
    for change in (
        {"policy": "fcfs"}, {"mode": "strict"}, {"types": (TypeThreshold(name="a", n=5),)}, {"max_running": 9},
        {"segments": (SegmentThreshold(end_output_tokens=8, total=2),)}, {"token_budget": 100}, {"max_hold_s": 0.5},
    ):
        assert not rule.same_rule(replace(rule, **change)), change


def test_with_version_changes_only_the_version():
    value = Thresholds(version=3, policy="wait", reason="r")
    assert value.with_version(7) == replace(value, version=7)


@pytest.mark.parametrize(
    ("params", "field"),
    [({"kv_limit": 1}, "fluid.kv_limit"), ({"time_model": {"d0": 1}}, "fluid.time_model.d0"), ({}, "fluid.time_model")],
)
def test_an_error_in_the_fluid_parameters_is_named(params, field):
    with pytest.raises(InvalidThresholds, match=field.replace(".", r"\.")):
        parse_thresholds({"policy": "fluid", "fluid": params})
