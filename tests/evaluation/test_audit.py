"""The audit from simulated cases: what it says, what it refuses, that it says the same twice."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

from biascare.evaluation.audit.audit import audit
from biascare.evaluation.audit.rows import METRICS, audit_tables, of_hard_kinds
from biascare.evaluation.audit.slices import worst_slices
from biascare.evaluation.audit.tables import Draws
from biascare.evaluation.audit.thresholds import Limits, read_thresholds
from biascare.evaluation.cases import (
    AnswerCase,
    Cases,
    CaseWriter,
    Header,
    LabelCase,
    MaskCase,
    MaskPrediction,
)
from biascare.records import encode_mask
from biascare.reports.audit import write_audit
from biascare.reports.audit_words import chance, headlines
from tests.tiny import tiny_facts

ROOT = Path(__file__).parents[2]
SIDE = 16
FEW = Draws(100, 0)

HEADER = Header(
    model="outputs/tiny/export",
    weights="0" * 64,
    commit="abc",
    data=[
        {
            "task": "segmentation",
            "source": "tiny",
            "split": "test",
            "version": "1",
            "licence": "none",
            "content_hash": "00",
        }
    ],
    settings={"prompt": "point"},
    beta_vl=0.5,
    prevalence={"liver": "head", "lesion": "tail"},
    disc_share=0.1,
    disc_share_by_target={},
)


def square(rows: int) -> str:
    """`rows` of 8 pixels: Dice with `square(8)` is 2 * rows / (rows + 8)."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4 : 4 + rows, 4:12] = True
    return encode_mask(mask).decode("ascii")


def mask_case(number: int, rows: int = 6, truth: int = 8, **known: Any) -> MaskCase:
    stated = {"target": "liver", "prevalence": "head", "patient_id": f"p{number // 2}"}
    stated |= {"anatomy": "abdomen"} | known
    prediction = MaskPrediction(
        points=[(8.0, 8.0, 1)],
        box=None,
        mask=square(rows),
        predicted_dice=0.5 + rows / 20,
        uncertainty={"semantic": 1 - rows / 10},
    )
    return MaskCase(
        id=f"i{number}/{stated['target']}",
        facts=tiny_facts(f"i{number}", **stated),
        height=SIDE,
        width=SIDE,
        instruction=None,
        truth=square(truth),
        by_text=None,
        predictions=[prediction, prediction],
        seconds=0.1,
    )


def answer_case(number: int, text: str, reference: str, **known: Any) -> AnswerCase:
    stated = {"kind": "closed", "task": "language", "patient_id": f"p{number // 2}"}
    stated |= {"anatomy": "abdomen"} | known
    log_probs = [math.log(0.8), math.log(0.2)]
    return AnswerCase(
        id=f"i{number}/0",
        facts=tiny_facts(f"i{number}", **stated),
        question="is it there?",
        question_facts={},
        prompt="is it there?",
        options=["yes", "no"],
        option_log_probs=log_probs if text == "yes" else log_probs[::-1],
        text=text,
        token_log_probs=[-0.1],
        reference=reference,
        seconds=0.1,
    )


def label_case(number: int, present: list[bool | None], p: float = 0.5) -> LabelCase:
    names = [f"label {k}" for k in range(len(present))]
    return LabelCase(
        id=f"i{number}",
        facts=tiny_facts(f"i{number}", patient_id=f"p{number}", sex="FM"[number % 2]),
        labels=names,
        probabilities=[p] * len(present),
        present=present,
        exclusive=False,
        seconds=0.1,
    )


def cases_of(
    masks: Iterable[MaskCase] = (),
    answers: Iterable[AnswerCase] = (),
    labels: Iterable[LabelCase] = (),
) -> Cases:
    return Cases(HEADER, list(masks), list(answers), list(labels))


