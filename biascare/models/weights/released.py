"""A checkpoint that BiasCareVL's authors released, loaded into our model.

    model = build_network(vision="imis_b", image_size=256, mllm="HuatuoGPT-Vision-7B-Qwen2.5VL")
    print(load_released(model, "weights/pytorch_model.bin"))

One file holds both pathways: `SEG.*` is IMIS-Net without its text tower, `VL.*` a Qwen2.5-VL in the
names of transformers 4; `add11`, `add12` and `text_fc` are the cross-modal query attention. It is
either merged, or a DeepSpeed state with a LoRA adapter in PEFT's names. Their program cuts the
token embeddings to its tokenizer; ours takes as many rows as the file has. Everything is checked
before anything is copied, so a refused file leaves the model as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from biascare.models.language.merge import FOLDED
from biascare.models.language.pathway import MLLMPathway
from biascare.models.network import DualPathNetwork
from biascare.models.weights.files import listed, read_state_dict, refuse_unusable
from biascare.models.weights.report import Dropped, LoadReport
from biascare.models.weights.vision import load_vision_checkpoint

VL_RENAMES = {
    "VL.model.visual.": "model.visual.",
    "VL.model.language_model.": "model.language_model.",
    "VL.visual.": "model.visual.",
    "VL.model.": "model.language_model.",
    "VL.lm_head.": "lm_head.",
}
"""Beginnings of names, theirs to ours; the longer ones stand first."""

QUERY_RENAMES = {
    "add11": "queries",
    "add12.in_proj_weight": "attention.in_proj_weight",
    "add12.in_proj_bias": "attention.in_proj_bias",
    "add12.out_proj.weight": "attention.out_proj.weight",
    "add12.out_proj.bias": "attention.out_proj.bias",
    "text_fc.weight": "projection.weight",
    "text_fc.bias": "projection.bias",
}
"""The query, its attention (Eq. 1) and the projection to prompt space (Eq. 2)."""

THEIRS = {ours: theirs for theirs, ours in QUERY_RENAMES.items()}

DROPPED = (
    (r"VL\.vision\.", "VL.vision", "second name of VL.visual"),
    (r"VL\.language\.", "VL.language", "second name of VL.model"),
    (r"VL\..*inv_freq$", "inv_freq", "computed anew"),
    (r".*\.original_module\.", "original_module", "what PEFT's trained copies replace"),
    (r"cls_head", "cls_head", "classes of a fine-tuning; classes are named in words here"),
)
"""(pattern, name in the report, reason)."""

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
"""Tensors with a row per token."""

PEFT_ADDITIONS = re.compile(r"base_model\.model\.|modules_to_save\.\w+\.|(?<=\.)base_layer\.")
LORA = re.compile(r"\.(lora_[AB])\.(?:\w+\.)?weight$")


class ReleasedParts(NamedTuple):
    """Tensors of a released checkpoint under our names."""

    mllm: dict[str, Tensor]  # base weights, named as in transformers 5
    adapter: dict[str, Tensor]  # "<module>.lora_A" [r, in] and "<module>.lora_B" [out, r], or empty
    seg: dict[str, Tensor]  # without the prefix "SEG."
    query_attention: dict[str, Tensor]
    dropped: dict[str, Dropped]


def _place(name: str) -> tuple[str, str] | None:
    """(part, our name) of a tensor without PEFT's additions; None for an unknown one."""
    if name.startswith("SEG."):
        return "seg", name.removeprefix("SEG.")
    if name in QUERY_RENAMES:
        return "query_attention", QUERY_RENAMES[name]
    for theirs, ours in VL_RENAMES.items():
        if name.startswith(theirs):
            new = LORA.sub(r".\1", ours + name.removeprefix(theirs))
            return ("adapter" if ".lora_" in new else "mllm"), new
    return None


