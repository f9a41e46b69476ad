"""An engine's telemetry made by hand on a clock of its own, with the real rules for which thresholds are taken."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.engine.active_thresholds import ActiveThresholds
from scheduler.messages import Arrival, Counters, Finished, Gauges, Iteration, Stats, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.settings import LiveSettings
from scheduler.thresholds import EngineLimits, Thresholds

LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
)
PAPER = IterationTimeModel(d0_s=0.0102484863577943, d1_s_per_kv_token=3.877682025836559e-07)
"""The iteration-time model of arXiv 2504.11320; with LIMITS it makes the profile a100-llama2-7b-paper."""


class SyntheticEngine:
    """Records what the test says happened, and reports it as the engine's channel would."""

    def __init__(
        self, configured: Thresholds | None = None, limits: EngineLimits = LIMITS, engine_id: str = "engine-1"
    ) -> None:
        self.now_s = 0.0
        self.limits, self.engine_id = limits, engine_id
        self.settings: LiveSettings | None = None
        """What it says is in force; None: as an earlier release, nothing."""
        self.active = ActiveThresholds(configured or Thresholds(), limits, lambda: self.now_s)
        self._seq = 0
        self._iterations: list[Iteration] = []
        self._arrivals: list[Arrival] = []
        self._finished: list[Finished] = []

    def arrive(self, prompt: int, declared: int | None = None) -> None:
        self._arrivals.append(Arrival(self._next(), self.now_s, prompt, declared))

    def finish(self, prompt: int, output: int, *, aborted: bool = False, tpot_s: float | None = None) -> None:
        self._finished.append(Finished(self._next(), self.now_s, prompt, output, aborted, tpot_s=tpot_s))

    def iterate(self, prefill: int, decode: int, kv: int, seconds: float) -> None:
        self._iterations.append(Iteration(self._next(), self.now_s, seconds, prefill, decode, kv, decode + 1))

    def traffic(
        self, lengths: Iterable[tuple[int, int]], *, every_s: float, seconds: float, declared: bool = False
    ) -> None:
        """One request every `every_s` for `seconds`, of the lengths in turn; each is over at once."""
        pairs = list(lengths)
        for number in range(round(seconds / every_s)):
            self.now_s += every_s
            prompt, output = pairs[number % len(pairs)]
            self.arrive(prompt, output if declared else None)
            self.finish(prompt, output)

    def report(self, cursor: int | None = 0) -> Telemetry:
        current = self.active.current()
        after = self._seq if cursor is None else cursor if cursor <= self._seq else 0
        return Telemetry(
            engine_id=self.engine_id, clock_s=self.now_s, cursor=self._seq, limits=self.limits,
            thresholds=current.thresholds, from_config=current.from_config, gauges=Gauges(), counters=Counters(),
            iterations=tuple(record for record in self._iterations if record.seq > after),
            arrivals=tuple(record for record in self._arrivals if record.seq > after),
            finished=tuple(record for record in self._finished if record.seq > after),
            settings=self.settings and self.settings.as_dict(),
        )

    def stats(self) -> Stats:
        return Stats.of_engine(self.engine_id, self.limits, self.active.current().thresholds, Gauges())

    def _next(self) -> int:
        self._seq += 1
        return self._seq
