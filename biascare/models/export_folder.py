"""A network as a folder: config.json, safetensors per part, the adapter; and what training leaves
for inference.

    save_network(network, "outputs/run/export", facts=facts)
    network, facts = open_network("outputs/run/export")
    network = build_network(vision="imis_b", image_size=256, vision_weights=..., mllm=...)

The base language model is not copied, config.json says where it lies; a merged export holds it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from biascare.models.label_head import LabelHead
from biascare.models.language.merge import FOLDED, fold_adapter, save_plain
from biascare.models.language.pathway import LoraSettings, MLLMOpener, MLLMPathway, open_mllm
from biascare.models.network import DualPathNetwork
from biascare.models.query_attention import CrossModalQueryAttention
from biascare.models.vision.decoder import Multimask
from biascare.models.vision.pathway import VisionPathway
from biascare.models.weights.files import SUFFIXES
from biascare.models.weights.report import LoadReport
from biascare.models.weights.vision import load_vision_checkpoint

LOGGER = logging.getLogger("biascare")

MODEL_TYPE = "biascare_vl"
FORMAT_VERSION = 2
VISION_FILE = "vision_pathway.safetensors"
QUERY_FILE = "query_attention.safetensors"
LABEL_FILE = "label_head.safetensors"
MERGED_FOLDER = "mllm"
"""Inside a merged export: base model and adapter in one."""


class TrainingFacts(NamedTuple):
    """What inference and evaluation need to know of training; stands in config.json."""

    beta_vl: float  # share of semantic uncertainty in Eq. 6
    mask_prompt: bool  # whether corrections were trained with the logits of the round before
    prevalence: dict[str, str]  # target (of a label head: label) -> head, medium or tail
    disc_share: float | None  # disc baseline: the one size, as a share of the image
    disc_share_by_target: dict[str, float]  # and the mean size of each target
    trained_on: list[str]  # content hashes of the record folders


def save_network(
    network: DualPathNetwork,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
    *,
    facts: TrainingFacts | None = None,
    merge: bool = False,
    max_shard_size: str = "4GB",
) -> None:
    """Write a portable folder: config.json, LoRA adapter (PEFT), safetensors per part.

    `state`: full (gathered) state dict where parameters are partitioned over ranks. The base
    MLLM is not copied; config.json says where it is. `merge` folds the adapter into the base,
    in this network too, and writes both to `MERGED_FOLDER` inside, as a plain Hugging Face folder
    in files up to `max_shard_size`; the network must be whole.
    """
    if merge and (state is not None or network.mllm is None):
        raise ValueError(
            "merge folds an adapter into its base: it needs a model that has an MLLM pathway "
            "and holds its weights itself"
        )
    if not merge and network.mllm is not None and network.mllm.path == FOLDED:
        raise ValueError("this model's base weights lie in no folder; save with merge=True")
    # Both are refused before a file is written: half an export looks like one.
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors wants plain tensors on the CPU; a GPU's would keep its memory until written.
    state = {k: v.detach().cpu() for k, v in (state or network.state_dict()).items()}
    save_file(_under(state, "vision."), folder / VISION_FILE)
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "training": None if facts is None else facts._asdict(),
        "vision": {
            "architecture": network.vision.architecture,
            "image_size": network.vision.image_size,
            "multimask": network.vision.multimask,
            "mask_prompt_limit": network.vision.mask_prompt_limit,
        },
    }
    if network.label_head is not None:
        save_file(_under(state, "label_head."), folder / LABEL_FILE)
        labels = list(network.label_head.labels)
        config["label_head"] = {"labels": labels, "exclusive": network.label_head.exclusive}
    if network.mllm is not None and network.query_attention is not None:
        save_file(_under(state, "query_attention."), folder / QUERY_FILE)
        config["query_attention"] = {
            "num_queries": network.query_attention.num_queries,
            "num_heads": network.query_attention.num_heads,
        }
        base = Path(network.mllm.path)
        # A relative path means something else elsewhere, perhaps a name on the Hub.
        config["mllm"] = {"path": str(base.absolute() if base.is_dir() else base)}
        if merge:
            config["mllm"] = {"path": MERGED_FOLDER, "merged": True}
            # In place and after all else: the language model is not copied, it would not fit twice.
            fold_adapter(network.mllm)
            save_plain(network.mllm, folder / MERGED_FOLDER, max_shard_size=max_shard_size)
        else:
            network.mllm.save(folder, _under(state, "mllm."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def open_network(
    folder: str | Path,
    *,
    mllm: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> tuple[DualPathNetwork, TrainingFacts | None]:
    """Restore an exported folder, with what its training left (None: nothing was trained).

    `mllm`: where the base image-text model lies now, if not where it lay in training; a merged
    export holds its own.
    """
    folder = Path(folder)
    config = read_export_config(folder)
    facts = None if config["training"] is None else TrainingFacts(**config["training"])
    vision = VisionPathway(**config["vision"])
    # Loaded as stored, cast after: rounding belongs to the reader, not to the file.
    _load_part(vision, folder / VISION_FILE)
    vision.to(dtype)
    label_head = None
    if "label_head" in config:
        label_head = LabelHead(vision.prompt_dim, **config["label_head"])
        _load_part(label_head, folder / LABEL_FILE)
        label_head.to(dtype)
    if "mllm" not in config:
        return DualPathNetwork(vision, label_head=label_head).eval(), facts
    base = _base_path(folder, config["mllm"], mllm)
    try:
        pathway = MLLMPathway.restore(folder, base, dtype=dtype, attention=attention)
    except ValueError as error:
        # Exports travel between machines, and the base model lies elsewhere on the next one.
        raise ValueError(
            f"{error}. The export {folder} was trained on it; if it moved, pass mllm=NEW_PLACE"
        ) from error
    query_attention = CrossModalQueryAttention(
        pathway.hidden_size, vision.prompt_dim, **config["query_attention"]
    )
    _load_part(query_attention, folder / QUERY_FILE)
    joined = DualPathNetwork(vision, pathway, query_attention.to(dtype), label_head)
    return joined.eval(), facts


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries below `prefix`, without it, contiguous as safetensors wants them."""
    return {k[len(prefix) :]: v.contiguous() for k, v in state.items() if k.startswith(prefix)}


