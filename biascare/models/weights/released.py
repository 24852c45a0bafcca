"""A checkpoint that BiasCareVL's authors released, loaded into our model.

    model = build_network(vision="imis_b", image_size=256, mllm="HuatuoGPT-Vision-7B-Qwen2.5VL")
    print(load_released(model, "weights/pytorch_model.bin"))

One file holds both pathways: `SEG.*` is IMIS-Net without its text tower, `VL.*` a Qwen2.5-VL in the
names of transformers 4; `add11`, `add12` and `text_fc` are the cross-modal query attention. It is
either merged, or a DeepSpeed state with a LoRA adapter in PEFT's names. Everything is checked
before anything is copied, so a refused file leaves the model as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from biascare.models.language.pathway import MLLMPathway
from biascare.models.network import DualPathNetwork
from biascare.models.weights.files import listed, read_state_dict
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

DROPPED = (
    (r"VL\.vision\.", "VL.vision", "second name of VL.visual"),
    (r"VL\.language\.", "VL.language", "second name of VL.model"),
    (r"VL\..*inv_freq$", "inv_freq", "computed anew"),
    (r".*\.original_module\.", "original_module", "what PEFT's trained copies replace"),
)
"""(pattern, name in the report, reason)."""

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


def _check(part: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, same shapes, or an error that says which are not."""
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
            "(model.mllm, model.lora_rank, model.num_queries, model.vision)"
        )


def load_released(
    model: DualPathNetwork, path: str | Path, *, lora_alpha: float = 16
) -> LoadReport:
    """Fill both pathways and the query attention from a released file; what was done with it.

    An adapter in the file goes into the model's adapter, whose alpha then scales it, or is folded
    into the base weights with `lora_alpha` (files do not hold it; the default is the paper's). A
    merged file leaves a fresh adapter as it is. `model.query_heads` must be the trained number: the
    weights do not tell it.

    Raises ValueError, before anything is copied, for unknown, missing or unfitting tensors.
    """
    mllm, query_attention = model.mllm, model.query_attention
    # Half of it could be loaded, and would look like a whole one.
    if mllm is None or query_attention is None:
        raise ValueError("a released checkpoint holds both pathways; build the model with an MLLM")
    parts = released_to_ours(read_state_dict(path))
    base, adapter = _pathway_tensors(mllm)
    # A model without an adapter has no place for one, so it is folded in, as in a merged file.
    weights = dict(parts.mllm)
    if parts.adapter and not isinstance(mllm.model, PeftModel):
        weights = merge_adapter(weights, parts.adapter, lora_alpha)
    # A tied head is the embedding itself, and saved files may leave its second name out.
    if "lm_head.weight" not in weights and mllm.base.config.tie_word_embeddings:
        base.pop("lm_head.weight")
    _check("MLLM", weights, base)
    keep_adapter = bool(parts.adapter and adapter)
    if keep_adapter:  # another rank shows in the shapes; another alpha nobody can see
        _check("adapter", parts.adapter, adapter)
    query = dict(query_attention.state_dict())
    _check("query attention", parts.query_attention, query)
    # The last check, which copies where it passes; the rest was checked above.
    vision = load_vision_checkpoint(model.vision, parts.seg)
    converted = vision.converted | _copy(weights, base)
    _copy(parts.query_attention, query)
    if keep_adapter:
        _copy(parts.adapter, adapter)
    if parts.adapter and not keep_adapter:
        merged = [n.removesuffix("lora_A") + "weight" for n in parts.adapter if n.endswith("_A")]
        converted |= dict.fromkeys(merged, f"adapter folded in, alpha {lora_alpha:g}")
    return LoadReport(
        layout="released BiasCareVL",
        matched=vision.matched + len(weights) + len(query) + len(adapter) * keep_adapter,
        converted=converted,
        missing=vision.missing + ([] if keep_adapter else sorted(adapter)),
        unexpected=[],
        dropped=parts.dropped | {f"SEG.{k}": v for k, v in vision.dropped.items()},
    )


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
