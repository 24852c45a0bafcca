"""Runs of the training program in worlds of real processes, for the tests of training.

world = World(folder, mllm, records)
runs = world.run(2, [Job("zero3", zero=3)])       # two ranks
runs["zero3"].losses()
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import tiny_record_folder

ROOT = Path(__file__).resolve().parents[2]


class Job(NamedTuple):
    """One run: its folder, ZeRO stage, changed keys, and a fault of `training_worker.py`."""

    name: str
    zero: int = 2
    overrides: tuple[str, ...] = ()
    faults: dict[str, Any] = {}  # noqa: RUF012
    folder: str | None = None  # of another job whose run this one continues


class Run(NamedTuple):
    """What a run left behind."""

    folder: Path
    name: str = "*"  # of the job, where several have run in its folder

    def outcomes(self) -> list[dict[str, Any]]:
        """Of every rank: `error`, how it ended, and what its fault observed."""
        files = sorted(self.folder.glob(f"{self.name}.outcome.rank*.json"))
        return [json.loads(path.read_text()) for path in files]

    @property
    def errors(self) -> list[str | None]:
        return [outcome["error"] for outcome in self.outcomes()]

    def records(self, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def trajectory(self) -> dict[str, list[float]]:
        """Every loss term, the Dice losses by modality and the gradient norm, step by step."""
        values: dict[str, list[float]] = {}
        for entry in self.records("train"):
            row = dict(entry["loss"]) | {"grad_norm": entry["grad_norm"]}
            for name, cell in entry["by"]["modality"].items():
                row[f"dice/{name}"] = cell["dice_loss"]
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        return values

    def weights(self) -> dict[str, Tensor]:
        """Everything the export holds."""
        files = sorted((self.folder / "export").rglob("*.safetensors"))
        return {
            f"{path.name}/{key}": tensor
            for path in files
            for key, tensor in load_file(path).items()
        }


def largest_difference(one: Run, other: Run, *, leaving_out: tuple[str, ...] = ()) -> float:
    """Between two trajectories, over all values and steps; relative where a value is above 1, as
    sums over rows are (a Dice is not)."""
    mine, theirs = (
        {name: values for name, values in run.trajectory().items() if name not in leaving_out}
        for run in (one, other)
    )
    assert mine.keys() == theirs.keys() and mine, (mine.keys(), theirs.keys())
    for name in mine:
        assert len(mine[name]) == len(theirs[name]), name
    pairs = [pair for name in mine for pair in zip(mine[name], theirs[name], strict=True)]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def largest_weight_difference(one: Run, other: Run) -> float:
    mine, theirs = one.weights(), other.weights()
    assert mine.keys() == theirs.keys() and mine
    return max(float((mine[k].float() - theirs[k].float()).abs().max()) for k in mine)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return base | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path} | more


class World:
    """Builds configurations around one base model and one record folder, and runs them."""

    def __init__(self, folder: Path, mllm: Path, records: Path):
        self.folder = folder
        self.mllm = mllm
        self.records = records
        self.held_out = tiny_record_folder(folder / "held_out", split="val")

    def config(self, job: Job, num_ranks: int) -> Path:
        """Write the YAML of a job; six steps of two micro-batches."""
        output = self.folder / f"world{num_ranks}" / (job.folder or job.name)
        output.mkdir(parents=True, exist_ok=True)
        zero = output / "ds_config.json"
        # Without a threshold ZeRO-3 keeps small parameters whole, and all of these are small.
        partition = {"stage3_param_persistence_threshold": 0} if job.zero == 3 else {}
        settings: dict[str, Any] = {"zero_optimization": {"stage": job.zero} | partition}
        zero.write_text(json.dumps(settings))
        source = [{"path": str(self.records)}]
        held_out = [{"path": str(self.held_out)}]
        tree = {
            "data": {
                "segmentation": source,
                "language": source,
                "eval_segmentation": held_out,
                "eval_language": held_out,
                "targets_per_image": 2,
                "num_workers": 0,
            },
            "model": {
                "mllm": str(self.mllm),
                "vision": "tiny",
                "image_size": 64,
                "query_heads": 4,
                "lora_rank": 4,
                "lora_dropout": 0.1,
            },
            "hitl": {"ratio": 0.5},
            "optim": {"lr": 1e-3, "mllm_lr": 5e-4, "warmup_steps": 2},
            "train": {
                "max_steps": 6,
                "output_dir": str(output),
                "global_batch": 4,
                "micro_batch": 2,
                "precision": "fp32",
                "deepspeed": str(zero),
                "log_every": 1,
                "eval_every": 0,
                "save_every": 3,
                "tensorboard": False,
            },
            "eval": {"max_images": 3, "max_questions": 3, "max_new_tokens": 3, "at_start": False},
        }
        path = output / f"{job.name}.yaml"
        path.write_text(json.dumps(tree))  # JSON is YAML
        return path

    def run(self, num_ranks: int, jobs: list[Job], timeout: float = 280) -> dict[str, Run]:
        """Run jobs in one world, one after the other; {name: what it left}."""
        name = f"jobs.world{num_ranks}.{jobs[0].name}"
        specification = [
            {"config": str(self.config(job, num_ranks)), "overrides": list(job.overrides)}
            | job.faults
            for job in jobs
        ]
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(specification))
        log = self.folder / f"{name}.log"
        worker = [
            sys.executable,
            str(Path(__file__).with_name("training_worker.py")),
            str(path),
        ]
        port = str(free_port())
        with log.open("w") as file:
            ranks = [
                subprocess.Popen(
                    worker,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment(
                        RANK=str(rank),
                        LOCAL_RANK=str(rank),
                        WORLD_SIZE=str(num_ranks),
                        LOCAL_WORLD_SIZE=str(num_ranks),
                        MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=port,
                    ),
                )
                for rank in range(num_ranks)
            ]
            try:
                codes = [process.wait(timeout) for process in ranks]
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
        assert not any(codes), log.read_text()[-5000:]
        base = self.folder / f"world{num_ranks}"
        return {job.name: Run(base / (job.folder or job.name), job.name) for job in jobs}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
