"""PMC-VQA v2 -> record folders of figures with multiple-choice questions.

    python data_prep/pmc_vqa.py --source PMC-VQA --output prepared --num-workers 8

Layout of --source:

    train_2.csv, test_2.csv     index, Figure_path, Caption, Question, Choice A .. Choice D, Answer
    figures/PMC*.jpg            of images_2.zip, extracted; or images_2.zip itself, left as it is

The files are the official split. The texts of the choices begin with a letter of their own (" A:
..."), which is taken off: records hold bare options. The right one is found by the text of the
answer, because the release writes it in several ways. A question whose answer is none of its
choices, or two of them, goes to the ledger. Choices keep their order. Licence: CC BY-SA; the
figures come from PubMed Central's open-access subset, as do those of PubMedVision.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from biascare.records import Record
from biascare.records.vocabulary import UNSPECIFIED_MODALITY
from data_prep.formats.zip_images import ImageFinder, Place, read_place
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    find_table,
    note_count,
    note_repeated,
    read_image,
    read_table,
)
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import (
    Asked,
    ImageQuestions,
    Question,
    Refused,
    choice_of,
    facts_of,
    gather,
    name_of,
    one_line,
    turns_of,
)

TABLES = {"train": "train_2.csv", "test": "test_2.csv"}
NUM_QUESTIONS = {"train": 152_603, "test": 33_430}
CHOICES = tuple(f"Choice {letter}" for letter in "ABCD")
COLUMNS = ("Figure_path", "Question", *CHOICES, "Answer")
FOLDERS = ("figures", "images", "images_2/figures", "")
"""Where the figures lie after extraction, by the ways to extract them."""

ARCHIVES = "images*.zip"
OWN_LETTER = re.compile(r"^\s*([A-D])\s*:\s*(?=\S)")
"""A choice that begins with its own letter: " A: edema". "C. difficile" does not."""

BARE_LETTER = re.compile(r"^\s*([A-D])\s*[:.)]?\s*$")
LICENCE = "PMC-VQA: CC BY-SA; figures under the licences of their articles in PubMed Central"
ARTICLE = re.compile(r"^(PMC\d+)_")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the downloaded dataset")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source))


def plan(source: Path) -> list[Release]:
    """One release per table."""
    finder = ImageFinder(source, FOLDERS, ARCHIVES)
    releases = []
    for split, table in TABLES.items():
        gathered = gather(read_rows(find_table(source, table)))
        note_repeated(f"PMC-VQA {split}", gathered.num_repeated)
        note_count(f"PMC-VQA {split} questions", gathered.num_questions, NUM_QUESTIONS[split])
        items = [
            (item, finder.place(item.image) if isinstance(item, ImageQuestions) else None)
            for item in gathered.items
        ]
        releases.append(
            Release(
                source="pmc_vqa",
                split=split,
                version="PMC-VQA version 2",
                licence=LICENCE,
                items=items,
                convert=partial(convert, source, split),
                name_of=_name,
            )
        )
    return releases


def read_rows(path: Path) -> Iterator[Asked]:
    """Questions of one table."""
    for number, row in enumerate(read_table(path, COLUMNS), start=1):
        name = f"{path.name}:{number}"
        try:
            question, reason = choice_question(row), ""
        except ValueError as error:
            question, reason = None, str(error)
        facts = facts_of(qid=row.get("index"))
        yield Asked(row["Figure_path"].strip(), name, question, reason, facts)


def choice_question(row: dict[str, str]) -> Question:
    """A row -> question with its options. Raises ValueError with the reason."""
    question = one_line(row["Question"])
    options = [option_text(row[name]) for name in CHOICES]
    if not (question and all(options)):
        raise ValueError("question or a choice is empty")
    # Options keep the order of the release: its letters may be cited in the question.
    return choice_of(question, options, right_option(options, row["Answer"]))


def option_text(choice: str) -> str:
    """The text of a choice without the letter it begins with."""
    return one_line(OWN_LETTER.sub("", choice, count=1))


def right_option(options: list[str], answer: str) -> int:
    """Position of the answer among the options.

    The text decides, compared without case and final stop. Only an answer that is nothing but a
    letter is taken for one. Raises ValueError when no option, or more than one, has the text.
    """
    texts = [_comparable(option) for option in options]
    # As it stands first: "A: B cells" may be an option of its own text.
    for text in (_comparable(answer), _comparable(option_text(answer))):
        if texts.count(text) == 1:
            return texts.index(text)
        # Nobody knows which of two equal choices is meant; either letter would be scored wrong.
        if texts.count(text) > 1:
            raise ValueError("several choices have the text of the answer")
    # Last, since "C" may also be the text of an option (vitamin C, a blood group).
    letter = BARE_LETTER.match(answer)
    if letter is None:
        raise ValueError("the answer is none of the choices" if answer.strip() else "no answer")
    return "ABCD".index(letter[1])


def _comparable(text: str) -> str:
    return one_line(text).casefold().rstrip(". ")


def _name(item: tuple[ImageQuestions | Refused, Place | None]) -> str:
    return name_of(item[0])


def convert(
    source: Path, split: str, item: tuple[ImageQuestions | Refused, Place | None]
) -> Record:
    """One figure with its questions. Raises UnusableItemError with the reason."""
    asked, place = item
    if isinstance(asked, Refused):
        raise UnusableItemError(asked.reason)
    image = read_image(read_place(source, place))
    article = ARTICLE.match(Path(asked.image).name)
    return Record(
        id=f"pmc_vqa/{Path(asked.image).stem}",
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=turns_of(asked.questions, asked.facts),
        task="vqa",
        modality=UNSPECIFIED_MODALITY,
        source="pmc_vqa",
        split=split,
        patient_id=None,
        study_id=None,
        sex=None,
        age=None,
        race=None,
        # Figures of one article may show one patient, and no other id is there.
        extra={"article": article[1]} if article else {},
    )


if __name__ == "__main__":
    run_program(main)
