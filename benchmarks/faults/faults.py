"""The faults: what each does to a running stack, when it ends, and which stacks it applies to."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from benchmarks.faults.channel_orders import GARBAGE, LATE, SILENT, tell
from benchmarks.faults.hang_ups import HangUps
from benchmarks.faults.processes import Role
from benchmarks.faults.stack import HEADRACE, RAY, Stack

SHORT_WATCH_S, LONG_WATCH_S, LONGEST_WATCH_S = 45, 75, 240


class NotApplicable(Exception):
    """The stack has nothing that this fault could hit; the message says why."""


@dataclass(frozen=True)
class Fault:
    """Base class. lasts_s: until `relieve`; None: it is not relieved. watch_s: seconds of load after the strike.
    after_done_s: the load ends so long after a strike that takes its time, and after watch_s at the latest. two_nodes,
    faulty_channel, ingresses: of the stack that it needs."""

    name: str
    title: str
    watch_s: int = SHORT_WATCH_S
    lasts_s: float | None = None
    after_done_s: int | None = None
    stacks: tuple[str, ...] = (HEADRACE, RAY)
    two_nodes: bool = False
    faulty_channel: bool = False
    ingresses: int = 0

    def prepare(self, stack: Stack) -> Any:
        """What the strike will hit, found a few seconds before it. Raises NotApplicable."""

    def strike(self, stack: Stack, prepared: Any) -> str:
        """Let it happen; a line on what was hit."""
        return "nothing"

    def relieve(self, stack: Stack, prepared: Any) -> None:
        """End what lasts."""


def _one(stack: Stack, role: Role) -> psutil.Process:
    found = stack.family.of(role)
    if not found:
        raise NotApplicable(f"this stack has no {role.value}")
    return found[0]


@dataclass(frozen=True)
class Kill(Fault):
    """kill -9 of one process."""

    role: Role = Role.ENGINE_CORE

    def prepare(self, stack: Stack) -> psutil.Process:
        """The oldest process of the role."""
        return _one(stack, self.role)

    def strike(self, stack: Stack, prepared: psutil.Process) -> str:
        """SIGKILL."""
        prepared.kill()
        return f"{self.role.value} {prepared.pid}"


@dataclass(frozen=True)
class Freeze(Kill):
    """SIGSTOP of one process, SIGCONT later."""

    def strike(self, stack: Stack, prepared: psutil.Process) -> str:
        """SIGSTOP."""
        prepared.send_signal(signal.SIGSTOP)
        return f"{self.role.value} {prepared.pid}"

    def relieve(self, stack: Stack, prepared: psutil.Process) -> None:
        """SIGCONT, unless the process has been replaced meanwhile."""
        with contextlib.suppress(psutil.NoSuchProcess):
            prepared.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class LoseNode(Fault):
    """The worker node of a two-node cluster disappears with all its processes; a new one joins when it is relieved."""

    def prepare(self, stack: Stack) -> list[psutil.Process]:
        """The youngest raylet and all below it."""
        raylets = stack.family.of(Role.RAYLET)
        if len(raylets) < 2:
            raise NotApplicable("one node only")
        return stack.family.below(raylets[-1])

    def strike(self, stack: Stack, prepared: list[psutil.Process]) -> str:
        """SIGKILL of the node's raylet, then at once of the rest."""
        for process in prepared:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return f"raylet {prepared[0].pid} and {len(prepared) - 1} processes of its node"

    def relieve(self, stack: Stack, prepared: list[psutil.Process]) -> None:
        """As a cluster's autoscaler would."""
        stack.add_node()


@dataclass(frozen=True)
class Channel(Fault):
    """The control channel of one engine answers garbage, late, or not at all."""

    way: str = GARBAGE

    def prepare(self, stack: Stack) -> psutil.Process:
        """The oldest engine core."""
        return _one(stack, Role.ENGINE_CORE)

    def strike(self, stack: Stack, prepared: psutil.Process) -> str:
        """Tell that engine."""
        tell(stack.temporary, prepared.pid, self.way)
        return f"channel of engine core {prepared.pid}: {self.way}"

    def relieve(self, stack: Stack, prepared: psutil.Process) -> None:
        """The channel answers again."""
        tell(stack.temporary, prepared.pid, None)


@dataclass(frozen=True)
class HangUp(Fault):
    """Many streaming clients hang up at once."""

    clients: int = 20

    def prepare(self, stack: Stack) -> HangUps:
        """Start them."""
        return HangUps(stack.url, self.clients)

    def strike(self, stack: Stack, prepared: HangUps) -> str:
        """Close their connections."""
        return prepared.hang_up()


