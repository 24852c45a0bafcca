"""Mixed real images with a `manifest.jsonl` -> record folders, one per source and split.

    python data_prep/sample_pack.py --source pack --output prepared/pack

Each line of the manifest is one image: id, source, split, image, modality, masks
{target: {file, value, pixels}} (mask = PNG == value), labels, qa, text, sex, age, boxes, meta.
Masks become targets; questions become closed or open turns; labels become questions in several
wordings; notes become reports. Wording and order of options are drawn by the image's own seed, so a
run repeats itself. What the source does not know (sex, age, patient) stays unknown.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from biascare.records import Record, Turn, image_size
from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep.formats.orientation import orientation_of, turn_image, turn_mask
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import file_inside
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import (
    DIAGNOSES,
    FINDING_QUESTIONS,
    LOCALIZATION_QUESTIONS,
    MALIGNANCY_QUESTIONS,
    choice_turns,
    draw_for,
    facts_of,
    one_line,
    pair,
    question_of,
    turns_of,
)

NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis",
    "Hernia", "Infiltration", "Mass", "Nodule", "Pleural Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
"""The 14 findings of NIH ChestX-ray14."""

QUESTION_FACTS = ("qid", "official_split", "answer_type", "question_type", "phrase_type")
"""What the manifest says of a question, under the same keys."""

NO_FINDING = "No Finding"
NUM_CHOICES = 4
FINDING_CHOICES = (
    "Which of these findings is present in this chest X-ray?",
    "Choose the finding that this chest radiograph shows.",
)
REPORT_REQUESTS = (
    "Write a short clinical note for this chest X-ray.",
    "Describe this chest X-ray with its clinical context.",
    "Please report this chest X-ray.",
)


class ChoiceQuestion(NamedTuple):
    """A label of one source that is asked as a multiple-choice question."""

    label: str  # key in the manifest's labels
    options: dict[str, str]  # value in the manifest -> answer
    wordings: tuple[str, ...]


CHOICES = {
    "ham10000": ChoiceQuestion(
        "dx",
        DIAGNOSES,
        (
            "What is the diagnosis of this skin lesion?",
            "Which diagnosis fits this dermoscopic image best?",
            "Choose the most likely diagnosis of the lesion.",
        ),
    ),
    "isic2017": ChoiceQuestion(
        "diagnosis",
        {"melanoma": "melanoma", "nevus": "nevus"},
        (
            "What is the diagnosis of this skin lesion?",
            "Is this lesion a melanoma or a nevus?",
            "Which diagnosis fits this dermoscopic image?",
        ),
    ),
    "busi": ChoiceQuestion(
        "class",
        {"normal": "normal", "benign": "benign", "malignant": "malignant"},
        (
            "How would you classify this breast ultrasound?",
            "Which class does this breast ultrasound image belong to?",
            "Does this breast ultrasound look normal, benign or malignant?",
        ),
    ),
    "wbc1": ChoiceQuestion(
        "cell_type",
        {name: name for name in ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")},
        (
            "Which type of white blood cell is this?",
            "What kind of leukocyte does this smear show?",
            "Name the type of the white blood cell in the image.",
        ),
    ),
}
"""Source -> its choice question."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="folder with manifest.jsonl")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    source = Path(args.source)
    shards.run(args, releases(source, read_manifest(source / "manifest.jsonl")))


