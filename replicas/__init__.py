"""One replica: a vLLM engine behind Ray Serve, its control channel, and how to call one replica by name."""
