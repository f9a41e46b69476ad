"""The fenced blocks of the documentation, and the mark in front of each that says how it is tested.

A mark is an HTML comment on the line before a block: `<!-- test: runs -->`. It shows neither on the repository's page
nor on the site, where `tools/docs/site.py` turns "needs …" into a visible note.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "helm").rglob("*.md"),
])
COMMANDS = frozenset({"sh", "bash", "shell", "console", "python"})
"""Languages of blocks that a reader runs."""
RUNS, ON_A_SERVER, OUTPUT, CODE = "runs", "runs on a server", "output", "code of "
NEEDS = (
    "needs a GPU", "needs Kubernetes", "needs Docker", "needs several machines", "needs a trace",
    "needs the published package", "takes minutes", "takes hours",
)
"""Why no test runs a block."""
ALLOWED = (
    f"one of: {RUNS}; {ON_A_SERVER}; {OUTPUT} (no command); {CODE}FILE (the block is part of it); "
    f"tests/…/test_….py (the test that runs it); {'; '.join(NEEDS)}"
)
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<info>[^`]*)$")
_MARK = re.compile(r"^\s*<!-- test: (?P<mark>.+?) -->\s*$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. line: of its opening fence, from 1; mark: what its comment says; None: it has none."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None

    @property
    def place(self) -> str:
        """Where it is, for messages and test ids."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> Iterator[Block]:
    """The blocks of a page in their order."""
    lines = (page.read_text("utf-8") if text is None else text).splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening is None:
            number += 1
            continue
        marked = _MARK.match(lines[number - 1]) if number else None
        closing = number + 1
        while closing < len(lines) and lines[closing].strip() != opening["fence"]:
            closing += 1
        inside = [line.removeprefix(opening["indent"]) for line in lines[number + 1:closing]]
        language = (opening["info"].split() or [""])[0]
        yield Block(page, number + 1, language, "\n".join(inside), marked["mark"] if marked else None)
        number = closing + 1


def commands_of(block: Block) -> list[str]:
    """A block's shell commands, one a line: continued lines joined, prompts, comments and output left out."""
    joined = block.text.replace("\\\n", " ")
    lines = joined.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found: list[str] = []
    for line in lines:
        if found and _is_open(found[-1]):
            found[-1] += f"\n{line}"
        elif line.strip() and not line.lstrip().startswith("#"):
            found.append(line)
    return found


def _is_open(command: str) -> bool:
    """Whether a quotation, or a list of commands, goes on in the next line."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return command.rstrip().endswith("&&")


def wrong_mark(block: Block) -> str | None:
    """What is wrong with the mark of a block that has commands, in words; None: nothing."""
    mark = block.mark
    if mark is None:
        return f"{block.place}: no mark before this block; put <!-- test: … --> on the line before it, {ALLOWED}"
    if mark in (RUNS, ON_A_SERVER, OUTPUT, *NEEDS):
        has_commands = block.language != "console" or bool(commands_of(block))
        return f"{block.place}: marked {OUTPUT}, but it has commands" if mark == OUTPUT and has_commands else None
    file = mark.removeprefix(CODE)
    if not (ROOT / file).is_file():
        return f"{block.place}: {mark!r} is no mark, {ALLOWED}"
    is_test = file == mark and Path(file).name.startswith("test_")
    if is_test or (mark.startswith(CODE) and _without_indent(block.text) in _without_indent((ROOT / file).read_text())):
        return None
    return f"{block.place}: " + ("not a part of " + file if mark.startswith(CODE) else f"{mark!r} is no test")


def _without_indent(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())
