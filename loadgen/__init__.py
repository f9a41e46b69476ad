"""`headrace bench`: an open-loop client that measures a running OpenAI-style server as the simulator measures a run."""
