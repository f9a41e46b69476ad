"""The documentation's commands for a running server, on a real one: the local configuration, as `make serve` has it."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_process import CHECKOUT, HEADRACE, MODEL, ClusterProcess
from docs_commands import lay_out, run_in_shell, shell_commands, with_fewer_requests

from cluster.model import prepare_bundled_model
from tools.docs.blocks import ON_A_SERVER, PAGES, Block, blocks_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.mark == ON_A_SERVER]
ADDRESS = "127.0.0.1:8000"
MOST_REQUESTS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    prepare_bundled_model(MODEL)
    process = ClusterProcess(tmp_path_factory.mktemp("cluster"))
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_runs_on_the_server(block: Block, cluster: ClusterProcess, tmp_path: Path) -> None:
    lay_out(tmp_path, cluster.port)
    for command in shell_commands(block):
        command = with_fewer_requests(command, MOST_REQUESTS).replace(ADDRESS, f"127.0.0.1:{cluster.port}")
        command = re.sub(r"\bcurl -s ", "curl -sS --fail-with-body ", command)
        if "examples/openai_client.py" in command:
            command += f" --url {cluster.url}"
        run_in_shell(command, tmp_path, {"HEADRACE_URL": cluster.url}, timeout_s=300)


def test_status_as_on_the_front_page_and_a_stop_from_another_terminal(cluster: ClusterProcess) -> None:
    """The last test: `headrace down` ends the process that `headrace up` is."""
    command = [HEADRACE, "status", "--url", cluster.url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "fluid" in shown.stdout and "controller: running" in shown.stdout
    with subprocess.Popen([HEADRACE, "down", cluster.config]) as down:  # until our child is reaped
        assert cluster.process.wait(120) == 0
        assert down.wait(30) == 0


def test_make_serve_is_this_command() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    assert re.search(r"^serve: install\n\t@\$\(BIN\)/headrace up \$\(CONFIG\)$", makefile, flags=re.MULTILINE)
    assert re.search(r"^CONFIG \?= configs/local.yaml$", makefile, flags=re.MULTILINE)
    assert shlex.split("headrace up configs/local.yaml")[2] == "configs/local.yaml"
