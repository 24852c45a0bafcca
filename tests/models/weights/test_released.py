"""A checkpoint laid out as BiasCareVL's authors released theirs fills our model exactly."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
)
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

from biascare.data.loader import collate
from biascare.interfaces import Batch, Prompts
from biascare.models.export_folder import build_network, open_network, save_network
from biascare.models.language.pathway import LORA_TARGETS, MLLMPathway
from biascare.models.network import DualPathNetwork
from biascare.models.vision.pathway import PIXEL_MEAN, PIXEL_STD
from biascare.models.weights.released import load_released, merge_adapter, released_to_ours
from tests.tiny import IMAGE_SIZE, pad_token_id, segmentation_sample, tiny_chat, tiny_model

ROOT = Path(__file__).parents[3]

ALPHA = 4.0
"""Of the adapters."""

NUM_ROWS = 512

HEADS = 4
"""Of the query attention."""

POINTS = Prompts(torch.tensor([[[30.0, 18.0], [50.5, 40.0]]]), torch.tensor([[1, 0]]))

ADAPTERS: dict[str, Any] = {
    "merged": None,
    # By bare names, which the vision tower's MLP has too.
    "no k_proj": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "q and v": ["q_proj", "v_proj"],
    "ours": LORA_TARGETS,
}
"""Layers that the LoRA of a checkpoint adapts."""


class AuthorsProgram(nn.Module):
    """What the authors train, put together from the packages they use and none of our modules:
    transformers' Qwen2.5-VL cut to its tokenizer, an IMIS-Net of segment_anything's parts without a
    text tower, and the query with its attention and projection."""

    def __init__(self, folder: Path, *, lora: Any = None):
        super().__init__()
        torch.manual_seed(1)
        base = AutoModelForImageTextToText.from_pretrained(folder)
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
        if lora:
            settings = LoraConfig(r=2, lora_alpha=int(ALPHA), target_modules=lora)
            with warnings.catch_warnings():  # peft asks transformers for an old name
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                base = get_peft_model(base, settings)
        self.VL = base
        width = base.config.get_text_config().hidden_size
        self.add11 = nn.Parameter(torch.zeros(1, 1, width))
        self.add12 = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.text_fc = nn.Linear(width, 96)
        self.SEG = nn.Module()
        encoder = ImageEncoderViT(
            img_size=IMAGE_SIZE,
            patch_size=8,
            embed_dim=96,
            depth=3,
            num_heads=3,
            out_chans=96,
            norm_layer=lambda size: nn.LayerNorm(size, eps=1e-6),
            use_rel_pos=True,
            window_size=8,
            global_attn_indexes=(2,),
        )
        self.SEG.image_encoder = nn.Module()
        self.SEG.image_encoder.sam_encoder = encoder
        self.SEG.image_encoder.neck, encoder.neck = encoder.neck, nn.Identity()
        size = (IMAGE_SIZE, IMAGE_SIZE)
        self.SEG.prompt_encoder = PromptEncoder(96, (8, 8), size, 16)
        decoder = MaskDecoder(transformer_dim=96, transformer=TwoWayTransformer(2, 96, 2, 256))
        self.SEG.mask_decoder = decoder
        for name, parameter in self.named_parameters():
            # Far from what either program starts with, so that a tensor left behind shows.
            nn.init.normal_(parameter, std=0.2 if "SEG" in name else 0.1)
        self.eval()

    def state(self) -> dict[str, Tensor]:
        """Their state dict, with the names of transformers 4 and their second names."""
        named = {}
        for name, tensor in self.state_dict().items():
            name = name.replace("model.visual.", "visual.").replace(
                "model.language_model.", "model."
            )
            if "SEG.image_encoder" in name:  # timm's names
                name = re.sub(r"mlp\.lin([12])", r"mlp.fc\1", name)
            named[name] = tensor
            if name.startswith("VL.") and "lm_head" not in name:
                inside = name.removeprefix("VL.").removeprefix("base_model.model.")
                alias = re.sub(r"^visual\.", "vision.", re.sub(r"^model\.", "language.", inside))
                named["VL." + name[3 : -len(inside)] + alias] = tensor
        return named

    @torch.no_grad()
    def outputs(self, batch: Batch, which: int | None = None) -> list[Tensor]:
        """Hidden states [1, L, d], pooled text [1, 1, C] and the logits of one mask (None: the best
        of masks 1 to 3, as they do it), for one row with the clicks of `POINTS`."""
        assert batch.images is not None and batch.prompt_mask is not None
        hidden = self.VL(**batch.mllm_inputs, output_hidden_states=True).hidden_states[-1]
        unread = ~batch.prompt_mask
        pooled = self.add12(self.add11, hidden, hidden, key_padding_mask=unread)[0]
        text = self.text_fc(pooled)
        mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
        encoder = self.SEG.image_encoder
        embedding = encoder.neck(encoder.sam_encoder((batch.images.float() - mean) / std))
        clicks = POINTS.point_coords, POINTS.point_labels
        sparse, dense = self.SEG.prompt_encoder(clicks, None, None)
        masks, quality = self.SEG.mask_decoder.predict_masks(
            embedding, self.SEG.prompt_encoder.get_dense_pe(), torch.cat([sparse, text], 1), dense
        )
        return [hidden, text, masks[:, which or 1 + int(quality[0, 1:].argmax())]]


@pytest.fixture(scope="module")
def base(tiny_mllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen's folders are: with more rows of embeddings than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("base") / "mllm"
    shutil.copytree(tiny_mllm, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.resize_token_embeddings(NUM_ROWS)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ADAPTERS)
def program(request: pytest.FixtureRequest, base: Path) -> AuthorsProgram:
    """Of every kind in `ADAPTERS`; read only."""
    return AuthorsProgram(base, lora=ADAPTERS[request.param])


@pytest.fixture(scope="module")
def merged(base: Path) -> AuthorsProgram:
    return AuthorsProgram(base)


def ours(folder: Path, *, lora: bool = False) -> DualPathNetwork:
    model = tiny_model(folder, seed=2, multimask="always", query_heads=HEADS)
    if not lora:
        model.mllm = MLLMPathway.load(str(folder))
    return model.eval()


def one_row(folder: Path) -> Batch:
    chat = tiny_chat(folder)
    return collate([segmentation_sample(chat)], 0, pad_token_id(chat))


@torch.no_grad()
def outputs(model: DualPathNetwork, batch: Batch) -> list[Tensor]:
    features = model.encode(batch)
    assert batch.row_image is not None
    prediction = model.decode_masks(features, POINTS, batch.row_image)
    return [features.hidden_states, features.text_embedding, prediction.low_res_logits]


def worst_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("lora", [True, False], ids=["with LoRA", "without LoRA"])
def test_a_model_filled_from_the_file_computes_what_the_authors_program_does(
    lora: bool, program: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    state = program.state()
    peft = any("lora_A" in name for name in state)
    file = tmp_path / ("mp_rank_00_model_states.pt" if peft else "pytorch_model.bin")
    torch.save({"module": state, "global_steps": 7} if peft else state, file)
    model = ours(base, lora=lora)
    if lora:  # a fresh adapter changes nothing
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    report = load_released(model, file, lora_alpha=ALPHA)
    print(report)
    assert model.mllm is not None
    num_tokens = len(tiny_chat(base).tokenizer)
    assert model.mllm.base.lm_head.weight.shape[0] == num_tokens < NUM_ROWS
    assert f"{NUM_ROWS} -> {num_tokens} rows" in str(report)
    batch = one_row(base)
    worst = worst_difference(outputs(model, batch), program.outputs(batch))
    print(f"largest difference {worst:.1e} of the largest value")
    assert worst <= 1e-4
    assert report.dropped["VL.vision"].number > 0 and report.dropped["VL.language"].number > 0
    kept = lora and len([name for name in state if "lora_A" in name]) == 2 * 2 * 7
    folded = [how for how in report.converted.values() if "folded in, alpha 4" in how]
    assert bool(folded) == (peft and not kept)
    assert bool([name for name in report.missing if "lora" in name]) == (lora and not kept)


def test_every_tensor_goes_to_exactly_one_part(program: AuthorsProgram, base: Path) -> None:
    state = program.state()
    parts = released_to_ours(state)
    assert parts.mllm.keys() == MLLMPathway.load(str(base)).base.state_dict().keys()
    assert len(parts.adapter) == len([name for name in state if ".lora_" in name]) / 2  # aliases
    assert len(parts.query_attention) == 7
    assert len(parts.seg) == len([name for name in state if name.startswith("SEG.")])
    used = sum(len(p) for p in (parts.mllm, parts.adapter, parts.seg, parts.query_attention))
    assert used + sum(d.number for d in parts.dropped.values()) == len(state)


def test_the_head_of_a_classification_is_left_out_and_reported(
    merged: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    state = merged.state() | {
        "cls_head.0.weight": torch.ones(7, 64),
        "cls_head_bias": torch.ones(7),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = load_released(ours(base), tmp_path / "pytorch_model.bin")
    assert report.dropped["cls_head"].number == 2
    assert "left out 2 x cls_head: classes of a fine-tuning" in str(report)


def test_token_tables_that_disagree_or_lack_the_image_token_are_refused(
    merged: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    state = merged.state()
    head = state["VL.lm_head.weight"]
    for change in (
        {"VL.lm_head.weight": head[:-1].clone()},
        {"VL.lm_head.weight": head[:3].clone()}
        | {"VL.model.embed_tokens.weight": state["VL.model.embed_tokens.weight"][:3].clone()},
    ):
        torch.save(state | change, tmp_path / "w.bin")
        with pytest.raises(ValueError, match=r"token tables .* name the base it was trained on"):
            load_released(ours(base), tmp_path / "w.bin")


def test_a_number_that_is_not_finite_is_named_as_in_the_file(
    merged: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    torch.save(merged.state() | {"text_fc.bias": torch.full((96,), torch.nan)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"w\.bin: text_fc\.bias holds 96 of 96 not finite"):
        load_released(ours(base), tmp_path / "w.bin")


def test_a_filled_model_is_only_exported_whole(
    merged: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    torch.save(merged.state(), tmp_path / "w.bin")
    model = ours(base, lora=True)
    load_released(model, tmp_path / "w.bin")
    with pytest.raises(ValueError, match="merge=True"):
        save_network(model, tmp_path / "export")


def test_names_and_shapes_of_the_real_query_attention_are_known() -> None:
    with torch.device("meta"):
        attention = torch.nn.MultiheadAttention(3584, 8, batch_first=True)
        state = {"add11": torch.empty(1, 1, 3584), "text_fc.weight": torch.empty(768, 3584)}
        state["text_fc.bias"] = torch.empty(768)
    state |= {f"add12.{name}": tensor for name, tensor in attention.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in released_to_ours(state).query_attention.items()}
    assert found == {
        "queries": (1, 1, 3584),
        "attention.in_proj_weight": (3 * 3584, 3584),
        "attention.in_proj_bias": (3 * 3584,),
        "attention.out_proj.weight": (3584, 3584),
        "attention.out_proj.bias": (3584,),
        "projection.weight": (768, 3584),
        "projection.bias": (768,),
    }


def test_an_adapter_is_folded_in_as_its_definition_says() -> None:
    # W + (alpha / r) B A with alpha 4 and r 2: the change is 2 * [[1], [0]] [[1, 2]] + 2 * 0
    weight = {"m.weight": torch.tensor([[1.0, 1.0], [1.0, 1.0]])}
    adapter = {
        "m.lora_A": torch.tensor([[1.0, 2.0], [5.0, 5.0]]),
        "m.lora_B": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    }
    merged = merge_adapter(weight, adapter, lora_alpha=4)
    assert torch.equal(merged["m.weight"], torch.tensor([[3.0, 5.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"adapter of m lacks its lora_B"):
        merge_adapter(weight, {"m.lora_A": adapter["m.lora_A"]}, 4)


def test_copies_that_peft_trained_replace_the_originals() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    state = {
        "base_model.model.text_fc.original_module.bias": old,
        "base_model.model.text_fc.modules_to_save.default.bias": new,
    }
    parts = released_to_ours(state)
    assert parts.query_attention == {"projection.bias": new}
    assert parts.dropped["original_module"].number == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (("add", "VL.extra.weight"), r"1 tensors are unknown \(VL\.extra\.weight\)"),
        (("drop", "text_fc.bias"), r"query attention .* lacks projection\.bias"),
        (("drop", "VL.lm_head.weight"), r"MLLM .* lacks lm_head\.weight"),
        (("cut", "add11"), r"query attention .* queries has shape .*, expected \(1, 1, 64\)"),
        (("drop", "SEG.prompt_encoder.no_mask_embed.weight"), r"lacks .*no_mask_embed"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    change: tuple[str, str], message: str, merged: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    state = merged.state()
    how, name = change
    if how == "add":
        state[name] = torch.ones(1)
    elif how == "cut":
        state[name] = state[name][..., :-1].clone()
    else:
        del state[name]
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = ours(base, lora=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_released(model, tmp_path / "pytorch_model.bin")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_without_language_pathway_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build the model with an MLLM"):
        load_released(tiny_model(None), tmp_path / "model.pt")


def test_the_export_program_makes_a_portable_folder_of_a_released_file(
    merged: AuthorsProgram, base: Path, tmp_path: Path
) -> None:
    torch.save(merged.state(), tmp_path / "pytorch_model.bin")
    command = [sys.executable, "scripts/export.py", str(tmp_path / "pytorch_model.bin")]
    command += ["--output", str(tmp_path / "export"), "--dtype", "fp32"]
    sizes = f"--vision tiny --image-size {IMAGE_SIZE} --query-heads {HEADS}".split()

    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--mllm" in refused.stderr
    done = subprocess.run(
        [*command, "--mllm", str(base), *sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    assert "released BiasCareVL" in done.stdout
    assert "weights of its authors" in (tmp_path / "export" / "README.md").read_text()
    opened = open_network(tmp_path / "export")[0].eval()
    batch = one_row(base)
    # An architecture without candidates draws their mask 1: mask 0 was never trained.
    assert worst_difference(outputs(opened, batch), merged.outputs(batch, which=1)) <= 1e-4


def test_a_joint_export_starts_the_query_attention_of_a_new_run_too(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    trained = tiny_model(tiny_mllm, seed=1)
    assert trained.query_attention is not None
    save_network(trained, tmp_path)
    sizes: dict[str, Any] = {"vision": "tiny", "image_size": trained.vision.image_size}
    sizes |= {"mllm": str(tiny_mllm), "vision_weights": str(tmp_path)}
    heads, wanted = trained.query_attention.num_heads, trained.query_attention.queries
    start = build_network(query_heads=heads, **sizes)
    other = build_network(query_heads=2 * heads, **sizes)
    assert start.query_attention is not None and other.query_attention is not None
    assert torch.equal(start.query_attention.queries, wanted)
    assert not torch.equal(other.query_attention.queries, wanted)
