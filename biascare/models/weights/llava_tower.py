"""The CLIP vision tower of an original LLaVA checkpoint: found, described, read.

LLaVA's code stores a tower's weights in the checkpoint or not at all, and its configuration never:
`mm_vision_tower` names another folder or a model on the Hub. So that a checkpoint with its tower
inside needs no network, the configuration of OpenAI's CLIP towers is read off their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def tower_place(folder: Path, config: Mapping[str, Any]) -> str:
    """Where the vision tower lies: beside the checkpoint, where its config says, or on the Hub."""
    named = str(config["mm_vision_tower"])
    # Copies beside the checkpoint first: with them a machine needs no network.
    beside = [folder / "mm_vision_tower", folder / named, folder / Path(named).name]
    for place in [*beside, Path(named)]:
        if (place / "config.json").is_file():
            return str(place)
    return named


def _is_openai_clip(place: str) -> bool:
    """OpenAI's ViTs share what shapes cannot tell: heads of 64 channels and quick-GELU."""
    return Path(place).name.replace("_", "-").startswith("clip-vit-")


def _config_of_shapes(tower: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """The configuration of an OpenAI CLIP tower, from its tensors."""
    patch_weight = tower["embeddings.patch_embedding.weight"]
    num_positions = tower["embeddings.position_embedding.weight"].shape[0]
    # One position per patch and one for the class token, on a square grid.
    hidden_size, patch_size = patch_weight.shape[0], patch_weight.shape[-1]
    layers = {n.split(".")[2] for n in tower if n.startswith("encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=tower["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // 64,
        image_size=round((num_positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        hidden_act="quick_gelu",
    )


def _unreachable_tower(path: str, place: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path} needs the vision tower {place!r}, which cannot be opened ({first_line(error)}); "
        f"put a copy of it into the folder mm_vision_tower inside {path}, or make it reachable"
    )


def tower_config(path: str, place: str, tower: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """Configuration of the tower; from its own shapes where only those are at hand."""
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    inside = all(name in tower for name in (*needed, "encoder.layers.0.mlp.fc1.weight"))
    # A folder knows more than shapes do, and a name on the Hub would need a network.
    if inside and _is_openai_clip(place) and not Path(place).is_dir():
        return _config_of_shapes(tower)
    try:
        return CLIPVisionConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise _unreachable_tower(path, place, error) from error


def tower_weights(path: str, place: str) -> dict[str, Tensor]:
    """Tensors of the tower at `place`, under the names of `CLIPVisionModel`."""
    opener: Any = CLIPVisionModel  # typed as if it never returned loading info
    try:
        tower, report = opener.from_pretrained(place, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _unreachable_tower(path, place, error) from error
    # Unexpected ones are welcome: a whole CLIP brings its text tower along.
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise _unreachable_tower(path, place, ValueError(f"its weights lack {lacking[:3]}"))
    return dict(tower.state_dict())


def image_processor(folder: Path, place: str, vision: CLIPVisionConfig) -> CLIPImageProcessor:
    """The tower's own where it can be read, else OpenAI's for every CLIP ViT."""
    for owner in (Path(place), folder):
        if (owner / "preprocessor_config.json").is_file():
            return CLIPImageProcessor.from_pretrained(owner)
    if not _is_openai_clip(place):
        try:
            return CLIPImageProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise _unreachable_tower(str(folder), place, error) from error
    # Nothing is fetched for a CLIP of OpenAI: all of them were trained with the same statistics,
    # which are this class's defaults.
    size: Any = vision.image_size
    return CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
