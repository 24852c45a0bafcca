"""The language pathway: the same numbers as Hugging Face's own model, with less work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlamaConfig

from biascare.data.loader import collate
from biascare.interfaces import IGNORE_INDEX, Batch, Sample
from biascare.models.language.pathway import LORA_TARGETS, LoraSettings, MLLMPathway, load_processor
from biascare.models.query_attention import CrossModalQueryAttention
from tests.tiny import (
    LORA,
    language_sample,
    pad_token_id,
    segmentation_sample,
    tiny_chat,
    wake,
)


@pytest.fixture(scope="module")
def mllm(mllm_folder: Path) -> MLLMPathway:
    """With an adapter that has an effect; read only."""
    torch.manual_seed(0)
    mllm = MLLMPathway.load(str(mllm_folder), lora=LORA._replace(rank=2, alpha=4))
    wake(mllm)
    return mllm.eval()


def batch_of(folder: Path, samples: list[Sample], side: str = "right") -> Batch:
    return collate(samples, 0, pad_token_id(tiny_chat(folder)), padding_side=side)


def mixed_batch(folder: Path, side: str = "right") -> Batch:
    """Four sequences of different lengths about two images."""
    chat = tiny_chat(folder)
    samples = [
        segmentation_sample(chat, 1, ("liver", "spleen", "left kidney")),
        language_sample(chat, 2, "Describe the image.", "The liver is bright. No effusion."),
    ]
    return batch_of(folder, samples, side)


def labels_of(batch: Batch) -> Tensor:
    """[B, L] in Hugging Face's sense: answer tokens at their own positions."""
    assert batch.answer_positions is not None and batch.answer_tokens is not None
    ids = batch.mllm_inputs["input_ids"]
    labels = torch.full((ids.numel(),), IGNORE_INDEX)
    labels[batch.answer_positions + 1] = batch.answer_tokens
    return labels.view_as(ids)


def repeated_images(folder: Path, batch: Batch) -> dict[str, Tensor]:
    """The same inputs as the processor would give them: one image per placeholder."""
    inputs = dict(batch.mllm_inputs)
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    if grid is None:
        inputs["pixel_values"] = pixels[batch.image_slots]
        return inputs
    patches = torch.split(pixels, grid.prod(-1).tolist())
    inputs["pixel_values"] = torch.cat([patches[slot] for slot in batch.image_slots])
    inputs["image_grid_thw"] = grid[batch.image_slots]
    return inputs


def counted_tower_inputs(mllm: MLLMPathway) -> tuple[list[int], Any]:
    """Grows by the number of pixel values at each call of the vision tower; and the hook."""
    base = mllm.base.model
    tower = base.visual if hasattr(base, "visual") else base.vision_tower
    seen: list[int] = []

    def count(module: Any, args: Any, keywords: Any) -> None:
        given = [*args, *keywords.values()]
        seen.append(next(x for x in given if torch.is_tensor(x) and x.is_floating_point()).numel())

    return seen, tower.register_forward_pre_hook(count, with_kwargs=True)


@torch.no_grad()
def test_the_head_on_our_hidden_states_gives_hugging_faces_own_logits(
    mllm: MLLMPathway, mllm_folder: Path
) -> None:
    batch = mixed_batch(mllm_folder)
    hidden = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    theirs = mllm.base(**repeated_images(mllm_folder, batch)).logits
    real = batch.mllm_inputs["attention_mask"].bool()
    difference = float((mllm.base.lm_head(hidden) - theirs)[real].abs().max())
    print(f"largest difference {difference:.1e}")
    assert hidden.shape == (*batch.mllm_inputs["input_ids"].shape, mllm.hidden_size)
    assert difference <= 1e-5


