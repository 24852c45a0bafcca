"""The vision pathway: segment_anything's numbers, for rows that share images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from biascare.interfaces import Prediction, Prompts
from biascare.models.export_folder import build_network
from biascare.models.vision.decoder import RowMaskDecoder, ambiguous_rows
from biascare.models.vision.pathway import (
    PIXEL_MEAN,
    PIXEL_STD,
    VISION_ARCHITECTURES,
    VisionPathway,
)
from tests.tiny import IMAGE_SIZE, wake

GRID = IMAGE_SIZE // 8


@pytest.fixture(scope="module")
def pathway() -> VisionPathway:
    """Tiny, random weights; read only."""
    torch.manual_seed(0)
    pathway = VisionPathway("tiny", IMAGE_SIZE).eval()
    wake(pathway)
    return pathway


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator).byte()


def original_modules(pathway: VisionPathway) -> tuple[Any, Any, Any]:
    """segment_anything's own three modules with the weights of the pathway."""
    encoder = ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=8,
        embed_dim=96,
        depth=3,
        num_heads=3,
        out_chans=96,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(2,),
    )
    prompt_encoder = PromptEncoder(96, (GRID, GRID), (IMAGE_SIZE, IMAGE_SIZE), 16)
    decoder = MaskDecoder(
        transformer_dim=96, transformer=TwoWayTransformer(2, 96, num_heads=2, mlp_dim=256)
    )
    encoder.load_state_dict(pathway.image_encoder.state_dict())
    prompt_encoder.load_state_dict(pathway.prompt_encoder.state_dict())
    decoder.load_state_dict(pathway.mask_decoder.state_dict())
    return encoder.eval(), prompt_encoder.eval(), decoder.eval()


def prompts(*rows: list[tuple[float, float, int]]) -> Prompts:
    """One list of (x, y, label) per row, padded to the longest."""
    length = max(1, *map(len, rows))
    padded = [row + [(0.0, 0.0, -1)] * (length - len(row)) for row in rows]
    table = torch.tensor(padded, dtype=torch.float32)
    return Prompts(point_coords=table[..., :2], point_labels=table[..., 2].long())


def random_logits(rows: int, seed: int = 3) -> Tensor:
    return torch.randn(rows, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(seed))


POINTS = [(12.0, 20.0, 1), (40.5, 33.0, 0), (7.0, 50.0, 1)]
BOX = [(10.0, 12.0, 2), (44.0, 51.0, 3)]
CASES = {
    "points": (POINTS, False),
    "box": (BOX, False),
    "points and box": (POINTS + BOX, False),
    "no prompt": ([(0.0, 0.0, -1)], False),
    "points and mask": (POINTS, True),
    "mask alone": ([(0.0, 0.0, -1)], True),
}