def releases(source: Path, lines: list[dict[str, Any]]) -> list[Release]:
    """Lines of the manifest -> one release per source and split."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["source"], line["split"]), []).append(line)
    return [
        Release(
            source=name,
            split=split,
            version="sample pack",
            licence="; ".join(sorted({line["license"] for line in chosen})),
            items=chosen,
            convert=partial(build_record, source),
            name_of=name_of,
        )
        for (name, split), chosen in sorted(groups.items())
    ]


def name_of(line: dict[str, Any]) -> str:
    return str(line["id"])


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Lines of the manifest. Raises ValueError with the line number for what is not JSON."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --source is the folder that holds manifest.jsonl")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return lines


def build_record(source: Path, line: dict[str, Any]) -> Record:
    """One line of the manifest -> record. Raises UnusableItemError with the reason."""
    # By source, as for IMed-361M: slices of BTCV lie with the spine up.
    turn = orientation_of(line["source"]).turn
    image = file_inside(source, line["image"]).read_bytes()
    try:
        size = image_size(image)
        image = turn_image(image, turn)
    except (ValueError, OSError, SyntaxError) as error:
        raise UnusableItemError("image unreadable") from error
    targets = [
        (canonical_target(name), turn_mask(_mask(source, name, entry, size), turn))
        for name, entry in line["masks"].items()
    ]
    height, width = image_size(image)
    conversations = build_conversations(line)
    return Record(
        id=line["id"],
        image=image,
        height=height,
        width=width,
        targets=targets,
        conversations=conversations,
        task=_task(line, conversations),
        modality=canonical_modality(line["modality"]),
        anatomy=line["body_part"] or "",
        labels=build_labels(line),
        source=line["source"],
        split=line["split"],
        patient_id=line["patient_id"],
        study_id=None,
        sex=line["sex"],
        age=line["age"],
        race=None,
        extra=_extra(line),
    )


def build_labels(line: dict[str, Any]) -> list[str]:
    """Findings and diagnoses in full words; acronyms keep their case."""
    labels = line["labels"]
    if "findings" in labels:
        # NIH writes Pleural_Thickening, and answers are read by people and language models.
        return [finding.replace("_", " ") for finding in labels["findings"]]
    question = CHOICES.get(line["source"])
    return [question.options[labels[question.label]]] if question else []


def build_conversations(line: dict[str, Any]) -> list[Turn]:
    """Questions of the source, questions made from labels, the note: in this order."""
    # The order of what follows is part of the data: wordings are drawn one after another.
    draw = draw_for(line["id"])
    turns = [turn for item in line["qa"] for turn in question_turns(item)]
    turns += _label_turns(line, draw)
    if line["text"]:
        turns += pair(draw.choice(REPORT_REQUESTS), one_line(line["text"]), "report")
    return turns


def question_turns(item: dict[str, Any]) -> list[Turn]:
    """A question of VQA-RAD's form. Yes and no of a closed question are written "yes" and "no"."""
    kind = item["answer_type"].strip().lower()
    if kind not in ("closed", "open"):
        raise UnusableItemError(f"question of unknown type {item['answer_type']!r}")
    facts = facts_of(**{key: item.get(key) for key in QUESTION_FACTS})
    try:
        return turns_of([question_of(str(item["q"]), str(item["a"]), kind)], [facts])
    except ValueError as error:
        raise UnusableItemError(str(error)) from error


def _label_turns(line: dict[str, Any], draw: random.Random) -> list[Turn]:
    labels, turns = build_labels(line), []
    if line["source"] in CHOICES:
        question = CHOICES[line["source"]]
        wording = draw.choice(question.wordings)
        turns += choice_turns(wording, list(question.options.values()), labels[0], draw)
    if "findings" in line["labels"]:
        turns += pair(draw.choice(FINDING_QUESTIONS), ", ".join(labels), "open")
    # NIH's labels cover fourteen findings of every image: one that is not listed was not found in
    # the report.
    if line["source"] == "nih":
        # One present finding among absent ones, so that exactly one option is right.
        answer = draw.choice(labels)
        absent = [name for name in (*NIH_FINDINGS, NO_FINDING) if name not in labels]
        options = [answer, *draw.sample(absent, NUM_CHOICES - 1)]
        turns += choice_turns(draw.choice(FINDING_CHOICES), options, answer, draw)
    if "benign_malignant" in line["labels"]:
        answer = "yes" if line["labels"]["benign_malignant"] == "malignant" else "no"
        turns += pair(draw.choice(MALIGNANCY_QUESTIONS), answer, "closed")
    if line["labels"].get("localization") not in (None, "unknown"):
        site = line["labels"]["localization"]
        turns += pair(draw.choice(LOCALIZATION_QUESTIONS), site, "open")
    return turns


def _task(line: dict[str, Any], conversations: list[Turn]) -> str:
    """What the image is mainly for; an image with masks and questions serves both."""
    if line["qa"]:
        return "vqa"
    if line["text"]:
        return "report"
    if conversations:
        return "classification"
    return "segmentation"


def _extra(line: dict[str, Any]) -> dict[str, Any]:
    """Facts of the source that have no field of their own."""
    facts = {
        "labels": line["labels"],
        "boxes": line["boxes"],
        "licence": line["license"],
        "original_size": line["orig_size"],
        **line["meta"],
    }
    return {key: value for key, value in facts.items() if value not in (None, [], {})}


def _mask(source: Path, name: str, entry: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Mask of one target -> bool [H, W], checked against the image size and the stated pixels."""
    try:
        with Image.open(file_inside(source, entry["file"]), formats=("PNG",)) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise UnusableItemError(f"mask of {name} unreadable") from error
    if values.shape != size:
        raise UnusableItemError(f"mask of {name} and image differ in size")
    mask: np.ndarray = values == entry["value"]
    # The manifest was counted when the pack was made; another number is another file.
    if int(mask.sum()) != entry["pixels"] or not mask.any():
        raise UnusableItemError(f"mask of {name} does not have the stated number of pixels")
    return mask


if __name__ == "__main__":
    run_program(main)
