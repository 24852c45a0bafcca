"""A model and held-out records to finished cases: the only loop of evaluation.

    cases = evaluate(segmenter, answerer, images, questions, path, header, settings)

Training's periodic evaluation, scripts/evaluate.py and the benchmarks all come here. Each rank
appends its share to a file of its own, which rank 0 joins at the end, in the order of the items. A
killed evaluation goes on where it was: cases that are on disk are not computed again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from biascare.data.chat import question_text
from biascare.data.heldout import (
    HeldOut,
    HeldOutBatch,
    HeldOutImages,
    HeldOutLabels,
    HeldOutQuestions,
    MaskItem,
    QuestionItem,
    case_key,
    heldout_loader,
)
from biascare.data.loader import to_device
from biascare.data.transforms import Geometry, invert_points, restore_mask
from biascare.durable import put_in_place
from biascare.evaluation.benchmarks import (
    benchmark_of,
    benchmark_table,
    labels_and_groups,
    scored_items,
)
from biascare.evaluation.cases import (
    AnswerCase,
    Cases,
    CaseWriter,
    FinishedCase,
    Header,
    LabelCase,
    MaskCase,
    MaskPrediction,
    SlicePlace,
    Variant,
    read_cases,
    read_lines,
)
from biascare.evaluation.metrics.answers import is_correct, summarise_answers
from biascare.evaluation.metrics.classification import (
    case_score,
    scored_labels,
    summarise_labels,
)
from biascare.evaluation.metrics.groups import Measured, summarise_groups
from biascare.evaluation.metrics.reports import report_scores, rouge1_each
from biascare.evaluation.metrics.segmentation import (
    mask_area,
    mask_scores,
    summarise_segmentation,
    summarise_volumes,
)
from biascare.evaluation.metrics.triage import summarise_triage
from biascare.evaluation.progress import watched
from biascare.hitl.clicks import refine_once
from biascare.inference.answerer import Answerer, spoken
from biascare.inference.labeller import YES_NO, Labeller
from biascare.inference.segmenter import Decoded, Segmenter
from biascare.interfaces import POINT_PADDING, Prediction, Prompts
from biascare.records import encode_mask
from biascare.training.ranks import from_rank_zero, gather_objects, rank, world_size
from biascare.uncertainty import disagreement, size_surprise


class EvaluationSettings(NamedTuple):
    """How to evaluate; cases do not depend on the first two."""

    batch_size: int
    num_workers: int
    num_corrections: int  # simulated clicks after the first prediction
    mask_prompt: bool  # whether a correction sees the mask before
    max_new_tokens: int
    synced_generation: bool  # ZeRO-3: all ranks make the same calls
    max_report_tokens: int = 256


def evaluate(
    segmenter: Segmenter,
    answerer: Answerer | None,
    images: HeldOutImages,
    questions: HeldOutQuestions | None,
    path: Path,
    header: Header,
    settings: EvaluationSettings,
    *,
    labelled: HeldOutLabels | None = None,
    labeller: Labeller | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Cases:
    """Evaluate every target, question and labelled image once; write `path`, and return what stands
    in it.

    Call on every rank. What an earlier call with the same header left is kept and completed.
    `progress`: tell standard error how far it is.

    Raises ValueError when there is nothing to evaluate, two folders hold a case of one name, or
    `path` holds cases of another header (and `overwrite` is not set).
    """
    order = _order(images, questions, labelled)
    # One rank looks: files of a slow network disk may appear to another a moment later, and ranks
    # that disagree about what is left would wait for each other for ever under ZeRO-3.
    done = from_rank_zero(lambda: _begin(path, header, overwrite))
    share = path.with_name(f"{path.stem}.rank{rank()}{path.suffix}")
    with CaseWriter(share, header) as writer:
        for held in _batches(images, done, segmenter.network.device, settings, progress):
            began = time.perf_counter()
            masks = mask_cases(segmenter, images, held, settings, header)
            # Batch by batch: a kill costs at most one, and the memory of a whole benchmark's masks
            # is never held.
            writer.append(list(_new(masks, held, done, began)))
        if answerer is not None and questions is not None:
            for held in _batches(questions, done, answerer.network.device, settings, progress):
                began = time.perf_counter()
                answers = answer_cases(answerer, held, settings)
                writer.append(list(_new(answers, held, done, began)))
        if labeller is not None and labelled is not None:
            for held in _batches(labelled, done, labeller.network.device, settings, progress):
                began = time.perf_counter()
                writer.append(list(_new(label_cases(labeller, held), held, done, began)))
    gather_objects(None)  # a barrier: only now are all shares on disk
    from_rank_zero(lambda: _join(path, header, order))
    return read_cases(path)


def summarise(cases: Cases, validation: Cases | None = None) -> dict[str, Any]:
    """Numbers of all kinds of cases: `segmentation` with `triage`, `answers`, `reports` and
    `labels`, each where there are some, and `groups` of patients where something is known of them.
    `validation`: cases of the same model that triage may fit its mix and thresholds on."""
    summary: dict[str, Any] = {}
    measured: list[Measured] = []
    scores = [mask_scores(case, cases.header) for case in cases.masks]
    if cases.masks:
        summary["segmentation"] = summarise_segmentation(cases.masks, scores)
        known = None
        if validation is not None:
            masks = validation.masks
            known = (masks, [mask_scores(case, validation.header) for case in masks])
        summary["triage"] = summarise_triage(cases.masks, scores, known)
        volumes = summarise_volumes(cases.masks, cases.header)
        summary |= {"volumes": volumes} if volumes else {}
        facts = [case.facts for case in cases.masks]
        mix = [f"{f.modality}, {f.target}" for f in facts]
        measured.append(Measured("dice", facts, [score["dice"] for score in scores], mix))
    # A report is never right or wrong as a whole: counted there, it would only lower accuracies.
    answers = [case for case in cases.answers if case.facts.kind != "report"]
    reports = [case for case in cases.answers if case.facts.kind == "report"]
    if answers:
        summary["answers"] = summarise_answers(answers)
        facts = [case.facts for case in answers]
        right = [float(is_correct(case.text, case)) for case in answers]
        mix = [f"{f.modality}, {f.kind}" for f in facts]
        measured.append(Measured("accuracy", facts, right, mix))
    if reports:
        summary["reports"] = _report_table(reports)
        facts = [case.facts for case in reports]
        overlap = rouge1_each([c.text for c in reports], [c.reference for c in reports])
        measured.append(Measured("rouge1", facts, overlap, [str(f.modality) for f in facts]))
    if cases.header.benchmark is not None:
        benchmark = benchmark_of(cases.header.benchmark)
        pairs = list(zip(cases.masks, scores, strict=True))
        items = scored_items(benchmark, pairs, cases.answers, cases.labels)
        summary["benchmark"] = benchmark_table(benchmark, items)
    labels, prevalence = labels_and_groups(cases)
    if labels:
        summary["labels"] = summarise_labels(labels, prevalence)
        scored = scored_labels(labels)
        facts = [case.facts for case in scored]
        name = "class accuracy" if scored[0].exclusive else "1 - brier"
        values = [case_score(case) for case in scored]
        measured.append(Measured(name, facts, values, [f.modality for f in facts]))
    groups = summarise_groups(measured)
    return summary | ({"groups": groups} if groups else {})


def _report_table(cases: Sequence[AnswerCase]) -> dict[str, Any]:
    """Scores of all reports and of those of each source."""
    by_source: dict[str, list[AnswerCase]] = defaultdict(list)
    for case in cases:
        by_source[case.facts.source].append(case)
    parts = [cases, *by_source.values()]
    whole, *each = (report_scores([c.text for c in p], [c.reference for c in p]) for p in parts)
    return whole | {"by_source": dict(zip(by_source, each, strict=True))}


# ---------------------------------------------------------------- one batch


@torch.inference_mode()
def mask_cases(
    segmenter: Segmenter,
    images: HeldOutImages,
    held: HeldOutBatch,
    settings: EvaluationSettings,
    header: Header,
) -> list[MaskCase]:
    """Masks by the first prompt, by text alone where text is read, and after each correction.

    The first has uncertainties that the others lack: those that cost further decodings, and how far
    its size is from the usual one of the header.
    """
    batch = held.batch
    assert batch.prompts is not None and batch.masks is not None
    encoded = segmenter.encode_batch(batch)
    by_text = None
    if encoded.features.text_embedding is not None:
        # Padding in place of the click: the row keeps its number of prompts, so that the same
        # call serves both and no click of another row moves into its place.
        silent = torch.full_like(batch.prompts.point_labels, POINT_PADDING)
        by_text = segmenter.decode(encoded, batch.prompts._replace(point_labels=silent))
    # Image and words were encoded once; everything below only decodes.
    first = segmenter.decode(encoded, batch.prompts)
    # Of the first mask alone, because that is what decides whether an expert is called.
    dear = {"click_disagreement": segmenter.click_disagreement(encoded, batch.prompts, first)}
    if by_text is not None:
        dear["text_disagreement"] = disagreement(
            first.prediction.low_res_logits, by_text.prediction.low_res_logits
        )
    first = first._replace(uncertainty=first.uncertainty | dear)
    history = [(batch.prompts, first)]

    def decode(prompts: Prompts, previous: Tensor | None) -> Prediction:
        history.append((prompts, segmenter.decode(encoded, prompts, previous)))
        return history[-1][1].prediction

    for _ in range(settings.num_corrections):
        prompts, decoded = history[-1]
        refine_once(
            decode,
            prompts,
            decoded.prediction,
            batch.masks,
            policy="center",  # deterministic: a score must not depend on a seed
            num_clicks=1,
            generator=None,
            mask_prompt=settings.mask_prompt,
        )
    num_given = batch.prompts.point_labels.shape[1]
    cases = [
        MaskCase(
            id=item.id,
            facts=item.facts,
            height=item.height,
            width=item.width,
            instruction=item.instruction,
            truth=item.truth.decode("ascii"),
            by_text=None
            if by_text is None
            else _prediction(by_text, r, item._replace(points=[], box=None), []),
            predictions=[
                _prediction(
                    decoded, r, item, _clicks(prompts, r, num_given, item, images.image_size)
                )
                for prompts, decoded in history
            ],
            place=place_of(item),
            seconds=0.0,
        )
        for r, item in enumerate(held.items)
    ]
    for case in cases:
        usual = header.disc_share_by_target.get(case.facts.target or "", header.disc_share)
        if usual is not None:
            prediction, size = case.predictions[0], (case.height, case.width)
            share = mask_area(prediction.mask, *size) / (size[0] * size[1])
            prediction.uncertainty["size_surprise"] = size_surprise(share, usual)
    return cases


def place_of(item: MaskItem) -> SlicePlace | None:
    """Where the converter of volumes (`data_prep/volumes.py`) says that a slice lies; None for what
    is no slice, or has no millimetres."""
    extra = item.extra
    if not {"slice", "num_slices", "plane", "mm_per_pixel", "mm_between_slices"} <= extra.keys():
        return None
    row, column = extra["mm_per_pixel"]
    return SlicePlace(
        # Ids of slices end in "/plane-number".
        volume=f"{item.facts.image_id.rpartition('/')[0]}/{extra['plane']}",
        number=extra["slice"],
        num_slices=extra["num_slices"],
        spacing=(extra["mm_between_slices"], row, column),
        affine=extra.get("affine"),
    )


def _prediction(
    decoded: Decoded, row: int, item: MaskItem, clicks: list[tuple[float, float, int]]
) -> MaskPrediction:
    # At native size: a mask scored at the model's size would be scored against a resized truth, in
    # which a lesion of one pixel is many, or none.
    mask = restore_mask(decoded.prediction.mask_logits[row], item.height, item.width)
    return MaskPrediction(
        points=[*item.points, *clicks],
        box=item.box,
        mask=encode_mask(mask.cpu().numpy().astype(np.bool_)).decode("ascii"),
        predicted_dice=float(decoded.prediction.predicted_dice[row]),
        uncertainty={name: float(value[row]) for name, value in decoded.uncertainty.items()},
    )


def _clicks(
    prompts: Prompts, row: int, num_given: int, item: MaskItem, image_size: int
) -> list[tuple[float, float, int]]:
    """The corrections of a row in native pixels; a row without errors left may have had none."""
    geometry = Geometry.full(item.height, item.width, image_size)
    coords = prompts.point_coords[row, num_given:].cpu().numpy()
    labels = prompts.point_labels[row, num_given:].tolist()
    native = invert_points(coords, geometry).tolist()
    return [
        (x, y, label)
        for (x, y), label in zip(native, labels, strict=True)
        if label != POINT_PADDING
    ]


@torch.inference_mode()
def answer_cases(
    answerer: Answerer, held: HeldOutBatch, settings: EvaluationSettings
) -> list[AnswerCase]:
    """The greedy answer to every question, and the log-probabilities of its options; likewise for
    each other way to ask it.

    Under ZeRO-3 options are not scored: how often the model is called would differ between ranks.
    """
    items: list[QuestionItem] = held.items
    report = items[0].question.kind == "report"  # `HeldOutQuestions.apart`: then all are
    # A question is a row, and each other way to ask it one more.
    asked = [(item, turn) for item in items for turn in (item.question, *item.otherwise.values())]
    options = [options_of(item) for item, _ in asked]
    said = [spoken(turn, mine) for (_, turn), mine in zip(asked, options, strict=True)]
    # A batch of open questions has nothing to score.
    by_option = any(options) and not settings.synced_generation
    answered, scored = answerer.answer_batch(
        held.batch,
        said if by_option else None,
        max_new_tokens=settings.max_report_tokens if report else settings.max_new_tokens,
        synced_gpus=settings.synced_generation,
    )
    scores: Sequence[Tensor | None] = scored or [None] * len(asked)
    log_probs = [
        score.tolist() if score is not None and mine else None
        for score, mine in zip(scores, options, strict=True)
    ]
    rows = zip(asked, options, answered, log_probs, strict=True)  # taken item by item
    cases = []
    for item in items:
        (_, turn), mine, answer, score = next(rows)
        others = list(islice(rows, len(item.otherwise)))
        cases.append(
            AnswerCase(
                id=item.id,
                facts=item.facts,
                question=turn.text,
                question_facts=dict(turn.facts),
                prompt=question_text(turn),
                options=list(mine),
                option_log_probs=score,
                text=answer.text,
                token_log_probs=answer.token_log_probs,
                reference=item.answer.text,
                labels=item.labels,
                variants={
                    name: Variant(
                        prompt=question_text(turn), text=answer.text, option_log_probs=score
                    )
                    for name, ((_, turn), _, answer, score) in zip(
                        item.otherwise, others, strict=True
                    )
                },
                seconds=0.0,
            )
        )
    return cases


def label_cases(labeller: Labeller, held: HeldOutBatch) -> list[LabelCase]:
    """The probability of every label of every image."""
    found = labeller.probabilities(held.batch).tolist()
    space = labeller.space
    return [
        LabelCase(
            id=item.id,
            facts=item.facts,
            labels=list(space.names),
            probabilities=probabilities,
            present=item.present,
            # Asked one by one, answers need not add up.
            exclusive=space.exclusive and labeller.answerer is None,
            seconds=0.0,
        )
        for item, probabilities in zip(held.items, found, strict=True)
    ]


def options_of(item: QuestionItem) -> tuple[str, ...]:
    """What an answer is chosen from: as the record states, or yes and no."""
    # By the reference and not by the kind: some sources call "left or right?" a closed question.
    if not item.question.options and item.answer.text.lower() in YES_NO:
        return YES_NO
    return item.question.options


# ---------------------------------------------------------------- files and ranks


def _batches(
    items: HeldOut,
    done: set[str],
    device: torch.device,
    settings: EvaluationSettings,
    progress: bool,
) -> Iterator[HeldOutBatch]:
    """This rank's batches of the units that are not done."""
    keys = items.case_keys()
    for numbers, rows_per_unit in items.apart():
        # An image of which one target is missing is encoded again; `_new` keeps the others out.
        left = [i for i in numbers if not done.issuperset(keys[i])]
        loader = heldout_loader(
            items,
            left,
            # An image with a question for each of its labels is a batch of its own.
            max(1, settings.batch_size // rows_per_unit),
            rank=rank(),
            world_size=world_size(),
            num_workers=settings.num_workers,
        )
        of_part = [key for i in numbers for key in keys[i]]
        num_done = sum(key in done for key in of_part)
        counts = num_done, len(of_part) - num_done
        for held in watched(loader, items.becomes, *counts) if progress else loader:
            yield held._replace(batch=to_device(held.batch, device))


def _new(
    cases: Iterable[FinishedCase], held: HeldOutBatch, done: set[str], began: float
) -> Iterator[FinishedCase]:
    """Cases that no file has, with their share of the batch's time."""
    seconds = (time.perf_counter() - began) / len(held.items)
    for case, repeated in zip(cases, held.repeated, strict=True):
        # Repeats only keep ranks in step; counted, they would weigh some cases twice.
        if not repeated and _key(case) not in done:
            yield replace(case, seconds=round(seconds, 6))


def _key(case: FinishedCase) -> str:
    return case_key(case.facts.source, case.facts.split, case.id)


def _order(*held_out: HeldOut | None) -> dict[str, int]:
    """Key of every case -> its place in the finished file."""
    keys = [key for items in held_out if items is not None for key in chain(*items.case_keys())]
    if not keys:
        raise ValueError(
            "nothing to evaluate: the folders hold neither masks nor labels nor questions of the "
            "kinds that are asked for"
        )
    order = {key: place for place, key in enumerate(keys)}
    if len(order) < len(keys):
        # One of the two would silently stand for both when an evaluation is continued.
        twice = next(key for place, key in enumerate(keys) if order[key] != place)
        raise ValueError(
            f"two cases are called {twice}: two folders hold the same record of one source and "
            "split; name each folder once"
        )
    return order


def _files(path: Path) -> list[Path]:
    """What there is of an evaluation: the finished file and the shares of ranks."""
    # Of any number of ranks: the one that goes on may have fewer or more than the one before.
    shares = sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))
    return [file for file in (path, *shares) if file.exists() and file.stat().st_size]


