"""Ranks: joining them, and what they tell each other."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
"""A rank that died must not leave the others waiting for ever."""


SINGLE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def init_process_group(timeout: timedelta = PROCESS_GROUP_TIMEOUT) -> None:
    """Join the ranks the launcher started, or become a world of one."""
    import deepspeed  # takes seconds, which a program of one process need not spend

    for name in ("DeepSpeed", "deepspeed"):
        # It reports every step of its start on every rank; errors still come through.
        logging.getLogger(name).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # DeepSpeed would first compile a shared-memory operator: 40 s, fatal without a compiler.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    else:  # before any collective: NCCL would put every rank of a machine on its first device
        torch.cuda.set_device(local_device())
    if "RANK" not in os.environ:
        os.environ |= SINGLE_PROCESS
        # Any free one: two single processes on a machine, such as tests, must not meet.
        with socket.socket() as probe:
            probe.bind((SINGLE_PROCESS["MASTER_ADDR"], 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def leave_process_group() -> None:
    """Take leave of the other ranks at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Among the ranks of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(value: Tensor) -> Tensor:
    """All-reduced copy; alone, the value itself."""
    if world_size() == 1:
        return value
    value = value.clone()  # the caller's own count stays what this rank saw
    dist.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """One object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(compute: Callable[[], Any]) -> Any:
    """Result of `compute` on rank 0, on every rank; an exception there is raised everywhere."""
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [("value", compute())]
        except Exception as error:
            # Sent on, not raised yet: the other ranks are on their way into the broadcast and
            # would wait there until the timeout.
            outcome = [("error", error)]
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    kind, value = outcome[0]
    if kind == "error":
        raise value
    return value
