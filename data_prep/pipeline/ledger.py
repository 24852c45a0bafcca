"""What a converter could not use, and the limit on how much that may be.

    ledger = Ledger(shard / SKIPPED)
    for item in items:
        ledger.count()
        ...
        ledger.skip(item["image"], "file missing")
    merge_ledgers([shard / SKIPPED, ...], output / "train.skipped.jsonl")
    check_skipped(output / "train.skipped.jsonl", num_items=100, limit=0.01)

Nothing is left out in silence: every skipped item is one JSON line, and too many of them are an
error, because a converter that loses a tenth of a dataset has met another dataset than it was
written for. A line says whether the item has a record all the same (its masks are lost and not its
questions), and whether it counts: what a release is known to hold is told and no error.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from biascare.durable import put_in_place, write_text

SKIPPED = "skipped.jsonl"
NUM_REASONS = 20
"""How many are quoted; the file holds them all."""

KINDS = {
    (False, True): "skipped",
    (True, True): "without their masks",
    (False, False): "set aside",
    (True, False): "noted",
}
"""(has a record, counts against the limit) -> what is said of such a line."""


class Ledger:
    """Counts items and notes what is lost, one JSON line {item, reason, record, counts} each."""

    def __init__(self, path: str | Path) -> None:
        """A file of an earlier run is removed; a new one exists only when something is skipped."""
        self.path = Path(path)
        self.num_items = self.num_skipped = self.num_incomplete = self.num_noted = 0
        self.num_set_aside = 0
        self.path.unlink(missing_ok=True)

    def count(self, num_items: int = 1) -> None:
        """Items looked at, used or not."""
        self.num_items += num_items

    def skip(self, item: str, reason: str) -> None:
        """Note an item that is left out. The line is in the file when this returns."""
        self.num_skipped += 1
        self._write(item, reason, record=False, counts=True)

    def set_aside(self, item: str, reason: str) -> None:
        """Note an item that was not meant to become a record."""
        self.num_set_aside += 1
        self._write(item, reason, record=False, counts=False)

    def keep(self, item: str, reason: str, *, counts: bool) -> None:
        """Note what an item's record has to do without. `counts`: against the limit."""
        self.num_incomplete += counts
        self.num_noted += not counts
        self._write(item, reason, record=True, counts=counts)

    def _write(self, item: str, reason: str, **facts: bool) -> None:
        line = json.dumps({"item": item, "reason": reason, **facts}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            # Opened for each line: they are few, and the line is there when the process dies next.
            file.write(line + "\n")


def merge_ledgers(ledgers: Iterable[Path], path: Path) -> None:
    """Write the lines of all ledgers, in their order, to `path`, at once. Without any, `path` is
    removed: an older ledger does not speak for a clean run. Raises FileNotFoundError when one is
    gone."""
    lines = "".join(ledger.read_text(encoding="utf-8") for ledger in ledgers)
    if not lines:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # several jobs may join at once
    write_text(new, lines)
    put_in_place(new, path)


def check_skipped(path: Path, *, num_items: int, limit: float) -> None:
    """Raises ValueError when the ledger at `path` holds more that counts than `limit` (a share in
    [0, 1]) of `num_items`, with the commonest reasons."""
    if not 0 <= limit <= 1:
        raise ValueError(f"--max-skipped is a share between 0 and 1, got {limit}")
    found = _lines(path)
    lines = [line for line in found if line["counts"]]
    # A share and no number: one bad file in ten is a misunderstanding, one in a million is a bad
    # file.
    if len(lines) <= limit * num_items:
        return
    num_kept = sum(line["record"] for line in lines)
    kept = f", {num_kept} of them with a record that lacks its masks" if num_kept else ""
    raise ValueError(
        f"{len(lines)} of {num_items} items skipped{kept}, more than the limit of {limit:.2%} "
        f"({_common(lines)}){_told([line for line in found if not line['counts']])}; see {path}. "
        "Raise --max-skipped to accept that, or repair the source and convert again with "
        "--overwrite"
    )


def told_of(path: Path) -> str:
    """What a ledger holds, with the commonest reasons and their counts, for a person: ", 3 skipped
    (3 x file missing), 2 set aside (...)"."""
    return _told(_lines(path))


def _told(lines: list[dict[str, Any]]) -> str:
    kinds = {word: [line for line in lines if (line["record"], line["counts"]) == facts]
             for facts, word in KINDS.items()}  # fmt: skip
    return "".join(
        f", {len(kind)} {word} ({_common(kind)})" for word, kind in kinds.items() if kind
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _common(lines: list[dict[str, Any]]) -> str:
    # The commonest reasons say what is wrong with the source; the single items stand in the file.
    reasons = Counter(line["reason"] for line in lines).most_common(NUM_REASONS)
    common = "; ".join(f"{n} x {reason}" for reason, n in reasons)
    num_others = len(lines) - sum(n for _, n in reasons)
    if num_others:
        common += f"; and {num_others} other{'s' if num_others > 1 else ''}"
    return common
