"""What leaves a run: a portable folder with a card that says where the model comes from.

    export_run(config, engine, chat)                                   # at the end of training
    export_checkpoint(Path("outputs/run"), Path("exports/run"), ...)   # later, scripts/export.py

The folder is written under a temporary name, flushed and renamed, so that what has the name is
whole. It holds what inference needs of training (`TrainingFacts`): no data is read for it later.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from biascare.config import to_dict
from biascare.data.chat import ChatBuilder
from biascare.durable import PARTIAL, flush_tree, put_in_place, replace_text
from biascare.evaluation.metrics.segmentation import DiscBaseline, fit_disc
from biascare.models.export_folder import TrainingFacts, build_network, save_network
from biascare.models.language.pathway import load_processor
from biascare.models.network import DualPathNetwork
from biascare.models.weights.released import load_released
from biascare.reports.model_card import RunFacts, model_card, released_card
from biascare.runs import build
from biascare.runs.evaluate import training_masks
from biascare.runs.origin import read_config, read_run
from biascare.settings.keys import MOVABLE, Config
from biascare.training.checkpoint import MANIFEST, CheckpointStore, trained_weights
from biascare.training.engine import fp32_buffers, gathered_state

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}

DISCS = "disc_baseline.json"
"""In a run's folder: sizes of the disc baseline, and of which data."""


# ---------------------------------------------------------------- of a run


def export_run(config: Config, engine: Any, chat: ChatBuilder | None) -> None:
    """OUTPUT_DIR/export: the portable folder that `BiasCareVL.from_pretrained` opens.

    Every rank calls it; rank 0 writes, in the place of an earlier one.
    """
    network = engine.module.model
    exported = network.exported_parameters()
    state = gathered_state(network, lambda name, parameter: name in exported)
    if state is None:
        return
    folder = Path(config.train.output_dir)
    origin = read_run(folder, config.train.max_steps, to_dict(config))
    facts = training_facts(folder, config, origin)
    write_export(
        folder / "export",
        lambda new: save_network(network, new, state, facts=facts),
        origin,
        None if chat is None else chat.processor,
        replace=True,
    )


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    overrides: list[str],
    merge: bool,
    max_shard_size: str,
    dtype: str | None,
) -> None:
    """Export a run, or one of its checkpoints, outside of training.

    `overrides`: `key=PLACE` of `MOVABLE` keys. Raises ValueError for what is no run, for files that
    are not there, and when `output` exists.
    """
    refuse_existing(output)
    folder, checkpoint = locate(source)
    config = read_config(folder, overrides)
    if merge and config.train.stage != "joint":
        stage = config.train.stage
        raise ValueError(f"--merge: the {stage} stage has no language model; leave it out")
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    origin = read_run(folder, manifest["step"], to_dict(config), manifest.get("code"))
    try:
        network, chat = build.build_network(config), build.build_chat(config)
    except ValueError as error:
        moved = " or ".join(f"{key}=PLACE" for key in MOVABLE)
        raise ValueError(f"{error}. Where files have moved since training, add {moved}") from error
    load_trained(network, checkpoint)
    with fp32_buffers(network):  # buffers are positions and stay as they are
        network.to(PRECISIONS[dtype or config.train.precision])
    facts = training_facts(folder, config, origin)
    write_export(
        output,
        lambda new: save_network(
            network, new, facts=facts, merge=merge, max_shard_size=max_shard_size
        ),
        origin,
        None if chat is None else chat.processor,
    )


def locate(source: Path) -> tuple[Path, Path]:
    """(folder of the run, checkpoint) for either of the two."""
    if (source / MANIFEST).is_file():
        return source.resolve().parents[1], source
    if not (source / "checkpoints").is_dir():
        raise ValueError(
            f"{source} is neither a run (it has no checkpoints/) nor a checkpoint (it has no "
            "manifest.json); name train.output_dir, or a step_ folder inside its checkpoints/"
        )
    newest = CheckpointStore(source / "checkpoints", keep=1).newest()
    if newest is None:
        raise ValueError(f"{source / 'checkpoints'} holds no checkpoint")
    return source, newest


