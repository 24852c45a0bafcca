"""Fold the adapter into the base model: a plain Hugging Face folder that needs neither peft nor us.

    fold_adapter(model.mllm)
    save_plain(model.mllm, folder, max_shard_size="4GB")
    AutoModelForImageTextToText.from_pretrained(folder)

The folded model costs the disk of the whole base, and its adapter can no longer be taken off.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from biascare.models.language.pathway import MLLMPathway

FOLDED = "(changed since it was opened)"
"""The `path` of a pathway whose weights lie nowhere yet."""


def fold_adapter(pathway: MLLMPathway) -> None:
    """Add the adapter's product to the weights it adapts, in place; the adapter is gone after it.

    Every layer is folded in fp32 and rounded once to its own precision.
    """
    if not isinstance(pathway.model, PeftModel):  # a model without LoRA is its own merged form
        return
    for layer in pathway.model.modules():
        # Layer by layer, because 8.3 billion weights in fp32 would need 33 GB at once.
        if isinstance(layer, BaseTunerLayer):
            dtype = next(layer.get_base_layer().parameters()).dtype
            layer.to(torch.float32)
            layer.merge(safe_merge=True)  # refuses weights that are not finite, before it writes
            layer.to(dtype)
    pathway.model = pathway.model.unload()
    pathway.path = FOLDED  # the old folder holds other weights, and an export must not name it


def save_plain(pathway: MLLMPathway, folder: Path, *, max_shard_size: str) -> None:
    """Write weights (safetensors, sharded above `max_shard_size`) and configuration."""
    pathway.base.save_pretrained(folder, max_shard_size=max_shard_size)
