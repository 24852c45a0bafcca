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
import re
import sys
from pathlib import Path

from biascare.runs.process import prepare_process
from biascare.settings.keys import MOVABLE, ModelConfig


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
    add, sizes = parser.add_argument, ModelConfig()
    add("source", type=Path, help="folder of a run, one of its checkpoints, or a released file")
    add("overrides", nargs="*", type=override, metavar="key=PLACE", help="|".join(MOVABLE))
    add("--output", type=Path, required=True, help="folder to write; must not exist")
    add("--merge", action="store_true", help="fold the adapter into the base")
    add("--max-shard-size", type=shard_size, default="4GB", help="of merged weights (4GB)")
    add("--dtype", choices=("bf16", "fp32"), help="default: the precision of the run")
    add = parser.add_argument_group("of a released file").add_argument
    add("--mllm", help="folder or Hub id of the image-text model it adapts")
    add("--vision", default=sizes.vision, help="architecture (%(default)s)")
    add("--image-size", type=int, default=sizes.image_size, help="pixels (%(default)s)")
    add("--query-heads", type=int, default=sizes.query_heads, help="of Eq. 1 (%(default)s)")
    add("--lora-alpha", type=float, default=sizes.lora_alpha, help="of its adapter (%(default)s)")
    options = parser.parse_intermixed_args(arguments)
    if options.source.is_file() != (options.mllm is not None):
        parser.error(
            "--mllm goes with a released file, and a released file with --mllm; of a run give the "
            "folder, and where its base model has moved, model.mllm=PLACE"
        )
    return options


def export(options: argparse.Namespace) -> None:
    from biascare.runs.export import export_checkpoint, export_released

    given = vars(options)
    shared = {name: given[name] for name in ("source", "output", "max_shard_size", "dtype")}
    if options.mllm is None:
        export_checkpoint(**shared, overrides=options.overrides, merge=options.merge)
    else:
        names = ("mllm", "vision", "image_size", "query_heads", "lora_alpha")
        export_released(**shared, **{name: given[name] for name in names})


def main() -> None:
    options = parse(sys.argv[1:])
    prepare_process()
    try:
        export(options)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"exported to {options.output}")


if __name__ == "__main__":
    main()
