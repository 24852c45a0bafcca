"""Archives from strangers: what breaks a rule is refused before it is read; nothing is written."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.formats.archives import LIMITS, SafeArchive, open_member
from data_prep.pipeline.shards import UnusableItemError

FILES = {"images/b.png": b"bbb", "images/a.png": b"a" * 70, "notes.json": b"{}"}


def make_zip(path: Path, files: dict[str, bytes] = FILES, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def make_tar(path: Path, files: dict[str, bytes] = FILES, **changes: Any) -> Path:
    packing = path.suffix.removeprefix(".")
    with tarfile.open(path, "w" if packing == "tar" else f"w:{packing}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz"])
def test_members_are_read_in_order_and_by_name_from_every_kind(tmp_path: Path, name: str) -> None:
    path = (make_zip if name == "x.zip" else make_tar)(tmp_path / name)
    with SafeArchive(path) as archive:
        assert archive.names() == list(FILES)
        assert dict(archive.members()) == FILES
        assert [name for name, _ in archive.members((".png",))] == ["images/b.png", "images/a.png"]
        assert "images/a.png" in archive and "images" not in archive
    assert open_member(path, "images/a.png") == b"a" * 70
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing was extracted


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.png", "a/../../x.png", "C:\\x.png", "..\\x.png", "\\\\host\\x"]
)
def test_a_name_that_leaves_the_archive_refuses_all_of_it(
    tmp_path: Path, make: Any, name: str
) -> None:
    path = make(tmp_path / "x.tar", {"good.png": b"1", name: b"2"})
    with pytest.raises(ValueError, match="no path inside the archive"):
        SafeArchive(path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_of_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = make_tar(tmp_path / "x.tar", {"a": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="'a' is a link, device or sparse file"):
        SafeArchive(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_of_a_zip_are_refused(tmp_path: Path, kind: int) -> None:
    with pytest.raises(ValueError, match=r"'notes\.json' is a link or device|'images/b\.png' is a"):
        SafeArchive(make_zip(tmp_path / "x.zip", mode=kind))


def test_a_folder_entry_and_a_leading_dot_are_ordinary(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_bytes(b"1")
        archive.add(tmp_path / "in", arcname=".")
    with SafeArchive(path) as archive:
        assert archive.names() == ["./a.png"]


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a.png", b"1")
        archive.writestr("a.png", b"2")
    with pytest.raises(ValueError, match=r"'a\.png' occurs twice"):
        SafeArchive(tmp_path / "x.zip")


def test_counts_and_bytes_have_caps(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip")
    for limits in (LIMITS._replace(num_members=2), LIMITS._replace(total_bytes=74)):
        with pytest.raises(ValueError, match="refused: more than"):
            SafeArchive(path, limits)
    SafeArchive(path, LIMITS._replace(num_members=3, total_bytes=75)).close()
    with SafeArchive(path, LIMITS._replace(member_bytes=69)) as archive:
        assert archive.read("images/b.png") == b"bbb"
        with pytest.raises(UnusableItemError, match="too large"):
            archive.read("images/a.png")


def test_a_bomb_is_refused_by_its_ratio_before_it_unpacks(tmp_path: Path) -> None:
    zeros = {"bomb.png": bytes(4 * 2**20)}
    with SafeArchive(make_zip(tmp_path / "x.zip", zeros)) as archive:
        with pytest.raises(UnusableItemError, match="packed size"):
            archive.read("bomb.png")
    with pytest.raises(ValueError, match="unpacks to more than 200 times"):
        SafeArchive(make_tar(tmp_path / "x.tar.gz", zeros))
    small = {"mask.png": bytes(2**19)}  # a blank mask packs as well, and is harmless
    with SafeArchive(make_zip(tmp_path / "y.zip", small)) as archive:
        assert len(archive.read("mask.png")) == 2**19


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_a_cut_archive_is_an_error_and_never_a_shorter_one(tmp_path: Path, name: str) -> None:
    files = {f"{k}.bin": bytes(range(256)) * 40 for k in range(4)}
    path = (make_zip if name == "x.zip" else make_tar)(tmp_path / name, files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((ValueError, UnusableItemError)):
        with SafeArchive(path) as archive:
            assert len(dict(archive.members())) == 4


def test_a_damaged_member_is_unusable_and_its_neighbours_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.bin", b"A" * 50)
        archive.writestr("b.bin", b"B" * 50)
    path.write_bytes(path.read_bytes().replace(b"A" * 50, b"A" * 49 + b"x"))
    with SafeArchive(path) as damaged:
        with pytest.raises(UnusableItemError, match="unreadable"):
            damaged.read("a.bin")
        assert damaged.read("b.bin") == b"B" * 50
        with pytest.raises(UnusableItemError, match="missing"):
            damaged.read("c.bin")


def test_an_archive_that_is_none_says_so_and_a_missing_one_is_an_unusable_item(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.zip").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="not a readable zip or tar"):
        open_member(tmp_path / "x.zip", "a")
    with pytest.raises(UnusableItemError, match="archive missing"):
        open_member(tmp_path / "gone.zip", "a")


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a": b"old"})
    assert open_member(path, "a") == b"old"
    make_zip(path, {"a": b"newer"})
    assert open_member(path, "a") == b"newer"
