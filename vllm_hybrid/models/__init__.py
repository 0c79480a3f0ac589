"""What vLLM's model registry loads."""