@dataclass(frozen=True)
class RollingRedeploy(Fault):
    """An engine setting changes, so that every replica is replaced."""

    def strike(self, stack: Stack, prepared: Any) -> str:
        """Deploy, and wait for it."""
        begun = time.monotonic()
        seats = 96 - stack.settings.max_num_seqs + 64  # 64 and 96 by turns
        stack.redeploy(dataclasses.replace(stack.settings, max_num_seqs=seats))
        return f"max_num_seqs {seats}, deployed in {time.monotonic() - begun:.0f} s"


@dataclass(frozen=True)
class Scale(Fault):
    """One replica less, then as many as before."""

    def strike(self, stack: Stack, prepared: Any) -> str:
        """Deploy twice."""
        begun = time.monotonic()
        stack.redeploy(dataclasses.replace(stack.settings, replicas=1))
        down_s = time.monotonic() - begun
        stack.redeploy(dataclasses.replace(stack.settings, replicas=2))
        return f"2 -> 1 in {down_s:.0f} s, -> 2 in {time.monotonic() - begun - down_s:.0f} s"


@dataclass(frozen=True)
class WrongLaw(Fault):
    """An operator pushes an iteration-time law that says half of the true times."""

    factor: float = 0.5

    def strike(self, stack: Stack, prepared: Any) -> str:
        """Scale the active law of every replica and push it, pinned."""
        with httpx.Client(base_url=stack.url, timeout=10.0, trust_env=False) as client:
            active = client.get("/admin/thresholds").json()["replicas"]
            pushed = [name for name, thresholds in active.items() if self._push(client, name, thresholds)]
        if not pushed:
            raise NotApplicable("no replica has a fluid law yet")
        return f"law × {self.factor:g} on {len(pushed)} replicas"

    def _push(self, client: httpx.Client, name: str, thresholds: dict[str, Any]) -> bool:
        fluid = thresholds.get("fluid")
        if not fluid:
            return False
        law = {key: value * self.factor for key, value in fluid["time_model"].items()}
        body = {"replica": name, "thresholds": {"fluid": fluid | {"time_model": law}}, "pin": True}
        answer = client.put("/admin/thresholds", json=body)
        if answer.is_error:
            raise NotApplicable(f"HTTP {answer.status_code}: {answer.text[:200]}")
        return True

    def relieve(self, stack: Stack, prepared: Any) -> None:
        """Automatic again."""
        httpx.put(f"{stack.url}/admin/thresholds", json={"auto": True}, timeout=10.0, trust_env=False)


_OURS = (HEADRACE,)
FAULTS: dict[str, Fault] = {fault.name: fault for fault in (
    Fault("none", "no fault"),
    HangUp("hang-ups", "20 clients hang up at once"),
    Kill("kill-controller", "kill −9 of our controller", role=Role.CONTROLLER, stacks=_OURS),
    Freeze("stop-controller", "SIGSTOP of our controller for 30 s", role=Role.CONTROLLER, lasts_s=30.0, stacks=_OURS),
    Kill("kill-serve-controller", "kill −9 of Serve's controller", role=Role.SERVE_CONTROLLER),
    WrongLaw("wrong-law", "a law wrong by 2 pushed by hand", lasts_s=30.0, stacks=_OURS),
    Kill("kill-engine-core", "kill −9 of an engine core"),
    Kill("kill-engine-worker", "kill −9 of an engine worker", role=Role.ENGINE_WORKER),
    Kill("kill-replica", "kill −9 of a replica actor", role=Role.REPLICA),
    Kill("kill-ingress", "kill −9 of an ingress actor", role=Role.INGRESS),
    Kill("kill-one-ingress", "kill −9 of one of two ingress actors", role=Role.INGRESS, ingresses=2),
    Kill("kill-proxy", "kill −9 of a Serve proxy", role=Role.PROXY),
    Kill("kill-haproxy", "kill −9 of HAProxy", role=Role.HAPROXY, stacks=_OURS),
    Freeze("stop-engine-core", "SIGSTOP of an engine core for 60 s", watch_s=LONG_WATCH_S, lasts_s=60.0),
    RollingRedeploy(
        "redeploy", "rolling redeploy, an engine setting changed", watch_s=LONGEST_WATCH_S, after_done_s=20
    ),
    Scale("scale", "scale 2 → 1 → 2", watch_s=LONGEST_WATCH_S, after_done_s=20),
    Channel("channel-garbage", "a channel that answers garbage", lasts_s=30.0, stacks=_OURS, faulty_channel=True),
    Channel(
        "channel-late", "a channel that answers 3 s late", lasts_s=30.0, stacks=_OURS, faulty_channel=True, way=LATE
    ),
    Channel(
        "channel-silent", "a channel that does not answer", lasts_s=30.0, stacks=_OURS, faulty_channel=True,
        way=SILENT,
    ),
    LoseNode("lose-node", "loss of a whole Ray node", watch_s=LONG_WATCH_S, lasts_s=10.0, two_nodes=True),
)}
