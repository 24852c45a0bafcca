"""Training checkpoints that survive a crash at any moment, and exact resume.

    store = CheckpointStore(output_dir / "checkpoints", keep=2)
    store.save(engine, step, client_state, fingerprint)
    step, client_state = store.load(engine, store.newest(), fingerprint)
    weights = trained_weights(store.newest())          # whole, on one process, without an engine

A save writes to a temporary folder, flushes, records size and sha256 of every file in
manifest.json, and is renamed only then; `latest` moves last and old checkpoints go after that. So
whatever is called step_N is whole, and there is always a previous one. Loading never unpickles
foreign classes: `weights_only=True` with the few classes DeepSpeed's own files contain.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from biascare.durable import PARTIAL, REPLACED, flush_tree, put_in_place, replace_text, write_json
from biascare.training.ranks import from_rank_zero, gather_objects, world_size

TAG = "engine"
"""Subfolder that DeepSpeed fills."""


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's writer with flushed files and its reader without arbitrary unpickling."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write and flush one file; a failure is kept in `problem`."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                # The manifest vouches for these bytes: after a power cut they must be there.
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch covers a full disk with complaints about its own archive: the first OSError on
            # the way tells a person what to do.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            # Raised here, between DeepSpeed's barriers, it would leave the other ranks waiting.
            self.problem = f"{path}: {cause or error}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """One file, of tensors, containers and the few classes that DeepSpeed puts there."""
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        # DeepSpeed itself would unpickle anything: a checkpoint from elsewhere could run code.
        trusted = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals(trusted):
            return torch.load(path, map_location=map_location, weights_only=True)


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int):
        """`keep`: how many of the newest stay on disk."""
        self.folder = folder
        self.keep = keep

    def save(
        self, engine: Any, step: int, client_state: dict[str, Any], fingerprint: dict[str, Any]
    ) -> Path:
        """Write step_N. Call on every rank; `client_state` holds plain values and tensors.

        Raises OSError, on every rank, where any of them cannot write; nothing half-written stays.
        """
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            from_rank_zero(lambda: self._begin(partial))
            engine.checkpoint_engine = writer = SafeCheckpointEngine()
            engine.save_checkpoint(
                str(partial),
                tag=TAG,
                client_state=client_state,
                save_latest=False,  # ours names a folder that is whole
                exclude_frozen_parameters=True,  # gigabytes that model.mllm has already
            )
            # Also the moment at which every rank has written and flushed.
            problems = [problem for problem in gather_objects(writer.problem) if problem]
            if problems:
                raise OSError("; ".join(problems))
            from_rank_zero(lambda: self._publish(partial, final, step, fingerprint))
        except OSError as error:
            # Half a checkpoint is of no use, and takes the space that the next one needs.
            from_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error}). "
                "Earlier checkpoints are untouched; free space or fix the permissions, then start "
                "the same command again to continue from the newest"
            ) from error
        return final

    def _begin(self, partial: Path) -> None:
        """An empty folder to write to; what crashed saves left goes now."""
        for left in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (partial / TAG).mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, step: int, fingerprint: dict[str, Any]) -> None:
        files = {
            str(path.relative_to(partial)): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        manifest = {"step": step, "world_size": world_size(), "files": files} | fingerprint
        # Last into the folder: a folder without it was never finished.
        write_json(partial / "manifest.json", manifest)
        # Before the rename: a file system may bring the new name to disk before the bytes.
        flush_tree(partial)
        put_in_place(partial, final)  # the name is taken where a fall back repeats this step
        replace_text(self.folder / "latest", final.name + "\n")
        for replaced in self.folder.glob(f"step_*{REPLACED}"):  # of a save that crashed
            shutil.rmtree(replaced)
        # Only now: until the new one had its name, the old ones were all there was.
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        # What a crash left aside as replaced counts too: it may be the only whole one of its step.
        # Where its successor is there, that one is newer.
        whole = (path for path in self.folder.glob("step_*") if path.suffix != PARTIAL)
        return sorted(whole, key=lambda path: (path.stem, path.suffix == ""))

    def newest(self) -> Path | None:
        """Newest checkpoint that verifies; None when there is none at all.

        Raises ValueError when checkpoints exist and none verifies: starting afresh over them is
        never the silent answer. A fallback to an older one is announced.
        """
        # One rank hashes and decides: ranks that fell back to different steps would not notice.
        path: Path | None = from_rank_zero(self._newest)
        return path

    def _newest(self) -> Path | None:
        candidates = self._all()
        for path in reversed(candidates):
            problem = verify(path)
            if problem is None:
                return path
            print(f"WARNING checkpoint {path} is damaged: {problem}", flush=True)
        if candidates:
            raise ValueError(
                f"none of the {len(candidates)} checkpoints in {self.folder} verifies; restore "
                "one, or start afresh with train.resume=never"
            )
        return None

    def set_aside(self) -> None:
        """Keep an earlier run's checkpoints under another name when the user starts afresh.

        Call on one rank.
        """
        if not self._all():
            return
        # Never deleted here: days of computing against one wrong word on a command line.
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.before-{number}")).exists():
            number += 1
        self.folder.rename(aside)
        print(f"earlier checkpoints are kept in {aside}", flush=True)

    def load(
        self, engine: Any, path: Path, fingerprint: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        """Restore everything; returns (steps done, client state).

        Raises ValueError when the checkpoint is damaged or was made by a run that differs in
        something exact resume depends on.
        """
        manifest: dict[str, Any] = from_rank_zero(lambda: _checked_manifest(path, fingerprint))
        # Not strict: frozen parameters are in no checkpoint, they come from model.mllm.
        engine.checkpoint_engine = SafeCheckpointEngine()
        loaded, client_state = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=False)
        # DeepSpeed only warns, and the run would go on from its initial weights.
        if loaded is None:
            raise ValueError(f"DeepSpeed found nothing to load in {path}")
        return manifest["step"], client_state


def _checked_manifest(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    problem = verify(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    # DeepSpeed cuts optimizer states by rank, so another number of ranks cannot read them.
    wanted = fingerprint | {"world_size": world_size()}
    differing = [
        f"{key} {manifest.get(key)!r} there, {value!r} here"
        for key, value in wanted.items()
        if manifest.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} cannot continue this run: {'; '.join(differing)}. Use the same "
            "settings, or start a new run with another train.output_dir"
        )
    return manifest


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            # Before the hash: a truncated file of gigabytes is found without reading it.
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
            # torch loads a flipped byte without a word.
            if _sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def trained_weights(path: Path) -> dict[str, Tensor]:
    """Trained parameters and buffers in a checkpoint, by their names in the engine's module.

    At ZeRO 0-2 they stand whole, in training precision, in one file. At ZeRO 3 they are put
    together from the fp32 partitions of all ranks; rounded to training precision they are what the
    run computed with.

    Raises ValueError when the checkpoint is damaged.
    """
    # Everything is hashed before anything is read.
    problem = verify(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    manifest = json.loads((path / "manifest.json").read_text())
    load, folder = SafeCheckpointEngine().load, path / TAG
    if manifest["zero_stage"] < 3:
        whole: dict[str, Tensor] = load(str(folder / "mp_rank_00_model_states.pt"), "cpu")["module"]
        return whole
    # DeepSpeed's own zero_to_fp32 gives the same, but unpickles whatever the files hold.
    model = load(str(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"), "cpu")
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    partitions = []
    for number in range(manifest["world_size"]):
        (file,) = folder.glob(f"*zero_pp_rank_{number}_mp_rank_00_optim_states.pt")
        groups = load(str(file), "cpu")["optimizer_state_dict"]["fp32_flat_groups"]
        partitions.append(torch.cat(groups))
    joined, offset = {name: model["module"][name] for name in model["buffer_names"]}, 0
    for name, shape in shapes.items():
        # ZeRO-3 cuts every parameter by itself and pads it to equal shares; the padding goes.
        share = -(-shape.numel() // len(partitions))
        parts = [partition[offset : offset + share] for partition in partitions]
        joined[name] = torch.cat(parts)[: shape.numel()].view(shape)
        offset += share
    # What is left over would mean that a shape is missing, and all after it are shifted.
    assert all(len(partition) == offset for partition in partitions)
    return joined


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):  # optimizer states are larger than memory
            digest.update(block)
    return digest.hexdigest()
