"""``vllm-hybrid doctor``: what an environment lacks to serve, and how that is closed."""
