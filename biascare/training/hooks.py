"""What happens after every optimizer step: progress, ledger, checkpoints, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from biascare.durable import replace_text
from biascare.interfaces import Batch
from biascare.training.checkpoint import CheckpointStore
from biascare.training.progress import (
    GroupMeter,
    RunLog,
    complete_lines,
    peak_memory_gib,
    progress_line,
)
from biascare.training.ranks import (
    from_rank_zero,
    gather_objects,
    local_device,
    rank,
    world_size,
)


class StepState(NamedTuple):
    """What hooks get to see after an optimizer step."""

    step: int  # optimizer steps done
    micro_batches: list[Batch]
    outcomes: list[dict[str, Any]]  # of `TrainStep`, one per micro-batch
    seconds: float  # of the whole step
    data_seconds: float  # of it, waiting for the loader
    learning_rates: dict[str, float]  # of this step, by pathway
    skipped: bool  # non-finite: no weight changed


class Hook(Protocol):
    """Called after every optimizer step, on every rank."""

    def __call__(self, state: StepState) -> None: ...


class BadDataError(RuntimeError):
    """More samples were unreadable than the run allows."""


LEDGER_HORIZON = 1000
"""The share of bad samples is judged as if at least so many had been seen: one early bad sample is
not a high share yet."""


class LogHook:
    """Progress line and metrics every `every` steps; the first step too, to show life.

    `summed`: the terms of rows are sums over a micro-batch, as `objective.reduction` has it.
    """

    def __init__(self, log: RunLog, engine: Any, every: int, max_steps: int, *, summed: bool):
        self.log = log
        self.engine = engine
        self.every = every
        self.max_steps = max_steps
        self.summed = summed
        self.meter = GroupMeter()
        self.reset()

    def reset(self) -> None:
        self.terms: list[dict[str, Tensor]] = []  # per micro-batch
        self.seconds = self.data_seconds = 0.0
        self.num_steps = self.num_skipped = self.samples = self.positions = 0
        self.tokens = torch.zeros((), device=local_device())  # of the positions, not padding

    def __call__(self, state: StepState) -> None:
        self.num_steps += 1
        self.num_skipped += state.skipped
        self.seconds += state.seconds
        self.data_seconds += state.data_seconds
        for batch, outcome in zip(state.micro_batches, state.outcomes, strict=True):
            self.samples += len(batch.facts)
            if batch.mllm_inputs:
                mask = batch.mllm_inputs["attention_mask"]
                self.positions += mask.numel()
                self.tokens += mask.sum()
            if state.skipped:  # its NaN would hide the steps around it
                continue
            # Tensors of the device: read here, each would make every step wait for it.
            self.terms.append({"total": outcome["loss"]} | outcome["terms"])
            if outcome["rows"] is not None:
                self.meter.add(outcome["rows"], batch.facts)
        if state.step % self.every and state.step not in (1, self.max_steps):
            return
        values = self.summarise(state)
        # With an answer: where rank 0 meets a full disk, all ranks end with its message.
        from_rank_zero(lambda: self.log.record("train", state.step, values))
        self.log.say(progress_line(state.step, self.max_steps, values, summed=self.summed))
        self.reset()

    def summarise(self, state: StepState) -> dict[str, Any]:
        """Collective. Throughput of the interval is over all ranks; what it waited for, its padding
        and its memory are of rank 0."""
        sums: dict[str, float] = {}
        for terms in self.terms:
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        num_micro_batches, totals = 0, dict[str, float]()
        for num, mine in gather_objects((len(self.terms), sums)):
            num_micro_batches += num
            for name, total in mine.items():
                totals[name] = totals.get(name, 0.0) + total
        # Every rank draws the same mix of samples, so rank 0 stands for the padding of all.
        tokens, samples = float(self.tokens), self.samples * world_size()
        by = self.meter.take()
        num_rows = sum(cell["num"] for cell in by["modality"].values())
        return {
            # A micro-batch without a term adds 0 to it, as it does to the objective.
            "loss": {name: total / num_micro_batches for name, total in totals.items()},
            "rows_per_micro_batch": num_rows / max(1, len(self.terms) * world_size()),
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),  # None before a step
            "lr": state.learning_rates,
            "skipped_steps": self.num_skipped,
            "samples_per_second": samples / self.seconds,
            "tokens_per_second": tokens * world_size() / self.seconds,
            "data_wait": self.data_seconds / self.seconds,
            "pad_share": (self.positions - tokens) / max(1, self.positions),
            "peak_memory_gib": peak_memory_gib(),
            "eta_seconds": self.seconds / self.num_steps * (self.max_steps - state.step),
            "by": by,
        }


class LedgerHook:
    """Samples that had to be replaced: written down, and too many of them end the run.

    A run that goes on after `start_step` continues the ledger: its steps come again, so what stands
    there of them goes, and what stands there of the steps before counts.
    """

    def __init__(self, folder: Path, max_share: float, start_step: int, samples_per_step: int):
        """`samples_per_step`: of this rank."""
        # A file per rank: lines of several writers in one file would run into each other.
        self.path = folder / f"replaced_samples.rank{rank()}.jsonl"
        self.max_share = max_share
        self.seen, self.replaced = start_step * samples_per_step, 0
        if self.path.exists():
            kept = [e for e in complete_lines(self.path) if e["step"] <= start_step]
            self.replaced = len(kept)
            replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def __call__(self, state: StepState) -> None:
        for batch in state.micro_batches:
            self.seen += batch.num_samples
            self.replaced += len(batch.replaced)
            if batch.replaced:
                self.write(state.step, batch.replaced)

    def write(self, step: int, bad: dict[int, tuple[str, ...]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for position, reasons in bad.items():
                line = {"step": step, "position": position, "reasons": reasons}
                file.write(json.dumps(line) + "\n")
        # Not through the log, which is silent on all ranks but 0: the bad disk may be another's.
        print(f"WARNING {len(bad)} unreadable samples replaced, see {self.path}", flush=True)
        if self.replaced > self.max_share * max(self.seen, LEDGER_HORIZON):
            raise BadDataError(
                f"{self.replaced} of {self.seen} samples could not be read, more than "
                f"data.max_bad_samples {self.max_share:.2%}; see {self.path}"
            )


class CheckpointHook:
    """Save every `every` steps and at the end."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Any,
        every: int,
        max_steps: int,
        fingerprint: dict[str, Any],
        notes: dict[str, Any],
    ):
        self.store = store
        self.engine = engine
        self.every = every
        self.max_steps = max_steps
        self.fingerprint = fingerprint
        self.notes = notes

    def __call__(self, state: StepState) -> None:
        # At the end whatever `every` says: a finished run can be exported and continued.
        due = self.every and state.step % self.every == 0
        if due or state.step == self.max_steps:
            self.store.save(self.engine, state.step, self.fingerprint, self.notes)


class EvalHook:
    """Run `evaluate(step)` every `every` steps and at the end."""

    def __init__(self, evaluate: Callable[[int], Any], every: int, max_steps: int):
        self.evaluate = evaluate
        self.every = every
        self.max_steps = max_steps

    def __call__(self, state: StepState) -> None:
        # At the end whatever `every` says: the card of the export states these numbers.
        due = self.every and state.step % self.every == 0
        if due or state.step == self.max_steps:
            self.evaluate(state.step)
