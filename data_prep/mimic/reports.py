"""Findings and impression of a MIMIC-CXR report: text with loose habits, no fixed form.

    report_sections(text)  ->  Sections(findings="The lungs are clear.", impression="Normal.")

Headers occur in any case, misspelt, on a line of their own or before the text; preliminary readings
("WET READ") stand above the final report; some reports have no header for what they describe.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

FINAL_REPORT = re.compile(r"^.*\bFINAL (?:REPORT|ADDENDUM)\b.*$", re.MULTILINE)
RULE = re.compile(r"^\s*_{5,}\s*$", re.MULTILINE)
HEADER = re.compile(
    r"(?:^[ \t]*([A-Z][A-Za-z0-9 ,/&()\-]{1,60}?)|\b(FINDINGS|IMPRESSION))[ \t]*:(?!\d)",
    re.MULTILINE,
)
"""At the start of a line, or one of the two in capitals anywhere. A time (8:46) is no header."""

BLANK_LINE = re.compile(r"\n\s*\n")

ADMINISTRATIVE = (
    "addendum", "clinical history", "clinical indication", "clinical information", "comparison",
    "comparisons", "comparison film", "date", "exam", "examination", "history", "indication",
    "indications", "notification", "notifications", "patient history", "procedure", "reason",
    "reason for exam", "reason for examination", "reason for study", "recommendation",
    "recommendations", "study", "technique", "type of examination", "wet read",
)  # fmt: skip
"""Sections that say why, how and when, not what is seen. One paragraph each: what follows after a
blank line without a header of its own is description again."""

MIN_LIKENESS = 0.8
"""difflib ratio from which a header counts as a misspelling of "findings" or "impression"; the
nearest other header, "indications", reaches 0.63 and 0.57."""


class Sections(NamedTuple):
    """What a report says about the image; either may be empty, not both."""

    findings: str
    impression: str

    def text(self) -> str:
        """The answer to a report request, one line per section."""
        lines = [("Findings", self.findings), ("Impression", self.impression)]
        return "\n".join(f"{name}: {content}" for name, content in lines if content)


def report_sections(report: str) -> Sections | None:
    """Findings and impression of one report; None when it describes nothing.

    A section "findings and impression" is given as findings. When neither has a header, all text
    that is not administrative is the findings. Line breaks inside a section become blanks; the
    release's "___" for removed words stays.
    """
    # A preliminary reading above it may say the contrary of the final one.
    final = FINAL_REPORT.split(report)[-1]
    found: dict[str, list[str]] = {"findings": [], "impression": [], "other": []}
    for header, body in _split(RULE.sub("", final)):
        kind = _kind(header)
        paragraphs = [" ".join(part.split()) for part in BLANK_LINE.split(body)]
        if kind == "administrative":
            # One paragraph of the reason or technique; what follows without a header describes the
            # image.
            kind, paragraphs = "other", paragraphs[1:]
        found[kind] += [paragraph for paragraph in paragraphs if paragraph]
    # Only without either header: beside them, other text is history and no description.
    if not (found["findings"] or found["impression"]):
        found["findings"] = found["other"]
    sections = Sections(" ".join(found["findings"]), " ".join(found["impression"]))
    return sections if any(sections) else None


def _split(text: str) -> list[tuple[str, str]]:
    """[(header, text up to the next header)]; what stands before the first has an empty one."""
    found = ((match[1] or match[2], match) for match in HEADER.finditer(text))
    marks = [
        (words, match.start(), match.end())
        for words, match in found
        # Capitals make a header of anything; other writing only of a known one.
        if words.isupper() or _kind(words) != "other"
    ]
    starts = [0, *(end for _, _, end in marks)]
    ends = [*(start for _, start, _ in marks), len(text)]
    headers = ["", *(words for words, _, _ in marks)]
    bodies = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return list(zip(headers, bodies, strict=True))


def _kind(header: str) -> str:
    """findings | impression | administrative | other."""
    plain = " ".join(header.lower().replace("(s)", "s").split())
    if plain in ADMINISTRATIVE:
        return "administrative"
    # "FINDINGS AND IMPRESSION" is one section; its first word says where it goes.
    first = re.split(r" and |/|&|,", plain)[0].strip()
    for kind in ("findings", "impression"):
        if difflib.SequenceMatcher(None, first, kind).ratio() >= MIN_LIKENESS:
            return kind
    return "impression" if plain in ("conclusion", "conclusions") else "other"
