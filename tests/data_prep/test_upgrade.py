"""Folders of format 1 open after one command, with nothing lost and nothing damaged made whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from biascare.data.chat import written
from biascare.records import Records, Turn
from data_prep import upgrade

FIXTURE = Path(__file__).parents[1] / "records" / "fixtures" / "format1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "train"))


def run(folder: Path, *more: str) -> None:
    upgrade.main([str(folder), *more])


def stored(folder: Path) -> list[dict]:
    return list(upgrade.rows_of(folder))


def test_a_folder_of_format_1_says_which_command_converts_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"version 1.*python data_prep/upgrade\.py {folder}"):
        Records(folder)


def test_everything_of_the_older_folder_is_there_and_it_is_kept(folder: Path) -> None:
    before = stored(folder)
    run(folder, "--max-skipped", "0.5")
    records = Records(folder)
    records.verify()
    assert len(records) == len(before) == 4
    for index, old in enumerate(before):
        row = records[index]
        same = set(old) - {"conversations", "extra"}
        assert {name: row[name] for name in same} == {name: old[name] for name in same}
        if row["id"] != "old/3":
            turns = [Turn(**turn) for turn in row["conversations"]]
            assert written(turns) == [turn["text"] for turn in old["conversations"]]
            assert [turn.kind for turn in turns] == [turn["kind"] for turn in old["conversations"]]
    assert stored(folder.with_name("train.format1")) == before
    kept = ("source", "split", "version", "licence", "num_rows", "targets", "sex")
    manifest = json.loads((FIXTURE / "manifest.json").read_text())
    assert {k: records.manifest[k] for k in kept} == {k: manifest[k] for k in kept}


def test_options_and_facts_are_told_apart_from_the_text(folder: Path) -> None:
    run(folder, "--max-skipped", "0.5")
    row = Records(folder)[0]
    closed, _, choice, answer = (Turn(**turn) for turn in row["conversations"])
    assert (closed.options, closed.facts) == (
        (), {"qid": "7", "question_type": "ORGAN, POS", "organ": "ABD"},
    )  # fmt: skip
    assert (choice.text, choice.options) == (
        "Which: organ?", ("the liver", "spleen", "A: liver"),
    )  # fmt: skip
    assert choice.facts == {"qid": "8", "language": "en", "triple": "vhead, _"}
    assert (answer.text, answer.options) == ("the liver", ())
    assert row["extra"] == {"boxes": [1]}  # the facts stand with their questions now


def test_a_choice_that_cannot_be_told_is_named_and_too_many_leave_the_folder_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"1 of 5 items skipped.*several choices"):
        run(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run(folder, "--max-skipped", "0.5")
    assert "1 choices left out" in " ".join(capsys.readouterr().out.split())
    ledger = folder.with_name("train.format1.skipped.jsonl")
    assert "old/3: 'Why?" in json.loads(ledger.read_text())["item"]
    (left,) = (r for r in map(Records(folder).__getitem__, range(4)) if r["id"] == "old/3")
    assert [turn["text"] for turn in left["conversations"]] == ["Is it?", "no"]
    names = {"train", "train.format1", "train.format1.skipped.jsonl"}
    assert {path.name for path in folder.parent.iterdir()} == names


@pytest.mark.parametrize(
    ("text", "answer", "message"),
    [
        ("Why? A: x B: y", "A: x", "without lettered options"),
        ("Why?\nA: x", "A: x", "without lettered options"),
        ("Why?\nA: x\nor\nB: y", "A: x", "without lettered options"),
        ("Why?\nA: x\nB: y", "x", "none of the options"),
    ],
)
def test_what_is_not_the_older_form_of_a_choice_is_refused(
    text: str, answer: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        upgrade.question_of(text, answer, "choice")


def test_a_damaged_folder_is_not_made_whole(folder: Path) -> None:
    (shard,) = folder.glob("data-00001*")
    shard.write_bytes(shard.read_bytes().replace(b"Is it?", b"Is he?"))
    with pytest.raises(ValueError, match="not those its manifest was written for"):
        run(folder, "--max-skipped", "0.5")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["train"]


def test_a_second_run_changes_nothing_and_an_interrupted_one_is_completed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "--max-skipped", "0.5")
    first = Records(folder).manifest
    run(folder)
    assert "left as it is" in capsys.readouterr().out
    folder.rename(folder.with_name("train.format2"))  # as if killed between the two renames
    run(folder)
    assert Records(folder).manifest == first


def test_what_prepared_a_folder_stays_noted(folder: Path) -> None:
    path = folder / "manifest.json"
    about = {"items": "abc", "options": {"version": '"1"'}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preparation": about}))
    run(folder, "--max-skipped", "0.5")
    assert Records(folder).manifest["preparation"] == about
