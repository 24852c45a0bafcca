"""Faults of the machine that a run meets, in words that say what to do.

    with explained(output_dir):
        ...

Full and read-only disks, limits of the system, reading processes that were killed: what Python and
torch say of them is a traceback of theirs. What is no such fault passes through unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from biascare.training.checkpoint import unwritten

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_FILES = (errno.EMFILE, errno.ENFILE)


class MachineError(RuntimeError):
    """The machine does not give what the run needs."""


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Raise OSError, `MachineError` or the bare error of a reading process in place of what is
    known here. `folder`: that of the run.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        known = _explanation(error, folder)
        if known is None:
            raise
        raise known from error


def _explanation(error: Exception, folder: Path) -> Exception | None:
    text = str(error)
    # By their text too: torch reports some failed calls of the system as its own RuntimeError.
    too_many = "Too many open files" in text or "received 0 items of ancdata" in text
    if too_many or getattr(error, "errno", None) in _FILES:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return MachineError(
            f"a process of this run has as many files open as the system lets it, {limit}; have "
            "that raised (`ulimit -Hn` shows it, a service has LimitNOFILE), or lower "
            "data.num_workers"
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        named = None if error.filename is None else Path(str(error.filename)).absolute()
        # Of another place, it is about what the run reads.
        if named is None or folder.absolute() in (named, *named.parents):
            return unwritten("what the run records", folder, error)
    if re.match(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)", text):
        reason = text.splitlines()[0].removeprefix("DataLoader worker ").rstrip(". ")
        return MachineError(
            f"a process that reads records has ended: {reason}. Most often memory ran out (killed) "
            "or /dev/shm is too small (bus error); lower data.num_workers, or give the run more, "
            "then start the same command again"
        )
    if "EADDRINUSE" in text:
        return MachineError(
            f"port {os.environ.get('MASTER_PORT')} of this machine is in use, most likely by "
            "another run; choose a free one (deepspeed --master_port PORT)"
        )
    if "gloo" in text and re.search("Connection (closed|reset) by peer", text):
        return MachineError(
            f"another rank has ended; why, it says above or in {folder}/traceback.rank*.txt"
        )
    if text.startswith("DataLoader timed out"):
        return MachineError(
            f"no batch came from the reading processes: {text}. The disk of the records hangs, or "
            "one of these processes has failed (see above)"
        )
    # Torch puts the whole traceback of a reading process into the message.
    caught = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\n", text)
    if caught and isinstance(error, ValueError | RuntimeError):
        message = text.rpartition(f"{caught[1]}: ")[2].strip()
        return ValueError(message) if isinstance(error, ValueError) else MachineError(message)
    return None
