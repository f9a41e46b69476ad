"""From an engine's telemetry to estimates with intervals."""
