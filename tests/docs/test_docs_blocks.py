"""Every block of commands says how it is tested, and every command of ours exists with the options that it is given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cluster.config import AppConfig, ClusterConfig
from cluster.llm_entry import WITHOUT_ENGINE
from headrace.cli import app
from tools.docs.blocks import COMMANDS, ON_A_SERVER, PAGES, ROOT, Block, blocks_of, commands_of, wrong_mark

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
GENERATED = ROOT / "docs" / "evidence"
"""Pages that a command writes; it stands above each of their parts, as plain text."""
_INLINE = re.compile(r"(?<!`)`(headrace [^`\n]+)`")
_A_COMMAND = re.compile(r"^ {4,}(?:\$ )?(?:headrace|python|make|curl|helm|kubectl|ray|serve|pip) [\w./-]", re.MULTILINE)
_PLACEHOLDER = re.compile(r"[…|]|\.\.\.")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_of_commands_says_how_it_is_tested(page: Path) -> None:
    wrong = [wrong_mark(block) for block in blocks_of(page) if block.language in COMMANDS]
    assert not list(filter(None, wrong)), "\n".join(filter(None, wrong))


@pytest.mark.parametrize("page", [page for page in PAGES if GENERATED not in page.parents], ids=str)
def test_commands_stand_in_fenced_blocks(page: Path) -> None:
    """Where a mark can say how they are tested."""
    outside = page.read_text("utf-8")
    for block in blocks_of(page):
        outside = outside.replace(block.text, "") if block.language in COMMANDS else outside
    assert not _A_COMMAND.findall(outside)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_configurations_and_json_can_be_read(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            data = yaml.safe_load(block.text)
            if isinstance(data, dict) and "applications" in data:
                ClusterConfig.model_validate(data, context=WITHOUT_ENGINE)
            elif isinstance(data, dict) and "llm_configs" in data.get("args", {}):
                AppConfig.model_validate(data["args"], context=WITHOUT_ENGINE)


def our_commands(page: Path) -> Iterator[str]:
    for block in blocks_of(page):
        if block.language in COMMANDS - {"python"}:
            yield from (line for line in commands_of(block) if re.match(r"(\S*/)?headrace ", line))
    yield from _INLINE.findall(page.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_our_commands_exist_with_these_options(page: Path) -> None:
    wrong = [problem for line in our_commands(page) if (problem := unknown_in(line))]
    assert not wrong


def unknown_in(line: str) -> str | None:
    """What a command line names that the command does not have; None: nothing."""
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    command: Any = typer.main.get_command(app)
    while words and getattr(command, "commands", None):
        if words[0].startswith("-") or _PLACEHOLDER.search(words[0]) or words[0].isupper():
            break
        if words[0] not in command.commands:
            return f"{line}: there is no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = {"--help", *(name for one in command.params for name in (*one.opts, *one.secondary_opts))}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    return f"{line}: no option {', '.join(unknown)}" if unknown else None


def test_a_block_without_a_mark_or_with_a_wrong_one_is_found() -> None:
    page = ROOT / "README.md"

    def of(mark: str, text: str = "ls", language: str = "sh") -> str | None:
        (block,) = blocks_of(page, f"text\n{mark}\n```{language}\n{text}\n```\n")
        return wrong_mark(block)

    assert "no mark before this block" in str(of("text"))
    assert "'whatever' is no mark" in str(of("<!-- test: whatever -->"))
    assert "'tests/no_such.py' is no mark" in str(of("<!-- test: tests/no_such.py -->"))
    assert "is no test" in str(of("<!-- test: Makefile -->"))
    assert "not a part of Makefile" in str(of("<!-- test: code of Makefile -->", "no such line there"))
    assert "has commands" in str(of("<!-- test: output -->", "$ ls", "console"))
    assert of("<!-- test: output -->", "only output", "console") is None
    assert of("<!-- test: runs -->") is of("<!-- test: needs a GPU -->") is None
    assert of("<!-- test: code of Makefile -->", "VENV := .venv") is None
    assert of("<!-- test: tests/docs/test_docs_blocks.py -->") is None


def test_commands_are_found_in_a_block() -> None:
    text = "$ a --x \\\n    --y\nits output\n$ b '1\n2'  # why\n"
    assert commands_of(Block(ROOT / "README.md", 1, "console", text, None)) == ["a --x      --y", "b '1"]
    text = "# a comment\nb '1\n2'\n\nc &&\n  d\n"
    assert commands_of(Block(ROOT / "README.md", 1, "sh", text, None)) == ["b '1\n2'", "c &&\n  d"]


@pytest.mark.parametrize(("line", "problem"), [
    ("headrace plan --no-such 1", "no option --no-such"), ("headrace no-such", "no command 'no-such'"),
    ("headrace thresholds set a=1 --no-pin --replica ID", None), ("headrace …", None), ("headrace --version", None),
])
def test_a_command_that_does_not_exist_is_found(line: str, problem: str | None) -> None:
    found = unknown_in(line)
    assert problem in str(found) if problem else found is None


def test_there_is_something_for_the_server_and_the_front_page_is_short() -> None:
    assert sum(block.mark == ON_A_SERVER for page in PAGES for block in blocks_of(page)) >= 8
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 200
