"""The equations: hand-computed numbers, second implementations, and properties over all inputs."""

from __future__ import annotations

import math
import warnings
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from biascare import losses
from biascare.interfaces import IGNORE_INDEX
from biascare.settings.keys import ObjectiveConfig
from biascare.uncertainty import joint_uncertainty, mask_weighted_embedding, semantic_uncertainty

SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)
unit_floats = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**31 - 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def literal_embedding(image_embedding: Tensor, mask_probs: Tensor) -> Tensor:
    """Eq. 3 word for word: upsample the embedding, weight, sum, divide."""
    size = mask_probs.shape[-2:]
    upsampled = nn.functional.interpolate(
        image_embedding, size=size, mode="bilinear", align_corners=False
    )
    weighted = (upsampled * mask_probs[:, None]).sum(dim=(2, 3))
    return weighted / (mask_probs.sum(dim=(1, 2)) + 1e-6)[:, None]


def row_weight(semantic: Tensor, dice: Tensor, weight_gradient: str) -> Tensor:
    return losses.row_weight(
        semantic, dice, beta_vl=0.5, lambda_u=1.0, weight_gradient=weight_gradient, enabled=True
    )


class TestClicks:
    def test_is_the_cross_entropy_at_the_clicked_pixels_by_hand(self) -> None:
        logits = torch.zeros(2, 2, 3)
        logits[0, 1, 2], logits[0, 0, 1] = math.log(3), math.log(3)  # p 3/4
        # x then y; a box corner and padding are no clicks, and lie on pixels of chance.
        coords = torch.tensor([[2.0, 1], [1, 0], [0, 0], [0, 0]]).expand(2, 4, 2)
        labels = torch.tensor([[1, 0, 2, -1], [-1, 2, 3, -1]])
        loss = losses.click_loss_per_row(logits, coords, labels)
        assert loss[0].item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 4)) / 2)
        assert loss[1].item() == 0

    def test_a_click_belongs_to_the_nearest_pixel_and_on_the_border_to_the_last(self) -> None:
        logits = torch.tensor([[[-20.0, 20.0]]])
        labels = torch.ones(1, 1, dtype=torch.int64)
        for x, inside in ((0.4, False), (0.6, True), (1.5, True), (-0.5, False)):
            loss = losses.click_loss_per_row(logits, torch.tensor([[[x, -0.4]]]), labels)
            assert loss.item() == pytest.approx(0 if inside else 20, abs=1e-6)


class TestPixels:
    def test_is_the_focal_loss_by_hand(self) -> None:
        logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])  # p 3/4 and 1/2
        masks = torch.tensor([[[1, 1]], [[0, 1]]], dtype=torch.uint8)
        easy, hard = -math.log(3 / 4), -math.log(1 / 2)
        plain = losses.pixel_loss_per_row(logits, masks, focus=0.0)
        assert plain.tolist() == pytest.approx([(easy + hard) / 2, hard])
        focal = losses.pixel_loss_per_row(logits, masks, focus=2.0)
        assert focal.tolist() == pytest.approx([(easy / 16 + hard / 4) / 2, hard / 4])

    def test_has_a_gradient_where_dice_has_none(self) -> None:
        """A lesion of one pixel, missed with certainty."""
        logits = torch.full((1, 8, 8), -30.0, requires_grad=True)
        masks = torch.zeros(1, 8, 8)
        masks[0, 3, 4] = 1
        for loss, least in ((losses.pixel_loss_per_row(logits, masks, focus=2.0), 0.01),
                            (-losses.dice_loss_per_row(logits, masks), -1e-6)):  # fmt: skip
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert (-grad[0, 3, 4]).item() > least
            assert grad.isfinite().all()
        assert (-grad[0, 3, 4]).abs().item() < 1e-6


