"""Who converts the shards: this process, a few more on this machine, or a Ray cluster.

    with Crew(convert_shard, num_workers=8) as crew:
        for task in crew.completed(tasks, advance=bar.update):
            ...

All three call the same function, `convert(task, advance)`, which writes a shard to disk and returns
nothing: results never travel between processes, so memory stays bounded by the shards in flight.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

Advance = Callable[[int], None]
"""Told by `convert` how many items of its shard are done."""

POLL_SECONDS = 0.2
STOP = -1


class ShardTask(NamedTuple):
    """One shard to convert. Picklable."""

    release: Any  # with the items of this shard only
    folder: Path  # exists once the shard is complete


class InterruptedShardError(Exception):
    """The main process asked its workers to stop."""


Convert = Callable[[ShardTask, Advance], None]


class Crew:
    """Converts shards, one release after another; processes start at the first shard and stay."""

    def __init__(self, convert: Convert, *, num_workers: int = 0, use_ray: bool = False) -> None:
        self._convert, self._num_workers, self._use_ray = convert, num_workers, use_ray
        self._pool: ProcessPoolExecutor | None = None
        # Lock-free on purpose: a worker that is killed while it holds a lock would stop all others.
        self._done = RawArray(ctypes.c_int64, num_workers + 1)  # per worker, then STOP or 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._done[self._num_workers] = STOP
            self._pool.shutdown(wait=True, cancel_futures=True)

    def completed(self, tasks: Iterable[ShardTask], advance: Advance) -> Iterator[ShardTask]:
        """Convert all tasks and yield each when its shard is complete, in any order.

        `advance` hears the number of items done in shards that are not yet complete. An error in a
        worker is raised here; shards in flight are then dropped, complete ones stay.
        """
        if self._use_ray:
            yield from _on_ray(self._convert, tasks)
        elif self._num_workers:
            yield from self._in_processes(tasks, advance)
        else:
            for task in tasks:
                self._convert(task, advance)
                yield task

    def _in_processes(self, tasks: Iterable[ShardTask], advance: Advance) -> Iterator[ShardTask]:
        source = iter(tasks)
        free = list(range(self._num_workers))
        waiting: dict[Future[None], tuple[ShardTask, int]] = {}
        try:
            while True:
                # Only as many tasks as there are workers: each carries the items of its shard.
                while free and (task := next(source, None)) is not None:
                    slot = free.pop()
                    waiting[self._submit(task, slot)] = task, slot
                if not waiting:
                    return
                # With a timeout, so that the bar moves while all shards are in flight.
                finished, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    task, slot = waiting.pop(future)
                    try:
                        future.result()
                    except BrokenProcessPool as error:
                        raise RuntimeError(
                            "a worker process died (out of memory, or killed); complete shards are "
                            "kept: start again, with fewer --num-workers or --items-per-shard if "
                            "memory was short"
                        ) from error
                    # Its items are complete now and counted by the caller, so no longer in flight.
                    self._done[slot] = 0
                    free.append(slot)
                    yield task
                advance(sum(self._done[: self._num_workers]))
        finally:
            # After an error workers give up the shards in flight, and are ready for another
            # release: the next one starts while this pool lives.
            self._done[self._num_workers] = STOP
            wait(waiting)
            for slot in range(self._num_workers + 1):
                self._done[slot] = 0

    def _submit(self, task: ShardTask, slot: int) -> Future[None]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                # Fresh processes: forking one with threads (Arrow has some) can deadlock.
                get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._done,),
            )
        return self._pool.submit(_work, self._convert, task, slot)


_DONE: Any = None  # this worker's view of the shared counters


def _start_worker(done: Any) -> None:
    global _DONE
    _DONE = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides, see STOP
    # A worker whose main process was killed would wait for tasks for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its main process is gone."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        # Not `sys.exit`, which in a thread ends the thread alone.
        os._exit(1)


def _work(convert: Convert, task: ShardTask, slot: int) -> None:
    def advance(num_items: int) -> None:
        # Asked per item, because a future that runs cannot be cancelled.
        if _DONE[len(_DONE) - 1] == STOP:
            raise InterruptedShardError
        _DONE[slot] = num_items

    convert(task, advance)


def _on_ray(convert: Convert, tasks: Iterable[ShardTask]) -> Iterator[ShardTask]:
    ray = _import_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # A shard may be tried again: it appears by a rename, so that half of one never counts.
    remote = ray.remote(max_retries=3)(_ray_work)
    # A few more than CPUs, so that no machine waits for the driver.
    in_flight = 2 + int(ray.cluster_resources().get("CPU", 1))
    waiting: dict[Any, ShardTask] = {}
    for task in tasks:
        waiting[remote.remote(convert, task)] = task
        if len(waiting) >= in_flight:
            yield _next_on_ray(ray, waiting)
    while waiting:
        yield _next_on_ray(ray, waiting)


def _ray_work(convert: Convert, task: ShardTask) -> None:
    # Nobody on the driver hears items of a task that runs on another machine.
    convert(task, lambda num_items: None)


def _next_on_ray(ray: Any, waiting: dict[Any, ShardTask]) -> ShardTask:
    (reference,), _ = ray.wait(list(waiting), num_returns=1)
    task = waiting.pop(reference)
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # The converter's own error, as the other two ways of working raise it.
        raise error.cause or error from None
    return task


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--ray needs Ray, which is not installed: pip install 'biascare[cluster]', or use "
            "--num-workers and --num-jobs"
        ) from error
    return ray
