"""What was done with which image by which model, in a file that shows whether it was altered.

    with AuditLog(path) as log:
        log.append({"event": "prompt", ...})
    entries = verify(path)                    # raises, naming the line that was altered
    replayed = replay(path, model, images)    # the same clicks give the same masks

One line of JSON per event. Each carries the sha256 of the line before and of its own content, so an
altered, missing or exchanged line is found. Lines cut off at the end are found by whoever noted the
`head`, the sha256 of the last line, which the program prints when it ends. Cases are known by id
and images by sha256: no path, no name of a file, no field of a DICOM header, and of a question,
which may name a patient, only its sha256.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biascare.inference.model import BiasCareVL
from biascare.inference.session import Segmentation, Session
from biascare.records import encode_mask

START = "0" * 64
"""What the first line has in place of the sha256 of a line before."""


class AuditLog:
    """Appends to one file. Safe among threads; one process at a time."""

    def __init__(self, path: Path):
        """Raises ValueError where another process writes to it, or it was altered."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = list(_lines(path))
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"{path}: another process is writing this audit log; give each its own"
            ) from error
        except ValueError:
            self._file.close()
            raise
        self.head = sha256_of(lines[-1]) if lines else START
        self._number = len(lines)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an event, with its number and the time. A decision is on the disk when this returns;
        the clicks before it are then, too."""
        with self._lock:
            content = {
                "number": self._number + 1,
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                **entry,
                "previous": self.head,
            }
            line = _written(content | {"sha256": sha256_of(_written(content))})
            self._file.write(line + "\n")
            self._file.flush()
            # Waiting for the disk at every click would be felt.
            if entry["event"] == "decision":
                os.fsync(self._file.fileno())
            self.head, self._number = sha256_of(line), self._number + 1

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def verify(path: Path, *, head: str | None = None) -> list[dict[str, Any]]:
    """The entries of a log that nobody altered. `head`: the sha256 of its last line, where it was
    noted; without it lines cut off at the end are not missed.

    Raises ValueError, naming the first line that is not as it was written.
    """
    lines = list(_lines(path))
    if head is not None and head != (found := sha256_of(lines[-1]) if lines else START):
        raise ValueError(
            f"{path}: its last line, {len(lines)}, has sha256 {found}, expected {head}; lines were "
            "cut off or added at the end"
        )
    return [json.loads(line) for line in lines]


def _lines(path: Path) -> Iterator[str]:
    """The lines of a sound log, without their ends. Raises ValueError, see `verify`."""
    previous = START
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        where = f"{path}, line {number}"
        if not line.endswith("\n"):
            raise ValueError(
                f"{where} is not complete: the program was killed while it wrote; keep this file "
                "and begin another log"
            )
        line = line.removesuffix("\n")
        try:
            entry = json.loads(line)
            said = entry.pop("sha256")
            is_own = said == sha256_of(_written(entry)) and entry["number"] == number
            follows = entry["previous"] == previous
        except (ValueError, KeyError, TypeError, AttributeError):
            is_own = follows = False
        if not is_own:
            raise ValueError(f"{where} was altered: its content is not what its sha256 was made of")
        if not follows:
            raise ValueError(
                f"{where} does not follow the line before: that was altered together with its "
                "sha256, or lines were removed or exchanged"
            )
        yield line
        previous = sha256_of(line)


class Replayed(NamedTuple):
    """What a log gave when it was done again."""

    num_masks: int
    differences: list[str]  # sentences; empty where every mask is the same bit for bit


def replay(
    path: Path, model: BiasCareVL, images: Mapping[str, bytes], *, checkpoint: str | None = None
) -> Replayed:
    """Do again what a log tells, and compare every mask.

    Args:
        images: the encoded files by their sha256.
        checkpoint: sha256 of the model's files, compared with what the log says where given.

    Raises ValueError for an altered log, and for an image or a model that is not the log's.
    """
    sessions: dict[str, Session] = {}
    differences, num_masks = [], 0
    for entry in verify(path):
        key, where = entry["session"], f"line {entry['number']}"
        if entry["event"] == "open":
            if checkpoint not in (None, entry["checkpoint_sha256"]):
                raise ValueError(
                    f"{path}, {where}: got a model with sha256 {checkpoint}, expected "
                    f"{entry['checkpoint_sha256']}"
                )
            if entry["image_sha256"] not in images:
                raise ValueError(
                    f"{path}, {where}: the image of case {entry['case']!r} with sha256 "
                    f"{entry['image_sha256']} is not among the {len(images)} given"
                )
            sessions[key] = model.session(
                images[entry["image_sha256"]], entry["target"], modality=entry["modality"]
            )
        elif entry["event"] == "prompt":
            sessions[key].apply(entry["prompt"])
        else:
            continue
        found = mask_sha256(sessions[key].current)
        num_masks += found is not None
        if found != entry["after"]:
            differences.append(
                f"{where}, case {entry['case']!r}: the mask has sha256 {found}, expected "
                f"{entry['after']}"
            )
    return Replayed(num_masks, differences)


def mask_sha256(segmentation: Segmentation | None) -> str | None:
    """sha256 of height, width and COCO run-length code of a mask, None where there is none."""
    return None if segmentation is None else sha256_of_mask(segmentation.mask)


def sha256_of_mask(mask: NDArray[np.bool_]) -> str:
    height, width = mask.shape
    return hashlib.sha256(f"{height} {width}\n".encode() + encode_mask(mask)).hexdigest()


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _written(entry: Mapping[str, Any]) -> str:
    # JSON has no NaN: an uncertainty that is one is a bug, and must not be written as something.
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
