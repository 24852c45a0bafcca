"""A tiny image-text model in Hugging Face format, for the demo, the tests and dry runs.

    build_tiny_mllm("outputs/base", texts=corpus, family="qwen2_5_vl")

The folder holds a tokenizer trained on the given texts, an image processor, a chat template and
random weights (about a million parameters). It opens through the same `Auto*` classes as a
7B checkpoint, so what runs on it is the real loading and training path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

IMAGE_TOKENS = {"qwen2_5_vl": "<|image_pad|>", "llava": "<image>"}
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
)

IMAGE_TEMPLATES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # Every byte, so that a question with a letter the corpus lacks has no unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Trained on the spot: with a tokenizer of a large model, the embedding would be the model.
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def _text_sizes(hidden_size: int, num_layers: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # fewer than heads, so that grouped queries are tested too
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,  # as in the 7B models that this one stands for
    }


def _build_qwen(tokenizer: Any, hidden_size: int, num_layers: int, vision_size: int) -> Any:
    head_dim = hidden_size // 4
    # M-RoPE's halves of a head for time, row and column, in Qwen's proportion 2 : 3 : 3.
    sections = [head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config=_text_sizes(hidden_size, num_layers, tokenizer) | {"rope_parameters": rope},
        vision_config={
            "depth": 3,
            "hidden_size": vision_size,
            "intermediate_size": 2 * vision_size,
            "num_heads": 4,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [0, 1, 2],  # windows would only slow so small a grid
            "window_size": 56,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _build_llava(
    tokenizer: Any, hidden_size: int, num_layers: int, vision_size: int, image_size: int
) -> Any:
    config = LlavaConfig(
        text_config=LlamaConfig(**_text_sizes(hidden_size, num_layers, tokenizer)),
        vision_config=CLIPVisionConfig(
            hidden_size=vision_size,
            intermediate_size=2 * vision_size,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=16,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _processor(family: str, tokenizer: Any, image_size: int) -> Any:
    # One template for both families, so that a difference between them is not one of prompts.
    template = CHAT_TEMPLATE.replace("IMAGE", IMAGE_TEMPLATES[family])
    if family == "qwen2_5_vl":
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=template,
        )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        ),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy takes off again
        chat_template=template,
        image_token="<image>",
    )


def build_tiny_mllm(
    folder: str | Path,
    texts: Iterable[str],
    *,
    family: str = "qwen2_5_vl",
    hidden_size: int = 128,
    num_layers: int = 4,
    vision_size: int = 64,
    image_size: int = 128,
    vocab_size: int = 600,
    seed: int = 0,
) -> None:
    """Write a tiny checkpoint of `family` ("qwen2_5_vl" or "llava") to `folder`.

    `texts` train the tokenizer; `image_size` (pixels) is fixed for llava, free for qwen.
    """
    if family not in IMAGE_TOKENS:  # before anything is written to the folder
        raise ValueError(f"unknown family {family!r}; known: {sorted(IMAGE_TOKENS)}")
    tokenizer = _train_tokenizer(texts, vocab_size)
    # Tests and the demo count on equal weights for equal seeds, and on their own random state.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "qwen2_5_vl":
            model = _build_qwen(tokenizer, hidden_size, num_layers, vision_size)
        else:
            model = _build_llava(tokenizer, hidden_size, num_layers, vision_size, image_size)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    # Stated, because transformers would warn of a guess at every generation.
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    _processor(family, tokenizer, image_size).save_pretrained(folder)
