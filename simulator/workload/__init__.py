"""What arrives: when, with which lengths and prompts, and what clients do that are rejected."""