def read_export_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder, or an error that says what the folder is not."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not an exported model: it has no config.json. Training writes one to "
            "OUTPUT_DIR/export"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the model again") from error
    found = config if isinstance(config, dict) else {}
    kind, version = found.get("model_type"), found.get("format_version")
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{path} is not of a biascare export: got model_type {kind!r}, expected "
            f"{MODEL_TYPE!r}; name a folder that training or scripts/export.py wrote"
        )
    if version != FORMAT_VERSION:
        # Format 1 lacks what evaluation needs of training; the run's checkpoint still has it.
        raise ValueError(
            f"{path} is an export of format {version!r}, expected {FORMAT_VERSION}; write it again "
            "from its run: python scripts/export.py RUN --output FOLDER"
        )
    # Exports that do not say so were trained before there were candidates: with mask 0 alone.
    found["vision"].setdefault("multimask", "never")
    return found


def _base_path(folder: Path, config: dict[str, Any], mllm: str | None) -> str:
    """Where the base model of an export lies: inside it, where the user says, or where it lay."""
    if not config.get("merged"):
        return mllm or str(config["path"])
    # Taken, it would answer with a base that never saw the adapter, and no error would follow.
    if mllm is not None:
        raise ValueError(
            f"{folder} holds its own language model with the adapter folded in; leave out "
            f"mllm={mllm!r}, which lacks it"
        )
    return str(folder / config["path"])


