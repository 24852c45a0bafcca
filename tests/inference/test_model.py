"""The door for users: one image, one click, one question; and the examples that show it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biascare import BiasCareVL
from biascare.data.heldout import HeldOutImages, heldout_loader
from biascare.evaluation.cases import Header
from biascare.evaluation.evaluate import EvaluationSettings, mask_cases
from biascare.inference.images import as_pixels
from biascare.inference.segmenter import Segmenter
from biascare.interfaces import Prompts
from biascare.models.export_folder import TrainingFacts, save_network
from biascare.models.network import DualPathNetwork
from biascare.records import Records, decode_mask
from tests.tiny import IMAGE_SIZE, encoded_png, tiny_chat, tiny_model

ROOT = Path(__file__).parents[2]
FACTS = TrainingFacts(
    beta_vl=0.25,
    mask_prompt=True,
    prevalence={"liver": "head"},
    disc_share=None,
    disc_share_by_target={},
    trained_on=[],
)


@pytest.fixture(scope="module")
def export(tiny_mllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_network(tiny_model(tiny_mllm), folder, facts=FACTS)
    tiny_chat(tiny_mllm).processor.save_pretrained(folder / "processor")
    return folder


@pytest.fixture(scope="module")
def model(export: Path) -> BiasCareVL:
    return BiasCareVL.from_pretrained(export)


@pytest.fixture(scope="module")
def vision_model() -> BiasCareVL:
    return BiasCareVL(tiny_model(None), None)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of 50 x 90 pixels."""
    path = tmp_path_factory.mktemp("picture") / "scan.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    path.write_bytes(encoded_png(pixels))
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a, b))


# ---------------------------------------------------------------- segmentation


def test_a_click_and_its_undo_in_pixels_of_the_original(model: BiasCareVL, picture: Path) -> None:
    first = model.segment(picture, "the liver", points=[(80, 40)], labels=[1])
    assert first.mask.shape == (50, 90) and first.mask.dtype == np.bool_
    corrected = first.click(10, 5, positive=False).click(20, 30)
    assert corrected.clicks == ((80, 40, 1), (10, 5, 0), (20, 30, 1))
    assert first.clicks == ((80, 40, 1),)  # it never changes
    undone = corrected.undo()
    assert undone.clicks == ((80, 40, 1), (10, 5, 0))
    assert corrected.reset() is first and corrected.undo().undo() is first
    again = undone.click(20, 30)
    assert same(again.decoded.prediction.mask_logits, corrected.decoded.prediction.mask_logits)
    with pytest.raises(ValueError, match="nothing to undo"):
        first.undo()


def test_uncertainty_is_eq_6_with_the_beta_that_was_trained(
    model: BiasCareVL, picture: Path
) -> None:
    found = model.segment(picture, "liver", points=[(40, 20)])
    u = found.uncertainties
    assert u["predicted_dice_loss"] == pytest.approx(1 - found.predicted_dice, abs=1e-6)
    joint = FACTS.beta_vl * u["semantic"] + u["predicted_dice_loss"]
    assert found.uncertainty == pytest.approx(joint, abs=1e-5)


