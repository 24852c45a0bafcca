"""biascare: bias-aware training of a multimodal medical foundation model (BiasCareVL).

    from biascare import BiasCareVL

    model = BiasCareVL.from_pretrained("outputs/demo/stage2/export")

Importing the package loads nothing heavy; the class is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biascare.version import __version__

if TYPE_CHECKING:
    from biascare.inference.model import BiasCareVL

__all__ = ["BiasCareVL", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "BiasCareVL":  # torch and transformers take seconds to import
        from biascare.inference.model import BiasCareVL

        return BiasCareVL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
