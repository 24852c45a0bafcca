"""One rank of several training runs, one after the other: a process start costs more than a run.

    RANK=0 WORLD_SIZE=2 ... python tests/training/training_worker.py jobs.json

Each job is a whole run of `biascare.runs.train` on a configuration file, with an optional fault.
The tests look at what it leaves behind: metrics, checkpoints, export, and
`JOB.outcome.rankN.json`, which says how it ended. Started by `tests/training/training_runs.py`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor

from biascare.config import load_config
from biascare.data.loader import collate
from biascare.runs import train
from biascare.runs.process import prepare_process
from biascare.training import hooks, ranks, trainer
from biascare.training.step import TrainStep
from tests.tiny import language_sample, pad_token_id, segmentation_sample


class RunInterruptedError(Exception):
    """The run was ended from outside."""


class NanGradient(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


def poisoned_forward(step: int, on_rank: int, what: str, num_micro: int, steps: int = 1) -> Any:
    """`TrainStep.forward` that spoils, on one rank, the last micro-batch of `steps` optimizer steps
    from `step` on."""
    original, calls = TrainStep.forward, [0]

    def forward(self: TrainStep, *arguments: Any) -> dict[str, Any]:
        outcome = original(self, *arguments)
        calls[0] += 1
        done, left = divmod(calls[0], num_micro)
        if not left and step <= done < step + steps and ranks.rank() == on_rank:
            loss = outcome["loss"]
            outcome["loss"] = loss * float("nan") if what == "loss" else NanGradient.apply(loss)
        return outcome

    return forward


def local_weights(engine: Any) -> list[Tensor]:
    """What this rank holds of every parameter."""
    parameters = engine.module.parameters()
    return [getattr(p, "ds_tensor", p).detach().clone() for p in parameters]


def watched_step(step: int, found: dict[str, Any]) -> Any:
    """`Trainer.optimizer_step` that notes whether the weights of this rank change in one step."""
    original, calls = trainer.Trainer.optimizer_step, [0]

    def optimizer_step(self: trainer.Trainer, micro_batches: list[Any]) -> Any:
        calls[0] += 1
        before = local_weights(self.engine)
        try:
            return original(self, micro_batches)
        finally:
            if calls[0] == step:
                after = local_weights(self.engine)
                found["unchanged"] = all(map(torch.equal, before, after))

    return optimizer_step


def step_left_out(step: int) -> Any:
    """`Trainer.optimizer_step` without one of the steps: no forward, no update, the rate moves."""
    original, calls = trainer.Trainer.optimizer_step, [0]

    def optimizer_step(self: trainer.Trainer, micro_batches: list[Any]) -> Any:
        calls[0] += 1
        if calls[0] != step:
            return original(self, micro_batches)
        self.engine.lr_scheduler.step()
        nothing = {"loss": torch.zeros(()), "terms": {}, "rows": None}
        return [nothing for _ in micro_batches], False

    return optimizer_step


def raising_hook(step: int, on_rank: int, error: Exception) -> Any:
    """`CheckpointHook.__call__` that raises after the save of a step; -1 is every rank."""
    original = hooks.CheckpointHook.__call__

    def call(self: hooks.CheckpointHook, state: Any) -> None:
        original(self, state)
        if state.step == step and on_rank in (-1, ranks.rank()):
            raise error

    return call


def killing_fsync(number: int) -> Any:
    """`os.fsync` that kills the process, as `kill -9` does, at its n-th call."""
    original, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        original(descriptor)

    return fsync


def full_disk(step: int, place: str) -> None:
    """Leave no byte on the disk of `place`."""
    with contextlib.suppress(OSError), Path(place, "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def read_only_disk(step: int, place: str) -> None:
    # Over itself: what a run has open already would keep the file system itself from it.
    for options in (["--bind", place, place], ["-o", "remount,bind,ro", place]):
        subprocess.run(["mount", *options], check=True)


def dead_reader(step: int, place: str) -> None:
    """Kill, as the system does when memory runs out, a process that reads records."""
    me = psutil.Process()
    [child for child in me.children() if child.cmdline() == me.cmdline()][-1].kill()


def no_more_files(step: int, place: str) -> None:
    """As many files open as there may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), most))


