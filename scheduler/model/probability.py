"""The share of misses that is accepted where the operator states none."""

ACCEPTED_MISSES = 0.01
"""Probability that memory overflows, or that a served request misses a target."""
