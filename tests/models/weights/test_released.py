"""A checkpoint laid out as BiasCareVL's authors released theirs fills our model exactly."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from biascare.models.export_folder import build_network, open_network, save_network
from biascare.models.language.pathway import MLLMPathway
from biascare.models.network import DualPathNetwork
from biascare.models.weights.released import load_released, merge_adapter, released_to_ours
from tests.tiny import (
    LORA,
    tiny_batch,
    tiny_chat,
    tiny_model,
)

ROOT = Path(__file__).parents[3]

ALPHA = 4.0
"""Of `tiny_model`'s adapter."""


def written_by_them(model: DualPathNetwork, *, peft: bool) -> dict[str, Tensor]:
    """A released state: merged, or with the adapter and PEFT's names; aliases included."""
    assert model.mllm is not None and model.query_attention is not None
    pathway = model.mllm.model if peft else copy.deepcopy(model.mllm.model).merge_and_unload()
    state = {}
    for name, tensor in pathway.state_dict().items():
        head = "base_model.model." if peft else ""
        rest = name.removeprefix("base_model.model.")
        old = rest.replace("model.visual.", "visual.", 1)
        old = old.replace("model.language_model.", "model.", 1)
        state[f"VL.{head}{old}"] = tensor
        alias = old.replace("visual.", "vision.", 1).replace("model.", "language.", 1)
        if not old.startswith("lm_head"):
            state[f"VL.{head}{alias}"] = tensor
    for name, tensor in model.vision.state_dict().items():
        theirs = re.sub(r"mlp\.lin([12])", r"mlp.fc\1", name)
        theirs = re.sub(
            r"mask_decoder\.(semantic_tokens|text_output)\.weight", r"mask_decoder.\1", theirs
        )
        if theirs.startswith("image_encoder.") and ".neck." not in theirs:
            theirs = theirs.replace("image_encoder.", "image_encoder.sam_encoder.", 1)
        if "transformer.layers" in theirs:
            theirs = re.sub(r"mlp\.fc([12])", r"mlp.lin\1", theirs)
        state[f"SEG.{theirs}"] = tensor
    query = model.query_attention
    state["add11"] = query.queries
    state |= {f"add12.{name}": tensor for name, tensor in query.attention.state_dict().items()}
    state |= {f"text_fc.{name}": tensor for name, tensor in query.projection.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def trained(tiny_mllm: Path) -> DualPathNetwork:
    """What the authors trained; read only."""
    model = tiny_model(tiny_mllm, seed=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def other(folder: Path, *, lora: bool) -> DualPathNetwork:
    model = tiny_model(folder, seed=2)
    if not lora:
        model.mllm = MLLMPathway.load(str(folder))
    return model.eval()


@torch.no_grad()
def outputs(model: DualPathNetwork, folder: Path, records: Path) -> list[Tensor]:
    batch = tiny_batch(records, tiny_chat(folder))
    features, prediction = model(batch)
    assert prediction is not None
    read = batch.mllm_inputs["attention_mask"].bool()
    return [features.hidden_states[read], features.text_embedding, prediction.mask_logits]


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "merged"])
@pytest.mark.parametrize("lora", [True, False], ids=["with LoRA", "without LoRA"])
def test_a_model_filled_from_the_file_computes_what_was_trained(
    peft: bool,
    lora: bool,
    trained: DualPathNetwork,
    tiny_mllm: Path,
    tiny_records: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / ("mp_rank_00_model_states.pt" if peft else "pytorch_model.bin")
    state = written_by_them(trained, peft=peft)
    torch.save({"module": state, "global_steps": 7} if peft else state, file)
    model = other(tiny_mllm, lora=lora)
    if lora and not peft:  # a fresh adapter changes nothing
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    report = load_released(model, file, lora_alpha=ALPHA)
    print(report)
    pairs = zip(
        outputs(model, tiny_mllm, tiny_records),
        outputs(trained, tiny_mllm, tiny_records),
        strict=True,
    )
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"largest difference {worst:.1e}")
    assert worst <= (0 if peft and lora else 1e-4)
    assert report.dropped["VL.vision"].number > 0 and report.dropped["VL.language"].number > 0
    assert bool([name for name in report.missing if "lora" in name]) == (lora and not peft)
    folded = [how for how in report.converted.values() if "folded in, alpha 4" in how]
    assert len(folded) == (7 * 2 if peft and not lora else 0)


def test_every_tensor_goes_to_exactly_one_part(trained: DualPathNetwork) -> None:
    state = written_by_them(trained, peft=True)
    parts = released_to_ours(state)
    assert trained.mllm is not None and trained.query_attention is not None
    base = MLLMPathway.load(trained.mllm.path).base.state_dict()
    assert parts.mllm.keys() == base.keys()
    assert len(parts.adapter) == 2 * 7 * 2
    assert parts.query_attention.keys() == trained.query_attention.state_dict().keys()
    assert len(parts.seg) == len(trained.vision.state_dict())
    used = sum(len(p) for p in (parts.mllm, parts.adapter, parts.seg, parts.query_attention))
    assert used + sum(d.number for d in parts.dropped.values()) == len(state)


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
    change: tuple[str, str], message: str, trained: DualPathNetwork, tiny_mllm: Path, tmp_path: Path
) -> None:
    state = written_by_them(trained, peft=False)
    how, name = change
    if how == "add":
        state[name] = torch.ones(1)
    elif how == "cut":
        state[name] = state[name][..., :-1].clone()
    else:
        del state[name]
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = other(tiny_mllm, lora=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_released(model, tmp_path / "pytorch_model.bin")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_adapter_of_another_rank_is_refused_with_the_setting(
    trained: DualPathNetwork, tiny_mllm: Path, tmp_path: Path
) -> None:
    torch.save(written_by_them(trained, peft=True), tmp_path / "model.pt")
    model = other(tiny_mllm, lora=True)
    model.mllm = MLLMPathway.load(str(tiny_mllm), lora=LORA._replace(rank=3))
    with pytest.raises(ValueError, match=r"adapter .* has shape .*model\.lora_rank"):
        load_released(model, tmp_path / "model.pt")


def test_a_model_without_language_pathway_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build the model with an MLLM"):
        load_released(tiny_model(None), tmp_path / "model.pt")


def test_the_export_program_makes_a_portable_folder_of_a_released_file(
    trained: DualPathNetwork, tiny_mllm: Path, tiny_records: Path, tmp_path: Path
) -> None:
    torch.save(written_by_them(trained, peft=False), tmp_path / "pytorch_model.bin")
    command = [sys.executable, "scripts/export.py", str(tmp_path / "pytorch_model.bin")]
    command += ["--output", str(tmp_path / "export"), "--dtype", "fp32"]
    assert trained.query_attention is not None
    heads, side = trained.query_attention.num_heads, trained.vision.image_size
    sizes = f"--vision tiny --image-size {side} --query-heads {heads}".split()

    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--mllm" in refused.stderr
    done = subprocess.run(
        [*command, "--mllm", str(tiny_mllm), *sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    assert "released BiasCareVL" in done.stdout
    assert "weights of its authors" in (tmp_path / "export" / "README.md").read_text()
    opened = open_network(tmp_path / "export")[0].eval()
    expected = outputs(copy.deepcopy(trained).eval(), tiny_mllm, tiny_records)
    for found, wanted in zip(outputs(opened, tiny_mllm, tiny_records), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_joint_export_starts_the_query_attention_of_a_new_run_too(
    trained: DualPathNetwork, tiny_mllm: Path, tmp_path: Path
) -> None:
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
