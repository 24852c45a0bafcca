"""Disks that are full or may not be written, under two real ranks: all end, with the message."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from biascare.training.checkpoint import CheckpointStore, verify
from tests.training.training_runs import Job, Run, World

pytestmark = pytest.mark.timeout(400)

MEGABYTE = 2**20
QUIET = ("data.eval_segmentation=[]", "data.eval_language=[]", "train.max_steps=4")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Small file systems of their own: name -> folder."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    root, sizes = tmp_path_factory.mktemp("disks"), dict.fromkeys(ZERO_STAGES, 3)
    found = {}
    for name, megabytes in (sizes | {"checked": 3, "between": 64, "read_only": 64}).items():
        found[name] = root / name
        found[name].mkdir()
        options = ["-t", "tmpfs", "-o", f"size={megabytes * MEGABYTE}", "none", str(found[name])]
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("this machine mounts no small file system")
    yield found
    for folder in (*found.values(), found["read_only"]):  # that one has a second mount over it
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


ZERO_STAGES = {"full0": 0, "full2": 2, "full3": 3}


@pytest.fixture(scope="module")
def runs(
    disks: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_mllm: Path,
    tiny_records: Path,
) -> dict[str, Run]:
    world = World(tmp_path_factory.mktemp("runs"), tiny_mllm, tiny_records)

    def on(name: str, *more: str) -> tuple[str, ...]:
        return (*QUIET, f"train.output_dir={disks[name] / 'run'}", *more)

    jobs = [
        *(
            Job(name, zero, on(name, "train.save_every=2"), {"unseen_disk": True})
            for name, zero in ZERO_STAGES.items()
        ),
        Job("checked", 2, on("checked", "train.save_every=2")),
        *(
            Job(
                name,
                2,
                on(name, "train.save_every=10", "train.max_steps=40"),
                {"accident": {"name": act, "step": 10, "place": str(disks[name])}},
            )
            for name, act in (("between", "full_disk"), ("read_only", "read_only_disk"))
        ),
    ]
    return world.run(2, jobs, timeout=350)


@pytest.mark.parametrize("name", ZERO_STAGES)
def test_a_disk_that_fills_up_inside_a_save_ends_every_rank_with_the_message(
    runs: dict[str, Run], disks: dict[str, Path], name: str
) -> None:
    for error in runs[name].errors:
        assert error is not None
        assert error.startswith("OSError: the checkpoint of step 2 could not be written")
        assert "No space left on device" in error and "free space" in error
    left = [path.name for path in (disks[name] / "run" / "checkpoints").iterdir()]
    assert left == [], "half a checkpoint takes the space that the next one needs"


def test_free_space_is_looked_at_before_a_byte_is_written(
    runs: dict[str, Run], disks: dict[str, Path]
) -> None:
    for error in runs["checked"].errors:
        assert error is not None and "GB are needed" in error and "GB are free" in error
    assert not list((disks["checked"] / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("name", "reason"), [("between", "No space left"), ("read_only", "Read-only file system")]
)
def test_between_two_saves_the_same_is_said(
    runs: dict[str, Run], disks: dict[str, Path], name: str, reason: str
) -> None:
    for error in runs[name].errors:
        assert error is not None and error.startswith("OSError: what the run records could not be")
        assert reason in error and "it continues from there" in error
    newest = CheckpointStore(disks[name] / "run" / "checkpoints", keep=2).newest()
    assert newest is not None and newest.name == "step_00000010" and verify(newest) is None