def released_to_ours(state: Mapping[str, Tensor]) -> ReleasedParts:
    """Sort the tensors of a released checkpoint by part and give them our names.

    Raises ValueError for a tensor that belongs to no part, or comes twice.
    """
    parts = ReleasedParts(mllm={}, adapter={}, seg={}, query_attention={}, dropped={})
    dropped: Counter[tuple[str, str]] = Counter()
    strangers = []
    for name, tensor in state.items():
        plain = PEFT_ADDITIONS.sub("", name)
        # Looked at first, because an `original_module` would find its part as well.
        left_out = [(label, why) for mark, label, why in DROPPED if re.match(mark, plain)]
        place = _place(plain)
        if left_out:
            dropped[left_out[0]] += 1
        elif place is None:
            strangers.append(name)
        else:
            part, new = getattr(parts, place[0]), place[1]
            if new in part:
                raise ValueError(
                    f"the checkpoint holds {new!r} twice, once as {name!r}; copy it again"
                )
            part[new] = tensor
    if strangers:
        raise ValueError(
            f"not a released BiasCareVL checkpoint: {len(strangers)} tensors are unknown "
            f"({listed(sorted(strangers))}); expected SEG.*, VL.*, {', '.join(QUERY_RENAMES)}"
        )
    parts.dropped.update({label: Dropped(n, why) for (label, why), n in dropped.items()})
    return parts


