"""MLLM pathway: a Hugging Face image-text model of a known family (`MLLM_FAMILIES`) with a LoRA
adapter on its language model.

    mllm = MLLMPathway.load("path/or/hub-id", lora=LoraSettings(8, 16, 0.01))
    hidden = mllm.hidden_states(inputs, image_slots)      # [B, L, d]
    logits = mllm.answer_logits(hidden, answer_positions) # [T, V], answer tokens only

The base model runs once and gives its last hidden state; the language head runs on the answer
positions alone, so no [B, L, V] tensor and no tuple of layers is ever made. Each distinct image
goes through the LLM's vision tower once, however many instructions of the micro-batch show it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.import_utils import is_flash_attn_2_available

from biascare.interfaces import Generated
from biascare.models.language.packing import enable_packing, pack, unpack
from biascare.models.weights.files import refuse_code, refuse_unusable
from biascare.models.weights.llava import (
    is_original_llava,
    load_original_llava,
    load_original_llava_processor,
    read_config,
)
from biascare.models.weights.report import LoadReport
from biascare.settings.keys import MLLM_FAMILIES

LORA_TARGETS = r".*language_model.*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""Attention and MLP projections of the language model. Anchored: a bare suffix list would also
adapt the vision tower, whose projections have the same names."""


MLLMOpener = Callable[[str, torch.dtype, str], tuple[Any, LoadReport | None]]
"""(path, dtype, attention kernel) -> the image-text model and what a conversion did."""

LOGGER = logging.getLogger("biascare")


class LoraSettings(NamedTuple):
    """A low-rank adapter of the language model."""

    rank: int
    alpha: int
    dropout: float


def load_processor(path: str) -> Any:
    """The checkpoint's own processor: tokenizer, image processor and chat template.

    For a checkpoint in LLaVA's original layout it is put together from the parts that are there.
    Raises ValueError when it cannot be opened or has no chat template.
    """
    alone = Path(path).is_dir() and not (Path(path) / "config.json").exists()  # as exports keep it
    if not alone and is_original_llava(_opened(path, read_config)):
        processor: Any = load_original_llava_processor(path)
    else:
        processor = _opened(path, AutoProcessor.from_pretrained, trust_remote_code=False)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"the processor in {path!r} has no chat template; add chat_template.jinja to that "
            "folder (instruction-tuned checkpoints ship one)"
        )
    # Llama's tokenizers have none. Padding is masked everywhere, so any token serves.
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _opened(path: str, opener: Callable[..., Any], **keywords: Any) -> Any:
    """`opener(path, ...)`, with one kind of error that says what could not be opened."""
    refuse_code(path)
    try:
        return opener(path, **keywords)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot open the image-text model {path!r} ({reason}); give model.mllm a folder in "
            "Hugging Face format, or the id of a model on the Hub that this machine can reach"
        ) from error


