"""Triton kernels of virtual unmerging attention and the lists they read; no vLLM in here."""
