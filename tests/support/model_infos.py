"""What vLLM finds out about model classes, shared with engines that have a cache folder of their own.

vLLM imports a model's module in another process to look at it, which takes longer than a tiny engine's start,
and keeps what it finds in its cache folder.
"""

from __future__ import annotations

from pathlib import Path


def share_model_infos(*caches: Path) -> None:
    """Give cache folders that are still to be filled this user's infos on models, to read and to write.

    Args:
        caches: values of VLLM_CACHE_ROOT that engines will start with; folders are made.

    """
    from vllm import envs

    infos = Path(envs.VLLM_CACHE_ROOT) / "modelinfos"
    infos.mkdir(parents=True, exist_ok=True)
    for cache in caches:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / infos.name).symlink_to(infos.resolve(), target_is_directory=True)
