"""Where an engine without a cluster keeps its channel, so that the API server in front of it finds it.

Both are processes of one `vllm serve`: the API server starts the engine core, or a process starts both. So the folder's
name holds the process that started the engine core, and the engine's data-parallel rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from pathlib import Path

from scheduler.engine.channel import FOLDER, new_endpoint, remove_abandoned_endpoints
from scheduler.engine.process_identity import identity_of

_NAME = re.compile(rf"{FOLDER}-of(?P<owner>\d+\.\d+)\.(?P<rank>\d+)-")
_STATE = "controller.json"
_LOOKS, _LOOK_EVERY_S = 60, 0.05


def new_place(rank: int) -> str:
    """A fresh endpoint (`new_endpoint`) for the engine of this process, findable by the API servers in front of it."""
    return new_endpoint(f"of{identity_of(os.getppid())}.{rank}")


def engines_here() -> dict[int, str]:
    """The endpoints of the engines behind this API server, by rank; those on other machines are not seen."""
    return _engines_of(os.getpid(), os.getppid())


async def remove_what_engines_left() -> None:
    """Remove the places of the engines that this process started, once they have ended; gives up after seconds.

    vLLM's server ends by killing its engine cores with all their children, so none of them can.
    """
    for _ in range(_LOOKS):
        remove_abandoned_endpoints()
        if not _engines_of(os.getpid()):
            return
        await asyncio.sleep(_LOOK_EVERY_S)


def _engines_of(*pids: int) -> dict[int, str]:
    identities = {identity_of(pid) for pid in pids}
    found: dict[int, str] = {}
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}-of*"):
        name = _NAME.match(folder.name)
        if name and name["owner"] in identities and _is_ours(folder):
            found[int(name["rank"])] = f"ipc://{folder}/engine"
    return dict(sorted(found.items()))


def state_file(endpoint: str) -> Path:
    """Where the controller process of the engine at `endpoint` writes what it knows."""
    return Path(endpoint.removeprefix("ipc://")).with_name(_STATE)


def write_state(endpoint: str, text: bytes) -> None:
    """Replace the state in one step, so that a reader never sees half of it; a folder that is gone is left gone."""
    new = state_file(endpoint).with_suffix(".new")
    with contextlib.suppress(OSError):
        new.write_bytes(text)
        new.rename(state_file(endpoint))


def _is_ours(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return folder.lstat().st_uid == os.getuid()
    return False

