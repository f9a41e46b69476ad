"""vLLM's real scheduler in virtual time. Imports downwards: run, engine, config, scenario, output, workload."""