def merge_adapter(
    mllm: Mapping[str, Tensor], adapter: Mapping[str, Tensor], lora_alpha: float
) -> dict[str, Tensor]:
    """Base weights with the adapter folded in: W + (alpha / r) B A, in fp32, back to W's dtype."""
    merged = dict(mllm)
    for name, down in adapter.items():
        if not name.endswith(".lora_A"):
            continue
        module = name.removesuffix(".lora_A")
        # An adapter that lacks one half would change nothing, without a word.
        weight, up = merged.get(f"{module}.weight"), adapter.get(f"{module}.lora_B")
        if weight is None or up is None:
            raise ValueError(f"the adapter of {module} lacks its lora_B or its base weight")
        # In fp32 and rounded once: a small change beside a large weight is lost in bf16.
        change = (lora_alpha / down.shape[0]) * up.float() @ down.float()
        merged[f"{module}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged


def _pathway_tensors(mllm: MLLMPathway) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(base, adapter) tensors of our pathway, named as `ReleasedParts` names them."""
    named = {
        # PEFT puts the weights it adapts one level deeper and names each adapter.
        LORA.sub(r".\1", name.replace(".base_layer.", ".")): tensor
        for name, tensor in mllm.base.state_dict().items()
    }
    base = {name: tensor for name, tensor in named.items() if ".lora_" not in name}
    return base, {name: tensor for name, tensor in named.items() if ".lora_" in name}


def _check(
    part: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str
) -> None:
    """Same names and shapes and usable values, or an error that says which are not."""
    problems = [
        f"{kind} {listed(sorted(names))}"
        for kind, names in (
            # Both ways, because a model of fewer layers would take every tensor it asks for.
            ("lacks", wanted.keys() - found.keys()),
            ("has besides", found.keys() - wanted.keys()),
        )
        if names
    ]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise ValueError(
            f"the {part} of the released checkpoint does not fit this model: "
            f"{'; '.join(problems[:3])}; build the model with the sizes it was trained with "
            "(model.mllm, model.num_queries, model.vision)"
        )
    for name, tensor in found.items():
        # By their name, which is what stands in the file.
        refuse_unusable(THEIRS.get(name, name), tensor, source)


def _num_rows(weights: Mapping[str, Tensor], mllm: MLLMPathway) -> int:
    """Rows of the file's token embeddings, where its two tables agree and hold the image token."""
    tables = {name: weights[name] for name in (EMBEDDING, HEAD) if name in weights}
    rows = {name: len(table) for name, table in tables.items()}
    image_token = mllm.base.config.image_token_id
    if len(set(rows.values())) > 1 or min(rows.values(), default=image_token + 1) <= image_token:
        raise ValueError(
            f"the token tables of the released checkpoint have {rows} rows, expected equal numbers "
            f"above {image_token}, the image token of model.mllm; name the base it was trained on"
        )
    return next(iter(rows.values()), mllm.base.config.get_text_config().vocab_size)


def load_released(
    model: DualPathNetwork, path: str | Path, *, lora_alpha: float = 16
) -> LoadReport:
    """Fill both pathways and the query attention from a released file; what was done with it.

    Token embeddings get as many rows as the file has. An adapter in the file goes into the model's
    adapter where it adapts the same layers with the same rank; the model's alpha then scales it.
    Any other is folded into the base weights with `lora_alpha` (files do not hold it; the default
    is the paper's), and like a merged file leaves a fresh adapter as it is. `model.query_heads`
    must be the trained number: the weights do not tell it. The base weights now lie in no folder,
    so that `save_network` wants `merge=True`.

    Raises ValueError, before anything is copied, for unknown, missing or unfitting tensors.
    """
    mllm, query_attention = model.mllm, model.query_attention
    # Half of it could be loaded, and would look like a whole one.
    if mllm is None or query_attention is None:
        raise ValueError("a released checkpoint holds both pathways; build the model with an MLLM")
    parts, source = released_to_ours(read_state_dict(path)), str(path)
    base, adapter = _pathway_tensors(mllm)
    keep_adapter = bool(parts.adapter) and _shapes(parts.adapter) == _shapes(adapter)
    for name, tensor in parts.adapter.items():
        refuse_unusable(name, tensor, source)
    weights = dict(parts.mllm)
    if parts.adapter and not keep_adapter:
        weights = merge_adapter(weights, parts.adapter, lora_alpha)
    # A tied head is the embedding itself, and saved files may leave its second name out.
    if HEAD not in weights and mllm.base.config.tie_word_embeddings:
        base.pop(HEAD)
    rows, before = _num_rows(weights, mllm), len(base[EMBEDDING])
    # Their number is the file's to say; their width must fit like any other shape.
    tables = {name: base[name].new_empty(rows, *base[name].shape[1:]) for name in (EMBEDDING, HEAD)}
    _check("MLLM", weights, base | {name: tables[name] for name in tables if name in base}, source)
    query = dict(query_attention.state_dict())
    _check("query attention", parts.query_attention, query, source)
    # The last check, which copies where it passes; the rest was checked above.
    vision = load_vision_checkpoint(model.vision, parts.seg)
    if rows != before:
        mllm.base.resize_token_embeddings(rows, mean_resizing=False)  # every row is filled below
        base = {name: tensor for name, tensor in _pathway_tensors(mllm)[0].items() if name in base}
    converted = vision.converted | _copy(weights, base)
    _copy(parts.query_attention, query)
    if keep_adapter:
        _copy(parts.adapter, adapter)
    elif parts.adapter:
        merged = [n.removesuffix("lora_A") + "weight" for n in parts.adapter if n.endswith("_A")]
        converted |= dict.fromkeys(merged, f"adapter folded in, alpha {lora_alpha:g}")
    if rows != before:
        converted[EMBEDDING] = f"{before} -> {rows} rows, as in the file"
    mllm.path = FOLDED  # the folder it came from holds other weights
    return LoadReport(
        layout="released BiasCareVL",
        matched=vision.matched + len(weights) + len(query) + len(adapter) * keep_adapter,
        converted=converted,
        missing=vision.missing + ([] if keep_adapter else sorted(adapter)),
        unexpected=[],
        dropped=parts.dropped | {f"SEG.{k}": v for k, v in vision.dropped.items()},
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(found: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> dict[str, str]:
    """Fill our tensors in place; the changes of precision, by name."""
    for name, tensor in found.items():
        places[name].copy_(tensor)
    return {
        name: f"{str(tensor.dtype)[6:]} -> {str(places[name].dtype)[6:]}"
        for name, tensor in found.items()
        if tensor.dtype != places[name].dtype
    }
