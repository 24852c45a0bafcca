"""A person's session: undo and redo of any depth, boxes, what is kept of encoded images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from biascare import BiasCareVL
from biascare.hitl.clicks import refine_once
from biascare.inference.embeddings import EmbeddingCache
from biascare.inference.segmenter import Segmenter
from biascare.interfaces import Prediction, Prompts
from tests.tiny import IMAGE_SIZE, random_image, tiny_chat, tiny_model


@pytest.fixture(scope="module")
def model(tiny_mllm: Path) -> BiasCareVL:
    return BiasCareVL(tiny_model(tiny_mllm), tiny_chat(tiny_mllm))


@pytest.fixture(scope="module")
def vision_model() -> BiasCareVL:
    return BiasCareVL(tiny_model(None), None)


def picture(seed: int = 0, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_clicks_of_training_give_the_same_logits_in_a_session(model: BiasCareVL) -> None:
    """Three rounds of the simulated expert, then the same clicks by hand."""
    image = picture()
    session = model.session(image, "liver")
    encoded = session.encoded
    truth = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE)
    truth[:, 10:40, 20:50] = 1

    def decode(prompts: Prompts, previous: torch.Tensor | None) -> Prediction:
        return model.segmenter.decode(encoded, prompts, previous).prediction

    prompts = Prompts(torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.int64))
    prediction = decode(prompts, None)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        prompts, prediction = refine_once(
            decode,
            prompts,
            prediction,
            truth,
            policy="uniform",
            num_clicks=1,
            generator=generator,
            mask_prompt=model.mask_prompt,
        )
        (x, y), label = prompts.point_coords[0, -1].tolist(), int(prompts.point_labels[0, -1])
        session.click(x, y, positive=label == 1)
        assert session.current is not None
        ours = session.current.decoded.prediction
        assert torch.equal(ours.mask_logits, prediction.mask_logits)
        assert torch.equal(ours.low_res_logits, prediction.low_res_logits)


def test_undo_and_redo_of_any_depth_give_the_same_bits(model: BiasCareVL) -> None:
    session = model.session(picture(1, 50, 90), "liver")
    seen = [session.current]
    for n in range(6):
        seen.append(session.click(10 + 9 * n, 40 - 5 * n, positive=n % 3 != 2))
    seen.append(session.box((5, 5, 60, 40)))
    logits = [step.logits.copy() for step in seen if step is not None]
    for n in reversed(range(7)):
        session.undo()
        assert session.current is seen[n] and session.current is not None
        assert np.array_equal(session.current.logits, logits[n])
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    for n in range(1, 8):
        session.redo()
        assert session.current is not None and np.array_equal(session.current.logits, logits[n])
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()
    session.undo()
    session.click(3, 3)
    assert not session.can_redo  # a new prompt drops what was taken back


def test_a_reset_is_a_step_that_undo_takes_back(vision_model: BiasCareVL) -> None:
    session = vision_model.session(picture(2))
    assert session.current is None and not session.can_undo
    clicked = session.click(20, 20)
    session.reset()
    assert session.current is None
    session.undo()
    assert session.current is clicked


def test_a_session_without_words_begins_with_the_first_click_or_box(
    vision_model: BiasCareVL,
) -> None:
    image = picture(3, 40, 70)
    session = vision_model.session(image)
    found = session.click(30, 20, positive=True)
    plain = vision_model.segment(image, points=[(30, 20)])
    assert np.array_equal(found.logits, plain.logits)
    boxed = vision_model.session(image).box((10, 5, 50, 30))
    assert np.array_equal(boxed.logits, vision_model.segment(image, box=(10, 5, 50, 30)).logits)


def test_a_box_replaces_the_box_before_and_keeps_the_clicks(model: BiasCareVL) -> None:
    session = model.session(picture(4, 50, 90), "liver")
    session.click(30, 20)
    session.box((10, 5, 50, 30))
    found = session.box((12, 6, 52, 31))
    assert found.box == (12, 6, 52, 31) and found.clicks == ((30, 20, 1),)
    with pytest.raises(ValueError, match="x0 <= x1"):
        session.box((52, 6, 12, 31))
    assert session.current is found  # a refused prompt changes nothing
    assert 0 <= found.click_disagreement <= 1


def test_a_step_of_a_file_does_what_the_method_does_or_is_refused(vision_model: BiasCareVL) -> None:
    session, by_hand = (vision_model.session(picture(8, 50, 90)) for _ in range(2))
    session.apply({"kind": "click", "x": 30, "y": 20})
    session.apply({"kind": "click", "x": 50, "y": 10.5, "positive": False})
    session.apply({"kind": "box", "box": [10, 5, 60, 30]})
    session.apply({"kind": "undo"})
    by_hand.click(30, 20)
    expected = by_hand.click(50, 10.5, positive=False)
    assert session.current is not None
    assert np.array_equal(session.current.logits, expected.logits)
    wrong = {
        "clik": {"kind": "clik"},
        "postive": {"kind": "click", "x": 3, "y": 3, "postive": False},
        "true or false": {"kind": "click", "x": 3, "y": 3, "positive": "no"},
        "x=None": {"kind": "click", "y": 3},
        "numbers": {"kind": "click", "x": "3", "y": 3},
        "original image": {"kind": "click", "x": float("nan"), "y": 3},
        r"4 number": {"kind": "box", "box": [1, 2, 3]},
    }
    found = session.current
    for message, prompt in wrong.items():
        with pytest.raises(ValueError, match=message):
            session.apply(prompt)
    assert session.current is found and session.can_redo  # a refused step changes nothing


def test_a_decision_is_about_the_mask_on_screen(vision_model: BiasCareVL) -> None:
    session = vision_model.session(picture(5))
    with pytest.raises(ValueError, match="no mask to accept"):
        session.decide("accept")
    session.click(20, 20)
    session.decide("accept")
    assert session.decision == "accept"
    session.click(30, 30)
    assert session.decision is None
    with pytest.raises(ValueError, match="accept"):
        session.decide("acept")


def test_pixels_are_uncertain_where_the_logits_are_near_zero(vision_model: BiasCareVL) -> None:
    found = vision_model.session(picture(6, 50, 90)).click(40, 20)
    bits = found.pixel_uncertainty
    assert bits.shape == (50, 90) and bits.dtype == np.float32
    assert bits.min() >= 0 and bits.max() <= 1
    order = np.argsort(np.abs(found.logits), axis=None)
    assert (np.diff(bits.ravel()[order]) <= 1e-6).all()


def test_an_image_is_encoded_once_and_the_oldest_goes_when_the_bytes_are_used_up(
    model: BiasCareVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str | None] = []
    encode = Segmenter.encode

    def counted(self: Segmenter, image: np.ndarray, instructions: list[str | None]) -> object:
        calls.append(instructions[0])
        return encode(self, image, instructions)

    monkeypatch.setattr(Segmenter, "encode", counted)
    cache = EmbeddingCache(model.segmenter, max_bytes=1 << 30)
    image = random_image(0)
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    first = cache.encode(digest, image, "Outline the liver.")
    assert cache.encode(digest, image, "Outline the liver.") is first and len(calls) == 1
    cache.encode(digest, image, "Outline the spleen.")
    assert len(calls) == 2 and len(cache) == 2
    one = cache.num_bytes // 2
    small = EmbeddingCache(model.segmenter, max_bytes=int(2.5 * one))
    for key in ("a", "b", "a", "c"):
        small.encode(key, image, "Outline the liver.")
    del calls[:]
    small.encode("a", image, "Outline the liver.")  # looked at after b
    assert not calls and small.num_bytes <= small.max_bytes
    small.encode("b", image, "Outline the liver.")
    assert len(calls) == 1
    none = EmbeddingCache(model.segmenter, max_bytes=0)
    assert none.encode("a", image, None if model.chat is None else "Outline it.") is not None
    assert len(none) == 0 and none.num_bytes == 0


def test_a_kept_encoding_gives_the_same_mask(model: BiasCareVL) -> None:
    cache, image = EmbeddingCache(model.segmenter, max_bytes=1 << 30), picture(7, 50, 90)
    sessions = [
        model.session(image, "liver", modality="ct", encode=lambda p, i: cache.encode("x", p, i))
        for _ in range(2)
    ]
    plain = model.session(image, "liver", modality="ct").click(30, 20)
    for session in sessions:
        assert np.array_equal(session.click(30, 20).logits, plain.logits)
