"""Entry point of ``vllm.general_plugins``, which vLLM calls in each of its processes before a model loads."""

from vllm_hybrid import versions


def register() -> None:
    """Check vLLM's version and register vllm-hybrid with it.

    Raises:
        RuntimeError: this vLLM is missing or untested.

    """
    versions.check()
    from vllm_hybrid import registration

    registration.register()
