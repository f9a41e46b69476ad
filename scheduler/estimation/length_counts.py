"""Output lengths as counts in fixed buckets, which add up over replicas.

Source: the actuarial life table (Cutler and Ederer 1958), the product-limit estimator of grouped observations: an
output that is seen for a part of a bucket counts for half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.digest import BUCKETS, LengthSums
from scheduler.estimation.output_lengths import Answers
from scheduler.model.workload import Lengths

Floats = NDArray[np.float64]
CLASSES = 10
"""Classes of prompts, 1, 4, 16, … tokens at most (`scheduler.estimation.traffic_monitor.length_classes`)."""
_PARTS = 4
"""Buckets of prompts in each class."""
PROMPT_BUCKETS = _PARTS * (CLASSES - 1) + 1
_EXACT, _LONGEST = 12, 2**18
EDGES = np.concatenate([
    np.arange(_EXACT), np.round(np.geomspace(_EXACT, _LONGEST, BUCKETS - _EXACT + 1))
]).astype(np.int64)[: BUCKETS + 1]
"""Bucket k holds the output lengths above EDGES[k] up to EDGES[k + 1]: single lengths up to 12, then a fifth apart."""


def output_bucket(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bucket of each output length >= 1; the last one takes everything longer."""
    found: NDArray[np.int64] = np.searchsorted(EDGES, tokens, side="left") - 1
    return np.minimum(found, BUCKETS - 1)


