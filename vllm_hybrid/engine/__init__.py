"""What vLLM's engine loads: the scheduler and the workers."""
