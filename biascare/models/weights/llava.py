"""LLaVA checkpoints as LLaVA's own code wrote them, opened as transformers' `Llava` classes.

    if is_original_llava(read_config("microsoft/llava-med-v1.5-mistral-7b")):
        model, report = load_original_llava(path, dtype=torch.bfloat16, attention="sdpa")
        processor = load_original_llava_processor(path)

LLaVA-1.5, LLaVA-Med v1.5 and HuatuoGPT-Vision-7B name their tensors after a causal language model
that owns a vision tower, keep half of the tower's configuration elsewhere, and have no image token:
their code marks an image by an id outside the vocabulary. Everything is converted in memory, from
memory-mapped files, so nothing has to be written before a YAML can name such a folder. The vision
tower is taken from the checkpoint where it is inside, else from where `mm_vision_tower` points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from biascare.models.weights.files import listed, read_state_dict
from biascare.models.weights.llava_templates import (
    IMAGE_TOKEN,
    ORIGINAL_FAMILIES,
    original_chat_template,
)
from biascare.models.weights.llava_tower import (
    first_line,
    image_processor,
    tower_config,
    tower_place,
    tower_weights,
)
from biascare.models.weights.report import Dropped, LoadReport

ROW_MULTIPLE = 64
"""A vocabulary that must grow for the image token grows to a multiple of this, for fast GEMMs."""

WEIGHT_FILES = ["*.json", "*.bin", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""What is fetched of a checkpoint on the Hub."""

TOWER = "model.vision_tower."
RENAMES = (
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=(?:layers|embed_tokens|norm)\.)", "model.language_model."),
    (r"lm_head\.", "lm_head."),
)
"""Beginnings of names, original to transformers 5. They exclude each other."""

DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of buffers that older versions stored and every version computes."""

FEATURES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
"""`mm_vision_select_feature` -> `vision_feature_select_strategy`."""


# ---------------------------------------------------------------- configuration


def read_config(path: str) -> dict[str, Any]:
    """config.json of a folder or of a model on the Hub, unread by any model class.

    Raises OSError where there is none.
    """
    config: dict[str, Any] = PretrainedConfig.get_config_dict(path)[0]
    if not config:
        raise OSError(f"{path} has no config.json")
    return config


def is_original_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json was written by LLaVA's own code."""
    return config.get("model_type") in ORIGINAL_FAMILIES and "mm_vision_tower" in config


def _check_supported(path: str, config: Mapping[str, Any]) -> None:
    """Refuse the relatives of LLaVA-1.5 that compute something else."""
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": tuple(FEATURES),
        "mm_patch_merge_type": ("flat",),
    }
    for key, values in expected.items():
        # Older files lack keys. Where that means something else, such as a linear projector, the
        # names of the tensors give it away.
        got = config.get(key, values[0])
        if got not in values:
            raise ValueError(
                f"{path}/config.json says {key}: {got!r}, expected {' or '.join(values)}: only "
                "checkpoints built like LLaVA-1.5 open here; choose another model.mllm"
            )
    # It was trained on several tiles of an image, and would be shown one.
    if config.get("image_aspect_ratio") == "anyres":
        raise ValueError(
            f"{path}/config.json says image_aspect_ratio: 'anyres', the tiling of LLaVA-NeXT, "
            "which LlavaForConditionalGeneration does not compute; choose another model.mllm"
        )


def _feature_strategy(config: Mapping[str, Any]) -> Literal["default", "full"]:
    return FEATURES[config.get("mm_vision_select_feature", "patch")]


def llava_config(
    config: Mapping[str, Any], vision: CLIPVisionConfig, *, image_token_id: int, vocab_size: int
) -> LlavaConfig:
    """The configuration of transformers' class for an original one and its vision tower's."""
    language = CONFIG_MAPPING[ORIGINAL_FAMILIES[config["model_type"]].language_model]
    # One config.json mixes the language model's keys with LLaVA's own; only the former may pass.
    # The two of the rotary positions have other names in transformers 5, which still reads these.
    known = {*language().to_dict(), "rope_theta", "rope_scaling"}
    unread = ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path")
    values = {k: v for k, v in config.items() if k in known and k not in unread}
    tied = values.get("tie_word_embeddings", False)
    return LlavaConfig(
        text_config=language(**values | {"vocab_size": vocab_size}),
        vision_config=vision,
        image_token_index=image_token_id,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_feature_strategy(config),
        tie_word_embeddings=tied,
    )


# ---------------------------------------------------------------- names and tensors


def transformers_name(name: str) -> str | None:
    """The name of a tensor in transformers 5; None for a name this layout does not have."""
    for pattern, replacement in RENAMES:
        match = re.match(pattern, name)
        if match:
            return replacement + name[match.end() :]
    return None