class TestDice:
    def test_equals_the_formula_computed_by_hand(self) -> None:
        logits = torch.tensor([[[0.0, math.log(3)], [-math.log(3), 0.0]]])  # p .5 .75 .25 .5
        masks = torch.tensor([[[0, 1], [0, 1]]], dtype=torch.uint8)
        # overlap 1.25, sizes 2 and 2
        expected = 1 - (2.5 + 0.1) / (4 + 0.1)
        assert losses.dice_loss_per_row(logits, masks, eps=0.1).item() == pytest.approx(expected)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
    def test_takes_masks_of_any_dtype_with_or_without_a_channel(self, dtype: torch.dtype) -> None:
        logits = random(3, 5, 7)
        masks = random(3, 5, 7, seed=1) > 0
        expected = losses.dice_loss_per_row(logits, masks.float())
        assert torch.equal(losses.dice_loss_per_row(logits, masks.to(dtype)), expected)
        with_channel = losses.dice_loss_per_row(logits[:, None], masks[:, None].to(dtype))
        assert torch.equal(with_channel, expected)

    def test_a_missed_one_pixel_lesion_costs_almost_one(self) -> None:
        masks = torch.zeros(1, 64, 64)
        masks[0, 10, 20] = 1
        assert losses.dice_loss_per_row(torch.full((1, 64, 64), -30.0), masks).item() > 0.99

    def test_an_empty_mask_is_finite_and_free_when_nothing_is_predicted(self) -> None:
        logits = torch.full((2, 8, 8), -200.0)
        logits[1] = 0.0
        logits.requires_grad_()
        dice = losses.dice_loss_per_row(logits, torch.zeros(2, 8, 8))
        dice.sum().backward()
        assert dice[0].item() == 0
        assert dice[1].item() > 0.99
        assert logits.grad is not None and logits.grad.isfinite().all()

    def test_agrees_with_monai(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's imports, not our code
            reason = "MONAI, the second implementation, is not installed"
            reference_losses = pytest.importorskip("monai.losses", reason=reason)
        logits, masks = 4 * random(6, 33, 20), (random(6, 33, 20, seed=1) > 1).float()
        eps = losses.DICE_EPS
        reference = reference_losses.DiceLoss(
            sigmoid=True, smooth_nr=eps, smooth_dr=eps, reduction="none"
        )
        expected = reference(logits[:, None], masks[:, None]).flatten()
        difference = (losses.dice_loss_per_row(logits, masks) - expected).abs().max().item()
        print(f"largest difference to MONAI: {difference:.1e}")
        assert difference < 1e-6

    def test_different_sizes_are_an_error_that_says_what_to_do(self) -> None:
        with pytest.raises(ValueError, match="resize the logits"):
            losses.dice_loss_per_row(random(2, 8, 8), torch.zeros(2, 16, 16))


class TestMaskWeightedEmbedding:
    @pytest.mark.parametrize(
        ("grid", "size"),
        [((16, 16), (256, 256)), ((4, 7), (31, 18)), ((5, 3), (5, 3)), ((1, 2), (9, 9))],
    )
    def test_equals_the_literal_equation(
        self, grid: tuple[int, int], size: tuple[int, int]
    ) -> None:
        embedding = random(3, 12, *grid)
        probs = random(3, *size, seed=1).sigmoid()
        difference = mask_weighted_embedding(embedding, probs) - literal_embedding(embedding, probs)
        print(f"largest difference to the literal form: {difference.abs().max():.1e}")
        assert difference.abs().max() < 1e-5

    @SETTINGS
    @given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 40)] * 2), seeds)
    def test_equals_the_literal_equation_for_any_sizes(
        self, grid: tuple[int, int], size: tuple[int, int], seed: int
    ) -> None:
        embedding, probs = random(2, 3, *grid, seed=seed), random(2, *size, seed=seed + 1).sigmoid()
        torch.testing.assert_close(
            mask_weighted_embedding(embedding, probs),
            literal_embedding(embedding, probs),
            atol=1e-5,
            rtol=1e-5,
        )

    def test_has_the_gradients_of_the_literal_equation(self) -> None:
        direction = random(2, 6, seed=2)
        gradients = []
        for function in (mask_weighted_embedding, literal_embedding):
            embedding = random(2, 6, 4, 5).requires_grad_()
            logits = random(2, 17, 22, seed=1).requires_grad_()
            (function(embedding, logits.sigmoid()) * direction).sum().backward()
            gradients.append((embedding.grad, logits.grad))
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)

    def test_rows_may_share_an_image(self) -> None:
        embedding = random(3, 8, 4, 4).requires_grad_()
        probs = random(5, 32, 32, seed=1).sigmoid()
        row_image = torch.tensor([2, 0, 0, 2, 1])
        shared = mask_weighted_embedding(embedding, probs, row_image=row_image)
        copied = mask_weighted_embedding(embedding[row_image], probs)
        torch.testing.assert_close(shared, copied, atol=1e-6, rtol=1e-5)
        with pytest.raises(ValueError, match="row_image="):
            mask_weighted_embedding(embedding, probs)

    def test_a_constant_embedding_is_returned_whatever_the_mask(self) -> None:
        embedding = torch.tensor([2.0, -3.0])[None, :, None, None].expand(1, 2, 4, 4)
        probs = torch.zeros(1, 16, 16)
        probs[0, 3, 5] = 1
        result = mask_weighted_embedding(embedding, probs)
        torch.testing.assert_close(result, torch.tensor([[2.0, -3.0]]), atol=1e-5, rtol=0)

    def test_an_empty_prediction_gives_the_zero_vector(self) -> None:
        result = mask_weighted_embedding(random(1, 4, 2, 2), torch.zeros(1, 8, 8))
        assert result.abs().max() == 0

    def test_stays_in_fp32_under_autocast(self) -> None:
        embedding, probs = random(2, 4, 4, 4), random(2, 16, 16, seed=1).sigmoid()
        expected = mask_weighted_embedding(embedding, probs)
        row_image = torch.arange(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mask_weighted_embedding(embedding, probs), expected)
            shared = mask_weighted_embedding(embedding, probs, row_image=row_image)
        torch.testing.assert_close(shared, expected, atol=1e-6, rtol=1e-5)


