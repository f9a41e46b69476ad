"""vLLM's scheduler in virtual time: replicas, the policies to compare, and the controller."""
