"""How far an evaluation is, for the person who waits for it.

for held in watched(batches, "answers", num_done=40, num_left=960):
    ...

A bar where standard error is a terminal, else a plain line now and then, as logs of clusters want
it. Rank 0 speaks for all: ranks take equal shares.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from biascare.data.heldout import HeldOutBatch
from biascare.training.ranks import rank, world_size

SECONDS_BETWEEN_LINES = 30.0


def watched(
    batches: Iterable[HeldOutBatch], what: str, num_done: int, num_left: int
) -> Iterator[HeldOutBatch]:
    """The batches, and on standard error how many of all cases are there when each is finished.

    `num_done` cases were on disk before, `num_left` are to be computed by all ranks together.
    """
    if rank() or not num_left:
        yield from batches
        return
    console = Console(stderr=True, soft_wrap=True)
    if num_done:
        console.print(
            f"{what}: {num_done} of {num_done + num_left} were on disk, {num_left} are left",
            highlight=False,
        )
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), _Pace())
    shown = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    # Rich's own clock starts with the first batch too; a file that is no terminal gets lines below.
    with Progress(*shown, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=num_done + num_left, completed=num_done, before=num_done)
        began = told = time.monotonic()
        num_new = 0
        for held in batches:
            yield held
            # Here the batch is on disk. Ranks are in step, so that each has done as much.
            num_new = min(num_left, num_new + world_size() * held.repeated.count(False))
            bar.update(task, completed=num_done + num_new)
            now = time.monotonic()
            if not console.is_terminal and now - told >= SECONDS_BETWEEN_LINES:
                told = now
                line = f"{what}: {num_done + num_new} of {num_done + num_left}"
                pace = pace_of(num_new, num_left, now - began)
                print(f"{line}, {pace}", file=sys.stderr, flush=True)


class _Pace(ProgressColumn):
    def render(self, task: Task) -> Text:
        before = task.fields["before"]
        total, seconds = int(task.total or 0), task.finished_time or task.elapsed or 0.0
        return Text(pace_of(int(task.completed) - before, total - before, seconds))


def pace_of(num_new: int, num_left: int, seconds: float) -> str:
    """Cases per second and the time that is left; what was on disk before says nothing of it."""
    if not num_new or seconds <= 0:
        return "time left unknown"
    rate = num_new / seconds
    # Slow ones are the ones waited for: 0.004 a second is one in four minutes.
    left = timedelta(seconds=round((num_left - num_new) / rate))
    return f"{rate:.3g} a second, {left} left"
