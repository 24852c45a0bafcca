"""The training step on batches made by hand, against a literal recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from biascare.data.loader import collate
from biascare.hitl.clicks import num_hardest
from biascare.interfaces import Batch, Features, Prediction, Prompts
from biascare.models.network import DualPathNetwork
from biascare.training.step import TrainStep
from biascare.training.terms import (
    TERMS,
    HITLSettings,
    ObjectiveSettings,
    Passes,
    alignment_term,
)
from biascare.uncertainty import mask_weighted_embedding
from tests.tiny import (
    HITL,
    OBJECTIVE,
    PAPER_OBJECTIVE,
    language_sample,
    pad_token_id,
    segmentation_sample,
    tiny_chat,
    tiny_model,
)

TARGETS = ("liver", "spleen", "left kidney", "lesion")
PLAIN = PAPER_OBJECTIVE
NO_HITL = HITL._replace(enabled=False)


@pytest.fixture(scope="module")
def model(tiny_mllm: Path) -> DualPathNetwork:
    return tiny_model(tiny_mllm)


@pytest.fixture(scope="module")
def batch(tiny_mllm: Path) -> Batch:
    """Four rows on two images, one of them without any pixel, and a question."""
    chat = tiny_chat(tiny_mllm)
    samples = [
        segmentation_sample(chat, 1, TARGETS[:2]),
        segmentation_sample(chat, 2, TARGETS[2:]),
        language_sample(chat, 3, answer="the liver"),
    ]
    made: Batch = collate(samples, 7, pad_token_id(chat))
    assert made.masks is not None
    made.masks[3] = 0
    return made


class Spy:
    """The model with its calls counted and its outputs kept."""

    def __init__(self, model: DualPathNetwork):
        self.model = model
        self.features: list[Features] = []
        self.predictions: list[Prediction] = []
        self.rows: list[Tensor | None] = []
        self.prompts: list[Prompts] = []
        self.num_image_encodings = 0

    def run(
        self, batch: Batch, objective: ObjectiveSettings = PLAIN, hitl: HITLSettings = NO_HITL
    ) -> dict[str, Any]:
        encode, decode = self.model.encode, self.model.decode_masks
        encode_images = self.model.vision.encode_images

        def spied_encode(given: Batch) -> Features:
            self.features.append(encode(given))
            return self.features[-1]

        def spied_decode(
            features: Features, prompts: Prompts, row_image: Tensor, **keywords: Any
        ) -> Prediction:
            self.predictions.append(decode(features, prompts, row_image, **keywords))
            self.prompts.append(prompts)
            self.rows.append(keywords.get("rows"))
            return self.predictions[-1]

        def spied_images(images: Tensor) -> Tensor:
            self.num_image_encodings += 1
            return encode_images(images)

        with (
            mock.patch.object(self.model, "encode", spied_encode),
            mock.patch.object(self.model, "decode_masks", spied_decode),
            mock.patch.object(self.model.vision, "encode_images", spied_images),
        ):
            outcome: dict[str, Any] = TrainStep(self.model, objective, hitl)(
                batch, num_tokens(batch), 1
            )
        return outcome


def num_tokens(batch: Batch) -> int:
    return 0 if batch.answer_tokens is None else len(batch.answer_tokens)


def literal_dice(logits: Tensor, mask: Tensor) -> float:
    """1 - Dice of one row, in float64."""
    p, y = logits.detach().double().sigmoid(), mask.double()
    return float(1 - (2 * (p * y).sum() + 1e-3) / (p.sum() + y.sum() + 1e-3))


def literal_semantic(features: Features, prediction: Prediction, batch: Batch) -> Tensor:
    """u_vl of every row by Eqs. 3-5, upsampling the embedding as the paper writes it."""
    assert features.image_embedding is not None and features.text_embedding is not None
    assert batch.row_image is not None
    up = torch.nn.functional.interpolate(
        features.image_embedding.double(), size=(64, 64), mode="bilinear"
    )[batch.row_image]
    probs = prediction.mask_logits.double().sigmoid()[:, None]
    pooled = (up * probs).sum((2, 3)) / (probs.sum((2, 3)) + 1e-6)
    text = features.text_embedding.double().mean(1)
    return 1 - torch.nn.functional.cosine_similarity(pooled, text)


def test_every_term_equals_a_literal_recomputation(model: DualPathNetwork, batch: Batch) -> None:
    spy = Spy(model)
    outcome = spy.run(batch, PLAIN, HITL._replace(ratio=0.5))
    first, second = spy.predictions
    assert batch.masks is not None and batch.answer_positions is not None
    assert batch.answer_tokens is not None and spy.features[0].hidden_states is not None
    dice = [literal_dice(first.mask_logits[r], batch.masks[r]) for r in range(4)]
    uncertainty = [
        0.5 * float(u) + d
        for u, d in zip(literal_semantic(spy.features[0], first, batch).detach(), dice, strict=True)
    ]
    weights = [torch.tensor(u, dtype=torch.float64).exp().item() for u in uncertainty]
    dur = sum(w * d for w, d in zip(weights[:3], dice[:3], strict=True))  # row 3 has no mask
    hardest = sorted(range(3), key=lambda r: -uncertainty[r])[:2]
    hitl = sum(literal_dice(second.mask_logits[i], batch.masks[r]) for i, r in enumerate(hardest))
    flat = spy.features[0].hidden_states.flatten(0, 1)
    logits = model.mllm.base.lm_head(flat[batch.answer_positions]).detach()  # type: ignore[union-attr]
    vlm = torch.nn.functional.cross_entropy(logits.double(), batch.answer_tokens)
    assert spy.rows[1] is not None and spy.rows[1].tolist() == hardest
    terms = {name: float(value) for name, value in outcome["terms"].items()}
    expected = {"dur": dur, "hitl": hitl, "vlm": float(vlm)}
    assert terms == pytest.approx(expected, abs=2e-5), (terms, expected)
    assert outcome["loss"].item() == pytest.approx(sum(expected.values()), abs=5e-5)
    assert outcome["rows"].valid.tolist() == [True, True, True, False]
    assert outcome["rows"].weight[:3].tolist() == pytest.approx(weights[:3], rel=1e-4)
    assert outcome["rows"].uncertainty.tolist() == pytest.approx(uncertainty, abs=1e-5)


def test_a_row_without_a_mask_moves_no_weight(model: DualPathNetwork, batch: Batch) -> None:
    """Whatever the empty row shows, gradients stay the same."""
    assert batch.masks is not None and batch.prompts is not None
    moved = batch.prompts.point_coords.clone()
    moved[3] = 5.0
    other = batch._replace(prompts=batch.prompts._replace(point_coords=moved))
    grads = []
    for given in (batch, other):
        outcome = Spy(model).run(
            given, PLAIN._replace(quality_weight=0.5), HITL._replace(ratio=1.0)
        )
        model.zero_grad()
        outcome["loss"].backward()
        named = model.vision.mask_decoder.named_parameters()
        grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    difference = max(float((grads[0][n] - grads[1][n]).abs().max()) for n in grads[0])
    assert difference < 1e-6, difference


def test_a_batch_of_empty_masks_gives_a_zero_that_can_be_back_propagated(
    model: DualPathNetwork, batch: Batch
) -> None:
    assert batch.masks is not None
    empty = batch._replace(masks=torch.zeros_like(batch.masks), answer_tokens=None)
    objective = OBJECTIVE
    outcome = Spy(model).run(empty, objective, HITL._replace(ratio=0.5))
    assert outcome["loss"].item() == 0
    model.zero_grad()
    outcome["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(not g.any() for g in grads)


def test_the_number_of_refined_rows_depends_on_the_number_of_rows_alone(
    model: DualPathNetwork, batch: Batch
) -> None:
    assert batch.masks is not None
    for num_empty in range(5):
        masks = batch.masks.clone()
        masks[:num_empty] = 0
        spy = Spy(model)
        spy.run(batch._replace(masks=masks), PLAIN, HITL._replace(ratio=0.5))
        assert [len(rows) for rows in spy.rows[1:] if rows is not None] == [num_hardest(4, 0.5)]


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_images_are_encoded_once_and_masks_decoded_once_per_round(
    model: DualPathNetwork, batch: Batch, num_rounds: int
) -> None:
    spy = Spy(model)
    spy.run(batch, PLAIN, HITL._replace(num_rounds=num_rounds))
    assert spy.num_image_encodings == 1 and len(spy.features) == 1
    assert len(spy.predictions) == 1 + num_rounds
    assert batch.prompts is not None
    num_points = batch.prompts.point_labels.shape[1]
    assert [p.point_labels.shape[1] - num_points for p in spy.prompts] == [*range(num_rounds + 1)]


def test_without_an_expert_only_the_refinement_term_goes(
    model: DualPathNetwork, batch: Batch
) -> None:
    on = Spy(model).run(batch, PLAIN, HITL)
    off = Spy(model).run(batch, PLAIN, NO_HITL)
    assert on["terms"].keys() - off["terms"].keys() == {"hitl"}
    for name in off["terms"]:
        assert torch.equal(on["terms"][name], off["terms"][name]), name
    assert (on["loss"] - off["loss"]).item() == pytest.approx(float(on["terms"]["hitl"]), abs=1e-5)


def test_without_weighting_dice_is_plain_and_the_same_rows_are_refined(
    model: DualPathNetwork, batch: Batch
) -> None:
    weighted, plain = Spy(model), Spy(model)
    on = weighted.run(batch, PLAIN, HITL)
    off = plain.run(batch, PLAIN._replace(uncertainty_weighting=False), HITL)
    assert torch.equal(off["rows"].weight, torch.ones(4))
    assert float(off["terms"]["dur"]) == pytest.approx(float(off["rows"].dice_loss[:3].sum()))
    assert torch.equal(on["rows"].uncertainty, off["rows"].uncertainty)
    assert weighted.rows[1] is not None and plain.rows[1] is not None
    assert torch.equal(weighted.rows[1], plain.rows[1])
    assert torch.equal(on["terms"]["hitl"], off["terms"]["hitl"])
    assert torch.equal(on["terms"]["vlm"], off["terms"]["vlm"])


def test_alignment_moves_the_embedding_and_never_the_mask(
    model: DualPathNetwork, batch: Batch
) -> None:
    objective = PLAIN._replace(alignment="contrastive", alignment_weight=1.0)
    loss = alignment_term(_passes(model, batch, objective))
    assert loss is not None
    model.zero_grad()
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.vision.mask_decoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.vision.image_encoder.parameters())


def _passes(model: DualPathNetwork, batch: Batch, objective: ObjectiveSettings) -> Passes:
    features = model.encode(batch)
    assert batch.prompts is not None and batch.row_image is not None
    prediction = model.decode_masks(features, batch.prompts, batch.row_image)
    return Passes(
        model=model,
        batch=batch,
        features=features,
        prediction=prediction,
        rows=TrainStep(model, objective, NO_HITL).judge(features, prediction, batch),
        refinement=None,
        num_answer_tokens=1,
        num_micro_batches=1,
        objective=objective,
    )


def test_every_term_of_the_table_is_logged_and_a_weight_of_0_switches_it_off(
    model: DualPathNetwork, batch: Batch
) -> None:
    objective = OBJECTIVE._replace(click_weight=0.3, pixel_weight=0.2)
    outcome = Spy(model).run(batch, objective, HITL)
    # That of the labels needs a head and labels, which only its own stage has.
    assert [*outcome["terms"], "labels"] == [term.name for term in TERMS]
    weights = {term.name: term.weight(objective) for term in TERMS}
    total = sum(weights[name] * float(loss) for name, loss in outcome["terms"].items())
    assert float(outcome["loss"].detach()) == pytest.approx(total, rel=1e-6)
    off = OBJECTIVE._replace(alignment_weight=0.0, quality_weight=0.0)
    assert list(Spy(model).run(batch, off, HITL)["terms"]) == ["dur", "hitl", "vlm"]


def test_clicks_and_pixels_of_corrected_masks_equal_a_literal_recomputation(
    model: DualPathNetwork, batch: Batch
) -> None:
    spy = Spy(model)
    objective = PLAIN._replace(click_weight=0.5, pixel_weight=2.0, pixel_focus=0.0)
    outcome = spy.run(batch, objective, HITL._replace(ratio=0.5, num_rounds=2))
    first, *corrected = spy.predictions
    index = spy.rows[1]
    assert batch.masks is not None and index is not None and len(index) == 2
    clicks = 0.0
    for prompts, prediction in zip(spy.prompts[1:], corrected, strict=True):
        for row in range(2):
            each = []
            for (x, y), label in zip(
                prompts.point_coords[row].tolist(), prompts.point_labels[row].tolist(), strict=True
            ):
                if label in (0, 1):
                    p = prediction.mask_logits[row, round(y), round(x)].detach().double().sigmoid()
                    each.append(-float((p if label else 1 - p).log()))
            clicks += sum(each) / len(each) / 2
    assert float(outcome["terms"]["clicks"]) == pytest.approx(clicks, rel=1e-5)

    def entropy(logits: Tensor, mask: Tensor) -> float:
        p = logits.detach().double().sigmoid()
        return -float(torch.where(mask.bool(), p, 1 - p).log().mean())

    pixels = sum(entropy(first.mask_logits[r], batch.masks[r]) for r in range(3))
    for prediction in corrected:
        pixels += sum(entropy(prediction.mask_logits[k], batch.masks[index[k]]) for k in (0, 1)) / 2
    assert float(outcome["terms"]["pixels"]) == pytest.approx(pixels, rel=1e-5)


def test_without_weight_the_terms_of_clicks_and_pixels_leave_loss_and_gradients_as_they_were(
    model: DualPathNetwork, batch: Batch
) -> None:
    def loss_and_gradients() -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        loss = Spy(model).run(batch, OBJECTIVE, HITL._replace(num_rounds=2))["loss"]
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    loss, gradients = loss_and_gradients()
    before = tuple(term for term in TERMS if term.name not in ("clicks", "pixels"))
    with mock.patch("biascare.training.step.TERMS", before):
        same, as_before = loss_and_gradients()
    assert torch.equal(loss, same)
    for one, other in zip(gradients, as_before, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_semantic_uncertainty_is_that_of_the_first_mask(
    model: DualPathNetwork, batch: Batch
) -> None:
    spy = Spy(model)
    outcome = spy.run(batch)
    assert spy.features[0].image_embedding is not None and batch.row_image is not None
    vector = mask_weighted_embedding(
        spy.features[0].image_embedding,
        spy.predictions[0].mask_logits.sigmoid(),
        row_image=batch.row_image,
    )
    assert vector.shape == (4, 96)
    literal = literal_semantic(spy.features[0], spy.predictions[0], batch)
    assert outcome["rows"].semantic.tolist() == pytest.approx(literal.tolist(), abs=1e-5)


def test_the_vision_stage_has_dice_and_refinement_alone() -> None:
    model = tiny_model(None)
    made: Batch = collate([segmentation_sample(None, 1, TARGETS)], 3, 0)
    outcome = Spy(model).run(made, PLAIN._replace(quality_weight=0.1), HITL)
    assert outcome["terms"].keys() == {"dur", "hitl", "quality"}
    rows = outcome["rows"]
    assert not rows.semantic.any()
    assert torch.allclose(rows.weight, rows.dice_loss.exp())
    outcome["loss"].backward()


def test_a_language_batch_never_touches_the_vision_pathway(
    model: DualPathNetwork, tiny_mllm: Path
) -> None:
    chat = tiny_chat(tiny_mllm)
    made: Batch = collate([language_sample(chat, 3)], 0, pad_token_id(chat))
    spy = Spy(model)
    outcome = spy.run(made, PLAIN, HITL)
    assert outcome["terms"].keys() == {"vlm"} and outcome["rows"] is None
    assert not spy.predictions and spy.num_image_encodings == 0
    model.zero_grad()
    outcome["loss"].backward()
    assert all(p.grad is None for p in model.vision.parameters())


def test_a_batch_without_answers_still_calls_the_language_head(
    model: DualPathNetwork, tiny_mllm: Path
) -> None:
    """Under ZeRO-3 a rank that left the call out would leave the others waiting."""
    chat = tiny_chat(tiny_mllm)
    made: Batch = collate([segmentation_sample(chat, 1)], 0, pad_token_id(chat))
    assert num_tokens(made) == 0 and model.mllm is not None
    with mock.patch.object(
        model.mllm, "answer_logits", wraps=model.mllm.answer_logits
    ) as answer_logits:
        outcome = Spy(model).run(made)
    assert answer_logits.call_count == 1 and float(outcome["terms"]["vlm"]) == 0
    outcome["loss"].backward()


def test_two_micro_batches_of_unequal_answers_equal_one_big_batch(
    model: DualPathNetwork, tiny_mllm: Path
) -> None:
    """Every token counts the same, wherever it lands; the engine averages the gradients."""
    chat = tiny_chat(tiny_mllm)
    short = language_sample(chat, 3, answer="yes")
    long = language_sample(chat, 4, answer="the liver is bright and the spleen is not")
    pad = pad_token_id(chat)
    whole: Batch = collate([short, long], 0, pad)
    parts: list[Batch] = [collate([short], 0, pad), collate([long], 0, pad)]
    assert num_tokens(parts[1]) > 2 * num_tokens(parts[0])
    step = TrainStep(model, PLAIN, NO_HITL)
    total = num_tokens(whole)
    losses = [step(part, total, 2)["loss"] for part in parts]
    assert torch.stack(losses).mean().item() == pytest.approx(
        step(whole, total, 1)["loss"].item(), abs=1e-5
    )
    weights = [p for n, p in model.named_parameters() if "lora_" in n]
    apart = torch.autograd.grad(torch.stack(losses).mean(), weights)
    together = torch.autograd.grad(step(whole, total, 1)["loss"], weights)
    difference = max(float((a - b).abs().max()) for a, b in zip(apart, together, strict=True))
    assert difference < 1e-6, difference


def test_dropout_and_clicks_follow_the_micro_batch_and_not_who_runs_it(
    model: DualPathNetwork, batch: Batch
) -> None:
    model.train()
    try:
        runs = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            runs.append(Spy(model).run(batch, PLAIN, HITL)["loss"].detach())
        other = Spy(model).run(batch._replace(seed=8), PLAIN, HITL)["loss"]
    finally:
        model.eval()
    assert torch.equal(runs[0], runs[1])
    assert other.item() != runs[0].item()


def test_what_is_logged_holds_no_graph(model: DualPathNetwork, batch: Batch) -> None:
    outcome = Spy(model).run(batch, PLAIN, HITL)
    logged = [*outcome["terms"].values(), *outcome["rows"]]
    assert not any(value.requires_grad for value in logged)
