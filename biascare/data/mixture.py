"""Which record is sample number n of the stream.

    mixture = Mixture(segmentation=[(1200, None)], language=[(1793, 3.0), (19654, 1.0)], seed=0)
    item = mixture.locate(10**9)     # StreamItem(task, source, unit, key), in microseconds

The stream is computed, not stored: `locate` is a pure function of (sources, weights, ratio, seed)
and the position, so resuming means continuing at a position, and workers share no state. Tasks and
sources follow fixed, evenly spread schedules instead of dice: a rare source appears at regular
distances and every aligned micro-batch has the same composition on every rank. Only the order
inside a source is pseudo-random, and there each unit occurs exactly once per epoch.

The trade-off: each task keeps one schedule of at most `MAX_BLOCK` slots, 6 bytes a slot.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import operator
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Task = Literal["segmentation", "language"]
Source = tuple[int, "float | None"]

TASKS: tuple[Task, Task] = ("segmentation", "language")
MAX_BLOCK = 2**20
"""Longest schedule; a source with a smaller share than one slot of it is refused."""

_MASK64 = 2**64 - 1
_FEISTEL_ROUNDS = 6


class StreamItem(NamedTuple):
    """One position of the stream."""

    task: Task
    source: int  # index into the sources of the task
    unit: int  # index into the units of the source
    key: int  # 63-bit seed of the sample's own random choices


def sample_key(seed: int, *parts: int | str) -> int:
    """A 63-bit key from integers and strings: the same on every machine, process and version.

    `torch.Generator.manual_seed` and `numpy.random.PCG64` take it as it is.
    """
    # `ascii` of a tuple keeps 1 and "1" apart; `hash` would differ between processes.
    words = (part if isinstance(part, str) else operator.index(part) for part in (seed, *parts))
    digest = hashlib.blake2b(ascii(tuple(words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits fit a signed integer


def permute(index: int, num_items: int, key: int) -> int:
    """Where `index` goes under the pseudo-random permutation of range(num_items) named by `key`.

    A Feistel network over the grid rows x columns just larger than num_items, walked until it
    lands inside the range (Black and Rogaway 2002): a bijection for every size, no memory.
    """
    # Just larger than the range and as square as it goes: the walk is short, and both halves of an
    # index are mixed alike.
    rows = math.isqrt(num_items - 1) + 1
    columns = -(-num_items // rows)
    while True:
        row, column = divmod(index, columns)
        # Of two rounds, 8 of the 24 orders of four units never come; of four they come unevenly.
        for step in range(_FEISTEL_ROUNDS):
            if step % 2:
                column = (column + _mix64(key + (row << 8) + step)) % columns
            else:
                row = (row + _mix64(key + (column << 8) + step)) % rows
        index = row * columns + column
        if index < num_items:
            return index


def _mix64(value: int) -> int:
    """SplitMix64's finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class Mixture:
    """The order of the whole stream.

    Args:
        segmentation, language: sources as (num_units, weight). Weight None means num_units, so
            that every unit of the task is seen equally often; a number is the source's relative
            share. One task uses either form, not both.
        ratio: segmentation : language items of every micro-batch.
        seed: of the order inside the sources and of the samples' keys.

    Raises:
        ValueError: no sources, a task with a ratio but no source or the reverse, an empty source,
            weights that are mixed, not positive, or too far apart (see `MAX_BLOCK`).
    """

    def __init__(
        self,
        segmentation: Sequence[Source],
        language: Sequence[Source],
        ratio: tuple[int, int] = (1, 1),
        *,
        seed: int,
    ) -> None:
        self.seed = seed
        self._sources = (tuple(segmentation), tuple(language))
        self._pattern = _task_pattern(ratio, self._sources)
        self._per_period = (self._pattern.count(0), self._pattern.count(1))
        self._schedules = tuple(
            _Schedule(sources, task) if sources else None
            for sources, task in zip(self._sources, TASKS, strict=True)
        )

    @property
    def period(self) -> int:
        """Positions after which the task pattern repeats."""
        return len(self._pattern)

    def check_micro_batch(self, micro_batch: int) -> None:
        """ValueError unless micro-batches of this size all have the same composition."""
        if micro_batch < 1 or micro_batch % self.period:
            nearest = max(1, round(micro_batch / self.period)) * self.period
            raise ValueError(
                f"train.micro_batch: got {micro_batch}, expected a multiple of {self.period} so "
                f"that every micro-batch holds segmentation and language items as "
                f"{self._per_period[0]}:{self._per_period[1]}; the nearest is {nearest}"
            )

    def locate(self, position: int) -> StreamItem:
        """The item at a position >= 0 of the stream; constant time."""
        if position < 0:
            raise ValueError(f"position: got {position}, expected 0 or more")
        period, slot = divmod(position, self.period)
        task = self._pattern[slot]
        turn = period * self._per_period[task] + self._pattern[:slot].count(task)
        schedule = self._schedules[task]
        assert schedule is not None  # the pattern holds tasks with sources only
        # Counted from the start and not from a state: any worker can be asked for any position.
        source, counter = schedule.locate(turn)
        num_units = self._sources[task][source][0]
        epoch, index = divmod(counter, num_units)
        return StreamItem(
            task=TASKS[task],
            source=source,
            # Another order in every epoch, and one of its own for every source.
            unit=permute(index, num_units, sample_key(self.seed, TASKS[task], source, epoch)),
            # Of the position and not of the unit: an image that returns is augmented anew.
            key=sample_key(self.seed, "sample", position),
        )

    def num_drawn(self, position: int) -> dict[Task, list[int]]:
        """Items of each source before `position`; divided by num_units these are its epochs."""
        period, slot = divmod(position, self.period)
        drawn: dict[Task, list[int]] = {}
        for task, schedule in enumerate(self._schedules):
            turns = period * self._per_period[task] + self._pattern[:slot].count(task)
            drawn[TASKS[task]] = schedule.num_drawn(turns) if schedule else []
        return drawn