@torch.no_grad()
def original_prediction(
    modules: tuple[Any, Any, Any], image: Tensor, row: list[Any], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Low-resolution logits [4h, 4w] and quality by segment_anything alone."""
    encoder, prompt_encoder, decoder = modules
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    clicks = [p for p in row if p[2] in (0, 1)]
    corners = [p[:2] for p in row if p[2] in (2, 3)]
    points = boxes = None
    if clicks:
        coords = torch.tensor([[p[:2] for p in clicks]])
        points = (coords, torch.tensor([[p[2] for p in clicks]]))
    if corners:
        boxes = torch.tensor([[*corners[0], *corners[1]]])
    sparse, dense = prompt_encoder(points, boxes, None if mask is None else mask[None, None])
    low_res, quality = decoder(
        encoder(((image.float() - mean) / std)[None]),
        prompt_encoder.get_dense_pe(),
        sparse,
        dense,
        multimask_output=False,
    )
    return low_res[0, 0], quality[0, 0]


@pytest.mark.parametrize("case", CASES)
def test_a_row_gets_the_mask_of_segment_anything_itself(
    pathway: VisionPathway, images: Tensor, case: str
) -> None:
    row, with_mask = CASES[case]
    mask = random_logits(1) if with_mask else None
    theirs, quality = original_prediction(
        original_modules(pathway), images[0], row, None if mask is None else mask[0]
    )
    with torch.no_grad():
        embedding = pathway.encode_images(images)
        ours = pathway.decode(embedding, torch.tensor([0]), prompts(row), None, mask)
    difference = float((ours.low_res_logits[0] - theirs).abs().max())
    print(f"{case}: largest difference {difference:.1e}, logits up to {theirs.abs().max():.2f}")
    assert difference <= 1e-5
    assert float((ours.predicted_dice[0] - quality).abs()) <= 1e-5
    resized = torch.nn.functional.interpolate(
        theirs[None, None], (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
    )
    assert torch.allclose(ours.mask_logits[0], resized[0, 0], atol=1e-5)


def test_the_image_encoder_equals_segment_anythings_at_a_size_that_pads_its_windows() -> None:
    torch.manual_seed(0)
    pathway = VisionPathway("tiny", 96).eval()  # 12 x 12 tokens in windows of 8
    encoder = ImageEncoderViT(
        img_size=96,
        patch_size=8,
        embed_dim=96,
        depth=3,
        num_heads=3,
        out_chans=96,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(2,),
    )
    encoder.load_state_dict(pathway.image_encoder.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        difference = float((pathway.image_encoder(x) - encoder(x)).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


@torch.no_grad()
def decode(pathway: VisionPathway, embedding: Tensor, image: list[int], p: Prompts) -> Prediction:
    return pathway.decode(embedding, torch.tensor(image), p)


POINT = st.tuples(
    st.integers(0, IMAGE_SIZE - 1), st.integers(0, IMAGE_SIZE - 1), st.sampled_from([0, 1])
)


@settings(deadline=None, max_examples=12)
@given(rows=st.lists(st.lists(POINT, max_size=3), min_size=1, max_size=4), extra=st.integers(0, 3))
def test_a_rows_mask_depends_neither_on_padding_nor_on_the_rows_beside_it(
    rows: list[list[Any]], extra: int
) -> None:
    pathway = small_pathway()
    embedding = torch.randn(2, 96, GRID, GRID, generator=torch.Generator().manual_seed(5))
    table = prompts(*rows, [(1.0, 1.0, -1)] * extra)
    which = [r % 2 for r in range(len(rows) + 1)]
    together = decode(pathway, embedding, which, table)
    for r, row in enumerate(rows):
        alone = decode(pathway, embedding, [which[r]], prompts(row))
        assert torch.allclose(together.mask_logits[r], alone.mask_logits[0], atol=1e-5)
        assert torch.allclose(together.predicted_dice[r], alone.predicted_dice[0], atol=1e-5)


def small_pathway(seed: int = 0) -> VisionPathway:
    torch.manual_seed(seed)
    pathway = VisionPathway("tiny", IMAGE_SIZE).eval()
    wake(pathway)
    return pathway


def test_a_mask_prompt_changes_the_mask_but_not_at_birth(images: Tensor) -> None:
    torch.manual_seed(0)
    pathway = VisionPathway("tiny", IMAGE_SIZE).eval()
    rows, table = torch.tensor([0, 1]), prompts(POINTS, BOX)
    differences = []
    with torch.no_grad():
        for prepare in (lambda _: None, wake):
            prepare(pathway)
            embedding = pathway.encode_images(images)
            without = pathway.decode(embedding, rows, table)
            prompted = pathway.decode(embedding, rows, table, None, random_logits(2))
            difference = (without.mask_logits - prompted.mask_logits).abs().max()
            differences.append(float(difference))
    print(f"largest difference at birth {differences[0]:.1e}, later {differences[1]:.1e}")
    assert differences[0] <= 1e-6 and differences[1] > 1e-3


def test_a_mask_prompt_is_read_up_to_its_limit(pathway: VisionPathway, images: Tensor) -> None:
    limited = VisionPathway("tiny", IMAGE_SIZE, mask_prompt_limit=2.0).eval()
    limited.load_state_dict(pathway.state_dict())
    rows, table = torch.tensor([0, 1]), prompts(POINTS, BOX)
    strong = 9 * random_logits(2)
    with torch.no_grad():
        embedding = pathway.encode_images(images)
        cut = limited.decode(embedding, rows, table, None, strong).mask_logits
        wanted = pathway.decode(embedding, rows, table, None, strong.clamp(-2, 2)).mask_logits
        uncut = pathway.decode(embedding, rows, table, None, strong).mask_logits
    assert torch.equal(cut, wanted) and not torch.equal(cut, uncut)


def test_the_coordinates_of_padding_do_not_matter(pathway: VisionPathway, images: Tensor) -> None:
    with torch.no_grad():
        embedding = pathway.encode_images(images[:1])
    first = decode(pathway, embedding, [0], prompts([POINTS[0], (0.0, 0.0, -1)]))
    second = decode(pathway, embedding, [0], prompts([POINTS[0], (63.0, 17.0, -1)]))
    assert torch.equal(first.mask_logits, second.mask_logits)


def test_the_order_of_clicks_and_box_does_not_matter(
    pathway: VisionPathway, images: Tensor
) -> None:
    with torch.no_grad():
        embedding = pathway.encode_images(images[:1])
    first = decode(pathway, embedding, [0], prompts(POINTS + BOX))
    second = decode(pathway, embedding, [0], prompts(BOX + POINTS[::-1]))
    assert torch.allclose(first.mask_logits, second.mask_logits, atol=1e-5)


def test_rows_share_the_embeddings_of_their_images_which_are_encoded_once(
    pathway: VisionPathway, images: Tensor
) -> None:
    seen: list[int] = []
    hook = pathway.image_encoder.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    with torch.no_grad():
        embedding = pathway.encode_images(images)
    hook.remove()
    assert seen == [2]
    rows = prompts([POINTS[0]], [POINTS[1]], [POINTS[0]], [POINTS[0]])
    prediction = decode(pathway, embedding, [0, 0, 1, 0], rows)
    assert prediction.mask_logits.shape == (4, IMAGE_SIZE, IMAGE_SIZE)
    assert prediction.low_res_logits.shape == (4, 4 * GRID, 4 * GRID)
    assert prediction.predicted_dice.shape == (4,)
    assert torch.allclose(prediction.mask_logits[0], prediction.mask_logits[3], atol=1e-6)
    assert not torch.allclose(prediction.mask_logits[0], prediction.mask_logits[2], atol=1e-3)


@pytest.mark.parametrize(
    "move", [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half().float()]
)
def test_the_fourier_frequencies_keep_their_precision_when_the_model_changes_its_own(
    move: Any,
) -> None:
    pathway = small_pathway()
    before = pathway.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.clone()
    move(pathway)
    after = pathway.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_a_pathway_planned_without_memory_can_be_given_some() -> None:
    with torch.device("meta"):
        pathway = VisionPathway("tiny", IMAGE_SIZE).bfloat16()
    pathway.to_empty(device="cpu")
    pathway.load_state_dict(small_pathway().state_dict())
    matrix = pathway.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert (matrix.dtype, matrix.device.type) == (torch.float32, "cpu")


def test_a_bf16_pathway_decodes_to_nearly_the_same_mask_in_fp32_logits(images: Tensor) -> None:
    full, half = small_pathway(), small_pathway().bfloat16()
    table = prompts(POINTS)
    with torch.no_grad():
        exact = decode(full, full.encode_images(images), [0], table)
        rounded = decode(half, half.encode_images(images), [0], table)
    assert rounded.low_res_logits.dtype == torch.bfloat16
    assert rounded.mask_logits.dtype == rounded.predicted_dice.dtype == torch.float32
    difference = (exact.mask_logits - rounded.mask_logits).abs().max()
    assert difference < 0.1 * exact.mask_logits.abs().max()


@pytest.mark.parametrize(
    "name, prompt_dim, published",
    [
        ("tiny", 96, None),
        ("sam_vit_b", 256, 93.7e6),
        ("sam_vit_h", 256, 641.1e6),
        ("imis_b", 768, 119e6),  # with two heads that are not built here
        ("litemedsam", 256, None),
    ],
)
def test_prompts_have_the_dimension_of_their_backbone(
    name: str, prompt_dim: int, published: float | None
) -> None:
    with torch.device("meta"):
        pathway = VisionPathway(name, 256)
    assert pathway.prompt_dim == prompt_dim
    assert pathway.prompt_encoder.point_embeddings[0].weight.shape == (1, prompt_dim)
    assert pathway.mask_decoder.mask_tokens.weight.shape == (4, prompt_dim)
    assert pathway.image_encoder.neck[0].weight.shape[0] == prompt_dim
    assert pathway.dtype == torch.float32
    counted = sum(p.numel() for p in pathway.parameters())
    print(f"{name}: {counted / 1e6:.1f} M parameters")
    if published:
        position = (64**2 - 16**2) * VISION_ARCHITECTURES[name].embed_dim  # of 1024 and 256 pixels
        assert counted == pytest.approx(published - position, rel=0.015)


@pytest.mark.parametrize("name", ["sam_vit_b", "imis_b"])
def test_full_width_pathways_run_at_reduced_depth(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = VISION_ARCHITECTURES[name]._replace(depth=1, global_attn_indexes=(0,))
    monkeypatch.setitem(VISION_ARCHITECTURES, name, shallow)
    pathway = VisionPathway(name, 64).eval()
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        embedding = pathway.encode_images(images)
    assert embedding.shape == (1, shallow.prompt_dim, 4, 4)
    prediction = decode(pathway, embedding, [0, 0], prompts(POINTS, BOX))
    assert prediction.mask_logits.shape == (2, 64, 64)
    assert prediction.low_res_logits.shape == (2, 16, 16)


def test_clicks_box_corners_and_text_receive_gradients(images: Tensor) -> None:
    pathway = small_pathway().train()
    text = torch.randn(3, 1, 96, requires_grad=True)
    rows = prompts([(12.0, 20.0, 1)], [(30.0, 30.0, 0)], BOX)
    prediction = pathway.decode(
        pathway.encode_images(images), torch.tensor([0, 1, 1]), rows, text, random_logits(3)
    )
    (prediction.mask_logits.square().sum() + prediction.predicted_dice.sum()).backward()
    encoder = pathway.prompt_encoder
    for embedding in (*encoder.point_embeddings, encoder.not_a_point_embed):
        assert embedding.weight.grad is not None and embedding.weight.grad.abs().sum() > 0
    assert text.grad is not None and (text.grad.abs().sum(dim=(1, 2)) > 0).all()
    idle = [n for n, p in pathway.named_parameters() if p.grad is None]
    unused = {id(p) for p in pathway.unused_parameters()}
    named = {n for n, p in pathway.named_parameters() if id(p) in unused}
    assert set(idle) == named | {"prompt_encoder.no_mask_embed.weight"}  # a mask was prompted


@torch.no_grad()
def test_each_row_takes_the_best_of_the_masks_that_its_prompts_allow() -> None:
    """One click or one box leaves open what is meant; together, or two clicks, they do not."""
    one, two = [POINTS[0]], POINTS
    rows = prompts(one, two, BOX, BOX + one, [(1.0, 1.0, -1)])
    assert ambiguous_rows(rows).tolist() == [True, False, True, False, True]
    embedding = torch.randn(1, 96, GRID, GRID, generator=torch.Generator().manual_seed(5))
    which = torch.zeros(5, dtype=torch.int64)
    pathways = {}
    for multimask in ("never", "ambiguous", "always"):
        pathways[multimask] = VisionPathway("tiny", IMAGE_SIZE, multimask=multimask).eval()
        pathways[multimask].load_state_dict(small_pathway().state_dict())
    sparse, token_mask, dense = pathways["never"].prompt_encoder(rows)
    # By segment_anything's own decoder: four masks and their quality, row by row.
    plain = original_modules(pathways["never"])[2].eval()
    position = pathways["never"].prompt_encoder.dense_pe(torch.float32)
    for r, several in enumerate(ambiguous_rows(rows).tolist()):
        tokens, one_dense = sparse[r : r + 1, token_mask[r]], dense[r : r + 1]
        masks, quality = plain.predict_masks(embedding, position, tokens, one_dense)
        best = 1 + int(quality[0, 1:].argmax())
        for multimask, mask in (
            ("never", 0),
            ("always", best),
            ("ambiguous", best if several else 0),
        ):
            ours = pathways[multimask].decode(embedding, which, rows)
            assert torch.allclose(ours.low_res_logits[r], masks[0, mask], atol=1e-5)
            assert torch.allclose(ours.predicted_dice[r], quality[0, mask], atol=1e-5)


@pytest.mark.parametrize("multimask, idle", [("never", "123"), ("always", "0"), ("ambiguous", "")])
def test_mask_heads_that_are_never_taken_are_not_trained(multimask: Any, idle: str) -> None:
    pathway = VisionPathway("tiny", IMAGE_SIZE, multimask=multimask)
    unused = {id(p) for p in pathway.unused_parameters()}
    named = [n for n, p in pathway.mask_decoder.named_parameters() if id(p) in unused]
    assert {n.split(".")[1] for n in named} == set(idle)


@pytest.fixture
def imis_like(monkeypatch: pytest.MonkeyPatch) -> VisionPathway:
    """Tiny, with IMIS-Net's semantic tokens and a text branch that has learned something."""
    sizes = VISION_ARCHITECTURES["tiny"]._replace(num_semantic_tokens=4, text_branch=True)
    monkeypatch.setitem(VISION_ARCHITECTURES, "tiny", sizes)
    pathway = small_pathway()
    torch.nn.init.normal_(pathway.mask_decoder.text_output.weight, std=0.3)
    return pathway


def test_with_semantic_tokens_and_text_a_rows_mask_is_its_own(imis_like: VisionPathway) -> None:
    embedding = torch.randn(2, 96, GRID, GRID, generator=torch.Generator().manual_seed(5))
    text = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(6))
    rows, which = (POINTS, BOX, [(1.0, 1.0, -1)]), torch.tensor([0, 1, 1])
    with torch.no_grad():
        together = imis_like.decode(embedding, which, prompts(*rows), text)
        for r, row in enumerate(rows):
            one = slice(r, r + 1)
            alone = imis_like.decode(embedding, which[one], prompts(row), text[one])
            assert torch.allclose(together.mask_logits[r], alone.mask_logits[0], atol=1e-5)


