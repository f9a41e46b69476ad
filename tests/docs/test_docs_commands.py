"""The blocks marked "runs" are run: in this process where they are our command, so that vLLM is imported once."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cluster_process import free_port
from docs_commands import lay_out, run_in_shell, shell_commands, with_fewer_requests
from typer.testing import CliRunner

import cluster.cli
import loadgen.cli
import simulator.cli
from cluster.model import prepare_bundled_model
from headrace.cli import app
from tools.docs.blocks import PAGES, ROOT, RUNS, Block, blocks_of

pytestmark = [pytest.mark.engine, pytest.mark.ray]
BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.mark == RUNS]
MOST_REQUESTS = 40


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_bundled_model(ROOT / ".models" / "SmolLM2-135M-Instruct")
    lay_out(tmp_path, free_port())
    monkeypatch.chdir(tmp_path)
    for commands in (cluster.cli, loadgen.cli, simulator.cli):
        monkeypatch.setattr(commands.out, "width", 100)  # whatever the terminal was when the module was imported
    if block.language == "python":
        exec(compile(block.text, block.place, "exec"), {})
        return
    for command in shell_commands(block):
        words = shlex.split(with_fewer_requests(command, MOST_REQUESTS), comments=True)
        if words[0] != "headrace" or {">", "|", "&&"} & set(words):
            run_in_shell(command, tmp_path)
            continue
        done = CliRunner().invoke(app, words[1:], env={"COLUMNS": "100"})
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
        if block.language == "console":
            shown, printed = block.text.partition("\n")[2].splitlines(), squeezed(done.output)
            missing = [line for line in shown if squeezed(line) not in printed]
            assert not missing, f"{command} prints something else:\n{done.output}"


def squeezed(text: str) -> str:
    """Without what depends on the width of a terminal."""
    return "".join(character for character in text if character not in " \n─┌┐└┘│┬┴")


def test_there_are_such_blocks() -> None:
    assert len(BLOCKS) >= 6
