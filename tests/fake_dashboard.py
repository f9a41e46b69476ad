"""The dashboard's server without Ray: the real files, gate, sentences and history, over a cluster that is made up.

`python tests/fake_dashboard.py` serves it on port 8899, to look at the page.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from synthetic_engine import LIMITS, SyntheticEngine

from cluster.history import History
from router.dashboard.files import serve_dashboard
from router.dashboard.overview import overview
from router.dashboard.prediction import in_words
from router.front_door import NO_REPORTS
from router.gate import Gate, open_desk
from router.limits import DEFAULT_LIMITS
from scheduler.messages import Counters, Finished, Gauges, Iteration, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning.slo import Slo
from scheduler.tuning.wanted_replicas import Wanted

MODEL = "llama-3-8b"
TARGETS = Slo(ttft_s=2.0, tpot_s=0.08)
TIME_MODEL = IterationTimeModel(d0_s=0.02, d1_s_per_kv_token=3e-7)
PLAN = {
    "replicas": 2, "offered_rps": 9.4, "cold": False, "capacity_rps": 8.1, "goodput_rps": 8.0, "bottleneck": "memory",
    "limit": "memory", "load": 1.16, "in_time": 0.99, "running": 58.0, "queue_limit": 9, "iteration_s": 0.066,
    "memory_tokens": 118_000.0, "kv_capacity_tokens": 136_984, "reason": None,
}
WANTED = Wanted(
    replicas=3, needed=3, decided=True, reason="9.4 requests/s are offered, rejected ones included: 3 needed",
    offered_rps=9.4, ahead_rps=9.5, high_rps=11.0, confidence=0.9, each_rps=4.05, limit="memory", start_up_s=120.0,
    measured=False,
)
EVIL = "<img src=x onerror=\"window.stolen='yes'\"><script>window.stolen='yes'</script>"


class Made:
    """What the fake server says; a test changes it."""

    def __init__(self, replicas: tuple[str, ...] = ("8f2kq1zw", "m3x9c0ad"), now_s: float | None = None) -> None:
        self.names, self.model = replicas, MODEL
        self.history = History()
        self.alive, self.fails = True, False
        self.now: dict[str, Any] = dict(PLAN)
        self.more = dict(PLAN, replicas=3, capacity_rps=12.2, goodput_rps=9.35)
        self.less = dict(PLAN, replicas=1, capacity_rps=4.05, goodput_rps=4.0)
        self.scaling: dict[str, dict[str, Any]] = {MODEL: WANTED.as_dict()}
        self.changes: list[dict[str, Any]] = []
        self.extra: dict[str, dict[str, Any]] = {}
        """By replica: what differs from the others' state."""
        self.applied: list[tuple[str, Any]] = []
        self._ticks, self._engines = 0, {name: SyntheticEngine(Thresholds(max_running=64)) for name in replicas}
        counted = ("arrivals", "completed", "good", "rejected", "rejected_queue_full", "rejected_front_door",
                   "audited", "audited_met")
        self._totals = {name: dict.fromkeys(counted, 0) for name in replicas}
        self._seq = 0
        self.now_s = time.time() if now_s is None else now_s

    def cycles(self, count: int, period_s: float = 5.0) -> None:
        """So many control cycles up to now."""
        begun = self.now_s - count * period_s
        for number in range(count):
            self._ticks += 1
            for place, name in enumerate(self.names):
                self._observe(name, place, begun + (number + 1) * period_s, period_s)

    def _observe(self, name: str, place: int, at_unix_s: float, period_s: float) -> None:
        wave = math.sin(self._ticks / 17 + place) + 0.3 * math.sin(self._ticks / 2.7 + 2 * place)
        busy = min(1.0, max(0.05, 0.25 + self._ticks / 140 + 0.12 * wave))
        arrivals = max(0, round(period_s * (1 + 4.5 * busy)))
        done_count = round(min(arrivals, period_s * 4.1))
        totals = self._totals[name]
        totals["arrivals"] += arrivals
        totals["completed"] += done_count
        totals["good"] += done_count - (self._ticks % 40 == 0)
        totals["rejected"] += arrivals - done_count
        totals["rejected_queue_full"] += (arrivals - done_count) // 3
        totals["rejected_front_door"] += arrivals - done_count - (arrivals - done_count) // 3
        audited = self._ticks % 3 == 0 and arrivals > done_count
        totals["audited"] += audited
        totals["audited_met"] += audited and self._ticks % 9 == 0
        running, kv = round(58 * busy), round(LIMITS.kv_capacity_tokens * (0.05 + 0.86 * busy))
        seconds = TIME_MODEL.iteration_s(0, running, kv)
        iterations = tuple(Iteration(self._next(), 0.0, seconds * (1 + 0.05 * wave), 0, running, kv, running)
                           for _ in range(3))
        finished = tuple(Finished(
            self._next(), 0.0, 400, 200, False, ttft_s=0.15 + 1.2 * busy**3 + 0.02 * number,
            tpot_s=seconds * (1 + 0.02 * number),
        ) for number in range(done_count))
        report = self._engines[name].report(None)
        self.history.observe(name, self.model, at_unix_s, Telemetry(
            engine_id=name, clock_s=1000.0 + self._ticks * period_s, cursor=self._seq, limits=LIMITS,
            thresholds=report.thresholds, from_config=False, iterations=iterations, finished=finished,
            gauges=Gauges(running=running, waiting=max(0, round(12 * (busy - 0.8))), kv_used_tokens=kv),
            counters=Counters(iterations=3 * self._ticks, **totals),
        ), targets=TARGETS, predicted_by=TIME_MODEL, shown={
            "fluid": {"memory_tokens": 0.88 * busy * LIMITS.kv_capacity_tokens}, "forecast": {"capacity_rps": 4.05},
        })

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def state(self) -> dict[str, Any]:
        replicas = {}
        for name in self.names:
            shown = self._engines[name].report(None).shown()
            replicas[name] = {"model": self.model, "reachable": True} | shown | {
                "running": 52, "waiting": 3, "kv_used_fraction": 0.83, "rate_rps": 4.7, "finished_seen": 400,
                "targets": {"ttft_s": 2.0, "tpot_s": 0.08, "latency_s": None},
                "time_model": {"d0_s": 0.02, "d1_s_per_kv_token": 3e-7, "r2": 0.98, "mape": 0.04, "records": 900},
                "forecast": {"cold": False, "capacity_rps": 4.05, "miss_probability": 0.01},
                "decision": "4.70 requests/s of 4.05 possible, iterations up to 71.2 ms, queue up to 9; bottleneck: "
                            "memory; 4.00/s expected in time",
                "recent": self.history.recent(name, 120.0), "still_s": 0.0, "pin": None,
            } | self.extra.get(name, {})
        controller: dict[str, Any] = {"alive": False, "reason": "the controller does not answer"}
        if self.alive:
            prospects = {"now": self.now, "one_more": self.more, "one_less": self.less}
            controller = {"alive": True, "period_s": 5.0, "started_unix_s": 1.0,
                          "passes": self._ticks, "pins": {}, "changes": self.changes,
                          "prospects": {self.model: prospects}, "scaling": self.scaling}
        return {"application": "headrace", "at_unix_s": time.time(), "models": {self.model: {}}, "replicas": replicas,
                "controller": controller, "front_door": {"rejected": 12, "ingresses": 1}}


