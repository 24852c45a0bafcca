"""Make a portable folder of a training checkpoint, or of the one BiasCareVL's authors released.

    python scripts/export.py outputs/stage2 --output exports/stage2
    python scripts/export.py outputs/stage2/checkpoints/step_00001000 --output exports/early --merge
    python scripts/export.py weights/pytorch_model.bin --output exports/released \\
        --mllm weights/HuatuoGPT-Vision-7B-Qwen2.5VL

Of a run's folder the newest checkpoint that verifies is taken. The folder holds what was trained,
the processor and a card; with --merge also the base model, the adapter folded in, in `mllm/`, which
opens in plain transformers. Where the base model has moved since training, add model.mllm=PLACE.
A released file is always merged: it holds both pathways, and --mllm only says how they are built.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from biascare.config import to_dict
from biascare.settings.keys import Config
from biascare.settings.schema import build
from biascare.settings.strict_yaml import ConfigError, read_tree

if TYPE_CHECKING:
    import torch

    from biascare.models.network import DualPathNetwork

MOVABLE = ("model.mllm", "model.vision_weights")
"""Keys that say where files lie; all others are part of what was trained."""

PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}


def shard_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 500MB or 4GB")
    return text


def override(text: str) -> str:
    if text.partition("=")[0] not in MOVABLE or not text.partition("=")[2]:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected {' or '.join(f'{key}=PLACE' for key in MOVABLE)}; "
            "nothing else of a finished run can be changed"
        )
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", help="folder of a run, one of its checkpoints, or a released file"
    )
    parser.add_argument(
        "overrides", nargs="*", type=override, metavar="key=PLACE", help="|".join(MOVABLE)
    )
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the base")
    parser.add_argument(
        "--max-shard-size", type=shard_size, default="4GB", help="of merged weights (default 4GB)"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, help="default: the precision of the run")
    released = parser.add_argument_group("of a released file")
    released.add_argument("--mllm", help="folder or Hub id of the image-text model it adapts")
    released.add_argument("--vision", default="imis_b", help="architecture (default imis_b)")
    released.add_argument("--image-size", type=int, default=256, help="pixels (default 256)")
    released.add_argument("--query-heads", type=int, default=8, help="of Eq. 1 (default 8)")
    options = parser.parse_intermixed_args(arguments)
    if Path(options.source).is_file() != (options.mllm is not None):
        parser.error(
            "--mllm goes with a released file, and a released file with --mllm; of a run give the "
            "folder, and where its base model has moved, model.mllm=PLACE"
        )
    return options


def locate(source: Path) -> tuple[Path, Path]:
    """(folder of the run, checkpoint) for either of the two."""
    from biascare.training.checkpoint import CheckpointStore

    if (source / "manifest.json").is_file():
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


def read_config(run: Path, overrides: list[str]) -> Config:
    """The run's resolved configuration. Its data need not be on this machine."""
    tree = read_tree(run / "config.yaml", overrides)
    result = build(Config, tree)
    problems = [*tree.problems, *result.problems]
    if problems or result.value is None:
        raise ConfigError(problems)
    return result.value


def load_trained(model: DualPathNetwork, checkpoint: Path) -> None:
    """Fill a model with what a checkpoint holds: everything that was trained."""
    import torch

    from biascare.training.checkpoint import trained_weights

    prefix = "model."  # of the model inside the training step
    weights = {k.removeprefix(prefix): v for k, v in trained_weights(checkpoint).items()}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    differing = sorted(wanted - weights.keys()) + sorted(weights.keys() - model.state_dict().keys())
    if differing:
        raise ValueError(
            f"{checkpoint} does not fit the configuration beside it: they differ in "
            f"{len(differing)} tensors, such as {differing[0]!r}; export it with the config.yaml "
            "of its own run"
        )
    with torch.no_grad():
        model.load_state_dict(weights, strict=False)


def cast(model: DualPathNetwork, dtype: torch.dtype) -> None:
    """Weights to `dtype`; buffers are positions and stay as they are."""
    from biascare.training.engine import fp32_buffers

    with fp32_buffers(model):
        model.to(dtype)


def export_released(options: argparse.Namespace) -> Path:
    """The authors' file as a merged export."""
    from functools import partial

    import torch

    from biascare.models.export_folder import build_network, save_network
    from biascare.models.language.pathway import load_processor
    from biascare.models.weights.released import load_released
    from biascare.reports.model_card import released_card
    from biascare.runs.export import refuse_existing, write_export

    output, source = Path(options.output), Path(options.source)
    refuse_existing(output)
    model = build_network(
        vision=options.vision,
        image_size=options.image_size,
        mllm=options.mllm,
        query_heads=options.query_heads,
        dtype=getattr(torch, PRECISIONS[options.dtype or "bf16"]),
    )
    report = str(load_released(model, source))
    print(report)

    def save(folder: Path) -> None:
        save_network(model, folder, merge=True, max_shard_size=options.max_shard_size)

    card = partial(released_card, source, report)
    write_export(output, save, card, load_processor(options.mllm))
    return output


def export(options: argparse.Namespace) -> Path:
    import torch
    from train import build_chat, build_network

    from biascare.models.export_folder import save_network
    from biascare.runs.export import refuse_existing, write_export
    from biascare.runs.origin import read_run

    output = Path(options.output)
    refuse_existing(output)
    folder, checkpoint = locate(Path(options.source))
    config = read_config(folder, options.overrides)
    if options.merge and config.train.stage == "vision":
        raise ValueError("--merge: the vision stage has no language model; leave it out")
    step = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["step"]
    facts = read_run(folder, step, to_dict(config))
    try:
        model, chat = build_network(config), build_chat(config)
    except ValueError as error:
        moved = " or ".join(f"{key}=PLACE" for key in MOVABLE)
        raise ValueError(f"{error}. Where files have moved since training, add {moved}") from error
    load_trained(model, checkpoint)
    cast(model, getattr(torch, PRECISIONS[options.dtype or config.train.precision]))

    def save(partial: Path) -> None:
        save_network(model, partial, merge=options.merge, max_shard_size=options.max_shard_size)

    write_export(output, save, facts, None if chat is None else chat.processor)
    return output


def main() -> None:
    options = parse(sys.argv[1:])
    from biascare.runs.process import prepare_process

    prepare_process()
    try:
        make = export if options.mllm is None else export_released
        print(f"exported to {make(options)}")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
