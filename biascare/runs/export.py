"""What leaves a run: a portable folder with a card that says where the model comes from.

    run = read_run(Path("outputs/run"), step=1000, config=to_dict(config))
    write_export(Path("outputs/run/export"), model.save_pretrained, run, processor)

The folder is written under a temporary name, flushed and renamed, so that what has the name is
whole. `model.save_pretrained` decides what the model's own files are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from biascare.durable import PARTIAL, flush_tree, put_in_place
from biascare.reports.model_card import RunFacts, model_card


def refuse_existing(folder: Path) -> None:
    """An export never takes the place of something the user has."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another folder, or remove it first")


def write_export(
    folder: Path,
    save: Callable[[Path], None],
    origin: RunFacts | Callable[[Path], str],
    processor: Any = None,
    *,
    replace: bool = False,
) -> None:
    """Write what `save` writes, the processor and the card to `folder`.

    `origin` is the run, whose configuration is copied too, or what else writes a card for a folder.

    With `replace` an earlier export makes room, once the new one is whole; without, it is an error.
    Raises ValueError when `folder` exists, OSError when it cannot be written; then nothing stays.
    """
    if not replace:
        refuse_existing(folder)
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        if partial.exists():
            shutil.rmtree(partial)  # of an export that was killed
        partial.mkdir(parents=True)
        save(partial)
        if processor is not None:
            for place in ("processor", "mllm"):
                if place == "processor" or (partial / place).is_dir():
                    processor.save_pretrained(partial / place)
        if isinstance(origin, RunFacts):
            shutil.copyfile(origin.config_file, partial / "training_config.yaml")
            card = model_card(origin, partial)
        else:
            card = origin(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the export could not be written to {folder} ({error}); free space or fix the "
            "permissions, then run scripts/export.py: checkpoints are untouched"
        ) from error
