"""A reader study from files to files: logs and cases are read, the report is written.

result = carry_out(ReaderStudyRequest(analyse=["reader_a.jsonl"], cases="cases.jsonl", ...))
result.lines, result.paths
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from biascare.evaluation.cases import LabelCase, read_cases
from biascare.evaluation.metrics.classification import choices_as_labels
from biascare.evaluation.reader_log import read_logs
from biascare.evaluation.reader_study import analyse, make_study
from biascare.reports.reader_study import sentences, write_reader_study
from biascare.runs.audit import cases_file

FORMAT_VERSION = 1


class ReaderStudyRequest(NamedTuple):
    """What scripts/reader_study.py was asked for; its help describes the fields."""

    analyse: list[str]
    cases: str
    output: Path
    num_draws: int
    seed: int


class ReaderStudyResult(NamedTuple):
    """What there is to tell."""

    lines: list[str]  # for the terminal
    paths: list[Path]  # the page first


def carry_out(request: ReaderStudyRequest) -> ReaderStudyResult:
    """Write the report. Raises ValueError before anything is written for cases without categories,
    and for logs that do not fit them."""
    missing = [path for path in request.analyse if not Path(path).is_file()]
    if missing:
        raise ValueError(f"--analyse: {missing[0]} does not exist; name the logs of the study")
    file = cases_file(request.cases)
    cases, num_other = study_cases(file)
    log = read_logs(
        request.analyse,
        cases[0].labels,
        {case.id for case in cases},
        one_choice=cases[0].exclusive,
    )
    study = make_study(cases, log.answers)
    found = analyse(study, num_draws=request.num_draws, seed=request.seed)
    if log.num_replaced:
        found["notes"].append(
            f"{log.num_replaced:,} answers were given again for the same reader, round and case; "
            "the last one counts."
        )
    if log.num_cut:
        found["notes"].append(f"{log.num_cut:,} lines were cut short by a crash and are left out.")
    if num_other:
        found["notes"].append(
            f"{num_other:,} questions have other options, or unscored ones, and are left out."
        )
    # By content and not by path: the same logs elsewhere give the same report.
    found = {"format_version": FORMAT_VERSION} | found
    found["settings"] = {"num_draws": request.num_draws, "seed": request.seed}
    found["files"] = {
        "cases": hashlib.sha256(file.read_bytes()).hexdigest(),
        "logs": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in request.analyse],
    }
    return ReaderStudyResult(list(sentences(found)), write_reader_study(found, request.output))


def study_cases(file: Path) -> tuple[list[LabelCase], int]:
    """(what readers choose among: label cases, or questions with the same options; number of
    questions that are none of them)."""
    cases = read_cases(file)
    questions = [] if cases.labels else [case for case in cases.answers if case.options]
    found = cases.labels or choices_as_labels(questions)
    if not found:
        raise ValueError(
            f"{file} holds {len(cases.masks):,} masks and {len(cases.answers):,} answers, expected "
            "label cases or questions with the same options: evaluate a model with a label head, "
            "or a benchmark of choices, for example scripts/eval_isic2018.py"
        )
    return found, 0 if cases.labels else len(questions) - len(found)
