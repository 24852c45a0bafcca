"""The simulated expert clicks where the prediction is wrong, with the right sign."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from biascare.hitl import clicks
from biascare.interfaces import Prediction, Prompts
from biascare.settings.keys import HITLConfig

SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)
PACK = Path(__file__).resolve().parents[3] / "shared" / "data"
seeds = st.integers(0, 2**31 - 1)
policies = st.sampled_from(clicks.CLICK_POLICIES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_masks(num_rows: int, height: int, width: int, share: float, seed: int) -> Tensor:
    return torch.rand(num_rows, height, width, generator=generator(seed)) < share


def disc(height: int, width: int, x: float, y: float, radius: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


class TestErrorRegion:
    def test_is_the_exclusive_or_of_prediction_and_truth(self) -> None:
        logits = torch.tensor([[[2.0, 2.0, -2.0, -2.0, 0.0]]])
        for dtype in (torch.uint8, torch.bool, torch.float32):
            masks = torch.tensor([[[1, 0, 1, 0, 0]]]).to(dtype)
            expected = torch.tensor([[[False, True, True, False, False]]])
            assert torch.equal(clicks.error_region(logits, masks), expected)

    def test_different_sizes_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="resize the prediction"):
            clicks.error_region(torch.zeros(1, 4, 4), torch.zeros(1, 8, 8))


class TestSelectHardest:
    @pytest.mark.parametrize(
        ("num_valid", "ratio", "expected"),
        [(0, 0.3, 1), (1, 0.3, 1), (3, 0.3, 1), (7, 0.3, 2), (10, 0.3, 3), (100, 0.29, 29),
         (4, 1.0, 4)],
    )  # fmt: skip
    def test_keeps_the_share_rounded_down_and_at_least_one(
        self, num_valid: int, ratio: float, expected: int
    ) -> None:
        assert clicks.num_hardest(num_valid, ratio) == expected
        valid = torch.arange(200) < num_valid
        assert len(clicks.select_hardest(torch.rand(200), valid, ratio)) == expected

    def test_ranks_valid_rows_by_uncertainty(self) -> None:
        uncertainty = torch.tensor([0.1, 9.0, 0.8, 0.5, 0.8])
        valid = torch.tensor([True, False, True, True, True])
        index = clicks.select_hardest(uncertainty, valid, 0.75)
        assert index.tolist() == [2, 4, 3]

    @SETTINGS
    @given(
        st.lists(
            st.tuples(st.floats(allow_nan=True, allow_infinity=True, width=32), st.booleans()),
            min_size=1,
            max_size=20,
        ),
        st.floats(0.01, 1),
        st.one_of(st.none(), st.integers(1, 25)),
    )
    def test_never_selects_a_row_without_a_mask(
        self, rows: list[tuple[float, bool]], ratio: float, k: int | None
    ) -> None:
        uncertainty = torch.tensor([row[0] for row in rows])
        valid = torch.tensor([row[1] for row in rows])
        index = clicks.select_hardest(uncertainty, valid, ratio, k=k)
        counted = clicks.selection_valid(valid, len(index))
        num_valid = int(valid.sum())
        assert len(index) == (clicks.num_hardest(num_valid, ratio) if k is None else k)
        assert valid[index].all() or num_valid == 0
        assert int(counted.sum()) == min(num_valid, len(index))
        assert len(set(index[counted].tolist())) == int(counted.sum())

    def test_nan_comes_after_every_finite_value(self) -> None:
        uncertainty = torch.tensor([math.nan, -5.0, math.inf, 3.0, 99.0])
        valid = torch.tensor([True, True, True, True, False])
        assert clicks.select_hardest(uncertainty, valid, 1.0).tolist() == [3, 1, 0, 2]

    def test_a_fixed_k_is_kept_with_fewer_valid_rows_and_repeats_do_not_count(self) -> None:
        valid = torch.tensor([False, True, True])
        index = clicks.select_hardest(torch.tensor([3.0, 1.0, 2.0]), valid, 0.3, k=5)
        assert index.tolist() == [2, 1, 2, 1, 2]
        assert clicks.selection_valid(valid, 5).tolist() == [True, True, False, False, False]

    def test_without_valid_rows_nothing_counts(self) -> None:
        valid = torch.zeros(3, dtype=torch.bool)
        index = clicks.select_hardest(torch.rand(3), valid, 0.3)
        assert len(index) == 1
        assert not valid[index].any() and not clicks.selection_valid(valid, 1).any()

    def test_no_row_and_no_k_are_errors(self) -> None:
        with pytest.raises(ValueError, match="skip the refinement"):
            clicks.select_hardest(torch.zeros(0), torch.zeros(0).bool(), 0.3)
        with pytest.raises(ValueError, match="at least 1"):
            clicks.select_hardest(torch.zeros(2), torch.ones(2).bool(), 0.3, k=0)


class TestSampleClicks:
    @SETTINGS
    @given(seeds, st.floats(0, 0.2), st.floats(0, 0.6), st.integers(1, 5), policies)
    def test_clicks_lie_in_the_error_region_and_carry_the_truth(
        self, seed: int, error_share: float, mask_share: float, num_clicks: int, policy: str
    ) -> None:
        masks = random_masks(4, 9, 13, mask_share, seed)
        error = random_masks(4, 9, 13, error_share, seed + 1)
        coords, labels = clicks.sample_clicks(
            error, masks, num_clicks=num_clicks, policy=policy, generator=generator(seed)
        )
        assert coords.shape == (4, num_clicks, 2) and coords.dtype == torch.float32
        assert labels.shape == (4, num_clicks) and labels.dtype == torch.int64
        for row in range(4):
            seen = set()
            for (x, y), label in zip(
                coords[row].long().tolist(), labels[row].tolist(), strict=True
            ):
                if label == -1:
                    assert (x, y) == (0, 0)
                    continue
                assert label == int(masks[row, y, x])
                assert error[row, y, x] or (not error[row].any() and masks[row, y, x])
                seen.add((x, y))
            real = int((labels[row] >= 0).sum())
            assert len(seen) == real
            if not error[row].any():
                assert real == int(masks[row].any())
            elif policy == "uniform":
                assert real == min(num_clicks, int(error[row].sum()))
            else:
                assert real >= 1

    def test_coordinates_are_x_then_y(self) -> None:
        error = torch.zeros(1, 4, 6, dtype=torch.bool)
        error[0, 1, 5] = True
        for policy in clicks.CLICK_POLICIES:
            coords, labels = clicks.sample_clicks(error, error.to(torch.uint8), policy=policy)
            assert coords.tolist() == [[[5.0, 1.0]]] and labels.tolist() == [[1]]

    @pytest.mark.parametrize("policy", clicks.CLICK_POLICIES)
    def test_without_errors_one_click_falls_inside_the_mask_or_none_at_all(
        self, policy: str
    ) -> None:
        masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
        masks[0, 2:5, 3:6] = 1
        error = torch.zeros(2, 8, 8, dtype=torch.bool)
        coords, labels = clicks.sample_clicks(error, masks, num_clicks=3, policy=policy)
        x, y = coords[0, 0].long().tolist()
        assert masks[0, y, x] == 1
        assert labels.tolist() == [[1, -1, -1], [-1, -1, -1]]
        assert coords[0, 1:].abs().max() == 0 and coords[1].abs().max() == 0

    def test_uniform_reaches_every_error_pixel_equally_often(self) -> None:
        error = random_masks(1, 6, 7, 0.4, seed=3)
        num_pixels, draws = int(error.sum()), 4000
        coords, _ = clicks.sample_clicks(
            error.expand(draws, 6, 7), error.expand(draws, 6, 7), generator=generator()
        )
        flat = (coords[:, 0, 1] * 7 + coords[:, 0, 0]).long()
        counts = torch.bincount(flat, minlength=42)[error.flatten()].double()
        expected = draws / num_pixels
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        degrees = num_pixels - 1
        print(f"chi-square {chi_square:.1f} with {degrees} degrees of freedom")
        assert counts.min() > 0
        assert chi_square < degrees + 4 * math.sqrt(2 * degrees)

    def test_a_generator_decides_the_uniform_clicks(self) -> None:
        error = random_masks(3, 16, 16, 0.5, seed=1)
        first, again, other = (
            clicks.sample_clicks(error, error, num_clicks=2, generator=generator(seed))[0]
            for seed in (7, 7, 8)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_center_takes_the_middle_of_the_largest_component_then_of_the_next(self) -> None:
        small, large = disc(40, 50, 8, 9, 4), disc(40, 50, 33, 20, 9)
        error = (small | large)[None]
        coords, labels = clicks.sample_clicks(error, large[None], num_clicks=3, policy="center")
        assert coords[0].tolist() == [[33, 20], [8, 9], [0, 0]]
        assert labels[0].tolist() == [1, 0, -1]

    def test_center_treats_the_image_edge_as_a_border(self) -> None:
        error = torch.zeros(1, 9, 9, dtype=torch.bool)
        error[0, :, :5] = True
        coords, _ = clicks.sample_clicks(error, error, policy="center")
        # Three pixels from the left edge and from the inner border; the first of several such rows.
        assert coords[0, 0].tolist() == [2, 2]

    def test_center_does_not_click_on_the_outline_between_missed_and_spilled(self) -> None:
        masks = torch.zeros(1, 9, 18, dtype=torch.bool)
        masks[0, :, :9] = True
        error = torch.ones(1, 9, 18, dtype=torch.bool)  # one region, half missed, half spilled
        coords, labels = clicks.sample_clicks(error, masks, num_clicks=2, policy="center")
        assert coords[0].tolist() == [[4, 4], [13, 4]]
        assert labels[0].tolist() == [1, 0]

    def test_center_agrees_with_a_brute_force_search(self) -> None:
        error = torch.from_numpy(
            ndimage.binary_opening(random_masks(1, 30, 30, 0.75, seed=5)[0].numpy())
        )
        coords, _ = clicks.sample_clicks(error[None], error[None], policy="center")
        x, y = coords[0, 0].long().tolist()
        labelled, _ = ndimage.label(error.numpy())
        largest = labelled == np.bincount(labelled.ravel())[1:].argmax() + 1
        outside = np.argwhere(~np.pad(largest, 1)) - 1
        depth = {
            (column, row): ((outside - (row, column)) ** 2).sum(axis=1).min()
            for row, column in np.argwhere(largest)
        }
        assert depth[(x, y)] == max(depth.values())

    def test_wrong_arguments_are_errors(self) -> None:
        error = torch.zeros(1, 4, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match="did you mean 'uniform'"):
            clicks.sample_clicks(error, error, policy="uniforme")
        with pytest.raises(ValueError, match="expected 1 to 16"):
            clicks.sample_clicks(error, error, num_clicks=0)
        with pytest.raises(ValueError, match="same"):
            clicks.sample_clicks(error, torch.zeros(1, 8, 8))


class TestRefine:
    def test_clicks_are_appended_to_the_prompts_of_the_same_row(self) -> None:
        prompts = Prompts(point_coords=torch.zeros(2, 3, 2), point_labels=torch.ones(2, 3).long())
        longer = clicks.append_prompts(
            prompts, torch.full((2, 1, 2), 5.0), torch.tensor([[0], [-1]])
        )
        assert longer.point_labels.tolist() == [[1, 1, 1, 0], [1, 1, 1, -1]]
        assert torch.equal(longer.point_coords[:, :3], prompts.point_coords)
        assert (longer.point_coords[:, 3] == 5).all()
        with pytest.raises(ValueError, match="rows"):
            clicks.append_prompts(prompts, torch.zeros(1, 1, 2), torch.zeros(1, 1))

    @pytest.mark.parametrize("mask_prompt", [True, False])
    def test_a_round_decodes_all_prompts_with_detached_previous_logits(
        self, mask_prompt: bool
    ) -> None:
        masks = torch.stack([disc(16, 16, 8, 8, 5), disc(16, 16, 4, 4, 2)])
        low_res = torch.randn(2, 4, 4, generator=generator(), requires_grad=True)
        prediction = Prediction(
            mask_logits=torch.full((2, 16, 16), -1.0),
            low_res_logits=low_res,
            predicted_dice=torch.zeros(2),
        )
        before = Prompts(point_coords=torch.zeros(2, 1, 2), point_labels=torch.full((2, 1), -1))
        calls = []

        def decode(prompts: Prompts, previous_logits: Tensor | None) -> Prediction:
            calls.append((prompts, previous_logits))
            return prediction

        after, result = clicks.refine_once(
            decode, before, prediction, masks, policy="uniform", num_clicks=2,
            generator=generator(), mask_prompt=mask_prompt,
        )  # fmt: skip
        [(decoded, previous)] = calls
        assert result is prediction and decoded is after
        assert after.point_labels.tolist() == [[-1, 1, 1], [-1, 1, 1]]
        if mask_prompt:
            assert previous is not None and not previous.requires_grad
            assert torch.equal(previous, low_res)
        else:
            assert previous is None

    @pytest.mark.parametrize("policy", clicks.CLICK_POLICIES)
    def test_rounds_of_an_obedient_model_end_without_errors(self, policy: str) -> None:
        """A decoder that repairs a square around every click reaches the truth."""
        masks = torch.stack([disc(12, 12, 6, 6, 4), disc(12, 12, 2, 9, 2)])

        def decode(prompts: Prompts, previous_logits: Tensor | None) -> Prediction:
            logits = torch.full((2, 12, 12), -1.0)
            for row in range(2):
                for (x, y), label in zip(
                    prompts.point_coords[row].long().tolist(),
                    prompts.point_labels[row].tolist(),
                    strict=True,
                ):
                    if label >= 0:
                        window = (row, slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
                        logits[window] = masks[window].float() - 0.5
            return Prediction(
                mask_logits=logits, low_res_logits=logits, predicted_dice=torch.zeros(2)
            )

        prompts = Prompts(
            point_coords=torch.zeros(2, 0, 2), point_labels=torch.zeros(2, 0, dtype=torch.int64)
        )
        prediction = decode(prompts, None)
        errors = [clicks.error_region(prediction.mask_logits, masks).sum().item()]
        for _ in range(60):
            prompts, prediction = clicks.refine_once(
                decode, prompts, prediction, masks, policy=policy, num_clicks=1,
                generator=generator(len(errors)), mask_prompt=True,
            )  # fmt: skip
            errors.append(clicks.error_region(prediction.mask_logits, masks).sum().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 0 and errors[-1] == 0

    def test_uniform_rounds_never_wait_for_the_device(self) -> None:
        """Fake tensors have no values: anything that reads one on the host raises."""
        with FakeTensorMode():
            masks = torch.ones(4, 16, 16, dtype=torch.uint8)
            valid = torch.ones(4, dtype=torch.bool)
            index = clicks.select_hardest(torch.rand(4), valid, 0.3, k=2)
            logits = torch.randn(4, 16, 16)[index]
            prediction = Prediction(
                mask_logits=logits, low_res_logits=logits, predicted_dice=torch.zeros(2)
            )
            prompts = Prompts(
                point_coords=torch.zeros(2, 1, 2), point_labels=torch.zeros(2, 1).long()
            )
            prompts, _ = clicks.refine_once(
                lambda prompts, previous_logits: prediction, prompts, prediction, masks[index],
                policy="uniform", num_clicks=2, generator=None, mask_prompt=True,
            )  # fmt: skip
            assert prompts.point_coords.shape == (2, 3, 2)
            assert clicks.selection_valid(valid, 2).shape == (2,)


def test_every_policy_of_the_configuration_is_known() -> None:
    assert get_args(get_type_hints(HITLConfig)["policy"]) == clicks.CLICK_POLICIES


@pytest.mark.skipif(not (PACK / "manifest.jsonl").exists(), reason="the sample pack is not here")
def test_a_center_click_on_a_missed_real_target_lies_deep_inside_it() -> None:
    lines = (PACK / "manifest.jsonl").read_text().splitlines()
    entries = [entry for line in lines for entry in json.loads(line)["masks"].values()]
    for entry in entries[:: max(1, len(entries) // 30)]:
        mask = torch.from_numpy(np.array(Image.open(PACK / entry["file"]))) == entry["value"]
        missed = torch.full((1, *mask.shape), -9.0)
        error = clicks.error_region(missed, mask[None])
        coords, labels = clicks.sample_clicks(error, mask[None], policy="center")
        x, y = coords[0, 0].long().tolist()
        depth = ndimage.distance_transform_edt(np.pad(mask.numpy(), 1))[1:-1, 1:-1]
        assert labels.tolist() == [[1]] and bool(mask[y, x])
        # Deepest in the largest component: at least as deep as anywhere in that component.
        component, _ = ndimage.label(mask.numpy())
        assert depth[y, x] == depth[component == component[y, x]].max()
        assert (component == component[y, x]).sum() == np.bincount(component.ravel())[1:].max()
