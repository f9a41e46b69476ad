"""vLLM's real scheduler in virtual time: workloads, the event loop, results, and the theory's own model."""
