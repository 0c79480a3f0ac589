"""What tables of every stage say: what their figures are of, and a word for what came of a case."""

from __future__ import annotations

from typing import Any


def state(cell: dict[str, Any]) -> str:
    """``agrees``, or what is wrong: a failure and its reason, a missing condition, what differs."""
    if "failed" in cell:
        return f"FAILED: {cell['failed'].replace('|', '/')}"
    if "absent" in cell:
        return f"not run: {cell['absent']}"
    if cell.get("happened") is False:
        return f"DID NOT HAPPEN: {cell['condition']}"
    wrong = [aspect for aspect, right in cell.get("agrees", {}).items() if right is False]
    return f"DISAGREES: {', '.join(wrong)}" if wrong else "agrees"


def head(content: dict[str, Any]) -> str:
    """What a table's figures are of: device, driver, versions, commit, and the last command, in two lines."""
    device = content["device"]
    driver = f", driver {device['driver']}" if "driver" in device else ""
    said = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    commands = content.get("commands") or [{"command": "unknown"}]
    return (
        f"{device['name']}{driver}; {said}; commit {content.get('commit', 'unknown')}\n"
        f"command: `{commands[-1]['command']}`"
    )
