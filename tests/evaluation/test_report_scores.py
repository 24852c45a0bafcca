"""Scores of reports: standard programs under their own names, findings that see a denial."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from biascare.evaluation.metrics.findings import (
    ALL_FINDINGS,
    NO_FINDING,
    clinical_f1,
    read_findings,
)
from biascare.evaluation.metrics.reports import bleu1, bleu1_no_bp, report_scores, rouge1


@pytest.mark.parametrize(
    "report, expected",
    [
        ("No pleural effusion.", {"Pleural Effusion": "absent"}),
        ("Pleural effusion.", {"Pleural Effusion": "present"}),
        (
            "No effusion, pneumothorax or focal consolidation.",
            {"Pleural Effusion": "absent", "Pneumothorax": "absent", "Consolidation": "absent"},
        ),
        (
            "No pneumothorax, but there is a small left effusion.",
            {"Pneumothorax": "absent", "Pleural Effusion": "present"},
        ),
        ("Possible pneumonia.", {"Pneumonia": "uncertain"}),
        ("Pneumonia cannot be excluded.", {"Pneumonia": "uncertain"}),
        ("Cannot exclude pneumonia.", {"Pneumonia": "uncertain"}),
        ("Pneumonia is not excluded.", {"Pneumonia": "uncertain"}),
        ("Atelectasis versus pneumonia.", {"Atelectasis": "uncertain", "Pneumonia": "uncertain"}),
        ("A pneumothorax is not seen.", {"Pneumothorax": "absent"}),
        ("The fracture has resolved.", {"Fracture": "absent"}),
        ("No change in the left pleural effusion.", {"Pleural Effusion": "present"}),
        ("No significant interval change in edema.", {"Edema": "present"}),
        ("The heart is mildly enlarged.", {"Cardiomegaly": "present"}),
        ("Heart size is normal.", {"Cardiomegaly": "absent"}),
        ("The heart is not enlarged.", {"Cardiomegaly": "absent"}),
        ("The heart may be enlarged.", {"Cardiomegaly": "uncertain"}),
        ("The lungs are clear.", {"Lung Opacity": "absent", "Consolidation": "absent"}),
        (
            "Right basal opacity and a 5 mm nodule.",
            {"Lung Opacity": "present", "Lung Lesion": "present"},
        ),
        ("Endotracheal tube in place.", {"Support Devices": "present"}),
        ("No pneumonia. New pneumonia on the left.", {"Pneumonia": "present"}),
        ("Mediastinal widening.", {"Enlarged Cardiomediastinum": "present"}),
        ("Blunting of the left costophrenic angle.", {"Pleural Effusion": "present"}),
        ("Massive findings unlike nodular.", {}),
    ],
)
def test_findings_are_read_with_what_denies_and_doubts_them(
    report: str, expected: dict[str, str]
) -> None:
    found = read_findings(report)
    assert {k: v for k, v in found.items() if k != NO_FINDING} == expected


def test_a_report_without_any_finding_says_so_and_an_empty_one_says_nothing() -> None:
    assert read_findings("No effusion. Endotracheal tube in place.")[NO_FINDING] == "present"
    assert NO_FINDING not in read_findings("Possible edema.")
    assert read_findings("") == read_findings("  \n") == {}


def test_turning_a_denial_round_lowers_the_clinical_score_and_hardly_the_overlap() -> None:
    references = ["No pleural effusion. Cardiomegaly.", "Pleural effusion."]
    flipped = ["Pleural effusion. Cardiomegaly.", "No pleural effusion."]
    right, wrong = (report_scores(said, references) for said in (references, flipped))
    assert right["clinical_f1"]["micro"] == 1.0 and wrong["clinical_f1"]["micro"] < 0.5
    assert wrong["rouge1"] > 0.8 and wrong["bleu1"] > 0.8


def test_clinical_f1_is_that_computed_by_hand() -> None:
    scores = clinical_f1(["Edema.", "Edema. Fracture.", ""], ["Edema.", "Fracture.", "No edema."])
    table = scores["by_finding"]
    assert table["Edema"] == {"num_positive": 1, "f1": pytest.approx(2 / 3)}
    assert table["Fracture"]["f1"] == 1.0 and table["Pneumonia"]["f1"] is None
    assert table[NO_FINDING] == {"num_positive": 1, "f1": 0.0}
    assert scores["macro"] == pytest.approx((2 / 3 + 1 + 0) / 3) and scores["num_findings"] == 3
    assert scores["micro"] == pytest.approx(2 * 2 / (3 + 3)) and set(table) == set(ALL_FINDINGS)
    assert clinical_f1([], [])["macro"] is None
    with pytest.raises(ValueError, match="expected pairs"):
        clinical_f1(["a"], [])


def test_bleu_of_single_words_carries_its_signature_and_penalises_brevity() -> None:
    score, signature = bleu1(["small effusion"], ["Small effusion on the left"])
    assert score == pytest.approx(2.718281828 ** (1 - 5 / 2))  # every word right, three too few
    assert "tok:13a" in signature and "case:lc" in signature
    assert bleu1_no_bp(["small effusion"], ["Small effusion on the left"]) == 1.0
    # Clipped: the second "effusion" is not in the reference.
    assert bleu1_no_bp(["effusion effusion", ""], ["an effusion", "edema"]) == 0.25


def test_rouge_is_that_of_its_own_program() -> None:
    said, wanted = ["small effusions", "T2-weighted"], ["a small effusion", "T2-weighted image"]
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    theirs = [scorer.score(w, s)["rouge1"].fmeasure for s, w in zip(said, wanted, strict=True)]
    assert rouge1(said, wanted, stemmer=True) == pytest.approx(sum(theirs) / 2, abs=1e-9)
    assert rouge1(said, wanted) < rouge1(said, wanted, stemmer=True)


def test_no_report_and_empty_reports_have_defined_scores() -> None:
    assert report_scores([], []) == {"num": 0}
    scores = report_scores([""], ["Small effusion."])
    assert (scores["num_empty"], scores["bleu1"], scores["rouge1"]) == (1, 0.0, 0.0)
