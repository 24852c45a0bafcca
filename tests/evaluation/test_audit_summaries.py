"""What the audit says of questions asked otherwise, of labels and of volumes, in every form."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biascare.evaluation.audit.audit import audit
from biascare.evaluation.cases import AnswerCase, Cases, MaskCase, SlicePlace, Variant
from biascare.reports.audit import write_audit
from biascare.reports.audit_words import flip_sentence, headlines, reliance_sentence
from tests.evaluation.test_audit import (
    FEW,
    HEADER,
    answer_case,
    cases_of,
    label_case,
    mask_case,
)


def asked(number: int, text: str, reference: str, **texts: str) -> AnswerCase:
    """A closed case with variants "without_image" or "sex__woman" and what they were answered."""
    case = answer_case(number, text, reference, patient_id=f"p{number}")
    variants = {
        name.replace("__", ": ").replace("_", " "): Variant(
            prompt="",
            text=said,
            option_log_probs=[math.log(0.8), math.log(0.2)][:: 1 if said == "yes" else -1],
        )
        for name, said in texts.items()
    }
    return replace(case, variants=variants)


def blindly(num: int, right: int, black: int, without: int = 0) -> list[AnswerCase]:
    """`num` questions of which so many are answered rightly with the image, black, without."""

    def said(k: int, limit: int) -> str:
        return "yes" if k < limit else "no"

    return [
        asked(
            k,
            said(k, right),
            "yes",
            black_image=said(k, black),
            without_image=said(k, without),
        )
        for k in range(num)
    ]


def written(cases: Cases, folder: Path) -> dict[str, Any]:
    """The audit and the text of every form of it."""
    found = audit(cases, draws=FEW)
    write_audit(found, folder)
    return {
        "found": found,
        "html": (folder / "audit.html").read_text("utf-8"),
        "md": (folder / "audit.md").read_text("utf-8"),
        "json": json.loads((folder / "audit.json").read_text("utf-8")),
        "csv": lambda name: list(
            csv.DictReader((folder / f"{name}.csv").read_text("utf-8").splitlines())
        ),
    }


# ---------------------------------------------------------------- does it look


def test_a_model_that_needs_no_image_is_told_so_in_one_sentence(tmp_path: Path) -> None:
    forms = written(cases_of(answers=blindly(100, 58, 58)), tmp_path)
    sentence = (
        "With a black image it answers 58 of 100 closed questions correctly, with the real one "
        "58: here the image adds nothing that these rows can show (+0.00 [+0.00, +0.00])."
    )
    for form in ("html", "md"):
        assert "Does it look at the image?" in forms[form] and sentence in forms[form]
    assert sentence in headlines(forms["found"])
    row = next(r for r in forms["json"]["image_reliance"] if r["measure"] == "text")
    assert (row["num_right_blind"], row["num_right_with_image"], row["num"]) == (58, 58, 100)
    (saved,) = [r for r in forms["csv"]("image_reliance") if r["measure"] == "the text"]
    assert (saved["best_blind"], saved["num_right_blind"]) == ("black image", "58")
    ways = {(r["measure"], r["asked"]): r for r in forms["csv"]("blind")}
    assert ways["the text", "without image"]["num_right_blind"] == "0"
    # All references are yes: to say so always is right, and nobody has to be asked for it.
    assert ways["the text", "most frequent answer"]["num_right_blind"] == "100"


def test_the_summary_does_not_call_blind_what_looks_by_another_measure() -> None:
    """A text that names no letter is wrong with every image; the likeliest option is not."""
    unread = [
        replace(
            case,
            text="it is",
            variants={name: replace(v, text="it is") for name, v in case.variants.items()},
        )
        for case in blindly(100, 80, 40)
    ]
    found = audit(cases_of(answers=unread), draws=FEW)
    lines = [line for line in headlines(found) if "black image" in line]
    assert lines == [reliance_sentence(found["image_reliance"][1])]
    assert "by its likeliest option, with the real one 80: the image adds to it" in lines[0]


def test_an_image_that_helps_and_one_that_hurts_are_told_apart() -> None:
    for black, words in (
        (10, "the image adds to it (+0.4"),
        (95, "the image makes it worse (-0.4"),
    ):
        found = audit(cases_of(answers=blindly(100, 50 + (black < 50), black)), draws=FEW)
        text = reliance_sentence(found["image_reliance"][0])
        assert words in text, text


def test_open_questions_are_told_by_the_words_that_they_recall() -> None:
    answers = [
        replace(
            answer_case(n, "left lung", "left upper lung", kind="open"),
            options=[],
            option_log_probs=None,
            variants={"black image": Variant(prompt="", text="lung", option_log_probs=None)},
        )
        for n in range(40)
    ]
    rows = audit(cases_of(answers=answers), draws=FEW)["image_reliance"]
    recall = next(row for row in rows if row["measure"] == "recall")
    assert recall["num_right_blind"] is None
    assert reliance_sentence(recall).startswith(
        "With a black image its answers to 40 open questions hold 0.33 of the words that are true, "
        "with the real one 0.67: the image adds to it"
    )


# ---------------------------------------------------------------- flips


def test_flips_stand_beside_those_of_neutral_words_in_every_form(tmp_path: Path) -> None:
    answers = [
        asked(
            n,
            "yes",
            "yes",
            neutral__1="yes",
            sex__woman="no" if n % 2 else "yes",
            sex__man="yes",
            age__swapped="yes",
        )
        for n in range(60)
    ]
    forms = written(cases_of(answers=answers), tmp_path)
    rows = {row["attribute"]: row for row in forms["json"]["counterfactual"]}
    sex = rows["sex"]
    assert (sex["num"], sex["flipped_words"], sex["flipped_neutral"]) == (60, 0.25, 0.0)
    assert sex["moved_words"] == pytest.approx(0.6 / 4) and sex["moved_neutral"] == 0
    assert rows["age"]["flipped_words"] == 0
    # Nobody was asked with another race: the row stays, and says of how many.
    assert (rows["race"]["num"], rows["race"]["num_without"]) == (0, 60)
    text = flip_sentence(sex)
    assert text.startswith(
        "Words about the patient's sex flip 25.0% of the answers to 60 closed questions, neutral "
        "words 0.0%: more than any words do (+25.0%"
    )
    assert "no more than these rows can tell from chance" in flip_sentence(rows["age"])
    assert text in headlines(forms["found"])
    for form in ("html", "md"):
        assert text.replace("'", "&#39;" if form == "html" else "'") in forms[form]
    # What neutral words do too stands in the table alone; one sentence of it for each is no news.
    assert flip_sentence(rows["age"]) not in forms["md"]
    ways = {row["asked"]: row["flipped"] for row in forms["csv"]("counterfactual_ways")}
    assert (ways["sex: woman"], ways["sex: man"]) == ("0.5", "0.0")


# ---------------------------------------------------------------- labels


def test_labels_without_a_positive_are_named_and_not_dropped(tmp_path: Path) -> None:
    cases = []
    for n in range(60):
        case = label_case(n, [n % 3 == 0, n == 7, False, None if n else True])
        ranked = [0.9 if n % 3 == 0 else 0.2, 0.5, 0.3, 0.4]
        cases.append(replace(case, probabilities=ranked))
    forms = written(cases_of(labels=cases), tmp_path)
    rows = {row["label"]: row for row in forms["json"]["labels"]}
    assert list(rows) == ["label 2", "label 1", "label 3", "label 0"]  # rarest first
    common = rows["label 0"]
    assert (common["num"], common["num_positive"], common["auroc"]) == (60, 20, 1.0)
    assert common["prevalence"] == pytest.approx(1 / 3)
    assert rows["label 2"]["auroc"] is None and rows["label 2"]["num_positive"] == 0
    assert rows["label 1"]["auroc"] == 0.5
    # 20 before all others in every draw: a point would be read as certainty.
    assert common["auroc_low"] is None and common["auroc_high"] is None
    assert (rows["label 3"]["num"], rows["label 3"]["auroc"]) == (1, None)
    for form in ("html", "md"):
        assert "Mean AUROC over 2 of 4 labels: 0.75" in forms[form]
        assert (
            "Without a positive image, and so without AUROC, and in no mean: label 2."
            in forms[form]
        )
        assert "Without a negative image" in forms[form]
    assert [row["label"] for row in forms["csv"]("labels")] == list(rows)


def test_a_rare_label_has_a_wide_interval_beside_a_frequent_ones() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for n in range(200):
        present: list[bool | None] = [n % 2 == 0, n % 40 == 0]
        ranked = [float(0.3 * bool(p) + 0.6 * rng.random()) for p in present]
        cases.append(replace(label_case(n, present), probabilities=ranked))
    rare, frequent = audit(cases_of(labels=cases), draws=FEW)["labels"]
    assert (rare["num_positive"], frequent["num_positive"]) == (5, 100)
    wide, narrow = (row["auroc_high"] - row["auroc_low"] for row in (rare, frequent))
    assert wide > 1.5 * narrow > 0
    assert frequent["auroc_low"] < frequent["auroc"] < frequent["auroc_high"]


def test_classes_have_recall_and_the_mean_over_classes_and_none_has_a_threshold(
    tmp_path: Path,
) -> None:
    cases = [
        replace(label_case(n, [n >= 6, n < 6]), probabilities=[0.9, 0.1], exclusive=True)
        for n in range(30)
    ]
    forms = written(cases_of(labels=cases), tmp_path)
    rare, common = forms["json"]["labels"]
    assert (rare["num_positive"], rare["num"], rare["recall"]) == (6, 30, 0.0)
    assert (common["recall"], common["auroc"]) == (1.0, 0.5)
    assert common["average_precision"] == pytest.approx(0.8)
    assert "is right for 80% of 30 images; the mean over classes is 0.50" in forms["md"]
    assert "| threshold |" not in forms["md"] and "| recall |" in forms["md"]


def test_a_probability_that_is_no_number_ranks_nothing_and_is_counted() -> None:
    cases = [label_case(n, [n % 2 == 0, n % 3 == 0]) for n in range(30)]
    cases[4] = replace(cases[4], probabilities=[float("nan"), 0.5])
    found = audit(cases_of(labels=cases), draws=FEW)
    assert {row["num"] for row in found["labels"]} == {29}
    assert found["cohort"]["num_not_finite"] == 1


# ---------------------------------------------------------------- volumes


def slice_case(number: int, volume: str, rows: int, place: int, target: str) -> MaskCase:
    case = mask_case(number, rows, target=target, patient_id=volume)
    return replace(
        case, place=SlicePlace(volume=volume, number=place, num_slices=6, spacing=(5.0, 1.0, 1.0))
    )


def test_volumes_are_scored_as_one_mask_and_the_worst_is_named(tmp_path: Path) -> None:
    masks = [slice_case(n, f"v{n // 3}", 8, n % 3, "liver") for n in range(36)]
    # One slice of three is empty: 16 of 24 rows are found, a Dice of 0.8.
    masks[4] = slice_case(4, "v1", 0, 1, "liver")
    masks += [slice_case(40 + n, "v9", 4, n, "tumour") for n in range(2)]
    forms = written(cases_of(masks), tmp_path)
    worst, second = forms["json"]["volumes"][:2]
    assert (worst["volume"], worst["target"], worst["num_slices"]) == ("v9", "tumour", 2)
    assert worst["dice"] == pytest.approx(2 * 4 / 12)
    assert (second["volume"], second["dice"]) == ("v1", pytest.approx(0.8))
    means = {(r["metric"], r["group"]): r for r in forms["json"]["volume_means"]}
    assert means["dice", "all"]["num"] == 13
    assert means["dice", "liver"]["mean"] == pytest.approx((11 + 0.8) / 12)
    sentence = "over 13 pairs of volume and target; the worst is tumour in v9 (0.67)"
    assert sentence in forms["html"] and sentence in forms["md"]
    assert any(sentence in line for line in headlines(forms["found"]))
    assert len(forms["csv"]("volumes")) == 13 and len(forms["csv"]("worst_volumes")) == 10


def test_volumes_of_which_a_limit_left_slices_out_are_not_scored_and_it_is_said() -> None:
    masks = [slice_case(n, f"v{n // 3}", 8, n % 3, "liver") for n in range(30)]
    header = replace(HEADER, settings=HEADER.settings | {"limit": 30})
    found = audit(Cases(header, masks, [], []), draws=FEW)
    assert found["volumes"] == [] == found["volume_means"]
    assert any(
        line.startswith("Volumes are not scored: a limit of 30") for line in found["warnings"]
    )


# ---------------------------------------------------------------- the page


def test_sections_stand_only_where_the_cases_have_what_they_show(tmp_path: Path) -> None:
    plain = cases_of([mask_case(n) for n in range(30)], [answer_case(0, "yes", "no")])
    html = written(plain, tmp_path)["html"]
    for anchor in ("image", "words", "labels", "volumes"):
        assert f'id="{anchor}"' not in html


def test_the_first_screen_stays_three_sentences_whatever_is_found(tmp_path: Path) -> None:
    answers = [
        asked(n, "yes", "yes", black_image="yes", neutral__1="yes", sex__woman="no")
        for n in range(60)
    ]
    masks = [slice_case(n, f"v{n // 3}", n % 9, n % 3, "liver") for n in range(90)]
    labels = [label_case(n, [n % 2 == 0, False]) for n in range(60)]
    html = written(cases_of(masks, answers, labels), tmp_path)["html"]
    first = html[html.index('<ol class="findings">') : html.index("</ol>")]
    assert first.count("<li>") == 3
