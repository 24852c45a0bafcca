"""The joined model: what conditions the mask, what is computed, what trains, what is saved."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from biascare.data.loader import collate
from biascare.interfaces import Batch, Prediction, Prompts, Sample
from biascare.models.export_folder import build_network, open_network, save_network
from biascare.models.network import PARTS, DualPathNetwork
from biascare.models.query_attention import CrossModalQueryAttention, MaskedMultiheadAttention
from biascare.settings.keys import TrainableConfig
from tests.tiny import (
    IMAGE_SIZE,
    answers,
    language_sample,
    pad_token_id,
    segmentation_sample,
    tiny_chat,
    tiny_model,
)

# The label head stands in the labels stage alone, where no mask is decoded.
NAMES = tuple(part.name for part in PARTS if part.name != "label_head")


@pytest.fixture(scope="module")
def model(mllm_folder: Path) -> DualPathNetwork:
    """Read only."""
    return tiny_model(mllm_folder)


def batch_of(folder: Path | None, samples: list[Sample], side: str = "right") -> Batch:
    chat = None if folder is None else tiny_chat(folder)
    return collate(samples, 0, pad_token_id(chat) if chat else 0, padding_side=side)


def mixed_batch(folder: Path) -> Batch:
    """Three segmentation rows of two images, then a question."""
    chat = tiny_chat(folder)
    return batch_of(
        folder,
        [
            language_sample(chat, 3),
            segmentation_sample(chat, 1, ("liver", "spleen")),
            segmentation_sample(chat, 2, ("left kidney",)),
        ],
    )


def decoded(model: DualPathNetwork, batch: Batch) -> Prediction:
    with torch.no_grad():
        prediction = model(batch)[1]
    assert prediction is not None
    return prediction


def call_counter(module: nn.Module) -> list[int]:
    """Grows by the batch size of each call."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


# ---------------------------------------------------------------- the way of one sample


@torch.no_grad()
def test_features_and_masks_have_the_shapes_of_the_legend(
    model: DualPathNetwork, mllm_folder: Path
) -> None:
    batch = mixed_batch(mllm_folder)
    features, prediction = model(batch)
    grid = IMAGE_SIZE // 8
    assert features.image_embedding.shape == (2, 96, grid, grid)
    assert features.text_embedding.shape == (3, 1, 96)
    assert features.hidden_states.shape == (*batch.mllm_inputs["input_ids"].shape, 64)
    assert prediction.mask_logits.shape == (3, IMAGE_SIZE, IMAGE_SIZE)


def with_answers(folder: Path, answers: tuple[str, str]) -> Batch:
    """Two segmentation rows whose sequences are then answered, as a grounding task would be."""
    chat = tiny_chat(folder)
    samples = []
    for seed, answer in enumerate(answers):
        sample = segmentation_sample(chat, seed)
        turn = language_sample(chat, seed, "Outline the liver.", answer).sequences[0]
        samples.append(sample._replace(sequences=[turn | {"image": sample.sequences[0]["image"]}]))
    return batch_of(folder, samples)


@torch.no_grad()
def test_the_pooled_token_does_not_change_when_the_answer_does(
    model: DualPathNetwork, mllm_folder: Path
) -> None:
    first = model.encode(with_answers(mllm_folder, ("yes", "no")))
    second = model.encode(with_answers(mllm_folder, ("No effusion.", "the left kidney is bright")))
    unanswered = model.encode(
        batch_of(mllm_folder, [segmentation_sample(tiny_chat(mllm_folder), s) for s in (0, 1)])
    )
    assert first.text_embedding is not None and second.text_embedding is not None
    for other in (second, unanswered):
        assert other.text_embedding is not None
        difference = float((first.text_embedding - other.text_embedding).abs().max())
        print(f"largest difference {difference:.1e}")
        assert difference <= 1e-5
    assert first.hidden_states is not None and second.hidden_states is not None
    assert first.hidden_states.shape != second.hidden_states.shape  # the answers were really read


