"""Tensors of files and folders that others wrote, read without running any of their code.

    state = read_state_dict("weights/sam_vit_b_01ec64.pth")

Pickles are opened with `weights_only=True`; one that holds more than tensors is refused with the
names of what it asks for. The trade-off: a training checkpoint with pickled settings has to be
saved again as a plain state dict.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LOGGER = logging.getLogger("biascare")

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Entries under which programs store a state dict beside other things."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
MAX_LISTED = 8
"""Keys named in one error message."""

WHOLE_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Numbers that mean themselves; whole numbers and 8-bit floats are weights times a scale."""

FOREIGN = {
    "argparse.Namespace": "options of the program that wrote it",
    "numpy._core.multiarray.scalar": "single numbers of numpy",
    "numpy.core.multiarray.scalar": "single numbers of numpy",
    "numpy._core.multiarray._reconstruct": "arrays of numpy",
    "numpy.core.multiarray._reconstruct": "arrays of numpy",
    "omegaconf.dictconfig.DictConfig": "settings of the program that wrote it",
}
"""What training programs often pickle beside their tensors, in words."""


def listed(keys: list[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
    return ", ".join(keys[:MAX_LISTED]) + more


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file (.safetensors, .pth, .pt, .bin, .ckpt) or of a folder, on the CPU.

    A folder holds one such file, or shards with their *.index.json. Tensors of most files are
    mapped from disk and cost memory when touched. A state dict inside one of `WRAPPERS` is opened.

    Raises:
        ValueError: nothing there, several candidates, an empty, truncated or foreign file, one with
            pickled objects (their names are given), or a shard that its index names and lacks.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; name the weights that were downloaded")
    if path.stat().st_size == 0:  # what an interrupted download leaves; no parser would say so
        raise ValueError(f"{path} is empty (0 bytes); download or copy it again")
    if not _is_safetensors(path):
        return _tensors(_unpickle(path), path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        fix = "download or copy it again"
        if zipfile.is_zipfile(path):
            fix = f"torch.save wrote it: rename it to {path.stem}.pth"
        raise ValueError(f"{path} cannot be read as safetensors ({error}); {fix}") from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file has the name or the beginning of safetensors: a JSON header and its length."""
    with path.open("rb") as file:
        length, begin = file.read(8), file.read(1)
    in_it = int.from_bytes(length, "little") < path.stat().st_size
    return path.suffix == ".safetensors" or (begin == b"{" and in_it)


def refuse_unusable(name: str, value: Tensor, source: str) -> None:
    """Raises ValueError for a tensor that is not the weights it stands for: without values, sparse,
    quantised, complex, or with NaN or infinity among its numbers."""
    if value.is_meta:
        problem = "has a shape and no values"
    elif value.layout is not torch.strided:
        problem = f"is stored as {value.layout}, expected all its values"
    elif value.is_complex():
        problem = f"is of {value.dtype}: half of each number would be lost"
    elif value.dtype not in WHOLE_FLOATS:
        problem = f"is of {value.dtype}, quantised: without its scale it means nothing"
    # Of a training that diverged, or of a damaged copy. By the extremes, which carry NaN too:
    # asking each value takes a minute for the weights of a large language model.
    elif value.numel() and not all(bool(extreme.isfinite()) for extreme in value.aminmax()):
        problem = f"holds {int((~value.isfinite()).sum()):,} of {value.numel():,} not finite"
    else:
        return
    raise ValueError(
        f"{source}: {name} {problem}; name a file with finite weights in float32, float16 or "
        "bfloat16"
    )


def _read_folder(folder: Path) -> dict[str, Tensor]:
    # An index stands before single files, because a shard alone looks like one.
    indexes = sorted(folder.glob("*.index.json"), key=lambda p: (".safetensors." not in p.name, p))
    if indexes:
        return _read_shards(folder, indexes[0])
    for suffix in SUFFIXES:  # the same weights are often there in a safe and in an older form
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) > 1:
            names = [file.name for file in files]
            raise ValueError(f"{folder} holds several files ({listed(names)}); name one of them")
        if files:
            return read_state_dict(files[0])
    raise ValueError(
        f"{folder} holds no weights: expected a file ending in {', '.join(SUFFIXES)}, or shards "
        "with their *.index.json"
    )


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    """All shards an index names; its keys must be in them."""
    try:
        table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of shards ({type(error).__name__}: {error}); download it "
            "again"
        ) from error
    # An index is somebody else's file: a name such as ../x must not reach beyond the folder.
    outside = [shard for shard in shards if Path(shard).name != shard]
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if outside or absent:
        raise ValueError(
            f"{index} names {listed(outside or absent)}, expected files that lie beside it; "
            "download the missing shards"
        )
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_state_dict(folder / shard)
    # A shard of an older download can be whole in itself and still lack what the index promises.
    lacking = sorted(set(table) - set(state))
    if lacking:
        raise ValueError(f"the shards of {index} lack {listed(lacking)}; download them again")
    return state


def _unpickle(path: Path) -> Any:
    """What `torch.save` wrote, without running code of the file."""
    archive = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
    try:
        with warnings.catch_warnings():
            # Of an unusual pickle protocol: what it makes unreadable is an error below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        # Archives can be asked; of the older format only the message names the first one.
        if archive:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        else:
            foreign = sorted(
                set(re.findall(r"GLOBAL ([\w.]+) was not an allowed global", str(error)))
            )
        if foreign:
            named = [f"{n} ({FOREIGN[n]})" if n in FOREIGN else n for n in foreign]
            raise ValueError(
                f"{path} holds pickled objects besides tensors: {listed(named)}. Opening them "
                "could run code, so the file is refused; save its plain state_dict and name that"
            ) from error
        raise _unreadable(path, error) from error
    # Whatever truncated or foreign bytes make the parsers of zip and pickle raise.
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    with path.open("rb") as file:
        begin = file.read(4)
    # Torch's older format begins with a number of its own, pickled by protocol 2.
    if (
        begin[:1] == b"\x80"
        and begin[1:2] in (b"\2", b"\3", b"\4", b"\5")
        and begin[2:] != b"\x8a\n"
    ):
        return ValueError(
            f"{path} is a plain pickle, which torch.save did not write. Opening it could run code, "
            "so it is refused; open it in the program that wrote it and torch.save its tensors"
        )
    if isinstance(error, pickle.UnpicklingError):  # torch advises to open it unsafely
        with path.open("rb") as file:
            reason = f"no archive or pickle of tensors; it begins with {file.read(16)!r}"
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint ({reason}); it may "
        "be truncated or of another kind: download it again, or name a file that torch.save or "
        "safetensors wrote"
    )


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(v, Tensor) for v in content.values())


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, wrappers opened; numbers and texts beside it left."""
    while isinstance(content, dict):  # trainers wrap what other programs had wrapped already
        inside = [name for name in WRAPPERS if isinstance(content.get(name), dict)]
        if not inside:
            break
        # An average of the weights ("ema") is often what a program tests with.
        others = [name for name in content if name != inside[0] and _holds_tensors(content[name])]
        if others:
            LOGGER.warning(
                "%s: %r is read; tensors stand under %s too and are left. To start from those, "
                "save them alone",
                path,
                inside[0],
                listed([str(name) for name in others]),
            )
        content = content[inside[0]]
    found = content if isinstance(content, dict) else {}
    # Epochs, settings and optimizer states lie beside tensors in many files and harm nothing.
    state = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if not state:
        holds = f"entries {listed([str(k) for k in found])}" if found else type(content).__name__
        raise ValueError(
            f"{path} holds no state dict but {holds}; expected named tensors, alone or under "
            f"{', '.join(WRAPPERS)}"
        )
    return state


def refuse_code(path: str | Path) -> None:
    """Raise ValueError where a folder in Hugging Face format brings classes of its own.

    Beside `trust_remote_code=False`, which every opening passes: transformers then either takes
    the class of that name that it knows, or fails in the middle of loading. A name that is no
    folder is left to that.
    """
    # Every configuration file that a model, a tokenizer or a part of a processor is opened by.
    for file in sorted(Path(path).glob("*config.json")) if Path(path).is_dir() else []:
        try:
            named = _code_of(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            continue  # whoever opens it tells what is wrong with it
        if named:
            raise ValueError(
                f"{file} names code of its own (auto_map: {listed(named)}); code that comes with a "
                "model is never run here. Take a model that opens with the classes of transformers "
                "itself; where these are meant, remove auto_map from that file"
            )


def _code_of(value: Any) -> list[str]:
    """What every `auto_map` below a JSON value points to; processors nest those of their parts."""
    if isinstance(value, list):
        return [name for item in value for name in _code_of(item)]
    if not isinstance(value, dict):
        return []
    mine = value.get("auto_map") or []
    entries = mine.values() if isinstance(mine, dict) else [mine] if mine else []
    below = [name for key, item in value.items() if key != "auto_map" for name in _code_of(item)]
    return [*(str(entry) for entry in entries), *below]
