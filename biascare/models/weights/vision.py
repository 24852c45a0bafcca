"""Vision weights that others trained: recognised, mapped to our names, loaded, reported.

    report = load_vision_checkpoint(pathway, "weights/IMISNet-B.pth")
    print(report)

Nothing is skipped in silence: every tensor is loaded, or stands in its layout's list of what is
left out and why; a layer without weights is an error unless the same list allows it. What does not
depend on the image size is copied bit for bit; positions are resampled to the grid of this run. The
trade-off: a file that is only almost of a known layout is refused, with the keys that do not fit.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from biascare.models.vision.pathway import PIXEL_MEAN, PIXEL_STD, VISION_ARCHITECTURES
from biascare.models.weights.files import listed, read_state_dict, refuse_unusable
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


LOGGER = logging.getLogger("biascare")


class Layout(NamedTuple):
    """One way of naming tensors, and what in it has no counterpart here."""

    about: str
    mark: str  # pattern of keys that only this layout has
    rename: tuple[tuple[str, str], ...] = ()  # (pattern, replacement), applied in order
    drop: dict[str, str] = {}  # prefix of keys that are left out -> why  # noqa: RUF012
    may_lack: tuple[str, ...] = ()  # prefixes of our keys that keep their initial values
    untrained: int | None = None  # mask head that its training never reached


PIXELS_DROP = {
    "pixel_mean": "statistics of the pixels, compared with ours",
    "pixel_std": "statistics of the pixels, compared with ours",
}

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
} | PIXELS_DROP
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
        untrained=0,
    ),
    "imis": Layout(
        "IMIS-Net",
        r"^image_encoder\.sam_encoder\.",
        rename=IMIS_RENAME,
        drop=IMIS_DROP,
        may_lack=IMIS_MAY_LACK,
        untrained=0,
    ),
    "transformers_sam": Layout(
        "SAM and MedSAM as transformers names them",
        r"^vision_encoder\.layers\.",
        rename=TRANSFORMERS_RENAME,
        drop={"prompt_encoder.shared_embedding.": "another name of the shared image embedding"},
    ),
    "litemedsam": Layout("LiteMedSAM", r"^image_encoder\.patch_embed\.seq\.", drop=PIXELS_DROP),
    "biascare": Layout("vision_pathway.safetensors of our exports", r"\.semantic_tokens\.weight$"),
    "sam": Layout(
        "SAM and MedSAM", r"^image_encoder\.blocks\.\d+\.attn\.rel_pos_h$", drop=PIXELS_DROP
    ),
}
"""In order of recognition: a mark of one may also be in a file of a later one."""

SHARED_PREFIXES = (
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "model.",
    "net.",
    "sam.",
    "sam_model.",
)
"""Of wrappers that put their name before every key."""


def detect_layout(state: Mapping[str, Tensor]) -> str:
    """Name of the layout in `LAYOUTS`, by its marks.

    Raises:
        ValueError: none of them; names the first keys and the known layouts.
    """
    # Most marks are the beginnings of keys, where wrappers put their names.
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
    state = _without_shared_prefix(state)
    named, dropped = _rename(state, LAYOUTS[layout], source)
    # Before the single keys: "set model.vision=..." says more than three hundred of them.
    _check_architecture(pathway.architecture, named, source)
    _check_pixels(pathway, state, source)
    if LAYOUTS[layout].untrained is not None and pathway.multimask == "ambiguous":
        raise ValueError(
            f"model.multimask: got 'ambiguous', but {source} ({LAYOUTS[layout].about}) was trained "
            "without mask 0, which unambiguous prompts would get; expected always, as it was "
            "trained, or never, which trains its mask 1 alone"
        )
    wanted = pathway.state_dict()
    lacking = [key for key in wanted if key not in named]
    missing = [key for key in lacking if key.startswith(LAYOUTS[layout].may_lack)]
    absent = [key for key in lacking if key not in missing]
    surplus = [key for key in named if key not in wanted]
    _refuse(source, layout, {"lacks": absent, "has unexpected": surplus})
    global_blocks = VISION_ARCHITECTURES[pathway.architecture].global_attn_indexes
    converted: dict[str, str] = {}
    # What a layout may lack keeps its own values, so that loading can stay strict.
    fitted = {key: wanted[key] for key in missing}
    for key, value in named.items():
        # A plan has shapes alone; and a batch norm counts its batches in whole numbers.
        if not wanted[key].is_meta and not value.dtype == wanted[key].dtype == torch.int64:
            refuse_unusable(key, value, source)
        fitted[key], done = fit(key, value, wanted[key], global_blocks)
        if done:
            converted[key] = done
    # After the resampling: positions of another image size are not wrong.
    wrong = [
        f"{key} {tuple(value.shape)}, expected {tuple(wanted[key].shape)}"
        for key, value in fitted.items()
        if value.shape != wanted[key].shape
    ]
    _refuse(source, layout, {"has wrong shapes:": wrong})
    if LAYOUTS[layout].untrained is not None and pathway.multimask == "never":
        _swap_mask_heads(fitted)
        converted["mask_decoder.mask_tokens.weight"] = "mask 1 in the place of untrained mask 0"
    # The only place that writes, and strict: a refused file has changed nothing so far.
    pathway.load_state_dict(fitted)
    return LoadReport(
        layout=layout,
        matched=len(named),
        converted=converted,
        missing=missing,
        unexpected=[],
        dropped=dropped,
    )


def _swap_mask_heads(fitted: dict[str, Tensor]) -> None:
    """Masks 0 and 1 change places. The decoder knows its tokens by their embeddings and not by
    their order, so that mask 0 then is exactly what mask 1 was."""
    order = [1, 0, 2, 3]
    last = max(key for key in fitted if key.startswith("mask_decoder.iou_prediction_head."))
    last = last.rpartition(".")[0]
    for key in ("mask_decoder.mask_tokens.weight", f"{last}.weight", f"{last}.bias"):
        fitted[key] = fitted[key][order]
    for key in [key for key in fitted if ".output_hypernetworks_mlps.0." in key]:
        other = key.replace("_mlps.0.", "_mlps.1.")
        fitted[key], fitted[other] = fitted[other], fitted[key]


def _check_pixels(pathway: VisionPathway, state: Mapping[str, Tensor], source: str) -> None:
    """Whether the encoder will see what it was trained on: the shapes of its tensors do not tell.

    Raises ValueError for statistics in the file that are not ours; warns of a telling file name.
    """
    if pathway.pixels == "imagenet":
        for name, ours in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            found = state.get(name)
            if found is None or found.is_meta:
                continue
            theirs = [round(float(value), 3) for value in found.flatten()]
            if theirs != list(ours):
                raise ValueError(
                    f"{source} was trained on pixels with a {name} of {theirs}, but model.vision="
                    f"{pathway.architecture} reads them with {list(ours)}; no model.vision does "
                    "what this file wants"
                )
    # Snapshots of the Hub have the model's name in a folder above them.
    path = Path(source)
    names = [path.name, *(part for part in path.parts if part.startswith("models--"))]
    said = " ".join(names).lower()
    if "medsam" in said and not re.search(r"lite[-_]?medsam", said):
        likely, pixels = "medsam", "min_max"
    elif re.search(r"sam[-_]vit[-_](b|l|h|base|large|huge)", said):
        likely, pixels = "sam_vit_b, sam_vit_l or sam_vit_h", "imagenet"
    else:
        return
    if pathway.pixels != pixels:
        LOGGER.warning(
            "%s has the name of weights for model.vision=%s, but is loaded as %s, whose pixels are "
            "normalised in another way: if the name is right, masks will be wrong without an error",
            source,
            likely,
            pathway.architecture,
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
    while keys:  # wrappers stand inside each other: module._orig_mod.
        # Only what every key begins with: a layer named `model.` in half of the keys is no wrapper.
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
        unwrapped = key  # what the prefixes in `drop` are compared with
        if "" in layout.drop:
            # PEFT keeps the untrained original beside its trained copy, which is what is wanted.
            if not re.search(layout.mark, key) or ".original_module." in key:
                counts[""] += 1
                continue
            unwrapped = re.sub(*layout.rename[0], key)
        left_out = [prefix for prefix in layout.drop if prefix and unwrapped.startswith(prefix)]
        if left_out:
            counts[left_out[0]] += 1
            continue
        ours = key
        for pattern, replacement in layout.rename:
            ours = re.sub(pattern, replacement, ours)
        if ours in named:  # an alias that is not in `drop`: which of the two is right is unknown
            raise ValueError(f"{source} holds {ours} twice, the second time as {key}")
        named[ours] = value
    return named, {p or "other parts": Dropped(n, layout.drop[p]) for p, n in counts.items()}


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
    # TinyViT embeds patches by two convolutions (`seq`), so it has no single projection.
    encoder = "tiny_vit" if projection is None else "vit"
    blocks = {m[0] for key in named if (m := re.match(r"image_encoder\..*?blocks\.\d+\.", key))}
    return _Sizes(encoder, neck.shape[1], len(blocks), tokens.shape[1])


def _check_architecture(name: str, named: Mapping[str, Tensor], source: str) -> None:
    known = {
        other: _Sizes(sizes.encoder, sizes.embed_dim, sizes.depth, sizes.prompt_dim)
        for other, sizes in VISION_ARCHITECTURES.items()
    }
    found, wanted = _sizes_of(named), known[name]
    if found is None or found == wanted:  # what cannot be told is named key by key afterwards
        return
    fitting = [other for other, sizes in known.items() if sizes == found]
    fix = "no model.vision is of these sizes"
    if fitting:
        fix = f"set model.vision={' or '.join(fitting)}"
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
    wrong shape comes back as it is, positions of an image that is not square too.
    """
    done = []
    block = re.fullmatch(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_[hw]", key)
    resampled = value
    # Not where the sizes agree, so that the values are kept bit for bit.
    square = value.ndim == 4 and value.shape[1] == value.shape[2]
    if key == "image_encoder.pos_embed" and square and value.shape[1:3] != wanted.shape[1:3]:
        # Antialiased, because the 64 x 64 positions of SAM become 16 x 16 at 256 px.
        size = (wanted.shape[1], wanted.shape[2])
        grid = value.float().permute(0, 3, 1, 2)
        grid = interpolate(grid, size, mode="bicubic", antialias=True, align_corners=False)
        resampled = grid.permute(0, 2, 3, 1)
    elif block and int(block[1]) in global_blocks and value.ndim == 2 and len(value) != len(wanted):
        # Linear, as segment_anything itself does for a grid of another size.
        line = value.float().T[None]
        resampled = interpolate(line, len(wanted), mode="linear", align_corners=False)[0].T
    if resampled is not value:
        what = "position embedding" if block is None else "relative positions"
        done.append(f"{what} resampled {tuple(value.shape)} -> {tuple(resampled.shape)}")
    if value.dtype != wanted.dtype:
        done.append(f"{value.dtype} -> {wanted.dtype}".replace("torch.", ""))
    return resampled.to(wanted.dtype), ", ".join(done)