def biased(num: int = 240, loss: int = 3, seed: int = 0) -> Cases:
    """Women's masks lose `loss` rows of 7; lesions are harder than livers."""
    rng = np.random.default_rng(seed)
    masks, answers = [], []
    for n in range(num):
        # By patient, of whom each has two images.
        sex, age = "FM"[n // 2 % 2], float(30 + 7 * (n // 2) % 60)
        target = "lesion" if n % 3 == 0 else "liver"
        known = {"sex": sex, "age": age, "race": None, "source": "tiny"}
        rows = int(rng.integers(5, 9)) - 2 * (target == "lesion") - loss * (sex == "F")
        prevalence = "tail" if target == "lesion" else "head"
        masks.append(mask_case(n, max(rows, 0), target=target, prevalence=prevalence, **known))
        reference = "yes" if rng.random() < 0.5 else "no"
        text = reference if rng.random() < 0.8 else "unclear"
        answers.append(answer_case(n, text, reference, **known))
    return cases_of(masks, answers)


def write_cases(path: Path, cases: Cases) -> Path:
    with CaseWriter(path, cases.header) as writer:
        writer.append([*cases.masks, *cases.answers, *cases.labels])
    return path


class Done(NamedTuple):
    """What a program left."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program itself, in this process: a new one would take seconds to import."""

    def started(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["audit.py", *map(str, arguments), "--num-draws", "100"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / "audit.py"), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capsys.readouterr())

    return started


# ---------------------------------------------------------------- what it says


def test_a_planted_difference_is_the_first_sentence_with_its_counts_and_its_chance() -> None:
    found = audit(biased(), draws=Draws(499, 0))
    first = headlines(found)[0]
    print(first)
    assert re.match(r"Dice is 0\.\d\d for female and 0\.\d\d for male", first)
    assert re.search(r"\d+ of 120 masks are missed against \d+ of 120", first)
    assert "by chance in 2 of 1,000 data sets without any: a finding" in first


def test_without_a_difference_the_summary_says_what_could_have_been_found() -> None:
    found = audit(biased(loss=0), draws=FEW)
    first = headlines(found)[0]
    assert first.startswith("None of") and "would have been found reliably" in first


def test_chances_are_said_as_a_person_would() -> None:
    assert [chance(p) for p in (0.09, 0.012, 0.004, 0.0001, 1.0)] == [
        "9 of 100 data sets",
        "1 of 100 data sets",
        "4 of 1,000 data sets",
        "1 of 1,000 data sets",
        "nearly all data sets",
    ]


def test_error_types_are_those_of_fairlearn() -> None:
    rng = np.random.default_rng(3)
    truth, said = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    sex = rng.choice(["F", "M"], 300).tolist()
    words = ("no", "yes")
    answers = [
        answer_case(n, words[s], words[t], sex=sex[n], patient_id=f"p{n}")
        for n, (s, t) in enumerate(zip(said, truth, strict=True))
    ]
    found = audit(cases_of(answers=answers), draws=FEW)
    row = next(r for r in found["error_types"] if r["attribute"] == "sex")
    theirs = {"y_true": truth, "y_pred": said, "sensitive_features": sex}
    odds, parity = equalized_odds_difference(**theirs), demographic_parity_difference(**theirs)
    assert row["equalized_odds_difference"] == pytest.approx(odds, abs=1e-9)
    assert row["demographic_parity_difference"] == pytest.approx(parity, abs=1e-9)


def test_hard_kinds_of_case_are_those_below_the_mean_of_all() -> None:
    values = of_hard_kinds(np.array([0.9, 0.8, 0.1, 0.3]), ["a", "a", "b", "b"])
    assert np.isnan(values[:2]).all() and values[2:].tolist() == [0.1, 0.3]


def test_a_weak_spot_is_found_in_one_half_and_confirmed_in_the_other() -> None:
    masks = []
    rng = np.random.default_rng(1)
    for n in range(400):
        sex, modality = "FM"[n % 2], ("CT", "MRI")[n // 2 % 2]
        weak = sex == "F" and modality == "MRI"
        rows = int(rng.integers(5, 9)) - 4 * weak
        masks.append(mask_case(n, rows, sex=sex, modality=modality, patient_id=f"p{n}"))
    found = worst_slices(audit_tables(cases_of(masks))[0], "dice", Draws(200, 0))
    assert found.tested[0]["slice"] == "modality: MRI, sex: F" and found.tested[0]["confirmed"]
    even = [mask_case(n, 6, sex="FM"[n % 2], patient_id=f"p{n}") for n in range(200)]
    nothing = worst_slices(audit_tables(cases_of(even))[0], "dice", Draws(200, 0))
    assert nothing.num_confirmed == 0
    text = headlines(audit(cases_of(even), draws=FEW))
    assert any("weak spot; none of the" in line for line in text)


def test_the_worst_examples_are_not_all_of_one_target() -> None:
    masks = [mask_case(n, 0, target="liver") for n in range(30)]
    masks += [mask_case(30 + n, 1, target=f"t{n}", prevalence="tail") for n in range(12)]
    rows = audit(cases_of(masks), draws=FEW)["worst_masks"]
    assert len(rows) == 10 and sum(row["target"] == "liver" for row in rows) == 2


# ---------------------------------------------------------------- guards


@pytest.mark.parametrize(
    "cases",
    [
        cases_of([mask_case(n) for n in range(3)]),
        cases_of([mask_case(n, patient_id=None) for n in range(40)]),
        cases_of([mask_case(n, sex="F", age=50.0) for n in range(40)]),
        cases_of([mask_case(n, sex="F" if n else "M", patient_id=f"p{n}") for n in range(40)]),
        cases_of([mask_case(n, 0, 0) for n in range(25)]),
        cases_of([mask_case(0)]),
        cases_of(answers=[answer_case(n, "", "yes", sex="FM"[n % 2]) for n in range(60)]),
        cases_of(answers=[answer_case(0, "I cannot say", "no")]),
        cases_of(
            answers=[
                answer_case(n, "a mass is seen", "a mass", kind="report", sex="FM"[n % 2])
                for n in range(45)
            ]
        ),
        cases_of(labels=[label_case(n, [n == 7, None, False]) for n in range(406)]),
    ],
    ids=[
        "three masks",
        "no patient known",
        "one group",
        "a group of one",
        "empty masks",
        "one mask",
        "empty answers of two groups",
        "one refusal",
        "reports",
        "406 images with one positive label",
    ],
)
def test_poor_data_give_a_defined_audit_that_says_what_is_missing(
    cases: Cases, tmp_path: Path
) -> None:
    found = audit(cases, draws=FEW)
    json.dumps(found, allow_nan=False)
    write_audit(found, tmp_path)
    assert headlines(found) and (tmp_path / "audit.html").stat().st_size > 5000


def test_numbers_that_are_none_are_counted_and_left_out() -> None:
    masks = [mask_case(n, sex="FM"[n % 2]) for n in range(60)]
    broken = replace(masks[0].predictions[0], predicted_dice=float("inf"))
    nan = replace(masks[1].predictions[0], uncertainty={"semantic": float("nan")})
    masks[0] = replace(masks[0], predictions=[broken])
    masks[1] = replace(masks[1], predictions=[nan])
    found = audit(cases_of(masks), draws=FEW)
    assert found["cohort"]["num_not_finite"] == 2
    row = next(r for r in found["calibration"] if r["group"] == "all")
    assert (row["num"], row["num_missing"]) == (59, 1)
    assert any(line.startswith("2 numbers of the model are NaN") for line in found["warnings"])


def test_small_groups_get_no_statement_on_calibration() -> None:
    found = audit(biased(num=120), draws=FEW)
    rows = {(r["confidence"], r["group"]): r for r in found["calibration"]}
    assert rows["predicted Dice", "all"]["supports_statement"]
    assert not rows["predicted Dice", "F"]["supports_statement"]
    gap = next(r for r in found["calibration_gaps"] if r["attribute"] == "sex")
    assert gap["cceg"] is None and gap["p_holm"] is None


# ---------------------------------------------------------------- verdict


def test_every_judged_metric_can_be_given_a_limit() -> None:
    judged = {name for name, about in METRICS.items() if about.judged}
    assert set(Limits.__dataclass_fields__) == judged


@pytest.mark.parametrize(
    ("limits", "word", "code"),
    [
        ("dice: {min: 0.5}\nattributes: [sex, age]", "PASS", 0),
        ("dice: {min: 0.95}", "FAIL", 1),
        ("dice: {min: 0.5}\nmin_group: 500", "INSUFFICIENT DATA", 2),
        ('{"dice": {"max_gap": 0.02}, "by_attribute": {"sex": {"dice": {"max_gap": 0.3}}}}', "", 2),
        ("top_label: {min: 0.5}", "INSUFFICIENT DATA", 2),
    ],
)
def test_the_verdict_is_the_exit_code(
    limits: str, word: str, code: int, tmp_path: Path, run: Run
) -> None:
    write_cases(tmp_path / "cases.jsonl", biased(num=160, loss=0))
    (tmp_path / "limits.yaml").write_text(limits)
    done = run(tmp_path, "--thresholds", tmp_path / "limits.yaml")
    print(done.out, done.err)
    assert done.code == code and done.out.startswith(word)


def test_a_threshold_inside_the_interval_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "limits.yaml").write_text("dice: {min: 0.7}\nby_attribute: {sex: {dice: {min: 0}}}")
    rng = np.random.default_rng(0)
    masks = [
        mask_case(n, int(rng.integers(2, 9)), patient_id=f"p{n}", sex="FM"[n % 2])
        for n in range(60)
    ]
    limits = read_thresholds(tmp_path / "limits.yaml")
    found = audit(cases_of(masks), thresholds=limits, draws=FEW)["verdict"]
    words = {(r["attribute"], r["group"]): r["verdict"] for r in found["rows"]}
    assert words == {
        ("all", "all"): "INSUFFICIENT DATA",
        ("sex", "F"): "PASS",
        ("sex", "M"): "PASS",
    }


def test_a_group_that_never_fails_is_not_sure_to_pass(tmp_path: Path) -> None:
    """20 of 20 right are compatible with 83 %."""
    (tmp_path / "limits.yaml").write_text("accuracy: {min: 0.9}")
    answers = [answer_case(n, "yes", "yes", patient_id=f"p{n}") for n in range(20)]
    limits = read_thresholds(tmp_path / "limits.yaml")
    row = audit(cases_of(answers=answers), thresholds=limits, draws=FEW)["verdict"]["rows"][0]
    assert row["verdict"] == "INSUFFICIENT DATA"
    assert row["low"] == pytest.approx(0.025 ** (1 / 20))


def test_wrong_thresholds_are_told_at_once_before_the_cases_are_read(
    tmp_path: Path, run: Run
) -> None:
    (tmp_path / "cases.jsonl").write_text("damaged")
    (tmp_path / "limits.yaml").write_text(
        "dise: {min: 0.6}\naccuracy: {mim: 1}\nby_attribute: {raze: {dice: {min: 0.5}}}\n"
        "iou: {min: 2}\n"
    )
    done = run(tmp_path, "--thresholds", tmp_path / "limits.yaml")
    assert done.code == 3 and done.err.startswith("4 problems")
    for near in ("'dice'", "'accuracy.min'", "'by_attribute.race'", "iou.min"):
        assert near in done.err
    (tmp_path / "limits.yaml").write_text("min_group: 30")
    assert "asks nothing" in run(tmp_path, "--thresholds", tmp_path / "limits.yaml").err


# ---------------------------------------------------------------- two runs


def test_who_gained_and_who_paid_is_told_by_name() -> None:
    old = biased(loss=0)
    new = old._replace(
        masks=[
            replace(c, predictions=[replace(c.predictions[0], mask=square(8 if male else 2))])
            for c in old.masks
            for male in [c.facts.sex == "M"]
        ]
    )
    found = audit(new, baseline=old._replace(masks=old.masks[10:]), draws=FEW)
    comparison = found["comparison"]
    assert (comparison["num_only_run"], comparison["num_only_baseline"]) == (10, 0)
    who = {(r["metric"], r["by"], r["group"]): r["who"] for r in comparison["rows"]}
    assert who["dice", "sex", "M"] == "gained" and who["dice", "sex", "F"] == "paid"
    assert who["missed", "sex", "F"] == "paid" and who["accuracy", "all", "all"] != "paid"
    assert "Who paid: female" in headlines(found)[0]


def test_another_truth_and_other_cases_are_refused() -> None:
    cases = cases_of([mask_case(n) for n in range(30)])
    other = cases_of([mask_case(n, truth=7) for n in range(30)])
    with pytest.raises(ValueError, match="30 of 30 shared masks have another truth"):
        audit(cases, baseline=other, draws=FEW)
    apart = cases_of([mask_case(n) for n in range(100, 130)])
    with pytest.raises(ValueError, match="share no case"):
        audit(cases, baseline=apart, draws=FEW)


# ---------------------------------------------------------------- files


def test_equal_cases_give_equal_bytes_and_a_page_without_a_network(
    tmp_path: Path, run: Run
) -> None:
    cases = write_cases(tmp_path / "cases.jsonl", biased(num=120))
    for name in ("a", "b"):
        assert run(cases, "--output", tmp_path / name).code == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"audit.html", "audit.md", "audit.json", "disparities.csv"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    page = (tmp_path / "a" / "audit.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://|@import|url\(", page)
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_names_of_data_cannot_write_into_the_page(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> | a|b"
    masks = [mask_case(n, modality=bad, target=bad, sex="FM"[n % 2]) for n in range(50)]
    write_audit(audit(cases_of(masks), draws=FEW), tmp_path)
    assert "<script>alert" not in (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "a\\|b" in (tmp_path / "audit.md").read_text(encoding="utf-8")


def test_an_unfinished_evaluation_is_not_audited(tmp_path: Path, run: Run) -> None:
    write_cases(tmp_path / "cases.rank0.jsonl", biased(num=10))
    done = run(tmp_path)
    assert done.code == 3 and "not finished" in done.err
    assert run("--nope").code == 3


def test_a_benchmarks_own_numbers_stand_beside_the_others(tmp_path: Path) -> None:
    answers = [answer_case(n, "yes", "yes", modality="ct") for n in range(30)]
    header = replace(HEADER, benchmark="vqa_rad")
    found = audit(Cases(header, [], answers, []), draws=FEW)
    assert found["benchmark"] and all(row["what"] for row in found["benchmark"])
    write_audit(found, tmp_path)
    assert "By the protocol of the benchmark" in (tmp_path / "audit.html").read_text("utf-8")
