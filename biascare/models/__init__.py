"""The dual-path model.

    model = BiasCareVL.from_pretrained("outputs/run/export")

Importing this package alone is free; the class is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biascare.models.biascarevl import BiasCareVL

__all__ = ["BiasCareVL"]


def __getattr__(name: str) -> Any:
    if name == "BiasCareVL":  # torch and transformers take seconds to import
        from biascare.models.biascarevl import BiasCareVL

        return BiasCareVL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
