"""AdamW's parameter groups and their learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

NO_DECAY = "_no_decay"
"""End of the name of a parameter group without weight decay."""


class OptimizerSettings(NamedTuple):
    """AdamW and its schedule."""

    lr: float
    mllm_lr: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    warmup_steps: int
    final_lr_ratio: float
    max_steps: int


def learning_rate_factor(step: int, settings: OptimizerSettings) -> float:
    """Linear warm-up, then linear decay to `final_lr_ratio` at `max_steps`."""
    if step < settings.warmup_steps:
        # From 1 / warmup_steps: a rate of 0 would spend the first batch on nothing.
        return (step + 1) / settings.warmup_steps
    # A run that is all warm-up has nothing to decay over.
    decay_steps = max(1, settings.max_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / decay_steps)
    return 1 - (1 - settings.final_lr_ratio) * progress


def parameter_groups(
    pathways: Mapping[str, list[nn.Parameter]], settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """AdamW groups: two pathways, each with and without weight decay; frozen parameters left out.

    `pathways`: the parameters of "vision" and "mllm". Norms and biases (everything below two
    dimensions) do not decay.
    """
    # One group per rate, so that the ratio between the pathways stays whatever the schedule does.
    groups = []
    for pathway, lr in (("vision", settings.lr), ("mllm", settings.mllm_lr)):
        mine = [p for p in pathways.get(pathway, []) if p.requires_grad]
        # ZeRO-3 flattens what it partitions and keeps the shape aside.
        dims = [len(getattr(p, "ds_shape", p.shape)) for p in mine]
        for decays in (True, False):
            chosen = [p for p, ndim in zip(mine, dims, strict=True) if (ndim >= 2) == decays]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": lr,
                        "weight_decay": settings.weight_decay if decays else 0.0,
                        "name": pathway if decays else pathway + NO_DECAY,
                    }
                )
    if not groups:
        raise ValueError("nothing is trainable; switch on at least one part of train.trainable")
    return groups


def learning_rates(engine: Any) -> dict[str, float]:
    """Rate of each pathway in the step that comes next."""
    # With and without decay a pathway has one rate; a log of four would say each twice.
    groups = engine.optimizer.param_groups
    return {group["name"].removesuffix(NO_DECAY): group["lr"] for group in groups}
