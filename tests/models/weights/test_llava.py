"""Checkpoints in LLaVA's original layout open as transformers' classes, and say the same.

The original-layout copies are written here from transformers models, by walking their modules: a
second statement of the names, independent of the conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from biascare.data.chat import ChatBuilder
from biascare.data.loader import collate
from biascare.interfaces import IGNORE_INDEX
from biascare.models.language.pathway import MLLMPathway, load_processor
from biascare.models.weights.llava import (
    convert_names,
    grown_rows,
    llava_config,
    num_vocabulary_rows,
    transformers_name,
)
from biascare.models.weights.llava_templates import with_image_parts
from biascare.records import Turn
from tests.tiny import (
    IMAGE_SIZE,
    LORA,
    corpus,
    language_sample,
)

FAMILIES = ("llava_mistral", "llava_qwen2", "llava_llama", "llava")
TOWER_NAME = "openai/clip-vit-tiny-patch16-64"  # on no machine: its sizes follow from its shapes
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=IMAGE_SIZE,
    patch_size=16,
)
SPARE_ROWS = 8
"""Rows of the Qwen2 vocabulary that no token uses, as in the real one."""

# ---------------------------------------------------------------- original-layout folders


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Metaspace BPE that begins a text with <s>, as Mistral's and Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted({c for text in corpus() for c in text} | set("[]/:INSTUERA\n▁'"))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a first token, as Qwen2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def reference_model(model_type: str, tokenizer: Any) -> LlavaForConditionalGeneration:
    """transformers' own model, with a row for the image token where the original has none."""
    text_class = {"llava_mistral": MistralConfig, "llava_qwen2": Qwen2Config}
    num_tokens = len(tokenizer)
    spare = SPARE_ROWS if model_type == "llava_qwen2" else -num_tokens % 64 or 64
    text = text_class.get(model_type, LlamaConfig)(
        vocab_size=num_tokens + spare,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=VISION, image_token_index=num_tokens)
    )
    for parameter in model.parameters():  # biases and norms too, so that none can be confused
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def original_state(model: LlavaForConditionalGeneration, num_rows: int) -> dict[str, Tensor]:
    """The tensors as LLaVA's own code names them, with `num_rows` of vocabulary."""
    state = {f"model.{n}": t for n, t in model.model.language_model.state_dict().items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:num_rows]
    state["lm_head.weight"] = model.lm_head.weight[:num_rows]
    projector = model.model.multi_modal_projector
    for place, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        for name, tensor in linear.state_dict().items():
            state[f"model.mm_projector.{place}.{name}"] = tensor
    for name, tensor in model.model.vision_tower.state_dict().items():
        state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def original_config(model_type: str, model: Any, num_rows: int) -> dict[str, Any]:
    """config.json as LLaVA's own code wrote it, its own keys among those of the LLM."""
    text = model.config.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id")
    return {name: getattr(text, name) for name in names} | {
        "_name_or_path": "somewhere/else",
        "architectures": ["LlavaForTest"],
        "bos_token_id": text.bos_token_id,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": VISION.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER_NAME,
        "model_type": model_type,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "use_mm_proj": True,
        "vocab_size": num_rows,
    }


def save_state(folder: Path, state: dict[str, Tensor], storage: str) -> None:
    """One safetensors file, one pickle beside a projector of its own, or two shards of either."""
    if storage == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    if storage == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        projector = {n: t for n, t in state.items() if "mm_projector" in n}
        torch.save(projector, folder / "mm_projector.bin")
        return
    suffix = storage.removeprefix("sharded ")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(state)
    table = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        tensors = {name: state[name] for name in chosen}
        if suffix == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        table |= dict.fromkeys(chosen, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))


