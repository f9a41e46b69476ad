"""One folder for each application that `headrace up` serves in the foreground: its note, its temporary files, its logs.

    TMP/headrace-UID/PORT/note.json        the serving process, by id and start; the application and its URL
                          processes.json   all processes that it has started, and their shared memory
                          progress         the last line it has said while it stops, for `headrace down`
                          t/               temporary files of all its processes; Ray's sessions with the logs in t/ray
                          h/               HAProxy's configuration and sockets

A stop removes the folder. What a killed `headrace up` leaves is found by the next `up` or `down`: processes are ended
only if they started when it says, shared memory is removed only if it is the noted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cluster.config import ClusterConfig
from cluster.haproxy import LONGEST_FOLDER
from cluster.processes import end_processes
from scheduler.config_errors import CommandFailed
from scheduler.engine import segments
from scheduler.engine.process_identity import identity_of

_LONGEST_ROOT = 40
"""Sockets have paths of 107 characters at most, and Ray's are 70 long below its folder."""
Say = Callable[[str], None]


class AlreadyRunning(CommandFailed):
    """Another `headrace up` serves at this port."""


@dataclass(frozen=True, slots=True)
class Note:
    """The process that serves an application, and where. identity: `identity_of` the process. ray_address: of its Ray,
    once everything is ready."""

    pid: int
    identity: str
    application: str
    url: str
    ray_address: str = ""

    def process(self) -> psutil.Process | None:
        """The process; None when it has ended, also if its id was given to another since."""
        return _same_process(self.pid, self.identity)


class RunFolder:
    """The folder of this process's application; made by `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def temporary(self) -> Path:
        """For temporary files of all processes."""
        return self.path / "t"

    @property
    def haproxy(self) -> Path:
        """For HAProxy's configuration and sockets; elsewhere if their paths would be too long here."""
        here = self.path / "h"
        short = Path("/tmp") / f"h{os.getuid()}-{self.path.name}"  # noqa: S108 - `hold_haproxy` checks whose it is
        return here if len(str(here)) <= LONGEST_FOLDER else short

    def hold_haproxy(self) -> Path:
        """Make that folder, for this user alone.

        Raises:
            CommandFailed: another user has one of this name.
        """
        self.haproxy.mkdir(mode=0o700, exist_ok=True)
        found = self.haproxy.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise CommandFailed(f"{self.haproxy} belongs to another user; remove it, or set ray: {{haproxy: false}}")
        self.haproxy.chmod(0o700)
        return self.haproxy

    @property
    def logs(self) -> Path:
        """The logs of Serve's replicas."""
        session = Path("ray") / "session_latest" / "logs" / "serve"
        return (self.temporary if self.is_short else Path(tempfile.gettempdir())) / session

    @property
    def is_short(self) -> bool:
        """Whether sockets can lie in it."""
        return len(str(self.temporary)) <= _LONGEST_ROOT

    def hold_temporary_files(self) -> None:
        """Have this process and those it starts put their temporary files here."""
        self.temporary.mkdir(exist_ok=True)
        if self.is_short:
            os.environ["TMPDIR"] = str(self.temporary)

    def remember(self, started: list[psutil.Process]) -> None:
        """Write down the processes started so far, for the case that this one is killed."""
        found = [{"pid": one.pid, "identity": identity_of(one.pid)} for one in started if one.is_running()]
        shared = segments.as_json(segments.mapped_by(process.pid for process in started))
        fresh = self.path / "processes.json.new"
        fresh.write_text(json.dumps({"processes": found, "segments": shared}))
        fresh.replace(self.path / "processes.json")

    def note_ray(self, address: str) -> None:
        """Write down where this process's Ray is."""
        note = _read_note(self)
        if note is not None:
            _write_note(self, replace(note, ray_address=address))

    def say(self, line: str) -> None:
        """Leave a line for `headrace down`."""
        with contextlib.suppress(OSError):
            (self.path / "progress").write_text(line)

    def said(self) -> str:
        """The last line left."""
        try:
            return (self.path / "progress").read_text()
        except OSError:
            return ""

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.haproxy, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


def folder_for(config: ClusterConfig) -> RunFolder:
    """The folder of an application at this configuration's port, made or not."""
    return RunFolder(_root() / str(config.http_options.port))


def running_note(config: ClusterConfig) -> Note | None:
    """Which process of this user on this machine serves at the configuration's port; None when none does."""
    note = _read_note(folder_for(config))
    return note if note is not None and note.process() is not None else None


def running_ray(config: ClusterConfig) -> str | None:
    """Where the local Ray is on which another process serves this application at the port; None when none does.

    Raises:
        AlreadyRunning: that process is still starting.
    """
    note = running_note(config) if config.ray.address == "local" else None
    if note is None:
        return None
    if not note.ray_address:
        raise AlreadyRunning(
            f"process {note.pid} is starting {note.application} at {note.url}; try again when it is ready, "
            "or stop it with 'headrace down'"
        )
    return note.ray_address


def claim(config: ClusterConfig, say: Say) -> RunFolder:
    """The folder for this process's own application, after clearing away what a killed one has left.

    Raises:
        AlreadyRunning: another process of this user serves at the port; its folder is left as it is.
    """
    root = _root()
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise AlreadyRunning(f"{root} belongs to another user; remove it, or set TMPDIR to a folder of your own")
    clear_stale(config, say)
    folder = folder_for(config)
    note = Note(
        os.getpid(), identity_of(os.getpid()), application=config.application.name, url=config.base_url
    )
    try:
        folder.path.mkdir(mode=0o700)
        _write_note(folder, note)
    except FileExistsError:
        raise AlreadyRunning(_already(config)) from None
    return folder


def clear_stale(config: ClusterConfig, say: Say) -> bool:
    """Remove what a killed `headrace up` has left at the configuration's port; True when there was any.

    What a failed start has left (its logs) goes too, without a word.
    """
    folder = folder_for(config)
    if not folder.path.exists() or running_note(config) is not None:
        return False
    noted = _noted(folder)
    left = list(_living(noted))
    ended = end_processes(left)
    removed = segments.remove(segments.from_json(str(noted.get("segments", ""))))
    folder.remove()
    if ended or removed:
        say(f"cleared away what a killed headrace up had left: {ended} processes, {removed} shared-memory segments")
    return bool(ended or removed)


def _already(config: ClusterConfig) -> str:
    note = running_note(config)
    where = f"at {note.url} as process {note.pid}" if note else f"at port {config.http_options.port}"
    name = note.application if note else "an application"
    return f"{name} already runs {where}; stop it with 'headrace down', or set another http_options.port"


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"


def _read_note(folder: RunFolder) -> Note | None:
    try:
        return Note(**json.loads((folder.path / "note.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_note(folder: RunFolder, note: Note) -> None:
    fresh = folder.path / "note.json.new"
    fresh.write_text(json.dumps(asdict(note)))
    fresh.replace(folder.path / "note.json")


def _noted(folder: RunFolder) -> dict[str, Any]:
    try:
        found = json.loads((folder.path / "processes.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _living(noted: dict[str, Any]) -> Iterator[psutil.Process]:
    for one in noted.get("processes", []):
        process = _same_process(one["pid"], one["identity"])
        if process is not None:
            yield process


def _same_process(pid: int, identity: str) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if identity_of(pid) == identity and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
