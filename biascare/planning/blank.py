"""The dual-path model as shapes: at true size, without a weight and without a file.

    config = mllm_config("HuatuoGPT-Vision-7B-Qwen2.5VL")
    with torch.device("meta"):
        model = build_network(mllm="...", opener=weightless(config), ...)
    batch = blank_batch(model, BatchShape(...))

The run's own builder builds it, with another opener of the language model. So a plan follows the
code and knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from biascare.interfaces import POINT_POSITIVE, Batch, Prompts
from biascare.models.language.pathway import MLLMOpener
from biascare.models.network import DualPathNetwork
from biascare.models.weights.files import refuse_code
from biascare.models.weights.llava import (
    is_original_llava,
    llava_config,
    num_vocabulary_rows,
    read_config,
)
from biascare.settings.keys import MLLM_FAMILIES

# ---------------------------------------------------------------- architectures


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    # mrope_section is of heads of 128, which all sizes of this family have.
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": rope,
    }


def _qwen_vl(text: dict[str, Any], vocab_size: int, *, tied: bool) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=text | {"vocab_size": vocab_size, "tie_word_embeddings": tied},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],  # the merger speaks the LLM's language
        },
        tie_word_embeddings=tied,
    )


def _clip_large() -> CLIPVisionConfig:
    """openai/clip-vit-large-patch14-336, the tower of every LLaVA here."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llava(text: PretrainedConfig, image_token: int) -> LlavaConfig:
    return LlavaConfig(
        text_config=text,
        vision_config=_clip_large(),
        image_token_index=image_token,
        vision_feature_layer=-2,  # LLaVA reads the layer before the last
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


_QWEN_7B = _qwen(3584, 18944, 28, 28, 4)

KNOWN_MLLMS: dict[str, Callable[[], PretrainedConfig]] = {
    "HuatuoGPT-Vision-7B-Qwen2.5VL": lambda: _qwen_vl(_QWEN_7B, 152064, tied=False),
    "Qwen2.5-VL-7B": lambda: _qwen_vl(_QWEN_7B, 152064, tied=False),
    "Qwen2.5-VL-3B": lambda: _qwen_vl(_qwen(2048, 11008, 36, 16, 2), 151936, tied=True),
    "LLaVA-1.5-7B": lambda: _llava(
        LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        32000,
    ),
    "LLaVA-Med": lambda: _llava(
        MistralConfig(
            vocab_size=num_vocabulary_rows(32000, 32001),
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            sliding_window=None,
        ),
        32000,
    ),
    "HuatuoGPT-Vision-7B": lambda: _llava(
        Qwen2Config(**_QWEN_7B | {"rope_parameters": None}, vocab_size=152064),
        151646,
    ),
}
"""Architectures that need no file. A longer name, such as a Hub id, whose last part begins
with one of these (`Qwen/Qwen2.5-VL-7B-Instruct`) is that architecture."""


def known_architecture(name: str) -> str | None:
    """The name in `KNOWN_MLLMS` that a folder name or Hub id means."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    fitting = [known for known in KNOWN_MLLMS if last.startswith(known.lower())]
    # The longest: "HuatuoGPT-Vision-7B" begins the name of its Qwen2.5-VL successor too.
    return max(fitting, key=len) if fitting else None


def mllm_config(path: str) -> Any:
    """Configuration of an image-text model: its folder's config.json, or a known architecture.

    Never asks the network; a Hub model that is in the local cache is found. Raises ValueError for
    what is neither.
    """
    if (Path(path) / "config.json").is_file():
        return _read(path)
    # Before the cache of the Hub: a plan must say the same on a machine that has the model.
    known = known_architecture(path)
    if known is not None:
        return KNOWN_MLLMS[known]()
    try:
        return _read(path, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"model.mllm: {path!r} is no folder with a config.json and no architecture known here "
            f"({', '.join(KNOWN_MLLMS)}); copy the model's config.json into a folder and name that"
        ) from error


def _read(path: str, **keywords: Any) -> Any:
    refuse_code(path)
    if not keywords:
        raw = read_config(path)
        if is_original_llava(raw):
            # The conversion adds an image token; upstream marks images by a negative id instead.
            num_tokens = raw["vocab_size"] + 1
            rows = num_vocabulary_rows(raw["vocab_size"], num_tokens)
            return llava_config(
                raw, _clip_large(), image_token_id=raw["vocab_size"], vocab_size=rows
            )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **keywords)
    if config.model_type not in MLLM_FAMILIES:
        raise ValueError(
            f"the model at {path!r} is of type {config.model_type!r}, expected an image-text model "
            f"of type {' or '.join(MLLM_FAMILIES)}; choose another model.mllm"
        )
    return config


# ---------------------------------------------------------------- model


def weightless(config: Any) -> MLLMOpener:
    """An opener of the image-text model that `config` describes; the path stays unread.

    Under `torch.device("meta")` it holds no weight.
    """

    def open_shapes(path: str, dtype: torch.dtype, attention: str) -> tuple[Any, None]:
        # Flash attention need not be installed: it has the shapes of the fused kernels of SDPA.
        kernel = "eager" if attention == "eager" else "sdpa"
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=kernel
        )
        return model, None

    return open_shapes


# ---------------------------------------------------------------- batch


class BatchShape(NamedTuple):
    """One micro-batch in numbers."""

    num_images: int  # segmentation items
    targets_per_image: int
    num_questions: int  # language items
    prompt_tokens: int  # text of an instruction or a question, the chat template's own included
    answer_tokens: int
    num_points: int  # prompt points of a row, padding included


class _ImageInputs(NamedTuple):
    """What the LLM's processor makes of the images."""

    tensors: dict[str, Tensor]
    tokens_per_image: int


def blank_batch(model: DualPathNetwork, shape: BatchShape) -> Batch:
    """A micro-batch of that shape: pixels on the meta device, everything else real.

    As from the collator, segmentation rows come first and carry no answer, so they are padded.
    """
    size = model.vision.image_size
    num_rows = shape.num_images * shape.targets_per_image
    masks = torch.zeros(num_rows, size, size, dtype=torch.uint8)
    # Not empty: rows without a mask are left out of the objective and would cost too little.
    masks[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    batch = Batch(
        images=None,
        row_image=None,
        row_sequence=None,
        row_target=None,
        masks=None,
        prompts=None,
        mllm_inputs={},
        image_slots=[],
        prompt_mask=None,
        answer_positions=None,
        answer_tokens=None,
        seed=0,
        facts=[],
        replaced={},
        num_samples=shape.num_images + shape.num_questions,
    )
    if model.label_head is not None:
        shown = torch.empty(shape.num_images, 3, size, size, dtype=torch.uint8, device="meta")
        labels = torch.zeros(shape.num_images, len(model.label_head.labels))
        labels[:, 0] = 1
        return batch._replace(images=shown, labels=labels)
    if num_rows:
        batch = batch._replace(
            # The meta device lets a step of a large model run on shapes; what the step reads as
            # numbers (rows, slots, masks) must be real.
            images=torch.empty(shape.num_images, 3, size, size, dtype=torch.uint8, device="meta"),
            row_image=torch.arange(shape.num_images).repeat_interleave(shape.targets_per_image),
            row_target=torch.arange(num_rows),
            masks=masks,
            prompts=Prompts(
                point_coords=torch.full((num_rows, shape.num_points, 2), size / 2),
                point_labels=torch.full((num_rows, shape.num_points), POINT_POSITIVE),
            ),
        )
    if model.mllm is None:
        return batch
    return batch._replace(
        row_sequence=torch.arange(num_rows) if num_rows else None, **_sequences(model, shape)
    )


def _sequences(model: DualPathNetwork, shape: BatchShape) -> dict[str, Any]:
    assert model.mllm is not None
    config = model.mllm.base.config
    num_rows = shape.num_images * shape.targets_per_image
    num_images = shape.num_images + shape.num_questions
    images = _image_inputs(config, num_images, model.vision.image_size)
    prompt = shape.prompt_tokens + images.tokens_per_image
    # One length for all, as the collator pads to the longest.
    length = prompt + (shape.answer_tokens if shape.num_questions else 0)
    num_sequences = num_rows + shape.num_questions
    is_answer = torch.zeros(num_sequences, length, dtype=torch.bool)
    is_answer[num_rows:, prompt:] = True
    is_image = torch.zeros(num_sequences, length, dtype=torch.bool)
    is_image[:, 1 : 1 + images.tokens_per_image] = True
    attention = torch.ones(num_sequences, length, dtype=torch.int64)
    attention[:num_rows, prompt:] = 0
    inputs = images.tensors | {
        "input_ids": torch.where(is_image, config.image_token_id, 1),
        "attention_mask": attention,
    }
    if config.model_type == "qwen2_5_vl":
        # Without it, M-RoPE would silently fall back to positions in one dimension.
        inputs["mm_token_type_ids"] = is_image.long()
    slots = torch.arange(shape.num_images).repeat_interleave(shape.targets_per_image).tolist()
    answers = is_answer.flatten().nonzero()[:, 0]
    return {
        "mllm_inputs": inputs,
        "image_slots": [*slots, *range(shape.num_images, num_images)],
        "prompt_mask": attention.bool() & ~is_answer,
        "answer_positions": answers - 1,  # a token is predicted at the position before it
        "answer_tokens": torch.zeros_like(answers),
    }


def _image_inputs(config: Any, num_images: int, image_size: int) -> _ImageInputs:
    """Pixels of the distinct images and how many tokens one becomes."""
    vision = config.vision_config
    if config.model_type == "qwen2_5_vl":
        step = vision.patch_size * vision.spatial_merge_size
        # Qwen rounds an image to whole merged patches: 256 pixels become 252.
        grid = max(1, round(image_size / step)) * vision.spatial_merge_size
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(num_images * grid**2, width, device="meta")
        grids = torch.tensor([[1, grid, grid]] * num_images)
        tensors = {"pixel_values": pixels, "image_grid_thw": grids}
        return _ImageInputs(tensors, grid**2 // vision.spatial_merge_size**2)
    # CLIP resizes whatever it gets to its own size: more tokens than our pixels would need.
    size = vision.image_size
    pixels = torch.empty(num_images, 3, size, size, device="meta")
    tokens = (size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy == "full":
        tokens += 1  # the class token
    return _ImageInputs({"pixel_values": pixels}, tokens)
