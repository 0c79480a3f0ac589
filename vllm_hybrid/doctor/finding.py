"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        part: what was looked at, such as "torchvision".
        found: what is there, such as a version.
        gap: what is wrong with it; empty where nothing is.
        remedy: what to do about the gap, where the gap does not say it.
        stand_in: the folder of :mod:`vllm_hybrid.doctor.stand_in` that closes the gap, if one does.

    """

    part: str
    found: str
    gap: str = ""
    remedy: str = ""
    stand_in: str | None = None

    @property
    def line(self) -> str:
        """The finding in one line."""
        if not self.gap:
            return f"ok   {self.part}: {self.found}"
        found = f"{self.found}; " if self.found else ""
        remedy = "vllm-hybrid doctor --fix" if self.stand_in else self.remedy
        return f"gap  {self.part}: {found}{self.gap}{f': {remedy}' if remedy else ''}"
