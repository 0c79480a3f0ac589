"""What a request says beside its API's own parameters: ``vllm_xargs`` in the server, then ``extra_args``."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams


def said_to_engine(params: SamplingParams | None, name: str, default: Any = None) -> Any:
    """The value of an argument among a request's sampling parameters, or ``default``."""
    extra = params.extra_args if params is not None else None
    return (extra or {}).get(name, default)


def said_to_server(request: Any, name: str) -> Any:
    """The value of an argument of one of the server's requests; None where it has none.

    Some kinds of request have no such field, and keep whatever a client sends under that name.
    """
    extra = getattr(request, "vllm_xargs", None)
    return extra.get(name) if isinstance(extra, dict) else None
