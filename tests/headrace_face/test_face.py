"""`headrace`: the names that users touch, found by vLLM and Ray Serve, and a command that loads only what it runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import headrace

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("scipy", "pyarrow", "vllm", "ray", "torch", "matplotlib")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds this checkout first."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", sorted(set(headrace.__all__) - {"__version__", "HeadraceScheduler", "build"}))
def test_a_name_is_the_one_of_the_module_behind_it(name: str) -> None:
    value = getattr(headrace, name)
    assert value is getattr(importlib.import_module(value.__module__), name)


def test_only_promised_names_are_there() -> None:
    assert headrace.__version__ == version("headrace")
    assert set(headrace._MODULE_OF) | {"__version__"} == set(headrace.__all__) == set(dir(headrace))
    with pytest.raises(AttributeError, match="'headrace' has no attribute 'NoSuchName'"):
        _ = headrace.NoSuchName
    with pytest.raises(ImportError, match="NoSuchName"):
        from headrace import NoSuchName  # noqa: F401


def test_vllm_finds_the_scheduler_by_its_public_name() -> None:
    from vllm.config.scheduler import SchedulerConfig
    from vllm.v1.core.sched.interface import SchedulerInterface

    config = SchedulerConfig(
        max_model_len=64, is_encoder_decoder=False, scheduler_cls="headrace.HeadraceScheduler"
    )
    found = config.get_scheduler_cls()
    assert found.__module__ == "scheduler.vllm_scheduler"
    assert issubclass(found, SchedulerInterface)
    assert found is headrace.HeadraceScheduler


SERVING = """
import sys
sys.modules["matplotlib"] = None
from ray._common.utils import import_attr
build = import_attr("headrace:build")
assert build is import_attr("cluster.app:build")
print("LOADED", *sorted({"simulator", "loadgen"} & set(sys.modules)))
"""


@pytest.mark.ray
def test_ray_serve_finds_the_application_and_serves_without_what_only_measures() -> None:
    run = python(SERVING)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "LOADED"


STATE = """
import json, sys
import httpx
from headrace import cli
state = json.loads(sys.argv.pop())
answer = httpx.MockTransport(lambda request: httpx.Response(200, json=state))
client = httpx.Client
httpx.Client = lambda **options: client(transport=answer, **options)
try:
    cli.main()
finally:
    print("LOADED", *({name.partition(".")[0] for name in sys.modules} & set(%r)))
"""


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (("status",), set()), (("events",), set()), (("thresholds", "get", "--json"), set()), (("--help",), set()),
        (("plan", "--type", "rate=1,prompt=9,output=9", "--profile", "a100-llama2-7b", "--json"), {"scipy"}),
    ],
    ids=str,
)
def test_a_command_loads_only_what_it_needs(arguments: tuple[str, ...], allowed: set[str]) -> None:
    state = {
        "application": "headrace", "replicas": {}, "events": [],
        "controller": {"alive": False, "reason": "it is away"},
    }
    run = python(STATE % (HEAVY,), *arguments, json.dumps(state))
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.strip().splitlines()[-1].split()
    assert loaded[0] == "LOADED"
    assert set(loaded[1:]) <= allowed


BLOCKED = "import sys; sys.modules.update(dict.fromkeys(%r)); from headrace.cli import main; main()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("pyarrow", ("simulate", "--workload", "p5d5", "--rate", "1"), "sim"),
        ("pyarrow", ("bench", "--lengths", "p5d5", "--rate", "1", "--requests", "3"), "sim"),
        ("pyarrow", ("plan", "--trace", "x.csv", "--rate", "1", "--profile", "a100-llama2-7b"), "sim"),
        ("matplotlib", ("report", "runs"), "report"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_whose_extra_is_missing_names_it(missing: str, arguments: tuple[str, ...], extra: str) -> None:
    run = python(BLOCKED % ([missing],), *arguments)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        f"error: this command needs {missing}, which is not installed: pip install 'headrace[{extra}]'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("--help",), ("plan", "--type", "rate=1,prompt=9,output=9", "--profile", "a100-llama2-7b")], ids=str
)
def test_what_serving_needs_works_without_the_extras(arguments: tuple[str, ...]) -> None:
    run = python(BLOCKED % (["pyarrow", "matplotlib"],), *arguments)
    assert run.returncode == 0, run.stderr


def test_another_missing_module_is_no_missing_extra() -> None:
    run = python(BLOCKED % (["scipy"],), "plan", "--type", "rate=1,prompt=9,output=9", "--profile", "a100-llama2-7b")
    assert run.returncode == 1
    assert "ModuleNotFoundError" in run.stderr
    assert "headrace[" not in run.stderr
