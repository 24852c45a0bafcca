"""The 14 CheXpert findings in a chest report: stated, denied, doubted or not mentioned.

    read_findings("No effusion. Possible mild edema.")["Pleural Effusion"]   # "absent"

Rules over a table of wordings, ours and readable: a mention is denied or doubted by what stands
before or after it in its clause. They tell "No pleural effusion" from "Pleural effusion", which
word overlap does not. The trade-off: a wording that the table does not hold is not seen; labels of
CheXbert or RadGraph on the same cases are another number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

Status = Literal["present", "absent", "uncertain"]

NO_FINDING = "No Finding"

SUPPORT_DEVICES = "Support Devices"

FINDINGS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        r"(?:widen(?:ed|ing)|enlarg(?:ed|ement)|prominen(?:t|ce)) (?:of )?(?:the )?(?:\w+ )?"
        r"(?:cardiomediastin\w+|mediastin\w+)",
        r"(?:cardiomediastin\w+|mediastin\w+)(?: \w+){0,3} (?:is|are|appears?) (?:\w+ )?"
        r"(?:widened|enlarged|prominent)",
        r"mediastinal (?:widening|enlargement)",
    ),
    "Cardiomegaly": (
        r"cardiomegaly",
        r"(?:enlarged|enlargement of the) (?:heart|cardiac silhouette|cardiac size)",
        r"(?:heart|cardiac silhouette|heart size|cardiac size)(?: \w+){0,3} (?:is|are|be|"
        r"appears?|remains?) (?:\w+ )?enlarged",
    ),
    "Lung Opacity": (
        r"opacit(?:y|ies)",
        r"opacification",
        r"infiltrat(?:e|es|ion)",
        r"airspace disease",
        r"haz(?:e|iness)",
    ),
    "Lung Lesion": (
        r"(?:lung|pulmonary|\w+ lobe) (?:nodules?|mass(?:es)?|lesions?)",
        r"nodules?",
        r"mass(?:es)?",
        r"tumou?rs?",
    ),
    "Edema": (
        r"o?edema",
        r"(?:pulmonary )?vascular congestion",
        r"(?:congestive )?heart failure",
        r"chf",
    ),
    "Consolidation": (r"consolidat(?:ion|ions|ive)",),
    "Pneumonia": (
        r"(?:broncho)?pneumonias?",
        r"infectious process",
        r"(?<!granulomatous )infection",
    ),
    "Atelectasis": (r"atelecta(?:sis|ses|tic)", r"collapse"),
    "Pneumothorax": (r"(?:hydro)?pneumothora(?:x|ces)",),
    "Pleural Effusion": (
        r"(?:pleural )?effusions?",
        r"pleural fluid",
        r"(?:blunting|blunted)(?: \w+){0,4} costophrenic",
        r"costophrenic (?:\w+ )?blunting",
    ),
    "Pleural Other": (
        r"pleural (?:thickening|plaques?|scar(?:ring)?)",
        r"fibrothorax",
        r"(?:apical|pleural) cap",
    ),
    "Fracture": (r"fractures?", r"fractured"),
    SUPPORT_DEVICES: (
        r"(?:endotracheal|tracheostomy|nasogastric|enteric|feeding|chest|ng|et|og|dobhoff) tubes?",
        r"(?:central venous |swan-ganz |picc |dialysis |pigtail )?(?:catheter|line)s?",
        r"picc",
        r"pace ?makers?",
        r"(?:pacer|icd|sternal wires?|valve|stents?|drains?|leads?|hardware|clips?)",
    ),
}
"""Finding -> wordings of a mention, as patterns over lower-case text."""

NORMAL: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": (
        r"(?:heart|cardiac silhouette|heart size|cardiac size|cardiomediastinal silhouette)"
        r"(?: \w+){0,4} (?:normal|unremarkable|within normal limits)",
        r"normal (?:heart|cardiac) (?:size|silhouette)",
    ),
    "Enlarged Cardiomediastinum": (
        r"(?:cardiomediastin\w+|mediastin\w+)(?: \w+){0,4} (?:normal|unremarkable|within normal "
        r"limits)",
        r"normal (?:cardio)?mediastin\w+",
    ),
    "Lung Opacity": (r"lungs?(?: \w+){0,3} clear", r"clear lungs"),
    "Consolidation": (r"lungs?(?: \w+){0,3} clear", r"clear lungs"),
}
"""Finding -> wordings that deny it by calling something normal."""

# No denial, though it begins like one: what has not changed is there.
_UNCHANGED = (
    r"(?:no|without)(?: \w+){0,2} (?:change|increase|decrease|worsening|improvement|progression)\w*"
    r"(?: in| of)?|not (?:\w+ )?changed|not only"
)
_DENIED_BEFORE = (
    r"\bno\b|\bnot\b|\bnor\b|\bwithout\b|\bnegative for\b|\b(?:free|clear) of\b|"
    r"\babsence of\b|\bdenies\b|\bresol(?:ved|ution of)\b|\bclearing of\b|\bno longer\b|\bnever\b"
)
_DENIED_AFTER = (
    r"^(?: \w+){0,3} (?:not (?:\w+ )?(?:seen|identified|present|visualized|visualised|evident|"
    r"detected|apparent)|absent|excluded|ruled out|resolved)\b"
)
_DOUBTED_BEFORE = (
    r"\bpossibl[ey]\b|\bmay\b|\bmight\b|\bcould\b|\bquestion(?:able| of)?\b|\bsuspected\b|"
    r"\bsuspicio(?:n|us)\b|\bconcern(?:ing)? for\b|\bcannot (?:be )?(?:exclude|rule out)\w*\b|"
    r"\bnot (?:be )?excluded?\b|\bversus\b|\bvs\b|\bequivocal\b|\bunlikely\b|"
    r"\bdifficult to exclude\b"
)
_DOUBTED_AFTER = (
    r"^(?: \w+){0,3} (?:cannot be (?:entirely |completely )?(?:excluded|ruled out)|not excluded|"
    r"(?:is |are )?(?:possible|suspected|questionable|unlikely)|versus|vs)\b"
)
_SENTENCE = re.compile(r"[.;:\n]+(?=\s|$)|\n")
_CLAUSE = re.compile(r",? (?:but|however|although|though|except|aside from|other than|apart from) ")


def read_findings(report: str) -> dict[str, Status]:
    """Status of every finding that a report mentions; "present" wins over "uncertain" over "absent"
    where it speaks of one twice. `NO_FINDING` is present where nothing else is present or
    uncertain, devices aside, and the report says something."""
    found: dict[str, Status] = {}
    text = re.sub(r"[ \t]+", " ", report.lower())
    for sentence in _SENTENCE.split(text):
        for clause in _CLAUSE.split(sentence):
            for finding, status in _read_clause(clause.strip()):
                found[finding] = _stronger(status, found.get(finding))
    rest = {name: status for name, status in found.items() if name != SUPPORT_DEVICES}
    if text.strip() and all(status == "absent" for status in rest.values()):
        found[NO_FINDING] = "present"
    return found


def _stronger(new: Status, old: Status | None) -> Status:
    order: tuple[Status, ...] = ("present", "uncertain", "absent")
    return min((s for s in (new, old) if s is not None), key=order.index)


def _read_clause(clause: str) -> list[tuple[str, Status]]:
    found: list[tuple[str, Status]] = []
    for finding, patterns in NORMAL.items():
        if any(re.search(rf"\b(?:{pattern})\b", clause) for pattern in patterns):
            found.append((finding, "absent"))
    # Taken out of what denies, and left in what is mentioned.
    denying = re.sub(_UNCHANGED, lambda match: "_" * len(match[0]), clause)
    for finding, patterns in FINDINGS.items():
        for match in re.finditer("|".join(rf"\b(?:{pattern})\b" for pattern in patterns), clause):
            # With the mention itself, which may hold what denies it: "heart is not enlarged".
            before, after = denying[: match.end()], clause[match.end() :]
            # Doubt first: "cannot exclude" and "not excluded" hold a word of denial.
            if re.search(_DOUBTED_BEFORE, before) or re.search(_DOUBTED_AFTER, after):
                found.append((finding, "uncertain"))
            elif re.search(_DENIED_BEFORE, before) or re.search(_DENIED_AFTER, after):
                found.append((finding, "absent"))
            else:
                found.append((finding, "present"))
    return found


ALL_FINDINGS = (NO_FINDING, *FINDINGS)


def clinical_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """F1 of findings that are present, over reports: `micro`, `macro` over findings, `by_finding`
    with `num_positive` of the references. A finding that neither side ever states has no F1; it is
    left out of the macro mean, and `num_findings` says how many are in it. What is uncertain is not
    present."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: expected pairs"
        )
    pairs = [
        (read_findings(said), read_findings(wanted))
        for said, wanted in zip(predictions, references, strict=True)
    ]
    table: dict[str, dict[str, float | int | None]] = {}
    hits = positives = claims = 0
    for finding in ALL_FINDINGS:
        stated = [
            (said.get(finding) == "present", wanted.get(finding) == "present")
            for said, wanted in pairs
        ]
        hit, claim = sum(s and w for s, w in stated), sum(s for s, _ in stated)
        positive = sum(w for _, w in stated)
        f1 = 2 * hit / (claim + positive) if claim + positive else None
        table[finding] = {"num_positive": positive, "f1": f1}
        hits, claims, positives = hits + hit, claims + claim, positives + positive
    known = [row["f1"] for row in table.values() if row["f1"] is not None]
    return {
        "num": len(pairs),
        "micro": 2 * hits / (claims + positives) if claims + positives else None,
        "macro": sum(known) / len(known) if known else None,
        "num_findings": len(known),
        "by_finding": table,
    }
