"""Entry point of ``vllm.platform_plugins``, the first that vLLM calls: here it is told of no platform.

Where a library that vLLM needs cannot be imported, vLLM ends before it looks for its other plugins.
"""

from vllm_hybrid.environment.last_words import say_last_words


def no_platform() -> None:
    """Have a process that ends for want of a library say so in one sentence; it brings no platform."""
    say_last_words()
