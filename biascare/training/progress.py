"""What a person sees of a run, and what stays on disk of it.

One progress line per logging interval, one table per evaluation, metrics.jsonl with everything, and
TensorBoard. Bias groups are a first-class axis: loss, uncertainty and weight are kept per modality
and per prevalence group. Rank 0 speaks for all.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from biascare.durable import replace_text
from biascare.interfaces import Facts
from biascare.training.ranks import gather_objects, rank
from biascare.training.terms import RowOutcome

AXES = ("modality", "prevalence")
"""Facts that training statistics are kept by."""

ROW_VALUES = ("dice_loss", "semantic", "weight")


class GroupMeter:
    """Mean loss, semantic uncertainty and weight of segmentation rows, per modality and group.

    Rows stay on the device until they are asked for: no host synchronisation per step.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, list[Facts]]] = []

    def add(self, rows: RowOutcome, facts: list[Facts]) -> None:
        # fp32 holds the flag exactly, and one tensor is one copy to the host later.
        columns = [rows.valid, *(getattr(rows, name) for name in ROW_VALUES)]
        values = torch.stack([column.detach().float() for column in columns], 1)
        # Facts of language rows follow those of segmentation rows and have no value here.
        self.pending.append((values, facts[: len(values)]))

    def take(self) -> dict[str, dict[str, dict[str, float]]]:
        """{axis: {group: {"num", "dice_loss", "semantic", "weight"}}} over the valid rows of all
        ranks; then empty."""
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
        for values, facts in self.pending:
            for (valid, *row), about in zip(values.cpu().tolist(), facts, strict=True):
                if not valid:  # an empty mask has no loss to speak of
                    continue
                for axis in AXES:
                    total = sums[axis, str(getattr(about, axis))]
                    for i, value in enumerate([1.0, *row]):
                        total[i] += value
        self.pending = []
        # Sums travel, not means: ranks see a rare group a different number of times.
        everywhere: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
        for mine in gather_objects(dict(sums)):
            for key, theirs in mine.items():
                everywhere[key] = [a + b for a, b in zip(everywhere[key], theirs, strict=True)]
        merged: dict[str, dict[str, dict[str, float]]] = {axis: {} for axis in AXES}
        for (axis, group), (num, *totals) in sorted(everywhere.items()):
            means = {name: total / num for name, total in zip(ROW_VALUES, totals, strict=True)}
            merged[axis][group] = {"num": num} | means
        return merged


def complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a file of JSON lines, without one that a crash cut short."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def keep_events(folder: Path, stays: Callable[[str, int], bool]) -> None:
    """Drop from TensorBoard's files what `stays(event, step)` refuses."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    # Not by a writer's `purge_step`: it holds for what comes after it in the order of file names,
    # and those are of seconds and process numbers.
    for path in sorted(folder.glob("events.out.tfevents.*")):
        partial = folder / "partial"  # TensorBoard reads every name that holds "tfevents"
        with partial.open("wb") as file:
            writer, num_kept = RecordWriter(file), 0
            for record in RawEventFileLoader(str(path)).Load():  # as far as a crash left it whole
                event = Event.FromString(record)
                tags = [value.tag for value in event.summary.value]
                if all(stays(tag.partition("/")[0], event.step) for tag in tags):
                    writer.write(record)
                    num_kept += bool(tags)
        if num_kept:
            partial.replace(path)
        else:
            path.unlink()
            partial.unlink()


class RunLog:
    """metrics.jsonl, TensorBoard and the terminal of one run; silent on all ranks but 0."""

    def __init__(self, folder: Path):
        self.speaks = rank() == 0
        self.console = Console(quiet=not self.speaks, soft_wrap=True)
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.writer: Any = None

    def open(
        self,
        start_step: int,
        *,
        tensorboard: bool,
        evaluates_again: bool = False,
        branches: bool = False,
    ) -> None:
        """Start writing after `start_step`. A resumed run repeats the steps after its checkpoint;
        what was logged of them is dropped. Where they were another run's, because this one starts
        afresh or `branches` off, a copy of the whole log is kept aside.

        `evaluates_again`: the evaluation of `start_step` itself is repeated too.
        """
        if not self.speaks:
            return
        self.folder.mkdir(parents=True, exist_ok=True)

        def stays(event: str, step: int) -> bool:
            # Steps after the checkpoint come again; kept, they would stand there twice.
            again = evaluates_again and event == "eval" and step == start_step
            return bool(start_step) and step <= start_step and not again

        events = self.folder / "tensorboard"
        if self.path.exists():
            if branches or not start_step:
                self._copy_aside(events)
            lines = [e for e in complete_lines(self.path) if stays(e["event"], e["step"])]
            # As a whole: a crash in the middle must not cost the history before the checkpoint.
            if lines:
                replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in lines))
            else:
                self.path.unlink()
        if tensorboard:
            # Here, because it takes seconds to import and can be switched off.
            from torch.utils.tensorboard import SummaryWriter

            keep_events(events, stays)
            self.writer = SummaryWriter(str(events))

    def holds(self, event: str, step: int) -> bool:
        """Whether the file has a line of this event."""
        entries = complete_lines(self.path) if self.path.exists() else ()
        return any((entry["event"], entry["step"]) == (event, step) for entry in entries)

    def _copy_aside(self, events: Path) -> None:
        """Keep log, ledgers of replaced samples and event files of another run."""
        number = len(list(self.folder.glob("metrics.before-*.jsonl"))) + 1
        for path in (*self.folder.glob("replaced_samples.rank*.jsonl"), events, self.path):
            if path.exists() and ".before-" not in path.name:
                aside = path.with_name(f"{path.stem}.before-{number}{path.suffix}")
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, aside)

    def record(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl and every number in it to TensorBoard."""
        if not self.speaks:
            return
        # Opened each time: whoever follows the file, or a crash, finds every line that was said.
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step} | dict(values)) + "\n")
        if self.writer is not None:
            for name, value in flatten(values):
                self.writer.add_scalar(f"{event}/{name}", value, step)
            self.writer.flush()

    def say(self, message: Any) -> None:
        self.console.print(message, highlight=False)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Numbers of a nested mapping with slash-joined names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def peak_memory_gib() -> float:
    """Of this process: device memory on a GPU, resident memory on CPU."""
    # What tensors held, not what the allocator reserved: that depends on what else ran before.
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def progress_line(step: int, max_steps: int, values: Mapping[str, Any], *, summed: bool) -> str:
    """One line: where the run is, its loss terms, its speed and what it waits for."""
    terms = " ".join(f"{name} {value:.3f}" for name, value in values["loss"].items())
    cells = values["by"]["modality"].values()
    # A term that is a sum grows with the rows of a micro-batch, so the mean of a row stands beside
    # it: only that can be compared between runs.
    if num_rows := sum(cell["num"] for cell in cells):
        dice = sum(cell["num"] * cell["dice_loss"] for cell in cells) / num_rows
        sums = f"sums over {values['rows_per_micro_batch']:.1f} rows, " if summed else ""
        terms += f" ({sums}Dice loss {dice:.3f} a row)"
    skipped = f" | {values['skipped_steps']} skipped" if values["skipped_steps"] else ""
    rates = " ".join(f"{name} {lr:.1e}" for name, lr in values["lr"].items())
    eta = timedelta(seconds=round(values["eta_seconds"]))
    return (
        f"step {step}/{max_steps} | {terms} | grad {values['grad_norm']:.2f} | lr {rates} | "
        f"{values['samples_per_second']:.1f} samples/s {values['tokens_per_second']:.0f} tok/s | "
        f"data-wait {values['data_wait']:.0%} pad {values['pad_share']:.0%} | "
        f"{values['peak_memory_gib']:.1f} GiB | ETA {eta}{skipped}"
    )


def trainable_table(parts: Mapping[str, tuple[int, int, float]]) -> Table:
    """`parts`: name -> (parameters, trainable parameters, learning rate)."""
    table = Table(title="Parameters")
    for column in ("part", "parameters", "trainable", "learning rate"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, (total, trainable, lr) in parts.items():
        table.add_row(name, f"{total:,}", f"{trainable:,}", f"{lr:.1e}" if trainable else "frozen")
    everything, trained = (sum(values[i] for values in parts.values()) for i in (0, 1))
    table.add_section()
    table.add_row("all", f"{int(everything):,}", f"{int(trained):,}", "")
    return table