def prompt_bucket(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bucket of each prompt length >= 1, a factor of √2 wide; the class is a fourth of it, rounded up."""
    found = np.ceil(2 * np.log2(np.maximum(tokens, 1)) - 1e-9).astype(np.int64)
    return np.asarray(np.minimum(found, PROMPT_BUCKETS - 1), dtype=np.int64)


def class_of(prompt_buckets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of the class of prompts."""
    return -(-prompt_buckets // _PARTS)


@dataclass(frozen=True, slots=True)
class LengthCounts:
    """Sums over observed outputs; `+` and `*` are those of the arrays.

    ended, at_risk: by class of prompt and bucket, (CLASSES, BUCKETS). tokens, running: by bucket. prompts,
    prompt_tokens: by bucket of the prompt. See `LengthSums`.
    """

    ended: Floats
    at_risk: Floats
    tokens: Floats
    running: Floats
    prompts: Floats
    prompt_tokens: Floats

    @classmethod
    def nothing(cls) -> LengthCounts:
        """No output was observed."""
        table, row, prompts = np.zeros((CLASSES, BUCKETS)), np.zeros(BUCKETS), np.zeros(PROMPT_BUCKETS)
        return cls(table, table, row, row, prompts, prompts)

    @classmethod
    def of(cls, answers: Answers) -> LengthCounts:
        """The counts of these outputs."""
        if not len(answers.output_tokens):
            return cls.nothing()
        parts = prompt_bucket(answers.prompt_tokens)
        group, at = class_of(parts), output_bucket(answers.output_tokens)
        begun = np.where(answers.entry > 0, output_bucket(np.maximum(answers.entry, 1).astype(np.int64)), -1)
        ended = answers.ended
        halves = np.zeros((CLASSES, BUCKETS + 2))
        # Whole from the first bucket after the entry until the one that it ends or goes on in, halves at the edges.
        np.add.at(halves, (group, begun + 1), 1.0)
        np.add.at(halves, (group, at + 1), -1.0)
        whole = np.cumsum(halves, axis=1)[:, :BUCKETS]
        late = (begun >= 0) & (begun < at)
        np.add.at(whole, (group[late], begun[late]), 0.5)
        both = begun == at
        np.add.at(whole, (group[both], at[both]), np.where(ended[both], 1.0, 0.5))
        goes_on = ~ended & ~both
        np.add.at(whole, (group[goes_on], at[goes_on]), -0.5)
        table = np.zeros((CLASSES, BUCKETS))
        np.add.at(table, (group[ended], at[ended]), 1.0)
        return cls(
            table, whole, tokens=_sums(at[ended], BUCKETS, answers.output_tokens[ended]),
            running=_sums(at[~ended], BUCKETS), prompts=_sums(parts, PROMPT_BUCKETS),
            prompt_tokens=_sums(parts, PROMPT_BUCKETS, answers.prompt_tokens),
        )

    @classmethod
    def read(cls, sums: LengthSums) -> LengthCounts:
        """From a message.

        Raises:
            ValueError: rows that are too long, or values that no counts can have.
        """
        groups = class_of(prompt_bucket(np.array(sums.classes, dtype=np.int64)))
        table, whole = np.zeros((CLASSES, BUCKETS)), np.zeros((CLASSES, BUCKETS))
        for group, ended, at_risk in zip(groups.tolist(), sums.ended, sums.at_risk, strict=True):
            table[group, : len(ended)] = ended
            whole[group, : len(at_risk)] = at_risk
        flat = (_padded(sums.tokens, BUCKETS), _padded(sums.running, BUCKETS))
        prompts = (_padded(sums.prompts, PROMPT_BUCKETS), _padded(sums.prompt_tokens, PROMPT_BUCKETS))
        for values in (table, whole, *flat, *prompts):
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError("the counts of lengths hold values that are negative or not finite")
        return cls(table, whole, *flat, *prompts)

    def written(self) -> LengthSums:
        """For a message."""
        seen = np.flatnonzero(self.at_risk.any(axis=1) | self.ended.any(axis=1))
        return LengthSums(
            classes=tuple(4**group for group in seen.tolist()),
            ended=tuple(tuple(map(int, _short(self.ended[group]))) for group in seen),
            at_risk=tuple(tuple(_short(np.round(self.at_risk[group], 1))) for group in seen),
            tokens=tuple(map(int, _short(self.tokens))), running=tuple(map(int, _short(self.running))),
            prompts=tuple(map(int, _short(self.prompts))), prompt_tokens=tuple(map(int, _short(self.prompt_tokens))),
        )

    def plus(self, other: LengthCounts, weight: float = 1.0) -> LengthCounts:
        """These counts and others, which count `weight` times."""
        return LengthCounts(
            self.ended + weight * other.ended, self.at_risk + weight * other.at_risk,
            self.tokens + weight * other.tokens, self.running + weight * other.running,
            self.prompts + weight * other.prompts, self.prompt_tokens + weight * other.prompt_tokens,
        )

    def times(self, weight: float) -> LengthCounts:
        """These counts, each `weight` times."""
        return LengthCounts.nothing().plus(self, weight)

    @property
    def samples(self) -> float:
        """Outputs that ended."""
        return float(self.ended.sum())

    def hazards(self) -> Floats:
        """Of the outputs of any class that reach a bucket, the share that ends in it."""
        ended = self.ended.sum(axis=0)
        at_risk = np.maximum(self.at_risk.sum(axis=0), ended)
        return np.asarray(np.divide(ended, at_risk, out=np.zeros(BUCKETS), where=at_risk > 0))

    def lengths(self, shares: Floats | None = None, longest: int = _LONGEST) -> Lengths:
        """The joint lengths (prompt, output), as `scheduler.estimation.output_lengths.product_limit` has them.

        Within a class of prompts, prompt and output are independent. shares: of the arrivals by class; a class without
        an ended output gets the output lengths of all others. longest: no output is longer. Raises ValueError when no
        output has ended.
        """
        total = self.ended.sum(axis=0)
        if not total.any():
            raise ValueError("no output has ended; at least one is needed")
        hazards = self.hazards()
        surviving = np.concatenate([[1.0], np.cumprod(1.0 - hazards)])
        mass = -np.diff(surviving)
        by_class = np.divide(self.ended, total, out=np.zeros_like(self.ended), where=total > 0) * mass
        beyond = self.running.copy()
        beyond[: int(np.flatnonzero(total)[-1]) + 1] = 0.0
        if surviving[-1] > 0 and beyond.any():  # the running ones beyond all ended: twice their output so far
            longer = output_bucket(np.minimum(EDGES[:-1] + EDGES[1:], _LONGEST))
            late = np.bincount(longer, surviving[-1] * beyond / beyond.sum(), BUCKETS)
            by_class += np.outer(self.ended.sum(axis=1) / total.sum(), late)
        means = np.divide(self.tokens, total, out=EDGES[1:].astype(np.float64), where=total > 0)
        at_edges = _on_edges(by_class, means)
        return _joint(at_edges, np.minimum(EDGES, longest), self.prompts, self.prompt_tokens, shares)


def _on_edges(mass: Floats, means: Floats) -> Floats:
    """The mass of each bucket split between its two edges so that its mean stays: the lengths of two estimates then
    differ by their masses alone. Length 1 is the lowest edge there is."""
    low, high = np.maximum(EDGES[:-1], 1), EDGES[1:]
    upper = np.where(high > low, (np.clip(means, low, high) - low) / np.maximum(high - low, 1), 1.0)
    split = np.zeros((len(mass), BUCKETS + 1))
    split[:, 1:] += mass * upper
    split[:, :-1] += mass * (1 - upper)
    split[:, 1] += split[:, 0]  # a bucket above 0 holds lengths from 1 on
    split[:, 0] = 0.0
    return split


def _joint(by_class: Floats, outputs: Floats, prompts: Floats, prompt_tokens: Floats, shares: Floats | None) -> Lengths:
    of_class, groups = by_class.sum(axis=1), class_of(np.arange(PROMPT_BUCKETS))
    shares = of_class if shares is None or not shares.any() else shares
    everything = by_class.sum(axis=0)
    pairs_prompt, pairs_output, weights = [], [], []
    for group in np.flatnonzero(shares).tolist():
        own = by_class[group] if of_class[group] > 0 else everything
        inside = np.flatnonzero((groups == group) & (prompts > 0))
        lengths = prompt_tokens[inside] / prompts[inside] if inside.size else np.array([4.0**group])
        likely = prompts[inside] / prompts[inside].sum() if inside.size else np.ones(1)
        at = np.flatnonzero(own)
        weight = shares[group] / shares.sum() * np.outer(likely, own[at] / own[at].sum())
        pairs_prompt.append(np.repeat(lengths, at.size))
        pairs_output.append(np.tile(outputs[at], lengths.size))
        weights.append(weight.ravel())
    return Lengths(
        np.maximum(1, np.round(np.concatenate(pairs_prompt))).astype(np.int64),
        np.maximum(1, np.round(np.concatenate(pairs_output))).astype(np.int64), np.concatenate(weights),
    )


def _sums(places: NDArray[np.int64], size: int, values: NDArray[np.int64] | None = None) -> Floats:
    return np.asarray(np.bincount(places, values, size), dtype=np.float64)


def _padded(values: tuple[float, ...], size: int) -> Floats:
    row = np.zeros(size)
    row[: len(values)] = values
    return row


def _short(row: Floats) -> list[float]:
    last = np.flatnonzero(row)
    short: list[float] = row[: last[-1] + 1].tolist() if last.size else []
    return short
