"""Foreign vision weights: read safely, recognised, mapped, resampled, giving their own masks.

The references are segment_anything's own `Sam` and `SamPredictor`, and a reconstruction of
IMIS-Net's decoder that shares no code with ours.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from biascare.interfaces import Prompts
from biascare.models.export_folder import build_network
from biascare.models.vision.pathway import (
    PIXEL_MEAN,
    PIXEL_STD,
    VISION_ARCHITECTURES,
    VisionPathway,
)
from biascare.models.weights.report import LoadReport
from biascare.models.weights.vision import (
    LAYOUTS,
    detect_layout,
    fit,
    load_vision_checkpoint,
    read_state_dict,
)
from tests.tiny import IMAGE_SIZE, wake

SAMS = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}
SHAPES_ONLY = torch.device("meta")
NO_TEXT = ("mask_decoder.text_output.weight", "mask_decoder.text_output.bias")


def tiny_pathway(image_size: int = IMAGE_SIZE, seed: int = 0) -> VisionPathway:
    torch.manual_seed(seed)
    pathway = VisionPathway("tiny", image_size).eval()
    wake(pathway)
    return pathway


def planned(name: str, image_size: int = 256) -> VisionPathway:
    """At true size, without memory."""
    with SHAPES_ONLY:
        return VisionPathway(name, image_size)


def randomise(module: nn.Module, seed: int) -> None:
    """Random values everywhere, also where modules start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.2 if parameter.ndim < 2 else 0.7 / math.sqrt(parameter[0].numel())
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Real widths at two blocks, the second with global attention."""
    for name in ("sam_vit_b", "imis_b", "medsam"):
        sizes = VISION_ARCHITECTURES[name]._replace(depth=2, global_attn_indexes=(1,))
        monkeypatch.setitem(VISION_ARCHITECTURES, name, sizes)
    yield


def image_encoder(out_chans: int, image_size: int) -> ImageEncoderViT:
    """segment_anything's, as wide as ViT-B, two blocks."""
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=768,
        depth=2,
        num_heads=12,
        out_chans=out_chans,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
    )


def shallow_sam(image_size: int) -> Sam:
    grid = image_size // 16
    sam = Sam(
        image_encoder(256, image_size),
        PromptEncoder(256, (grid, grid), (image_size, image_size), 16),
        MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048)),
        list(PIXEL_MEAN),
        list(PIXEL_STD),
    )
    randomise(sam, 1)
    return sam.eval()


