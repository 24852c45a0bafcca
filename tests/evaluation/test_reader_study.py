"""Readers' logs and what is said of them: nothing mistyped counts, planted effects are found."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biascare.evaluation.cases import LabelCase
from biascare.evaluation.reader_log import (
    WITH,
    WITHOUT,
    ReaderAnswer,
    append_answer,
    read_logs,
)
from biascare.evaluation.reader_study import ALL_READERS, analyse, make_study
from biascare.reports.reader_study import sentences
from tests.evaluation.planted_readers import (
    CATEGORIES,
    planted_answers,
    planted_cases,
    write_cases,
    write_log,
)
from tests.tiny import tiny_facts

ROOT = Path(__file__).parents[2]
SKILL = {"A": (0.6, 0.5), "B": (0.7, 0.5), "C": (0.75, 0.4)}


def answer(**changed: Any) -> ReaderAnswer:
    stated = {
        "reader": "A",
        "round": WITHOUT,
        "case": "img_0",
        "choices": ["nevus"],
        "seconds": 3.0,
    }
    return ReaderAnswer(**stated | changed)


def found_of(
    cases: list[LabelCase], answers: list[ReaderAnswer], num_draws: int = 100
) -> dict[str, Any]:
    return analyse(make_study(cases, answers), num_draws=num_draws)


# ---------------------------------------------------------------- the log


def test_what_is_appended_is_read_again_and_the_last_of_equal_answers_counts(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    first, other = answer(confidence=0.7), answer(case="img_1")
    changed = answer(choices=["melanoma"], seconds=9.0)
    for one in (first, other, changed):
        append_answer(path, one)
    log = read_logs([path], CATEGORIES, {"img_0", "img_1"})
    assert log.answers == [changed, other]
    assert (log.num_replaced, log.num_cut) == (1, 0)
    assert len(path.read_text().splitlines()) == 3, "nothing is ever taken away"


def test_a_line_that_a_crash_cut_short_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_answer(path, answer(reader="Ä"))
    whole = path.read_bytes()
    for end in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:end])
        assert read_logs([path], CATEGORIES, {"img_0"}).num_cut == 1
        append_answer(path, answer(reader="Ä", case="img_1"))
        log = read_logs([path], CATEGORIES, {"img_0", "img_1"})
        assert [one.case for one in log.answers] == ["img_0", "img_1"]
        assert log.num_cut == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"choices": ["nevsu"]}, r"line 2: choices: got 'nevsu'.*did you mean 'nevus'"),
        ({"choices": ["nevus", "nevus"]}, r"expected each category once"),
        ({"choices": []}, r"expected exactly one category"),
        ({"choices": "nevus"}, r"choices: .*array.*got 'nevus'.*docs/reader_study.md"),
        ({"case": "img_00"}, r"case 'img_00' is not among the 1 of --cases; did you mean 'img_0'"),
        ({"round": "second"}, r"round: .*'without' or 'with'.*got 'second'"),
        ({"suggestion": ["nevus"]}, r"suggestion: got \['nevus'\] in round 'without'"),
        ({"confidence": 80}, r"confidence: .*less than or equal to 1, got 80"),
        ({"seconds": "3"}, r"seconds: .*number.*got '3'"),
        ({"seconds": -1.0}, r"seconds: .*greater than or equal to 0"),
        ({"seconds": float("nan")}, r"seconds: "),
        ({"confidance": 0.5}, r"confidance: .*got 0.5"),
        ({"reader": ""}, r"reader: "),
    ],
)
def test_a_wrong_line_is_named_with_what_was_got_and_expected(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = write_log(tmp_path / "a.jsonl", [answer()])
    line = dataclasses.asdict(answer()) | changed
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        read_logs([path], CATEGORIES, {"img_0"}, one_choice=True)


def test_a_line_damaged_in_its_middle_is_an_error_and_no_crash_of_long_ago(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.jsonl", [answer()])
    path.write_text(path.read_text().replace('"choices": [', '"choices" ['))
    with pytest.raises(ValueError, match=r"line 1: not an answer .*JSON"):
        read_logs([path], CATEGORIES, {"img_0"})


# ---------------------------------------------------------------- counted by hand


def hand_study() -> dict[str, Any]:
    """Three cases, two readers: A turns one answer right and one wrong, B turns one wrong."""
    cases = planted_cases(3, right=1.0)
    truth = [case.labels[case.present.index(True)] for case in cases]
    wrong = [next(name for name in CATEGORIES if name != one) for one in truth]
    said = {
        ("A", WITHOUT): [truth[0], wrong[1], truth[2]],
        ("A", WITH): [wrong[0], truth[1], truth[2]],
        ("B", WITHOUT): [truth[0], truth[1], truth[2]],
        ("B", WITH): [truth[0], truth[1], wrong[2]],
    }
    answers = [
        answer(
            reader=reader,
            round=name,
            case=cases[k].id,
            choices=[one],
            seconds=float(k + 1),
            suggestion=None if name == WITHOUT else [truth[k] if k else wrong[k]],
        )
        for (reader, name), chosen in said.items()
        for k, one in enumerate(chosen)
    ]
    return found_of(cases, answers)


def test_accuracy_changes_and_times_are_what_a_hand_counts() -> None:
    found = hand_study()
    a, b = found["readers"]
    assert (a["wrong_to_right"], a["right_to_wrong"], a["worse"]) == (1, 1, False)
    assert (b["wrong_to_right"], b["right_to_wrong"], b["worse"]) == (0, 1, True)
    assert [row["accuracy"] for row in found["rounds"]] == pytest.approx([2 / 3, 2 / 3, 1, 2 / 3])
    assert {row["seconds_median"] for row in found["rounds"]} == {2.0}
    assert found["comparison"]["accuracy"]["difference"] == pytest.approx(-1 / 6)
    assert found["alone"]["accuracy"] == 1
    assert found["alone"][WITH]["value"] == pytest.approx(-1 / 3)
    pooled = {
        row["suggestion"]: row for row in found["suggestions"] if row["reader"] == ALL_READERS
    }
    assert (pooled["wrong"]["num"], pooled["wrong"]["right_to_wrong"]) == (2, 1)
    assert (pooled["right"]["num"], pooled["right"]["wrong_to_right"]) == (4, 1)
    assert any("2 suggestions that were shown are not" in note for note in found["notes"])
    present = [
        row
        for row in found["categories_changed"]
        if row["reader"] == ALL_READERS and row["state"] == "present"
    ]
    assert sum(row["num"] for row in present) == 6
    assert sum(row["right_to_wrong"] for row in present) == 2
    assert any("Reader B got worse" in line for line in sentences(found))


def test_findings_are_right_where_all_that_was_judged_is_ticked_rightly() -> None:
    facts = tiny_facts("x", anatomy="chest")
    shared = {"labels": ["edema", "effusion", "nodule"], "exclusive": False, "seconds": 0.1}
    cases = [
        LabelCase(
            id=name,
            facts=facts._replace(image_id=name),
            probabilities=[0.5] * 3,
            present=present,
            **shared,
        )
        for name, present in (
            ("a", [True, False, None]),
            ("b", [False, False, False]),
            ("unjudged", [None, None, None]),
        )
    ]
    study = make_study(
        cases,
        [
            answer(case="a", choices=["edema", "nodule"]),
            answer(case="b", choices=[]),
            answer(case="unjudged", choices=["edema"]),
            answer(round=WITH, case="a", choices=["edema", "effusion"], suggestion=["edema"]),
            answer(round=WITH, case="b", choices=[], suggestion=["nodule"]),
        ],
    )
    assert study.correct[:, 0].tolist() == [[1, 1], [0, 1]], "the unjudged case is left out"
    assert study.model.tolist() == [1, 0], "what was suggested stands for the model"
    found = analyse(study, num_draws=100)
    assert "1 cases have no judged category and are left out." in found["notes"]
    nodule = [row for row in found["categories_changed"] if row["category"] == "nodule"]
    assert {row["num"] for row in nodule} == {1}, "a finding that nobody judged is no reading"


# ---------------------------------------------------------------- planted effects


def test_a_gain_a_loss_and_blind_trust_are_found_where_they_were_planted() -> None:
    cases = planted_cases(300)
    found = found_of(cases, planted_answers(cases, SKILL | {"expert": (0.97, 0.6)}))
    by_reader = {row["reader"]: row for row in found["readers"]}
    assert [name for name, row in by_reader.items() if row["worse"]] == ["expert"]
    assert by_reader["expert"]["p_holm"] < 0.05 and by_reader["A"]["difference"] > 0.05
    wrong = next(row for row in found["suggestions"] if row["suggestion"] == "wrong")
    assert wrong["right_with"] < wrong["right_without"]
    lasted = found["comparison"]["seconds_ratio"]
    assert lasted["low"] < 2 / 3 < lasted["high"] < 1


def test_the_order_of_answers_and_cases_changes_nothing() -> None:
    cases = planted_cases(60)
    answers = planted_answers(cases, SKILL)
    first = found_of(cases, answers)
    rng = np.random.default_rng(0)
    shuffled = [answers[k] for k in rng.permutation(len(answers))]
    again = found_of(cases, shuffled)
    assert again == first
    other = found_of([cases[k] for k in rng.permutation(len(cases))], answers)
    assert other["readers"] == first["readers"]
    assert other["comparison"]["accuracy"]["p"] == pytest.approx(
        first["comparison"]["accuracy"]["p"]
    )


def test_two_categories_with_confidence_have_areas_too_and_swapping_them_changes_none() -> None:
    names = ("benign", "malignant")
    cases = planted_cases(120, categories=names)
    answers = planted_answers(cases, SKILL)
    area = found_of(cases, answers)["comparison"]["auc"]
    assert area["num_readers"] == 3 and 0.5 < area["means"][0] < area["means"][1] < 1
    swapped = [
        dataclasses.replace(
            case,
            labels=case.labels[::-1],
            present=case.present[::-1],
            probabilities=case.probabilities[::-1],
        )
        for case in cases
    ]
    assert found_of(swapped, answers)["comparison"]["auc"]["means"] == pytest.approx(area["means"])


def test_images_of_one_patient_do_not_count_as_so_many_patients() -> None:
    """Every patient's image four times, read the same each time."""
    cases = planted_cases(60)
    answers = planted_answers(cases, SKILL)
    once = found_of(cases, answers)
    copies, said = [], []
    for k in range(4):
        name = {case.id: f"{case.id}_{k}" for case in cases}
        copies += [
            dataclasses.replace(c, id=name[c.id], facts=c.facts._replace(image_id=name[c.id]))
            for c in cases
        ]
        said += [dataclasses.replace(one, case=name[one.case]) for one in answers]
    often = found_of(copies, said)
    assert often["patients_repeat"] and not once["patients_repeat"]
    a, b = once["comparison"]["accuracy"], often["comparison"]["accuracy"]
    assert (b["p"], b["low"], b["cov2"]) == pytest.approx((a["p"], a["low"], a["cov2"]))
    widths = [[row["high"] - row["low"] for row in one["rounds"]] for one in (once, often)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_a_spread_between_groups_is_named_by_reader_and_round_with_its_n() -> None:
    cases = planted_cases(240)
    answers = []
    for one in planted_answers(cases, SKILL):
        case = cases[int(one.case.partition("_")[2])]
        truth = case.labels[case.present.index(True)]
        if one.reader == "A" and one.round == WITHOUT and case.facts.sex == "M":
            one = dataclasses.replace(one, choices=[truth])
        answers.append(one)
    found = found_of(cases, answers, num_draws=1000)
    beyond = [row for row in found["groups"] if row["p_holm"] is not None and row["p_holm"] < 0.05]
    assert ("sex", WITHOUT, "A") in [(r["attribute"], r["round"], r["reader"]) for r in beyond]
    row = next(row for row in beyond if row["reader"] == "A")
    assert (row["worst"], row["best"]) == ("F", "M")
    assert {group["name"]: group["num"] for group in row["groups"]} == {"F": 120, "M": 120}


# ---------------------------------------------------------------- what is missing is said


def test_a_reader_of_one_round_is_left_out_of_the_comparison_by_name() -> None:
    cases = planted_cases(40)
    answers = [
        one
        for one in planted_answers(cases, SKILL | {"late": (0.7, 0.5)})
        if one.reader != "late" or one.round == WITHOUT
    ]
    found = found_of(cases, answers)
    assert found["comparison"]["accuracy"]["num_readers"] == 3
    assert any(note.startswith("Reader late has answers on fewer") for note in found["notes"])
    assert any("40 of 160 answers with the model are missing" in n for n in found["notes"])


def test_cases_that_nobody_read_count_neither_for_readers_nor_for_the_model() -> None:
    cases = planted_cases(60, right=1.0)
    unread = [
        dataclasses.replace(case, id=f"other_{case.id}", probabilities=case.probabilities[::-1])
        for case in cases
    ]
    answers = planted_answers(cases, SKILL)
    found, alone = found_of([*cases, *unread], answers), found_of(cases, answers)
    assert found.pop("notes") == ["60 cases were answered by no reader and are left out."]
    assert found == {key: value for key, value in alone.items() if key != "notes"}
    assert found["alone"]["accuracy"] == 1


def test_one_reader_alone_is_described_and_not_generalised() -> None:
    cases = planted_cases(40)
    found = found_of(cases, planted_answers(cases, {"A": (0.6, 0.5)}))
    assert found["comparison"]["accuracy"] is None and len(found["readers"]) == 1
    assert any("nothing can be said of readers in general" in note for note in found["notes"])
    assert found["alone"]["accuracy"] is not None and found["alone"][WITH] is None


def test_few_cases_without_any_change_leave_the_change_uncertain() -> None:
    cases = planted_cases(8)
    found = found_of(cases, planted_answers(cases, {"A": (1.0, 0.0), "B": (1.0, 0.0)}))
    row = found["readers"][0]
    assert (row["difference"], row["p"]) == (0, 1) and row["low"] < -0.2 and row["high"] > 0.2
    assert found["rounds"][0]["low"] < 0.8, "8 of 8 may still be 70 %"
    assert found["comparison"]["accuracy"]["p"] is None


def test_cases_of_different_categories_or_equal_ids_are_refused() -> None:
    cases = planted_cases(4)
    with pytest.raises(ValueError, match="two cases have the same id"):
        make_study([*cases, cases[0]], [answer()])
    other = planted_cases(1, categories=("a", "b"))
    with pytest.raises(ValueError, match="the same categories in the same order"):
        make_study([*cases, *other], [answer()])


# ---------------------------------------------------------------- the program


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    words = ["reader_study.py", *map(str, arguments), "--num-draws", "100"]
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_path(str(ROOT / "scripts" / "reader_study.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_logs_and_cases_become_a_page_markdown_json_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = planted_cases(60)
    answers = planted_answers(cases, SKILL | {"<b>D</b>": (0.7, 0.5)})
    write_cases(tmp_path / "cases.jsonl", cases)
    logs = [
        write_log(tmp_path / f"{number}.jsonl", [one for one in answers if one.reader == reader])
        for number, reader in enumerate(dict.fromkeys(one.reader for one in answers))
    ]
    for name in ("first", "second"):
        output = tmp_path / name
        arguments = ("--analyse", *logs, "--cases", tmp_path, "--output", output)
        assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "4 readers gave 480 answers on 60 cases of 60 patients" in printed
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert {"reader_study.html", "reader_study.md", "reader_study.json", "readers.csv"} <= set(
        files
    )
    page = files["reader_study.html"].decode()
    assert "<svg" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "<b>D</b>" not in page and "&lt;b&gt;D&lt;/b&gt;" in page
    found = json.loads(files["reader_study.json"])
    assert found["comparison"]["accuracy"]["num_readers"] == 4
    assert len(files["readers.csv"].decode().splitlines()) == 5


def test_a_wrong_file_ends_the_program_with_what_to_do_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, output = planted_cases(4), tmp_path / "out"
    write_cases(tmp_path / "cases.jsonl", cases)
    write_cases(tmp_path / "empty.jsonl", [])
    log = write_log(tmp_path / "a.jsonl", [answer(choices=["nevi"])])
    for arguments, message in (
        ((tmp_path / "none.jsonl", "--cases", tmp_path), "none.jsonl does not exist"),
        ((log, "--cases", tmp_path / "no"), "name the --output folder"),
        ((log, "--cases", tmp_path / "empty.jsonl"), "expected label cases or questions"),
        ((log, "--cases", tmp_path), "did you mean 'nevus'"),
    ):
        assert run(monkeypatch, "--analyse", *arguments, "--output", output) == 2
        assert message in capsys.readouterr().err
    assert not output.exists()