class Original:
    """A checkpoint in the original layout, and the transformers model it was written from."""

    def __init__(self, folder: Path, model_type: str, storage: str = "safetensors"):
        folder.mkdir(parents=True)
        self.folder, self.model_type = folder, model_type
        self.tokenizer = byte_level() if model_type == "llava_qwen2" else sentencepiece_like()
        self.num_tokens = len(self.tokenizer)
        self.reference = reference_model(model_type, self.tokenizer)
        spare = SPARE_ROWS if model_type == "llava_qwen2" else 0
        self.num_rows = self.num_tokens + spare
        self.state = original_state(self.reference, self.num_rows)
        self.config = original_config(model_type, self.reference, self.num_rows)
        self.tokenizer.save_pretrained(folder)
        self.save(storage)

    def save(self, storage: str = "safetensors") -> None:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_state(self.folder, self.state, storage)

    def chat(self) -> ChatBuilder:
        processor = load_processor(str(self.folder))
        return ChatBuilder(processor, image_size=IMAGE_SIZE, max_tokens=512)


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """One family after the other; read only."""
    return Original(tmp_path_factory.mktemp("original") / request.param, request.param)


@pytest.fixture
def mistral(tmp_path: Path) -> Original:
    """One to damage."""
    return Original(tmp_path / "llava-med", "llava_mistral")


# ---------------------------------------------------------------- names


def test_every_original_name_has_one_name_in_transformers_and_back(original: Original) -> None:
    converted = convert_names(original.state, "here")
    assert converted.keys() == original.reference.state_dict().keys()
    assert len(converted) == len(original.state)  # each name used once, none twice
    for name, tensor in original.state.items():
        new = transformers_name(name)
        assert new is not None and converted[new] is tensor
    theirs = original.reference.state_dict()
    assert all(torch.equal(t, theirs[n][: len(t)]) for n, t in converted.items())


