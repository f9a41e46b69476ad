"""The workload: joint prompt and output lengths, request types with their rates, and the mix of all types."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.model.iteration_time import require_number

_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class Lengths:
    """Joint distribution of (prompt tokens l, output tokens l') of one request type.

    Integer arrays of equal length, every entry >= 1, with weights >= 0 of positive sum. Stored with
    distinct pairs in order, weights summing to 1 and read-only arrays, so that equal distributions compare equal.
    Raises ValueError for anything else. A request of lengths (l, l') lives l'+1 iterations: its prefill, then l'
    decodes; in iteration s = 0..l' it holds l + s tokens of KV (arXiv 2504.11320, the model). Derived values are
    computed once, on first use.
    """

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        prompt = _token_array("prompt_tokens", self.prompt_tokens)
        output = _token_array("output_tokens", self.output_tokens)
        weights = np.asarray(self.weights, dtype=np.float64)
        if not prompt.size == output.size == weights.size:
            raise ValueError(
                f"prompt_tokens, output_tokens and weights have {prompt.size}, {output.size} and {weights.size} "
                "entries; they must have equally many"
            )
        if not (np.all(np.isfinite(weights)) and np.all(weights >= 0) and weights.sum() > 0):
            raise ValueError("weights must be finite, >= 0 and not all zero")
        present = weights > 0
        key = prompt[present] * (_MAX_TOKENS + 1) + output[present]
        pairs, pair_of_row = np.unique(key, return_inverse=True)
        total = np.bincount(pair_of_row, weights=weights[present])
        canonical = (pairs // (_MAX_TOKENS + 1), pairs % (_MAX_TOKENS + 1), total / total.sum())
        for name, array in zip(("prompt_tokens", "output_tokens", "weights"), canonical, strict=True):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def point(cls, prompt: int, output: int) -> "Lengths":
        """Every request has the same lengths."""
        return cls.from_pairs([(prompt, output)])

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> "Lengths":
        """The empirical distribution of observed (prompt, output) pairs."""
        rows = list(pairs)
        return cls(np.array([p for p, _ in rows]), np.array([o for _, o in rows]), np.ones(len(rows)))

    def within(self, longest: int) -> "Lengths":
        """These lengths where a request has at most `longest` tokens in all, but one of each; longer outputs are cut.

        Estimates pair prompts with outputs that no request has had together; a pair that cannot be must not count.
        """
        if self.max_total_tokens <= longest:
            return self
        prompts = np.minimum(self.prompt_tokens, max(1, longest - 1))
        return Lengths(prompts, np.minimum(self.output_tokens, np.maximum(1, longest - prompts)), self.weights)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lengths) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return (
            f"Lengths({self.prompt_tokens.size} pairs, mean_prompt_tokens={self.mean_prompt_tokens:.6g}, "
            f"mean_output_tokens={self.mean_output_tokens:.6g})"
        )

    @cached_property
    def _content(self) -> tuple[bytes, bytes, bytes]:
        return self.prompt_tokens.tobytes(), self.output_tokens.tobytes(), self.weights.tobytes()

    @cached_property
    def mean_prompt_tokens(self) -> float:
        """E[l]."""
        return float(self.weights @ self.prompt_tokens)

    @cached_property
    def mean_output_tokens(self) -> float:
        """E[l']."""
        return float(self.weights @ self.output_tokens)

    @cached_property
    def max_total_tokens(self) -> int:
        """Largest l + l': the KV cache that the biggest request needs at its end."""
        return int(np.max(self.prompt_tokens + self.output_tokens))

    @cached_property
    def _mean_life_kv_tokens(self) -> NDArray[np.float64]:
        """l + l'/2 of each pair: the KV it holds, averaged over its life."""
        return self.prompt_tokens + self.output_tokens / 2

    @cached_property
    def kv_token_iterations_each(self) -> NDArray[np.float64]:
        """w = (l'+1)(l + l'/2) of each pair: KV-token-iterations of one request over its life."""
        return np.asarray((self.output_tokens + 1) * self._mean_life_kv_tokens)

    @cached_property
    def kv_token_iterations(self) -> float:
        """E[w]."""
        return float(self.weights @ self.kv_token_iterations_each)

    @cached_property
    def prompt_token_iterations(self) -> float:
        """E[(l'+1) l]: of the KV-token-iterations, those of prompt tokens."""
        return float(self.weights @ ((self.output_tokens + 1) * self.prompt_tokens))

    @cached_property
    def mean_running_kv_tokens(self) -> float:
        """E[w] / E[l'+1]: mean KV of a running request at a random iteration (long lives weigh more)."""
        return self.kv_token_iterations / (self.mean_output_tokens + 1)

    @cached_property
    def running_kv_std(self) -> float:
        """Standard deviation of the KV tokens of a running request at a random iteration.

        Each pair counts l'+1 times, its position uniform over s = 0..l', whose own variance is l'(l'+2)/12.
        """
        life = self.weights * (self.output_tokens + 1)
        between = (self._mean_life_kv_tokens - self.mean_running_kv_tokens) ** 2
        within = self.output_tokens * (self.output_tokens + 2) / 12
        return math.sqrt(float(life @ (between + within)) / float(life.sum()))

    @cached_property
    def _output_support(self) -> NDArray[np.int64]:
        """Distinct output lengths, ascending."""
        return np.unique(self.output_tokens)

    @cached_property
    def _tails(self) -> NDArray[np.float64]:
        """P(output > x) and E[l; output > x], two rows, for x at least 0, 1, 2, … of the support."""
        index = np.searchsorted(self._output_support, self.output_tokens)
        by_output = np.stack([np.bincount(index, mass) for mass in (self.weights, self.weights * self.prompt_tokens)])
        # Summed from the right, so that beyond the last length exactly nothing is left.
        tails = np.pad(np.cumsum(by_output[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
        return np.asarray(tails / tails[0, 0])

    def _exceeded(self, output_tokens: float) -> int:
        return int(np.searchsorted(self._output_support, output_tokens, side="right"))

    def survival(self, output_tokens: float) -> float:
        """P(output > output_tokens)."""
        return float(self._tails[0, self._exceeded(output_tokens)])

    def survivals(self, output_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """`survival` of each entry."""
        return np.asarray(self._tails[0, np.searchsorted(self._output_support, output_tokens, side="right")])

    def output_quantile(self, q: float) -> int:
        """Smallest output length x with P(output <= x) >= q; q in [0, 1], else ValueError."""
        if not 0 <= q <= 1:
            raise ValueError(f"q is {q!r}; it must be between 0 and 1")
        return int(self.output_quantiles(np.array([q]))[0])

    def output_quantiles(self, q: NDArray[np.float64]) -> NDArray[np.int64]:
        """`output_quantile` of each entry, all in [0, 1]."""
        # The tolerance absorbs rounding in the summed weights.
        return np.asarray(self._output_support[np.searchsorted(1 - self._tails[0, 1:], q - 1e-12)])

    def mean_prompt_tokens_beyond(self, output_tokens: float) -> float:
        """E[l | output > output_tokens]; ValueError when no request is that long."""
        survival, prompt_tokens = self._tails[:, self._exceeded(output_tokens)].tolist()
        if survival == 0:
            raise ValueError(f"output_tokens is {output_tokens!r}; it must be below the longest output")
        return float(prompt_tokens / survival)


def _token_array(name: str, values: object) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; it must be a non-empty one-dimensional array")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} holds {array.dtype} values such as {array[0]!r}; it must hold integers")
    if array.min() < 1 or array.max() > _MAX_TOKENS:
        worst = array.min() if array.min() < 1 else array.max()
        raise ValueError(f"{name} holds {worst}; every entry must be between 1 and {_MAX_TOKENS}")
    return array.astype(np.int64)


@dataclass(frozen=True, slots=True)
class RequestType:
    """Requests of one kind: Poisson arrivals at `rate_rps` (λ_j, requests/s, >= 0) with the given lengths."""

    name: str
    rate_rps: float
    lengths: Lengths

    def __post_init__(self) -> None:
        require_number("rate_rps", self.rate_rps)


@dataclass(frozen=True)
class WorkloadMix:
    """All request types that share one replica; their names must be distinct."""

    types: tuple[RequestType, ...]

    def __post_init__(self) -> None:
        names = [t.name for t in self.types]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"types are {names}; there must be at least one, with distinct names")

    @classmethod
    def from_lengths(cls, lengths: Lengths, rate_rps: float) -> "WorkloadMix":
        """A mix of one type, named "all"."""
        return cls((RequestType("all", rate_rps, lengths),))

    @property
    def rate_rps(self) -> float:
        """Requests per second over all types."""
        return sum(t.rate_rps for t in self.types)

    @property
    def max_total_tokens(self) -> int:
        """Largest prompt plus output of any type that arrives; 0 when none does."""
        return max((t.lengths.max_total_tokens for t in self.types if t.rate_rps > 0), default=0)

    def scaled(self, factor: float) -> "WorkloadMix":
        """The same mix with every rate multiplied by `factor` (>= 0)."""
        require_number("factor", factor)
        return WorkloadMix(tuple(replace(t, rate_rps=t.rate_rps * factor) for t in self.types))

    def merged(self) -> RequestType:
        """One type with the rate-weighted mixture of all lengths, for requests of unknown length.

        Raises ValueError when every rate is zero.
        """
        return self._merged

    @cached_property
    def _merged(self) -> RequestType:
        arriving = [t for t in self.types if t.rate_rps > 0]
        if not arriving:
            raise ValueError("rate_rps is 0 for every type; at least one must be > 0")
        if len(arriving) == 1:
            return arriving[0]
        lengths = Lengths(
            np.concatenate([t.lengths.prompt_tokens for t in arriving]),
            np.concatenate([t.lengths.output_tokens for t in arriving]),
            np.concatenate([t.rate_rps * t.lengths.weights for t in arriving]),
        )
        return RequestType("+".join(t.name for t in arriving), self.rate_rps, lengths)


def token_count(name: str, text: str | None) -> int:
    """The number of tokens written as `text`, within the bounds of `Lengths`; ValueError naming `name` for another."""
    try:
        count = int(text or "")
    except ValueError:
        count = 0
    if not 1 <= count <= _MAX_TOKENS:
        raise ValueError(f"{name} is {text!r}; it must be an integer between 1 and {_MAX_TOKENS}")
    return count
