"""What a program does to its own process: before torch computes anything, and when it ends early.

interrupts, launcher_ended = raise_interrupts(), end_with_launcher()
try:
    prepare_process()
    run(config)
except BaseException as error:
    if interrupts or launcher_ended():
        stop(interrupts, output_dir, resume, launcher_ended())
    fail(error, output_dir)
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def prepare_process() -> None:
    """Allow as many open files as the system lets this process have. Divide the cores among the
    ranks of this machine, unless the user has: oversubscribed threads make CPU ranks dozens of
    times slower. Then silence what libraries say about themselves, and let rank 0 print what this
    package logs (what was loaded from foreign weights)."""
    # Tensors of reading processes come as open files, and where one cannot be opened over there,
    # torch loses the batch without a word to this process.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found none
        keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    # Of DeepSpeed's calls; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    log = logging.getLogger("biascare")
    if os.environ.get("RANK", "0") == "0" and not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones. By default it returns every large block
    to the system and pays for each page anew: a fifth of the time of large models on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)


# ---------------------------------------------------------------- ends


class FolderInUseError(ValueError):
    """Another run has the folder, so this one leaves nothing in it, not even a traceback."""


def fail(error: BaseException, folder: str | None = None) -> NoReturn:
    """End with the message of an error that explains itself; its traceback goes to a file.

    Without a run's folder it is a mistake that every rank finds in the same file: rank 0 speaks.
    """
    folder = None if isinstance(error, FolderInUseError) else folder
    number = os.environ.get("RANK", "0")
    message = str(error) if number == "0" else f"[rank {number}] {error}"
    if folder is not None and Path(folder).is_dir():
        path = Path(folder) / f"traceback.rank{number}.txt"
        with contextlib.suppress(OSError):
            path.write_text(traceback.format_exc(), encoding="utf-8")
            message += f"\n(traceback in {path})"
    # What libraries had half made complains when it is taken down, below the message.
    sys.unraisablehook = lambda details: None
    if folder is not None or number == "0":
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)


def forget_failures(folder: str) -> None:
    """Remove what `fail` wrote on this rank for a run that has succeeded since."""
    Path(folder, f"traceback.rank{os.environ.get('RANK', '0')}.txt").unlink(missing_ok=True)


def raise_interrupts() -> list[int]:
    """Let Ctrl-C and a launcher's SIGTERM raise KeyboardInterrupt here, once; the signals that came
    are in the list that is returned.

    Ctrl-C reaches every process of the terminal: reading processes, which inherit this, leave the
    end to the process that started them. A launcher sends SIGTERM just after it, which must not cut
    the last line short; a second Ctrl-C ends at once.
    """
    owner, received = os.getpid(), list[int]()

    def handle(number: int, frame: Any) -> None:
        # Threads that hand tensors over fail when the process at the other end is gone first.
        sys.excepthook = lambda *details: None
        threading.excepthook = lambda details: None
        if os.getpid() != owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            os._exit(128 + number)
        if len(received) == 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return received


def stop(
    received: list[int], folder: str | None, resume: str = "auto", launcher_ended: bool = False
) -> NoReturn:
    """End a run that signals, or the end of its launcher, interrupted: rank 0 says in one line how
    it goes on."""
    number = received[0] if received else signal.SIGTERM
    if os.environ.get("RANK", "0") == "0":
        saved = sorted(Path(folder).glob("checkpoints/step_????????")) if folder else []
        found = f"continues from {saved[-1]}" if saved else "starts again, nothing was saved yet"
        # Any other choice would begin again where this run began.
        command = "same command" if resume == "auto" else "same command with train.resume=auto"
        with contextlib.suppress(OSError):  # the terminal may be gone with the launcher
            reason = "the launcher has ended" if launcher_ended else "interrupted"
            print(f"{reason}; the {command} {found}", file=sys.stderr, flush=True)
    # Without the farewells of libraries: they would wait for ranks that are gone, or complain.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(128 + number)


# ---------------------------------------------------------------- the launcher

LOOK_EVERY = 1.0
"""Seconds between two looks for the launcher."""

GRACE = 10.0
"""Seconds that a rank has to end by itself once its launcher is gone."""


def end_with_launcher() -> Callable[[], bool]:
    """Let this rank end when the program that started it does; without one, nothing happens.
    Returns whether it has: ranks notice one after the other, and the first one's end looks like a
    fault to the others.

    A launcher that is killed cannot end its ranks, and DeepSpeed's runner does not even when it is
    only asked to: they would train on, unseen, and hold the folder of their run. What SIGTERM does
    happens then, and after `GRACE` the process ends wherever it is, in a collective too.
    """
    if "RANK" not in os.environ:
        return lambda: False
    # Until one of these changes. DeepSpeed has two programs: the one a person starts, and the one
    # that it starts on each machine, which goes on without it.
    parent = os.getppid()
    above = _parent_of(parent) if _is_deepspeed(parent) else None
    watched = above if above is not None and _is_deepspeed(above) else None

    def ended() -> bool:
        if os.getppid() != parent:
            return True
        return watched is not None and _parent_of(parent) != watched

    def look() -> None:
        while not ended():
            time.sleep(LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=look, name="launcher watch", daemon=True).start()
    return ended


def _parent_of(pid: int) -> int | None:
    """Parent of a process; None where the system does not say."""
    try:
        # The name of the program, in brackets, may hold anything; the parent comes second after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_deepspeed(pid: int) -> bool:
    try:
        return b"deepspeed" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
