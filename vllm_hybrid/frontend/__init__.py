"""What vLLM's API server loads: the checks of requests, and the counters."""