def open_mllm(path: str, dtype: torch.dtype, attention: str) -> tuple[Any, LoadReport | None]:
    """The image-text model at `path`; weights missing from its files are an error."""
    # What can be refused is refused before gigabytes are read.
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "model.attention: got 'flash_attention_2', but the package flash-attn (2.x, for CUDA "
            "GPUs) cannot be used here; install it (pip install flash-attn --no-build-isolation) "
            "or set model.attention=sdpa"
        )

    config = _opened(path, read_config)
    if is_original_llava(config):
        return load_original_llava(path, dtype=dtype, attention=attention)
    family = config.get("model_type")
    # Others would open too, with image features or positions that nobody has checked here.
    if family not in MLLM_FAMILIES:
        raise ValueError(
            f"the model at {path!r} is of type {family!r}, expected an image-text model of type "
            f"{' or '.join(MLLM_FAMILIES)}; choose another model.mllm"
        )
    model, report = _opened(
        path,
        AutoModelForImageTextToText.from_pretrained,
        trust_remote_code=False,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    # transformers warns and draws them at random: a run of weeks would start from half a model.
    if missing:
        raise ValueError(
            f"the weights in {path!r} lack {len(missing)} of the model's tensors, such as "
            f"{missing[0]!r}; convert the checkpoint to the names of transformers, or copy it again"
        )
    return model, None


class _ChosenLogProbs(LogitsProcessor):
    """Remembers how likely every chosen token was. One step of the vocabulary is held at a time.

    transformers calls processors of the user before it applies a temperature.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.log_probs: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.take(input_ids[:, -1:])
        # fp32: a confidence is a product over tokens, and bf16 would round each of them.
        self.log_probs = scores.float().log_softmax(-1)
        return scores

    def take(self, tokens: Tensor) -> None:
        if self.log_probs is not None:
            self.steps.append(self.log_probs.gather(1, tokens))


class MLLMPathway(nn.Module):
    """A multimodal LLM, its adapter, and the three ways the project uses it."""

    def __init__(self, model: nn.Module, path: str, report: LoadReport | None = None):
        """`model`: a `PeftModel` or a bare image-text model; `path`: where its base came from;
        `report`: what a conversion from a foreign layout did, if there was one."""
        super().__init__()
        self.model = model
        self.path = path
        self.report = report
        # Of a family that nobody has checked here, an `opener` of the user's can bring one.
        self._packing = self.base.config.model_type in MLLM_FAMILIES
        if self._packing:
            enable_packing(self.base.model.language_model)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        lora: LoraSettings | None = None,
        adapter: str | Path | None = None,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        activation_checkpointing: bool = False,
        opener: MLLMOpener = open_mllm,
    ) -> MLLMPathway:
        """Load a base model with a fresh adapter (`lora`), a saved one (`adapter`), or none.

        Everything but the adapter is frozen. A checkpoint in LLaVA's original layout is converted
        on the way. `opener` opens the base model.

        Raises ValueError when `path` cannot be opened, is not of `MLLM_FAMILIES`, or holds numbers
        that are not finite, or when the attention kernel is not installed.
        """
        base, report = opener(path, dtype, attention)
        if report is not None:
            LOGGER.info("model.mllm %s\n%s", path, report)
        for name, weight in base.named_parameters():
            # Neither of a plan, nor quantised, where the numbers are not the weights.
            if not weight.is_meta and weight.is_floating_point():
                refuse_unusable(name, weight, f"model.mllm {path}")
        # Before the adapter comes, which is what trains; `set_trainable` thaws what else shall.
        base.requires_grad_(False)
        model: nn.Module = base
        with warnings.catch_warnings():
            # peft asks transformers for the old name of activation checkpointing; a user of either
            # could change nothing about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            if adapter is not None:
                model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
            elif lora is not None:
                model = get_peft_model(
                    base,
                    LoraConfig(
                        r=lora.rank,
                        lora_alpha=lora.alpha,
                        lora_dropout=lora.dropout,
                        target_modules=LORA_TARGETS,
                    ),
                )
        if activation_checkpointing:
            # After the adapter: peft would otherwise make the frozen vision tower's input require a
            # gradient, and the tower would be kept, recomputed and differentiated for nothing.
            # Newer transformers deprecate "gradient checkpointing" for the same under this name.
            new = getattr(base, "activation_checkpointing_enable", None)
            (new or base.gradient_checkpointing_enable)({"use_reentrant": False})
        return cls(model, path, report)

    @property
    def packing(self) -> bool:
        """Whether `hidden_states` reads a batch as one row; see `biascare.models.language.packing`.
        Generation is always padded."""
        return self._packing

    @packing.setter
    def packing(self, on: bool) -> None:
        family = self.base.config.model_type
        # In Gemma 3 the tokens of an image attend to each other both ways: packed, its hidden
        # states are others, and no error would tell.
        if on and family not in MLLM_FAMILIES:
            raise ValueError(
                f"data.pack_sequences: got true, but attention of {family!r} is not known to be "
                f"causal over image tokens, as that of {' and '.join(MLLM_FAMILIES)} is; set it to "
                "false"
            )
        self._packing = on

    @property
    def base(self) -> Any:
        """The Hugging Face model itself, inside or outside an adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def hidden_size(self) -> int:
        return self.base.config.get_text_config().hidden_size

    def with_image_features(
        self, inputs: dict[str, Tensor], image_slots: list[int]
    ) -> dict[str, Any]:
        """Inputs with features per image placeholder in place of the distinct images' pixels."""
        if "pixel_values" not in inputs:
            return dict(inputs)
        placed: dict[str, Any] = {k: v for k, v in inputs.items() if k != "pixel_values"}
        grid = inputs.get("image_grid_thw")
        if grid is not None:
            # M-RoPE places every image token in its grid, so it needs one per placeholder.
            placed["image_grid_thw"] = grid[image_slots]
        # Each image once through the tower; K targets of an image are K sequences that show it.
        encoded = self.base.model.get_image_features(
            pixel_values=inputs["pixel_values"].to(self.base.dtype),
            return_dict=True,
            **({} if grid is None else {"image_grid_thw": grid}),
        )
        per_image = list(encoded.pooler_output)
        features = BaseModelOutputWithPooling(
            pooler_output=tuple(per_image[slot] for slot in image_slots)  # type: ignore[arg-type]
        )
        return placed | {"mm_encoder_outputs": {"image": features}}

    def hidden_states(self, inputs: dict[str, Tensor], image_slots: list[int]) -> Tensor:
        """Last hidden state after the final norm, [B, L, d]; what stands on padding is arbitrary.

        `inputs` come from the collator: `input_ids`, `attention_mask` [B, L] and whatever the
        processor adds (`pixel_values` of the distinct images, `image_grid_thw`,
        `mm_token_type_ids`). `image_slots`: see `Batch`.
        """
        placed = self.with_image_features(inputs, image_slots)
        mask = inputs["attention_mask"]
        # No cache: nothing is generated here, and it would hold every layer's keys and values.
        if not self.packing or bool(mask.all()):
            return self.base.model(**placed, use_cache=False).last_hidden_state
        packed = pack(self.base.model, placed)
        return unpack(self.base.model(**packed, use_cache=False).last_hidden_state, mask)

    def answer_logits(self, hidden_states: Tensor, answer_positions: Tensor) -> Tensor:
        """Next-token logits [T, V] at the flat positions [T] that precede an answer token."""
        return self.base.lm_head(hidden_states.flatten(0, 1)[answer_positions])

    @torch.no_grad()
    def generate(
        self,
        inputs: dict[str, Tensor],
        image_slots: list[int],
        *,
        max_new_tokens: int,
        **keywords: Any,
    ) -> Generated:
        """Answers to B prompts; greedy unless `keywords` say otherwise.

        `inputs` must be left-padded, as for any decoder-only generation. Prompts that were read
        before (`past_key_values` among the keywords) are not read again.
        """
        chosen = _ChosenLogProbs()
        # Images of prompts that were read are in their keys and values.
        read = "past_key_values" in keywords
        words = ("input_ids", "attention_mask", "mm_token_type_ids")
        output = self.base.generate(
            **{name: inputs[name] for name in words if name in inputs}
            if read
            else self.with_image_features(inputs, image_slots),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([chosen]),
            **({"do_sample": False} | keywords),
        )
        tokens = output[:, inputs["input_ids"].shape[1] :]
        chosen.take(tokens[:, -1:])
        ends = self.base.generation_config.eos_token_id
        ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).long().cumsum(1)
        # The first end token is spoken, what follows it is padding.
        spoken = (ended - ended.diff(dim=1, prepend=torch.zeros_like(ended[:, :1]))) == 0
        return Generated(tokens=tokens, log_probs=torch.cat(chosen.steps, 1), spoken=spoken)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the adapter (PEFT format) and any other trained weights of this pathway.

        `state` [name -> tensor] is this module's full state; names as in `state_dict()`.
        """
        if isinstance(self.model, PeftModel):
            inner = {k.removeprefix("model."): v for k, v in state.items()}
            # Trained embeddings are written below; PEFT's own search for them would ask the Hub.
            self.model.save_pretrained(
                str(folder / "adapter"), state_dict=inner, save_embedding_layers=False
            )
        # The base itself is never copied: config.json says where it lies.
        trained = {
            name: state[name].contiguous()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and ".lora_" not in name
        }
        if trained:
            save_file(trained, folder / "mllm_trained.safetensors")

    @classmethod
    def restore(cls, folder: Path, path: str, **keywords: Any) -> MLLMPathway:
        """Base model at `path` with what `save` wrote to `folder`, trained parts trainable."""
        adapter = folder / "adapter"
        pathway = cls.load(path, adapter=adapter if adapter.is_dir() else None, **keywords)
        trained = folder / "mllm_trained.safetensors"
        if trained.is_file():
            state = load_file(trained)
            # Not strict: the file holds what was trained, the base has the rest already.
            unexpected = pathway.load_state_dict(state, strict=False).unexpected_keys
            if unexpected:
                raise ValueError(
                    f"{trained} does not fit the model at {path!r}, which has no {unexpected[:3]}; "
                    "pass mllm= the base model it was trained on"
                )
            # Saved again, only what is trainable is written.
            for name in state:
                pathway.get_parameter(name).requires_grad_(True)
        return pathway

    def adapter_parameters(self) -> list[nn.Parameter]:
        return self._named(".lora_")

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Token embeddings and language head."""
        return self._named("embed_tokens", "lm_head")

    def vision_tower_parameters(self) -> list[nn.Parameter]:
        """The LLM's own vision tower and its projector, as far as anything reads them."""
        unread: set[int] = set()
        layer = getattr(self.base.config, "vision_feature_layer", None)
        if isinstance(layer, int):
            # LLaVA reads an inner layer of its tower; what follows it has no gradient, and a
            # trainable parameter without one would stop DeepSpeed's reduction.
            tower = self.base.model.vision_tower
            layers = tower.encoder.layers
            # Layer numbers count the embeddings as 0, so layer n is the output of block n - 1.
            last = layer if layer >= 0 else len(layers) + 1 + layer
            after = (*layers[last:], tower.post_layernorm)
            unread = {id(p) for part in after for p in part.parameters()}
        towers = self._named(".visual.", ".vision_tower.", ".multi_modal_projector.")
        return [p for p in towers if id(p) not in unread]

    def _named(self, *pieces: str) -> list[nn.Parameter]:
        """Parameters with one of the pieces in their name."""
        named = self.named_parameters()
        return [p for name, p in named if any(piece in name for piece in pieces)]
