"""What a program does to its own process before torch computes anything."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings


def prepare_process() -> None:
    """Divide the cores among the ranks of this machine, unless the user has: oversubscribed threads
    make CPU ranks dozens of times slower. Then silence what libraries say about themselves, and let
    rank 0 print what this package logs (what was loaded from foreign weights)."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found none
        keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    for message in ("`is_gradient_checkpointing`", "`torch.distributed"):
        # Of peft's and DeepSpeed's calls; nothing a user could change.
        warnings.filterwarnings("ignore", category=FutureWarning, message=message)
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