class _Schedule:
    """Which source serves turn t of a task, and how often it has served before.

    One block of turns, repeated without end.
    """

    def __init__(self, sources: Sequence[Source], task: Task) -> None:
        shares = _shares(sources, task)
        rarest = min(range(len(shares)), key=lambda source: shares[source])
        # A source without a slot would never be read, and nobody would notice.
        if shares[rarest] * MAX_BLOCK < 1:
            raise ValueError(
                f"data.{task}[{rarest}]: got a share of {float(shares[rarest]):.2e}, expected at "
                f"least {1 / MAX_BLOCK:.2e} (one item in {MAX_BLOCK}); raise its weight, or lower "
                "the others"
            )
        # The shortest block in which all shares are exact, as long as it fits into memory.
        length = min(math.lcm(*(share.denominator for share in shares)), MAX_BLOCK)
        self.counts = apportion(shares, length)
        self._source = _spread(self.counts)
        # Stored, because counting a slot's predecessors would take as long as the block is.
        self._rank = np.empty(len(self._source), np.int32)
        for source, count in enumerate(self.counts):
            self._rank[self._source == source] = np.arange(count, dtype=np.int32)

    def locate(self, turn: int) -> tuple[int, int]:
        """(source, items of that source served before) at a turn."""
        block, slot = divmod(turn, len(self._source))
        source = int(self._source[slot])
        return source, block * self.counts[source] + int(self._rank[slot])

    def num_drawn(self, turns: int) -> list[int]:
        """Items of each source in the first `turns` turns."""
        block, slot = divmod(turns, len(self._source))
        begun = np.bincount(self._source[:slot], minlength=len(self.counts))
        return [block * count + int(b) for count, b in zip(self.counts, begun, strict=True)]


def _task_pattern(ratio: tuple[int, int], sources: tuple[Sequence[Any], ...]) -> tuple[int, ...]:
    """Task index of each slot of a period: both tasks spread evenly, segmentation first."""
    if len(ratio) != 2 or min(ratio) < 0 or max(ratio) < 1:
        raise ValueError(
            f"data.ratio: got {tuple(ratio)}, expected two counts segmentation : language, "
            f"0 or more and not both 0"
        )
    for task, count, given in zip(TASKS, ratio, sources, strict=True):
        # A folder that the ratio never reads is as much a mistake as a ratio that nothing serves.
        if bool(count) != bool(given):
            found = f"{len(given)} folders in data.{task}"
            remedy = (
                f"add a folder to data.{task}" if count else f"remove the folders of data.{task}"
            )
            number = "0" if count else "1 or more"
            raise ValueError(
                f"data.ratio: got {count} {task} items per period and {found}, expected both or "
                f"neither; {remedy}, or set the ratio of {task} to {number}"
            )
    # In lowest terms: the shorter the period, the more sizes of a micro-batch keep it.
    first, second = (count // math.gcd(*ratio) for count in ratio)
    pattern = _interleave(np.zeros(first, np.uint16), np.ones(second, np.uint16))
    return tuple(pattern.tolist())


def _shares(sources: Sequence[Source], task: Task) -> list[Fraction]:
    """Exact share of each source; decimals count as the user typed them (0.3 is 3/10)."""
    weights = []
    for index, (num_units, weight) in enumerate(sources):
        name = f"data.{task}[{index}]"
        if num_units < 1:
            raise ValueError(
                f"{name}: got {num_units} units, expected at least 1; the folder holds nothing "
                f"for this task: remove it or prepare it again"
            )
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"{name}.weight: got {weight}, expected a finite number above 0; "
                f"remove the source to leave it out"
            )
        weights.append(weight)
    unset = [index for index, weight in enumerate(weights) if weight is None]
    if unset and len(unset) < len(weights):
        raise ValueError(
            f"data.{task}: got a weight for some sources and none for {unset}, expected all or "
            f"none; a number of units and a weight are not on one scale: set every weight"
        )
    # By `repr`: the float 0.3 is not 3/10, and its own fraction has the denominator 2^54.
    exact = [Fraction(repr(float(w))) if w is not None else Fraction(n) for n, w in sources]
    return [weight / sum(exact) for weight in exact]


