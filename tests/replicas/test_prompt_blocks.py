"""A prompt as blocks, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.prompt_blocks import BLOCK_TOKENS, blocks_in, blocks_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"{number} " for number in range(400))
PICTURE = {"type": "image_url", "image_url": {"url": "data:x"}}
BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": TEXT}], "model": "m", "cache_salt": "s"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}, PICTURE, {"text": TEXT}]}]},
    {"prompt": TEXT + "\u00e9\u6f22\ud800" + TEXT}, {"prompt": [TEXT, "another"]}, {"prompt": list(range(200))},
]


def test_prompts_agree_in_a_block_only_if_they_agree_in_all_before_it() -> None:
    one, other = blocks_of(TEXT, 64), blocks_of(TEXT[:200] + "x" + TEXT[201:], 64)
    assert len(one) == len(TEXT) // 64
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 3 + [False] * (len(one) - 3)
    assert blocks_of(TEXT, 64, start="adapter")[0] != one[0], "an adapter's cache is its own"
    assert blocks_of([1, 2, 3, 4, 5], 2) == blocks_of((1, 2, 3, 4, 9), 2) != blocks_of([1, 2, 4, 3], 2)
    assert blocks_of([7] * 64, 16) != blocks_of([9] * 64, 16) and len(set(blocks_of([7] * 640, 64))) == 10
    assert blocks_of("short", 64) == blocks_of("", 64) == []


def test_another_process_finds_the_same_blocks() -> None:
    mine = [list(blocks_in(SimpleNamespace(**body))) for body in BODIES]
    assert all(mine) and all(0 <= block < 2**32 for blocks in mine for block in blocks)
    there = (
        "import json, sys; from types import SimpleNamespace; from replicas.prompt_blocks import blocks_in;"
        "print(json.dumps([list(blocks_in(SimpleNamespace(**body))) for body in json.load(sys.stdin)]))"
    )
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", there], input=json.dumps(BODIES), text=True, capture_output=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        assert json.loads(answer) == mine


@pytest.mark.parametrize("body", [
    {"prompt": [10**40] * BLOCK_TOKENS}, {"prompt": ["a", 3]}, {"prompt": [1.5] * BLOCK_TOKENS}, {"prompt": 7},
    {"prompt": [[None] * BLOCK_TOKENS]}, {"messages": 7}, {"messages": [None, 3.5]}, {"messages": [[]]}, {"input": {}},
])
def test_what_is_no_prompt_has_no_blocks_and_raises_nothing(body: dict[str, Any]) -> None:
    assert list(blocks_in(SimpleNamespace(**body))) == []
