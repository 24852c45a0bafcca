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
written for.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from biascare.durable import put_in_place, write_text

SKIPPED = "skipped.jsonl"


class Ledger:
    """Counts items and notes the skipped ones, one JSON line {item, reason} each."""

    def __init__(self, path: str | Path) -> None:
        """A file of an earlier run is removed; a new one exists only when something is skipped."""
        self.path = Path(path)
        self.num_items = self.num_skipped = 0
        self.path.unlink(missing_ok=True)

    def count(self, num_items: int = 1) -> None:
        """Items looked at, used or not."""
        self.num_items += num_items

    def skip(self, item: str, reason: str) -> None:
        """Note an item that is left out. The line is in the file when this returns."""
        self.num_skipped += 1
        with self.path.open("a", encoding="utf-8") as file:
            # Opened for each line: skipped items are few, and the line is there when the process
            # dies next.
            file.write(json.dumps({"item": item, "reason": reason}, ensure_ascii=False) + "\n")


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
    """Raises ValueError when the ledger at `path` holds more than `limit` (a share in [0, 1]) of
    `num_items`, with the commonest reasons."""
    if not 0 <= limit <= 1:
        raise ValueError(f"--max-skipped is a share between 0 and 1, got {limit}")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # A share and no number: one bad file in ten is a misunderstanding, one in a million is a bad
    # file.
    if len(lines) <= limit * num_items:
        return
    # The commonest reasons say what is wrong with the source; the single items stand in the file.
    reasons = Counter(json.loads(line)["reason"] for line in lines).most_common(3)
    common = "; ".join(f"{n} x {reason}" for reason, n in reasons)
    num_others = len(lines) - sum(n for _, n in reasons)
    if num_others:
        common += f"; and {num_others} other{'s' if num_others > 1 else ''}"
    raise ValueError(
        f"{len(lines)} of {num_items} items skipped, more than the limit of {limit:.2%} ({common});"
        f" see {path}. Raise --max-skipped to accept that, or repair the source and convert again "
        "with --overwrite"
    )
