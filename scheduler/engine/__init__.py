"""The parts of the scheduler that live in the engine-core process, around vLLM's own."""