def load_trained(network: DualPathNetwork, checkpoint: Path) -> None:
    """Fill a network with what a checkpoint holds: everything that was trained."""
    prefix = "model."  # of the network inside the training step
    weights = {k.removeprefix(prefix): v for k, v in trained_weights(checkpoint).items()}
    wanted = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    known = network.state_dict().keys()
    differing = sorted(wanted - weights.keys()) + sorted(weights.keys() - known)
    if differing:
        raise ValueError(
            f"{checkpoint} does not fit the configuration beside it: they differ in "
            f"{len(differing)} tensors, such as {differing[0]!r}; export it with the config.yaml "
            "of its own run"
        )
    with torch.no_grad():
        network.load_state_dict(weights, strict=False)


def training_facts(folder: Path, config: Config, origin: RunFacts) -> TrainingFacts:
    """What inference and evaluation need of a run; from its folder alone where it was exported
    before."""
    data = [source["content"] for source in origin.about["data"]]
    discs = disc_baseline(folder, config, data)
    return TrainingFacts(
        beta_vl=config.objective.beta_vl,
        mask_prompt=config.hitl.mask_prompt,
        prevalence=origin.about["prevalence_groups"],
        disc_share=None if discs is None else discs.share,
        disc_share_by_target={} if discs is None else discs.by_target,
        trained_on=list(dict.fromkeys(data)),
    )


def disc_baseline(folder: Path, config: Config, data: list[str]) -> DiscBaseline | None:
    """Sizes of the trivial answers to a click, measured on the training masks once per run; None
    where there are no masks."""
    path = folder / DISCS
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["data"] == data:
            return None if saved["discs"] is None else DiscBaseline(**saved["discs"])
    except FileNotFoundError:
        pass  # never exported
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and export again") from error
    try:
        sources = build.open_sources(config.data.segmentation)
        for records in sources:
            if records.manifest["content_hash"] not in data:
                raise ValueError(f"{records.folder} holds other records than were trained on")
        discs = fit_disc(training_masks(sources))
    except (OSError, ValueError) as error:
        print(f"WARNING the export has no disc baseline: it needs the training masks ({error})")
        return None
    saved = {"data": data, "discs": None if discs is None else discs._asdict()}
    with contextlib.suppress(OSError):  # of a run that may only be read, it is measured again
        replace_text(path, json.dumps(saved, indent=2) + "\n")
    return discs


# ---------------------------------------------------------------- of a released file


def export_released(
    source: Path,
    output: Path,
    *,
    mllm: str,
    vision: str,
    image_size: int,
    query_heads: int,
    lora_alpha: float,
    max_shard_size: str,
    dtype: str | None,
) -> None:
    """The file of BiasCareVL's authors as a merged export; see scripts/export.py."""
    refuse_existing(output)
    network = build_network(
        vision=vision,
        image_size=image_size,
        mllm=mllm,
        query_heads=query_heads,
        dtype=PRECISIONS[dtype or "bf16"],
    )
    report = str(load_released(network, source, lora_alpha=lora_alpha))
    print(report)
    processor = load_processor(mllm)
    assert network.mllm is not None
    rows = network.mllm.base.config.get_text_config().vocab_size
    # A token without a row would end some later question with an index error.
    if len(processor.tokenizer) > rows:
        raise ValueError(
            f"{source} has {rows} rows of token embeddings, but the tokenizer of {mllm} has "
            f"{len(processor.tokenizer)} tokens; name the base it was trained on with --mllm"
        )
    write_export(
        output,
        lambda new: save_network(network, new, merge=True, max_shard_size=max_shard_size),
        partial(released_card, source, report),
        processor,
    )


# ---------------------------------------------------------------- the folder


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
