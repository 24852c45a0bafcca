"""Archives from strangers: members are read one by one, within stated limits, or refused.

    data = open_member(Path("images_0.zip"), "images/1.jpg")    # random access, any worker
    with SafeArchive(path) as archive:                          # zip, tar, tar.gz, .bz2, .xz
        for name, data in archive.members((".jpg", ".png")):    # in order, one in memory
            ...

Nothing is extracted, so no member can write anywhere; names are checked all the same, because they
become keys and record ids. An archive that holds one absolute path, "..", link, device, or repeated
name is refused as a whole: it was made by mistake or by malice, and which of the two is not ours to
guess. What is wrong with the archive is a ValueError; what is wrong with one member is an
UnusableItemError, which ends in the ledger.
"""

from __future__ import annotations

import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from types import TracebackType
from typing import IO, NamedTuple

from data_prep.pipeline.shards import UnusableItemError


class Limits(NamedTuple):
    """How much an archive may hold. Beyond it, the archive or the member is refused."""

    num_members: int = 5_000_000
    total_bytes: int = 16 * 2**40  # unpacked
    member_bytes: int = 512 * 2**20  # unpacked, one member
    ratio: int = 200  # unpacked / packed; text reaches 20, images 2, deflate can reach 1032


LIMITS = Limits()
RATIO_FREE_BYTES = 2**20
"""Members up to this size may have any ratio: a blank mask of a few KB packs a thousandfold."""

ZIP_START = b"PK\x03\x04"

NUM_OPEN_ARCHIVES = 4
"""Per process, for `open_member`: the list of 50,000 members is half a second and 30 MB."""

DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError,
    RuntimeError, NotImplementedError,  # an encrypted member, an unknown method
)  # fmt: skip


class Member(NamedTuple):
    """One regular file of an archive."""

    name: str
    size: int  # bytes, as the archive states it
    packed: int  # bytes; -1 where the format does not say
    entry: zipfile.ZipInfo | tarfile.TarInfo


class SafeArchive:
    """A zip or tar file whose members are read one at a time, never extracted."""

    def __init__(self, path: str | Path, limits: Limits = LIMITS) -> None:
        """Reads the list of members. Raises ValueError when it breaks a rule or a limit."""
        self.path, self.limits = Path(path), limits
        try:
            if zipfile.is_zipfile(self.path):
                self._file: zipfile.ZipFile | tarfile.TarFile = zipfile.ZipFile(self.path)
            else:
                with self.path.open("rb") as file:
                    # Told apart from "no archive at all": the download was most likely cut off.
                    if file.read(len(ZIP_START)) == ZIP_START:
                        raise zipfile.BadZipFile(
                            "a zip file ends in the list of its members, here it is gone"
                        )
                self._file = tarfile.open(self.path, mode="r:*")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is damaged or cut off: {error}") from error
        except tarfile.ReadError as error:  # its text is a list of every kind that was tried
            raise ValueError(
                f"{self.path} is not a readable zip or tar file: another kind of file, or its "
                "beginning is damaged or cut off"
            ) from error
        except DAMAGE as error:
            raise ValueError(f"{self.path} is not a readable zip or tar file: {error}") from error
        try:
            self._members = {member.name: member for member in self._listed()}
        except DAMAGE as error:
            self.close()
            raise ValueError(f"{self.path} is damaged or cut off: {error}") from error
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> SafeArchive:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:  # the cache of `open_member` drops archives without a word
        if hasattr(self, "_file"):
            self.close()

    def close(self) -> None:
        self._file.close()

    def names(self) -> list[str]:
        """Names of the regular files, in the order of the archive."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """One member. Raises UnusableItemError when it is missing, too large, damaged or cut off.

        A compressed tar has no random access: read it in order, with `members`.
        """
        member = self._members.get(name)
        if member is None:
            raise UnusableItemError("archive member missing")
        # Before it is opened: what would fill the memory must not be unpacked to be judged.
        if member.size > self.limits.member_bytes:
            raise UnusableItemError("archive member too large")
        suspicious = member.size > RATIO_FREE_BYTES and member.packed >= 0
        if suspicious and member.size > self.limits.ratio * max(member.packed, 1):
            raise UnusableItemError("archive member unpacks to more than its packed size explains")
        try:
            with self._open(member) as file:
                # The stated size may be a lie: one byte more tells, and memory stays bounded.
                data = file.read(member.size + 1)
        except DAMAGE as error:
            raise UnusableItemError("archive member unreadable") from error
        if len(data) != member.size:
            raise UnusableItemError("archive member has another size than stated")
        return data

    def members(self, suffixes: Sequence[str] = ()) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of the members with one of the suffixes (lower case), in order."""
        for name in self._members:
            if not suffixes or name.lower().endswith(tuple(suffixes)):
                yield name, self.read(name)

    def _listed(self) -> Iterator[Member]:
        """Regular files. Raises ValueError at the first entry that breaks a rule or a limit."""
        seen, total = set(), 0
        if isinstance(self._file, zipfile.ZipFile):
            entries = _zip_entries(self.path, self._file)
        else:
            entries = _tar_entries(self.path, self._file, self.limits)
        for number, member in enumerate(entries, start=1):
            # Readers disagree on which of the two they mean, and so would two preparations.
            if member.name in seen:
                raise ValueError(f"{self.path} refused: {member.name!r} occurs twice in it")
            seen.add(member.name)
            total += member.size
            # While listing, so that an endless list ends here and not in the memory.
            if number > self.limits.num_members or total > self.limits.total_bytes:
                raise ValueError(
                    f"{self.path} refused: more than {self.limits.num_members:,} members or "
                    f"{self.limits.total_bytes:,} bytes unpacked; split the archive"
                )
            yield member

    def _open(self, member: Member) -> IO[bytes]:
        if isinstance(self._file, zipfile.ZipFile):
            assert isinstance(member.entry, zipfile.ZipInfo)
            return self._file.open(member.entry)
        assert isinstance(member.entry, tarfile.TarInfo)
        file = self._file.extractfile(member.entry)
        assert file is not None  # only regular files are listed
        return file