def test_clicks_encode_nothing_again(
    model: BiasCareVL, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = model.segment(picture, "liver", points=[(40, 20)])
    monkeypatch.setattr(DualPathNetwork, "encode", lambda *_: pytest.fail("encoded again"))
    found.click(3, 3).click(5, 5, positive=False)


def test_a_simulated_click_and_a_persons_give_the_same_mask(
    model: BiasCareVL, tiny_records: Path
) -> None:
    records = Records(tiny_records)
    assert model.chat is not None
    images = HeldOutImages([records], model.chat, {}, image_size=IMAGE_SIZE)
    (held,) = heldout_loader(images, [1], 1)
    settings = EvaluationSettings(
        batch_size=1,
        num_workers=0,
        num_corrections=2,
        mask_prompt=True,
        max_new_tokens=1,
        synced_generation=False,
    )
    header = Header(
        model="",
        weights="",
        commit="",
        data=[],
        settings={},
        beta_vl=0.5,
        prevalence={},
        disc_share=None,
        disc_share_by_target={},
    )
    for case in mask_cases(model.segmenter, images, held, settings, header):
        first, *corrected = case.predictions
        x, y, _ = first.points[0]
        session = model.segment(
            records[1]["image"],
            case.facts.target,
            modality=case.facts.modality,
            points=[(x, y)],
        )
        for prediction in (first, *corrected):
            if len(prediction.points) > len(session.clicks):
                x, y, label = prediction.points[-1]
                session = session.click(x, y, positive=label == 1)
            mask = decode_mask(prediction.mask.encode(), case.height, case.width)
            assert np.array_equal(session.mask, mask > 0)
            assert session.predicted_dice == pytest.approx(prediction.predicted_dice, abs=1e-5)
            for name, doubt in session.uncertainties.items():
                assert doubt == pytest.approx(prediction.uncertainty[name], abs=1e-5)
        # What costs a further decoding is known of the first mask, and in a session on demand.
        jitter = session.reset().click_disagreement
        assert jitter == pytest.approx(first.uncertainty["click_disagreement"], abs=1e-5)
        assert "click_disagreement" not in corrected[0].uncertainty
        assert 0 <= session.click_disagreement <= 1


@pytest.mark.parametrize("x, y", [(4000, 10), (-3, 10), (10, 50), (float("nan"), 1)])
def test_a_click_outside_the_image_is_refused(
    model: BiasCareVL, picture: Path, x: float, y: float
) -> None:
    with pytest.raises(ValueError, match=r"expected 0 <= x <= 89 and 0 <= y <= 49"):
        model.segment(picture, "liver", points=[(x, y)])
    found = model.segment(picture, "liver", points=[(89, 49)])
    with pytest.raises(ValueError, match="50 x 90"):
        found.click(x, y)


def test_boxes_prompt_too_and_a_bad_one_is_refused(vision_model: BiasCareVL, picture: Path) -> None:
    found = vision_model.segment(picture, box=(3, 4, 60, 40))
    assert found.click(5, 5).box == (3, 4, 60, 40)
    with pytest.raises(ValueError, match="x0 <= x1"):
        vision_model.segment(picture, box=(60, 4, 3, 40))
    with pytest.raises(ValueError, match="expected 0 <= x <= 89"):
        vision_model.segment(picture, box=(3, 4, 600, 40))


def test_words_alone_segment_where_words_are_read(
    model: BiasCareVL, vision_model: BiasCareVL, picture: Path
) -> None:
    assert model.segment(picture, "liver", modality="ct").clicks == ()
    with pytest.raises(ValueError, match="nothing says what to segment"):
        model.segment(picture)
    with (
        pytest.warns(UserWarning, match="'liver' is not read"),
        pytest.raises(ValueError, match="reads no text"),
    ):
        vision_model.segment(picture, "liver")


def test_labels_say_inside_or_outside_and_nothing_else(model: BiasCareVL, picture: Path) -> None:
    for labels in ([1, 0], [2], []):
        with pytest.raises(ValueError, match="labels: got"):
            model.segment(picture, "liver", points=[(1, 1)], labels=labels)


def test_a_vision_model_says_how_sure_it_is_without_text(
    vision_model: BiasCareVL, picture: Path
) -> None:
    found = vision_model.segment(picture, points=[(40, 20)])
    assert found.uncertainty == pytest.approx(1 - found.predicted_dice, abs=1e-6)
    with pytest.raises(ValueError, match="vision stage"):
        vision_model.ask(picture, "Is it blank?")


def test_prompts_reach_the_network_in_pixels_of_its_input(
    vision_model: BiasCareVL, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Prompts] = []
    decode = Segmenter.decode
    monkeypatch.setattr(Segmenter, "decode", lambda *a: seen.append(a[2]) or decode(*a))
    vision_model.segment(picture, points=[(89, 49)], labels=[0])
    expected = [89.5 * IMAGE_SIZE / 90 - 0.5, 49.5 * IMAGE_SIZE / 50 - 0.5]
    assert seen[0].point_coords[0, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert seen[0].point_labels.tolist() == [[0]]


# ---------------------------------------------------------------- images


def test_an_image_is_the_same_however_it_is_given(picture: Path) -> None:
    pixels = as_pixels(picture)
    for other in (str(picture), picture.read_bytes(), Image.open(picture), pixels):
        assert np.array_equal(as_pixels(other), pixels)
    grey = Image.open(picture).convert("L")
    assert np.array_equal(as_pixels(grey), as_pixels(np.array(grey)))


@pytest.mark.parametrize(
    "image, message",
    [
        ("nowhere.png", "nowhere.png cannot be read"),
        (b"no image", "do not decode"),
        (np.zeros((4, 4, 3)), "uint8"),
        (np.zeros((3, 4, 4), np.uint8), r"\[3, 4, 4\]"),
        (7, "got int"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_pixels(image)  # type: ignore[arg-type]  # the point of the test


# ---------------------------------------------------------------- questions


def test_a_question_with_options_is_answered_by_one_of_them(
    model: BiasCareVL, picture: Path
) -> None:
    for options in (["yes", "no"], ["CT", "MR", "PET"]):
        answer = model.ask(picture, "Which is it?", options=options)
        assert answer.text in options and set(answer.probabilities) == set(options)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.confidence == max(answer.probabilities.values())


def test_an_open_question_is_answered_in_words_with_a_confidence(
    model: BiasCareVL, picture: Path
) -> None:
    answer = model.ask(picture, "Which organ is bright?", max_new_tokens=4)
    assert isinstance(answer.text, str) and 0 < answer.confidence <= 1
    mean = sum(answer.token_log_probs) / len(answer.token_log_probs)
    assert answer.confidence == pytest.approx(np.exp(mean))


def test_options_must_be_a_choice(model: BiasCareVL, picture: Path) -> None:
    for options in (["yes"], ["a", "a"], []):
        with pytest.raises(ValueError, match="two or more different ones"):
            model.ask(picture, "Is it?", options=options)


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["click.py", "--target", "liver", "--at", "40", "20", "--not-at", "3", "3"], "Dice"),
        (["ask.py", "--question", "Is the liver visible?", "--options", "yes", "no"], "yes"),
    ],
)
def test_the_examples_run(
    export: Path,
    picture: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, *options = arguments
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, str(export), str(picture), *options])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert said in capsys.readouterr().out
    if script == "click.py":
        assert np.array(Image.open(tmp_path / "mask.png")).shape[:2] == (50, 90)
