"""Packed micro-batches: the numbers of the padded form without its padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from biascare.data.loader import collate
from biascare.interfaces import Batch
from biascare.models.language.packing import PACKED_SDPA, pack, unpack
from biascare.models.language.pathway import MLLMPathway
from biascare.models.network import DualPathNetwork
from biascare.training.step import TrainStep
from tests.tiny import (
    HITL,
    OBJECTIVE,
    language_sample,
    pad_token_id,
    segmentation_sample,
    tiny_chat,
    tiny_model,
)

REPORT = "The liver is bright. No effusion. " * 12


def uneven_batch(folder: Path, side: str = "right") -> Batch:
    """Three instructions about one image, one about another, a short answer and a long report."""
    chat = tiny_chat(folder)
    samples = [
        segmentation_sample(chat, 1, ("liver", "spleen", "left kidney")),
        segmentation_sample(chat, 2, ("lesion",)),
        language_sample(chat, 3, "Is the liver visible?", "yes"),
        language_sample(chat, 4, "Describe the image.", REPORT),
    ]
    return collate(samples, 0, pad_token_id(chat), padding_side=side)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: Any, mllm_folder: Path) -> DualPathNetwork:
    """Woken, in eval mode; read only but for gradients."""
    return tiny_model(mllm_folder, query_heads=4, attention=request.param)


def pathway(model: DualPathNetwork, *, packing: bool) -> MLLMPathway:
    assert model.mllm is not None
    model.mllm.packing = packing
    return model.mllm


def loss_and_gradients(model: DualPathNetwork, batch: Batch, *, packing: bool) -> Any:
    """Every loss term of a training step and the gradient of every trained parameter."""
    pathway(model, packing=packing)
    assert batch.answer_tokens is not None
    outcome = TrainStep(model, OBJECTIVE, HITL)(batch, len(batch.answer_tokens), 1)
    outcome["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return outcome["terms"] | {"total": outcome["loss"].detach()}, gradients


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_and_gradients_equal_those_of_the_padded_form(
    model: DualPathNetwork, mllm_folder: Path, side: str
) -> None:
    batch = uneven_batch(mllm_folder, side)
    mask = batch.mllm_inputs["attention_mask"]
    assert batch.image_slots == [0, 0, 0, 1, 2, 3] and mask.float().mean() < 0.6
    padded, padded_gradients = loss_and_gradients(model, batch, packing=False)
    packed, packed_gradients = loss_and_gradients(model, batch, packing=True)
    losses = largest_difference(padded, packed)
    gradients = largest_difference(padded_gradients, packed_gradients)
    print(f"losses {losses:.1e}, gradients {gradients:.1e}")
    assert losses <= 1e-5 and gradients <= 1e-5
    adapter = [name for name in packed_gradients if ".lora_A" in name]
    assert adapter and all(packed_gradients[name].abs().max() > 0 for name in adapter)


@torch.no_grad()
def test_a_packed_sequence_sees_what_it_would_see_alone(
    model: DualPathNetwork, mllm_folder: Path
) -> None:
    chat = tiny_chat(mllm_folder)
    batch = uneven_batch(mllm_folder)
    hidden = pathway(model, packing=True).hidden_states(batch.mllm_inputs, batch.image_slots)
    alone = collate([language_sample(chat, 4, "Describe the image.", REPORT)], 0, 0)
    expected = pathway(model, packing=False).hidden_states(alone.mllm_inputs, [0])
    difference = float((hidden[-1] - expected[0]).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


@torch.no_grad()
def test_the_language_model_computes_no_padding(model: DualPathNetwork, mllm_folder: Path) -> None:
    batch = uneven_batch(mllm_folder)
    mask = batch.mllm_inputs["attention_mask"]
    assert model.mllm is not None
    shapes: list[Any] = []
    layer = model.mllm.base.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
    for packing in (True, False):
        pathway(model, packing=packing).hidden_states(batch.mllm_inputs, batch.image_slots)
    hook.remove()
    assert shapes == [(1, int(mask.sum())), mask.shape]


@torch.no_grad()
def test_without_padding_nothing_is_packed(
    model: DualPathNetwork, mllm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even sequences in a batch are faster than in a row."""
    chat = tiny_chat(mllm_folder)
    even = collate([segmentation_sample(chat, 1, ("liver",) * 3)], 0, pad_token_id(chat))
    monkeypatch.setattr("biascare.models.language.pathway.pack", lambda *_: pytest.fail("packed"))
    hidden = pathway(model, packing=True).hidden_states(even.mllm_inputs, even.image_slots)
    assert torch.equal(hidden[0], hidden[1])