def open_member(archive: str | Path, name: str) -> bytes:
    """One member of an archive that stays open for the next call in this process.

    Raises ValueError for a bad archive, UnusableItemError for a bad member.
    """
    path = Path(archive)
    try:
        status = path.stat()
    except OSError as error:
        raise UnusableItemError("archive missing") from error
    return _opened(path, status.st_size, status.st_mtime_ns).read(name)


@lru_cache(maxsize=NUM_OPEN_ARCHIVES)
def _opened(path: Path, size: int, changed: int) -> SafeArchive:
    # Size and time are part of the key, so that a replaced archive is read anew.
    return SafeArchive(path)


def _zip_entries(path: Path, file: zipfile.ZipFile) -> Iterator[Member]:
    for info in file.infolist():
        _check_name(path, info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was made on Windows
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{path} refused: {info.filename!r} is a link or device in it")
        if not info.is_dir():
            yield Member(info.filename, info.file_size, info.compress_size, info)


def _tar_entries(path: Path, file: tarfile.TarFile, limits: Limits) -> Iterator[Member]:
    packed = path.stat().st_size
    # A plain tar ends in zeros; without them tarfile takes a cut file for a shorter archive. The
    # compressed kinds notice by themselves.
    if isinstance(file.fileobj, io.BufferedReader):
        with path.open("rb") as raw:
            raw.seek(max(0, packed - 2 * tarfile.BLOCKSIZE))
            if any(raw.read()):
                raise tarfile.ReadError("no end mark")
    for info in file:
        _check_name(path, info.name)
        # A sparse file states any size at no cost, and its holes are no image.
        if not (info.isfile() or info.isdir()) or info.issparse():
            raise ValueError(
                f"{path} refused: {info.name!r} is a link, device or sparse file in it"
            )
        # Listing a compressed tar unpacks it up to here: judge the next member before that.
        end = info.offset_data + info.size
        if end > RATIO_FREE_BYTES and end > limits.ratio * packed:
            raise ValueError(
                f"{path} refused: it unpacks to more than {limits.ratio} times its size"
            )
        if info.isfile():
            yield Member(info.name, info.size, -1, info)


def _check_name(path: Path, name: str) -> None:
    """Raises ValueError for a name that leaves the folder it would be extracted to."""
    # By the rules of both systems: "..\\x" and "C:x" leave the folder on Windows.
    windows = PureWindowsPath(name)
    leaves = name.startswith("/") or windows.drive or windows.root or ".." in windows.parts
    if leaves or not name.strip("./") or "\0" in name:
        if name.rstrip("/") != ".":  # `tar -C folder .` begins with it
            raise ValueError(
                f"{path} refused: member {name!r} is no path inside the archive (absolute, '..' or "
                "empty)"
            )
