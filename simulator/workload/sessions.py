"""Conversations: each prompt contains all earlier turns; parsed from a short text."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.model.workload import Lengths
from simulator.workload.prompts import Piece, Pieces

SESSIONS = "sessions"
_USAGE = (
    "sessions:turns=MEAN~geometric or N,system=TOKENS,first=TOKENS~CV,turn=TOKENS~CV,output=TOKENS~CV,think=SECONDS,"
    "token=SECONDS, each of them optional"
)
_TOKENS = re.compile(r"(\d{1,7})(?:~(\d+(?:\.\d+)?))?", re.ASCII)
_TURNS = re.compile(r"([1-9]\d{0,4}(?:\.\d+)?)(~geometric)?", re.ASCII)
_SAMPLED_SESSIONS = 2000
_SYSTEM_PIECE = 0


class TokenCount(NamedTuple):
    """Lognormal of that mean and coefficient of variation, rounded, at least 1; with cv 0 always the mean."""

    mean: int
    cv: float

    def draw(self, rng: np.random.Generator) -> int:
        """One number of tokens; takes one random number whatever the parameters."""
        normal = rng.standard_normal()
        variance = math.log1p(self.cv**2)
        return max(1, round(self.mean * math.exp(math.sqrt(variance) * normal - variance / 2)))


_FIRST, _TURN, _OUTPUT = TokenCount(200, 1.0), TokenCount(120, 1.0), TokenCount(250, 1.0)


class Turn(NamedTuple):
    """One request of a session, `after_s` seconds after its first."""

    after_s: float
    prompt_tokens: int
    output_tokens: int
    pieces: Pieces
    answer: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on a turn's tokens: see `WorkloadConfig`."""

    max_total_tokens: float = math.inf
    max_prompt_tokens: float = math.inf
    min_output_tokens: int = 1


@dataclass(frozen=True)
class SessionSpec:
    """Parameters of conversations; `parse_sessions` makes it.

    turns: how many requests a session has, `geometric` with that mean, else all the same. system: tokens that every
    prompt of every session begins with. first, turn: tokens of the user's first and later messages; output: tokens.
    think_s: mean of the exponential time from an output to the next turn; an output is assumed to end token_s seconds
    per token after its request.
    """

    turns: float = 5.0
    geometric: bool = True
    system: int = 800
    first: TokenCount = _FIRST
    turn: TokenCount = _TURN
    output: TokenCount = _OUTPUT
    think_s: float = 20.0
    token_s: float = 0.03

    def session(self, rng: np.random.Generator, pieces: Iterator[int], limits: Limits) -> list[Turn]:
        """The turns of one session. It ends where the next turn would pass the limits; a turn with an
        output below `min_output_tokens` is skipped."""
        wanted = int(rng.geometric(1 / self.turns)) if self.geometric else round(self.turns)
        history: Pieces = (Piece(_SYSTEM_PIECE, self.system),) if self.system else ()
        tokens, now_s = self.system, 0.0
        turns: list[Turn] = []
        for number in range(wanted):
            said, output_tokens = (self.turn if number else self.first).draw(rng), self.output.draw(rng)
            if output_tokens < limits.min_output_tokens:
                continue
            if tokens + said + output_tokens > limits.max_total_tokens or tokens + said > limits.max_prompt_tokens:
                break
            question, answer = Piece(next(pieces), said), Piece(next(pieces), output_tokens)
            turns.append(Turn(now_s, tokens + said, output_tokens, (*history, question), answer.number))
            history, tokens = (*history, question, answer), tokens + said + output_tokens
            now_s += output_tokens * self.token_s + float(rng.exponential(self.think_s))
        return turns


class SessionSample(NamedTuple):
    """Many sessions in numbers: mean turns of one, seconds from the first turn to the last of the longest, and the
    lengths of their requests."""

    mean_turns: float
    longest_s: float
    lengths: Lengths


def are_sessions(lengths: str) -> bool:
    """Whether a text of lengths describes sessions."""
    return lengths.strip().partition(":")[0] == SESSIONS


