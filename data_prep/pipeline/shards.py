"""Release -> record folder, shard by shard: workers, jobs of a cluster, interruption, resume.

    parser = argparse.ArgumentParser(...)
    shards.add_arguments(parser)
    args = parser.parse_args()
    shards.run(args, [Release(source="btcv", split="train", items=paths, convert=convert, ...)])

The items of a release are cut into fixed shards. One process converts one shard and writes it
aside; the shard gets its name when it is complete and on disk, and the name carries the fingerprint
of its items, of the converting code and of its options. So a shard is never done twice, a
half-written one never counts, and any number of processes on any number of machines may work on the
same output. Whoever finds all shards complete joins them to `OUTPUT/<source>/<split>`; the result
is the same bytes whoever did what. Trade-off: a crash costs the shards in flight, at most
`--items-per-shard` items per process.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from biascare.durable import claim_name
from biascare.records import (
    FORMAT_VERSION,
    MANIFEST,
    Part,
    PartWriter,
    Record,
    assemble,
    read_part,
    scratch_folder,
)
from biascare.version import __version__
from data_prep.pipeline.fingerprints import (
    changed_options,
    code_fingerprint,
    options_of,
    stable_form,
)
from data_prep.pipeline.ledger import (
    SKIPPED,
    Ledger,
    check_skipped,
    merge_ledgers,
    told_of,
)
from data_prep.pipeline.progress import ShardBar
from data_prep.pipeline.workers import Crew, ShardTask

ITEMS_PER_SHARD = 2000
"""A shard holds at most this many items: at 100 KB per image about one Arrow file of 256 MB."""


class UnusableItemError(Exception):
    """Why one item cannot become a record."""


class SetAsideError(UnusableItemError):
    """Why an item is not meant to become a record: ordinary in such a source (a scout among the
    series of an export), told with its count, and not held against --max-skipped."""


@dataclass(frozen=True)
class Incomplete:
    """A record, and what it has to do without."""

    record: Record
    lost: str = ""
    """Why masks that the release promises could not be used. In the ledger, and against
    --max-skipped like an item without a record: the record trains, but not what it was made for."""

    noted: tuple[str, ...] = ()
    """What is known of the release, or costs no target and no question: told, and not counted."""


Converted = Record | Incomplete


@dataclass(frozen=True, kw_only=True)
class Release:
    """One dataset and one split, ready to convert."""

    source: str  # the records' source; names the folder OUTPUT/<source>/<split>
    split: str
    version: str  # of the raw release
    licence: str
    items: Sequence[Any]
    """Paths, strings, numbers, and tuples, lists, dicts and dataclasses of them, in a stable order:
    picklable, cheap, and the same in every job."""

    convert: Callable[[Any], Converted | Iterable[Converted] | None]
    """Item -> its record, its records (the slices of a volume), or None for an item that the user's
    own options leave out. Raises UnusableItemError with the reason, before the first record. A
    function of a module, or functools.partial of one."""

    name_of: Callable[[Any], str] = str
    """How an item is named in the ledger and in errors."""

    promises_masks: bool = False
    """Whether its images come with masks. Stands in the manifest: the linter misses them there."""

    how_to_learn: str = ""
    """What adds masks or questions, for a user whose records turn out to hold neither."""


class Plan(NamedTuple):
    """A release with its folders and fingerprints."""

    release: Release
    folder: Path  # OUTPUT/<source>/<split>
    shard_folders: list[Path]  # folder of shard k, there once it is complete
    items_per_shard: int
    items_fingerprint: str  # of all items, however they are cut
    code_fingerprint: str
    options: dict[str, str]  # see `options_of`, and what the user says of the release

    @property
    def name(self) -> str:
        return f"{self.release.source}/{self.release.split}"

    def num_items(self, index: int) -> int:
        """Items of one shard."""
        return min(self.items_per_shard, len(self.release.items) - index * self.items_per_shard)

    def shard(self, index: int) -> Release:
        """The release with the items of one shard only."""
        start = index * self.items_per_shard
        return replace(self.release, items=self.release.items[start : start + self.items_per_shard])


def add_arguments(
    parser: argparse.ArgumentParser, *, items_per_shard: int = ITEMS_PER_SHARD
) -> None:
    """Options that every converter shares."""
    group = parser.add_argument_group("output and work")
    group.add_argument(
        "--output", required=True, type=Path, help="gets one folder per dataset: <source>/<split>"
    )
    group.add_argument("--overwrite", action="store_true", help="convert again what is there")
    group.add_argument(
        "--max-skipped",
        type=float,
        default=0.01,
        help="more unusable items than this share are an error; default: %(default)s",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=0,
        help="processes; 0: this one only; default: %(default)s",
    )
    group.add_argument(
        "--job-index",
        type=int,
        default=0,
        help="number of this job, from 0, of --num-jobs; default: %(default)s",
    )
    group.add_argument(
        "--num-jobs",
        type=int,
        default=1,
        help="jobs that share the work on one file system; default: %(default)s",
    )
    group.add_argument(
        "--ray", action="store_true", help="work on the Ray cluster of RAY_ADDRESS, or a local one"
    )
    group.add_argument(
        "--items-per-shard",
        type=int,
        default=items_per_shard,
        help="items that one process converts at a time and a crash costs; the records do not "
        "depend on it; default: %(default)s",
    )


def run(args: argparse.Namespace, releases: Iterable[Release]) -> None:
    """Convert this job's share of every release, and join the releases that are then complete.

    A release that cannot be joined (too many skipped items, repeated ids, no record) does not stop
    the others: one ValueError at the end tells all. An error of the converter itself stops at once.
    What is prepared already is left as it is; interrupted work continues.
    """
    _check(args)
    console = Console()
    problems = []
    given: dict[str, set[str]] = {}
    with Crew(convert_shard, num_workers=args.num_workers, use_ray=args.ray) as crew:
        for release in releases:
            if len(release.items):
                given.setdefault(release.source, set()).add(release.split)
            try:
                _prepare(args, release, crew, console)
            except ReleaseError as error:
                # The others go on: a night of work should not end at the first of a hundred sub-
                # datasets.
                problems.append(f"{release.source}/{release.split}: {error}")
    if args.overwrite:
        for source, splits in given.items():
            _set_dropped_aside(args.output / source, splits, console)
    if problems:
        raise ValueError("\n".join(problems))


class ReleaseError(ValueError):
    """Why one release cannot be prepared; the others go on."""


def plan_release(release: Release, output: Path, items_per_shard: int) -> Plan:
    """Cut a release into shards and name each by its fingerprint."""
    about = [FORMAT_VERSION, __version__, release.source, release.split]
    code = code_fingerprint(release.convert, about)
    said = {"version": release.version, "licence": release.licence}
    # Version and licence too: they stand in the manifest, so that other ones are another folder.
    options = options_of(release.convert) | {key: json.dumps(said[key]) for key in said}
    # Every shard's name carries code and options: after a change of either no older shard is taken.
    seed = f"{code} {stable_form(options)}".encode()
    whole, shard = hashlib.sha256(), hashlib.sha256(seed)
    folder = Path(output).absolute() / release.source / release.split
    shard_folders: list[Path] = []
    for number, item in enumerate(release.items, start=1):
        line = stable_form(item).encode() + b"\n"
        whole.update(line)
        shard.update(line)
        if number % items_per_shard == 0 or number == len(release.items):
            name = f"{len(shard_folders):05d}-{shard.hexdigest()[:16]}"
            shard_folders.append(_shelf(folder) / name)
            # Begun anew: a shard depends on its own items, so that a release that grew keeps the
            # others.
            shard = hashlib.sha256(seed)
    return Plan(release, folder, shard_folders, items_per_shard, whole.hexdigest(), code, options)


def convert_shard(task: ShardTask, advance: Callable[[int], None]) -> None:
    """Convert the items of one shard to `task.folder`, which appears when all is on disk.

    An error of the converter is raised with the name of the item, and leaves nothing behind.
    """
    release: Release = task.release
    # A name of its own for each process, as two jobs may convert the same shard after a crash.
    partial = scratch_folder(task.folder)
    part = PartWriter(partial, source=release.source, split=release.split)
    try:
        ledger = Ledger(partial / SKIPPED)
        num_left_out = 0
        for number, item in enumerate(release.items, start=1):
            num_left_out += not _convert_item(release, item, part, ledger)
            advance(number)
        part.close(
            num_items=len(release.items) - num_left_out,
            num_left_out=num_left_out,
            num_skipped=ledger.num_skipped,
            num_incomplete=ledger.num_incomplete,
            num_noted=ledger.num_noted,
            num_set_aside=ledger.num_set_aside,
        )
        # A twin of another process may have been faster: the same fingerprint, the same bytes.
        with contextlib.suppress(FileExistsError):
            claim_name(partial, task.folder)
    finally:
        part.abandon()
        shutil.rmtree(partial, ignore_errors=True)


def join(plan: Plan, max_skipped: float) -> str:
    """All shards -> the record folder. Returns what to tell the user.

    Raises ReleaseError for too many skipped items, repeated ids and no record at all; the shards
    and the ledger are kept then.
    """
    try:
        parts = [read_part(folder) for folder in plan.shard_folders]
        # Before joining: a folder that exists counts as accepted.
        facts = _check_ledger(plan, parts, len(plan.release.items), max_skipped)
        if not any(part.num_rows for part in parts):
            raise ValueError(f"no record was written{_told(plan)}")
        assemble(
            parts,
            plan.folder,
            source=plan.release.source,
            split=plan.release.split,
            version=plan.release.version,
            licence=plan.release.licence,
            preparation={
                "items": plan.items_fingerprint,
                "code": plan.code_fingerprint,
                "options": plan.options,
                "promises_masks": plan.release.promises_masks,
                **facts,
            },
        )
    except (FileNotFoundError, FileExistsError):  # two processes may find all shards at once
        if not _is_prepared(plan):
            raise
        return "joined by another job"
    except ValueError as error:
        raise ReleaseError(f"{error} (shards are kept in {_shelf(plan.folder)})") from error
    shutil.rmtree(_shelf(plan.folder), ignore_errors=True)
    shutil.rmtree(_previous(plan.folder), ignore_errors=True)
    return _summary(plan, parts, facts)


def _prepare(args: argparse.Namespace, release: Release, crew: Crew, console: Console) -> None:
    # A split of a release may be empty, and is then no folder; the others go on.
    if not len(release.items):
        console.print(f"{release.source}/{release.split}: the release lists no items")
        return
    plan = plan_release(release, args.output, args.items_per_shard)
    if args.overwrite:
        # Shards are forgotten; the older folder is kept until the new one is complete, because a
        # converter may fail on its last item.
        shutil.rmtree(_shelf(plan.folder), ignore_errors=True)
        if plan.folder.exists():
            previous = _previous(plan.folder)
            shutil.rmtree(previous, ignore_errors=True)
            plan.folder.rename(previous)
            told = f"the older folder is {previous} until the new one is complete"
            console.print(f"{plan.name}: {told}")
    if _is_prepared(plan, console):
        # The same command may be given again at any time, and does what is missing.
        console.print(f"{plan.name}: prepared before, left as it is")
        return
    _convert_shards(args, plan, crew, console)
    missing = [folder for folder in plan.shard_folders if not folder.exists()]
    if missing and not _is_prepared(plan):
        console.print(
            f"{plan.name}: {len(missing)} of {len(plan.shard_folders)} shards belong to other jobs "
            "and are not complete yet; the job that completes the last one joins them"
        )
    else:
        # Not wrapped: a path that is broken over two lines cannot be opened.
        told = f"{plan.name}: {join(plan, args.max_skipped)}"
        console.print(told, highlight=False, soft_wrap=True)


def _set_dropped_aside(folder: Path, splits: set[str], console: Console) -> None:
    """Move splits of an earlier preparation that this one does not have out of the way."""
    for manifest in sorted(folder.glob(f"[!.]*/{MANIFEST}")):
        old = manifest.parent
        # What no converter prepared is somebody else's.
        is_ours = "preparation" in json.loads(manifest.read_text(encoding="utf-8"))
        if old.name not in splits and is_ours:
            # Its items are in the new splits now: a test set of yesterday would be trained on.
            shutil.rmtree(_previous(old), ignore_errors=True)
            old.rename(_previous(old))
            ledger_path(old).unlink(missing_ok=True)
            console.print(
                f"{folder.name}/{old.name}: not among the splits any more, it is now "
                f"{_previous(old)}",
                highlight=False,
                soft_wrap=True,
            )


def _convert_shards(args: argparse.Namespace, plan: Plan, crew: Crew, console: Console) -> None:
    """Convert the shards of this job that do not exist yet."""
    # Every n-th and no contiguous part: where large volumes come first, all jobs get some of them.
    mine = range(args.job_index, len(plan.shard_folders), args.num_jobs)
    tasks = (
        ShardTask(plan.shard(k), plan.shard_folders[k])
        for k in mine
        # Asked when the task is taken: another job may have finished this shard, or joined all.
        if not plan.shard_folders[k].exists() and not plan.folder.exists()
    )
    total = sum(plan.num_items(k) for k in mine)
    ahead = sum(plan.num_items(k) for k in mine if not plan.shard_folders[k].exists())
    with ShardBar(plan.name, total, total - ahead, console) as bar:
        # To the end, whatever is skipped: after the first bad shard nobody would know whether the
        # rest is bad too, and the message at the end says how much of what there is.
        for task in crew.completed(tasks, bar.in_flight):
            bar.complete(len(task.release.items))


def _convert_item(release: Release, item: Any, part: PartWriter, ledger: Ledger) -> bool:
    """Whether the item belongs to the release at all (skipped ones do)."""
    before = len(part)
    try:
        records = release.convert(item)
        if records is None:
            return False
        # By item and not by record: the limit is a share of items, and a volume has many slices.
        lost: dict[str, None] = {}
        noted: dict[str, None] = {}
        for one in [records] if isinstance(records, Record | Incomplete) else records:
            part.write(one.record if isinstance(one, Incomplete) else one)
            if isinstance(one, Incomplete):
                lost |= {one.lost: None} if one.lost else {}
                noted |= dict.fromkeys(one.noted)
        if lost:
            ledger.keep(release.name_of(item), "; ".join(lost), counts=True)
        for reason in noted:
            ledger.keep(release.name_of(item), reason, counts=False)
    except UnusableItemError as reason:
        # Half a volume in the records and its name in the ledger would contradict each other.
        assert len(part) == before, f"{release.name_of(item)}: unusable after its first record"
        tell = ledger.set_aside if isinstance(reason, SetAsideError) else ledger.skip
        tell(release.name_of(item), str(reason))
    except (ValueError, OSError) as error:  # a full disk, a file that may not be read
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{release.source}, item {release.name_of(item)}: {error}") from error
    except Exception as error:
        # Not skipped like an unusable item: an error that nobody expected is one of the converter.
        message = f"{release.source}, item {release.name_of(item)}: {type(error).__name__}: {error}"
        raise RuntimeError(message) from error
    return True


def _check_ledger(
    plan: Plan, parts: Sequence[Part], num_items: int, max_skipped: float
) -> dict[str, int]:
    """Write the ledger of the whole release and hold it against the limit; returns the counts."""
    written = ("num_skipped", "num_incomplete", "num_noted", "num_set_aside")
    names = ("num_items", "num_left_out", *written)
    facts = {name: sum(part.notes[name] for part in parts) for name in names}
    path = ledger_path(plan.folder)
    merge_ledgers(
        [part.folder / SKIPPED for part in parts if any(part.notes[name] for name in written)], path
    )
    # What the user left out is no item, or --suspects exclude would widen the limit; so would a
    # hundred reports among ten series.
    num_items -= facts["num_left_out"] + facts["num_set_aside"]
    check_skipped(path, num_items=num_items, limit=max_skipped)
    return facts


def ledger_path(folder: Path) -> Path:
    """Where the skipped items of a record folder stand: beside it."""
    return folder.with_name(f"{folder.name}.skipped.jsonl")


def _summary(plan: Plan, parts: Sequence[Part], facts: Mapping[str, int]) -> str:
    manifest = json.loads((plan.folder / MANIFEST).read_text(encoding="utf-8"))
    text = f"{sum(part.num_rows for part in parts)} records"
    if not (manifest["num_segmentation_units"] or manifest["num_language_units"]):
        hint = f" ({plan.release.how_to_learn})" if plan.release.how_to_learn else ""
        text += f" that hold neither masks nor questions: training cannot use them{hint}"
    if facts["num_left_out"]:
        text += f", {facts['num_left_out']} items left out by the options"
    return text + _told(plan)


def _told(plan: Plan) -> str:
    path = ledger_path(plan.folder)
    return f"{told_of(path)}, see {path}" if path.exists() else ""


def _is_prepared(plan: Plan, console: Console | None = None) -> bool:
    """Raises ReleaseError when the folder holds something else than the plan describes."""
    if not plan.folder.exists():
        return False
    manifest = plan.folder / MANIFEST
    # A folder without a manifest is somebody else's: it is told below and never overwritten.
    text = manifest.read_text(encoding="utf-8") if manifest.is_file() else "{}"
    preparation = json.loads(text).get("preparation", {})
    changed = changed_options(preparation.get("options", {}), plan.options)
    if changed:
        raise ReleaseError(
            f"{plan.folder} was prepared with other options: {'; '.join(changed)}. Give "
            "--overwrite to convert it again, or another --output"
        )
    if preparation.get("items") != plan.items_fingerprint:
        raise ReleaseError(
            f"{plan.folder} exists already and was not prepared from these items; give --overwrite "
            "or another --output"
        )
    # Told, no error: a new comment in the code is no reason to convert for a day.
    if console is not None and preparation.get("code") != plan.code_fingerprint:
        console.print(f"{plan.name}: an earlier converter prepared it; --overwrite does it again")
    return True


def _shelf(folder: Path) -> Path:
    """Where the shards of a record folder wait."""
    return folder.with_name(f".{folder.name}.shards")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot be meant."""
    if not 0 <= args.max_skipped <= 1:
        raise ValueError(f"--max-skipped is a share between 0 and 1, got {args.max_skipped}")
    if not (args.num_jobs >= 1 and 0 <= args.job_index < args.num_jobs):
        raise ValueError(
            f"--job-index counts from 0 to --num-jobs - 1, got {args.job_index} of {args.num_jobs}"
        )
    if args.num_workers < 0 or args.items_per_shard < 1:
        raise ValueError(
            f"--num-workers is at least 0 and --items-per-shard at least 1, got {args.num_workers} "
            f"and {args.items_per_shard}"
        )
    # Each job starts by removing shards, and none knows when the others do.
    if args.overwrite and args.num_jobs > 1:
        raise ValueError(
            "--overwrite with several jobs: each would throw away what the others did; remove the "
            "older folders first"
        )
    if args.ray and args.num_workers:
        raise ValueError("--ray and --num-workers: choose one; Ray uses every CPU of its cluster")