def convert_names(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The same tensors under the names of transformers 5, without `DERIVED` buffers.

    Raises ValueError for names that the layout does not have or that collide.
    """
    converted: dict[str, Tensor] = {}
    strangers = []
    for name, tensor in state.items():
        if name.endswith(DERIVED):
            continue
        new = transformers_name(name)
        if new is None:
            strangers.append(name)
        elif new in converted:  # which of the two was trained, nobody can tell
            raise ValueError(f"{path} holds {new!r} twice, once as {name!r}; copy it again")
        else:
            converted[new] = tensor
    if strangers:
        raise ValueError(
            f"{path} holds {len(strangers)} tensors that the layout of LLaVA-1.5 does not have: "
            f"{listed(sorted(strangers))}; this is another kind of model, choose another model.mllm"
        )
    return converted


def grown_rows(weight: Tensor, num_rows: int) -> Tensor:
    """`weight` [V, d] with rows appended up to `num_rows`, each the mean of the others.

    In a language head the mean row's logit is the mean of all logits: never the largest.
    """
    missing = num_rows - weight.shape[0]
    if missing <= 0:
        return weight
    # Of tens of thousands of rows, so in fp32.
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def num_vocabulary_rows(num_rows: int, num_tokens: int) -> int:
    """Rows of the embedding for `num_tokens`: never fewer than there are."""
    # Qwen's has more rows than tokens, for fast products; `resize_token_embeddings` drops them.
    return num_rows if num_tokens <= num_rows else -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE


# ---------------------------------------------------------------- loading


def _local_folder(path: str) -> Path:
    """The checkpoint's folder, fetched from the Hub where `path` is an id."""
    if Path(path).is_dir():
        return Path(path)
    # Imported here, because whoever has a folder needs no Hub.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=WEIGHT_FILES))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot fetch {path!r} from the Hub ({first_line(error)}); download it elsewhere and "
            "give model.mllm the folder"
        ) from error


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, which knows the image token."""
    try:
        # With a configuration given, it does not ask what a model_type unknown to it would need.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=PretrainedConfig(), trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"cannot open the tokenizer in {folder} ({first_line(error)}); expected "
            "tokenizer.json, or tokenizer.model and the package sentencepiece"
        ) from error
    # LLaVA's code marks an image by the id -200, which is in no vocabulary.
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def _whole_state(
    path: str, folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], CLIPVisionConfig, LoadReport]:
    """Tensors under new names, the tower's configuration, and what was done to the file's."""
    # By name where there is one whole file: a projector or a training state may lie beside it.
    whole = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = read_state_dict(next((each for each in whole if each.is_file()), folder))
    state = convert_names(file, path)
    derived = {ending: sum(name.endswith(ending) for name in file) for ending in DERIVED}
    place = tower_place(folder, config)
    converted = {}
    # A tower inside may have been tuned with the rest, so it goes before the one that it came from.
    if not any(name.startswith(TOWER) for name in state):
        tower = {TOWER + name: t for name, t in tower_weights(path, place).items()}
        converted = dict.fromkeys(tower, f"read from the vision tower {place}")
        state |= tower
    report = LoadReport(
        layout=f"LLaVA ({config['model_type']})",
        matched=len(state),
        converted=converted,
        missing=[],
        unexpected=[],
        dropped={k: Dropped(n, "computed anew") for k, n in derived.items() if n},
    )
    inside = {n.removeprefix(TOWER): t for n, t in state.items() if n.startswith(TOWER)}
    return state, tower_config(path, place, inside), report


def load_original_llava(path: str, *, dtype: torch.dtype, attention: str) -> tuple[Any, LoadReport]:
    """`LlavaForConditionalGeneration` with the weights of an original checkpoint.

    Its vocabulary is that of the file, grown where the image token would not fit in. Raises
    ValueError for missing, unexpected or unfitting tensors, and for an unreachable vision tower.
    """
    config = read_config(path)
    _check_supported(path, config)
    folder = _local_folder(path)
    state, vision, report = _whole_state(path, folder, config)
    tokenizer = _tokenizer(folder)
    before = config["vocab_size"]
    num_rows = num_vocabulary_rows(before, len(tokenizer))
    if num_rows > before:
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            # One of another size is left as it is, for `_check_complete` to refuse by name.
            if name in state and state[name].shape[0] == before:
                state[name] = grown_rows(state[name], num_rows)
                report.converted[name] = f"{before} -> {num_rows} rows, for the image token"
    opener: Any = LlavaForConditionalGeneration  # typed as if it never returned loading info
    model, found = opener.from_pretrained(
        None,
        config=llava_config(
            config,
            vision,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            vocab_size=num_rows,
        ),
        state_dict=state,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below
    )
    _check_complete(path, found)
    # Opened from memory, the model has read no generation_config.json, and an answer needs an end.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return model, report


def _check_complete(path: str, report: Mapping[str, Any]) -> None:
    """ValueError unless every tensor of the model was in the files, and the reverse."""
    named = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    problems = [
        f"{len(names)} {kind} tensors, such as {names[:3]}"
        for kind, names in named.items()
        if names
    ]
    problems += [
        f"{name} has shape {tuple(found)}, expected {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    # transformers only warns, and starts at random what a file lacks.
    if problems:
        raise ValueError(
            f"the weights in {path} do not fit its config.json: {'; '.join(problems[:4])} "
            "(names of transformers 5); copy the checkpoint again"
        )


def load_original_llava_processor(path: str) -> LlavaProcessor:
    """Tokenizer, CLIP image processor and the chat template of the checkpoint's family.

    A chat template in the folder that knows image parts is kept instead.
    """
    config = read_config(path)
    _check_supported(path, config)
    folder = _local_folder(path)
    vision = _whole_state(path, folder, config)[1]
    tokenizer = _tokenizer(folder)
    return LlavaProcessor(
        image_processor=image_processor(folder, tower_place(folder, config), vision),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_feature_strategy(config),
        num_additional_image_tokens=1,
        chat_template=original_chat_template(config, tokenizer.chat_template),
        image_token=IMAGE_TOKEN,
    )