class TestUncertainty:
    def test_is_0_for_parallel_1_for_orthogonal_and_2_for_opposite_vectors(self) -> None:
        image = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [3.0, 4.0]])
        text = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [4.0, 3.0]])
        expected = torch.tensor([0.0, 1.0, 2.0, 1 - 24 / 25])
        torch.testing.assert_close(semantic_uncertainty(image, text), expected)

    def test_averages_the_queries_before_the_cosine(self) -> None:
        image = torch.tensor([[1.0, 0.0]])
        text = torch.tensor([[[3.0, 0.0], [0.0, 3.0]]])  # mean (1.5, 1.5)
        expected = 1 - 1 / math.sqrt(2)
        assert semantic_uncertainty(image, text).item() == pytest.approx(expected)

    def test_a_zero_vector_is_as_uncertain_as_an_orthogonal_one_and_gets_no_gradient(self) -> None:
        image = torch.zeros(1, 4, requires_grad=True)
        text = random(1, 4).requires_grad_()
        uncertainty = semantic_uncertainty(image, text)
        uncertainty.sum().backward()
        assert uncertainty.item() == 1
        assert image.grad is not None and image.grad.abs().max() == 0
        assert text.grad is not None and text.grad.abs().max() == 0

    @SETTINGS
    @given(seeds, st.sampled_from([1e-4, 1.0, 1e4]))
    def test_lies_between_0_and_2_and_ignores_length(self, seed: int, scale: float) -> None:
        image, text = random(8, 5, seed=seed), random(8, 5, seed=seed + 1)
        image[0] = text[0]
        uncertainty = semantic_uncertainty(image * scale, text)
        assert ((uncertainty >= 0) & (uncertainty <= 2)).all()
        torch.testing.assert_close(
            uncertainty, 1 - nn.functional.cosine_similarity(image, text), atol=1e-5, rtol=0
        )

    def test_eqs_6_and_7_by_hand(self) -> None:
        joint = joint_uncertainty(torch.tensor([0.4, 2.0]), torch.tensor([0.3, 1.0]), 0.5)
        torch.testing.assert_close(joint, torch.tensor([0.5, 2.0]))
        weight = losses.uncertainty_weight(joint, 2.0)
        torch.testing.assert_close(weight, torch.tensor([math.e, math.exp(4)]))

    def test_weighting_switched_off_is_a_weight_of_one(self) -> None:
        dice = torch.rand(4, requires_grad=True)
        weight = losses.row_weight(
            dice, dice, beta_vl=0.5, lambda_u=1.0, weight_gradient="full", enabled=False
        )
        assert torch.equal(weight, torch.ones(4))

    def test_an_unknown_weight_gradient_names_the_nearest(self) -> None:
        with pytest.raises(ValueError, match="did you mean 'detach'"):
            row_weight(torch.ones(1), torch.ones(1), "detatch")


