"""BiasCareVL: an adapted multimodal LLM and a SAM-style pathway, joined by query attention.

    model = BiasCareVL.from_pretrained("outputs/run/export")
    features = model.encode(batch)                     # every image and sentence once
    prediction = model.decode_masks(features, batch.prompts, batch.row_image)
    tokens = model.generate(batch)                     # answers

`encode` holds all expensive work; clicks only decode. The query attends to prompt tokens alone:
with the answer in sight (it is teacher-forced in training) the pooled token would leak the label.
"""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from biascare.interfaces import Batch, Features, Prediction, Prompts
from biascare.models.language.merge import FOLDED, fold_adapter, save_plain
from biascare.models.language.pathway import LoraSettings, MLLMPathway
from biascare.models.query_attention import CrossModalQueryAttention
from biascare.models.vision.pathway import VisionPathway
from biascare.models.weights.files import SUFFIXES
from biascare.models.weights.report import LoadReport
from biascare.models.weights.vision import load_vision_checkpoint

LOGGER = logging.getLogger("biascare")

MODEL_TYPE = "biascare_vl"
FORMAT_VERSION = 1
VISION_FILE = "vision_pathway.safetensors"
QUERY_FILE = "query_attention.safetensors"
MERGED_FOLDER = "mllm"
"""Inside a merged export: base model and adapter in one."""

TRAINABLE_PARTS = (
    "lora",
    "vision_encoder",
    "prompt_encoder",
    "mask_decoder",
    "query_attention",
    "mllm_vision_tower",
    "embeddings",
)
MLLM_PARTS = ("lora", "mllm_vision_tower", "embeddings")
"""Parts that train at the MLLM pathway's learning rate."""


