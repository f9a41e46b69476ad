"""Runs a documentation's commands as a reader would, with what a reader fills in: files, addresses, fewer requests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from tools.docs.blocks import ROOT, Block, commands_of

TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{at / 4},{40 + 7 * (at % 9)},{8 + at % 5}\n" for at in range(80)
)


def with_fewer_requests(command: str, most: int) -> str:
    """The command, with at most so many requests and a few seconds."""
    return _at_most("duration", 5, _at_most("warmup", most // 4, _at_most("requests", most, command)))


def _at_most(option: str, bound: int, command: str) -> str:
    return re.sub(rf"--{option} (\d+)", lambda found: f"--{option} {min(int(found[1]), bound)}", command)


def lay_out(folder: Path, port: int) -> None:
    """What a reader has at hand: the checkout's folders, the local configuration at a free port, a trace."""
    for name in ("benchmarks", "examples", ".models"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        config["http_options"]["port"] = port
        (folder / "configs" / path.name).write_text(yaml.safe_dump(config))
    (folder / "FILE.csv").write_text(TRACE)
    (folder / "FILE.jsonl").write_text("".join(
        f'{{"timestamp": {250 * at}, "input_length": {500 + at}, "output_length": 9, "hash_ids": [{at % 4}]}}\n'
        for at in range(80)
    ))
    tool = folder / "headrace"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from headrace.cli import main; main()" "$@"\n')
    tool.chmod(0o755)


def run_in_shell(command: str, folder: Path, env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Run it in bash, with our command on the path; its output. Fails with the output if it fails."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True, timeout=timeout_s,
        check=False, env=os.environ | {"PATH": path, "PYTHONPATH": python_path, "COLUMNS": "100"} | dict(env or {}),
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def shell_commands(block: Block) -> list[str]:
    """Its commands; a Python block is one, run as a script."""
    if block.language == "python":
        return [f"{sys.executable} - <<'END_OF_BLOCK'\n{block.text}\nEND_OF_BLOCK"]
    return commands_of(block)