ACCIDENTS = {act.__name__: act for act in (full_disk, read_only_disk, dead_reader, no_more_files)}


def accident(name: str, step: int, place: str = "") -> Any:
    """`CheckpointHook.__call__` after which, on rank 0, something happens to the machine."""
    original = hooks.CheckpointHook.__call__

    def call(self: hooks.CheckpointHook, state: Any) -> None:
        original(self, state)
        if state.step == step and ranks.rank() == 0:
            ACCIDENTS[name](step, place)

    return call


def predicting_export(found: dict[str, Any]) -> Any:
    """`export_run` that also notes what the engine's own model predicts, and its buffers."""
    original = train.export_run

    def export(config: Any, engine: Any, chat: Any) -> None:
        original(config, engine, chat)
        model = engine.module.model.eval()
        batch = probe_batch(chat)
        with torch.no_grad():
            features = model.encode(batch)
            prediction = model.decode_masks(features, batch.prompts, batch.row_image)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        answer = {"hidden_states": features.hidden_states, "mask_logits": prediction.mask_logits}
        if ranks.rank() == 0:
            torch.save(answer | {"buffers": buffers}, Path(config.train.output_dir) / "probe.pt")

    return export


def probe_batch(chat: Any) -> Any:
    """A batch that the engine's model and the exported one are compared on."""
    samples = [segmentation_sample(chat, 5, ("liver", "spleen"))]
    if chat is None:
        return collate(samples, 0, 0)
    return collate([*samples, language_sample(chat)], 0, pad_token_id(chat))


def faults(job: dict[str, Any], found: dict[str, Any]) -> list[Any]:
    """The patches a job asks for; what they observe goes to `found`."""
    patches = [mock.patch.object(train, "export_run", predicting_export(found))]
    if "poison" in job:
        forward = poisoned_forward(**job["poison"])
        step = watched_step(job["poison"]["step"], found)
        patches.append(mock.patch.object(TrainStep, "forward", forward))
        patches.append(mock.patch.object(trainer.Trainer, "optimizer_step", step))
    if "leave_out" in job:
        step = step_left_out(job["leave_out"])
        patches.append(mock.patch.object(trainer.Trainer, "optimizer_step", step))
    if "interrupt" in job:
        call = raising_hook(job["interrupt"], -1, RunInterruptedError("interrupted"))
        patches.append(mock.patch.object(hooks.CheckpointHook, "__call__", call))
    if "die" in job:
        call = raising_hook(job["die"], distributed_world() - 1, RuntimeError("this rank died"))
        patches.append(mock.patch.object(hooks.CheckpointHook, "__call__", call))
    if "accident" in job:
        call = accident(**job["accident"])
        patches.append(mock.patch.object(hooks.CheckpointHook, "__call__", call))
    if "unseen_disk" in job:  # full when it is written to, not when it is looked at
        usage = mock.Mock(free=2**60)
        patches.append(mock.patch.object(shutil, "disk_usage", return_value=usage))
    if "kill" in job:
        patches.append(mock.patch.object(os, "fsync", killing_fsync(job["kill"])))
    return patches


def distributed_world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_job(job: dict[str, Any]) -> None:
    config = load_config(job["config"], job.get("overrides", []))
    found: dict[str, Any] = {"error": None}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for patch in faults(job, found):
            stack.enter_context(patch)
        try:
            train.run(config)
        except (*train.RUN_ERRORS, RunInterruptedError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    gc.collect()
    path = Path(job["config"]).with_suffix(f".outcome.rank{ranks.rank()}.json")
    path.write_text(json.dumps(found))


def main() -> None:
    prepare_process()
    torch.set_num_threads(1)
    # The world outlives its runs here; the last one leaves it.
    with mock.patch.object(train, "leave_process_group"):
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run_job(job)
    ranks.leave_process_group()


if __name__ == "__main__":
    main()
