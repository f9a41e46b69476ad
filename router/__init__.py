"""The way in: OpenAI endpoints, control endpoints, and the choice of a replica."""