def _begin(path: Path, header: Header, overwrite: bool) -> set[str]:
    """Keys of the cases that are on disk."""
    done: set[str] = set()
    for file in _files(path):
        if overwrite:
            file.unlink()
            continue
        found, cases = read_lines(file, finished=False)
        theirs, ours = asdict(found), asdict(header)
        differing = [name for name in ours if theirs[name] != ours[name]]
        # Other weights, data or prompts: cases of both in one file would be of no model at all.
        if differing:
            name = differing[0]
            shown = f": {theirs[name]!r} there, {ours[name]!r} here"
            raise ValueError(
                f"{file} holds another evaluation, which differs in {', '.join(differing)}"
                f"{shown if len(shown) < 200 else ''}; name another --output, or --overwrite it"
            )
        done |= {_key(case) for case in cases}
    return done


def _join(path: Path, header: Header, order: dict[str, int]) -> None:
    """All shares as one file, in the order of the items; it appears at once."""
    files = _files(path)
    if files == [path]:
        return
    cases = {_key(case): case for file in files for case in read_lines(file, finished=False)[1]}
    # In the order of the records: the same file however many ranks wrote it.
    partial = path.with_suffix(".tmp")
    partial.unlink(missing_ok=True)
    with CaseWriter(partial, header) as writer:
        writer.append([cases[key] for key in sorted(cases, key=lambda key: order[key])])
    put_in_place(partial, path)
    # Only now: killed before, the shares are still all there is.
    for file in files:
        if file != path:
            file.unlink()
