"""Images that a release keeps in folders or in numbered zip files, found by their file name.

    finder = ImageFinder(source, ("images",), "images_*.zip")
    place = finder.place("images/pmc_1_0.jpg")        # planning, once
    image = read_image(read_place(source, place))     # in any worker

Archives are read as they are: extracting a million files costs hours and an inode each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_prep.formats.archives import SafeArchive, open_member
from data_prep.pipeline.release_files import file_inside
from data_prep.pipeline.shards import UnusableItemError


class Place(NamedTuple):
    """Where an image lies, relative to the source."""

    file: str  # the image itself, or the archive
    member: str  # of the archive; empty for a file of its own


class ImageFinder:
    """Names of all images of a release, listed once. A file wins over an archive's member."""

    def __init__(self, source: Path, folders: Sequence[str], archives: str) -> None:
        """`folders` and `archives`, a pattern, are relative to `source`; "" is `source` itself.

        Raises ValueError when `source` is no folder, has neither folder nor archive, or when an
        archive is damaged.
        """
        if not source.is_dir():
            raise ValueError(f"{source} is not a folder; --source is the folder of the raw release")
        self._places: dict[str, Place] = {}
        # Sorted, so that of two archives with one name the same is taken on every machine.
        packed = sorted(source.glob(archives))
        for path in packed:
            with SafeArchive(path) as archive:
                for member in archive.names():
                    name = PurePosixPath(member).name
                    self._places.setdefault(name, Place(path.name, member))
        found = [folder for folder in folders if (source / folder).is_dir()]
        # The first folder wins, so that it is written last.
        for folder in reversed(found):
            for name in os.listdir(source / folder):
                self._places[name] = Place(f"{folder}/{name}" if folder else name, "")
        if not (packed or found):
            raise ValueError(
                f"{source} has neither {' nor '.join(filter(None, folders))} nor {archives}"
            )

    def place(self, path: str) -> Place | None:
        """Place of an image by the last part of its path; None when it is nowhere."""
        # By the last part alone: what stands before it depends on how a user unpacked the release.
        return self._places.get(PurePosixPath(path.replace("\\", "/")).name)


def read_place(source: Path, place: Place | None) -> bytes:
    """Bytes of an image. Raises UnusableItemError when it is missing or its archive is damaged."""
    if place is None:
        raise UnusableItemError("file missing")
    path = file_inside(source, place.file)
    return open_member(path, place.member) if place.member else path.read_bytes()