class TestWeightedDice:
    def test_by_hand(self) -> None:
        dice, weight = torch.tensor([0.5, 0.25, 9.0]), torch.tensor([2.0, 4.0, 9.0])
        valid = torch.tensor([True, True, False])
        assert losses.weighted_dice(dice, weight, valid, "sum").item() == 2.0
        assert losses.weighted_dice(dice, weight, valid, "mean").item() == 1.0
        with pytest.raises(ValueError, match="did you mean 'mean'"):
            losses.weighted_dice(dice, weight, valid, "means")

    @SETTINGS
    @given(
        st.lists(st.tuples(unit_floats, st.floats(0, 2), st.booleans()), min_size=1, max_size=12),
        st.sampled_from(losses.WEIGHT_GRADIENTS),
        st.sampled_from(losses.REDUCTIONS),
    )
    def test_more_dice_loss_is_never_rewarded(
        self, rows: list[tuple[float, float, bool]], weight_gradient: str, reduction: str
    ) -> None:
        """dL/dl_i > 0 for valid rows and exactly 0 for the others, in any batch."""
        dice = torch.tensor([row[0] for row in rows], requires_grad=True)
        semantic = torch.tensor([row[1] for row in rows])
        valid = torch.tensor([row[2] for row in rows])
        weight = row_weight(semantic, dice, weight_gradient)
        losses.weighted_dice(dice, weight, valid, reduction).backward()
        assert dice.grad is not None
        assert (dice.grad[valid] > 0).all()
        assert (dice.grad[~valid] == 0).all()

    def test_a_detached_weight_is_a_number_and_a_full_weight_adds_its_own_gradient(self) -> None:
        for weight_gradient, factor in (("detach", 1.0), ("full", 1 + 0.6)):
            dice = torch.tensor([0.6], requires_grad=True)
            weight = row_weight(torch.tensor([0.2]), dice, weight_gradient)
            losses.weighted_dice(dice, weight, torch.tensor([True]), "sum").backward()
            assert dice.grad is not None
            assert dice.grad.item() == pytest.approx(factor * math.exp(0.5 * 0.2 + 0.6))

    @pytest.mark.parametrize("weight_gradient", losses.WEIGHT_GRADIENTS)
    def test_lowers_every_rows_loss_when_followed_from_logits(self, weight_gradient: str) -> None:
        logits = (6 * random(5, 16, 16)).requires_grad_()
        masks = random(5, 16, 16, seed=1) > 0.5
        dice = losses.dice_loss_per_row(logits, masks)
        weight = row_weight(torch.linspace(0, 2, 5), dice, weight_gradient)
        valid = torch.ones(5, dtype=torch.bool)
        losses.weighted_dice(dice, weight, valid, "sum").backward()
        assert logits.grad is not None
        after = losses.dice_loss_per_row(logits.detach() - 0.5 * logits.grad, masks)
        assert (after < dice).all()