@torch.no_grad()
def test_the_instruction_changes_the_mask(model: DualPathNetwork, mllm_folder: Path) -> None:
    chat = tiny_chat(mllm_folder)
    masks = [
        decoded(model, batch_of(mllm_folder, [segmentation_sample(chat, 1, (target,))]))
        for target in ("liver", "left kidney")
    ]
    difference = float((masks[0].mask_logits - masks[1].mask_logits).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference > 1e-4  # rounding stays below 1e-6


@torch.no_grad()
def test_a_language_batch_costs_no_segmentation(mllm_folder: Path) -> None:
    model = tiny_model(mllm_folder)
    assert model.query_attention is not None
    parts: list[nn.Module] = [model.vision.image_encoder, model.vision.mask_decoder]
    calls = [call_counter(part) for part in (*parts, model.query_attention)]
    chat = tiny_chat(mllm_folder)
    features, prediction = model(batch_of(mllm_folder, [language_sample(chat, s) for s in (1, 2)]))
    assert calls == [[], [], []]
    assert prediction is None and features.image_embedding is features.text_embedding is None
    assert features.hidden_states is not None


@torch.no_grad()
def test_only_segmentation_rows_are_pooled_and_each_image_is_encoded_once(
    mllm_folder: Path,
) -> None:
    model = tiny_model(mllm_folder)
    assert model.query_attention is not None
    encoder = call_counter(model.vision.image_encoder)
    queries = call_counter(model.query_attention)
    decoder = call_counter(model.vision.prompt_encoder.mask_downscaling)
    batch = mixed_batch(mllm_folder)
    features, prediction = model(batch)
    assert batch.prompts is not None and batch.row_image is not None
    for _ in range(2):  # clicks decode only
        prediction = model.decode_masks(
            features, batch.prompts, batch.row_image, mask_prompt=prediction.low_res_logits
        )
    assert (encoder, queries, decoder) == ([2], [3], [3, 3])


@torch.no_grad()
def test_chosen_rows_decode_to_what_they_are_among_all(
    model: DualPathNetwork, mllm_folder: Path
) -> None:
    batch = mixed_batch(mllm_folder)
    assert batch.prompts is not None and batch.row_image is not None
    features, prediction = model(batch)
    rows = torch.tensor([2, 0])
    prompts = Prompts(*(value[rows] for value in batch.prompts))
    chosen = model.decode_masks(features, prompts, batch.row_image, rows=rows)
    assert torch.allclose(chosen.mask_logits, prediction.mask_logits[rows], atol=1e-5)


@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_batch(model: DualPathNetwork, mllm_folder: Path) -> None:
    together = decoded(model, mixed_batch(mllm_folder))
    sample = segmentation_sample(tiny_chat(mllm_folder), 2, ("left kidney",))
    alone = decoded(model, batch_of(mllm_folder, [sample]))
    assert torch.allclose(together.mask_logits[2], alone.mask_logits[0], atol=1e-4)


def test_the_vision_pathway_works_alone() -> None:
    model = tiny_model(None)
    batch = batch_of(None, [segmentation_sample(None, 1, ("liver", "spleen"))])
    features, prediction = model(batch)
    assert features.text_embedding is None and features.hidden_states is None
    assert prediction.mask_logits.shape[0] == 2


def test_the_two_halves_of_the_language_side_come_together(model: DualPathNetwork) -> None:
    with pytest.raises(ValueError, match="together or not at all"):
        DualPathNetwork(model.vision, model.mllm)


def test_heads_that_do_not_divide_the_hidden_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.query_heads: got 7, expected a divisor of .* 64"):
        CrossModalQueryAttention(64, 96, num_heads=7)


@torch.no_grad()
def test_the_query_attention_is_equations_1_and_2_written_out() -> None:
    """One head: softmax(q k / sqrt(d)) v, its output map, then W z + b."""
    torch.manual_seed(0)
    module = CrossModalQueryAttention(4, 3, num_queries=2, num_heads=1)
    states = torch.randn(1, 5, 4)
    mask = torch.tensor([[True, True, False, True, False]])
    weight, bias = module.attention.in_proj_weight, module.attention.in_proj_bias
    q, k, v = (
        x @ w.T + b
        for x, w, b in zip(
            (module.queries[0], states[0], states[0]), weight.chunk(3), bias.chunk(3), strict=True
        )
    )
    scores = (q @ k.T / 2).masked_fill(~mask, -torch.inf)
    pooled = module.attention.out_proj(scores.softmax(-1) @ v)
    assert torch.allclose(module(states, mask)[0], module.projection(pooled), atol=1e-6)


@torch.no_grad()
def test_the_query_attention_keeps_torchs_names_and_numbers() -> None:
    torch.manual_seed(0)
    ours = MaskedMultiheadAttention(64, 8, batch_first=True)
    theirs = torch.nn.MultiheadAttention(64, 8, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    queries, states = torch.randn(3, 2, 64), torch.randn(3, 7, 64)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    expected = theirs(queries, states, states, key_padding_mask=~mask, need_weights=False)[0]
    difference = float((ours(queries, states, mask) - expected).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= 1e-6


def test_every_weight_belongs_to_a_module_that_is_called(mllm_folder: Path) -> None:
    """ZeRO-3 gathers the weights of a module when it is called; one read from outside is empty."""
    model = tiny_model(mllm_folder).train()
    called: set[int] = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(id(module)))
    batch = mixed_batch(mllm_folder)
    features, prediction = model(batch)
    assert batch.prompts is not None and batch.row_image is not None and model.mllm is not None
    model.decode_masks(
        features, batch.prompts, batch.row_image, mask_prompt=prediction.low_res_logits
    )
    assert batch.answer_positions is not None
    model.mllm.answer_logits(features.hidden_states, batch.answer_positions)
    trained = {id(p) for part in NAMES for p in model.part_parameters(part)}
    silent = [
        name
        for name, module in model.named_modules()
        if id(module) not in called
        and any(id(p) in trained for p in module.parameters(recurse=False))
    ]
    assert not silent


# ---------------------------------------------------------------- what trains


def gradient_step(model: DualPathNetwork, batch: Batch) -> None:
    """A step on everything the model puts out, refinement included.

    Adam moves a parameter however small its gradient is.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2, eps=1e-20)
    assert model.mllm is not None and batch.prompts is not None and batch.row_image is not None
    features, prediction = model.train()(batch)
    again = model.decode_masks(
        features, batch.prompts, batch.row_image, mask_prompt=prediction.low_res_logits.detach()
    )
    loss = prediction.mask_logits.square().mean() + again.mask_logits.square().mean()
    loss = loss + prediction.predicted_dice.square().mean()
    assert batch.answer_positions is not None and batch.answer_tokens is not None
    logits = model.mllm.answer_logits(features.hidden_states, batch.answer_positions)
    (loss + nn.functional.cross_entropy(logits, batch.answer_tokens)).backward()
    optimizer.step()


@pytest.mark.parametrize("part", NAMES)
def test_exactly_the_named_part_receives_gradients_and_changes(
    mllm_folder: Path, part: str
) -> None:
    model = tiny_model(mllm_folder)
    model.set_trainable({name: name == part for name in NAMES})
    named = {id(p) for p in model.part_parameters(part)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = mixed_batch(mllm_folder)
    labels = torch.tensor([[1, 0, -1], [2, 3, 1], [1, -1, -1]])  # clicks of both signs, and a box
    coords = torch.tensor([[[9.0, 9], [40, 40], [0, 0]], [[9, 9], [50, 50], [20, 9]], [[9, 9]] * 3])
    batch = batch._replace(prompts=Prompts(point_coords=coords, point_labels=labels))
    gradient_step(model, batch)
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if id(p) in named}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # A bias of keys shifts all scores of a query alike: softmax makes its exact gradient zero.
    silent = with_gradient - changed
    assert all(name.endswith("k_proj.bias") for name in silent), silent
    assert changed <= with_gradient and changed
    if part == "prompt_encoder":
        clicks = {f"vision.prompt_encoder.point_embeddings.{k}.weight" for k in range(4)}
        assert clicks <= changed


def test_parts_do_not_overlap_and_what_they_leave_is_frozen_or_unread(
    model: DualPathNetwork,
) -> None:
    parts = {part: model.part_parameters(part) for part in NAMES}
    ids = [id(p) for parameters in parts.values() for p in parameters]
    assert len(ids) == len(set(ids)) and all(parts.values())
    rest = {n for n, p in model.named_parameters() if id(p) not in set(ids)}
    kinds = ("output_hypernetworks_mlps", "language_model", "vision_tower")
    assert all(any(kind in name for kind in kinds) for name in rest)
    assert {part.name for part in PARTS} == {field.name for field in fields(TrainableConfig)}


def test_an_export_holds_all_but_what_the_base_models_files_hold(mllm_folder: Path) -> None:
    model = tiny_model(mllm_folder)
    for trained in ((), ("embeddings",), ("mllm_vision_tower", "lora")):
        model.set_trainable(dict.fromkeys(trained, True))
        held = model.exported_parameters()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            ours = not name.startswith("mllm.") or ".lora_" in name
            assert (name in held) == (ours or parameter.requires_grad), name


def test_an_unknown_part_is_refused_with_the_nearest(model: DualPathNetwork) -> None:
    with pytest.raises(ValueError, match="did you mean 'mask_decoder'"):
        model.part_parameters("mask_decode")


def test_parts_the_model_lacks_are_empty() -> None:
    model = tiny_model(None)
    assert [bool(model.part_parameters(part)) for part in NAMES] == [
        part in ("vision_encoder", "prompt_encoder", "mask_decoder") for part in NAMES
    ]


# ---------------------------------------------------------------- export


def questions(folder: Path) -> Batch:
    chat = tiny_chat(folder)
    asked = [language_sample(chat, s, q, None) for s, q in ((1, "Why?"), (2, "Which organ is it?"))]
    return batch_of(folder, asked, "left")


@pytest.mark.parametrize("thawed", ["lora", "embeddings"])
def test_an_export_restores_the_same_masks_and_answers(
    mllm_folder: Path, tmp_path: Path, thawed: str
) -> None:
    model = tiny_model(mllm_folder, seed=5, num_queries=2, query_heads=4)
    parts = {"lora": True, "query_attention": True, "mask_decoder": True, thawed: True}
    model.set_trainable(parts)
    gradient_step(model, mixed_batch(mllm_folder))
    save_network(model.eval(), tmp_path)
    restored = open_network(tmp_path)[0]
    assert not restored.training
    batch = mixed_batch(mllm_folder)
    ours, theirs = decoded(model, batch), decoded(restored, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    asked = questions(mllm_folder)
    keywords: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(answers(model, asked, **keywords), answers(restored, asked, **keywords))
    assert not torch.equal(
        tiny_model(mllm_folder, seed=5, num_queries=2, query_heads=4)(batch)[1].mask_logits,
        theirs.mask_logits,
    )


def test_an_export_keeps_the_limit_of_mask_prompts_and_starts_a_run_with_another(
    tmp_path: Path,
) -> None:
    save_network(build_network(vision="tiny", image_size=64, mask_prompt_limit=8.0), tmp_path)
    assert open_network(tmp_path)[0].vision.mask_prompt_limit == 8
    again = build_network(vision="tiny", image_size=64, vision_weights=str(tmp_path))
    assert again.vision.mask_prompt_limit is None


def test_an_export_holds_what_was_trained_and_not_the_base_model(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    save_network(tiny_model(tiny_mllm), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "adapter",
        "vision_pathway.safetensors",
        "query_attention.safetensors",
    }
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mllm"] == {"path": str(tiny_mllm)}
    assert config["vision"] == {
        "architecture": "tiny",
        "image_size": IMAGE_SIZE,
        "multimask": "never",
        "mask_prompt_limit": None,
    }


def test_an_export_is_written_from_a_gathered_state_where_parameters_are_elsewhere(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    model = tiny_model(tiny_mllm)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = mixed_batch(tiny_mllm)
    wanted = decoded(model, batch)
    for parameter in model.parameters():  # what ZeRO-3 leaves on a rank
        parameter.data = torch.zeros_like(parameter)
    save_network(model, tmp_path, state)
    restored = decoded(open_network(tmp_path)[0], batch)
    assert torch.equal(wanted.mask_logits, restored.mask_logits)


def test_a_bf16_export_opens_in_both_precisions(tiny_mllm: Path, tmp_path: Path) -> None:
    model = tiny_model(tiny_mllm, dtype=torch.bfloat16)
    save_network(model, tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        restored = open_network(tmp_path, dtype=dtype)[0]
        assert restored.vision.dtype == dtype
        assert torch.isfinite(decoded(restored, mixed_batch(tiny_mllm)).mask_logits).all()
        assert answers(restored, questions(tiny_mllm), max_new_tokens=2).shape == (2, 2)


def test_the_vision_stage_exports_and_hands_over_to_the_joint_stage(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    model = tiny_model(None, seed=7)
    save_network(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "vision_pathway.safetensors"}
    batch = batch_of(None, [segmentation_sample(None, 1)])
    restored = open_network(tmp_path)[0]
    assert torch.equal(decoded(model, batch).mask_logits, decoded(restored, batch).mask_logits)
    joint = build_network(
        vision="tiny",
        image_size=IMAGE_SIZE,
        vision_weights=str(tmp_path),
        mllm=str(tiny_mllm),
    )
    ours, theirs = joint.vision.state_dict(), model.vision.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_export_finds_its_local_base_from_any_folder(
    tiny_mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_mllm.parent)
    network = build_network(
        mllm=tiny_mllm.name,  # relative, it could be a name on the Hub
        vision="tiny",
        image_size=IMAGE_SIZE,
    )
    save_network(network, tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    restored = open_network("export")[0]
    assert restored.mllm is not None and restored.mllm.path == str(tiny_mllm)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_network(tiny_model(None), tmp_path)
    with pytest.raises(ValueError, match=r"model.vision_weights .*'image_size': 64.*96"):
        build_network(vision="tiny", image_size=96, vision_weights=str(tmp_path))


def test_damaged_query_attention_of_an_export_is_an_error_not_a_fresh_start(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    save_network(tiny_model(tiny_mllm), tmp_path)
    file = tmp_path / "query_attention.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"query_attention\.safetensors cannot be loaded"):
        build_network(
            mllm=str(tiny_mllm), vision="tiny", image_size=64, vision_weights=str(tmp_path)
        )


def test_an_export_whose_base_model_moved_says_how_to_name_it(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    save_network(tiny_model(tiny_mllm), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mllm"]["path"] = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gone.*mllm="):
        open_network(tmp_path)[0]
    assert open_network(tmp_path, mllm=str(tiny_mllm))[0].mllm is not None


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is not an exported model: it has no config.json"),
        ('{"model_type": "llama"}', "not of a biascare export: got model_type 'llama'"),
        (
            '{"model_type": "biascare_vl", "format_version": 99}',
            "an export of format 99, expected 2; write it again",
        ),
        ("{", "is not valid JSON"),
        ("[]", "not of a biascare export"),
    ],
)
def test_a_folder_that_is_no_export_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_network(tmp_path)[0]


@pytest.mark.parametrize("name", ["vision_pathway.safetensors", "query_attention.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_incomplete_export_names_the_file(
    tiny_mllm: Path, tmp_path: Path, name: str, damage: str
) -> None:
    save_network(tiny_model(tiny_mllm), tmp_path)
    file = tmp_path / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        open_network(tmp_path)[0]
