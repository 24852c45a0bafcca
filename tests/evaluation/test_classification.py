"""Label cases to numbers, compared with scikit-learn, and what happens to classes nobody has."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from biascare.evaluation.benchmarks import BENCHMARKS, label_groups, named_modality
from biascare.evaluation.cases import AnswerCase, LabelCase
from biascare.evaluation.metrics.classification import (
    best_thresholds,
    choices_as_labels,
    class_scores,
    summarise_labels,
)
from biascare.interfaces import Facts


def facts(number: int, split: str = "test") -> Facts:
    fixed = {"task": "labels", "kind": "labels", "source": "s", "modality": "xray", "anatomy": ""}
    unknown = dict.fromkeys(("target", "prevalence", "patient_id", "sex", "age", "race"))
    return Facts(image_id=str(number), split=split, **fixed, **unknown)


def finding_cases(num: int = 60, split: str = "test", seed: int = 0) -> list[LabelCase]:
    """Three findings; nobody has the third, the first is not judged on every fifth image."""
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(num):
        present: list[bool | None] = [bool(rng.random() < 0.3), number == 0, False]
        # Few different values, so that many cases tie.
        scores = np.round(
            np.clip(rng.normal([0.3 + 0.3 * bool(present[0]), 0.4, 0.2], 0.2), 0, 1), 1
        )
        if number % 5 == 4:
            present[0] = None
        cases.append(
            LabelCase(
                id=f"{number}/labels",
                facts=facts(number, split),
                labels=["a", "b", "c"],
                probabilities=scores.tolist(),
                present=present,
                exclusive=False,
                seconds=0.0,
            )
        )
    return cases


def test_scores_of_classes_are_those_of_scikit_learn_with_ties_and_weights() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random((80, 3)) < 0.3).astype(float)
    score = np.round(rng.random((80, 3)), 1)
    weights = rng.integers(0, 4, (5, 80)).astype(float)
    plain, drawn = class_scores(score, truth), class_scores(score, truth, weights)
    for k in range(3):
        assert plain["average_precision"][k] == pytest.approx(
            average_precision_score(truth[:, k], score[:, k]), abs=1e-12
        )
        assert plain["auroc"][k] == pytest.approx(
            roc_auc_score(truth[:, k], score[:, k]), abs=1e-12
        )
        for d in range(5):
            expected = average_precision_score(truth[:, k], score[:, k], sample_weight=weights[d])
            assert drawn["average_precision"][d, k] == pytest.approx(expected, abs=1e-12)
            expected = roc_auc_score(truth[:, k], score[:, k], sample_weight=weights[d])
            assert drawn["auroc"][d, k] == pytest.approx(expected, abs=1e-12)


def test_a_finding_nobody_has_is_named_and_never_counted_as_0() -> None:
    table = summarise_labels(finding_cases())
    assert table["by_label"]["c"] == {
        "num": 60, "num_positive": 0, "average_precision": None, "auroc": None,
        "average_precision_interval": None, "auroc_interval": None,
    }  # fmt: skip
    a, b = (table["by_label"][name]["average_precision"] for name in "ab")
    assert table["macro_average_precision"] == pytest.approx((a + b) / 2)
    assert table["num_without_positive"] == 1
    # The one image with b is absent from about a third of all draws.
    draws = table["num_left_out_of_draws"] - 1000
    assert 300 < draws < 440
    low, high = table["macro_average_precision_interval"]
    assert low < table["macro_average_precision"] < high
    assert "macro_f1" not in table  # no development split, no thresholds


def test_thresholds_come_from_the_development_split_alone() -> None:
    development = finding_cases(40, "val", seed=3)
    table = summarise_labels([*finding_cases(), *development])
    assert table["num"] == 60
    thresholds = best_thresholds(
        np.array([c.probabilities for c in development]),
        np.array([[np.nan if p is None else p for p in c.present] for c in development], float),
    )
    assert np.isinf(thresholds[2])  # never called: nobody had it
    test = finding_cases()
    judged = [c for c in test if c.present[0] is not None]
    said = [c.probabilities[0] >= thresholds[0] for c in judged]
    expected = f1_score([bool(c.present[0]) for c in judged], said)
    assert table["by_label"]["a"]["f1"] == pytest.approx(expected)
    assert table["by_label"]["c"]["f1"] is None
    assert table["by_label"]["c"]["accuracy"] == 1.0


def choice(number: int, said: str, reference: str) -> AnswerCase:
    options = ["nevus", "melanoma", "wart"][number % 3 :] + ["nevus", "melanoma", "wart"][
        : number % 3
    ]
    return AnswerCase(
        id=f"{number}/0",
        facts=facts(number)._replace(kind="choice"),
        question="Which?",
        question_facts={},
        prompt="Which?",
        options=options,
        option_log_probs=[-0.1 if option == said else -3.0 for option in options],
        text=said,
        token_log_probs=[],
        reference=reference,
        seconds=0.0,
    )


def test_choices_are_classes_whatever_order_their_options_were_shown_in() -> None:
    said = ["nevus"] * 8 + ["melanoma", "nevus"]
    truth = ["nevus"] * 8 + ["melanoma"] * 2
    cases = choices_as_labels([choice(i, said[i], truth[i]) for i in range(10)])
    table = summarise_labels(cases, {"nevus": "head", "melanoma": "tail"})
    assert table["accuracy"] == 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert table["balanced_accuracy"] == balanced_accuracy_score(truth, said) == 0.75
    assert table["num_absent"] == 1 and table["by_label"]["wart"]["recall"] is None
    assert table["by_prevalence"]["tail"]["recall"] == 0.5
    assert summarise_labels([]) == {"num": 0}


def test_cases_of_other_labels_are_not_mixed() -> None:
    one = finding_cases(2)
    with pytest.raises(ValueError, match="the same labels in the same order"):
        summarise_labels([*one, *choices_as_labels([choice(0, "nevus", "nevus")])])


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What does the CT show?", "CT"),
        ("Which system is affected?", None),  # "tem" is in it
        ("Is this PET/CT normal?", "several"),
        ("What does the T2-weighted MRI show?", "MRI"),
        ("What is seen in the doctor's photo?", "photograph"),
        ("Which muscle contracts?", None),  # "ct" is in it
    ],
)
def test_a_modality_is_named_in_whole_words(question: str, expected: str | None) -> None:
    case = choice(0, "nevus", "nevus")
    assert named_modality(AnswerCase(**vars(case) | {"question": question})) == expected


def test_skin_lesions_have_the_groups_of_their_published_counts() -> None:
    groups = label_groups(BENCHMARKS["isic2018"], {})
    assert groups["melanocytic nevus"] == "head"
    assert {name for name, group in groups.items() if group == "tail"} == {
        "actinic keratosis or intraepithelial carcinoma", "dermatofibroma", "vascular lesion",
    }  # fmt: skip
