"""Vision weights that others trained: recognised, mapped to our names, loaded, reported.

    report = load_vision_checkpoint(pathway, "weights/IMISNet-B.pth")
    print(report)

Nothing is skipped in silence: every tensor is loaded, or stands in its layout's list of what is
left out and why; a layer without weights is an error unless the same list allows it. What does not
depend on the image size is copied bit for bit; positions are resampled to the grid of this run. The
trade-off: a file that is only almost of a known layout is refused, with the keys that do not fit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from biascare.models.vision.pathway import VISION_ARCHITECTURES, VisionArchitecture
from biascare.models.weights.files import listed, read_state_dict
from biascare.models.weights.report import Dropped, LoadReport

if TYPE_CHECKING:
    from biascare.models.vision.pathway import VisionPathway

__all__ = [
    "LAYOUTS",
    "Dropped",
    "LoadReport",
    "detect_layout",
    "listed",
    "load_vision_checkpoint",
    "read_state_dict",
]


class Layout(NamedTuple):
    """One way of naming tensors, and what in it has no counterpart here."""

    about: str
    mark: str  # pattern of keys that only this layout has
    rename: tuple[tuple[str, str], ...] = ()  # (pattern, replacement), applied in order
    drop: dict[str, str] = {}  # prefix of keys that are left out -> why  # noqa: RUF012
    may_lack: tuple[str, ...] = ()  # prefixes of our keys that keep their initial values


IMIS_RENAME = (
    (r"^image_encoder\.sam_encoder\.", "image_encoder."),
    (r"^(image_encoder\.blocks\.\d+\.mlp)\.fc([12])\.", r"\1.lin\2."),
    (r"^(mask_decoder\.(?:semantic_tokens|text_output))$", r"\1.weight"),
)
IMIS_DROP = {
    "image_encoder.sam_encoder.neck.": "256-channel neck that IMIS-Net itself does not run",
    "mask_decoder.semantic_prediction_head.": "classes are named in words here",
    "text_model.": "CLIP's text tower, which the language model replaces",
    "text_out_dim": "its projection",
}
IMIS_MAY_LACK = ("mask_decoder.text_output.",)  # starts at zero, and then changes no mask

TRANSFORMERS_RENAME = (
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (
        r"^shared_image_embedding\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm([1-4])\.", r".norm\1."),
    (r"^(mask_decoder\.(?:output_hypernet\w+\.\d+|iou\w+))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernet\w+\.\d+|iou\w+))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernet\w+\.\d+|iou\w+))\.proj_out\.", r"\1.layers.2."),
)

LAYOUTS = {
    "released_biascarevl": Layout(
        "BiasCareVL as released by its authors: SEG.* is an IMIS-Net without text tower",
        r"(^|\.)SEG\.",
        rename=((r"^.*?\bSEG\.(?:modules_to_save\.default\.)?", ""), *IMIS_RENAME),
        drop={"": "language side, opened as the MLLM pathway"} | IMIS_DROP,
        may_lack=IMIS_MAY_LACK,
    ),
    "imis": Layout(
        "IMIS-Net",
        r"^image_encoder\.sam_encoder\.",
        rename=IMIS_RENAME,
        drop=IMIS_DROP,
        may_lack=IMIS_MAY_LACK,
    ),
    "transformers_sam": Layout(
        "SAM and MedSAM as transformers names them",
        r"^vision_encoder\.layers\.",
        rename=TRANSFORMERS_RENAME,
        drop={"prompt_encoder.shared_embedding.": "another name of the shared image embedding"},
    ),
    "litemedsam": Layout("LiteMedSAM", r"^image_encoder\.patch_embed\.seq\."),
    "biascare": Layout("vision_pathway.safetensors of our exports", r"\.semantic_tokens\.weight$"),
    "sam": Layout("SAM and MedSAM", r"^image_encoder\.blocks\.\d+\.attn\.rel_pos_h$"),
}
"""In order of recognition: a mark of one may also be in a file of a later one."""

SHARED_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "sam.")
"""Of wrappers that put their name before every key."""


def detect_layout(state: Mapping[str, Tensor]) -> str:
    """Name of the layout in `LAYOUTS`, by its marks.

    Raises:
        ValueError: none of them; names the first keys and the known layouts.
    """
    keys = list(_without_shared_prefix(state))
    for name, layout in LAYOUTS.items():
        if any(re.search(layout.mark, key) for key in keys):
            return name
    known = "; ".join(f"{name} ({layout.about})" for name, layout in LAYOUTS.items())
    raise ValueError(
        f"vision weights of an unknown layout: the first keys are {listed(keys)}; known: {known}"
    )


def load_vision_checkpoint(
    pathway: VisionPathway, weights: str | Path | Mapping[str, Tensor]
) -> LoadReport:
    """Start a pathway from a file or folder of foreign weights, or from tensors already read.

    Raises:
        ValueError: unreadable, of unknown layout, of another architecture (then it says which
            `model.vision` to set), or with missing or unexpected keys or shapes.
    """
    if isinstance(weights, Mapping):
        state, source = weights, "the weights"
    else:
        state, source = read_state_dict(weights), str(weights)
    layout = detect_layout(state)
    named, dropped = _rename(_without_shared_prefix(state), LAYOUTS[layout], source)
    _check_architecture(pathway.architecture, named, source)
    wanted = pathway.state_dict()
    lacking = [key for key in wanted if key not in named]
    missing = [key for key in lacking if key.startswith(LAYOUTS[layout].may_lack or (" ",))]
    absent = [key for key in lacking if key not in missing]
    surplus = [key for key in named if key not in wanted]
    _refuse(source, layout, {"lacks": absent, "has unexpected": surplus})
    global_blocks = VISION_ARCHITECTURES[pathway.architecture].global_attn_indexes
    converted: dict[str, str] = {}
    fitted = {key: wanted[key] for key in missing}
    for key, value in named.items():
        fitted[key], done = fit(key, value, wanted[key], global_blocks)
        if done:
            converted[key] = done
    wrong = [
        f"{key} {tuple(value.shape)}, expected {tuple(wanted[key].shape)}"
        for key, value in fitted.items()
        if value.shape != wanted[key].shape
    ]
    _refuse(source, layout, {"has wrong shapes:": wrong})
    pathway.load_state_dict(fitted)
    return LoadReport(
        layout=layout,
        matched=len(named),
        converted=converted,
        missing=missing,
        unexpected=[],
        dropped=dropped,
    )


def _refuse(source: str, layout: str, faults: dict[str, list[str]]) -> None:
    """ValueError with all faults (what is wrong -> keys) at once, if there are any."""
    found = [f"{how} {listed(keys)}" for how, keys in faults.items() if keys]
    if found:
        raise ValueError(
            f"{source} ({LAYOUTS[layout].about}) {' and '.join(found)}; it is incomplete or was "
            "changed: name the original file"
        )


def _without_shared_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes that every key begins with."""
    keys = dict(zip(state, state, strict=True))
    while keys:
        shared = [p for p in SHARED_PREFIXES if all(key.startswith(p) for key in keys)]
        if not shared:
            break
        keys = {key[len(shared[0]) :]: original for key, original in keys.items()}
    return {key: state[original] for key, original in keys.items()}