def test_semantic_tokens_act_like_prompts_of_every_row(
    imis_like: VisionPathway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, given as text to a decoder that has none of its own."""
    state = imis_like.state_dict()
    tokens = state.pop("mask_decoder.semantic_tokens.weight")
    plain_sizes = VISION_ARCHITECTURES["tiny"]._replace(num_semantic_tokens=0, text_branch=False)
    monkeypatch.setitem(VISION_ARCHITECTURES, "tiny", plain_sizes)
    plain = VisionPathway("tiny", IMAGE_SIZE).eval()
    plain.load_state_dict({k: v for k, v in state.items() if "text_output" not in k})
    embedding = torch.randn(1, 96, GRID, GRID, generator=torch.Generator().manual_seed(5))
    one = torch.tensor([0])
    with torch.no_grad():
        ours = imis_like.decode(embedding, one, prompts(POINTS))
        theirs = plain.decode(embedding, one, prompts(POINTS), tokens[None])
    assert torch.allclose(ours.mask_logits, theirs.mask_logits, atol=1e-5)


def test_a_new_text_branch_changes_no_mask_and_learns_from_the_first_step(
    imis_like: VisionPathway, images: Tensor
) -> None:
    branch = imis_like.mask_decoder.text_output
    torch.nn.init.zeros_(branch.weight)
    table, rows, text = prompts(POINTS, BOX), torch.tensor([0, 1]), torch.randn(2, 1, 96)

    def decoded() -> Prediction:
        return imis_like.decode(imis_like.encode_images(images), rows, table, text)

    born = decoded()
    imis_like.mask_decoder.text_output = None
    without = decoded()
    imis_like.mask_decoder.text_output = branch
    assert torch.equal(born.mask_logits, without.mask_logits)
    born.mask_logits.square().sum().backward()
    assert branch.weight.grad.abs().max() > 0 and branch.bias.grad.abs().max() > 0
    with torch.no_grad():
        branch.weight -= 0.1 * branch.weight.grad.sign()
        assert not torch.allclose(decoded().mask_logits, without.mask_logits, atol=1e-3)


def test_the_text_branch_is_not_trained_where_no_text_reaches_it(
    imis_like: VisionPathway,
) -> None:
    branch = {id(p) for p in imis_like.mask_decoder.text_output.parameters()}
    assert not branch & {id(p) for p in imis_like.unused_parameters()}
    imis_like.reads_text = False
    assert branch <= {id(p) for p in imis_like.unused_parameters()}
    build = build_network(vision="tiny", image_size=IMAGE_SIZE)
    assert not build.vision.reads_text


def test_recomputed_activations_give_the_same_gradients(images: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        pathway = VisionPathway("tiny", IMAGE_SIZE, checkpointing).train()
        calls: list[int] = []
        pathway.image_encoder.blocks[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        pathway.encode_images(images).square().sum().backward()
        assert len(calls) == 1 + checkpointing  # it was really computed twice
        gradients.append([p.grad for p in pathway.image_encoder.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        assert torch.equal(stored, recomputed)


def test_the_decoder_keeps_the_parameter_names_of_segment_anything(pathway: VisionPathway) -> None:
    theirs = MaskDecoder(
        transformer_dim=96, transformer=TwoWayTransformer(2, 96, num_heads=2, mlp_dim=256)
    )
    assert isinstance(pathway.mask_decoder, RowMaskDecoder)
    assert pathway.mask_decoder.state_dict().keys() == theirs.state_dict().keys()


def test_an_unknown_architecture_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"sam_vit_l.*did you mean 'sam_vit_b'"):
        VisionPathway("sam_vitb", 256)


@pytest.mark.parametrize("size", [0, -16, 100])
def test_an_image_size_that_patches_do_not_divide_is_refused_with_the_nearest(size: int) -> None:
    with pytest.raises(ValueError, match=r"model.image_size: got .* 16 pixels; the nearest is \d+"):
        VisionPathway("sam_vit_b", size)