def test_real_shapes_of_llava_med_agree_with_transformers_on_the_meta_device() -> None:
    """Names and shapes of LLaVA-Med v1.5 7B written out by hand, from its published sizes."""
    d, inner, kv, vocabulary, v = 4096, 14336, 1024, 32000, 1024
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (vocabulary, d),
        "model.mm_projector.0.weight": (d, v),
        "model.mm_projector.0.bias": (d,),
        "model.mm_projector.2.weight": (d, d),
        "model.mm_projector.2.bias": (d,),
    }
    for i in range(32):
        layer = f"model.layers.{i}."
        rows = {"q": d, "k": kv, "v": kv, "o": d}
        shapes |= {f"{layer}self_attn.{k}_proj.weight": (n, d) for k, n in rows.items()}
        shapes |= {f"{layer}mlp.{k}_proj.weight": (inner, d) for k in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (d, inner)
        shapes |= {f"{layer}{k}_layernorm.weight": (d,) for k in ("input", "post_attention")}
    tower = "model.vision_tower.vision_tower.vision_model."
    shapes |= {
        f"{tower}embeddings.class_embedding": (v,),
        f"{tower}embeddings.patch_embedding.weight": (v, 3, 14, 14),
        f"{tower}embeddings.position_embedding.weight": (577, v),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{tower}{norm}.weight": (v,), f"{tower}{norm}.bias": (v,)}
    for i in range(24):
        layer = f"{tower}encoder.layers.{i}."
        maps = {f"self_attn.{k}_proj": (v, v) for k in ("q", "k", "v", "out")}
        maps |= {"mlp.fc1": (4 * v, v), "mlp.fc2": (v, 4 * v)}
        for name, shape in maps.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.weight": (v,), f"{layer}{norm}.bias": (v,)}
    config = {
        "model_type": "llava_mistral",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "hidden_size": d,
        "intermediate_size": inner,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
    }
    vision = CLIPVisionConfig(
        hidden_size=v,
        intermediate_size=4 * v,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    num_rows = num_vocabulary_rows(vocabulary, vocabulary + 1)
    assert num_rows == 32064
    built = llava_config(config, vision, image_token_id=vocabulary, vocab_size=num_rows)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(built)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted = convert_names(state, "here")
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        converted[name] = grown_rows(converted[name], num_rows)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == wanted
    assert built.text_config.rope_parameters["rope_theta"] == 1e6
    assert built.text_config.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    "rows, tokens, expected", [(32000, 32001, 32064), (152064, 151647, 152064), (64, 64, 64)]
)
def test_a_vocabulary_grows_only_when_it_must_and_never_shrinks(
    rows: int, tokens: int, expected: int
) -> None:
    assert num_vocabulary_rows(rows, tokens) == expected


def test_an_added_row_of_the_head_never_has_the_largest_logit() -> None:
    head = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 2.0]])
    grown = grown_rows(head, 5)
    assert torch.equal(grown[3:], torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    hidden = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    assert int((hidden @ grown.T).argmax(1).max()) < 3


# ---------------------------------------------------------------- loading


@torch.no_grad()
def test_generation_equals_that_of_the_model_it_was_written_from(original: Original) -> None:
    chat = original.chat()
    mllm = MLLMPathway.load(str(original.folder)).eval()
    samples = [language_sample(chat, s, q, None) for s, q in ((1, "Why?"), (2, "Is it bright?"))]
    batch = collate(samples, 0, chat.tokenizer.pad_token_id, padding_side="left")
    never = list(range(original.num_rows, original.reference.config.text_config.vocab_size))
    theirs = original.reference.generate(
        **batch.mllm_inputs,
        max_new_tokens=12,
        do_sample=False,
        suppress_tokens=never or None,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    ours = mllm.generate(batch.mllm_inputs, batch.image_slots, max_new_tokens=12).tokens
    assert torch.equal(ours, theirs[:, batch.mllm_inputs["input_ids"].shape[1] :])
    hidden = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    wanted = original.reference.model(**batch.mllm_inputs).last_hidden_state
    read = batch.mllm_inputs["attention_mask"].bool()  # padding holds nothing defined
    difference = float((hidden - wanted)[read].abs().max())
    print(f"{original.model_type}: largest difference {difference:.1e}")
    assert difference <= 1e-5


def test_the_image_token_takes_an_unused_row_or_a_new_one(original: Original) -> None:
    chat = original.chat()
    mllm = MLLMPathway.load(str(original.folder))
    assert chat.image_token_id == mllm.base.config.image_token_id == original.num_tokens
    rows = mllm.base.get_input_embeddings().weight.shape[0]
    if original.model_type == "llava_qwen2":
        assert rows == original.num_rows
    else:
        assert rows % 64 == 0 and original.num_tokens < rows <= original.num_tokens + 64
    assert mllm.base.lm_head.weight.shape[0] == rows
    assert mllm.base.config.text_config.vocab_size == rows


@pytest.mark.parametrize("storage", ["bin", "sharded safetensors", "sharded bin"])
def test_every_way_to_store_the_weights_gives_the_same_model(
    storage: str, mistral: Original, tmp_path: Path
) -> None:
    other = Original(tmp_path / "other", "llava_mistral", storage)
    first, second = (MLLMPathway.load(str(o.folder)).state_dict() for o in (mistral, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_requested_dtype_is_given_and_buffers_of_older_versions_are_left_out(
    mistral: Original,
) -> None:
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    mistral.state[inv_freq] = torch.ones(8)
    mistral.save()
    mllm = MLLMPathway.load(str(mistral.folder), dtype=torch.bfloat16)
    assert {p.dtype for p in mllm.parameters()} == {torch.bfloat16}
    assert mllm.report is not None and mllm.report.matched == len(mistral.state) - 1
    assert mllm.report.dropped["rotary_emb.inv_freq"].number == 1
    grown = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert grown == mllm.report.converted.keys()
    print(mllm.report)


def test_adapters_fit_and_only_the_language_model_gets_them(original: Original) -> None:
    mllm = MLLMPathway.load(str(original.folder), lora=LORA._replace(rank=2, alpha=4))
    adapted = [n for n, _ in mllm.named_parameters() if ".lora_A" in n]
    assert len(adapted) == 7 * 2 and all("language_model.layers" in n for n in adapted)
    assert mllm.vision_tower_parameters()


def test_an_export_restores_on_the_original_checkpoint(mistral: Original, tmp_path: Path) -> None:
    mllm = MLLMPathway.load(str(mistral.folder), lora=LORA._replace(rank=2, alpha=4))
    for parameter in mllm.adapter_parameters():
        torch.nn.init.normal_(parameter)
    mllm.save(tmp_path / "export", mllm.state_dict())
    restored = MLLMPathway.restore(tmp_path / "export", str(mistral.folder)).state_dict()
    assert all(torch.equal(t, restored[n]) for n, t in mllm.state_dict().items())


# ---------------------------------------------------------------- vision towers elsewhere


def without_tower(original: Original) -> None:
    original.state = {n: t for n, t in original.state.items() if "vision_tower" not in n}
    original.save()


@pytest.mark.parametrize("place", ["beside", "named"])
def test_a_vision_tower_outside_the_file_is_read_from_where_it_lies(
    place: str, mistral: Original, tmp_path: Path
) -> None:
    inside = MLLMPathway.load(str(mistral.folder)).state_dict()
    folder = mistral.folder / "mm_vision_tower" if place == "beside" else tmp_path / "clip"
    mistral.reference.model.vision_tower.save_pretrained(folder)
    own = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.1, 0.2, 0.3],
    )
    own.save_pretrained(folder)
    mistral.config["mm_vision_tower"] = "some/tower" if place == "beside" else str(folder)
    without_tower(mistral)
    mllm = MLLMPathway.load(str(mistral.folder))
    outside = mllm.state_dict()
    assert all(torch.equal(tensor, outside[name]) for name, tensor in inside.items())
    assert mllm.report is not None
    assert any("read from the vision tower" in how for how in mllm.report.converted.values())
    chat = mistral.chat()
    assert chat.tokens_per_image == (IMAGE_SIZE // 16) ** 2
    assert chat.processor.image_processor.image_mean == (0.1, 0.2, 0.3)


def test_a_tower_without_its_image_processor_is_refused(mistral: Original) -> None:
    folder = mistral.folder / "mm_vision_tower"
    mistral.reference.model.vision_tower.save_pretrained(folder)
    mistral.config["mm_vision_tower"] = "some/tower"
    mistral.save()
    with pytest.raises(ValueError, match=r"needs the vision tower .*Can't load image processor"):
        load_processor(str(mistral.folder))


def test_an_unreachable_vision_tower_is_named_with_a_way_out(mistral: Original) -> None:
    mistral.config["mm_vision_tower"] = str(mistral.folder / "nowhere" / "clip-vit-tiny-patch16-64")
    without_tower(mistral)
    for opener in (MLLMPathway.load, load_processor):
        with pytest.raises(ValueError, match=r"needs the vision tower '.*nowhere.*mm_vision_tower"):
            opener(str(mistral.folder))


# ---------------------------------------------------------------- refusals


def test_missing_unexpected_and_unfitting_tensors_are_refused_by_name(mistral: Original) -> None:
    whole = dict(mistral.state)

    def refused(message: str) -> None:
        mistral.save()
        with pytest.raises(ValueError, match=message):
            MLLMPathway.load(str(mistral.folder))
        mistral.state = dict(whole)

    del mistral.state["model.layers.1.mlp.up_proj.weight"]
    refused(r"1 missing tensors, such as .*language_model\.layers\.1\.mlp\.up_proj")
    mistral.state["model.layers.2.mlp.up_proj.weight"] = torch.ones(96, 64)
    refused(r"1 unexpected tensors, such as .*layers\.2\.mlp\.up_proj")
    mistral.state["model.image_newline"] = torch.ones(64)
    refused(r"holds 1 tensors that the layout of LLaVA-1.5 does not have: model\.image_newline")
    mistral.state["model.norm.weight"] = torch.ones(63)
    refused(r"norm\.weight has shape \(63,\), expected \(64,\)")
    del mistral.state["model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"]
    refused(r"1 missing tensors, such as .*vision_tower\.pre_layrnorm\.bias")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("mm_projector_type", "linear", "mm_projector_type: 'linear', expected mlp2x_gelu"),
        ("image_aspect_ratio", "anyres", "tiling of LLaVA-NeXT"),
        ("mm_patch_merge_type", "spatial_unpad", "mm_patch_merge_type: 'spatial_unpad'"),
    ],
)
def test_relatives_that_compute_something_else_are_refused(
    key: str, value: str, message: str, mistral: Original
) -> None:
    mistral.config[key] = value
    mistral.save()
    for opener in (MLLMPathway.load, load_processor):
        with pytest.raises(ValueError, match=message):
            opener(str(mistral.folder))


def test_a_folder_without_its_tokenizer_is_refused(mistral: Original) -> None:
    for file in mistral.folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"cannot open the tokenizer in .*expected tokenizer"):
        load_processor(str(mistral.folder))


