"""What became of every tensor of a checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from biascare.models.weights.files import listed


class Dropped(NamedTuple):
    """Tensors of a file that have no use here."""

    number: int
    reason: str


class LoadReport(NamedTuple):
    """What became of every tensor of a checkpoint; printed for the user."""

    layout: str
    matched: int  # tensors loaded
    converted: dict[str, str]  # our key -> what was done, e.g. "float16 -> float32"
    missing: list[str]  # our keys the file lacks and may lack: they keep their initial values
    unexpected: list[str]  # keys of the file without a place here; empty after a successful load
    dropped: dict[str, Dropped]  # prefix in the file -> what was left out on purpose

    def __str__(self) -> str:
        """Lines for the terminal; equal conversions are counted, not repeated."""
        lines = [f"{self.layout}: {self.matched} tensors loaded"]
        lines += [f"  {n} x {what}" for what, n in Counter(self.converted.values()).items()]
        lines += [f"  left out {n} x {prefix}: {why}" for prefix, (n, why) in self.dropped.items()]
        if self.missing:
            lines.append(f"  initial values kept for {listed(self.missing)}")
        if self.unexpected:
            lines.append(f"  not used: {listed(self.unexpected)}")
        return "\n".join(lines)
