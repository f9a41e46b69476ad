"""What prompts are made of, so that vLLM's prefix cache finds what they share.

A prompt is a sequence of pieces of text, each with a number, and every token of a piece has that number as its id. So
two prompts have the same tokens as far as they have the same pieces, and differ from the first other piece on; vLLM's
block hashes chain, so that is all that decides what is cached. A scheduler never looks at a vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Some tokens of text; equal numbers (>= 0) are the same text, as far as both go."""

    number: int
    tokens: int


Pieces = tuple[Piece, ...]


def prompt_token_ids(pieces: Pieces | None, prompt_tokens: int, request_number: int) -> list[int]:
    """The prompt of the request of that number; without pieces it shares nothing with any other."""
    if pieces is None:
        return [-2 * request_number - 2] * prompt_tokens  # below 0, which no piece is
    ids: list[int] = []
    for piece in pieces:
        ids += [piece.number] * piece.tokens
    return ids


def answer_token_id(answer: int | None, request_number: int) -> int:
    """Every token of the answer: the number of the piece that it becomes in later prompts, else one that is its own."""
    return -2 * request_number - 3 if answer is None else answer
