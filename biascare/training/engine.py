"""DeepSpeed engine, parameter groups, learning-rate schedule and ranks.

    init_process_group()
    engine = build_engine(step, groups, ...)

The JSON file holds ZeRO and communication; every "auto" in it is resolved here from the run's own
settings, because DeepSpeed itself does not. Learning rates follow one LambdaLR with one factor for
all groups, so that the ratio between the pathways stays.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from biascare.training.optimizer import OptimizerSettings, learning_rate_factor
from biascare.training.ranks import local_device, rank, world_size

FOREIGN_SECTIONS = {
    "optimizer": "optim in the YAML of the run",
    "scheduler": "optim in the YAML of the run",
    "fp16": "train.precision in the YAML of the run, which knows bf16 and fp32",
}
"""Sections of a DeepSpeed file that this program decides, and where."""


def resolve_deepspeed_config(
    path: str | Path, *, global_batch: int, micro_batch: int, grad_clip: float, precision: str
) -> dict[str, Any]:
    """The JSON file with every "auto" replaced.

    Raises ValueError where a setting stands in the file that belongs to the run's YAML, where an
    "auto" is left that nothing here can resolve, and where the global batch does not divide into
    micro-batches over the ranks.
    """
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    for section, home in FOREIGN_SECTIONS.items():
        if section in config:
            raise ValueError(f'{path}: remove "{section}"; it belongs to {home}')
    # Before any model is loaded: a batch that does not divide is known from three numbers.
    per_forward = micro_batch * world_size()
    if global_batch % per_forward:
        raise ValueError(
            f"train.global_batch {global_batch} is not a multiple of train.micro_batch "
            f"{micro_batch} x {world_size()} ranks; the nearest is "
            f"{max(1, round(global_batch / per_forward)) * per_forward}"
        )
    bf16 = config.setdefault("bf16", {})
    _settle(path, bf16, "bf16.", enabled=precision == "bf16")
    _settle(
        path,
        config,
        "",
        train_batch_size=global_batch,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=global_batch // per_forward,
        gradient_clipping=grad_clip,
    )
    left = list(_auto_keys(config))
    if left:
        raise ValueError(
            f'{path}: "auto" cannot be resolved for {", ".join(left)}; write a value, or leave the '
            "key out for DeepSpeed's default"
        )
    config.setdefault("steps_per_print", 10**9)  # the run has a progress line of its own
    return config


def _settle(path: str | Path, section: dict[str, Any], prefix: str, **values: Any) -> None:
    """Put the run's values where the file says "auto" or nothing."""
    for key, value in values.items():
        # A number in both files would be right in one of them only: an error, not a precedence.
        if section.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f'{path}: "{prefix}{key}" is {section[key]!r}, but the YAML of the run makes it '
                f'{value!r}; write "auto" here and change the YAML'
            )
        section[key] = value


def _auto_keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"


@contextmanager
def fp32_buffers(module: nn.Module) -> Iterator[None]:
    """Restore fp32 buffers that a cast of the whole module rounds to bf16."""
    # Rotary frequencies and SAM's Fourier matrix are positions, not activations: in bf16 they would
    # misplace tokens and clicks.
    kept = {n: b.clone() for n, b in module.named_buffers() if b.dtype == torch.float32}
    yield
    for name, buffer in module.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)


def build_engine(
    step: nn.Module,
    groups: list[dict[str, Any]],
    settings: OptimizerSettings,
    deepspeed_config: dict[str, Any],
) -> Any:
    """The DeepSpeed engine around the training step."""
    optimizer = AdamW(groups, betas=settings.betas)
    # One factor for all groups: DeepSpeed's own schedulers take a scalar and would overwrite the
    # ratio between the pathways.
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    with fp32_buffers(step):
        engine, *_ = deepspeed.initialize(
            model=step, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config
        )
    return engine


def follow_schedule(engine: Any) -> None:
    """Give the next step the rate of this run's schedule: a checkpoint brings that of its own, of
    another number of steps."""
    schedule = engine.lr_scheduler
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, factors, strict=True):
        group["lr"] = base * factor


class GradientGuard:
    """Notices a non-finite gradient on this rank without waiting for the device."""

    def __init__(self, module: nn.Module):
        self.bad = torch.zeros((), device=local_device())
        for parameter in module.parameters():
            if parameter.requires_grad:
                # Hooks see every gradient before ZeRO reduces or partitions it, at every stage.
                parameter.register_hook(self._look)

    def _look(self, grad: Tensor) -> None:
        # The norm is finite only if every entry is; and one that overflows could not be clipped.
        self.bad += 1 - grad.float().norm().isfinite().float()

    def take(self) -> Tensor:
        """Number of bad gradients since the last call, a scalar on the device."""
        # A new tensor: zeroed in place, the caller's count would vanish with it.
        found, self.bad = self.bad, torch.zeros_like(self.bad)
        return found


def apply_gradients(engine: Any) -> None:
    """The engine's update, with the gradient norm on record at every ZeRO stage."""
    if not hasattr(engine.optimizer, "_global_grad_norm"):  # a bare optimizer keeps none
        # fp32: in bf16 a sum of many squares stops growing at its largest ones.
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = torch.stack([grad.float().norm() for grad in grads]).norm()
    engine.step()


def discard_gradients(engine: Any) -> None:
    """Forget the accumulated gradients and count the optimizer step as taken, at any ZeRO stage.

    Weights and optimizer moments stay. Call where `engine.step()` would have updated.
    """
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)
    engine.zero_grad()
    # What DeepSpeed itself does when it meets an overflow; it offers no public call for it.
    if engine.zero_optimization_stage() in (1, 2):
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
    elif engine.zero_optimization_stage() == 3:
        optimizer.averaged_gradients = {}
    with warnings.catch_warnings():
        # torch takes a first step without an update for a mistake.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)`")
        # The schedule moves on all the same: a step's rate depends on its number alone.
        engine.lr_scheduler.step()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.global_samples += engine.train_batch_size()


def can_discard(deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether `discard_gradients` knows where this configuration keeps its gradients."""
    offload = deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {})
    return offload.get("device", "none") == "none"


def gathered_state(
    module: nn.Module, wanted: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True
) -> dict[str, Tensor] | None:
    """CPU state dict on rank 0 (None elsewhere), gathered one parameter at a time.

    `wanted`: parameters to include; a frozen LLM of billions need not pass through host memory.
    """
    state = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not wanted(name, parameter):
            continue
        # One by one: gathered all at once, a model that is partitioned for its size would not fit.
        # Every rank comes here, although one keeps the copy: gathering is collective.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    if rank() != 0:
        return None
    # What a state dict leaves out on purpose (rotary frequencies) stays out of the export too.
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in persistent:
            state[name] = buffer.detach().cpu().clone()
    return {name: value for name, value in state.items() if name in persistent}
