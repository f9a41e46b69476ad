"""The theory, the policies, and vLLM's scheduler under them. No Ray in here; the theory needs no vLLM either."""
