"""A LLaVA-style image-text model around a language model that has only ever read text.

    build_llava("outputs/base", "SmolLM2-135M-Instruct.gguf", image_size=128)

The language model keeps its weights, tokenizer and chat template. The image token is added to its
vocabulary, image parts to its template, and before it stand a CLIP vision tower and LLaVA's
two-layer projector: from a folder, or small and random. Those two then have to be trained
(scripts/make_base_mllm.py does it); the folder opens through the same `Auto*` classes as LLaVA-1.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from biascare.models.weights.files import refuse_code
from biascare.models.weights.llava import grown_rows, num_vocabulary_rows
from biascare.models.weights.llava_templates import IMAGE_TOKEN, with_image_parts


class SmallTower(NamedTuple):
    """Sizes of a vision tower that is trained from random weights: about 5 M parameters."""

    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    patch_size: int = 16


def open_language_model(path: str | Path) -> tuple[Any, Any]:
    """(causal language model in fp32, its tokenizer) of a Hugging Face folder or a .gguf file.

    Raises ValueError when it cannot be opened or has no chat template.
    """
    # A .gguf file is named inside its folder, which is where its tokenizer is looked for as well.
    place = Path(path)
    folder, chosen = place, dict[str, str]()
    if place.suffix == ".gguf":
        folder, chosen = place.parent, {"gguf_file": place.name}
    refuse_code(folder)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)} | chosen
    where["trust_remote_code"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # fp32 whatever the file holds: a quantised one is unpacked, and the result gets trained.
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot open the language model {str(path)!r} ({reason}); name a folder in Hugging "
            "Face format or a .gguf file (which needs the package gguf)"
        ) from error
    # A base model has none, and an invented one would be a prompt that it never saw.
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {str(path)!r} has no chat template; take an instruction-tuned model"
        )
    return model, tokenizer


def _open_tower(path: str | Path) -> tuple[Any, Any]:
    """(CLIP vision tower, its image processor) of a folder."""
    refuse_code(path)
    try:
        return CLIPVisionModel.from_pretrained(path), CLIPImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot open the vision tower {str(path)!r} ({reason}); name a CLIP folder in Hugging "
            "Face format with its preprocessor_config.json"
        ) from error


def _small_tower(sizes: SmallTower, image_size: int) -> tuple[Any, Any]:
    # CLIP would cut off what does not fill a patch, and its positions would be those of a smaller
    # image than the processor makes.
    if image_size < 1 or image_size % sizes.patch_size:
        nearest = max(1, round(image_size / sizes.patch_size)) * sizes.patch_size
        raise ValueError(
            f"image size: got {image_size}, expected a multiple of the vision tower's patches, "
            f"{sizes.patch_size} pixels; the nearest is {nearest}"
        )
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
    return CLIPVisionModel(CLIPVisionConfig(**sizes._asdict(), image_size=image_size)), processor


def _join(language_model: Any, tower: Any, image_token_id: int) -> Any:
    """One model with both parts' weights and a fresh projector."""
    text = language_model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "dtype"):
        text.pop(key, None)  # of the file it came from; these weights are plain fp32
    before = text["vocab_size"]
    text["vocab_size"] = num_vocabulary_rows(before, image_token_id + 1)
    tied = bool(text["tie_word_embeddings"])
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=tower.config,
            image_token_index=image_token_id,
            vision_feature_layer=-2,  # as in LLaVA-1.5
            vision_feature_select_strategy="default",
            tie_word_embeddings=tied,
        )
    )
    # Part by part and strictly: `from_pretrained` would start at random what it does not find.
    state = language_model.base_model.state_dict()
    state["embed_tokens.weight"] = grown_rows(state["embed_tokens.weight"], text["vocab_size"])
    model.model.language_model.load_state_dict(state)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    if not tied:  # a tied head is the embedding, which has grown already
        head = language_model.get_output_embeddings().weight.detach()
        model.lm_head.load_state_dict({"weight": grown_rows(head, text["vocab_size"])})
    return model


def build_llava(
    folder: str | Path,
    language_model: str | Path,
    *,
    vision_tower: str | Path | None = None,
    image_size: int = 128,
    small_tower: SmallTower | None = None,
    seed: int = 0,
) -> None:
    """Write a LLaVA in Hugging Face format to `folder`; its projector is random.

    `vision_tower`: a CLIP folder, which brings its own image size; without one, a random tower of
    `small_tower`'s sizes for images of `image_size` pixels. Raises ValueError for parts that cannot
    be opened.
    """
    causal, tokenizer = open_language_model(language_model)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    with torch.random.fork_rng():  # the caller's own random numbers go on as if nothing happened
        torch.manual_seed(seed)
        if vision_tower is not None:
            tower, image_processor = _open_tower(vision_tower)
        else:
            tower, image_processor = _small_tower(small_tower or SmallTower(), image_size)
        model = _join(causal, tower, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    # Padding is masked everywhere, so any token may stand for it; generation only wants one.
    pad = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=with_image_parts(tokenizer.chat_template),
        image_token=IMAGE_TOKEN,
    ).save_pretrained(folder)
