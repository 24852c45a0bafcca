"""Checkpoints when things go wrong: kills, damage, full disks, foreign files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from biascare.durable import REPLACED
from biascare.training import checkpoint
from biascare.training.checkpoint import (
    SEAL,
    TAG,
    CheckpointStore,
    SafeCheckpointEngine,
    sealed,
    verify,
)
from tests.training.training_runs import Job, World, equal

FINGERPRINT = {"train.seed": 0, "data": ["abc"]}
NOTES = {"max_steps": 20, "code": [{"from_step": 0, "git_commit": "abc"}]}


class Engine:
    """Writes and reads two files through the store's own reader and writer, as DeepSpeed does."""

    files = ("mp_rank_00_model_states.pt", "zero_optim_states.pt")

    def __init__(self, value: float = 0.0):
        self.value = value
        self.module = torch.nn.Linear(2, 2)
        self.checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        for name in self.files:
            state = {"value": torch.full((64,), self.value)}
            self.checkpoint_engine.save(state, f"{folder}/{tag}/{name}")

    def load_checkpoint(self, folder: str, tag: str, **_: Any) -> tuple[str, Any]:
        state = [self.checkpoint_engine.load(f"{folder}/{tag}/{name}") for name in self.files]
        self.value = state[0]["value"][0].item()
        return folder, {}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def save(store: CheckpointStore, step: int, value: float | None = None) -> Path:
    engine = Engine(float(step) if value is None else value)
    return store.save(engine, step, FINGERPRINT, NOTES)


def loaded(store: CheckpointStore) -> tuple[int, float] | None:
    """(step, value) that automatic resume would continue from."""
    path = store.newest()
    if path is None:
        return None
    engine = Engine()
    manifest = store.load(engine, path, FINGERPRINT)
    assert manifest["code"] == NOTES["code"]
    return manifest["step"], engine.value


def test_what_is_saved_comes_back_and_the_newest_are_kept(store: CheckpointStore) -> None:
    assert loaded(store) is None
    for step in (5, 10, 15):
        save(store, step)
    assert loaded(store) == (15, 15.0)
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["latest", "step_00000010", "step_00000015"]
    assert (store.folder / "latest").read_text().strip() == "step_00000015"


# ---------------------------------------------------------------- kills

