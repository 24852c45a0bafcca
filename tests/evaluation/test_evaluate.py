"""From a model and held-out records to finished cases: the one loop, its files, its ranks."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from biascare.data.heldout import HeldOutImages, HeldOutQuestions
from biascare.evaluation import evaluate as module
from biascare.evaluation import progress
from biascare.evaluation.cases import Cases, Header, MaskCase, read_cases
from biascare.evaluation.evaluate import EvaluationSettings, evaluate, summarise
from biascare.evaluation.metrics.segmentation import mask_scores
from biascare.inference.answerer import Answerer
from biascare.inference.segmenter import Segmenter
from biascare.interfaces import AnswerHead, Batch, Facts, Features, Prediction, Prompts
from biascare.records import Records, decode_mask
from biascare.uncertainty import JITTER
from tests.tiny import IMAGE_SIZE, rows_of, tiny_chat, tiny_model, tiny_record_folder

SETTINGS = EvaluationSettings(
    batch_size=3,
    num_workers=0,
    num_corrections=1,
    mask_prompt=True,
    max_new_tokens=3,
    synced_generation=False,
)
HEADER = Header(
    model="tiny",
    weights="0",
    commit="unknown",
    data=[],
    settings={},
    beta_vl=0.5,
    prevalence={"liver": "head"},
    disc_share=0.1,
    disc_share_by_target={"liver": 0.1},
)


class KnowingModel:
    """Knows the truth. Draws a wrong column until a click lands on it, then the truth itself.

    Keeps `DualPathModel`; what it was prompted with is kept in `seen`.
    """

    mllm: AnswerHead | None = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[Prompts] = []
        self.num_encoded = 0

    def eval(self) -> KnowingModel:
        return self

    def encode(self, batch: Batch) -> Features:
        assert batch.masks is not None
        self.num_encoded += 1
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
        # Moved clicks come as further rows.
        mask = self.truth.repeat(len(prompts.point_labels) // len(self.truth), 1, 1)
        if prompts.point_labels.shape[1] == 1:
            mask[:, :, :4] ^= True
        logits = torch.where(mask, 8.0, -8.0)
        low = logits[:, ::2, ::2]
        return Prediction(
            mask_logits=logits, low_res_logits=low, predicted_dice=torch.ones(len(mask))
        )


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(tiny_record_folder(tmp_path_factory.mktemp("evaluation") / "test", 5, "test"))


def images_of(records: Records, chat: Any = None, prompt: str = "point") -> HeldOutImages:
    groups = {"liver": "head"}
    return HeldOutImages([records], chat, groups, image_size=IMAGE_SIZE, prompt=prompt)


def segment(model: Any, records: Records, path: Path, **changes: Any) -> list[MaskCase]:
    """Mask cases of a model without language."""
    segmenter = Segmenter(model, None, image_size=IMAGE_SIZE, beta_vl=0.5)
    settings = SETTINGS._replace(**changes)
    return evaluate(segmenter, None, images_of(records), None, path, HEADER, settings).masks


def both_sides(folder: Path, records: Records, path: Path, **changes: Any) -> Cases:
    """All cases of a tiny model with both pathways."""
    model, chat = tiny_model(folder), tiny_chat(folder)
    questions = HeldOutQuestions([records], chat, {}, image_size=IMAGE_SIZE)
    return evaluate(
        Segmenter(model, chat, image_size=IMAGE_SIZE, beta_vl=0.5),
        Answerer(model, chat, image_size=IMAGE_SIZE),
        images_of(records, chat),
        questions,
        path,
        HEADER,
        SETTINGS._replace(**changes),
    )


def without_time(cases: Any) -> list[Any]:
    return [dataclasses.replace(case, seconds=0.0) for case in cases]


# ---------------------------------------------------------------- what a case holds


def test_a_click_in_the_error_region_corrects_a_model_that_listens(
    records: Records, tmp_path: Path
) -> None:
    model = KnowingModel()
    cases = segment(model, records, tmp_path / "cases.jsonl")
    assert len(cases) == sum(len(row["targets"]) for row in rows_of(records))
    scores = [mask_scores(case, HEADER) for case in cases]
    large = [
        score
        for case, score in zip(cases, scores, strict=True)
        if decode_mask(case.truth.encode(), case.height, case.width).sum() > 100
    ]
    assert all(score["dice"] < score["dice_click_1"] for score in large)
    # The truth at 64 px, scored at 48 x 72.
    assert all(score["dice_click_1"] > 0.9 for score in large)
    # Of each batch: the first clicks, those moved by a few pixels, the corrections.
    for first, moved in zip(model.seen[::3], model.seen[1::3], strict=True):
        assert len(moved.point_labels) == len(JITTER) * len(first.point_labels)
    for prompts in model.seen[2::3]:
        x = prompts.point_coords[:, 1, 0]
        assert (x < 4).all()  # the error region is the wrong columns
        assert (prompts.point_labels[:, 1] == 0).any()  # spilled pixels are clicked away


def test_the_prompt_history_stands_in_native_pixels(records: Records, tmp_path: Path) -> None:
    for case in segment(KnowingModel(), records, tmp_path / "cases.jsonl", num_corrections=2):
        first, *corrected = case.predictions
        assert [len(p.points) for p in (first, *corrected)] == [1, 2, 3]
        assert corrected[1].points[:2] == corrected[0].points
        x, y, label = first.points[0]
        truth = decode_mask(case.truth.encode(), case.height, case.width)
        assert label == 1 and truth[int(y), int(x)] == 1
        # The wrong columns are the first four of 64, which are 4.5 of 72.
        assert -0.5 <= corrected[0].points[1][0] < 4.5


def test_without_language_there_is_no_text_mask_and_no_semantic_uncertainty(
    records: Records, tmp_path: Path
) -> None:
    case = segment(KnowingModel(), records, tmp_path / "cases.jsonl", num_corrections=0)[0]
    assert case.by_text is None and case.instruction is None
    uncertainty = case.predictions[0].uncertainty
    assert uncertainty["joint_label_free"] == uncertainty["predicted_dice_loss"] == 0.0
    assert not {"semantic", "text_disagreement"} & set(uncertainty)
    assert uncertainty["click_disagreement"] == pytest.approx(0, abs=1e-6)
    first = {"dice", "iou", "nsd", "hd95", "dice_256", "iou_256"}
    assert set(mask_scores(case, HEADER)) == first | {"dice_disc", "dice_disc_by_target"}


def test_a_case_says_everything_a_table_needs(
    records: Records, mllm_folder: Path, tmp_path: Path
) -> None:
    cases = both_sides(mllm_folder, records, tmp_path / "cases.jsonl", num_corrections=2).masks
    case = cases[0]
    assert case.id == "tiny/test/0/liver" and case.facts.prevalence == "head"
    assert (case.facts.source, case.facts.split, case.facts.modality) == ("tiny", "test", "MR")
    assert (case.facts.sex, case.facts.age, case.facts.race) == ("F", 40.0, None)
    assert case.instruction == "Segment the liver in this MR image."
    assert decode_mask(case.truth.encode(), case.height, case.width).sum() == 22 * 24
    metrics = {"dice", "dice_text", "dice_click_1", "dice_click_2", "nsd", "hd95"}
    metrics |= {"dice_256", "iou_256"}
    metrics |= {"iou", "iou_click_1", "iou_click_2"}
    metrics |= {"dice_disc", "dice_disc_by_target"}
    for case in cases:
        scores = mask_scores(case, HEADER)
        assert set(scores) == metrics
        distance = scores.pop("hd95")  # in pixels, NaN where nothing was found
        assert not distance < 0
        assert all(0 <= score <= 1 for score in scores.values())
        for prediction in (case.by_text, *case.predictions):
            assert prediction is not None
            u = prediction.uncertainty
            joint = 0.5 * u["semantic"] + u["predicted_dice_loss"]
            assert u["joint_label_free"] == pytest.approx(joint, abs=1e-5)
            assert 0 <= u["semantic"] <= 2


def test_a_question_becomes_a_case_with_text_and_log_probs(
    records: Records, mllm_folder: Path, tmp_path: Path
) -> None:
    answers = both_sides(mllm_folder, records, tmp_path / "cases.jsonl").answers
    kinds = [case.facts.kind for case in answers]
    assert set(kinds) == {"closed", "choice", "open"}
    closed = answers[0]
    assert (closed.id, closed.question, closed.reference) == (
        "tiny/test/0/0",
        "Is the liver visible?",
        "yes",
    )
    assert closed.options == ["yes", "no"]
    choice = answers[kinds.index("choice")]
    assert choice.options == ["CT", "MR"] and choice.reference == "CT"
    assert choice.prompt == "Which modality is this?\nA: CT\nB: MR"
    for case in answers:
        assert 0 < len(case.token_log_probs) <= 3 and max(case.token_log_probs) <= 0
        if case.facts.kind == "open":
            assert case.options == [] and case.option_log_probs is None
        else:
            assert case.option_log_probs is not None
            assert sum(map(torch.tensor, case.option_log_probs)).exp() < 1


def test_a_box_is_the_tight_box_of_the_native_mask(records: Records, tmp_path: Path) -> None:
    model = KnowingModel()
    segmenter = Segmenter(model, None, image_size=IMAGE_SIZE, beta_vl=0.5)
    cases = evaluate(
        segmenter,
        None,
        images_of(records, prompt="box"),
        None,
        tmp_path / "cases.jsonl",
        HEADER,
        SETTINGS._replace(num_corrections=0),
    ).masks
    boxes = {case.id: case.predictions[0].box for case in cases}
    # Rows 8 to 29, columns 6 to 29 of 48 x 72 pixels; the lesion is the pixel (60, 5).
    assert boxes["tiny/test/0/liver"] == (6, 8, 29, 29)
    assert boxes["tiny/test/0/lesion"] == (60, 5, 60, 5)
    x, y = (
        [(c + 0.5) * 64 / n - 0.5 for c in edges] for n, edges in ((72, (6, 29)), (48, (8, 29)))
    )
    corners = model.seen[0].point_coords[0]
    assert torch.allclose(corners, torch.tensor([[x[0], y[0]], [x[1], y[1]]]), atol=1e-4)
    assert model.seen[0].point_labels[0].tolist() == [2, 3]


# ---------------------------------------------------------------- files and ranks


def test_cases_come_back_from_their_file_as_they_were(
    records: Records, tiny_mllm: Path, tmp_path: Path
) -> None:
    cases = both_sides(tiny_mllm, records, tmp_path / "cases.jsonl")
    assert cases == read_cases(tmp_path / "cases.jsonl") and cases.header == HEADER
    lines = (tmp_path / "cases.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["format"] == "biascare-cases"
    assert {json.loads(line)["case"] for line in lines[1:]} == {"mask", "answer"}
    assert [path.name for path in tmp_path.iterdir()] == ["cases.jsonl"]


def test_cases_do_not_depend_on_the_batch(
    records: Records, tiny_mllm: Path, tmp_path: Path
) -> None:
    alone = both_sides(tiny_mllm, records, tmp_path / "alone.jsonl", batch_size=1)
    together = both_sides(tiny_mllm, records, tmp_path / "together.jsonl", batch_size=5)
    for one, other in zip(alone.masks, together.masks, strict=True):
        assert one.id == other.id
        scores = mask_scores(other, HEADER)
        assert mask_scores(one, HEADER) == pytest.approx(scores, abs=0.02)
    for mine, theirs in zip(alone.answers, together.answers, strict=True):
        assert (mine.id, mine.text) == (theirs.id, theirs.text)
        assert mine.option_log_probs == pytest.approx(theirs.option_log_probs, abs=1e-3)
        assert mine.token_log_probs == pytest.approx(theirs.token_log_probs, abs=1e-3)


def test_an_interrupted_evaluation_computes_only_what_is_missing(
    records: Records, tmp_path: Path
) -> None:
    whole = segment(KnowingModel(), records, tmp_path / "whole.jsonl", batch_size=1)
    # What a kill leaves: the share of a rank, its last line cut short.
    text = (tmp_path / "whole.jsonl").read_text()
    share = tmp_path / "cases.rank0.jsonl"
    share.write_text("".join(line + "\n" for line in text.splitlines()[:8]) + '{"case": "ma')
    model = KnowingModel()
    cases = segment(model, records, tmp_path / "cases.jsonl", batch_size=1)
    assert without_time(cases) == without_time(whole)
    done = {case.facts.image_id for case in whole[:7]}
    assert 0 < model.num_encoded < len(records.segmentation_units)
    assert model.num_encoded >= len(records.segmentation_units) - len(done)
    assert not share.exists()


def test_an_evaluation_tells_how_far_it_is_and_what_was_on_disk(
    records: Records,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = segment(KnowingModel(), records, tmp_path / "whole.jsonl", batch_size=1)
    assert capsys.readouterr().err == ""  # as inside training
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cases.rank0.jsonl").write_text("".join(lines[:4]))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    segmenter = Segmenter(KnowingModel(), None, image_size=IMAGE_SIZE, beta_vl=0.5)
    path = tmp_path / "cases.jsonl"
    settings = SETTINGS._replace(batch_size=1)
    evaluate(segmenter, None, images_of(records), None, path, HEADER, settings, progress=True)
    first, *others = capsys.readouterr().err.splitlines()
    num = len(whole)
    assert first == f"masks: 3 of {num} were on disk, {num - 3} are left"
    assert all(re.fullmatch(rf"masks: \d+ of {num}, .+ a second, .+ left", o) for o in others)
    assert f"masks: {num} of {num}, " in others[-1]


def test_time_left_follows_from_the_cases_of_this_call() -> None:
    assert progress.pace_of(10, 70, 5.0) == "2 a second, 0:00:30 left"
    assert progress.pace_of(0, 70, 5.0) == "time left unknown"


def test_a_finished_evaluation_is_read_and_not_repeated(records: Records, tmp_path: Path) -> None:
    first = segment(KnowingModel(), records, tmp_path / "cases.jsonl")
    model = KnowingModel()
    assert segment(model, records, tmp_path / "cases.jsonl") == first
    assert model.num_encoded == 0


def test_shares_of_another_number_of_ranks_are_completed(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segment(KnowingModel(), records, tmp_path / "whole.jsonl", batch_size=2)
    monkeypatch.setattr(module, "world_size", lambda: 3)
    monkeypatch.setattr(module, "_join", lambda *_: None)  # the other ranks never came
    monkeypatch.setattr(module, "read_cases", lambda path: Cases(HEADER, [], [], []))
    segment(KnowingModel(), records, tmp_path / "cases.jsonl", batch_size=2)
    monkeypatch.undo()
    model = KnowingModel()
    cases = segment(model, records, tmp_path / "cases.jsonl", batch_size=2)
    assert without_time(cases) == without_time(whole) and model.num_encoded == 2


def test_another_evaluation_is_neither_mixed_in_nor_overwritten_unasked(
    records: Records, tmp_path: Path
) -> None:
    path = tmp_path / "cases.jsonl"
    segment(KnowingModel(), records, path)
    before = path.read_bytes()
    segmenter = Segmenter(KnowingModel(), None, image_size=IMAGE_SIZE, beta_vl=0.5)
    other = dataclasses.replace(HEADER, weights="1")
    asked: tuple[Any, ...] = (segmenter, None, images_of(records), None, path, other, SETTINGS)
    with pytest.raises(ValueError, match=r"differs in weights: '0' there, '1' here.*--overwrite"):
        evaluate(*asked)
    assert path.read_bytes() == before
    assert evaluate(*asked, overwrite=True).header == other


def test_two_folders_with_one_name_are_refused(records: Records, tmp_path: Path) -> None:
    twice = HeldOutImages([records, records], None, {}, image_size=IMAGE_SIZE)
    segmenter = Segmenter(KnowingModel(), None, image_size=IMAGE_SIZE, beta_vl=0.5)
    with pytest.raises(ValueError, match="tiny/test: tiny/test/0/liver: two folders"):
        evaluate(segmenter, None, twice, None, tmp_path / "cases.jsonl", HEADER, SETTINGS)
    nothing = HeldOutImages([], None, {}, image_size=IMAGE_SIZE)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(segmenter, None, nothing, None, tmp_path / "cases.jsonl", HEADER, SETTINGS)


def test_a_file_of_format_1_is_read_with_nothing_in_the_fields_it_lacks(tmp_path: Path) -> None:
    header = dataclasses.asdict(HEADER) | {"format_version": 1}
    del header["benchmark"]
    facts = dict.fromkeys(Facts._fields) | {
        "image_id": "1", "task": "language", "kind": "closed", "source": "s", "split": "test",
        "modality": "ct", "anatomy": "",
    }  # fmt: skip
    answer = {
        "case": "answer", "id": "1/0", "facts": facts, "question": "Is it?", "question_facts": {},
        "prompt": "Is it?", "options": ["yes", "no"], "option_log_probs": [-0.1, -3.0],
        "text": "yes", "token_log_probs": [-0.1], "reference": "yes", "labels": [], "seconds": 0.1,
    }  # fmt: skip
    path = tmp_path / "cases.jsonl"
    path.write_text(f"{json.dumps(header)}\n{json.dumps(answer)}\n")
    cases = read_cases(path)
    assert cases.header.benchmark is None
    assert cases.answers[0].variants == {}
    assert cases.labels == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no header"),
        ("{}\n", "expected 'biascare-cases' version 2"),
        ('{"format": "biascare-cases", "format_version": 9}\n', "version 9"),
        ('{"format": "biascare-cases", "format_version": 1}\n', "its header is damaged"),
        ("not json\n", "no header"),
        ("{HEADER}\n{}\n", "line 2: not a case"),
        ('{HEADER}\n{"case": "mask", "id": "a"}\n', "line 2: not a case"),
        ("{HEADER}\n{", "ends inside a line"),
    ],
)
def test_a_damaged_file_of_cases_is_refused_and_says_where(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(text.replace("{HEADER}", json.dumps(dataclasses.asdict(HEADER))))
    with pytest.raises(ValueError, match=message):
        read_cases(path)


def test_a_summary_has_what_there_are_cases_of(
    records: Records, tiny_mllm: Path, tmp_path: Path
) -> None:
    cases = both_sides(tiny_mllm, records, tmp_path / "cases.jsonl")
    summary = summarise(cases)
    assert set(summary) == {"segmentation", "triage", "answers", "groups"}
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary["groups"]["dice"]) == {"sex", "age", "sex and age"}  # no race is known
    sexes = {group["name"]: group["num"] for group in summary["groups"]["dice"]["sex"]["groups"]}
    assert sum(sexes.values()) == len(cases.masks) and set(sexes) == {"F", "M", "missing"}
    assert set(summarise(cases._replace(masks=[]))) == {"answers", "groups"}
    assert summarise(cases._replace(masks=[], answers=[])) == {}
