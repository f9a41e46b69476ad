"""HTTP: OpenAI endpoints, control endpoints, API keys, and the choice of a replica."""
