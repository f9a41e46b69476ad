"""The `headrace` command: the packages' command lines in one, and the exit code of errors.

Exit code 0: success; 1: failure; 2: wrong usage. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from cluster.cli import app as cluster_app
from cluster.cli import fail, out
from cluster.plan_cli import app as plan_app
from cluster.profile_cli import app as profile_app
from loadgen.cli import app as loadgen_app
from scheduler.config_errors import CommandFailed, UsageError
from simulator.cli import app as simulator_app

app = typer.Typer(help="Serve language models on Ray and vLLM within latency targets.", no_args_is_help=True)
for part in (cluster_app, plan_app, profile_app, simulator_app, loadgen_app):
    app.add_typer(part)

EXTRA_WITH = {"pyarrow": "sim", "matplotlib": "report", "vllm": "gpu", "ray": "gpu"}
"""The extra of this package that installs a module."""


def main() -> None:
    """Entry point: turns expected errors into one clear line and an exit code."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vllm is imported
    try:
        app()
    except UsageError as error:
        fail(error, 2)
    except CommandFailed as error:
        fail(error, 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_WITH:
            raise
        install = f"pip install 'headrace[{EXTRA_WITH[missing]}]'"
        if EXTRA_WITH[missing] == "gpu":
            install += " ([cpu] on a machine without a GPU)"
        fail(CommandFailed(f"this command needs {missing}, which is not installed: {install}"), 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"headrace {installed_version('headrace')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
