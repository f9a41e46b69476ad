"""From estimates and latency targets to the thresholds of one replica."""
