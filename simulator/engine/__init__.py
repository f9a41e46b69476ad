"""Virtual replicas: vLLM's scheduler stepped by hand on a clock that a time model moves, and their controller."""
