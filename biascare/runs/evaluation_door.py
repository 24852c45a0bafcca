"""The command line of evaluation: one for record folders, and one for each benchmark.

evaluate(__doc__)                           # scripts/evaluate.py
evaluate(__doc__, benchmark="vqa_rad")      # scripts/eval_vqa_rad.py

Nothing here loads torch before the arguments are found sound.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from biascare.runs.process import end_with_launcher, prepare_process
from biascare.settings.keys import ModelConfig


def evaluate(description: str | None, *, benchmark: str | None = None) -> None:
    """Evaluate as the command line says; ends the process."""
    options = parse(sys.argv[1:], description, benchmark)
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


def parse(
    arguments: Sequence[str], description: str | None, benchmark: str | None = None
) -> argparse.Namespace:
    """Options in the words of `EvaluationRequest`; ends the process for those that make no sense.

    `benchmark`: its folders and protocol stand in for those of the command line.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(segmentation=[], language=[], labelled=[], suite=None, data=None)
    parser.add_argument("model", help="exported folder, or (with --vision) foreign vision weights")
    _add_data(parser, benchmark)
    _add_model(parser)
    _add_protocol(parser, benchmark)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    del options.local_rank
    if benchmark:
        options.suite = benchmark
    folders = options.segmentation or options.language or options.labelled
    if not (folders or options.suite):
        parser.error(
            "nothing to evaluate: name folders after --segmentation, --language or --labelled, or "
            "benchmarks after --suite"
        )
    if options.suite and folders:
        parser.error("--suite has folders of its own: leave out all others")
    if options.suite and options.data is None and not Path(options.suite).is_file():
        parser.error("name the folder that holds the prepared benchmarks after --data")
    if (options.output is None) != bool(options.check_invariance):
        parser.error("name either a folder after --output or a number after --check-invariance")
    return options


def _add_data(parser: argparse.ArgumentParser, benchmark: str | None) -> None:
    add = parser.add_argument
    data = "folder that data_prep programs wrote to: it holds SOURCE/SPLIT"
    if benchmark:
        add("--data", type=Path, required=True, help=data)
    else:
        add("--segmentation", nargs="*", default=[], help="record folders with masks")
        add("--language", nargs="*", default=[], help="record folders with questions")
        names = "benchmarks, by their names with commas between, or a YAML file that lists them"
        add("--labelled", nargs="*", default=[], help="record folders with labels")
        add("--suite", metavar="NAMES|FILE", help=names)
        add("--data", type=Path, help=f"of --suite: {data}")
    add("--output", type=Path, help="folder to write to")
    add("--overwrite", action="store_true", help="replace what --output holds")
    train = (
        "training folders: items that stand there too are counted, and groups and discs of foreign "
        "weights follow from them; an export knows its own"
    )
    known = "cases.jsonl of the validation split by this model: triage fits its mix and thresholds"
    add("--validation", type=Path, metavar="CASES", help=known)
    masks = "folder for the predicted masks: PNG, and NIfTI of volumes whose place is known"
    add("--save-masks", type=Path, metavar="FOLDER", help=masks)
    add("--train", nargs="*", default=[], help=train)
    add("--prevalence", help="prevalence.json of another run or of data_bias.py")
    add("--allow-trained", action="store_true", help="score records that were trained on too")
    add("--limit", type=int, default=0, help="images and questions; 0: all")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--vision", help="architecture of foreign weights; the folder knows its own")
    size = ModelConfig().image_size
    add("--image-size", type=int, default=size, help="of foreign weights; pixels (%(default)s)")
    add("--mllm", help="where the base image-text model lies, if it has moved")
    add("--batch-size", type=int, default=16, help="images, or prompts (16)")
    add("--num-workers", type=int, default=0, help="processes that read (0)")


def _add_protocol(parser: argparse.ArgumentParser, benchmark: str | None) -> None:
    add = parser.add_argument
    add("--prompt", choices=("point", "box"), help="of the first prediction (point)")
    add("--corrections", type=int, default=1, help="simulated corrective clicks (1)")
    length = "as the benchmark states" if benchmark else "32"
    add("--max-new-tokens", type=int, help=f"of an answer that is no report ({length})")
    add("--max-report-tokens", type=int, default=256, help="of a report (256)")
    blind = (
        "ask every question also without its image, with a black and with another image "
        f"({'as the benchmark states' if benchmark else 'benchmarks: as they state; else no'})"
    )
    add("--blind", action=argparse.BooleanOptionalAction, default=None, help=blind)
    words = "ask every question also with other words about the patient's sex, age and race (no)"
    add("--counterfactual", action="store_true", help=words)
    check = "compute N images and questions in other batches, backwards and interrupted; compare"
    add("--check-invariance", type=int, metavar="N", default=0, help=check)