def apportion(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each within one of share * total (largest remainder).

    Equal remainders favour the smaller share, then the earlier source.
    """
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda i: (counts[i] - shares[i] * total, shares[i], i)
    )
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return counts


def _spread(counts: Sequence[int]) -> NDArray[np.uint16]:
    """Source of each slot of a block: the items of a source lie at nearly equal distances.

    The two shortest runs are interleaved, then the two shortest of what is left, as in a Huffman
    code: rounding errors shrink on the way up, so also the rare sources of a long mixture stay
    close to their share everywhere, not only at the end of a block.
    """
    heap = [
        (count, source, np.full(count, source, np.uint16)) for source, count in enumerate(counts)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        # The order breaks ties, so that the schedule is the same on every machine.
        shorter, order, rare = heapq.heappop(heap)
        longer, other, common = heapq.heappop(heap)
        merged = _interleave(common, rare)
        heapq.heappush(heap, (shorter + longer, min(order, other), merged))
    return heap[0][2]


def _interleave(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Both runs in their own order, evenly mixed; integer arithmetic, so equal everywhere."""
    total = len(first) + len(second)
    # How many of the first run are due after each slot, rounded to the nearest.
    taken = np.arange(total + 1, dtype=np.int64)
    taken *= 2 * len(first)  # in place: what a schedule needs while it is made counts as memory
    taken += total
    taken //= 2 * total
    is_first = taken[1:] > taken[:-1]
    mixed = np.empty(total, np.uint16)
    mixed[is_first], mixed[~is_first] = first, second
    return mixed


class GlobalBatchSampler:
    """Positions of one rank's micro-batches, for `DataLoader(batch_sampler=...)`.

    Micro-batch `a` of rank `r` in optimizer step `s` holds `micro_batch` positions from
    ``s * global_batch + (a * world_size + r) * micro_batch``: a step reads the same micro-batches
    whatever the number of ranks, only their owner changes.

    Args:
        global_batch: items per optimizer step over all ranks.
        micro_batch: items per rank and forward.
        rank, world_size: this process among all.
        start_step: first optimizer step, the number of steps already taken.
        num_steps: optimizer steps to yield from there.

    Raises:
        ValueError: global_batch is not a multiple of micro_batch * world_size; bad rank or counts.
    """

    def __init__(
        self,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        start_step: int,
        num_steps: int,
    ) -> None:
        if micro_batch < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"got micro_batch={micro_batch}, rank={rank}, world_size={world_size}, "
                f"expected micro_batch >= 1 and 0 <= rank < world_size"
            )
        if start_step < 0 or num_steps < 0:
            raise ValueError(
                f"got start_step={start_step}, num_steps={num_steps}, expected 0 or more"
            )
        forward = micro_batch * world_size
        if global_batch < 1 or global_batch % forward:
            nearest = max(1, round(global_batch / forward)) * forward
            raise ValueError(
                f"train.global_batch: got {global_batch}, expected a multiple of train.micro_batch "
                f"x ranks = {micro_batch} x {world_size} = {forward}; the nearest is {nearest}"
            )
        # Refused above and not rounded, because the recipe's learning rate belongs to its batch.
        self.accumulation = global_batch // forward
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._rank, self._world_size = rank, world_size
        self._steps = range(start_step, start_step + num_steps)

    def __len__(self) -> int:
        return len(self._steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for turn in range(self.accumulation):
                # Ranks inside turns: with other numbers of ranks a step reads the same positions.
                offset = (turn * self._world_size + self._rank) * self._micro_batch
                start = step * self._global_batch + offset
                yield list(range(start, start + self._micro_batch))
