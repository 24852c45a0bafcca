"""One run at a time in a folder.

    with locked(output_dir):    # on every rank
        ...

Rank 0 holds a lock of the operating system on OUTPUT_DIR/run.lock, which says who holds it. A
process that dies loses the lock with its life, kill -9 included, so a file that nobody holds is of
a run that was killed, on whatever machine. Where a file system keeps no locks, host and process
number in the file decide, and a file of another host has to be removed by hand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from biascare.runs.process import FolderInUseError
from biascare.training.ranks import from_rank_zero, rank

LOCK = "run.lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a run. Raises `FolderInUseError`, on every rank, while another has it."""
    made = not folder.exists()
    held: list[IO[str]] = []  # an open file is nothing that rank 0 could send to the others
    from_rank_zero(lambda: held.append(_take(folder / LOCK)))
    try:
        yield
    finally:
        if rank() == 0:
            # What this disk refuses must not hide why the run ends.
            with contextlib.suppress(OSError):
                # Before the lock is given back: nobody can have taken it yet.
                (folder / LOCK).unlink()
                if made:  # and empty still: the run was refused
                    folder.rmdir()
            held[0].close()


def _take(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            # Not `flock`: reading processes inherit that, and may outlive a run that was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _refusal(path, holder, "") from error
            if error.errno not in _NO_LOCKS:
                raise
            if holder and (holder["host"] != socket.gethostname() or _lives(holder["pid"])):
                hint = f"; its file system keeps no locks: if that run has ended, remove {path}"
                raise _refusal(path, holder, hint) from error
            file = path.open("a+", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder has removed it since: a lock of nothing
    holder = _holder(file)
    if holder:
        print(f"the run of process {holder['pid']} on {holder['host']} was killed here", flush=True)
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    file.flush()
    return file


def _refusal(path: Path, holder: dict[str, Any], hint: str) -> FolderInUseError:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return FolderInUseError(
        f"{path.parent} is in use by the run of {who}; wait for its end, stop it, or choose "
        f"another train.output_dir{hint}"
    )


def _holder(file: IO[str]) -> dict[str, Any]:
    """Host and process number in a lock file; {} where there is nothing to read."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return {"host": str(holder["host"]), "pid": int(holder["pid"])}
    except (ValueError, KeyError, TypeError):
        return {}  # killed before it was written


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True