def change(**fields: Any) -> dict[str, Any]:
    """An event as the controller gives it."""
    return {"at_unix_s": time.time() - 12, "kind": "thresholds", "replica": "8f2kq1zw", "model": MODEL,
            "old_version": 41, "new_version": 42, "accepted": True, "by": "", "key": "", "reason":
            "4.70 requests/s of 4.05 possible, iterations up to 71.2 ms, queue up to 9; bottleneck: memory; "
            "4.00/s expected in time", "old": {"fluid": {"queue_limit": None, "iteration_s": 0.0754}},
            "new": {"fluid": {"queue_limit": 9, "iteration_s": 0.0712}}} | fields


def app_of(made: Made) -> FastAPI:
    app = FastAPI(openapi_url=None)
    desk = open_desk((), DEFAULT_LIMITS, {}, NO_REPORTS, {})
    app.add_middleware(Gate, desk=lambda: desk)
    serve_dashboard(app)

    @app.get("/admin/overview")
    async def shown() -> Any:
        if made.fails:
            return JSONResponse({"error": {"message": "the server is stopping"}}, status_code=503)
        return overview(made.state())

    @app.get("/admin/history")
    async def points(after: float = 0.0) -> Any:
        replicas = made.history.columns(after) if made.alive else {}
        return {"replicas": replicas, "controller": {"alive": made.alive, "started_unix_s": 1.0}}

    @app.post("/admin/predict")
    async def predict(request: Request) -> Any:
        made.applied.append(("predict", await request.json()))
        then = dict(PLAN, capacity_rps=7.2, goodput_rps=7.1, limit="TPOT target", bottleneck="TPOT target")
        return {"model": made.model, "now": made.now, "then": then, "sentence": in_words(made.now, then)}

    @app.put("/admin/thresholds")
    async def thresholds(request: Request) -> Any:
        made.applied.append(("thresholds", await request.json()))
        return {"replicas": {name: {"accepted": True, "version": 43, "reason": ""} for name in made.names},
                "pin": {"kept": True}}

    @app.put("/admin/settings")
    async def settings(request: Request) -> Any:
        made.applied.append(("settings", await request.json()))
        return {"models": {made.model: {}}, "replicas": {name: {"accepted": True} for name in made.names}}

    return app


class FakeDashboard:
    """Serves on a free port of 127.0.0.1 while the block lasts."""

    def __init__(self, made: Made, port: int = 0) -> None:
        self.made = made
        self._server = uvicorn.Server(uvicorn.Config(app_of(made), port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> FakeDashboard:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    @property
    def url(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)


def example() -> Made:
    """A cluster beyond its capacity, with something odd about each replica."""
    made = Made()
    made.cycles(150)
    made.changes = [
        change(at_unix_s=time.time() - 900, kind="settings", replica="", by="anna", key="operator key",
               reason="targets.tpot_s 0.1 -> 0.08; evening", old={}, new={}),
        change(at_unix_s=time.time() - 300, kind="pin", by="anna", key="operator key", reason="rush hour"),
        change(),
    ]
    made.extra["m3x9c0ad"] = {
        "forecast": {"cold": True, "capacity_rps": 3.1, "miss_probability": 0.01}, "finished_seen": 7,
        "time_model": {"d0_s": 0.035, "d1_s_per_kv_token": 4e-7, "r2": 0.9, "mape": 0.05, "records": 60},
    }
    return made


if __name__ == "__main__":
    with FakeDashboard(example(), port=8899) as server:
        server._thread.join()
