"""The image encoder: segment_anything's numbers and gradients, for every way windows can be cut."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from biascare.config import load_config
from biascare.models.language.pathway import LoraSettings, MLLMPathway
from biascare.models.vision import relative_attention as attention_module
from biascare.models.vision.encoder import ImageEncoder, token_layout, window_groups
from biascare.models.vision.pathway import VisionPathway
from biascare.models.vision.relative_attention import (
    CpuAttention,
    Window,
    attend,
    padding_logit,
    position_views,
)
from tests.models.language.test_mllm import mixed_batch
from tests.tiny import wake

SIZES = {
    "windows that fill the grid": (128, 8, 8),
    "a grid cut at both edges": (96, 8, 8),
    "a last row and column of one token": (72, 8, 8),
    "a grid smaller than the window": (64, 8, 14),
    "the grid and window of SAM at 256 pixels": (256, 16, 14),
}


def both(
    image_size: int, patch_size: int, window_size: int, **sizes: Any
) -> tuple[ImageEncoder, ImageEncoderViT]:
    """Ours and segment_anything's with the same weights, none of them zero."""
    settings: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": patch_size,
        "window_size": window_size,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "out_chans": 16,
        "global_attn_indexes": (1,),
    } | sizes
    torch.manual_seed(0)
    ours = ImageEncoder(**settings)
    theirs = ImageEncoderViT(
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, **settings
    )
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1 or "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(encoder: ImageEncoder, num_images: int = 2) -> Tensor:
    size = encoder.img_size
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(encoder: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of the images, for a loss that weighs each output differently."""
    x = x.clone().requires_grad_()
    out = encoder(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    named = dict(encoder.named_parameters()) | {"images": x}
    found = torch.autograd.grad((out * weight).mean(), list(named.values()))
    return dict(zip(named, found, strict=True))


def largest_relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in theirs)


@pytest.mark.parametrize("case", SIZES)
def test_outputs_equal_segment_anythings(case: str) -> None:
    ours, theirs = both(*SIZES[case])
    x = images(ours)
    with torch.no_grad():
        difference = float((ours(x) - theirs(x)).abs().max())
    trained = float((ours(x) - theirs(x)).detach().abs().max())
    print(f"{case}: largest difference {difference:.1e}, with gradients {trained:.1e}")
    assert max(difference, trained) <= 1e-5


@pytest.mark.parametrize("case", SIZES)
def test_gradients_of_all_parameters_and_of_the_images_equal_segment_anythings(case: str) -> None:
    ours, theirs = both(*SIZES[case])
    x = images(ours)
    difference = largest_relative_difference(gradients(ours, x), gradients(theirs, x))
    print(f"{case}: largest relative difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("num_queries", [1, 16, 40])
def test_attention_in_chunks_of_queries_gives_the_same_numbers_and_gradients(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both(96, 8, 8)  # 12 x 12 tokens
    x = images(ours)
    monkeypatch.setattr(attention_module, "MAX_QUERIES", num_queries)
    with torch.no_grad():
        assert float((ours(x) - theirs(x)).abs().max()) <= 1e-5
    assert largest_relative_difference(gradients(ours, x), gradients(theirs, x)) <= 1e-5


@pytest.mark.parametrize("architecture", ["sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_every_sam_has_the_names_and_shapes_of_its_checkpoint(architecture: str) -> None:
    with torch.device("meta"):
        ours = VisionPathway(architecture, 1024).image_encoder
        theirs = ImageEncoderViT(
            img_size=1024,
            embed_dim=ours.pos_embed.shape[-1],
            depth=len(ours.blocks),
            num_heads=ours.blocks[0].attn.num_heads,
            use_rel_pos=True,
            window_size=14,
            global_attn_indexes=[i for i, b in enumerate(ours.blocks) if not b.attn.window],
        )
        assert ours(torch.empty(1, 3, 1024, 1024)).shape == (1, 256, 64, 64)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_weights_load_strictly_in_both_directions() -> None:
    ours, theirs = both(96, 8, 8)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_a_seed_gives_the_random_weights_that_segment_anything_gives() -> None:
    settings: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2}
    settings |= {"num_heads": 3, "out_chans": 8, "window_size": 4, "global_attn_indexes": (1,)}
    torch.manual_seed(7)
    ours = ImageEncoder(**settings).state_dict()
    torch.manual_seed(7)
    theirs = ImageEncoderViT(use_rel_pos=True, **settings).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_grid_of_16_in_windows_of_14_has_four_shapes_of_windows() -> None:
    shapes = [(g.rows, g.cols, g.down * g.across) for g in window_groups((16, 16), 14)]
    assert shapes == [(14, 14, 1), (14, 2, 1), (2, 14, 1), (2, 2, 1)]
    assert [(g.rows, g.cols, g.down * g.across) for g in window_groups((64, 64), 14)] == [
        (14, 14, 16),
        (14, 8, 4),
        (8, 14, 4),
        (8, 8, 1),
    ]
    assert [(g.rows, g.cols) for g in window_groups((4, 4), 14)] == [(4, 4)]


def test_tokens_of_a_window_are_neighbours_and_groups_come_one_after_the_other() -> None:
    layout = token_layout(2, (3, 3), 2, torch.device("cpu"))
    assert layout.order.tolist() == [
        *(0, 1, 3, 4, 9, 10, 12, 13),  # the whole windows of both images
        *(2, 5, 11, 14),  # columns cut off
        *(6, 7, 15, 16),  # rows cut off
        *(8, 17),  # corners
    ]
    assert torch.equal(layout.order[layout.inverse], torch.arange(18))


def test_position_views_read_the_distance_of_every_query_to_every_key() -> None:
    span, rows, cols = 4, 3, 2
    window = Window(span, rows, cols)
    products = torch.arange(rows * cols * 2 * (2 * span - 1)).view(1, rows * cols, -1)
    by_row, by_col = position_views(products, window, 0)
    for i in range(rows):
        for j in range(cols):
            mine = products[0, i * cols + j]
            for k in range(span):
                assert by_row[0, i, j, k] == mine[k - i + span - 1]
                assert by_col[0, i, j, k] == mine[2 * span - 1 + k - j + span - 1]
    lower = position_views(products[:, cols:].clone(), window, 1)
    assert torch.equal(lower[0], by_row[:, 1:]) and torch.equal(lower[1], by_col[:, 1:])


@pytest.mark.parametrize("rows, cols", [(2, 3), (3, 1), (2, 2)])
def test_one_padding_logit_weighs_as_much_as_all_padded_positions(rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(0)
    by_row, by_col = (5 * torch.randn(4, 3, generator=generator) for _ in range(2))
    logits = by_row[:, :, None] + by_col[:, None, :]
    padded = torch.ones(3, 3, dtype=torch.bool)
    padded[:rows, :cols] = False
    expected = logits[:, padded].exp().sum(-1).log()
    found = padding_logit(by_row, by_col, Window(3, rows, cols))[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows, cols", [(4, 4), (4, 3), (2, 4), (2, 1)])
def test_gradients_written_by_hand_equal_those_of_autograd(rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    qkv, padding, table = random(2, rows * cols, 3, 2, 3), random(2, 2, 3), random(14, 3)
    window = Window(4, rows, cols)
    out = CpuAttention.apply(qkv, padding, table, window)
    assert torch.allclose(out, attend(qkv, padding, table, window))
    wanted = [qkv, padding, table] if window.padded else [qkv, table]
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    mine = torch.autograd.grad(out, wanted, grad)
    reference = torch.autograd.grad(attend(qkv, padding, table, window), wanted, grad)
    for ours, theirs in zip(mine, reference, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)  # the padding logit is taken in fp32


def test_fewer_products_are_computed_than_segment_anything_computes() -> None:
    with torch.device("meta"):
        ours = VisionPathway("sam_vit_b", 256).image_encoder
        theirs = ImageEncoderViT(
            img_size=256, use_rel_pos=True, window_size=14, global_attn_indexes=(2, 5, 8, 11)
        )
        x = torch.empty(1, 3, 256, 256)
    totals = []
    for encoder in (ours, theirs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(x)
        totals.append(counter.get_total_flops())
    print(f"{totals[0] / 1e9:.1f} against {totals[1] / 1e9:.1f} GFLOP")
    assert totals[0] < totals[1] / 1.45


def test_bf16_is_as_close_to_fp32_as_segment_anythings_bf16() -> None:
    ours, theirs = both(256, 16, 14)
    x = images(ours)
    with torch.no_grad():
        exact = theirs(x)
        errors = [
            float((m.bfloat16()(x.bfloat16()).float() - exact).norm() / exact.norm())
            for m in (ours, theirs)
        ]
    trained = float((ours(x.bfloat16()).detach().float() - exact).norm() / exact.norm())
    print(f"relative error {errors[0]:.4f} and training {trained:.4f}, theirs {errors[1]:.4f}")
    assert max(errors[0], trained) < 1.25 * errors[1]


def test_bf16_gradients_are_close_to_those_in_fp32() -> None:
    ours, _ = both(96, 8, 8)
    x = images(ours)
    exact = gradients(ours, x)
    rounded = gradients(ours.bfloat16(), x.bfloat16())
    for name, value in exact.items():
        error = float((rounded[name].float() - value).norm() / value.norm())
        assert error < 0.1, f"{name}: {error:.3f}"


def test_autocast_trains_with_finite_gradients_near_those_in_fp32() -> None:
    ours, _ = both(96, 8, 8)
    x = images(ours)
    exact = gradients(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(ours, x)
    for name, value in exact.items():
        assert float((cast[name] - value).norm() / value.norm()) < 0.1, name


def test_images_of_another_size_are_refused() -> None:
    ours, _ = both(96, 8, 8)
    with pytest.raises(ValueError, match="got 64 x 96 pixels, expected 96 x 96; resize them"):
        ours(torch.zeros(1, 3, 64, 96))


# ---------------------------------------------------------------- parameters read by their owner


def test_no_module_reads_a_parameter_while_its_owner_is_not_running() -> None:
    """ZeRO-3 gathers parameters when their own module is called and frees them after.

    Here "free" parameters are filled with NaN; a read outside their module's forward shows.
    """
    ours, theirs = both(96, 8, 8)
    x = images(ours)
    with torch.no_grad():
        expected = theirs(x)
    values = {p: p.detach().clone() for p in ours.parameters()}

    def own(module: nn.Module) -> list[nn.Parameter]:
        return list(module.parameters(recurse=False))

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in own(module):
            parameter.data.copy_(values[parameter])

    def free(module: nn.Module, *_: Any) -> None:
        for parameter in own(module):
            parameter.data.fill_(float("nan"))

    for module in ours.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(free)
        free(module)
    with torch.no_grad():
        assert torch.allclose(ours(x), expected, atol=1e-5)


# ---------------------------------------------------------------- recomputed activations


def test_recomputed_blocks_give_the_same_gradients_in_training_only() -> None:
    ours, _ = both(96, 8, 8)
    x = images(ours)
    calls: list[int] = []
    ours.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    stored = gradients(ours.train(), x)
    ours.activation_checkpointing = True
    recomputed = gradients(ours, x)
    assert len(calls) == 1 + 2  # it was really computed twice
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)
    gradients(ours.eval(), x)
    assert len(calls) == 1 + 2 + 1


def test_recomputed_language_layers_repeat_their_dropout(mllm_folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        mllm = MLLMPathway.load(
            str(mllm_folder), lora=LoraSettings(2, 4, 0.5), activation_checkpointing=checkpointing
        )
        wake(mllm)
        batch = mixed_batch(mllm_folder)
        calls: list[int] = []
        layer = mllm.base.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        hidden = mllm.train().hidden_states(batch.mllm_inputs, batch.image_slots)
        hidden.square().mean().backward()
        assert len(calls) == 1 + checkpointing
        found.append([hidden.detach(), *(p.grad for p in mllm.adapter_parameters())])
    for stored, recomputed in zip(*found, strict=True):
        assert stored is not None and recomputed is not None
        assert torch.allclose(stored, recomputed, atol=1e-6)
    with torch.no_grad():  # the dropout had an effect that another draw would have shown
        other = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    assert not torch.allclose(other, found[0][0], atol=1e-3)


# ---------------------------------------------------------------- the LLM's attention kernel


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(mllm_folder: Path) -> None:
    batch = mixed_batch(mllm_folder)
    hidden = [
        MLLMPathway.load(str(mllm_folder), attention=attention)
        .eval()
        .hidden_states(batch.mllm_inputs, batch.image_slots)[
            batch.mllm_inputs["attention_mask"] > 0
        ]
        for attention in ("sdpa", "eager")
    ]
    difference = float((hidden[0] - hidden[1]).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


def test_flash_attention_without_its_package_is_refused_before_weights_are_read(
    tiny_mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biascare.models.language.pathway.is_flash_attn_2_available", lambda: False)
    folder = tmp_path / "model"
    shutil.copytree(tiny_mllm, folder)
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"flash_attention_2.*flash-attn.*sdpa"):
        MLLMPathway.load(str(folder), attention="flash_attention_2")


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test does not count against another's limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiling_changes_nothing(backend: str) -> None:
    ours, _ = both(72, 8, 8, depth=2)
    x = images(ours, 1)
    names, eager = list(ours.state_dict()), gradients(ours.train(), x)
    ours.compile(backend=backend, fullgraph=True)
    compiled = gradients(ours, x)
    difference = largest_relative_difference(compiled, eager)
    print(f"{backend}: largest relative difference {difference:.1e}")
    assert difference <= 1e-5
    assert list(ours.state_dict()) == names


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_encoder_is_one_graph_with_the_same_gradients_and_names() -> None:
    assert_compiling_changes_nothing("eager")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for inductor")
def test_compiled_code_gives_the_same_gradients() -> None:
    assert_compiling_changes_nothing("inductor")


def test_train_compile_compiles_the_image_encoder_alone_and_keeps_every_name(
    tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from biascare.runs.build import build_network

    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{segmentation: [{{path: {tiny_records}}}], ratio: [1, 0]}}\n"
        "model: {vision: tiny, image_size: 64}\noptim: {warmup_steps: 0}\n"
        f"train: {{stage: vision, max_steps: 1, output_dir: {tmp_path / 'out'}, precision: fp32}}\n"
    )
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    plain = build_network(load_config(path))
    assert compiled == []
    model = build_network(load_config(path, ["train.compile=true"]))
    assert compiled == ["ImageEncoder"]
    assert list(model.state_dict()) == list(plain.state_dict())
