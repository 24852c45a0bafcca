"""Training checkpoints that survive a crash at any moment, and exact resume.

    store = CheckpointStore(output_dir / "checkpoints", keep=2)
    store.save(engine, step, fingerprint, notes)
    manifest = store.load(engine, store.newest(), fingerprint)
    weights = trained_weights(store.newest())          # whole, on one process, without an engine

A save writes to a temporary folder, flushes, records size and sha256 of every file in
manifest.json, which ends with a hash of itself, and is renamed only then; `latest` moves last and
old checkpoints go after that. So whatever is called step_N is whole, and there is always a previous
one. Loading never unpickles foreign classes: `weights_only=True` with the few classes DeepSpeed's
own files contain.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
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

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
"""Key of the manifest's hash of all its other keys."""

_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(PARTIAL)}|{re.escape(REPLACED)})?")
"""Names that a save gives. Others are not ours: a person's copy, a note."""


def unwritten(what: str, folder: Path, reason: object) -> OSError:
    """What a run says where its disk is full or may not be written."""
    return OSError(
        f"{what} could not be written to {folder} ({reason}). What was saved before is untouched; "
        "free space or fix the permissions, then start the same command again: it continues from "
        "there"
    )


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
        self, engine: Any, step: int, fingerprint: dict[str, Any], notes: dict[str, Any]
    ) -> Path:
        """Write step_N. Call on every rank. `notes`: what else the manifest shall say; unlike
        `fingerprint`, it may differ when a run goes on.

        Raises OSError, on every rank, where any of them cannot write; nothing half-written stays.
        """
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            from_rank_zero(lambda: self._begin(partial, _least_bytes(engine)))
            # Also the moment at which every rank has written and flushed.
            problems = [p for p in gather_objects(self._write(engine, partial)) if p]
            if problems:
                raise OSError("; ".join(problems))
            facts = {"step": step, "world_size": world_size()} | notes | fingerprint
            from_rank_zero(lambda: self._publish(partial, final, facts))
        except OSError as error:
            # Half a checkpoint is of no use, and takes the space that the next one needs.
            from_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise unwritten(f"the checkpoint of step {step}", self.folder, error) from error
        return final

    def _write(self, engine: Any, partial: Path) -> str | None:
        """Let DeepSpeed write; what went wrong on this rank, or None."""
        engine.checkpoint_engine = writer = SafeCheckpointEngine()
        # On rank 0 alone and between its barriers, DeepSpeed copies scripts beside its files: on a
        # full disk that raises, and the other ranks wait. `trained_weights` is read without them.
        engine._copy_recovery_script = lambda folder: None
        try:
            engine.save_checkpoint(
                str(partial),
                tag=TAG,
                save_latest=False,  # ours names a folder that is whole
                exclude_frozen_parameters=True,  # gigabytes that model.mllm has already
            )
        except OSError as error:
            # Of another such place (states that are offloaded to NVMe). No collective any more: the
            # others are inside DeepSpeed, and only the end of this process ends their waiting.
            raise RuntimeError(str(unwritten("a checkpoint", self.folder, error))) from error
        return writer.problem

    def _begin(self, partial: Path, least: int) -> None:
        """An empty folder to write to; what crashed saves left goes now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self._named(PARTIAL), self.folder / f"latest{PARTIAL}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        # The one before is the best guess. Nothing is removed to make room: until the new one is
        # whole, the old ones are all there is.
        needed = max([least, *(_size(path) for path in self._all()[-1:])])
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}")
        (partial / TAG).mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, facts: dict[str, Any]) -> None:
        files = {
            str(path.relative_to(partial)): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in _files(partial)
        }
        # Last into the folder: a folder without it was never finished.
        write_json(partial / MANIFEST, sealed(facts | {"files": files}))
        # Before the rename: a file system may bring the new name to disk before the bytes.
        flush_tree(partial)
        put_in_place(partial, final)  # the name is taken where a fall back repeats this step
        replace_text(self.folder / "latest", final.name + "\n")
        for replaced in self._named(REPLACED):  # of a save that crashed
            shutil.rmtree(replaced)
        # Only now: until the new one had its name, the old ones were all there was. Whatever has a
        # higher number was not saved by this run, and is not what this one makes room for.
        mine = [path for path in self._all() if _step(path) <= facts["step"]]
        for old in mine[: -self.keep]:
            shutil.rmtree(old)

    def _named(self, ending: str) -> list[Path]:
        """Folders that a save has named with this ending, oldest step first."""
        found = [p for p in self.folder.glob(f"step_*{ending}") if p.is_dir()]
        names = {p: match for p in found if (match := _NAME.fullmatch(p.name))}
        return sorted((p for p, match in names.items() if (match[2] or "") == ending), key=_step)

    def _all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        # What a crash left aside as replaced counts too: it may be the only whole one of its step.
        # Where its successor is there, that one is newer.
        whole = [*self._named(REPLACED), *self._named("")]
        return sorted(whole, key=_step)  # stable

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

    def set_aside(self, resumed: Path | None) -> bool:
        """Before a run goes on after checkpoint `resumed` (None: afresh): keep those that it does
        not descend from under another name. Whether there were any. Call on one rank.
        """
        known = self._all()
        places = [number for number, p in enumerate(known) if resumed and p.samefile(resumed)]
        # Left among the run's own, they would be taken for its newest: kept in place of what it
        # saves, and continued from after a crash.
        abandoned = known[places[0] + 1 :] if places else known
        if not abandoned:
            return False
        # Never deleted here: days of computing against one wrong word on a command line.
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.before-{number}")).exists():
            number += 1
        aside.mkdir()
        # Newest first: killed in the middle, what is left is still one history.
        for path in reversed(abandoned):
            path.rename(aside / path.name)
        if places and resumed is not None:
            replace_text(self.folder / "latest", resumed.name + "\n")
        else:
            (self.folder / "latest").unlink(missing_ok=True)
        names = ", ".join(path.name for path in abandoned)
        print(
            f"checkpoints that this run does not continue are kept in {aside}: {names}", flush=True
        )
        return True

    def load(self, engine: Any, path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Restore everything; returns the manifest.

        Raises ValueError when the checkpoint is damaged or was made by a run that differs in
        something exact resume depends on.
        """
        manifest: dict[str, Any] = from_rank_zero(lambda: _checked_manifest(path, fingerprint))
        # Not strict: frozen parameters are in no checkpoint, they come from model.mllm.
        engine.checkpoint_engine = SafeCheckpointEngine()
        loaded, _ = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=False)
        # DeepSpeed only warns, and the run would go on from its initial weights.
        if loaded is None:
            raise ValueError(f"DeepSpeed found nothing to load in {path}")
        return manifest