def random_image(size: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def prompts(points: list[tuple[float, float, int]]) -> Prompts:
    table = torch.tensor([points], dtype=torch.float32)
    return Prompts(point_coords=table[..., :2], point_labels=table[..., 2].long())


# ---------------------------------------------------------------- SAM and MedSAM

POINTS = [(30.0, 60.0, 1), (90.5, 20.0, 0)]
BOX = [(20.0, 24.0, 2), (101.0, 110.0, 3)]


@pytest.mark.parametrize(
    "case", ["one point", "points", "box", "points and box", "points and mask"]
)
@torch.no_grad()
def test_loaded_sam_weights_give_the_masks_of_sam_predictor(
    shallow: None, tmp_path: Path, case: str
) -> None:
    sam = shallow_sam(128)
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b_01ec64.pth")
    pathway = VisionPathway("sam_vit_b", 128).eval()
    report = load_vision_checkpoint(pathway, tmp_path / "sam_vit_b_01ec64.pth")
    assert (report.layout, report.converted, report.missing) == ("sam", {}, [])
    image = random_image(128)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    embedding = pathway.encode_images(as_tensor(image))
    assert float((embedding - predictor.features).abs().max()) <= 1e-5
    clicks = POINTS if "points" in case else POINTS[:1] if "point" in case else []
    box = BOX if "box" in case else []
    mask = torch.randn(1, 32, 32) if "mask" in case else None
    several = case in ("one point", "box")
    _, quality, theirs = predictor.predict(
        point_coords=np.array([p[:2] for p in clicks]) if clicks else None,
        point_labels=np.array([p[2] for p in clicks]) if clicks else None,
        box=np.array([*box[0][:2], *box[1][:2]]) if box else None,
        mask_input=None if mask is None else mask.numpy(),
        multimask_output=several,
        return_logits=True,
    )
    best = int(quality.argmax())
    ours = pathway.decode(embedding, torch.tensor([0]), prompts(clicks + box), None, mask)
    difference = float((ours.low_res_logits[0] - torch.from_numpy(theirs[best])).abs().max())
    print(f"{case}: largest difference {difference:.1e} of logits up to {np.abs(theirs).max():.1f}")
    assert difference <= 1e-5
    assert float((ours.predicted_dice[0] - float(quality[best])).abs()) <= 1e-5


@pytest.mark.parametrize("name", SAMS)
def test_every_tensor_of_a_real_sam_checkpoint_finds_its_place(name: str) -> None:
    with SHAPES_ONLY:
        state = sam_model_registry[SAMS[name]]().state_dict()
    report = load_vision_checkpoint(planned(name), state)
    sizes = VISION_ARCHITECTURES[name]
    resampled = {"image_encoder.pos_embed"} | {
        f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
        for block in sizes.global_attn_indexes
        for axis in "hw"
    }
    print(report)
    assert report.matched == len(state)
    assert set(report.converted) == resampled
    assert not (report.missing or report.unexpected or report.dropped)


@torch.no_grad()
def test_a_transformers_folder_gives_the_masks_of_its_own_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamConfig(
        vision_config={
            "hidden_size": 96,
            "output_channels": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [2],
            "num_pos_feats": 16,
            "mlp_dim": 384,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2},
    )
    theirs = SamModel(config).eval()
    randomise(theirs, 4)
    theirs.save_pretrained(tmp_path)
    sizes = VISION_ARCHITECTURES["tiny"]._replace(
        prompt_dim=32, window_size=3, decoder_mlp_dim=64, decoder_heads=2
    )
    monkeypatch.setitem(VISION_ARCHITECTURES, "tiny", sizes)
    pathway = VisionPathway("tiny", 64).eval()
    report = load_vision_checkpoint(pathway, tmp_path)
    print(report)
    assert report.layout == "transformers_sam"
    pixels = torch.randn(1, 3, 64, 64)
    points = torch.tensor([[[12.0, 20.0], [40.0, 33.0]]])
    labels = torch.tensor([[1, 0]])
    output = theirs(
        pixel_values=pixels,
        input_points=points[None],
        input_labels=labels[None],
        multimask_output=False,
    )
    ours = pathway.decode(pathway.image_encoder(pixels), torch.tensor([0]), Prompts(points, labels))
    difference = float((ours.low_res_logits[0] - output.pred_masks[0, 0, 0]).abs().max())
    print(f"largest difference {difference:.1e}")
    # transformers norms the decoder's tokens with an epsilon of 1e-6, SAM itself with 1e-5.
    assert difference <= 1e-4
    assert torch.allclose(ours.predicted_dice, output.iou_scores[0, 0], atol=1e-4)


@pytest.mark.parametrize("weights, run", [("sam_vit_l", "sam_vit_b"), ("sam_vit_b", "imis_b")])
def test_weights_of_another_size_say_which_architecture_to_set(weights: str, run: str) -> None:
    with SHAPES_ONLY:
        state = sam_model_registry[SAMS[weights]]().state_dict()
    with pytest.raises(ValueError, match=rf"model.vision={run} .*; set model.vision={weights}"):
        load_vision_checkpoint(planned(run), state)


def test_weights_of_a_size_that_no_architecture_has_say_so() -> None:
    state = dict(tiny_pathway().state_dict())
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(4, 32)
    with pytest.raises(ValueError, match=r"32-channel prompts.* no model.vision is of these sizes"):
        load_vision_checkpoint(tiny_pathway(), state)


# ---------------------------------------------------------------- IMIS-Net


def imis_shapes(depth: int, global_blocks: tuple[int, ...], grid: int) -> dict[str, tuple]:
    """Key list of IMISNet-B.pth without its text tower."""
    shapes: dict[str, tuple] = {}

    def pair(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    encoder = "image_encoder.sam_encoder"
    shapes[f"{encoder}.pos_embed"] = (1, grid, grid, 768)
    pair(f"{encoder}.patch_embed.proj", 768, 3, 16, 16)
    for i in range(depth):
        block = f"{encoder}.blocks.{i}"
        length = 2 * grid - 1 if i in global_blocks else 27
        shapes |= {f"{block}.attn.rel_pos_{axis}": (length, 64) for axis in "hw"}
        for name, size in (("norm1", (768,)), ("norm2", (768,))):
            pair(f"{block}.{name}", *size)
        pair(f"{block}.attn.qkv", 2304, 768)
        pair(f"{block}.attn.proj", 768, 768)
        pair(f"{block}.mlp.fc1", 3072, 768)
        pair(f"{block}.mlp.fc2", 768, 3072)
    for neck, width, inside in ((f"{encoder}.neck", 256, 768), ("image_encoder.neck", 768, 768)):
        shapes[f"{neck}.0.weight"] = (width, inside, 1, 1)
        shapes[f"{neck}.2.weight"] = (width, width, 3, 3)
        pair(f"{neck}.1", width)
        pair(f"{neck}.3", width)
    prompt_encoder = PromptEncoder(768, (grid, grid), (16 * grid, 16 * grid), 16)
    decoder = MaskDecoder(transformer_dim=768, transformer=TwoWayTransformer(2, 768, 8, 2048))
    for prefix, module in (("prompt_encoder", prompt_encoder), ("mask_decoder", decoder)):
        shapes |= {f"{prefix}.{k}": tuple(v.shape) for k, v in module.state_dict().items()}
    shapes["mask_decoder.semantic_tokens.weight"] = (4, 768)
    pair("mask_decoder.text_output", 96, 768)
    for layer, size in enumerate(((256, 768), (256, 256), (1024, 256))):
        pair(f"mask_decoder.semantic_prediction_head.layers.{layer}", *size)
    return shapes


def random_imis(grid: int, seed: int = 5) -> dict[str, Tensor]:
    """Two blocks deep, real widths."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in imis_shapes(2, (1,), grid).items():
        scale = 0.2 if len(shape) < 2 else 0.7 / math.sqrt(math.prod(shape[1:]))
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = torch.randn(shape, generator=generator) * scale + offset
    state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].mul_(8)
    return state


def count(keys: Any, prefix: str) -> int:
    return sum(key.startswith(prefix) for key in keys)


def test_every_tensor_of_a_real_imis_checkpoint_is_loaded_or_left_out_by_name() -> None:
    shapes = imis_shapes(12, (2, 5, 8, 11), 64)
    with SHAPES_ONLY:
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        tower = {f"text_model.layers.{i}.weight": torch.empty(2, 2) for i in range(3)}
        state |= tower | {"text_out_dim.weight": torch.empty(768, 512)}
    parts = ("image_encoder.sam_encoder.", "image_encoder.neck.", "prompt_encoder.")
    assert [count(state, part) for part in (*parts, "mask_decoder.")] == [177, 6, 17, 129]
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == pytest.approx(119e6, rel=0.01)  # as published, without the text tower
    pathway = planned("imis_b")
    report = load_vision_checkpoint(pathway, state)
    print(report)
    assert report.layout == "imis"
    assert report.matched == len(pathway.state_dict()) == 177 + 6 + 17 + 129 - 6 - 6
    assert len(report.converted) == 1 + 2 * 4
    numbers = {prefix: dropped.number for prefix, dropped in report.dropped.items()}
    assert numbers == {
        "image_encoder.sam_encoder.neck.": 6,
        "mask_decoder.semantic_prediction_head.": 6,
        "text_model.": 3,
        "text_out_dim": 1,
    }


def mlp(state: dict[str, Tensor], name: str, x: Tensor, depth: int = 3) -> Tensor:
    for layer in range(depth):
        weight, bias = (state[f"{name}.layers.{layer}.{kind}"] for kind in ("weight", "bias"))
        x = x @ weight.T + bias
        x = x.relu() if layer < depth - 1 else x
    return x


@torch.no_grad()
def imis_masks(
    state: dict[str, Tensor], image: Tensor, points: list[Any], text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """IMIS-Net by its wiring: logits [4, 4h, 4w] of all mask tokens, and their quality [4]."""
    grid = image.shape[-1] // 16
    encoder = image_encoder(768, image.shape[-1])
    renamed = {}
    for key, value in state.items():
        if key.startswith("image_encoder.sam_encoder.") and ".sam_encoder.neck." not in key:
            key = key.replace("image_encoder.sam_encoder.", "")
            renamed[key.replace("mlp.fc1", "mlp.lin1").replace("mlp.fc2", "mlp.lin2")] = value
        elif key.startswith("image_encoder.neck."):
            renamed[key.removeprefix("image_encoder.")] = value
    encoder.load_state_dict(renamed)
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    embedding = encoder((image.float() - mean) / std)

    def below(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}

    prompt_encoder = PromptEncoder(768, (grid, grid), (16 * grid, 16 * grid), 16)
    prompt_encoder.load_state_dict(below("prompt_encoder."))
    coords = torch.tensor([[p[:2] for p in points]])
    sparse, dense = prompt_encoder((coords, torch.tensor([[p[2] for p in points]])), None, None)
    decoder = below("mask_decoder.")
    transformer = TwoWayTransformer(2, 768, 8, 2048)
    transformer.load_state_dict(below("mask_decoder.transformer."))
    upscaling = MaskDecoder(transformer_dim=768, transformer=transformer).output_upscaling
    upscaling.load_state_dict(below("mask_decoder.output_upscaling."))
    own = [decoder[f"{name}.weight"] for name in ("iou_token", "mask_tokens", "semantic_tokens")]
    text_token = [] if text is None else [text[None]]
    tokens = torch.cat([torch.cat(own)[None], sparse, *text_token], 1)
    hidden, keys = transformer(embedding + dense, prompt_encoder.get_dense_pe(), tokens)
    upscaled = upscaling(keys.transpose(1, 2).reshape(embedding.shape))[0]
    kernels = [mlp(decoder, f"output_hypernetworks_mlps.{i}", hidden[0, 1 + i]) for i in range(4)]
    logits = (torch.stack(kernels) @ upscaled.flatten(1)).reshape(4, *upscaled.shape[1:])
    if text is not None:
        weight, bias = decoder["text_output.weight"], decoder["text_output.bias"]
        projected = text.mean(0) @ weight.T + bias
        logits = logits + (projected @ upscaled.flatten(1)).reshape(upscaled.shape[1:])
    return logits, mlp(decoder, "iou_prediction_head", hidden[0, 0])


@pytest.mark.parametrize("multimask", [None, "never"])
@pytest.mark.parametrize("num_text_tokens", [0, 1, 3])
@torch.no_grad()
def test_loaded_imis_weights_give_the_masks_of_its_wiring(
    shallow: None, tmp_path: Path, num_text_tokens: int, multimask: Any
) -> None:
    state = random_imis(grid=6)
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "IMISNet-B.pth")
    pathway = VisionPathway("imis_b", 96, multimask=multimask).eval()
    load_vision_checkpoint(pathway, tmp_path / "IMISNet-B.pth")
    image = as_tensor(random_image(96))
    text = torch.randn(num_text_tokens, 768) if num_text_tokens else None
    theirs, quality = imis_masks(state, image, POINTS, text)
    ours = pathway.decode(
        pathway.encode_images(image),
        torch.tensor([0]),
        prompts(POINTS),
        None if text is None else text[None],
    )
    # The best of masks 1 to 3, as it was trained; one alone is mask 1, and never the untrained 0.
    which = 1 if multimask == "never" else 1 + int(quality[1:].argmax())
    difference = float((ours.low_res_logits[0] - theirs[which]).abs().max())
    print(f"mask {which}: largest difference {difference:.1e} of {theirs.abs().max():.1f}")
    assert difference <= 1e-5
    assert float((ours.predicted_dice[0] - quality[which]).abs()) <= 1e-5


def test_imis_weights_are_not_decoded_where_a_mask_would_be_its_untrained_one(
    shallow: None,
) -> None:
    pathway = VisionPathway("imis_b", 96, multimask="ambiguous")
    with pytest.raises(ValueError, match=r"got 'ambiguous', .* without mask 0.* expected always"):
        load_vision_checkpoint(pathway, random_imis(grid=6))


def released(seg: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """A DualPathNetwork checkpoint of its authors around an IMIS-Net."""
    beside = {"VL.lm_head.weight": torch.zeros(2, 2), "add11": torch.zeros(1, 1, 8)}
    state = {f"SEG.{key}": value for key, value in seg.items()} | beside
    if form == "peft":
        return {f"base_model.model.{key}": value for key, value in state.items()}
    if form == "modules_to_save":
        saved = {f"SEG.modules_to_save.default.{key}": value for key, value in seg.items()}
        old = {f"SEG.original_module.{key}": torch.zeros(1) for key in seg}
        return {f"base_model.model.{k}": v for k, v in (saved | old | beside).items()}
    return state


@pytest.mark.parametrize("form", ["merged", "peft", "modules_to_save"])
def test_the_segmentation_part_of_a_released_checkpoint_is_an_imis_net_without_text(
    shallow: None, tmp_path: Path, form: str
) -> None:
    seg = {k: v for k, v in random_imis(grid=4).items() if k not in NO_TEXT}
    torch.save({"module": released(seg, form)}, tmp_path / "mp_rank_00_model_states.pt")
    pathway, plain = VisionPathway("imis_b", 64), VisionPathway("imis_b", 64)
    report = load_vision_checkpoint(pathway, tmp_path / "mp_rank_00_model_states.pt")
    assert report.layout == "released_biascarevl"
    assert set(report.missing) == set(NO_TEXT)
    assert report.dropped["other parts"].number == 2 + len(seg) * (form == "modules_to_save")
    load_vision_checkpoint(plain, seg)
    theirs = plain.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in pathway.state_dict().items())
    assert not pathway.mask_decoder.text_output.weight.any()


# ---------------------------------------------------------------- what is kept, what is resampled


def test_values_are_kept_bit_for_bit_where_nothing_is_resampled() -> None:
    source, target = tiny_pathway(seed=1), tiny_pathway(seed=2)
    report = load_vision_checkpoint(target, source.state_dict())
    assert report.converted == {}
    theirs = source.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("size", [32, 128])
def test_another_image_size_changes_positions_and_nothing_else(size: int) -> None:
    source, target = tiny_pathway(seed=1), tiny_pathway(size, seed=2)
    report = load_vision_checkpoint(target, source.state_dict())
    assert set(report.converted) == {
        "image_encoder.pos_embed",
        "image_encoder.blocks.2.attn.rel_pos_h",
        "image_encoder.blocks.2.attn.rel_pos_w",
    }
    ours, theirs = target.state_dict(), source.state_dict()
    same = [key for key in ours if key not in report.converted]
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    grid = size // 8
    assert f"(1, 8, 8, 96) -> (1, {grid}, {grid}, 96)" in str(report)


def cubic_weights(before: int, after: int) -> np.ndarray:
    """[after, before] antialiased bicubic interpolation (a = -1/2) along one axis."""
    step = before / after
    width = max(step, 1.0)
    weights = np.zeros((after, before))
    for i in range(after):
        distance = np.abs((np.arange(before) + 0.5 - (i + 0.5) * step) / width)
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights[i] = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("before, after", [(64, 16), (64, 14), (8, 20)])
def test_position_embeddings_are_resampled_by_antialiased_bicubic_interpolation(
    before: int, after: int
) -> None:
    positions = torch.randn(1, before, before, 3, generator=torch.Generator().manual_seed(0))
    resampled, done = fit("image_encoder.pos_embed", positions, torch.empty(1, after, after, 3), ())
    weights = cubic_weights(before, after)
    expected = np.einsum("ia,jb,abc->ijc", weights, weights, positions[0].numpy())
    assert np.abs(resampled[0].numpy() - expected).max() <= 1e-5
    assert done.startswith("position embedding resampled")


def test_relative_positions_of_global_blocks_are_interpolated_linearly() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0]])
    key = "image_encoder.blocks.5.attn.rel_pos_h"
    resampled, _ = fit(key, line, torch.empty(5, 1), (5,))
    # Centres of the five lie at -0.2, 0.4, 1, 1.6, 2.2 of the three.
    assert resampled[:, 0].tolist() == pytest.approx([0.0, 0.4, 1.0, 1.6, 2.0])
    table = torch.randn(127, 64, generator=torch.Generator().manual_seed(1))
    resampled, _ = fit(key, table, torch.empty(31, 64), (5,))
    offset = torch.arange(16)[:, None] - torch.arange(16) + 15
    assert torch.equal(resampled[offset], get_rel_pos(16, 16, table))  # as SAM does at run time
    kept, done = fit(key, table, torch.empty(31, 64), (2,))
    assert kept is table and done == ""  # of a window: a wrong length is an error elsewhere


def test_half_precision_weights_are_converted_and_reported() -> None:
    source, target = tiny_pathway(seed=1), tiny_pathway(seed=2)
    state = {key: value.half() for key, value in source.state_dict().items()}
    report = load_vision_checkpoint(target, state)
    assert len(report.converted) == report.matched == len(state)
    assert f"{len(state)} x float16 -> float32" in str(report)
    for key, value in target.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())


# ---------------------------------------------------------------- what does not fit


def test_a_missing_tensor_is_named() -> None:
    state = dict(tiny_pathway().state_dict())
    del state["mask_decoder.iou_token.weight"], state["image_encoder.blocks.1.norm1.bias"]
    with pytest.raises(ValueError, match=r"lacks image_encoder.blocks.1.norm1.bias, mask_decoder"):
        load_vision_checkpoint(tiny_pathway(), state)


def test_a_renamed_tensor_is_named_in_both_its_names() -> None:
    state = dict(tiny_pathway().state_dict())
    state["mask_decoder.extra.weight"] = state.pop("image_encoder.blocks.1.norm1.bias")
    expected = r"lacks image_encoder.blocks.1.norm1.bias and has unexpected mask_decoder.extra.weig"
    with pytest.raises(ValueError, match=expected):
        load_vision_checkpoint(tiny_pathway(), state)


def test_an_unexpected_tensor_is_named_and_nothing_is_loaded() -> None:
    pathway = tiny_pathway(seed=3)
    before = {key: value.clone() for key, value in pathway.state_dict().items()}
    state = tiny_pathway().state_dict() | {"mask_decoder.extra.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"unexpected mask_decoder.extra.weight"):
        load_vision_checkpoint(pathway, state)
    assert all(torch.equal(value, before[key]) for key, value in pathway.state_dict().items())


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: w.index_fill(0, torch.tensor(1), float("nan")), r"holds 1 of 96 not finite"),
        (lambda w: w.index_fill(0, torch.tensor(1), -math.inf), r"holds 1 of 96 not finite"),
        (lambda w: w.to(torch.int8), r"is of torch.int8, quantised: without its scale"),
        (lambda w: w.to(torch.float8_e4m3fn), r"is of torch.float8_e4m3fn, quantised"),
        (
            lambda w: w.to(torch.complex64),
            r"is of torch.complex64: half of each number would be lost",
        ),
        (lambda w: w.to_sparse(), r"is stored as torch.sparse_coo"),
        (lambda w: w.to("meta"), r"has a shape and no values"),
    ],
    ids=["nan", "inf", "int8", "float8", "complex", "sparse", "meta"],
)
def test_a_tensor_that_is_not_plain_finite_weights_is_named_and_nothing_is_loaded(
    damage: Callable[[Tensor], Tensor], message: str
) -> None:
    key = "image_encoder.blocks.1.norm1.bias"
    pathway = tiny_pathway(seed=3)
    before = {key: value.clone() for key, value in pathway.state_dict().items()}
    state = dict(tiny_pathway().state_dict())
    state[key] = damage(state[key])
    with pytest.raises(ValueError, match=rf"the weights: {re.escape(key)} {message}"):
        load_vision_checkpoint(pathway, state)
    assert all(torch.equal(value, before[key]) for key, value in pathway.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 4, 8, 96), (8, 8, 96), (1, 4, 4, 48)])
def test_position_embeddings_of_no_square_grid_are_refused_and_not_stretched(
    shape: tuple[int, ...],
) -> None:
    state = tiny_pathway().state_dict() | {"image_encoder.pos_embed": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"pos_embed .*, expected \(1, 8, 8, 96\)"):
        load_vision_checkpoint(tiny_pathway(), state)


def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes() -> None:
    state = tiny_pathway().state_dict() | {"image_encoder.blocks.0.norm1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"blocks.0.norm1.bias \(7,\), expected \(96,\)"):
        load_vision_checkpoint(tiny_pathway(), state)


def test_an_unknown_layout_names_its_first_keys_and_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"first keys are layer1.weight; known: .*imis \(IMIS-Net"):
        detect_layout({"layer1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.module.", "net.", "sam_model.", "module.sam."]
)
def test_the_prefix_of_a_wrapper_is_taken_off(prefix: str) -> None:
    source, target = tiny_pathway(seed=1), tiny_pathway(seed=2)
    wrapped = {prefix + key: value for key, value in source.state_dict().items()}
    assert detect_layout(wrapped) == "sam"
    load_vision_checkpoint(target, wrapped)
    assert torch.equal(target.mask_decoder.iou_token.weight, source.mask_decoder.iou_token.weight)


def test_a_report_counts_equal_conversions() -> None:
    report = LoadReport(
        layout="sam",
        matched=3,
        converted={"a": "float16 -> float32", "b": "float16 -> float32"},
        missing=["c"],
        unexpected=[],
        dropped={},
    )
    assert str(report) == (
        "sam: 3 tensors loaded\n  2 x float16 -> float32\n  initial values kept for c"
    )


def test_every_layout_is_recognised_by_a_mark_of_its_own() -> None:
    keys = {
        "released_biascarevl": "SEG.prompt_encoder.no_mask_embed.weight",
        "imis": "image_encoder.sam_encoder.pos_embed",
        "transformers_sam": "vision_encoder.layers.0.attn.qkv.weight",
        "litemedsam": "image_encoder.patch_embed.seq.0.c.weight",
        "biascare": "mask_decoder.semantic_tokens.weight",
        "sam": "image_encoder.blocks.0.attn.rel_pos_h",
    }
    assert list(keys) == list(LAYOUTS)
    for name, key in keys.items():
        assert detect_layout({key: torch.zeros(1), "other": torch.zeros(1)}) == name


# ---------------------------------------------------------------- what the encoder sees


@torch.no_grad()
def test_medsam_weights_see_the_pixels_that_medsam_was_trained_on(
    shallow: None, tmp_path: Path
) -> None:
    """MedSAM has SAM's names and shapes; its program scales each image to [0, 1] by its range."""
    sam = shallow_sam(128)
    torch.save(sam.state_dict(), tmp_path / "medsam_vit_b.pth")
    image = 40 + random_image(128) // 2
    scaled = (image - image.min()) / (image.max() - image.min())
    theirs = sam.image_encoder(torch.from_numpy(scaled).float().permute(2, 0, 1)[None])
    box = torch.tensor([[20.0, 24.0, 101.0, 110.0]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
    logits, _ = sam.mask_decoder(
        theirs, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False
    )
    pathway = VisionPathway("medsam", 128).eval()
    load_vision_checkpoint(pathway, tmp_path / "medsam_vit_b.pth")
    embedding = pathway.encode_images(as_tensor(image))
    assert float((embedding - theirs).abs().max()) <= 1e-5
    ours = pathway.decode(embedding, torch.tensor([0]), prompts(BOX))
    difference = float((ours.low_res_logits - logits[:, 0]).abs().max())
    print(f"largest difference {difference:.1e} of {logits.abs().max():.1f}")
    assert difference <= 1e-5


@pytest.mark.parametrize(
    "name, vision, warned",
    [
        ("medsam_vit_b.pth", "sam_vit_b", "model.vision=medsam"),
        ("models--wanglab--medsam-vit-base", "sam_vit_b", "model.vision=medsam"),
        ("sam_vit_b_01ec64.pth", "medsam", "model.vision=sam_vit_b"),
        ("medsam_vit_b.pth", "medsam", None),
        ("sam_vit_b_01ec64.pth", "sam_vit_b", None),
        ("lite_medsam.pth", "sam_vit_b", None),
    ],
)
def test_a_file_named_like_weights_for_other_pixels_is_warned_of(
    name: str,
    vision: str,
    warned: str | None,
    shallow: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = tmp_path / name
    if not name.endswith(".pth"):
        place = place / "snapshots" / "1"
        place.mkdir(parents=True)
        torch.save(shallow_sam(64).state_dict(), place / "pytorch_model.bin")
    else:
        torch.save(shallow_sam(64).state_dict(), place)
    with caplog.at_level(logging.WARNING, logger="biascare"):
        load_vision_checkpoint(VisionPathway(vision, 64), place)
    assert (warned or "") in caplog.text and bool(caplog.text) == bool(warned)


def test_statistics_of_the_pixels_in_a_file_are_compared_with_ours(shallow: None) -> None:
    state = shallow_sam(64).state_dict()
    beside = {"pixel_mean": torch.tensor(PIXEL_MEAN), "pixel_std": torch.tensor(PIXEL_STD)}
    pathway = VisionPathway("sam_vit_b", 64)
    report = load_vision_checkpoint(pathway, state | beside)
    assert report.dropped["pixel_mean"].number == report.dropped["pixel_std"].number == 1
    with pytest.raises(ValueError, match=r"a pixel_mean of \[0\.0, 0\.0, 0\.0\], but .*123\.675"):
        load_vision_checkpoint(pathway, state | beside | {"pixel_mean": torch.zeros(3, 1, 1)})


# ---------------------------------------------------------------- from the configuration's key


def test_a_run_starts_from_a_foreign_file_and_says_what_it_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_pathway(32)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, logger="biascare"):
        model = build_network(
            vision="tiny", image_size=IMAGE_SIZE, vision_weights=str(tmp_path / "weights.pth")
        )
    assert torch.equal(
        model.vision.mask_decoder.iou_token.weight, source.mask_decoder.iou_token.weight
    )
    assert "weights.pth" in caplog.text and "position embedding resampled" in caplog.text


def test_a_folder_of_foreign_weights_is_told_from_an_export(tmp_path: Path) -> None:
    source = tiny_pathway()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    model = build_network(vision="tiny", image_size=IMAGE_SIZE, vision_weights=str(tmp_path))
    assert torch.equal(
        model.vision.mask_decoder.iou_token.weight, source.mask_decoder.iou_token.weight
    )


# ---------------------------------------------------------------- reading files

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def same(state: dict[str, Tensor]) -> bool:
    return state.keys() == WEIGHTS.keys() and all(torch.equal(state[k], WEIGHTS[k]) for k in state)


@pytest.mark.parametrize(
    "wrapper", [None, "state_dict", "model_state_dict", "model", "module", "net"]
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickled_state_dict_is_read_alone_and_inside_a_wrapper(
    tmp_path: Path, wrapper: str | None, suffix: str
) -> None:
    content = WEIGHTS if wrapper is None else {wrapper: WEIGHTS, "epoch": 3, "note": "best"}
    torch.save(content, tmp_path / f"w{suffix}")
    assert same(read_state_dict(tmp_path / f"w{suffix}"))
    assert same(read_state_dict(tmp_path))


def test_other_tensors_beside_the_ones_that_are_read_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    average = {key: value + 1 for key, value in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "ema": average, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, logger="biascare"):
        assert same(read_state_dict(tmp_path / "w.pth"))
    assert "'model' is read; tensors stand under ema too" in caplog.text
    assert "optimizer" not in caplog.text


def test_the_older_pickle_format_is_read_too(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "old.pth"))


def test_safetensors_are_read_from_a_file_and_preferred_in_a_folder(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert same(read_state_dict(tmp_path / "model.safetensors"))
    assert same(read_state_dict(str(tmp_path)))


def test_a_file_is_read_by_what_it_holds_or_says_how_to_name_it(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "downloaded.pth")
    assert same(read_state_dict(tmp_path / "downloaded.pth"))
    torch.save(WEIGHTS, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"torch\.save wrote it: rename it to w\.pth"):
        read_state_dict(tmp_path / "w.safetensors")


def test_a_plain_pickle_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": np.zeros(3)}))
    with pytest.raises(ValueError, match=r"a plain pickle, which torch\.save did not write"):
        read_state_dict(tmp_path / "w.pth")


def test_what_programs_pickle_beside_their_weights_is_told_in_words(tmp_path: Path) -> None:
    content = {"model": WEIGHTS, "args": argparse.Namespace(lr=1), "best": np.float64(0.9)}
    torch.save(content, tmp_path / "w.pth")
    expected = r"argparse\.Namespace \(options of the program.*scalar \(single numbers of numpy\)"
    with pytest.raises(ValueError, match=expected):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_joined_by_their_index(tmp_path: Path, kind: str) -> None:
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    table = {}
    for number, (key, value) in enumerate(WEIGHTS.items(), 1):
        shard = f"shard-{number}.{kind}"
        save = save_file if kind == "safetensors" else torch.save
        save({key: value}, tmp_path / shard)
        table[key] = shard
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    assert same(read_state_dict(tmp_path))
    index.write_text(json.dumps({"weight_map": table | {"c": "shard-1." + kind}}))
    with pytest.raises(ValueError, match="lack c;"):
        read_state_dict(tmp_path)
    (tmp_path / f"shard-2.{kind}").unlink()
    with pytest.raises(ValueError, match=rf"names shard-2.{kind}, expected files that lie beside"):
        read_state_dict(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": f"../w.{kind}"}}))
    with pytest.raises(ValueError, match=r"names \.\./w"):
        read_state_dict(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index of shards"):
        read_state_dict(tmp_path)


class Harmless:
    """Any class of a training program."""


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_foreign_objects_is_refused_with_their_names(
    tmp_path: Path, zipped: bool
) -> None:
    content = WEIGHTS | {"args": Harmless()}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"pickled objects.*test_vision_weights\.Harmless.*refused"
    ):
        read_state_dict(tmp_path / "w.pth")


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("trap-was-sprung"),)


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "trap": Trap()}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(ValueError, match=name):
            read_state_dict(tmp_path / name)
    assert not Path("trap-was-sprung").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_empty_and_truncated_files_are_told_from_whole_ones(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for length in (1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.\w+.*(download|truncated)"):
            read_state_dict(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is empty \(0 bytes\)"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"version https://git-lfs", b"\x80"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable checkpoint") as refused:
        read_state_dict(tmp_path / "w.pth")
    assert "it begins with b'" in str(refused.value) or content == b"\x80"
    assert "Re-running" not in str(refused.value), "torch's advice to open it unsafely"


@pytest.mark.parametrize(
    "content, holds", [({"epoch": 3}, "entries epoch"), ([1.0], "list"), ({}, "dict")]
)
def test_a_file_without_named_tensors_says_what_it_holds(
    tmp_path: Path, content: Any, holds: str
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"no state dict but {holds}"):
        read_state_dict(tmp_path / "w.pth")


def test_a_place_without_one_clear_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        read_state_dict(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        read_state_dict(tmp_path)
    for name in ("one.pth", "two.pth"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(ValueError, match=r"several files \(one.pth, two.pth\); name one"):
        read_state_dict(tmp_path)
