"""Evaluate a model on held-out records: rows, a summary, a table, a contact sheet.

    python scripts/evaluate.py outputs/demo/stage2/export \\
        --segmentation outputs/demo/data/test --language outputs/demo/data/test \\
        --train outputs/demo/data/train --output outputs/evaluation

    python scripts/evaluate.py weights/lite_medsam.pth --vision litemedsam --prompt box \\
        --segmentation outputs/data/pack/btcv/test --output outputs/litemedsam

The second form takes foreign vision weights as they are. Writes predictions.jsonl, metrics.json and
contact_sheet.png to the output folder. Metrics can be computed again from predictions.jsonl without
the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biascare.models.export_folder import open_network
from biascare.settings.keys import EvalConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from biascare.models.network import DualPathNetwork
    from biascare.records import Records

ROWS = "predictions.jsonl"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="exported folder, or (with --vision) foreign vision weights")
    parser.add_argument(
        "--vision", help="architecture of foreign weights; the folder knows its own"
    )
    parser.add_argument("--image-size", type=int, default=256, help="of foreign weights; pixels")
    parser.add_argument("--segmentation", nargs="*", default=[], help="record folders with masks")
    parser.add_argument("--language", nargs="*", default=[], help="record folders with questions")
    parser.add_argument(
        "--train",
        nargs="*",
        default=[],
        help="training folders: give prevalence groups and the disc baseline",
    )
    parser.add_argument(
        "--prevalence", help="prevalence.json of a run or of data_bias.py, instead of --train's"
    )
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    parser.add_argument("--mllm", help="where the base image-text model lies, if it has moved")
    parser.add_argument(
        "--prompt", choices=("point", "box"), default="point", help="of the first prediction"
    )
    parser.add_argument("--clicks", type=int, default=1, help="simulated corrections (1)")
    parser.add_argument("--batch-size", type=int, default=16, help="images, or questions (16)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read (0)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (32)")
    parser.add_argument("--limit", type=int, default=0, help="images and questions; 0: all")
    return parser.parse_args(arguments)


def training_masks(
    sources: list[Records], limit: int = 1000
) -> Iterator[tuple[str, np.ndarray, tuple[int, int]]]:
    """(target, mask, first click) of at most `limit` evenly spaced training images."""
    from biascare.data.prompts import first_point
    from biascare.records import decode_mask

    rows = [(records, int(i)) for records in sources for i in records.segmentation_units]
    for records, i in rows[:: -(-len(rows) // limit)]:
        row = records[i]
        for target in row["targets"]:
            mask = decode_mask(target["rle"], row["height"], row["width"])
            yield target["name"], mask, first_point(mask)


def open_model(options: argparse.Namespace) -> DualPathNetwork:
    """An export, or foreign vision weights without a language model."""
    from biascare.models.export_folder import build_network

    if options.vision is None:
        return open_network(options.model, mllm=options.mllm)[0]
    return build_network(
        vision=options.vision, image_size=options.image_size, vision_weights=options.model
    )


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from biascare.data.chat import ChatBuilder
    from biascare.data.heldout import HeldOutImages, HeldOutQuestions, check_held_out
    from biascare.data.prevalence import groups_of, total_counts
    from biascare.evaluation.metrics.segmentation import fit_disc
    from biascare.evaluation.runner import (
        RunnerSettings,
        answer_rows,
        segmentation_rows,
        summarise,
        write_rows,
    )
    from biascare.models.language.pathway import load_processor
    from biascare.records import Records
    from biascare.reports.sheets import contact_sheet, mask_panels, representative_targets

    train = [Records(path) for path in options.train]
    segmentation, language = (
        [Records(path) for path in paths] for paths in (options.segmentation, options.language)
    )
    check_held_out(train, segmentation + language)
    shares = EvalConfig()
    counts = total_counts(records.target_counts for records in train)
    groups = groups_of(options.prevalence, counts, shares.head_share, shares.tail_share)
    model = open_model(options)
    size = model.vision.image_size
    chat = None
    if model.mllm is not None:
        processor = load_processor(str(Path(options.model) / "processor"))
        chat = ChatBuilder(processor, image_size=size, max_tokens=1 << 20)
    settings = RunnerSettings(
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        num_clicks=options.clicks,
        max_new_tokens=options.max_new_tokens,
        prompt=options.prompt,
    )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"image_size": size, "limit": options.limit}
    images = HeldOutImages(segmentation, chat, groups, **about)
    if options.language and chat is None:
        print(f"{options.model} answers no questions: --language is left out", file=sys.stderr)
    questions = HeldOutQuestions(language if chat else [], chat, groups, **about)
    discs = fit_disc(training_masks(train)) if train and options.segmentation else None
    masks = segmentation_rows(model, images, settings, discs) if len(images) else []
    answers = answer_rows(model, questions, settings) if len(questions) else []
    summary = {"model": str(options.model)} | summarise(masks, answers)
    write_rows(masks + answers, folder / ROWS)
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    if masks and groups:
        panels = mask_panels(model, images, representative_targets(masks))
        contact_sheet(panels, folder / "contact_sheet.png", f"{options.model}, held-out records")
    return summary


def main() -> None:
    options = parse(sys.argv[1:])
    if not (options.segmentation or options.language):
        sys.exit("nothing to evaluate: name folders after --segmentation or --language")
    earlier = Path(options.output) / ROWS
    if earlier.exists() and not options.overwrite:
        sys.exit(f"{earlier} holds an earlier evaluation; name another --output or --overwrite it")
    from biascare.runs.process import prepare_process

    prepare_process()
    from rich.console import Console

    from biascare.reports.tables import evaluation_table

    try:
        summary = evaluate(options)
    except ValueError as error:
        sys.exit(str(error))
    Console().print(evaluation_table(summary, str(options.model)))
    print(f"rows, metrics and contact sheet are in {options.output}")


if __name__ == "__main__":
    main()
