"""The benchmarks: which records, which numbers count first, and what they are split by.

    benchmark = BENCHMARKS["vqa_rad"]
    found = primary_scores(benchmark, cases, measured)

A literal table. What is not in it (prompts, corrections, lengths) is the same for all and stands in
the header of the cases.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biascare.choices import unknown
from biascare.data.prevalence import prevalence_groups
from biascare.evaluation.cases import AnswerCase, Cases, FinishedCase, LabelCase, MaskCase
from biascare.evaluation.metrics.answers import (
    CLOSED,
    is_correct,
    normalise_answer,
    open_recall,
    option_is_correct,
    read_closed,
    readings_table,
)
from biascare.evaluation.metrics.bootstrap import clustered, patients_of
from biascare.evaluation.metrics.classification import (
    choices_as_labels,
    scored_labels,
    summarise_labels,
)
from biascare.evaluation.metrics.groups import age_band
from biascare.evaluation.metrics.reports import report_scores
from biascare.settings.keys import EvalConfig

ScoresOf = Callable[[Sequence[Any]], dict[str, "Score"]]
GroupOf = Callable[[Any], str | None]


class Score(NamedTuple):
    """One number that a benchmark is known by."""

    value: float | None  # None where there is nothing to compute it from
    num: int
    low: float | None = None  # 95 % interval, patients (or images) drawn together
    high: float | None = None


class Benchmark(NamedTuple):
    """One protocol."""

    title: str
    task: str  # language | segmentation | labels
    folders: tuple[str, ...]  # below the folder of prepared data; `*` stands for any name
    official: int | None  # items of the official release that are scored; None: not one number
    item: str  # what is counted
    scores: ScoresOf  # of the cases that are scored
    groups: Mapping[str, GroupOf]  # what the scores are split by
    kinds: tuple[str, ...] = ()  # of the questions that are scored
    blind: bool = False  # whether answers are compared with those without the image
    training_counts: Mapping[str, int] = {}  # of labels, where the release publishes them
    max_new_tokens: int = 32  # of what is no report
    note: str = ""  # what a reader of its numbers has to know
    shown: tuple[str, ...] = ()  # scores that groups are shown by


# ---------------------------------------------------------------- what is scored


def mean_score(cases: Sequence[FinishedCase], values: Sequence[float]) -> Score:
    """Mean with its interval; NaN values leave their cases out."""
    if not len(cases):
        return Score(None, 0)
    drawn = clustered(values, patients_of([case.facts for case in cases]))
    low, high = drawn.interval()
    num = int((~np.isnan(np.asarray(values, np.float64))).sum())
    if not num:
        return Score(None, 0)
    return Score(float(drawn.estimate[0]), num, float(low[0]), float(high[0]))


def _is_closed(case: AnswerCase) -> bool:
    return normalise_answer(case.reference) in CLOSED


def vqa_scores(cases: Sequence[AnswerCase]) -> dict[str, Score]:
    """Questions whose answer is yes or no, and open ones."""
    closed = [case for case in cases if _is_closed(case)]
    others = [case for case in cases if not _is_closed(case)]
    right = [
        float(read_closed(case.text, CLOSED) == normalise_answer(case.reference)) for case in closed
    ]
    scores = {"closed accuracy": mean_score(closed, right)}
    strict = readings_table(closed).get("strict", {})
    for name in ("f1", "precision", "recall"):
        scores[f"closed macro {name}"] = Score(strict.get(f"macro_{name}"), len(closed))
    scored = [case for case in closed if case.option_log_probs is not None]
    scores["closed accuracy by option"] = mean_score(
        scored, [float(bool(option_is_correct(case))) for case in scored]
    )
    recall = [open_recall(case.text, case.reference) for case in others]
    return scores | {"open recall": mean_score(others, recall)}


def choice_scores(cases: Sequence[AnswerCase]) -> dict[str, Score]:
    """One of several options, by its likelihood and by the text."""
    scored = [case for case in cases if case.option_log_probs is not None]
    text = [float(is_correct(case.text, case)) for case in cases]
    return {
        "accuracy by option": mean_score(
            scored, [float(bool(option_is_correct(case))) for case in scored]
        ),
        "accuracy by text": mean_score(cases, text),
    }


def class_scores(cases: Sequence[AnswerCase | LabelCase]) -> dict[str, Score]:
    """One of several classes: by the likeliest option, by the text, or by a head."""
    answers = [case for case in cases if isinstance(case, AnswerCase)]
    labels = [case for case in cases if isinstance(case, LabelCase)]
    scores = {}
    for name, mine in (("by option", choices_as_labels(answers)), ("by head", labels)):
        table = summarise_labels(mine)
        if table["num"]:
            for key in ("accuracy", "balanced_accuracy"):
                low, high = table[f"{key}_interval"]
                words = key.replace("_", " ")
                scores[f"{words} {name}"] = Score(table[key], table["num"], low, high)
    if answers:
        text = [float(is_correct(case.text, case)) for case in answers]
        scores["accuracy by text"] = mean_score(answers, text)
    return scores


def finding_scores(cases: Sequence[LabelCase]) -> dict[str, Score]:
    """Any number of findings."""
    table = summarise_labels(cases)
    scores = {}
    for key, words in (("macro_average_precision", "macro mAP"), ("macro_auroc", "macro AUROC")):
        low, high = table.get(f"{key}_interval", (None, None))
        scores[words] = Score(table.get(key), table["num"], low, high)
    for key, words in (("macro_f1", "macro F1"), ("macro_accuracy", "macro accuracy")):
        # Their thresholds are chosen on the development split.
        scores[words] = Score(table.get(key), table["num"])
    return scores


def mask_scores(cases: Sequence[tuple[MaskCase, Mapping[str, float]]]) -> dict[str, Score]:
    """Masks by the first prompt at native size, and the last correction."""
    masks = [case for case, _ in cases]
    wanted = {"Dice": "dice", "IoU": "iou", "NSD at 2 px": "nsd", "HD95, px": "hd95"}
    wanted |= {"Dice at 256": "dice_256", "IoU at 256": "iou_256", "Dice by text": "dice_text"}
    last = max((len(case.predictions) for case in masks), default=1) - 1
    if last:
        wanted[f"Dice after {last} corrections"] = f"dice_click_{last}"
    return {
        name: mean_score(masks, [scores.get(key, np.nan) for _, scores in cases])
        for name, key in wanted.items()
        if any(key in scores for _, scores in cases)
    }


def text_scores(cases: Sequence[AnswerCase]) -> dict[str, Score]:
    """Reports and descriptions, word by word."""
    found = report_scores([c.text for c in cases], [c.reference for c in cases])
    names = {"BLEU-1": "bleu1", "ROUGE-1": "rouge1", "BLEU-1 without penalty": "bleu1_no_bp"}
    return {name: Score(found.get(key), len(cases)) for name, key in names.items()}


def report_and_finding_scores(cases: Sequence[AnswerCase]) -> dict[str, Score]:
    """Chest reports: words, and the findings that they state or deny."""
    found = report_scores([c.text for c in cases], [c.reference for c in cases])
    macro = found["clinical_f1"]["macro"] if cases else None
    return text_scores(cases) | {"clinical labels F1, macro": Score(macro, len(cases))}


# ---------------------------------------------------------------- what it is split by


MODALITY_WORDS = {
    "CT": ("ct", "cta", "cbct", "computed tomography", "computerized tomography"),
    "MRI": ("mri", "mr", "magnetic resonance"),
    "X-ray": ("x-ray", "x-rays", "xray", "radiograph", "radiographs", "radiography"),
    "ultrasound": (
        "ultrasound", "ultrasonography", "sonography", "sonogram", "echocardiography",
        "echocardiogram", "doppler",
    ),
    "PET": ("pet", "positron emission tomography"),
    "nuclear medicine": ("scintigraphy", "scintigram", "spect", "bone scan"),
    "angiography": ("angiography", "angiogram", "angiograms"),
    "mammography": ("mammography", "mammogram", "mammograms"),
    "pathology": (
        "histology", "histological", "histopathology", "histopathological", "immunohistochemistry",
        "immunohistochemical", "hematoxylin", "haematoxylin",
    ),
    "microscopy": (
        "microscopy", "microscopic", "microscope", "micrograph", "micrographs",
        "photomicrograph", "immunofluorescence",
    ),
    "endoscopy": (
        "endoscopy", "endoscopic", "colonoscopy", "gastroscopy", "bronchoscopy", "laparoscopy",
    ),
    "dermoscopy": ("dermoscopy", "dermoscopic", "dermatoscopy"),
    "fundus": ("fundus", "fundoscopy", "fundoscopic", "funduscopic"),
    "OCT": ("oct", "optical coherence tomography"),
    "photograph": ("photograph", "photographs", "photo", "photography"),
    "electrophysiology": (
        "ecg", "ekg", "eeg", "emg", "electrocardiogram", "electroencephalogram",
        "electrocardiography", "electroencephalography",
    ),
}  # fmt: skip
"""Modality -> words that name it. PMC-VQA states none, and its questions often do."""

_MODALITY = {
    name: re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, said))})(?![\w-])")
    for name, said in MODALITY_WORDS.items()
}


def named_modality(case: AnswerCase) -> str | None:
    """The modality that a question names, in whole words: "system" does not name microscopy by its
    letters "tem". "several" where it names more than one; None where it names none."""
    # Of the question alone: the options of a question for the modality name four of them.
    found = [name for name, words in _MODALITY.items() if words.search(case.question.lower())]
    return None if not found else found[0] if len(found) == 1 else "several"


def _fact(name: str) -> GroupOf:
    return lambda case: case.question_facts.get(name)


def _modality(case: FinishedCase) -> str | None:
    return case.facts.modality


def _mask_fact(name: str) -> GroupOf:
    def of(pair: tuple[MaskCase, Mapping[str, float]]) -> str | None:
        value: str | None = getattr(pair[0].facts, name)
        return value

    return of


BENCHMARKS: dict[str, Benchmark] = {
    "vqa_rad": Benchmark(
        title="VQA-RAD",
        task="language",
        folders=("vqa_rad/test",),
        official=451,
        item="questions",
        scores=vqa_scores,
        groups={"question type": _fact("question_type"), "modality": _modality},
        kinds=("closed", "open"),
        blind=True,
        shown=("closed accuracy", "open recall"),
        note="closed: the answer is yes or no; official split, which shares images with training",
    ),
    "pathvqa": Benchmark(
        title="PathVQA",
        task="language",
        folders=("pathvqa/test",),
        official=6_719,
        item="questions",
        scores=vqa_scores,
        groups={"question type": _fact("question_type")},
        kinds=("closed", "open"),
        blind=True,
        shown=("closed accuracy", "open recall"),
        note="closed: the answer is yes or no",
    ),
    "pmc_vqa": Benchmark(
        title="PMC-VQA v2",
        task="language",
        folders=("pmc_vqa/test",),
        official=33_430,
        item="questions",
        scores=choice_scores,
        groups={"modality named in the question": named_modality},
        kinds=("choice",),
        blind=True,
        shown=("accuracy by option", "accuracy by text"),
    ),
    "slake": Benchmark(
        title="SLAKE, English",
        task="language",
        folders=("slake/test",),
        official=1_061,
        item="questions",
        scores=vqa_scores,
        groups={"content type": _fact("content_type"), "modality": _modality},
        kinds=("closed", "open"),
        blind=True,
        shown=("closed accuracy", "open recall"),
        note="closed: the answer is yes or no; what SLAKE calls closed is wider",
    ),
    "isic2018": Benchmark(
        title="ISIC 2018 task 3",
        task="labels",
        folders=("isic2018/test",),
        official=1_512,
        item="images",
        scores=class_scores,
        groups={},
        kinds=("choice",),
        # As its authors count the training images, which are those of HAM10000.
        training_counts={
            "melanocytic nevus": 6_705,
            "melanoma": 1_113,
            "benign keratosis": 1_099,
            "basal cell carcinoma": 514,
            "actinic keratosis or intraepithelial carcinoma": 327,
            "vascular lesion": 142,
            "dermatofibroma": 115,
        },
        note="by language without a head; by head for exports of configs/probe_isic2018.yaml",
    ),
    "cxr_lt": Benchmark(
        title="CXR-LT 2024 task 2",
        task="labels",
        folders=("cxr_lt_task2/val", "cxr_lt_task2/test"),
        official=406,
        item="images",
        scores=finding_scores,
        # By AUROC, not by average precision: that follows how many of a group have a finding.
        groups={
            "sex": lambda case: case.facts.sex,
            "age": lambda case: age_band(case.facts),
            "race": lambda case: case.facts.race,
        },
        shown=("macro AUROC",),
        note="ranked by macro mAP; thresholds of F1 are chosen on the development split",
    ),
    "imed361m": Benchmark(
        title="IMed-361M",
        task="segmentation",
        folders=("imed361m/*/test",),
        official=None,
        item="masks",
        scores=mask_scores,
        groups={name: _mask_fact(name) for name in ("source", "target", "modality", "prevalence")},
        shown=("Dice",),
    ),
    "mimic_cxr": Benchmark(
        title="MIMIC-CXR reports",
        task="language",
        folders=("mimic_cxr/test",),
        official=5_159,
        item="reports",
        scores=report_and_finding_scores,
        groups={"sex": lambda case: case.facts.sex, "race": lambda case: case.facts.race},
        kinds=("report",),
    ),
    "pubmedvision": Benchmark(
        title="PubMedVision descriptions",
        task="language",
        folders=("pubmedvision/test",),
        official=1_617,
        item="descriptions",
        scores=text_scores,
        groups={"modality": _modality},
        kinds=("open",),
        shown=("ROUGE-1",),
        max_new_tokens=256,
        note="a share of 0.25 % by hash is held out, so the number of items is about the official",
    ),
}
"""Name (of scripts/eval_NAME.py and of --suite) -> protocol."""


def benchmark_of(name: str) -> Benchmark:
    """Raises ValueError, with the nearest, for a name that is none."""
    if name not in BENCHMARKS:
        raise ValueError(unknown("benchmark", name, BENCHMARKS))
    return BENCHMARKS[name]


def folders_of(benchmark: Benchmark, data: Path) -> list[Path]:
    """Record folders of a benchmark below the folder of prepared data.

    Raises ValueError that names what is missing.
    """
    found: list[Path] = []
    for pattern in benchmark.folders:
        here = sorted(path for path in data.glob(pattern) if path.is_dir())
        if not here:
            raise ValueError(
                f"{benchmark.title}: {data} has no folder {pattern}; prepare it with the "
                "data_prep program of the release, or name another folder after --data"
            )
        found += here
    return found


# ---------------------------------------------------------------- cases to numbers


def label_groups(benchmark: Benchmark, header_prevalence: Mapping[str, str]) -> dict[str, str]:
    """Head, medium and tail of the labels: as training counted them, else as the release does."""
    if not benchmark.training_counts:
        return dict(header_prevalence)
    shares = EvalConfig()
    published = prevalence_groups(benchmark.training_counts, shares.head_share, shares.tail_share)
    return published | {n: g for n, g in header_prevalence.items() if n in published}


def labels_and_groups(cases: Cases) -> tuple[list[LabelCase], dict[str, str]]:
    """The label cases of a file, and the prevalence groups of their labels. Of a benchmark of
    classes that was answered without a head, the options of its choices are the classes."""
    prevalence = cases.header.prevalence
    if cases.header.benchmark is None:
        return cases.labels, prevalence
    benchmark = benchmark_of(cases.header.benchmark)
    if benchmark.task != "labels":
        return cases.labels, prevalence
    return cases.labels or choices_as_labels(cases.answers), label_groups(benchmark, prevalence)


def scored_items(
    benchmark: Benchmark,
    masks: Sequence[tuple[MaskCase, Mapping[str, float]]],
    answers: Sequence[AnswerCase],
    labels: Sequence[LabelCase],
) -> list[Any]:
    """What the scores of a benchmark are of."""
    if benchmark.task == "segmentation":
        return list(masks)
    asked = [case for case in answers if case.facts.kind in benchmark.kinds]
    return [*asked, *labels] if benchmark.task == "labels" else list(asked)


def benchmark_table(benchmark: Benchmark, items: Sequence[Any]) -> dict[str, Any]:
    """Scores of all items and of each group; what has no group forms "missing"."""
    table: dict[str, Any] = {
        "title": benchmark.title,
        "item": benchmark.item,
        # Of the images that choose thresholds, and of one image by two ways, none is counted twice.
        "num": len({item.facts.image_id for item in scored_labels(items)})
        if benchmark.task == "labels"
        else len(items),
        "num_official": benchmark.official,
        "note": benchmark.note,
        "shown": list(benchmark.shown),
        "scores": {name: score._asdict() for name, score in benchmark.scores(items).items()},
        "groups": {},
    }
    for name, of in benchmark.groups.items():
        parts: dict[str, list[Any]] = defaultdict(list)
        for item in items:
            parts[of(item) or "missing"].append(item)
        table["groups"][name] = {
            group: {
                "num": len(mine),
                "scores": {n: score._asdict() for n, score in benchmark.scores(mine).items()},
            }
            for group, mine in sorted(parts.items())
        }
    return table