class TestRowsWithoutMasks:
    def test_contribute_nothing_and_get_no_gradient_even_when_they_are_nan(self) -> None:
        valid = torch.tensor([True, False])
        values = torch.tensor([0.25, math.nan])
        vectors = torch.stack([random(4), torch.full((4,), math.nan)])
        group = torch.arange(2)

        def every_loss(values: Tensor, vectors: Tensor) -> list[Tensor]:
            return [
                losses.weighted_dice(values, values.detach(), valid, "sum"),
                losses.weighted_dice(values, values.detach(), valid, "mean"),
                losses.refinement_loss([values, values], valid, "sum"),
                losses.quality_loss(values, values, valid),
                losses.alignment_loss(vectors, vectors.flip(1), valid, group, kind="cosine"),
                losses.alignment_loss(vectors, vectors.flip(1), valid, group, kind="contrastive"),
            ]

        for which in range(6):
            one, many = values.clone().requires_grad_(), vectors.clone().requires_grad_()
            loss = every_loss(one, many)[which]
            loss.backward()
            leaf = one if one.grad is not None else many
            assert loss.isfinite() and leaf.grad is not None
            assert (leaf.grad[1] == 0).all() and leaf.grad.isfinite().all()

    @pytest.mark.parametrize("num_rows", [0, 3])
    @pytest.mark.parametrize("reduction", losses.REDUCTIONS)
    def test_alone_give_a_zero_that_still_has_a_graph(self, num_rows: int, reduction: str) -> None:
        logits = random(num_rows, 8, 8).requires_grad_()
        vectors = random(num_rows, 4).requires_grad_()
        valid = torch.zeros(num_rows, dtype=torch.bool)
        group = torch.arange(num_rows)
        dice = losses.dice_loss_per_row(logits, torch.zeros(num_rows, 8, 8))
        weight = row_weight(torch.ones(num_rows), dice, "full")
        total = losses.total_objective(
            [
                (1.0, losses.weighted_dice(dice, weight, valid, reduction)),
                (1.0, losses.refinement_loss([dice], valid, reduction)),
                (0.1, losses.quality_loss(dice, dice, valid)),
                (0.1, losses.alignment_loss(vectors, vectors, valid, group, kind="contrastive")),
            ]
        )
        total.backward()
        assert total.item() == 0
        for leaf in (logits, vectors):
            assert leaf.grad is not None and (leaf.grad == 0).all()


class TestRefinementLoss:
    def test_is_the_sum_over_rows_and_the_mean_over_rounds(self) -> None:
        rounds = [torch.tensor([0.5, 0.25, 7.0]), torch.tensor([0.25, 0.0, 7.0])]
        valid = torch.tensor([True, True, False])
        assert losses.refinement_loss(rounds[:1], valid, "sum").item() == 0.75
        assert losses.refinement_loss(rounds, valid, "sum").item() == 0.5
        assert losses.refinement_loss(rounds, valid, "mean").item() == 0.25


class TestAlignment:
    def test_contrastive_by_hand(self) -> None:
        image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        loss = losses.alignment_loss(
            image, text, torch.tensor([True, True]), torch.arange(2), kind="contrastive",
            temperature=0.5,
        )  # fmt: skip
        # Cosines [[1, .6], [0, .8]], over the temperature [[2, 1.2], [0, 1.6]].
        rows = [math.log(1 + math.exp(1.2 - 2)), math.log(1 + math.exp(0 - 1.6))]
        columns = [math.log(1 + math.exp(0 - 2)), math.log(1 + math.exp(1.2 - 1.6))]
        assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 4)

    def test_cosine_is_the_mean_semantic_uncertainty(self) -> None:
        image, text = random(5, 6), random(5, 2, 6, seed=1)
        valid = torch.tensor([True, False, True, True, False])
        loss = losses.alignment_loss(image, text, valid, torch.arange(5), kind="cosine")
        torch.testing.assert_close(loss, semantic_uncertainty(image, text)[valid].mean())

    def test_rows_of_one_target_are_not_negatives_of_each_other(self) -> None:
        image = random(2, 6).requires_grad_()
        valid = torch.ones(2, dtype=torch.bool)
        text = random(2, 6, seed=1)
        loss = losses.alignment_loss(image, text, valid, torch.zeros(2), kind="contrastive")
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert image.grad is not None and image.grad.abs().max() < 1e-6

    @SETTINGS
    @given(seeds, st.lists(st.booleans(), min_size=6, max_size=6))
    def test_invalid_rows_are_not_negatives(self, seed: int, flags: list[bool]) -> None:
        image, text = random(6, 4, seed=seed), random(6, 4, seed=seed + 1)
        group, valid = torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor(flags)
        loss = losses.alignment_loss(image, text, valid, group, kind="contrastive")
        kept = [tensor[valid] for tensor in (image, text, valid, group)]
        alone = losses.alignment_loss(kept[0], kept[1], kept[2], kept[3], kind="contrastive")
        torch.testing.assert_close(loss, alone)

    def test_none_is_zero_and_an_unknown_kind_is_an_error(self) -> None:
        arguments = (random(2, 3), random(2, 3), torch.ones(2).bool(), torch.arange(2))
        assert losses.alignment_loss(*arguments, kind="none").item() == 0
        with pytest.raises(ValueError, match="did you mean 'contrastive'"):
            losses.alignment_loss(*arguments, kind="contrast")

    def test_training_on_it_makes_the_vectors_agree(self) -> None:
        image, text = random(6, 8).requires_grad_(), random(6, 8, seed=1)
        valid, group = torch.ones(6).bool(), torch.arange(6)
        optimizer = torch.optim.Adam([image], lr=0.05)
        before = semantic_uncertainty(image, text).mean().item()
        for _ in range(60):
            optimizer.zero_grad()
            losses.alignment_loss(image, text, valid, group, kind="contrastive").backward()
            optimizer.step()
        assert semantic_uncertainty(image, text).mean().item() < before - 0.4