def _rename(
    state: Mapping[str, Tensor], layout: Layout, source: str
) -> tuple[dict[str, Tensor], dict[str, Dropped]]:
    """(our key -> tensor, what was left out)."""
    named: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for key, value in state.items():
        drop = _left_out(key, layout)
        if drop is not None:
            counts[drop] += 1
            continue
        ours = key
        for pattern, replacement in layout.rename:
            ours = re.sub(pattern, replacement, ours)
        if ours in named:
            raise ValueError(f"{source} holds {ours} twice, the second time as {key}")
        named[ours] = value
    return named, {p or "other parts": Dropped(n, layout.drop[p]) for p, n in counts.items()}


def _left_out(key: str, layout: Layout) -> str | None:
    """The prefix under which a key is left out; the empty one stands for keys without the mark."""
    if "" in layout.drop:
        if not re.search(layout.mark, key) or ".original_module." in key:
            return ""
        key = re.sub(*layout.rename[0], key)
    found = [prefix for prefix in layout.drop if prefix and key.startswith(prefix)]
    return found[0] if found else None


class _Sizes(NamedTuple):
    """What tells architectures apart in the shapes of their tensors."""

    encoder: str
    embed_dim: int
    depth: int
    prompt_dim: int

    def __str__(self) -> str:
        return (
            f"a {self.encoder} encoder of width {self.embed_dim} and {self.depth} blocks with "
            f"{self.prompt_dim}-channel prompts"
        )


