"""What a mask says about itself: entropy, expected Dice, moved clicks, unusual size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biascare.interfaces import Features, Prediction, Prompts
from biascare.uncertainty import (
    JITTER,
    JITTER_SHARE,
    disagreement,
    expected_dice_loss,
    jittered,
    label_free,
    mask_entropy,
    size_surprise,
)


def logit(*probabilities: float) -> torch.Tensor:
    """[1, 1, n] logits of these probabilities."""
    return torch.logit(torch.tensor([[probabilities]], dtype=torch.float64)).float()


def bits(p: float) -> float:
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


def test_the_entropy_is_that_of_the_pixels_inside_by_hand() -> None:
    found = mask_entropy(logit(0.75, 0.9, 0.4, 0.01))
    assert found.item() == pytest.approx((bits(0.75) + bits(0.9)) / 2, abs=1e-6)
    # One pixel is enough for a mask, and none says nothing for itself.
    assert mask_entropy(logit(0.6, 0.1)).item() == pytest.approx(bits(0.6), abs=1e-6)
    assert mask_entropy(logit(0.4, 0.1)).item() == 1
    # Rows stay apart, the empty one too.
    rows = torch.cat([logit(0.75, 0.9), logit(0.1, 0.1), logit(0.99, 0.2)])
    expected = [(bits(0.75) + bits(0.9)) / 2, 1, bits(0.99)]
    assert mask_entropy(rows).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_expected_dice_is_computed_by_hand() -> None:
    found = expected_dice_loss(logit(0.8, 0.6, 0.3))
    assert found.item() == pytest.approx(1 - 2 * 1.4 / (1.7 + 2), abs=1e-6)
    assert expected_dice_loss(logit(0.4, 0.1)).item() == 1
    # Sure pixels: certain, and huge logits are no trouble.
    sure = torch.tensor([[[200.0, -200.0]]])
    assert expected_dice_loss(sure).item() == mask_entropy(sure).item() == 0


def test_disagreement_is_soft_dice_by_hand_and_zero_for_equal_masks() -> None:
    one, other = logit(0.9, 0.2), logit(0.6, 0.5)
    dice = 2 * (0.9 * 0.6 + 0.2 * 0.5) / (0.81 + 0.04 + 0.36 + 0.25)
    assert disagreement(one, other).item() == pytest.approx(1 - dice, abs=1e-6)
    # The mean over others; rows of one direction stand together.
    both = torch.cat([other, one])
    assert disagreement(one, both).item() == pytest.approx((1 - dice) / 2, abs=1e-6)
    rows = disagreement(torch.cat([one, other]), torch.cat([one, one, other, other]))
    assert rows.tolist() == pytest.approx([(1 - dice) / 2] * 2, abs=1e-6)
    assert disagreement(logit(0.1, 0.2), one).item() == 1  # an empty mask answers no click
    assert disagreement(one, logit(1e-9, 1e-9)).item() == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_every_doubt_lies_between_0_and_1(seed: int, num: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    mask, others = (
        torch.randn(rows, 4, 4, generator=drawn) * 20 - 10 for rows in (num, len(JITTER) * num)
    )
    for found in (mask_entropy(mask), expected_dice_loss(mask), disagreement(mask, others)):
        assert found.shape == (num,) and (found >= 0).all() and (found <= 1).all()
    # A row is the same alone.
    for of in (mask_entropy, expected_dice_loss):
        assert torch.equal(of(mask)[:1], of(mask[:1]))


def test_clicks_are_moved_together_and_stay_in_the_image() -> None:
    coords = torch.tensor([[[100.0, 50.0], [0.0, 255.0]]])
    moved = jittered(Prompts(coords, torch.tensor([[1, 0]])), 256)
    step = 256 * JITTER_SHARE
    assert moved.point_labels.tolist() == [[1, 0]] * len(JITTER)
    assert moved.point_coords[0].tolist() == [[100 + step, 50 + step], [step, 255]]
    assert moved.point_coords[1].tolist() == [[100 - step, 50 - step], [0, 255 - step]]
    again = jittered(Prompts(coords, torch.tensor([[1, 0]])), 256)
    assert torch.equal(moved.point_coords, again.point_coords)


def test_a_box_shrinks_and_grows_and_is_never_turned_inside_out() -> None:
    coords = torch.tensor([[[10.0, 20.0], [90.0, 60.0]], [[30.0, 30.0], [32.0, 31.0]]])
    moved = jittered(Prompts(coords, torch.tensor([[2, 3], [2, 3]])), 256).point_coords
    assert moved[0].tolist() == [[14, 24], [86, 56]]
    assert moved[2].tolist() == [[6, 16], [94, 64]]
    assert moved[1].tolist() == [[31, 30.5], [31, 30.5]]
    assert moved[3].tolist() == [[26, 26], [36, 35]]


def test_the_size_is_as_surprising_twice_too_large_as_half_too_small() -> None:
    assert size_surprise(0.1, 0.1) == 0
    assert size_surprise(0.2, 0.1) == pytest.approx(math.log(2)) == size_surprise(0.05, 0.1)
    assert np.isfinite(size_surprise(0.0, 0.1)) and size_surprise(0.0, 0.1) > 10


def test_without_a_text_there_is_nothing_to_compare_with() -> None:
    prediction = Prediction(logit(0.9, 0.2), logit(0.9, 0.2), torch.tensor([0.7]))
    features = Features(image_embedding=None, text_embedding=None, hidden_states=None)
    found = label_free(features, prediction, torch.tensor([0]), 0.5)
    names = {"joint_label_free", "predicted_dice_loss", "mask_entropy", "expected_dice_loss"}
    assert set(found) == names
    assert found["joint_label_free"].item() == pytest.approx(0.3)
