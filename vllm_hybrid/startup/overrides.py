"""What ``--hf-overrides '{"hybrid": {...}}'`` makes of a checkpoint's ``hybrid`` section.

vLLM puts an override that is an object in the place of the whole section. Here it changes the keys that it
names, as it does in the parts of a configuration that vLLM knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_hybrid.config import check_keys

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# They name levels and have no meaning without them.
CHOOSING_KEYS = ("default_level", "level", "detail")
# What is one for all levels, where a section has no ``levels``.
SETTING_KEYS = ("thresholds", "fastv_ratio")


def merged(stored: Any, override: Any) -> Any:
    """A section with an override applied.

    Args:
        stored: the checkpoint's section; None where it has none.
        override: keys to change, None for a key that is to go; None altogether for no section.

    Returns:
        A new section. It is not validated; :meth:`HybridConfig.parse` does that. ``levels`` are merged level
        by level and key by key, and take the place of thresholds and a ratio for all. Where names of levels
        lose their levels, those that the override does not give go too.

    Raises:
        ValueError: a key of the override is not known, the checkpoint's section is no object, or the override
            gives what each level of the checkpoint has for itself.

    """
    if not isinstance(override, dict):
        return override
    if stored is not None and not isinstance(stored, dict):
        raise ValueError(f"hybrid in config.json is {stored!r}; make it an object, or null")
    section = dict(stored or {})
    check_keys(key for key in override if key not in section)
    if section.get("levels") is not None and "levels" not in override:
        _check_for_all_levels(override)
    if _renames_levels(section, override):
        for key in CHOOSING_KEYS:
            section.pop(key, None)
    if override.get("levels") is not None:
        for key in SETTING_KEYS:
            section.pop(key, None)
    for key, value in override.items():
        if key == "levels" and isinstance(value, dict) and isinstance(section.get(key), dict):
            value = _merged_levels(section[key], value)
        section.pop(key, None)
        if value is not None:
            section[key] = value
    return section


def _check_for_all_levels(override: dict[str, Any]) -> None:
    """Refuse what a section with ``levels`` has for each of them."""
    for key in SETTING_KEYS:
        if key in override:
            raise ValueError(
                f"hybrid.{key} is overridden, but hybrid.levels has one for each level; override "
                f"hybrid.levels.NAME.{key}, or choose a level with hybrid.level"
            )


def _renames_levels(section: dict[str, Any], override: dict[str, Any]) -> bool:
    """Whether an override puts settings in the place of others whose names it does not know."""
    before, after = (levels.get("levels") is not None for levels in (section, section | override))
    if before or after:
        return before != after
    return "thresholds" in override and not isinstance(override["thresholds"], dict)


def _merged_levels(stored: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Levels with an override applied: null takes a level away, or a key of one."""
    levels = dict(stored)
    for name, change in override.items():
        before = levels.get(name)
        if change is None:
            levels.pop(name, None)
            continue
        if isinstance(change, dict) and isinstance(before, dict):
            change = {key: value for key, value in (before | change).items() if value is not None}
        levels[name] = change
    return levels


def differences(stored: Any, section: Any) -> list[str]:
    """What an override changed, as ``key: old -> new``, long values abbreviated.

    Args:
        stored: the checkpoint's section, or None.
        section: what is served, valid.

    """
    before = stored if isinstance(stored, dict) else {}
    if section is None:
        return [f"hybrid: {', '.join(before)} -> null"] if before else []
    keys = [*before, *(key for key in section if key not in before)]
    return [
        f"{key}: {_change(before.get(key), section.get(key))}"
        for key in keys
        if before.get(key) != section.get(key)
    ]


def apply(model_config: ModelConfig) -> None:
    """Give vLLM's configuration of a model the merged section, in the place of the override alone.

    What is merged is read from the checkpoint again, so that a second call changes nothing. A callable
    override has seen the checkpoint's section, and what it left stands.

    Raises:
        ValueError: see :func:`merged`.

    """
    overrides = model_config.hf_overrides
    if isinstance(overrides, dict) and "hybrid" in overrides:
        model_config.hf_config.hybrid = merged(stored_section(model_config), overrides["hybrid"])


def applied(model_config: ModelConfig) -> list[str]:
    """What the overrides of a model changed of its section, see :func:`differences`."""
    overrides = model_config.hf_overrides
    if not callable(overrides) and "hybrid" not in overrides:
        return []
    return differences(stored_section(model_config), getattr(model_config.hf_config, "hybrid", None))


def stored_section(model_config: ModelConfig) -> Any:
    """The section as it is in the checkpoint's ``config.json``, found as vLLM finds it; None without one."""
    from huggingface_hub import constants
    from transformers import PretrainedConfig

    # vLLM asks for the revision of whatever has the configuration, which need not have the weights.
    config, _ = PretrainedConfig.get_config_dict(
        model_config.hf_config_path or model_config.model,
        revision=model_config._hf_config_revision or model_config.revision,
        token=model_config.hf_token,
        local_files_only=constants.HF_HUB_OFFLINE,
    )
    return config.get("hybrid")


def _change(old: Any, new: Any) -> str:
    before, after = _short(old), _short(new)
    return f"{before} -> {after}" if before != after else f"{before} -> others"


def _short(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):
        return ", ".join(f"{detail} is {name}" for detail, name in value.items()) or "nothing"
    if isinstance(value, dict):
        return f"levels {', '.join(map(str, value))}"
    if isinstance(value, (list, tuple)):
        numbers = [t for t in value if t is not None]
        spread = f", {min(numbers):.3g} to {max(numbers):.3g}" if numbers else ""
        return f"{len(value)} values{spread}"
    return str(value)
