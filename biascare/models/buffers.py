"""Buffers that stay in fp32 when the model around them is cast to bf16."""

from __future__ import annotations

from typing import Any

from torch import nn


class Fp32Buffers:
    """Mixed into modules whose floating-point buffers, and those below them, keep their precision.

    Such buffers are positions or statistics, not activations. They still move between devices.
    """

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        # Taken before the cast, because what bf16 has rounded cannot be brought back.
        before = dict(self.named_buffers())
        nn.Module._apply(self, fn, recurse)
        for name, moved in list(self.named_buffers()):
            if moved.is_floating_point():  # no cast touches the others
                lost = before[name].is_meta or moved.is_meta  # there are no values to keep
                kept = moved.float() if lost else before[name].to(moved.device)
                owner, _, leaf = name.rpartition(".")
                # By its owner: a buffer of a module below would otherwise become an attribute here.
                setattr(self.get_submodule(owner), leaf, kept)
        return self
