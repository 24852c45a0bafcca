"""What a person sees while shards are converted."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class ShardBar:
    """Progress over the items of this job's shards, with rate and time left."""

    def __init__(self, name: str, total: int, done: int, console: Console) -> None:
        self._done = done
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(name, total=total, completed=self._done)

    def __enter__(self) -> ShardBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def in_flight(self, num_items: int) -> None:
        """Items done in shards that are not complete."""
        self._progress.update(self._task, completed=self._done + num_items)

    def complete(self, num_items: int) -> None:
        """One more shard of so many items is complete."""
        self._done += num_items
        self.in_flight(0)


class _RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        # Items, because a user plans by them: shards differ in length and volumes in slices.
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.1f} items/s")