class TestQuality:
    def test_is_the_squared_error_to_a_detached_dice(self) -> None:
        predicted = torch.tensor([0.5, 0.9], requires_grad=True)
        dice = torch.tensor([0.25, 0.1], requires_grad=True)
        loss = losses.quality_loss(predicted, dice, torch.tensor([True, True]))
        loss.backward()
        assert loss.item() == pytest.approx((0.25**2 + 0) / 2)
        assert predicted.grad is not None and predicted.grad[0].item() == pytest.approx(-0.25)
        assert dice.grad is None


class TestLanguage:
    @pytest.mark.parametrize("chunk", [7, 3 * 11, 2**24])
    def test_token_nll_agrees_with_torch_whatever_the_chunk(
        self, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(losses, "NLL_CHUNK_ELEMENTS", chunk)
        tokens = torch.tensor([3, 0, IGNORE_INDEX, 10, 5, 5, 1])
        ours, theirs = (5 * random(7, 11)).requires_grad_(), (5 * random(7, 11)).requires_grad_()
        loss = losses.token_nll_sum(ours, tokens)
        expected = nn.functional.cross_entropy(
            theirs, tokens, reduction="sum", ignore_index=IGNORE_INDEX
        )
        (3 * loss).backward()
        (3 * expected).backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)

    def test_uniform_logits_cost_log_v_per_token(self) -> None:
        loss = losses.token_nll_sum(torch.zeros(3, 50), torch.tensor([1, 2, 3]))
        assert loss.item() == pytest.approx(3 * math.log(50))

    def test_no_answer_token_gives_zero_with_a_graph(self) -> None:
        logits = torch.zeros(0, 50, requires_grad=True)
        nll = losses.token_nll_sum(logits, torch.zeros(0, dtype=torch.int64))
        for count in (0, torch.tensor(0)):
            assert losses.language_loss(nll, count, 4).item() == 0
        nll.backward()
        assert logits.grad is not None

    def test_the_engines_average_is_the_mean_over_all_tokens(self) -> None:
        tokens_per_micro_batch = [1, 20, 0, 3]
        logits = [random(n, 9, seed=n).requires_grad_() for n in tokens_per_micro_batch]
        tokens = [torch.arange(n) % 9 for n in tokens_per_micro_batch]
        pairs = list(zip(logits, tokens, strict=True))
        engine = sum(losses.language_loss(losses.token_nll_sum(*p), 24, 4) for p in pairs) / 4
        expected = nn.functional.cross_entropy(torch.cat(logits), torch.cat(tokens))
        torch.testing.assert_close(engine, expected)