def test_positions_begin_again_at_every_sequence(model: DualPathNetwork, mllm_folder: Path) -> None:
    """An image of n x n tokens advances Qwen's text by n positions, LLaVA's by n * n."""
    batch = uneven_batch(mllm_folder)
    mllm = pathway(model, packing=True)
    packed = pack(mllm.base.model, mllm.with_image_features(batch.mllm_inputs, batch.image_slots))
    lengths = batch.mllm_inputs["attention_mask"].sum(1).tolist()
    positions = packed["position_ids"]
    plain = torch.cat([torch.arange(length) for length in lengths])
    if mllm_folder.name == "llava":
        assert torch.equal(positions, plain[None])
        return
    assert positions.shape == (4, 1, sum(lengths)) and torch.equal(positions[0, 0], plain)
    num_image_tokens = int((packed["mm_token_type_ids"] == 1).sum()) // len(lengths)
    side = int(num_image_tokens**0.5)
    assert side * side == num_image_tokens > 1
    first = positions[1:, 0, : lengths[0]]
    assert first.max() == lengths[0] - 1 - num_image_tokens + side
    assert torch.equal(positions[1:, 0, lengths[0] : lengths[0] + 3], torch.arange(3).expand(3, 3))


@torch.no_grad()
def test_a_sliding_window_is_kept(mllm_folder: Path) -> None:
    """Attention by sequence knows no window: transformers' own mask is used instead."""
    model = tiny_model(mllm_folder, query_heads=4)
    batch = uneven_batch(mllm_folder)
    mllm = pathway(model, packing=True)
    config = mllm.base.config.get_text_config()
    inputs = mllm.with_image_features(batch.mllm_inputs, batch.image_slots)
    longest = batch.mllm_inputs["input_ids"].shape[1]
    for window, by_sequence in ((None, True), (longest, True), (longest - 1, False)):
        config.sliding_window = window
        packed = pack(mllm.base.model, inputs)
        assert ("sequence_lengths" in packed) == by_sequence
        assert (packed["attention_mask"] is None) != by_sequence
        states = mllm.base.model(**packed, use_cache=False).last_hidden_state
        if window is None:
            reference = states
        assert (states - reference).abs().max() <= 1e-5  # these two families ignore the window


def test_the_kernel_stays_out_of_the_saved_configuration(mllm_folder: Path, tmp_path: Path) -> None:
    mllm = MLLMPathway.load(str(mllm_folder))
    assert mllm.base.model.language_model.config._attn_implementation == PACKED_SDPA
    mllm.base.save_pretrained(tmp_path)
    assert PACKED_SDPA not in (tmp_path / "config.json").read_text()


def test_packing_works_with_recomputed_activations(mllm_folder: Path) -> None:
    batch = uneven_batch(mllm_folder)
    found = []
    for checkpointing in (False, True):
        model = tiny_model(mllm_folder, query_heads=4, activation_checkpointing=checkpointing)
        found.append(loss_and_gradients(model.train(), batch, packing=True))
    assert largest_difference(found[0][0], found[1][0]) <= 1e-6
    assert largest_difference(found[0][1], found[1][1]) <= 1e-6


def test_what_is_unpacked_stands_where_it_came_from() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    row = torch.arange(8.0).view(1, 4, 2).requires_grad_(True)
    places = unpack(row, mask)
    assert places.tolist() == [[[0, 1], [2, 3], [0, 0]], [[0, 0], [4, 5], [6, 7]]]
    places.sum().backward()
    assert row.grad is not None and row.grad.eq(1).all()


def test_the_vision_tower_keeps_its_kernel(mllm_folder: Path) -> None:
    """The kernel belongs to the language model alone."""
    mllm = MLLMPathway.load(str(mllm_folder))
    assert mllm.base.config.vision_config._attn_implementation == "sdpa"


def test_a_family_whose_image_tokens_attend_both_ways_is_not_packed() -> None:
    """Gemma 3, which an opener may bring: packed, its hidden states would be off by 0.66."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = sizes | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = sizes | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3Config(
        text_config=text | {"vocab_size": 300},
        vision_config=vision,
        image_token_index=299,
        mm_tokens_per_image=4,
    )
    gemma = Gemma3ForConditionalGeneration(config)
    mllm = MLLMPathway.load("gemma", opener=lambda path, dtype, attention: (gemma, None))
    assert not mllm.packing
    with pytest.raises(ValueError, match=r"pack_sequences: got true, .*'gemma3'.* set it to false"):
        mllm.packing = True
    mllm.packing = False