def _load_part(module: nn.Module, path: Path, *, only_if_it_fits: bool = False) -> bool:
    """Fill a module with an exported file, all of it; whether it was filled.

    Tensors of other names or shapes are an error, or with `only_if_it_fits` leave it as it is.
    """
    try:
        found = load_file(path)
        # Compared first: a failed load has already filled a part of the module.
        if only_if_it_fits and _shapes(found) != _shapes(module.state_dict()):
            return False
        module.load_state_dict(found)
        return True
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded ({error}); export the model again") from error


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def build_network(
    *,
    vision: str,
    image_size: int,
    vision_weights: str | None = None,
    multimask: Multimask | None = None,
    mask_prompt_limit: float | None = None,
    mllm: str | None = None,
    lora: LoraSettings | None = None,
    num_queries: int = 1,
    query_heads: int = 8,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    opener: MLLMOpener = open_mllm,
    labels: tuple[Sequence[str], bool] | None = None,
) -> DualPathNetwork:
    """A model to train: pathways with their initial weights, joined if there is an MLLM.

    Without `lora` the language model has no adapter. `labels`: those of a label head, and whether
    exactly one holds."""
    pathway = VisionPathway(
        vision, image_size, activation_checkpointing, multimask, mask_prompt_limit
    )
    # Without text some of the decoder is never read, and must not count as trainable.
    pathway.reads_text = mllm is not None
    if vision_weights is not None:
        report = load_vision_weights(pathway, Path(vision_weights))
        LOGGER.info("model.vision_weights %s\n%s", vision_weights, report)
    pathway.to(dtype)
    if mllm is None:
        head = None if labels is None else LabelHead(pathway.prompt_dim, *labels).to(dtype)
        return DualPathNetwork(pathway, label_head=head)
    language = MLLMPathway.load(
        mllm,
        lora=lora,
        attention=attention,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        opener=opener,
    )
    query_attention = CrossModalQueryAttention(
        language.hidden_size, pathway.prompt_dim, num_queries, query_heads
    )
    # Of a stage-2 export: the query attention continues too, where the new LLM has its sizes.
    if vision_weights is not None and (Path(vision_weights) / QUERY_FILE).is_file():
        fits = load_query_attention(query_attention, Path(vision_weights))
        did = "loaded too" if fits else "of another size (another MLLM?), left out"
        LOGGER.info("model.vision_weights %s: query attention %s", vision_weights, did)
    return DualPathNetwork(pathway, language, query_attention.to(dtype))


def load_vision_weights(pathway: VisionPathway, path: Path) -> LoadReport:
    """Start the vision pathway from an exported folder (stage 1's) of the same architecture, or
    from a file or folder of foreign weights (`weights.vision.LAYOUTS`)."""
    # A folder without any weights tries to be an export, and is told what it lacks as one.
    foreign = not path.is_dir() or (
        not (path / VISION_FILE).exists()
        and any(file.name.endswith(SUFFIXES) for file in path.iterdir())
    )
    if foreign:
        return load_vision_checkpoint(pathway, path)
    config = read_export_config(path)["vision"]
    # No weight depends on it, so a run may start with another limit.
    config.pop("mask_prompt_limit", None)
    wanted = {name: getattr(pathway, name) for name in config}
    # Position embeddings are of one size, and each mask head was trained or was not; changed in
    # silence, they would start another model.
    if config != wanted:
        raise ValueError(
            f"model.vision_weights {path} holds {config}, but this run builds {wanted}; set "
            "model.vision, model.image_size and model.multimask to what the weights were trained "
            "with"
        )
    _load_part(pathway, path / VISION_FILE)
    return LoadReport(
        layout="biascare",
        matched=len(pathway.state_dict()),
        converted={},
        missing=[],
        unexpected=[],
        dropped={},
    )


def load_query_attention(query_attention: CrossModalQueryAttention, folder: Path) -> bool:
    """Start from an export's query attention if it has the same sizes; whether it has."""
    ours = {"num_queries": query_attention.num_queries, "num_heads": query_attention.num_heads}
    if read_export_config(folder)["query_attention"] != ours:
        return False
    return _load_part(query_attention, folder / QUERY_FILE, only_if_it_fits=True)
