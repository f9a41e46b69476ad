"""Which replica each request of a simulation goes to: ours, by the rule that serving uses, or another project's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from replicas.marks import LatestMarks
from replicas.prompt_blocks import BLOCK_TOKENS, blocks_of
from replicas.routing_stats import RoutingStats
from router.ranking import Asked, Sent, best_first
from simulator.config import SimulationConfig
from simulator.engine.replica import VirtualReplica
from simulator.scenario.routers import RIVAL_ROUTERS
from simulator.workload.prompts import prompt_token_ids
from simulator.workload.requests import SimRequest

_CHARACTERS = 0x100000


class Routing:
    """The ingresses, each with its own view of the replicas; requests reach them at random.

    clock: virtual seconds.
    """

    def __init__(
        self, config: SimulationConfig, replicas: Sequence[VirtualReplica], clock: Callable[[], float]
    ) -> None:
        self._clock, self._ingresses = clock, config.ingresses
        self._rng = random.Random(config.workload.seed)
        self._reports: dict[int, RoutingStats] = {}
        self._marks: dict[int, LatestMarks] = {}
        self._sent: list[Sent[int]] = [Sent(clock, clock) for _ in range(config.ingresses)]
        made = RIVAL_ROUTERS.get(config.router)
        self._rivals = [made(random.Random(self._rng.random())) for _ in range(config.ingresses)] if made else []
        self._replicas: list[VirtualReplica] = []
        self.follow(replicas)

    def follow(self, replicas: Sequence[VirtualReplica]) -> None:
        """These are the replicas from now on."""
        self._replicas = list(replicas)
        self._marks = {replica.index: self._marks.get(replica.index, LatestMarks(self._clock)) for replica in replicas}
        for replica in self._replicas:
            replica.ended = self._ended

    def choose(self, number: int, request: SimRequest, declares: bool) -> VirtualReplica:
        """The replica for this request."""
        ingress = self._rng.randrange(self._ingresses) if self._ingresses > 1 else 0
        if self._rivals:
            rival = self._rivals[ingress]
            prompt = _text_of(number, request) if rival.reads_prompts else ""
            chosen: VirtualReplica = rival.choose(self._replicas, prompt)
            return chosen
        sent = self._sent[ingress]
        output_tokens = float(request.output_tokens) if declares else math.inf
        asked = Asked(float(request.prompt_tokens), output_tokens, blocks=_blocks_of(number, request))
        chosen = best_first(
            self._replicas, lambda replica: self._reports.get(replica.index), lambda replica: replica.index, sent,
            asked, ongoing=lambda replica: replica.ongoing if self._ingresses == 1 else 0, ingresses=self._ingresses,
            rng=self._rng,
        )[0]
        sent.sent(str(number), chosen.index, asked)
        sent.accepted(str(number), chosen.index)
        self._marks[chosen.index].note(asked.blocks)
        return chosen

    def report(self) -> None:
        """Every replica reports to all ingresses."""
        self._reports = {
            replica.index: RoutingStats.of_engines(
                [replica.headrace.stats()], self._clock(), self._marks[replica.index].told()
            ) for replica in self._replicas if replica.headrace
        }

    def _ended(self, replica: int, number: int) -> None:
        for sent in self._sent:
            sent.ended(str(number), replica)


def _blocks_of(number: int, request: SimRequest) -> list[int]:
    """What is shared only; a prompt without pieces shares nothing."""
    return blocks_of(prompt_token_ids(request.pieces, request.prompt_tokens, number), BLOCK_TOKENS) if (
        request.pieces
    ) else []


def _text_of(number: int, request: SimRequest) -> str:
    ids = prompt_token_ids(request.pieces, request.prompt_tokens, number)
    return "".join(chr(token_id % _CHARACTERS) for token_id in ids)