CALLS = ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir", "open")
"""Every call that changes the disk."""


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies, as of kill -9, before its n-th change to the disk; whether
    it came so far."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def watched(original: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                calls[0] += 1
                if calls[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **keywords)

            return call

        for name in CALLS:
            setattr(os, name, watched(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(
    store: CheckpointStore, tmp_path: Path, again: bool
) -> None:
    """`again`: the step being saved stands there already, from before a fall back."""
    for step in (5, 10):
        save(store, step)
    pristine = tmp_path / "pristine"
    shutil.copytree(store.folder, pristine)
    step, found, number = (10 if again else 15), set(), 0
    while True:
        number += 1
        shutil.rmtree(store.folder)
        shutil.copytree(pristine, store.folder)
        killed = killed_at(number, lambda: save(store, step, 99.0))
        before = loaded(store)
        assert before in {(10, 10.0), (step, 99.0)}, (number, before)
        found.add(before)
        save(store, 20)  # and the next save works, over whatever was left
        assert loaded(store) == (20, 20.0)
        assert not list(store.folder.glob("*.tmp"))
        if not killed:
            break
    assert found == {(10, 10.0), (step, 99.0)} and number > 10


def test_a_kill_during_the_very_first_save_leaves_a_fresh_start(store: CheckpointStore) -> None:
    assert killed_at(4, lambda: save(store, 5))
    assert loaded(store) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [1, 3, 5, 8, 11])
def test_a_killed_deepspeed_run_resumes_bit_for_bit(
    tmp_path: Path, tiny_mllm: Path, tiny_records: Path, number: int
) -> None:
    """Each save flushes about half a dozen times: the kills hit the first and the second save."""
    world = World(tmp_path, tiny_mllm, tiny_records)
    short = ("train.global_batch=4", "train.max_steps=4", "train.save_every=2")
    with pytest.raises(AssertionError):
        world.run(1, [Job("killed", 2, short, {"kill": number})])
    found = world.run(1, [Job("resumed", 2, short, folder="killed"), Job("whole", 2, short)])
    assert equal(found["resumed"].weights(), found["whole"].weights())
    assert found["resumed"].trajectory() == found["whole"].trajectory()


# ---------------------------------------------------------------- damage


def flip_byte(folder: Path) -> None:
    path = folder / TAG / Engine.files[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / TAG / Engine.files[1]
    path.write_bytes(path.read_bytes()[:-100])


def remove_file(folder: Path) -> None:
    (folder / TAG / Engine.files[0]).unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def edit_step(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest | {"step": 7})


def forget_files(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest | {"files": {}})


def forget_files_and_seal(folder: Path) -> None:
    rewrite(folder, lambda manifest: sealed(manifest | {"files": {}}))


def remove_seal(folder: Path) -> None:
    rewrite(folder, lambda manifest: {k: v for k, v in manifest.items() if k != SEAL})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def plant_partition(folder: Path) -> None:
    """DeepSpeed would take it for the states of another rank."""
    shutil.copy(folder / TAG / Engine.files[1], folder / TAG / "bf16_zero_optim_states.pt")


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_byte: "has changed since it was written",
    truncate: "bytes instead of",
    remove_file: "is missing",
    remove_manifest: "manifest.json cannot be read",
    empty_manifest: "manifest.json cannot be read",
    edit_step: "manifest.json does not fit its own hash",
    forget_files: "manifest.json does not fit its own hash",
    forget_files_and_seal: "manifest.json does not name engine/",
    remove_seal: "manifest.json has no hash of its own",
    plant_partition: "manifest.json does not name engine/bf16_zero_optim_states.pt",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_fall_back_announced(
    store: CheckpointStore, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    save(store, 5)
    newest = save(store, 10)
    damage(newest)
    assert loaded(store) == (5, 5.0)
    said = capfd.readouterr().out
    assert "WARNING" in said and "step_00000010 is damaged" in said and DAMAGES[damage] in said
    with pytest.raises(ValueError, match="is damaged"):
        store.load(Engine(), newest, FINGERPRINT)


def test_what_a_crash_left_aside_is_older_than_its_successor(store: CheckpointStore) -> None:
    newer = save(store, 5)
    aside = newer.with_name(newer.name + REPLACED)
    shutil.copytree(newer, aside)
    assert store.newest() == newer
    shutil.rmtree(newer)
    assert store.newest() == aside


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_never_starts_afresh_over_damaged_checkpoints(
    store: CheckpointStore, damage: Callable[[Path], None]
) -> None:
    damage(save(store, 5))
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .* train\.resume=never"):
        store.newest()


def test_starting_afresh_keeps_the_earlier_checkpoints(store: CheckpointStore) -> None:
    assert not store.set_aside(None)  # nothing there yet
    for number in (1, 2):
        save(store, 5)
        assert store.set_aside(None)
        assert loaded(store) is None
        kept = store.folder.with_name(f"checkpoints.before-{number}")
        assert verify(kept / "step_00000005") is None


# ---------------------------------------------------------------- another run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.seed": 1}, r"train\.seed 0 there, 1 here"),
        ({"data": ["xyz"]}, r"data \['abc'\] there, \['xyz'\] here"),
        ({"optim.lr": 0.1}, r"optim\.lr None there, 0\.1 here"),
    ],
)
def test_another_run_is_refused(
    store: CheckpointStore, change: dict[str, Any], message: str
) -> None:
    path = save(store, 5)
    with pytest.raises(ValueError, match=message):
        store.load(Engine(), path, FINGERPRINT | change)


def test_another_number_of_ranks_is_refused(store: CheckpointStore) -> None:
    path = save(store, 5)
    with (
        mock.patch.object(checkpoint, "world_size", return_value=4),
        pytest.raises(ValueError, match=r"world_size 1 there, 4 here.*train\.output_dir"),
    ):
        store.load(Engine(), path, FINGERPRINT)


# ---------------------------------------------------------------- foreign files


class Planted:
    """A pickle that runs a command when it is opened without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_planted_pickle_is_refused_and_not_run(store: CheckpointStore, tmp_path: Path) -> None:
    path = save(store, 5)
    marker = tmp_path / "was_run"
    torch.save({"value": Planted(marker)}, path / TAG / Engine.files[0])
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / TAG / Engine.files[0]
    manifest["files"][f"{TAG}/{file.name}"] = {
        "size": file.stat().st_size,
        "sha256": checkpoint._sha256(file),
    }
    (path / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert verify(path) is None  # whoever can plant a file can also write its hash
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r"(?i)weights.only|trusted"):
        store.load(Engine(), path, FINGERPRINT)
    assert not marker.exists()


# ---------------------------------------------------------------- the disk


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_checkpoint(
    store: CheckpointStore,
) -> None:
    save(store, 5)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in ("os.fsync", "torch.save"):
        with (
            mock.patch(name, side_effect=full),
            pytest.raises(OSError, match=r"step 10 could not be .*No space left.*free space"),
        ):
            save(store, 10)
        assert sorted(p.name for p in store.folder.iterdir()) == ["latest", "step_00000005"]
        assert loaded(store) == (5, 5.0)


def test_a_disk_that_is_really_full_is_a_clear_error(store: CheckpointStore) -> None:
    """/dev/full takes no byte; torch wraps that in an error of its own."""
    writer = SafeCheckpointEngine()
    writer.save({"value": torch.zeros(2**16)}, "/dev/full")
    assert writer.problem is not None and "/dev/full" in writer.problem
    assert "No space left" in writer.problem


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"could not be written to .*permissions"):
        save(CheckpointStore(tmp_path / "file" / "checkpoints", keep=2), 5)
