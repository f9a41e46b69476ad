"""What stands in for the cluster under plain `vllm serve`: the engine's own controller process, and the middleware."""