def _sizes_of(named: Mapping[str, Tensor]) -> _Sizes | None:
    """Of tensors under our names; None where those that tell are missing."""
    tokens = named.get("mask_decoder.mask_tokens.weight")
    projection = named.get("image_encoder.patch_embed.proj.weight")
    neck = named.get("image_encoder.neck.0.weight")
    if tokens is None or neck is None or tokens.ndim != 2 or neck.ndim != 4:
        return None
    encoder = "tiny_vit" if projection is None else "vit"
    blocks = {m[0] for key in named if (m := re.match(r"image_encoder\..*?blocks\.\d+\.", key))}
    return _Sizes(encoder, neck.shape[1], len(blocks), tokens.shape[1])


def _sizes(architecture: VisionArchitecture) -> _Sizes:
    return _Sizes(
        architecture.encoder, architecture.embed_dim, architecture.depth, architecture.prompt_dim
    )


def _check_architecture(name: str, named: Mapping[str, Tensor], source: str) -> None:
    found, wanted = _sizes_of(named), _sizes(VISION_ARCHITECTURES[name])
    if found is None or found == wanted:
        return
    fitting = [other for other, sizes in VISION_ARCHITECTURES.items() if _sizes(sizes) == found]
    fix = f"set model.vision={fitting[0]}" if fitting else "no model.vision is of these sizes"
    raise ValueError(
        f"model.vision_weights {source} holds {found}, but model.vision={name} is {wanted}; {fix}"
    )


def fit(
    key: str, value: Tensor, wanted: Tensor, global_blocks: tuple[int, ...]
) -> tuple[Tensor, str]:
    """A tensor in the shape and dtype of its place, and what was done to it ("" for nothing).

    Positions follow the grid of the run: `image_encoder.pos_embed` [1, h, w, C] by antialiased
    bicubic interpolation, the relative positions [2h - 1, C] of the blocks with global attention by
    linear interpolation, both in fp32. Those of windows keep their size. Any other tensor of a
    wrong shape comes back as it is.
    """
    done = []
    block = re.fullmatch(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_[hw]", key)
    resampled = value
    if key == "image_encoder.pos_embed" and value.shape[1:3] != wanted.shape[1:3]:
        resampled = _resample_grid(value, (wanted.shape[1], wanted.shape[2]))
    elif block and int(block[1]) in global_blocks and len(value) != len(wanted):
        resampled = _resample_line(value, len(wanted))
    if resampled is not value:
        what = "position embedding" if block is None else "relative positions"
        done.append(f"{what} resampled {tuple(value.shape)} -> {tuple(resampled.shape)}")
    if value.dtype != wanted.dtype:
        done.append(f"{_name(value.dtype)} -> {_name(wanted.dtype)}")
    return resampled.to(wanted.dtype), ", ".join(done)


def _resample_grid(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, h, w, C] -> [1, *size, C] float32."""
    channels_first = positions.float().permute(0, 3, 1, 2)
    resized = interpolate(channels_first, size, mode="bicubic", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _resample_line(positions: Tensor, length: int) -> Tensor:
    """[n, C] -> [length, C] float32."""
    line = interpolate(positions.float().T[None], length, mode="linear", align_corners=False)
    return line[0].T


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
