"""Mixed real images with a `manifest.jsonl` -> record folders, one per source and split.

    python data_prep/sample_pack.py --source pack --output prepared/pack

Each line of the manifest is one image: id, source, split, image, modality, masks
{target: {file, value, pixels}} (mask = PNG == value), labels, qa, text, sex, age, boxes, meta.
Masks become targets; questions become closed or open turns; labels become questions in several
wordings; notes become reports. A label without a rule of its own becomes a question too, among the
values that it takes in its source, and is named when the program starts. Wording and order of
options are drawn by the image's own seed, so a run repeats itself. What the source does not know
(sex, age, patient) stays unknown. A manifest with other values than these is refused with line and
key.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from biascare.choices import unknown
from biascare.records import MAX_OPTIONS, Record, Turn, image_size
from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep.formats.orientation import orientation_of, turn_image, turn_mask
from data_prep.pipeline import shards
from data_prep.pipeline.attributes import UNKNOWN, age_of, sex_of
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import file_inside, note
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError
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

SHARED_LABELS = ("findings", "benign_malignant", "localization")
"""Labels that are asked in the same words whatever their source."""

NOT_ASKED = ("dx_type",)
"""How a diagnosis was made, which no image shows."""

OTHER_QUESTIONS = (
    "What is the {label}?",
    "Name the {label} in this image.",
    "Which {label} applies to this image?",
)

FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "id": ((str,), "a text"),
    "source": ((str,), "a text"),
    "split": ((str,), "train, val or test"),
    "patient_id": ((str, NoneType), "a text or null"),
    "image": ((str,), "a path"),
    "orig_size": ((list, NoneType), "[width, height] or null"),
    "modality": ((str,), "a modality"),
    "body_part": ((str, NoneType), "a text or null"),
    "masks": ((dict,), "an object, {} without masks"),
    "boxes": ((list,), "a list, [] without boxes"),
    "labels": ((dict,), "an object, {} without labels"),
    "sex": ((str, NoneType), "F, M or null"),
    "age": ((int, float, str, NoneType), "years or null"),
    "text": ((str, NoneType), "a text or null"),
    "qa": ((list,), "a list, [] without questions"),
    "license": ((str,), "a text"),
    "meta": ((dict,), "an object, {} without facts"),
}
"""Key of a line -> types it may have, and how they are told."""

MASK_FIELDS: dict[str, type | tuple[type, ...]] = {"file": str, "value": int, "pixels": int}
QUESTION_FIELDS: dict[str, type | tuple[type, ...]] = {
    "q": str, "a": (str, int, float), "answer_type": str,
}  # fmt: skip
SPLITS = ("train", "val", "test")
MAX_PROBLEMS = 5
MAX_SHOWN = 80
"""Characters of a value that a message quotes."""

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
    others = {name: other_labels(name, lines) for name in {name for name, _ in groups}}
    return [
        Release(
            source=name,
            split=split,
            version="sample pack",
            licence="; ".join(sorted({line["license"] for line in chosen})),
            items=chosen,
            convert=partial(build_record, source, others[name]),
            name_of=name_of,
            promises_masks=any(line["masks"] for line in chosen),
        )
        for (name, split), chosen in sorted(groups.items())
    ]


def name_of(line: dict[str, Any]) -> str:
    return str(line["id"])


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Lines of the manifest. Raises ValueError with line and key for what it must not hold."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --source is the folder that holds manifest.jsonl")
    lines, problems = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        problems += [f"{path}:{number}: {problem}" for problem in line_problems(lines[-1])]
    # Together and before any work: a manifest is written by a program, and errs in many lines.
    if problems:
        more = len(problems) - MAX_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise ValueError("\n".join([*problems[:MAX_PROBLEMS], *rest]))
    return lines


def line_problems(line: Any) -> list[str]:
    """What a line holds that it must not: its key, what was got, what was expected."""
    if not isinstance(line, dict):
        return [f"expected an object, got {type(line).__name__}"]
    problems = []
    for key, (types, told) in FIELDS.items():
        # True is an int of Python and no number of years.
        if key not in line or not isinstance(line[key], types) or isinstance(line[key], bool):
            got = json.dumps(line[key])[:MAX_SHOWN] if key in line else "no such key"
            problems.append(f"{key}: expected {told}, got {got}")
    # What fields hold is looked at when all of them are there.
    return problems or list(_content_problems(line))


def _content_problems(line: dict[str, Any]) -> Iterator[str]:
    if line["split"] not in SPLITS:
        yield unknown("split", line["split"], SPLITS)
    for key, read in (("modality", canonical_modality), ("sex", sex_of), ("age", age_of)):
        try:
            read("" if line[key] is None else str(line[key]))
        except ValueError as error:
            yield f"{key}: {error}"
    for key, entries, kinds in (
        *((f"masks, {name!r}", [entry], MASK_FIELDS) for name, entry in line["masks"].items()),
        ("qa", line["qa"], QUESTION_FIELDS),
    ):
        for entry in entries:
            is_object = isinstance(entry, dict)
            if not is_object or not all(isinstance(entry.get(k), t) for k, t in kinds.items()):
                got = json.dumps(entry)[:MAX_SHOWN]
                yield f"{key}: expected an object with {', '.join(kinds)}, got {got}"
    labels = line["labels"]
    findings = labels.get("findings", [])
    if not (isinstance(findings, list) and all(isinstance(text, str) for text in findings)):
        yield f"labels, findings: expected a list of texts, got {json.dumps(findings)[:MAX_SHOWN]}"
    if not isinstance(labels.get("localization"), (str, NoneType)):
        yield "labels, localization: expected a text or null"
    choice = CHOICES.get(line["source"])
    if choice and labels.get(choice.label) is not None:
        value = labels[choice.label]
        if not isinstance(value, str) or value not in choice.options:
            yield unknown(f"labels, {choice.label}", value, choice.options)


class OtherLabel(NamedTuple):
    """A label of one source that no rule is written for."""

    key: str
    values: tuple[str, ...]  # that it takes in its source, in order


def other_labels(source: str, lines: list[dict[str, Any]]) -> tuple[OtherLabel, ...]:
    """Labels of a source without a rule of their own; each is told with its count."""
    choice = CHOICES.get(source)
    known = {*SHARED_LABELS, *NOT_ASKED, choice.label if choice else ""}
    found: dict[str, list[str]] = {}
    for line in lines:
        for key, value in line["labels"].items():
            text = label_text(value)
            if line["source"] == source and key not in known and text:
                found.setdefault(key, []).append(text)
    labels = []
    for key, texts in sorted(found.items()):
        labels.append(OtherLabel(key, tuple(sorted(set(texts)))))
        shown = ", ".join(labels[-1].values[:MAX_PROBLEMS])
        note(
            f"{source}: the label {key!r} of {len(texts)} images has no rule of its own and is "
            f"asked in general words, among {len(labels[-1].values)} values ({shown})"
        )
    return tuple(labels)


def label_text(value: Any) -> str:
    """A label as a person writes it; empty when it says nothing."""
    texts = value if isinstance(value, list) else [value]
    words = {None: "", True: "yes", False: "no"}
    plain = [
        words[text] if text is None or isinstance(text, bool) else one_line(str(text))
        for text in texts
    ]
    told = ", ".join(text for text in plain if text)
    return "" if told.lower() in UNKNOWN else told


def build_record(source: Path, others: tuple[OtherLabel, ...], line: dict[str, Any]) -> Incomplete:
    """One line of the manifest -> record. Raises UnusableItemError with the reason."""
    # By source, as for IMed-361M: slices of BTCV lie with the spine up.
    turn = orientation_of(line["source"]).turn
    image = file_inside(source, line["image"]).read_bytes()
    try:
        size = image_size(image)
        image = turn_image(image, turn)
    except (ValueError, OSError, SyntaxError) as error:
        raise UnusableItemError("image unreadable") from error
    targets, lost = [], []
    for name, entry in line["masks"].items():
        try:
            mask = turn_mask(_mask(source, name, entry, size), turn)
            targets.append((canonical_target(name), mask))
        except UnusableItemError as reason:
            lost.append(str(reason))
    height, width = image_size(image)
    conversations = build_conversations(line, others)
    if lost and not (targets or conversations):
        raise UnusableItemError("; ".join(lost))
    record = Record(
        id=line["id"],
        image=image,
        height=height,
        width=width,
        targets=targets,
        conversations=conversations,
        task=_task(line, conversations),
        modality=canonical_modality(line["modality"]),
        anatomy=line["body_part"] or "",
        labels=build_labels(line, others),
        source=line["source"],
        split=line["split"],
        patient_id=line["patient_id"] or None,
        study_id=None,
        sex=sex_of(line["sex"] or ""),
        age=age_of("" if line["age"] is None else str(line["age"])),
        race=None,
        extra=_extra(line),
    )
    return Incomplete(record, "; ".join(lost))


def build_labels(line: dict[str, Any], others: tuple[OtherLabel, ...] = ()) -> list[str]:
    """Findings and diagnoses in full words; acronyms keep their case. Labels without a rule carry
    their name: "left" alone would say nothing."""
    labels = line["labels"]
    named = [f"{key}: {text}" for key, text, _ in _stated(line, others)]
    if "findings" in labels:
        # NIH writes Pleural_Thickening, and answers are read by people and language models.
        return [finding.replace("_", " ") for finding in labels["findings"]] + named
    question = CHOICES.get(line["source"])
    known = question is not None and labels.get(question.label) is not None
    return ([question.options[labels[question.label]]] if question and known else []) + named


def _stated(
    line: dict[str, Any], others: tuple[OtherLabel, ...]
) -> list[tuple[str, str, OtherLabel]]:
    """(name, text, label) of the labels without a rule that the line has."""
    texts = [(other, label_text(line["labels"].get(other.key))) for other in others]
    return [(other.key.replace("_", " "), text, other) for other, text in texts if text]


def build_conversations(line: dict[str, Any], others: tuple[OtherLabel, ...] = ()) -> list[Turn]:
    """Questions of the source, questions made from labels, the note: in this order."""
    # The order of what follows is part of the data: wordings are drawn one after another.
    draw = draw_for(line["id"])
    turns = [turn for item in line["qa"] for turn in question_turns(item)]
    turns += _label_turns(line, draw)
    for name, text, other in _stated(line, others):
        wording = draw.choice(OTHER_QUESTIONS).format(label=name)
        # Lists of values are no options: the right one would be the only one with commas.
        if 2 <= len(other.values) <= MAX_OPTIONS and isinstance(line["labels"][other.key], str):
            turns += choice_turns(wording, other.values, text, draw)
        else:
            turns += pair(wording, text, "open")
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
    question = CHOICES.get(line["source"])
    if question and line["labels"].get(question.label) is not None:
        wording = draw.choice(question.wordings)
        turns += choice_turns(wording, list(question.options.values()), labels[0], draw)
    if line["labels"].get("findings"):
        turns += pair(draw.choice(FINDING_QUESTIONS), ", ".join(labels), "open")
    # NIH's labels cover fourteen findings of every image: one that is not listed was not found in
    # the report.
    if line["source"] == "nih" and labels:
        # One present finding among absent ones, so that exactly one option is right.
        answer = draw.choice(labels)
        absent = [name for name in (*NIH_FINDINGS, NO_FINDING) if name not in labels]
        options = [answer, *draw.sample(absent, NUM_CHOICES - 1)]
        turns += choice_turns(draw.choice(FINDING_CHOICES), options, answer, draw)
    # "indeterminate" is neither, and must not become a no.
    if line["labels"].get("benign_malignant") in ("benign", "malignant"):
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
