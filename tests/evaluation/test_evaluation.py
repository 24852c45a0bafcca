"""Evaluation: from a model and held-out records to rows, and from rows to numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biascare.data.heldout import HeldOutImages, HeldOutQuestions
from biascare.evaluation.metrics.answers import is_correct, normalise_answer, summarise_answers
from biascare.evaluation.metrics.segmentation import (
    DISC_SHARES,
    DiscBaseline,
    dice_score,
    disc,
    failure_auroc,
    fit_disc,
    mean_by,
    summarise_segmentation,
)
from biascare.evaluation.runner import RunnerSettings, answer_rows, segmentation_rows
from biascare.interfaces import AnswerHead, Batch, Features, Prediction, Prompts
from biascare.records import Records
from tests.tiny import (
    HEIGHT,
    IMAGE_SIZE,
    WIDTH,
    rows_of,
    tiny_chat,
    tiny_model,
    tiny_record_folder,
)

ONE_RANK = RunnerSettings(batch_size=3)


class KnowingModel:
    """Knows the truth. Draws a wrong column until a click lands on it, then the truth itself.

    Keeps `DualPathModel`; what it was prompted with is kept in `seen`.
    """

    mllm: AnswerHead | None = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[Prompts] = []

    def eval(self) -> KnowingModel:
        return self

    def encode(self, batch: Batch) -> Features:
        assert batch.masks is not None
        self.truth = batch.masks.bool()
        return Features(image_embedding=None, text_embedding=None, hidden_states=None)

    def decode_masks(
        self,
        features: Features,
        prompts: Prompts,
        row_image: Tensor,
        *,
        rows: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Prediction:
        self.seen.append(prompts)
        mask = self.truth.clone()
        if prompts.point_labels.shape[1] == 1:
            mask[:, :, :4] ^= True
        logits = torch.where(mask, 8.0, -8.0)
        low = logits[:, ::2, ::2]
        return Prediction(
            mask_logits=logits, low_res_logits=low, predicted_dice=torch.ones(len(mask))
        )

    def generate(self, batch: Batch, *, max_new_tokens: int = 32, **keywords: Any) -> Tensor:
        raise AssertionError("a model without language was asked")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(tiny_record_folder(tmp_path_factory.mktemp("evaluation") / "test", 5, "test"))


def images(records: Records, chat: Any = None) -> HeldOutImages:
    return HeldOutImages([records], chat, {"liver": "head"}, image_size=IMAGE_SIZE)


# ---------------------------------------------------------------- masks to rows


def test_a_click_in_the_error_region_corrects_a_model_that_listens(records: Records) -> None:
    model = KnowingModel()
    rows = segmentation_rows(model, images(records), ONE_RANK)
    assert len(rows) == sum(len(row["targets"]) for row in rows_of(records))
    large = [row["mask_metrics"] for row in rows if row["pixels"] > 100]
    assert all(m["dice"] < m["dice_click_1"] for m in large)
    assert all(m["dice_click_1"] > 0.9 for m in large)  # the truth at 64 px, scored at 48 x 72
    for prompts in model.seen[1::2]:
        x = prompts.point_coords[:, 1, 0]
        assert (x < 4).all()  # the error region is the wrong columns
        assert (prompts.point_labels[:, 1] == 0).any()  # spilled pixels are clicked away


def test_without_language_there_is_no_text_score_and_no_semantic_uncertainty(
    records: Records,
) -> None:
    row = segmentation_rows(KnowingModel(), images(records), ONE_RANK._replace(num_clicks=0))[0]
    assert set(row["mask_metrics"]) == {"dice"}
    assert row["uncertainty"] == {"joint_label_free": 0.0}


def test_the_disc_baseline_takes_the_size_that_scores_best_in_training() -> None:
    share = DISC_SHARES[6]
    truth = disc(64, 64, (30, 30), share * 64 * 64)
    fitted = fit_disc([("liver", truth, (30.0, 30.0))] * 3 + [("cyst", truth[::-1], (30.0, 33.0))])
    assert fitted.share == share
    assert fitted.by_target == pytest.approx({"liver": truth.mean(), "cyst": truth.mean()})
    with pytest.raises(ValueError, match="without any"):
        fit_disc([])


def test_rows_say_everything_a_table_needs_and_are_plain_json(
    records: Records, mllm_folder: Path
) -> None:
    model = tiny_model(mllm_folder)
    settings_ = ONE_RANK._replace(num_clicks=2, beta_vl=0.5)
    rows = segmentation_rows(
        model, images(records, tiny_chat(mllm_folder)), settings_, DiscBaseline(0.1, {"liver": 0.1})
    )
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    row = rows[0]
    assert row["id"] == "tiny/test/0/liver" and row["group"] == "head"
    assert (row["source"], row["split"], row["modality"]) == ("tiny", "test", "MR")
    assert row["attributes"] == {"sex": "F", "age": 40.0, "race": None}
    assert row["pixels"] == 22 * 24
    metrics = {"dice", "dice_text", "dice_click_1", "dice_click_2"}
    metrics |= {"dice_disc", "dice_disc_by_target"}
    assert all(set(r["mask_metrics"]) == metrics for r in rows)
    for r in rows:
        u = r["uncertainty"]
        joint = 0.5 * u["semantic"] + u["predicted_dice_loss"]
        assert u["joint_label_free"] == pytest.approx(joint, abs=1e-5)
        assert 0 <= u["semantic"] <= 2
        assert all(0 <= score <= 1 for score in r["mask_metrics"].values())


def test_scores_do_not_depend_on_batches_and_ranks(records: Records, tiny_mllm: Path) -> None:
    model, chat = tiny_model(tiny_mllm), tiny_chat(tiny_mllm)

    def scores(world_size: int, batch_size: int) -> dict[str, Any]:
        shares = [
            ONE_RANK._replace(rank=rank, world_size=world_size, batch_size=batch_size)
            for rank in range(world_size)
        ]
        rows = [r for s in shares for r in segmentation_rows(model, images(records, chat), s)]
        assert len({row["id"] for row in rows}) == len(rows)
        return {row["id"]: row["mask_metrics"] for row in rows}

    alone = scores(1, 5)
    for world_size, batch_size in ((2, 2), (3, 1)):
        other = scores(world_size, batch_size)
        assert other.keys() == alone.keys()
        for name, metrics in alone.items():
            assert other[name] == pytest.approx(metrics, abs=0.02)


def test_questions_become_rows_with_a_verdict(records: Records, mllm_folder: Path) -> None:
    chat = tiny_chat(mllm_folder)
    questions = HeldOutQuestions([records], chat, {}, image_size=IMAGE_SIZE)
    rows = answer_rows(tiny_model(mllm_folder), questions, ONE_RANK._replace(max_new_tokens=3))
    assert len(rows) == len(questions)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["prompt"] == "Is the liver visible?" and rows[0]["reference"] == "yes"
    assert rows[0]["id"] == "tiny/test/0/0" and rows[0]["kind"] == "closed"
    assert {row["kind"] for row in rows} == {"closed", "choice", "open"}
    assert all(isinstance(row["prediction"], str) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


# ---------------------------------------------------------------- rows to numbers


def test_dice_of_empty_masks() -> None:
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert dice_score(empty, empty) == 1.0
    assert dice_score(empty, full) == dice_score(full, empty) == 0.0
    assert dice_score(full, full) == 1.0


def test_dice_by_hand() -> None:
    prediction = np.array([[1, 1, 0], [0, 0, 0]], np.uint8)
    truth = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    assert dice_score(prediction, truth) == 2 * 1 / (2 + 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
def test_dice_is_symmetric_bounded_and_one_only_for_equal_masks(a: int, b: int) -> None:
    first, second = (np.array([[m >> k & 1 for k in range(12)]], bool) for m in (a, b))
    score = dice_score(first, second)
    assert score == dice_score(second, first) and 0 <= score <= 1
    assert (score == 1) == (a == b)


def test_a_disc_has_the_area_it_was_asked_for() -> None:
    area = 400.0
    drawn = disc(HEIGHT, WIDTH, (36, 24), area)
    assert drawn.shape == (HEIGHT, WIDTH) and drawn[24, 36]
    assert abs(int(drawn.sum()) - area) < 0.05 * area


def mask_row(dice: float, target: str, group: str, sex: str | None, doubt: float) -> dict[str, Any]:
    return {
        "target": target,
        "group": group,
        "modality": "CT",
        "attributes": {"sex": sex},
        "mask_metrics": {"dice": dice},
        "uncertainty": {"semantic": doubt},
    }


ROWS = [
    mask_row(0.9, "liver", "head", "F", 0.1),
    mask_row(0.8, "liver", "head", "M", 0.4),
    mask_row(0.7, "liver", "head", None, 0.2),
    mask_row(0.2, "duct", "tail", "F", 0.3),
]


def test_a_summary_gives_the_means_computed_by_hand() -> None:
    summary = summarise_segmentation(ROWS)
    assert summary["num_masks"] == 4
    assert summary["dice"]["mean"] == pytest.approx(2.6 / 4)
    assert summary["dice"]["mean_over_targets"] == pytest.approx((0.8 + 0.2) / 2)
    assert summary["dice"]["by_group"]["head"] == {"num": 3, "mean": pytest.approx(0.8)}
    assert summary["dice"]["by_target"]["duct"] == {"num": 1, "mean": pytest.approx(0.2)}
    assert summary["semantic"]["mean"] == pytest.approx(0.25)
    # One failed mask, doubted more than two of the three good ones.
    assert summary["semantic"]["failure_auroc"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(summary)) == summary


def test_unknown_attributes_form_a_group_of_their_own() -> None:
    table = mean_by(ROWS, "sex", "dice")
    assert table["missing"] == {"num": 1, "mean": pytest.approx(0.7)}
    assert table["F"] == {"num": 2, "mean": pytest.approx(0.55)}


def test_failures_cannot_be_ranked_when_all_masks_are_good_or_there_are_none() -> None:
    assert failure_auroc(ROWS[:3], "semantic") is None
    assert summarise_segmentation([]) == {"num_masks": 0}


@pytest.mark.parametrize(
    "kind, prediction, reference, correct",
    [
        ("closed", "Yes.", "yes", True),
        ("closed", "yes it is", "yes", False),
        ("closed", "", "no", False),
        ("open", "T2-weighted", "t2-weighted", True),
        ("open", "T2 weighted", "T2-weighted", False),
        ("open", "3.5", "3.5", True),
        ("open", "35", "3.5", False),
        ("open", "  The  liver\n", "the liver", True),
        ("open", "no mass", "mass", False),
        ("choice", "B: ct", "B: CT", True),
        ("choice", "B", "B: CT", True),
        ("choice", "(b) MR", "B: CT", True),
        ("choice", "A: CT", "B: CT", False),
        ("choice", "B.", "B", True),
        ("choice", "ct", "B: CT", True),
        ("choice", "mr", "B: CT", False),
        ("choice", "a mass", "A: CT", False),
        ("choice", "", "A: CT", False),
        ("choice", "the liver", "the liver", True),
    ],
)
def test_an_answer_is_right_when_it_says_the_reference(
    kind: str, prediction: str, reference: str, correct: bool
) -> None:
    assert is_correct(kind=kind, prediction=prediction, reference=reference) is correct


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once


def answer_row(kind: str, reference: str, correct: bool, modality: str = "CT") -> dict[str, Any]:
    return {"kind": kind, "reference": reference, "correct": correct, "modality": modality}


def test_accuracy_stands_beside_what_constants_would_get() -> None:
    rows = [
        answer_row("closed", "Yes", True),
        answer_row("closed", "yes.", False),
        answer_row("closed", "no", True, "MR"),
        answer_row("closed", "no", True),
        answer_row("closed", "no", False),
        answer_row("open", "liver", False),
    ]
    table = summarise_answers(rows)
    assert list(table) == ["closed", "open"]
    closed = table["closed"]
    assert (closed["num"], closed["accuracy"]) == (5, pytest.approx(3 / 5))
    assert closed["best_constant"] == pytest.approx(3 / 5)
    assert closed["always_yes"] == pytest.approx(2 / 5)
    assert closed["by_modality"]["MR"] == {"num": 1, "accuracy": 1.0}
    assert "always_yes" not in table["open"]
    assert summarise_answers([]) == {}


def test_the_best_constant_choice_is_a_letter_whatever_its_text() -> None:
    rows = [
        {"kind": "choice", "modality": "ct", "correct": False, "reference": reference}
        for reference in ("A: ct", "A: mr", "B: ct", "a")
    ]
    assert summarise_answers(rows)["choice"]["best_constant"] == pytest.approx(3 / 4)


def test_an_earlier_evaluation_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    command = ["scripts/evaluate.py", "model", "--language", "questions", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "holds an earlier evaluation" in done.stderr
    assert (tmp_path / "predictions.jsonl").read_text() == "{}\n"
