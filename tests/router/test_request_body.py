"""What is found in the body of a request: what it asks for, and whether it is too deep."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.limits import Limits
from router.refusal import Refusal
from router.request_body import asked_for, asked_to_embed, parse


@pytest.mark.parametrize(("is_chat", "fields", "counted"), [
    (True, {"messages": [{"role": "user", "content": "x" * 4000}], "prompt": "", "max_tokens": 1}, 1002),
    (True, {"max_tokens": 9, "prompt": [1] * 500}, 10),
    (True, {"n": 2}, 2 + 2 * 256),
    (True, {"tools": [{"function": {"name": "f", "description": "x" * 4000}}], "max_tokens": 1}, 1002),
    (True, {"documents": [{"text": "x" * 400}], "chat_template_kwargs": {"a": "x" * 400}, "max_tokens": 1}, 202),
    (False, {"prompt": [1] * 500, "messages": [], "max_tokens": 1}, 501),
    (False, {"prompt": [[1.0] * 30, ["1"] * 30], "max_tokens": 1, "max_completion_tokens": 0}, 62),
    (False, {"prompt": ["x" * 40, "y" * 40], "n": 3}, 60 + 6 * 16),
])
def test_tokens_are_counted_by_the_fields_that_the_engine_reads(
    is_chat: bool, fields: dict[str, Any], counted: int
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    assert asked_for(body, Limits(), is_chat=is_chat).tokens == counted


@pytest.mark.parametrize(("fields", "counted"), [
    ({"input": "x" * 400, "model": "m"}, 100), ({"input": ["x" * 40, "y" * 40]}, 20),
    ({"input": [[1] * 30, [2] * 3]}, 33), ({"text_1": "x" * 80, "text_2": ["y" * 400, "z" * 400]}, 220), ({}, 0),
])
def test_tokens_of_embeddings_and_scores_are_counted_too(fields: dict[str, Any], counted: int) -> None:
    assert asked_to_embed(fields).tokens == counted


@pytest.mark.parametrize(("is_chat", "limit", "counted"), [(True, 1000, 1000), (False, 1000, 16), (False, 9, 9)])
def test_what_is_written_into_a_request_is_counted(is_chat: bool, limit: int, counted: int) -> None:
    assert asked_for({"messages": [], "prompt": []}, Limits(max_tokens=limit), is_chat=is_chat).tokens == counted


def nested(depth: int) -> dict[str, Any]:
    """So many objects and arrays within each other, in turn."""
    found: Any = 1
    for number in range(depth - 1):
        found = [0, found] if number % 2 else {"x": found, "y": "z"}
    return {"in": found, "flat": [1, 2], "empty": []}


@pytest.mark.parametrize("depth", [2, 7, 8])
def test_depth_counts_objects_and_arrays_within_each_other(depth: int) -> None:
    body = json.dumps(nested(depth)).encode()
    assert parse(body, Limits(json_depth=depth)) == nested(depth)
    with pytest.raises(Refusal, match=f"nested too deeply; allowed: {depth - 1} objects"):
        parse(body, Limits(json_depth=depth - 1))


@pytest.mark.parametrize("number", ["9223372036854775808", "-9223372036854775809"])
def test_a_number_beyond_64_bits_is_found_at_any_depth(number: str) -> None:
    for body in ('{"x": %s}', '{"x": [[1, {"y": [2, %s]}]]}'):
        assert parse((body % "9223372036854775807").encode(), Limits())
        with pytest.raises(Refusal, match="numbers that fit 64 bits"):
            parse((body % number).encode(), Limits())
