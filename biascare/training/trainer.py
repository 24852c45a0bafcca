"""The loop: fetch, step, and a list of named hooks.

    Trainer(engine, loader, hooks, ...).run()

Model, loader and evaluator arrive as arguments; the loop knows DeepSpeed and nothing of data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from biascare.interfaces import Batch
from biascare.training.engine import GradientGuard, apply_gradients, discard_gradients
from biascare.training.hooks import Hook, StepState
from biascare.training.optimizer import learning_rates
from biascare.training.ranks import gather_objects, local_device, rank, sum_over_ranks, world_size


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; no weight was changed."""


class Trainer:
    """Optimizer steps from `start_step` to `max_steps`."""

    def __init__(
        self,
        engine: Any,
        loader: Iterable[Batch],
        to_device: Callable[[Batch, torch.device], Batch],
        hooks: list[Hook],
        *,
        max_steps: int,
        start_step: int = 0,
        nonfinite: str = "raise",
        max_skipped_steps: int = 10,
    ):
        self.engine = engine
        self.loader = loader
        self.to_device = to_device
        self.hooks = hooks
        self.max_steps = max_steps
        self.start_step = start_step
        self.nonfinite = nonfinite
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = 0
        self.guard = GradientGuard(engine.module)
        self.num_micro = engine.gradient_accumulation_steps()

    def run(self) -> None:
        batches = iter(self.loader)
        for step in range(self.start_step, self.max_steps):
            began = time.perf_counter()
            # All of the step first: Eq. 11 divides by the answer tokens of the whole step.
            micro_batches = [
                self.to_device(next(batches), local_device()) for _ in range(self.num_micro)
            ]
            waited = time.perf_counter() - began
            rates = learning_rates(self.engine)  # before the step moves the schedule on
            self.engine.train()  # an evaluation hook may have left it in eval mode
            outcomes, applied = self.optimizer_step(micro_batches)
            state = StepState(
                step=step + 1,
                micro_batches=micro_batches,
                outcomes=outcomes,
                seconds=time.perf_counter() - began,
                data_seconds=waited,
                learning_rates=rates,
                skipped=not applied,
            )
            for hook in self.hooks:
                hook(state)

    def optimizer_step(self, micro_batches: list[Batch]) -> tuple[list[dict[str, Any]], bool]:
        """Forward and backward of every micro-batch, one update; (outcomes, update was applied)."""
        counts = [len(b.answer_tokens) for b in micro_batches if b.answer_tokens is not None]
        # Over all ranks and accumulation, and still on the device: nothing waits for it.
        num_tokens = sum_over_ranks(torch.tensor(float(sum(counts)), device=local_device()))
        outcomes = []
        for i, batch in enumerate(micro_batches):
            outcome = self.engine(batch, num_tokens, self.num_micro * world_size())
            self.engine.backward(outcome["loss"])
            # Detached: hooks keep it for an interval, and its graph would be kept with it.
            outcomes.append(outcome | {"loss": outcome["loss"].detach()})
            # DeepSpeed counts micro-batches by this call; the last one waits for the verdict below.
            if i + 1 < len(micro_batches):
                self.engine.step()
        applied = self.all_finite(outcomes)
        # All ranks have the same answer, so they update together or not at all.
        if applied:
            apply_gradients(self.engine)
        else:
            discard_gradients(self.engine)
            self.report_nonfinite(micro_batches)
        return outcomes, applied

    def all_finite(self, outcomes: list[dict[str, Any]]) -> bool:
        """The one host synchronisation of a step: losses and gradients of every rank."""
        # Gradients too: a finite loss can have a NaN gradient, and clipping spreads it to all.
        bad = self.guard.take()
        for outcome in outcomes:
            bad = bad + 1 - outcome["loss"].isfinite().float()
        return not sum_over_ranks(bad).item()

    def report_nonfinite(self, micro_batches: list[Batch]) -> None:
        """Say which samples it was; raise on every rank where the policy or the count asks to."""
        self.num_skipped += 1
        # Of all ranks: the sample at fault is on one of them, and nobody knows on which.
        ids = gather_objects([f.image_id for batch in micro_batches for f in batch.facts])
        message = (
            "a loss or gradient is not finite, no weight was changed; samples of this step: "
            f"{', '.join(dict.fromkeys(name for mine in ids for name in mine))}"
        )
        if self.nonfinite == "raise":
            raise NonFiniteError(f"{message}. train.nonfinite=skip passes over such steps")
        # The count is the same everywhere, so every rank raises or none does.
        if self.num_skipped > self.max_skipped_steps:
            raise NonFiniteError(
                f"{message}. train.max_skipped_steps {self.max_skipped_steps} are exceeded"
            )
        if rank() == 0:
            print(f"WARNING {message}", flush=True)
