"""Evaluate a model on held-out records: finished cases, a summary, a table, a contact sheet.

    python scripts/evaluate.py outputs/demo/stage2/export \\
        --segmentation outputs/demo/data/test --language outputs/demo/data/test \\
        --output outputs/evaluation

    python scripts/evaluate.py weights/lite_medsam.pth --vision litemedsam --prompt box \\
        --segmentation outputs/data/pack/btcv/test --output outputs/litemedsam

The second form takes foreign vision weights as they are. Writes cases.jsonl, metrics.json and
contact_sheet.png to the output folder; numbers can be computed again from cases.jsonl without the
model. The same command goes on where it was interrupted; `deepspeed scripts/evaluate.py` divides
the work among ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from biascare.settings.keys import ModelConfig


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="exported folder, or (with --vision) foreign vision weights")
    add("--vision", help="architecture of foreign weights; the folder knows its own")
    size = ModelConfig().image_size
    add("--image-size", type=int, default=size, help="of foreign weights; pixels (%(default)s)")
    add("--segmentation", nargs="*", default=[], help="record folders with masks")
    add("--language", nargs="*", default=[], help="record folders with questions")
    add("--output", type=Path, help="folder to write to")
    add("--overwrite", action="store_true", help="replace what --output holds")
    train = "training folders of foreign weights, for groups and discs; an export knows its own"
    add("--train", nargs="*", default=[], help=train)
    add("--prevalence", help="prevalence.json of another run or of data_bias.py")
    add("--allow-trained", action="store_true", help="score records that were trained on too")
    add("--mllm", help="where the base image-text model lies, if it has moved")
    add("--prompt", choices=("point", "box"), default="point", help="of the first prediction")
    add("--corrections", type=int, default=1, help="simulated corrective clicks (1)")
    add("--batch-size", type=int, default=16, help="images, or questions (16)")
    add("--num-workers", type=int, default=0, help="processes that read (0)")
    add("--max-new-tokens", type=int, default=32, help="of an answer (32)")
    add("--limit", type=int, default=0, help="images and questions; 0: all")
    check = "compute N images and questions in other batches, backwards and interrupted; compare"
    add("--check-invariance", type=int, metavar="N", default=0, help=check)
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    del options.local_rank
    if not (options.segmentation or options.language):
        parser.error("nothing to evaluate: name folders after --segmentation or --language")
    if (options.output is None) != bool(options.check_invariance):
        parser.error("name either a folder after --output or a number after --check-invariance")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    from biascare.runs.process import end_with_launcher, prepare_process

    end_with_launcher()
    prepare_process()
    from rich.console import Console

    from biascare.runs.evaluate import EvaluationRequest, carry_out
    from biascare.runs.faults import MachineError, explained

    try:
        with explained(options.output or Path.cwd()):
            shown, passed = carry_out(EvaluationRequest(**vars(options)))
    except (ValueError, OSError, MachineError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    if os.environ.get("RANK", "0") == "0":
        Console().print(*shown, sep="\n", soft_wrap=True)
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
