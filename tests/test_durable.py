"""What has a name is whole: the pieces that checkpoints, exports and records are put in place with.

`tests/training/test_checkpoint.py` kills a process at every change of the disk.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from biascare.durable import (
    claim_name,
    flush_tree,
    put_in_place,
    replace_text,
    write_json,
)


def folder_of(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    final = folder_of(tmp_path / "final", "old")
    put_in_place(folder_of(tmp_path / "new", "new"), final)
    assert (final / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_a_crash_left_aside_goes_when_a_whole_folder_has_the_name(tmp_path: Path) -> None:
    for final in (tmp_path / "there", tmp_path / "gone"):
        folder_of(tmp_path / f"{final.name}.replaced", "older")
        if final.name == "there":
            folder_of(final, "old")
        put_in_place(folder_of(tmp_path / "new", "new"), final)
        assert (final / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "there"]


def test_a_folder_that_cannot_take_the_name_leaves_the_old_one_aside(tmp_path: Path) -> None:
    final, new = folder_of(tmp_path / "final", "old"), folder_of(tmp_path / "new", "new")
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    with mock.patch.object(Path, "rename", rename), pytest.raises(OSError, match="Input/output"):
        put_in_place(new, final)
    assert (tmp_path / "final.replaced" / "file").read_text() == "old"
    put_in_place(new, final)
    assert (final / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_name_that_is_taken_is_never_taken_again(tmp_path: Path) -> None:
    final, new = folder_of(tmp_path / "final", "old"), folder_of(tmp_path / "new", "new")
    with pytest.raises(FileExistsError, match="final exists already"):
        claim_name(new, final)
    assert (final / "file").read_text() == "old" and new.is_dir()


def test_a_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    replace_text(path, "one\n")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("os.fsync", side_effect=full), pytest.raises(OSError, match="No space left"):
        replace_text(path, "two\n")
    assert path.read_text() == "one\n"
    replace_text(path, "three\n")
    assert path.read_text() == "three\n" and [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_every_file_and_folder_of_a_tree_is_flushed(tmp_path: Path) -> None:
    inner = folder_of(tmp_path / "inner", "x")
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    with mock.patch("os.fsync", fsync):
        flush_tree(tmp_path)
    assert sorted(flushed) == sorted(map(str, (tmp_path, inner, inner / "file")))


def test_json_without_an_equal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
