"""Serves LLaVA-1.5 in vLLM with image tokens merged in the vision tower and pruned in the language model."""

__version__ = "0.1.0"
