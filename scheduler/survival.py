"""The survival function of output lengths, as the controller sends it to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import GetCoreSchemaHandler, Strict
from pydantic_core import CoreSchema, core_schema

from scheduler.model.workload import Lengths

_QUANTILES = 48
Points = tuple[tuple[int, Annotated[float, Strict()]], ...]


@lru_cache(maxsize=256)
def _columns(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Tokens, probabilities and the mean; engines that are alike have the same points."""
    tokens, probabilities = np.array(points, dtype=np.float64).T.copy()
    for column in (tokens, probabilities):
        column.setflags(write=False)
    return tokens, probabilities, float(np.trapezoid(probabilities, tokens)) + points[0][1] / 2


@dataclass(frozen=True, slots=True)
class Survival:
    """P(output > x) of a new request, at some output lengths x (tokens), linear between them and 0 beyond the last.

    points: pairs (x, probability), x rising from 0, probabilities falling from at most 1 to at least 0; in JSON the
    bare pairs. Raises ValueError for others.
    """

    points: Points

    def __post_init__(self) -> None:
        tokens, probabilities = [x for x, _ in self.points], [p for _, p in self.points]
        falling = all(a < b for a, b in pairwise(tokens)) and all(a >= b for a, b in pairwise(probabilities))
        if not (tokens and tokens[0] == 0 and falling and probabilities[0] <= 1 and probabilities[-1] >= 0):
            raise ValueError(
                "survival must be pairs (tokens, probability), tokens rising from 0, probabilities falling from 1 to 0"
            )

    @classmethod
    def of(cls, lengths: Lengths) -> Survival:
        """The survival of known lengths, with points just before and at the quantiles, where it falls most."""
        marks = lengths.output_quantiles(np.linspace(0, 1, _QUANTILES))
        at = np.unique(np.concatenate([[0], marks, marks - 1]))
        return cls(tuple(zip(at.tolist(), lengths.survivals(at).tolist(), strict=True)))

    @property
    def tokens(self) -> NDArray[np.float64]:
        """The output lengths of the points."""
        return _columns(self.points)[0]

    @property
    def _probabilities(self) -> NDArray[np.float64]:
        return _columns(self.points)[1]

    def at(self, tokens: Sequence[int] | NDArray[Any]) -> NDArray[np.float64]:
        """P(output > x) at each of these lengths."""
        return np.asarray(np.interp(tokens, self.tokens, self._probabilities, right=0.0), dtype=np.float64)

    @property
    def mean(self) -> float:
        """Mean output tokens, Σ P(output > x) over whole x, by the trapezoids between the points."""
        return _columns(self.points)[2]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """On the wire: the pairs."""
        pairs = handler.generate_schema(Points)
        return core_schema.no_info_after_validator_function(
            cls, pairs,
            serialization=core_schema.plain_serializer_function_ser_schema(attrgetter("points"), return_schema=pairs),
        )
