"""Record folders of format 1 -> format 2, in place.

    python data_prep/upgrade.py prepared/*/train prepared/*/test

FOLDER becomes format 2 and the older one is kept beside it as FOLDER.format1; remove that when you
have seen the new one work. Nothing is downloaded or prepared again.

Format 1 wrote the options of a choice into the text of its question, "A: liver" and "B: spleen" on
lines of their own, and answered "B: spleen". Here, and nowhere else, they are read back out of it.
A choice that cannot be told (two options read the same, so that the answer may mean either) is left
out and named in FOLDER.format1.skipped.jsonl; more of them than --max-skipped are an error. Facts
that stood in `extra["questions"]` go to their questions. Codes of masks are decoded and written
again, and the content hash of the older folder is checked on the way: what is damaged gets no
checksum that says that it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from biascare.durable import claim_name
from biascare.records import (
    FORMAT_VERSION,
    PartWriter,
    Record,
    Turn,
    assemble,
    decode_mask,
    read_manifest,
    read_part,
    row_digest,
    scratch_folder,
)
from biascare.records.vocabulary import FACTS
from data_prep.pipeline.ledger import Ledger, check_skipped
from data_prep.pipeline.program import run_program
from data_prep.pipeline.shards import ledger_path
from data_prep.wording.conversations import Question, choice_of, facts_of, turns_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RENAMED_FACTS = {"q_lang": "language"}
UNCHANGED = (
    "id", "image", "height", "width", "task", "modality", "anatomy", "labels", "source", "split",
    "patient_id", "study_id", "sex", "age", "race",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of format 1")
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=0.01,
        help="more choices left out than this share of the questions are an error; "
        "default: %(default)s",
    )
    args = parser.parse_args(arguments)
    for folder in args.folders:
        Console().print(upgrade(folder.absolute(), args.max_skipped), soft_wrap=True)


def upgrade(folder: Path, max_skipped: float) -> str:
    """Convert one folder; returns what to tell the user.

    Raises ValueError for what is no record folder, for damaged rows and for too many choices that
    cannot be told. The folder is as it was then.
    """
    old, new = (folder.with_name(f"{folder.name}.format{version}") for version in (1, 2))
    if not folder.exists() and old.exists() and new.exists():  # killed between the two renames
        claim_name(new, folder)
        return f"{folder}: the conversion is complete now; the older folder is {old}"
    manifest = read_manifest(folder)
    if manifest["format_version"] == FORMAT_VERSION:
        return f"{folder}: format {FORMAT_VERSION} already, left as it is"
    if manifest["format_version"] != 1:
        raise ValueError(
            f"{folder}: format version {manifest['format_version']}, only version 1 is converted"
        )
    # It may be the only sound copy of somebody's data.
    if old.exists():
        raise ValueError(f"{old} exists, an earlier conversion left it; move it away first")
    ledger = Ledger(ledger_path(old))
    _convert(folder, new, manifest, ledger, max_skipped)
    # Two renames and no copy: whenever it is killed, each version stands whole under some name.
    folder.rename(old)
    claim_name(new, folder)
    left_out = ledger.num_skipped
    note = f", {left_out} choices left out, see {ledger.path}" if left_out else ""
    return f"{folder}: {manifest['num_rows']} records{note}; the older folder is {old}"


def _convert(
    folder: Path, new: Path, manifest: dict[str, Any], ledger: Ledger, max_skipped: float
) -> None:
    """Write `folder` as format 2 to `new`, which replaces what an interrupted run left there."""
    about = {name: manifest[name] for name in ("source", "split")}
    part = PartWriter(scratch_folder(new), **about)
    digest = hashlib.sha256()
    try:
        for row in track(rows_of(folder), folder.name, total=manifest["num_rows"], transient=True):
            # As the row was stored: the older hash speaks of the older form.
            digest.update(row_digest(row))
            try:
                part.write(record_of(row, ledger))
            except ValueError as error:
                raise ValueError(f"{folder}, {row['id']}: {error}") from error
        if digest.hexdigest() != manifest["content_hash"]:
            raise ValueError(
                f"{folder}: the rows are not those its manifest was written for; copy the folder "
                "again from where it is whole, or prepare it again"
            )
        # Before the folder is made: a conversion that loses much must not look complete.
        check_skipped(ledger.path, num_items=manifest["num_language_units"], limit=max_skipped)
        part.close()
        assemble(
            [read_part(part.folder)],
            new,
            version=manifest["version"],
            licence=manifest["licence"],
            preparation=manifest.get("preparation"),
            overwrite=True,
            **about,
        )
    finally:
        part.abandon()
        shutil.rmtree(part.folder, ignore_errors=True)


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Stored rows of a folder of format 1. Raises ValueError when its files do not read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for entry in state["_data_files"]:
            with pa.memory_map(str(folder / Path(entry["filename"]).name)) as file:
                for batch in pa.ipc.open_stream(file):
                    for index in range(batch.num_rows):
                        yield batch.slice(index, 1).to_pylist()[0]
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is damaged ({error}); prepare it again") from error


def record_of(row: dict[str, Any], ledger: Ledger) -> Record:
    """A row of format 1 -> its record. Choices that cannot be told go to the ledger."""
    size = row["height"], row["width"]
    extra = json.loads(row["extra"])
    turns = row["conversations"]
    stated = _stated_facts(extra, len(turns) // 2)
    conversations: list[Turn] = []
    for number, facts in enumerate(stated):
        asked, answered = turns[2 * number : 2 * number + 2]
        try:
            question = question_of(asked["text"], answered["text"], asked["kind"])
        except ValueError as reason:
            ledger.skip(f"{row['id']}: {asked['text']!r}", str(reason))
        else:
            conversations += turns_of([question], [facts])
    return Record(
        **{name: row[name] for name in UNCHANGED},
        # Decoded and encoded anew: the new checksum must not vouch for a damaged code.
        targets=[(t["name"], decode_mask(t["rle"], *size).view(np.bool_)) for t in row["targets"]],
        conversations=conversations,
        extra=extra,
    )


def question_of(text: str, answer: str, kind: str) -> Question:
    """A question and answer of format 1. Raises ValueError for a choice that cannot be told."""
    if kind != "choice":
        return Question(text, answer, kind)
    question, *lines = text.split("\n")
    options = [
        line.removeprefix(f"{letter}: ")
        for letter, line in zip(LETTERS, lines, strict=False)
        if line.startswith(f"{letter}: ")
    ]
    # Every line must be an option: a question of several lines would otherwise lose its end.
    if len(options) < 2 or len(options) != len(lines):
        raise ValueError("a choice without lettered options")
    if answer not in lines:
        raise ValueError("the answer is none of the options")
    return choice_of(question, options, lines.index(answer))


def _stated_facts(extra: dict[str, Any], num_questions: int) -> list[dict[str, str]]:
    """Facts of each question; taken out of `extra` where they are those of the vocabulary. The list
    runs parallel to the first questions of the row."""
    stated = [
        {RENAMED_FACTS.get(key, key): value for key, value in entry.items()}
        for entry in extra.get("questions", [])
    ]
    # Foreign keys mean that "questions" is something else; it stays in extra as it was.
    if len(stated) > num_questions or not all(set(entry) <= set(FACTS) for entry in stated):
        return [{}] * num_questions
    extra.pop("questions", None)
    return [facts_of(**entry) for entry in stated] + [{}] * (num_questions - len(stated))


if __name__ == "__main__":
    run_program(main)