class TestTotalObjective:
    def test_adds_the_terms_a_stage_has(self) -> None:
        one, two, four = (torch.tensor(float(x)) for x in (1, 2, 4))
        assert losses.total_objective([(1.0, one), (1.0, two), (1.0, four)]).item() == 7
        assert losses.total_objective([(1.0, one), (0.5, four)]).item() == 3
        with pytest.raises(ValueError, match="at least one"):
            losses.total_objective([])


class TestPrecisionAndDevice:
    def test_low_precision_inputs_are_computed_in_fp32(self) -> None:
        """Rounding the inputs to bf16 is all that happens: the arithmetic on them is fp32."""
        logits, probs = random(3, 16, 16).bfloat16(), random(3, 16, 16).sigmoid().bfloat16()
        masks = random(3, 16, 16, seed=1) > 0
        embedding, vector = random(3, 8, 4, 4).bfloat16(), random(3, 8).bfloat16()
        values, valid = torch.tensor([0.1, 0.7, 0.9]).bfloat16(), torch.ones(3).bool()
        tokens, group = torch.tensor([1, 2, 3]), torch.arange(3)
        calls = [
            lambda f: losses.dice_loss_per_row(f(logits), f(masks)),
            lambda f: mask_weighted_embedding(f(embedding), f(probs)),
            lambda f: semantic_uncertainty(f(vector), f(embedding.flatten(2)[..., :8])),
            lambda f: joint_uncertainty(f(values), f(values), 0.5),
            lambda f: losses.uncertainty_weight(f(values), 1.0),
            lambda f: row_weight(f(values), f(values), "full"),
            lambda f: losses.weighted_dice(f(values), f(values), valid, "sum"),
            lambda f: losses.refinement_loss([f(values)], valid, "mean"),
            lambda f: losses.quality_loss(f(values), f(values), valid),
            lambda f: losses.alignment_loss(f(vector), f(vector), valid, group, kind="contrastive"),
            lambda f: losses.token_nll_sum(f(vector), tokens),
        ]
        for call in calls:
            result = call(lambda tensor: tensor)
            assert result.dtype == torch.float32
            assert torch.equal(result, call(lambda tensor: tensor.float()))

    def test_a_training_step_never_waits_for_the_device(self) -> None:
        """Fake tensors have no values: anything that reads one on the host raises."""
        with FakeTensorMode():
            logits = torch.randn(4, 16, 16, requires_grad=True)
            embedding = torch.randn(2, 8, 4, 4, requires_grad=True)
            text = torch.randn(4, 1, 8, requires_grad=True)
            row_image, valid = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
            dice = losses.dice_loss_per_row(logits, torch.ones(4, 16, 16, dtype=torch.uint8))
            vector = mask_weighted_embedding(embedding, logits.sigmoid(), row_image=row_image)
            weight = row_weight(semantic_uncertainty(vector, text), dice, "full")
            nll = losses.token_nll_sum(
                torch.randn(5, 30, requires_grad=True), row_image[:1].expand(5)
            )
            align = losses.alignment_loss(vector, text, valid, row_image, kind="contrastive")
            total = losses.total_objective(
                [
                    (1.0, losses.weighted_dice(dice, weight, valid, "mean")),
                    (1.0, losses.refinement_loss([dice], valid, "mean")),
                    (1.0, losses.language_loss(nll, valid.sum(), 2)),
                    (0.1, align),
                    (0.1, losses.quality_loss(dice, dice, valid)),
                ]
            )
            total.backward()

    def test_every_choice_of_the_configuration_is_known(self) -> None:
        """The configuration and the losses must not drift apart."""
        hints = get_type_hints(ObjectiveConfig)
        assert get_args(hints["reduction"]) == losses.REDUCTIONS
        assert get_args(hints["alignment"]) == losses.ALIGNMENTS
        assert get_args(hints["weight_gradient"]) == losses.WEIGHT_GRADIENTS


def test_a_batch_max_normaliser_would_turn_a_gradient_negative() -> None:
    """Why Eq. 7 is not normalised: the counter-example, so that nobody adds it back."""
    dice = torch.tensor([0.9, 0.9, 0.9, 0.95], requires_grad=True)
    ((dice - dice.max()).exp() * dice).sum().backward()
    assert dice.grad is not None and dice.grad[3] < 0