@torch.no_grad()
def test_answer_logits_and_their_loss_equal_hugging_faces(
    mllm: MLLMPathway, mllm_folder: Path
) -> None:
    batch = mixed_batch(mllm_folder)
    assert batch.answer_positions is not None and batch.answer_tokens is not None
    hidden = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    logits = mllm.answer_logits(hidden, batch.answer_positions)
    assert logits.shape == (len(batch.answer_tokens), mllm.base.config.get_text_config().vocab_size)
    ours = torch.nn.functional.cross_entropy(logits, batch.answer_tokens)
    inputs = repeated_images(mllm_folder, batch)
    theirs = mllm.base(**inputs, labels=labels_of(batch)).loss
    print(f"ours {ours:.6f}, Hugging Face {theirs:.6f}")
    assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_each_distinct_image_goes_through_the_vision_tower_once(
    mllm: MLLMPathway, mllm_folder: Path
) -> None:
    batch = mixed_batch(mllm_folder)
    assert batch.image_slots == [0, 0, 0, 1]
    seen, hook = counted_tower_inputs(mllm)
    shared = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    repeated = mllm.hidden_states(repeated_images(mllm_folder, batch), [0, 1, 2, 3])
    hook.remove()
    assert seen == [seen[0], 2 * seen[0]]  # two images, then four
    difference = float((shared - repeated).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


@torch.no_grad()
def test_image_slots_say_which_image_a_sequence_sees(mllm: MLLMPathway, mllm_folder: Path) -> None:
    batch = mixed_batch(mllm_folder)
    right = mllm.hidden_states(batch.mllm_inputs, [0, 0, 0, 1])
    swapped = mllm.hidden_states(batch.mllm_inputs, [0, 1, 0, 1])
    assert torch.allclose(right[0], swapped[0], atol=1e-6)
    assert not torch.allclose(right[1], swapped[1], atol=1e-3)


@torch.no_grad()
def test_left_and_right_padding_give_the_same_pooled_query(
    mllm: MLLMPathway, mllm_folder: Path
) -> None:
    torch.manual_seed(1)
    attention = CrossModalQueryAttention(mllm.hidden_size, 96, num_queries=2).eval()
    pooled = []
    for side in ("left", "right"):
        batch = mixed_batch(mllm_folder, side)
        assert batch.prompt_mask is not None
        hidden = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
        pooled.append(attention(hidden, batch.prompt_mask))
    assert pooled[0].shape == (4, 2, 96)
    difference = float((pooled[0] - pooled[1]).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


@torch.no_grad()
def test_generation_equals_hugging_faces_greedy_generation_and_encodes_images_once(
    mllm: MLLMPathway, mllm_folder: Path
) -> None:
    chat = tiny_chat(mllm_folder)
    samples = [
        language_sample(chat, s, q, None) for s, q in ((1, "Why?"), (2, "Which organ is it?"))
    ]
    samples[1] = samples[1]._replace(
        sequences=[samples[1].sequences[0] | {"image": samples[0].sequences[0]["image"]}]
    )
    batch = batch_of(mllm_folder, samples, "left")
    assert batch.image_slots == [0, 0]
    inputs = repeated_images(mllm_folder, batch)
    theirs = mllm.base.generate(**inputs, max_new_tokens=8, do_sample=False)
    seen, hook = counted_tower_inputs(mllm)
    ours = mllm.generate(batch.mllm_inputs, batch.image_slots, max_new_tokens=8).tokens
    hook.remove()
    assert torch.equal(ours, theirs[:, inputs["input_ids"].shape[1] :])
    assert ours.shape[0] == 2 and 1 <= ours.shape[1] <= 8
    assert seen == [batch.mllm_inputs["pixel_values"].numel()]


@torch.no_grad()
def test_the_first_generated_token_is_the_best_answer_logit(
    mllm: MLLMPathway, mllm_folder: Path
) -> None:
    chat = tiny_chat(mllm_folder)
    asked = batch_of(mllm_folder, [language_sample(chat, 3, answer=None)], "left")
    answered = batch_of(mllm_folder, [language_sample(chat, 3, answer="the liver")])
    assert answered.answer_positions is not None
    hidden = mllm.hidden_states(answered.mllm_inputs, answered.image_slots)
    logits = mllm.answer_logits(hidden, answered.answer_positions[:1])
    tokens = mllm.generate(asked.mllm_inputs, asked.image_slots, max_new_tokens=1).tokens
    assert tokens[0, 0] == logits[0].argmax()


def test_the_adapter_sits_on_the_language_model_only(mllm: MLLMPathway) -> None:
    adapted = {n for n, _ in mllm.named_parameters() if ".lora_" in n}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(adapted) == 2 * len(kinds) * 2  # A and B, of seven projections, in two layers
    assert all("language_model.layers" in name for name in adapted)
    # d = 64, key and value width 32, inner width 128: rank 2 times (in + out) of each projection
    per_layer = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert sum(p.numel() for p in mllm.adapter_parameters()) == 2 * per_layer
    trainable = {n for n, p in mllm.named_parameters() if p.requires_grad}
    assert trainable == adapted


@pytest.mark.parametrize(
    "name, adapted",
    [
        ("model.language_model.layers.3.self_attn.q_proj", True),
        ("model.language_model.layers.3.mlp.down_proj", True),
        ("model.visual.blocks.3.mlp.gate_proj", False),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
        ("model.multi_modal_projector.linear_1", False),
        ("lm_head", False),
    ],
)
def test_lora_targets_are_anchored_on_the_language_model(name: str, adapted: bool) -> None:
    assert bool(re.fullmatch(LORA_TARGETS, name)) == adapted


def test_parts_share_no_parameter_and_leave_the_frozen_layers_out(mllm: MLLMPathway) -> None:
    parts = {
        "lora": mllm.adapter_parameters(),
        "mllm_vision_tower": mllm.vision_tower_parameters(),
        "embeddings": mllm.embedding_parameters(),
    }
    ids = [id(p) for parameters in parts.values() for p in parameters]
    assert len(ids) == len(set(ids)) and all(parts.values())
    size = (mllm.base.config.get_text_config().vocab_size, mllm.hidden_size)
    assert [tuple(p.shape) for p in parts["embeddings"]] == [size, size]


def test_recomputed_activations_give_the_same_adapter_gradients(mllm_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        mllm = MLLMPathway.load(
            str(mllm_folder), lora=LoraSettings(2, 4, 0.0), activation_checkpointing=checkpointing
        ).train()
        calls: list[int] = []
        layer = mllm.base.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = mixed_batch(mllm_folder)
        mllm.hidden_states(batch.mllm_inputs, batch.image_slots).square().sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in mllm.adapter_parameters()])
    assert all(g is not None for g in gradients[0])
    for stored, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(stored, recomputed, atol=1e-6)


def test_trained_weights_outside_the_adapter_survive_two_saves(
    mllm_folder: Path, tmp_path: Path
) -> None:
    mllm = MLLMPathway.load(str(mllm_folder), lora=LORA._replace(rank=2, alpha=4))
    for parameter in mllm.embedding_parameters():
        torch.nn.init.normal_(parameter.requires_grad_(True))
    wanted = {k: v.clone() for k, v in mllm.state_dict().items()}
    for name in ("first", "second"):
        mllm.save(tmp_path / name, mllm.state_dict())
        mllm = MLLMPathway.restore(tmp_path / name, str(mllm_folder))
    restored = mllm.state_dict()
    assert restored.keys() == wanted.keys()
    assert all(torch.equal(restored[name], value) for name, value in wanted.items())


def test_weights_of_another_family_are_refused(
    tiny_mllm: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    mllm = MLLMPathway.load(str(tiny_mllm))
    mllm.base.model.visual.merger.mlp[0].weight.requires_grad_(True)
    (tmp_path / "export").mkdir()
    mllm.save(tmp_path / "export", mllm.state_dict())
    with pytest.raises(ValueError, match=r"does not fit the model at .*visual\.merger.*pass mllm="):
        MLLMPathway.restore(tmp_path / "export", str(tiny_llava))


def test_a_model_of_the_wrong_kind_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(ValueError, match=r"of type 'llama', expected .* qwen2_5_vl or llava"):
        MLLMPathway.load(str(tmp_path))


def test_flash_attention_that_is_not_installed_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biascare.models.language.pathway.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=r"install it \(pip install flash-attn.*attention=sdpa"):
        MLLMPathway.load(str(tmp_path / "not even there"), attention="flash_attention_2")


@pytest.mark.parametrize("opener", [MLLMPathway.load, load_processor])
@pytest.mark.parametrize("content", [None, "no model here"])
def test_a_folder_that_is_no_model_is_refused_with_the_reason(
    opener: Any, content: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    if content is not None:
        folder.mkdir()
        (folder / "notes.txt").write_text(content)
    with pytest.raises(
        ValueError, match=r"cannot open the image-text model '.*base' \(.+\)"
    ) as caught:
        opener(str(folder))
    assert "model.mllm" in str(caught.value)


def test_damaged_weights_are_refused_with_the_reason(tiny_mllm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_mllm, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot open the image-text model"):
        MLLMPathway.load(str(folder))


def test_weights_that_lack_a_tensor_are_refused_instead_of_drawn_at_random(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_mllm, folder)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack 1 of the model's tensors, such as 'lm_head.weight'"
    ):
        MLLMPathway.load(str(folder))


def test_a_processor_opens_from_a_folder_of_its_own(tiny_mllm: Path, tmp_path: Path) -> None:
    """As in exports, which keep it beside the weights."""
    load_processor(str(tiny_mllm)).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert load_processor(str(tmp_path)).tokenizer.get_vocab()


def test_a_processor_without_a_chat_template_is_refused(tiny_mllm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_mllm, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template; add chat_template.jinja"):
        load_processor(str(folder))


def test_the_folder_opens_through_auto_classes_alone(mllm_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(mllm_folder)
    assert model.config.model_type == mllm_folder.name
    assert sum(p.numel() for p in model.parameters()) < 1e6


def test_weights_that_are_not_finite_are_named_before_anything_is_built_on_them(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mllm"
    shutil.copytree(tiny_mllm, folder)
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[-1]
    state[name].view(-1)[3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.mllm .*mllm: .* holds 1 of [\d,]+ not finite"):
        MLLMPathway.load(str(folder))
