"""What a converter could not use, and the limit on how much that may be.

    with Ledger(output / "train.skipped.jsonl", limit=0.01) as ledger:
        for item in items:
            ledger.count()
            ...
            ledger.skip(item["image"], "file missing")

Nothing is left out in silence: every skipped item is one JSON line, and too many of them are an
error, because a converter that loses a tenth of a dataset has met another dataset than it was
written for.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path


class Ledger:
    """Counts items and notes the skipped ones; leaving the block without an exception checks."""

    def __init__(self, path: str | Path, limit: float) -> None:
        """`limit` is a share in [0, 1]. A file of an earlier run is removed; a new one exists only
        when something is skipped."""
        if not 0 <= limit <= 1:
            raise ValueError(f"the limit of skipped items is a share between 0 and 1, got {limit}")
        self.path, self.limit = Path(path), limit
        self.num_items = self.num_skipped = 0
        self.reasons: Counter[str] = Counter()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.check()

    def count(self, num_items: int = 1) -> None:
        """Items looked at, used or not."""
        self.num_items += num_items

    def skip(self, item: str, reason: str) -> None:
        """Note an item that is left out. The line is in the file when this returns."""
        self.num_skipped += 1
        self.reasons[reason] += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"item": item, "reason": reason}, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Raises ValueError when more than `limit` of the counted items were skipped."""
        if self.num_skipped > self.limit * self.num_items:
            common = "; ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common(3))
            raise ValueError(
                f"{self.num_skipped} of {self.num_items} items skipped, more than the limit of "
                f"{self.limit:.2%} ({common}); see {self.path}, repair the source or raise "
                "--max-skipped"
            )