class BiasCareVL(nn.Module):
    """The dual-path model. Without `mllm` it is the vision pathway alone (stage 1)."""

    def __init__(
        self,
        vision: VisionPathway,
        mllm: MLLMPathway | None = None,
        query_attention: CrossModalQueryAttention | None = None,
    ):
        super().__init__()
        if (mllm is None) != (query_attention is None):
            raise ValueError("an MLLM pathway and its query attention come together or not at all")
        self.vision = vision
        self.mllm = mllm
        self.query_attention = query_attention

    @property
    def device(self) -> torch.device:
        return next(self.vision.parameters()).device

    def encode(self, batch: Batch) -> Features:
        """Everything that is computed once: image embeddings, hidden states, pooled text.

        The image encoder runs for the images of segmentation rows only; the query attention for
        the sequences of segmentation rows only.
        """
        image_embedding = hidden_states = text_embedding = None
        if batch.images is not None:
            image_embedding = self.vision.encode_images(batch.images)
        if self.mllm is not None and self.query_attention is not None and batch.mllm_inputs:
            hidden_states = self.mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
            if batch.row_sequence is not None:
                assert batch.prompt_mask is not None
                text_embedding = self.query_attention(
                    hidden_states[batch.row_sequence], batch.prompt_mask[batch.row_sequence]
                )
        return Features(
            image_embedding=image_embedding,
            text_embedding=text_embedding,
            hidden_states=hidden_states,
        )

    def decode_masks(
        self,
        features: Features,
        prompts: Prompts,
        row_image: Tensor,
        *,
        rows: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Prediction:
        """Masks of R rows, or of the chosen `rows` [k] of them.

        `prompts` and `mask_prompt` [., 4h, 4w] belong to the rows decoded; `row_image` [R] and the
        text embedding to all of them.
        """
        assert features.image_embedding is not None, "these features were encoded without an image"
        text = features.text_embedding
        if rows is not None:
            row_image = row_image[rows]
            text = None if text is None else text[rows]
        return self.vision.decode(features.image_embedding, row_image, prompts, text, mask_prompt)

    def forward(self, batch: Batch) -> tuple[Features, Prediction | None]:
        """Encode, and decode the batch's own prompts where there are images."""
        features = self.encode(batch)
        if batch.prompts is None or batch.row_image is None:
            return features, None
        return features, self.decode_masks(features, batch.prompts, batch.row_image)

    def generate(self, batch: Batch, *, max_new_tokens: int = 32, **keywords: Any) -> Tensor:
        """Answers to the batch's sequences, [B, <= max_new_tokens] token ids.

        The batch must be collated for generation (left padding, no answers).
        """
        if self.mllm is None:
            raise ValueError("this model has no MLLM pathway: it was trained in the vision stage")
        return self.mllm.generate(
            batch.mllm_inputs, batch.image_slots, max_new_tokens=max_new_tokens, **keywords
        )

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Parameters of one of `TRAINABLE_PARTS`; empty where the model lacks the part.

        Parameters that no computation here reads belong to no part.
        """
        if part not in TRAINABLE_PARTS:
            near = difflib.get_close_matches(part, TRAINABLE_PARTS, n=1, cutoff=0)[0]
            known = ", ".join(TRAINABLE_PARTS)
            raise ValueError(f"part: got {part!r}, expected one of {known}; did you mean {near!r}?")
        vision_parts: dict[str, nn.Module] = {
            "vision_encoder": self.vision.image_encoder,
            "prompt_encoder": self.vision.prompt_encoder,
            "mask_decoder": self.vision.mask_decoder,
        }
        if part in vision_parts:
            unused = {id(p) for p in self.vision.unused_parameters()}
            return [p for p in vision_parts[part].parameters() if id(p) not in unused]
        if part == "query_attention":
            return list(self.query_attention.parameters()) if self.query_attention else []
        return self.mllm.part_parameters(part) if self.mllm is not None else []

    def set_trainable(self, parts: dict[str, bool]) -> None:
        """Freeze everything, then thaw the named parts."""
        self.requires_grad_(False)
        for part, trainable in parts.items():
            for parameter in self.part_parameters(part):
                parameter.requires_grad_(trainable)

    def save_pretrained(
        self,
        folder: str | Path,
        state: dict[str, Tensor] | None = None,
        *,
        merge: bool = False,
        max_shard_size: str = "4GB",
    ) -> None:
        """Write a portable folder: config.json, LoRA adapter (PEFT), safetensors per part.

        `state`: full (gathered) state dict where parameters are partitioned over ranks. The base
        MLLM is not copied; config.json says where it is. `merge` folds the adapter into the base,
        in this model too, and writes both to `MERGED_FOLDER` inside, as a plain Hugging Face folder
        in files up to `max_shard_size`; the model must be whole.
        """
        if merge and (state is not None or self.mllm is None):
            raise ValueError(
                "merge folds an adapter into its base: it needs a model that has an MLLM pathway "
                "and holds its weights itself"
            )
        if not merge and self.mllm is not None and self.mllm.path == FOLDED:
            raise ValueError("this model's adapter is folded into its base; save with merge=True")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu() for k, v in (state or self.state_dict()).items()}
        save_file(_under(state, "vision."), folder / VISION_FILE)
        config: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "vision": {
                "architecture": self.vision.architecture,
                "image_size": self.vision.image_size,
            },
        }
        if self.mllm is not None and self.query_attention is not None:
            save_file(_under(state, "query_attention."), folder / QUERY_FILE)
            config["query_attention"] = {
                "num_queries": self.query_attention.num_queries,
                "num_heads": self.query_attention.num_heads,
            }
            base = Path(self.mllm.path)
            # A relative path means something else elsewhere, perhaps a name on the Hub.
            config["mllm"] = {"path": str(base.absolute() if base.is_dir() else base)}
            if merge:
                config["mllm"] = {"path": MERGED_FOLDER, "merged": True}
                fold_adapter(self.mllm)
                save_plain(self.mllm, folder / MERGED_FOLDER, max_shard_size=max_shard_size)
            else:
                self.mllm.save(folder, _under(state, "mllm."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        mllm: str | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> BiasCareVL:
        """Restore an exported folder.

        `mllm`: where the base image-text model lies now, if not where it lay in training; a merged
        export holds its own.
        """
        folder = Path(folder)
        config = read_export_config(folder)
        vision = VisionPathway(**config["vision"])
        _load_part(vision, folder / VISION_FILE)
        vision.to(dtype)
        if "mllm" not in config:
            return cls(vision).eval()
        base = _base_path(folder, config["mllm"], mllm)
        pathway = _restore_mllm(folder, base, dtype, attention)
        query_attention = CrossModalQueryAttention(
            pathway.hidden_size, vision.prompt_dim, **config["query_attention"]
        )
        _load_part(query_attention, folder / QUERY_FILE)
        return cls(vision, pathway, query_attention.to(dtype)).eval()


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
    if (kind, version) != (MODEL_TYPE, FORMAT_VERSION):
        raise ValueError(
            f"{path} is not a biascare export of format {FORMAT_VERSION}: model_type {kind!r}, "
            f"format_version {version!r}; name a folder that training or scripts/export.py wrote"
        )
    return found


def _base_path(folder: Path, config: dict[str, Any], mllm: str | None) -> str:
    """Where the base model of an export lies: inside it, where the user says, or where it lay."""
    if not config.get("merged"):
        return mllm or str(config["path"])
    if mllm is not None:
        raise ValueError(
            f"{folder} holds its own language model with the adapter folded in; leave out "
            f"mllm={mllm!r}, which lacks it"
        )
    return str(folder / config["path"])


def _restore_mllm(folder: Path, path: str, dtype: torch.dtype, attention: str) -> MLLMPathway:
    try:
        return MLLMPathway.restore(folder, path, dtype=dtype, attention=attention)
    except ValueError as error:
        raise ValueError(
            f"{error}. The export {folder} was trained on it; if it moved, pass mllm=NEW_PLACE"
        ) from error


def _load_part(module: nn.Module, path: Path, *, only_if_it_fits: bool = False) -> bool:
    """Fill a module with an exported file, all of it; whether it was filled.

    Tensors of other names or shapes are an error, or with `only_if_it_fits` leave it as it is.
    """
    try:
        found = load_file(path)
        if only_if_it_fits and _shapes(found) != _shapes(module.state_dict()):
            return False
        module.load_state_dict(found)
        return True
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded ({error}); export the model again") from error


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def build_model(
    *,
    vision: str,
    image_size: int,
    vision_weights: str | None = None,
    mllm: str | None = None,
    lora: LoraSettings | None = None,
    num_queries: int = 1,
    query_heads: int = 8,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
) -> BiasCareVL:
    """A model to train: pathways with their initial weights, joined if there is an MLLM."""
    pathway = VisionPathway(vision, image_size, activation_checkpointing)
    pathway.reads_text = mllm is not None
    if vision_weights is not None:
        report = load_vision_weights(pathway, Path(vision_weights))
        LOGGER.info("model.vision_weights %s\n%s", vision_weights, report)
    pathway.to(dtype)
    if mllm is None:
        return BiasCareVL(pathway)
    language = MLLMPathway.load(
        mllm,
        lora=lora or LoraSettings(),
        attention=attention,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
    )
    query_attention = CrossModalQueryAttention(
        language.hidden_size, pathway.prompt_dim, num_queries, query_heads
    )
    if vision_weights is not None and (Path(vision_weights) / QUERY_FILE).is_file():
        fits = load_query_attention(query_attention, Path(vision_weights))
        did = "loaded too" if fits else "of another size (another MLLM?), left out"
        LOGGER.info("model.vision_weights %s: query attention %s", vision_weights, did)
    return BiasCareVL(pathway, language, query_attention.to(dtype))


def load_vision_weights(pathway: VisionPathway, path: Path) -> LoadReport:
    """Start the vision pathway from an exported folder (stage 1's) of the same architecture, or
    from a file or folder of foreign weights (`checkpoints.LAYOUTS`)."""
    if not _is_export(path):
        return load_vision_checkpoint(pathway, path)
    config = read_export_config(path)["vision"]
    wanted = {"architecture": pathway.architecture, "image_size": pathway.image_size}
    if config != wanted:
        raise ValueError(
            f"model.vision_weights {path} holds {config}, but this run builds {wanted}; "
            "set model.vision and model.image_size to what the weights were trained with"
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


def _is_export(path: Path) -> bool:
    """Whether a folder is, or tries to be, one of our exports."""
    return path.is_dir() and ((path / VISION_FILE).exists() or not _holds_weights(path))


def _holds_weights(folder: Path) -> bool:
    return any(file.name.endswith(SUFFIXES) for file in folder.iterdir())