def parse_sessions(text: str) -> SessionSpec:
    """The sessions that a text describes, for example

    sessions:turns=5~geometric,system=800,first=200~1,turn=120~1,output=250~1,think=20,token=0.03

    which are the defaults of what is left out. turns=5 are always 5; a number of tokens is fixed, or lognormal with the
    coefficient of variation after ~.

    Raises ValueError naming what is unknown, given twice or out of range.
    """
    _, _, given = text.strip().partition(":")
    values: dict[str, str] = {}
    for part in given.split(",") if given.strip() else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in ("turns", "system", "first", "turn", "output", "think", "token") or key in values:
            raise ValueError(f"lengths {text!r}, at {part.strip()!r}: write {_USAGE}, each once")
        values[key] = value
    changes: dict[str, object] = {}
    for key, value in values.items():
        if key == "turns":
            changes |= _turns(text, value)
        elif key == "system":
            changes["system"] = _token_count(text, key, value, least=0, fixed=True).mean
        elif key in ("think", "token"):
            changes[f"{key}_s"] = _seconds(text, key, value)
        else:
            changes[key] = _token_count(text, key, value)
    return SessionSpec(**changes)  # type: ignore[arg-type]  # by key, as checked above


def sample_sessions(spec: SessionSpec, limits: Limits) -> SessionSample:
    """2 000 sessions, the same ones for every seed. Raises ValueError when not one turn is within the limits."""
    rng, pieces = np.random.default_rng(0), count(1)
    sessions = [spec.session(rng, pieces, limits) for _ in range(_SAMPLED_SESSIONS)]
    pairs = [(turn.prompt_tokens, turn.output_tokens) for turns in sessions for turn in turns]
    if not pairs:
        raise ValueError(
            f"no turn of the sessions is left: max_total_tokens is {limits.max_total_tokens:g}, max_prompt_tokens is "
            f"{limits.max_prompt_tokens:g} and min_output_tokens is {limits.min_output_tokens}"
        )
    longest_s = max(turns[-1].after_s for turns in sessions if turns)
    return SessionSample(len(pairs) / _SAMPLED_SESSIONS, longest_s, Lengths.from_pairs(pairs))


def turns_by_time(
    spec: SessionSpec, limits: Limits, rng: np.random.Generator, starts_s: Iterator[NDArray[np.float64]]
) -> Iterator[tuple[float, Turn]]:
    """The turns at time 0 or later of sessions that start at these times (ascending, in blocks), in the order of time.

    Each comes with its time. Memory holds the sessions that go on.
    """
    pieces, order = count(_SYSTEM_PIECE + 1), count()
    coming: list[tuple[float, int, Turn]] = []
    for block in starts_s:
        for start_s in block.tolist():
            while coming and coming[0][0] <= start_s:
                at_s, _, turn = heapq.heappop(coming)
                yield at_s, turn
            for turn in spec.session(rng, pieces, limits):
                if start_s + turn.after_s >= 0:
                    heapq.heappush(coming, (start_s + turn.after_s, next(order), turn))
    while coming:
        at_s, _, turn = heapq.heappop(coming)
        yield at_s, turn


def _turns(text: str, value: str) -> dict[str, object]:
    found = _TURNS.fullmatch(value)
    mean = float(found[1]) if found else 0.0
    if not found or not (found[2] or mean.is_integer()):
        raise ValueError(f"lengths {text!r}: turns is {value!r}; it must be an integer >= 1, or MEAN~geometric")
    return {"turns": mean, "geometric": bool(found[2])}


def _token_count(text: str, key: str, value: str, least: int = 1, *, fixed: bool = False) -> TokenCount:
    found = _TOKENS.fullmatch(value)
    if not found or int(found[1]) < least or (fixed and found[2]):
        kind = f"an integer >= {least}" + ("" if fixed else ", or MEAN~CV")
        raise ValueError(f"lengths {text!r}: {key} is {value!r}; it must be {kind}")
    return TokenCount(int(found[1]), float(found[2] or 0))


def _seconds(text: str, key: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"lengths {text!r}: {key} is {value!r}; it must be a number of seconds >= 0")
    return seconds