def _step(path: Path) -> int:
    """Of a name that matches `_NAME`."""
    return int(path.name.split(".")[0].removeprefix("step_"))


def _files(folder: Path) -> list[Path]:
    """Everything below a checkpoint that its manifest vouches for."""
    return sorted(p for p in folder.rglob("*") if not p.is_dir() and p != folder / MANIFEST)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _least_bytes(engine: Any) -> int:
    """No checkpoint is smaller: trained parameters and AdamW's two moments, which are in fp32 or,
    at ZeRO 0, in the precision of the parameters."""
    trained = (p for p in engine.module.parameters() if p.requires_grad)
    # ZeRO-3 leaves an empty tensor in place of what it partitions.
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() * 3 for p in trained)


def _checked_manifest(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    problem = verify(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
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


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of everything else in it."""
    bare = {key: value for key, value in manifest.items() if key != SEAL}
    return bare | {SEAL: hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        # An edited step would continue the stream elsewhere, a file that it forgot would pass.
        if manifest != sealed(manifest):
            stated = "does not fit its own hash" if manifest.get(SEAL) else "has no hash of its own"
            return f"{MANIFEST} {stated}; it was edited, or an older version wrote it"
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["step"]:
            return f"{MANIFEST} is of step {manifest['step']}; the folder was renamed"
        files = {path / name: expected for name, expected in manifest["files"].items()}
        for file, expected in files.items():
            name = file.relative_to(path)
            if not file.is_file():
                return f"{name} is missing"
            # Before the hash: a truncated file of gigabytes is found without reading it.
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
            # torch loads a flipped byte without a word.
            if _sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written"
        # DeepSpeed finds its files by their endings, and would take one too many for a rank's.
        strange = [file for file in _files(path / TAG) if file not in files]
        if strange or not files:
            what = f"does not name {strange[0].relative_to(path)}" if strange else "names no file"
            return f"{MANIFEST} {what}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
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
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
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