# ---------------------------------------------------------------- prompts


PROMPTS = {
    "llava_mistral": ("[INST] <image>\nWhy? [/INST]", "yes</s>", "[INST] And? [/INST]"),
    "llava_qwen2": (
        "<|user|>\n<image>\nWhy?\n<|assistant|>\n",
        "yes<|endoftext|>",
        "\n<|user|>\nAnd?\n<|assistant|>\n",
    ),
    "llava_llama": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\nWhy? "
        "ASSISTANT:",
        "yes</s>",
        " USER: And? ASSISTANT:",
    ),
}
PROMPTS["llava"] = PROMPTS["llava_llama"]


def test_prompts_are_those_the_family_was_tuned_on(original: Original) -> None:
    first, answer, second = PROMPTS[original.model_type]
    processor = original.chat().processor
    user = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": user}]
    keywords: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    assert processor.apply_chat_template(messages, **keywords) == first
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "And?"}]
    assert processor.apply_chat_template(messages, **keywords) == first + answer + second


def test_the_chat_builder_trains_on_the_answer_and_its_end_alone(original: Original) -> None:
    chat = original.chat()
    sequence = chat.sequence([Turn("user", "Why?", "open"), Turn("assistant", "yes", "open")])
    answer = sequence["input_ids"][sequence["labels"] != IGNORE_INDEX]
    assert chat.tokenizer.decode(answer).strip() == PROMPTS[original.model_type][1]
    assert int(answer[-1]) == chat.tokenizer.eos_token_id
    num_patches = (IMAGE_SIZE // 16) ** 2
    assert int((sequence["input_ids"] == chat.image_token_id).sum()) == num_patches
    begins = [i for i, token in enumerate(sequence["input_ids"].tolist()) if token == 1]
    assert begins == ([] if original.model_type == "llava_qwen2" else [0])


def test_marks_around_the_image_are_written_where_the_checkpoint_has_them(
    mistral: Original,
) -> None:
    mistral.config["mm_use_im_start_end"] = True
    mistral.save()
    template = load_processor(str(mistral.folder)).chat_template
    assert "<im_start><image><im_end>" in template


def test_a_template_in_the_folder_that_knows_images_is_kept(mistral: Original) -> None:
    own = "{% for m in messages %}{{ '<image>' if m else '' }}{% endfor %}"
    (mistral.folder / "chat_template.jinja").write_text(own)
    assert load_processor(str(mistral.folder)).chat_template == own
    (mistral.folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert "[INST]" in load_processor(str(mistral.folder)).chat_template


def test_any_text_template_can_be_extended_to_image_parts(original: Original) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ';' }}{% endfor %}"
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    text = original.tokenizer.apply_chat_template(
        messages, chat_template=with_image_parts(plain, "<image>\n"), tokenize=False
    )
    assert text == "user: <image>\nab;assistant: c;"


def test_the_files_written_here_are_in_the_original_layout(mistral: Original) -> None:
    names = load_file(mistral.folder / "model.safetensors").keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.mm_projector.2.bias" in names
    assert not any("language_model" in name for name in names)
