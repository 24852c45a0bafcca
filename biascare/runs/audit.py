"""An audit from files to files: cases, thresholds and folders are opened, the audit is written.

result = carry_out(AuditRequest(run="outputs/evaluation", ...))
result.verdict, result.paths
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from biascare.evaluation.audit.audit import audit
from biascare.evaluation.audit.tables import Draws
from biascare.evaluation.audit.thresholds import read_thresholds
from biascare.evaluation.cases import CASES, read_cases
from biascare.records import Records
from biascare.reports.audit import write_audit
from biascare.reports.audit_pictures import mask_pictures
from biascare.reports.audit_words import headlines, verdict_sentence


class AuditRequest(NamedTuple):
    """What scripts/audit.py was asked for; its help describes the fields."""

    run: str
    baseline: str | None
    thresholds: str | None
    validation: str | None
    records: list[str]
    train: list[str]
    output: Path | None  # None: folder `audit` beside the cases
    num_draws: int
    seed: int


class AuditResult(NamedTuple):
    """What there is to tell."""

    verdict: str | None  # None without thresholds
    lines: list[str]  # for the terminal
    paths: list[Path]  # the page first


def carry_out(request: AuditRequest) -> AuditResult:
    """Write the audit of a run.

    Raises ValueError for wrong thresholds before anything else is read, for damaged cases, and for
    a baseline of other truth.
    """
    # First, because it costs nothing: a mistyped key must not be told after a minute of work.
    thresholds = None if request.thresholds is None else read_thresholds(request.thresholds)
    files = {
        name: cases_file(path)
        for name, path in (
            ("run", request.run),
            ("baseline", request.baseline),
            ("validation", request.validation),
        )
        if path is not None
    }
    folders = {
        name: [Records(path) for path in paths]
        for name, paths in (("train", request.train), ("records", request.records))
    }
    cases = {name: read_cases(path) for name, path in files.items()}
    found = audit(
        cases["run"],
        baseline=cases.get("baseline"),
        validation=cases.get("validation"),
        thresholds=thresholds,
        training=folders["train"],
        draws=Draws(request.num_draws, request.seed),
    )
    # By content and not by path: the same cases elsewhere give the same audit.
    found["files"] = {name: _sha256(path) for name, path in files.items()}
    pictures = mask_pictures(found["worst_masks"], cases["run"].masks, folders["records"])
    output = request.output or files["run"].parent / "audit"
    paths = write_audit(found, output, pictures)
    verdict = None if found["verdict"] is None else found["verdict"]["overall"]
    return AuditResult(verdict, [verdict_sentence(found), *headlines(found)[:3]], paths)


def cases_file(path: str) -> Path:
    """The cases of an evaluation: its output folder or the file itself."""
    file = Path(path)
    file = file / CASES if file.is_dir() else file
    if not file.is_file():
        shares = sorted(file.parent.glob(f"{file.stem}.rank*{file.suffix}"))
        # A killed evaluation has rows, but of some cases alone: an audit of them would mislead.
        hint = (
            "the evaluation is not finished: run its command again"
            if shares
            else ("name the --output folder of scripts/evaluate.py, or its cases.jsonl")
        )
        raise ValueError(f"{file} does not exist; {hint}")
    return file


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
