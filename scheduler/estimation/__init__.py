"""From an engine's telemetry to estimates with intervals: rates, lengths, iteration time, tokens a step."""
