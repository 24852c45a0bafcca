"""Every key of a run, its default, its bounds and one line of help: the only place of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def key(help: str, default: Any = ..., *, default_factory: Any = None, **bounds: float) -> Any:
    """A configuration key: one line of help, a default (required without), numeric bounds.

    Bounds are `ge`, `gt`, `le`, `lt`; on a tuple they hold for every element.
    """
    metadata = {"help": help, "bounds": bounds}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    # Not None: that is a default which some keys have.
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class StrictSection:
    """Strict for pydantic: no unknown key, no conversion between types, no NaN or infinity."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }


@dataclass(frozen=True, kw_only=True)
class SourceConfig(StrictSection):
    """One prepared record folder of a mixture."""

    path: str = key("folder written by a data_prep program (one dataset, one split)")
    weight: float | None = key("share inside its task; default: its number of units", None, gt=0)


@dataclass(frozen=True, kw_only=True)
class PromptMixConfig(StrictSection):
    """Relative frequency of the visual prompts a training row gets."""

    point: float = key("one click inside the target", 0.5, ge=0)
    box: float = key("a jittered box", 0.2, ge=0)
    point_and_box: float = key("a click and a box", 0.1, ge=0)
    # Some rows must be found by their text alone, or the decoder learns to wait for a click.
    text: float = key("no visual prompt, the instruction alone (joint stage only)", 0.2, ge=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig(StrictSection):
    segmentation: tuple[SourceConfig, ...] = key("record folders with masks", ())
    language: tuple[SourceConfig, ...] = key("record folders with questions or reports", ())
    labelled: tuple[SourceConfig, ...] = key(
        "record folders with labels (labels stage only, where ratio is [1, 0])", ()
    )
    eval_segmentation: tuple[SourceConfig, ...] = key("held-out folders with masks", ())
    eval_language: tuple[SourceConfig, ...] = key("held-out folders with questions", ())
    eval_labelled: tuple[SourceConfig, ...] = key("held-out folders with labels", ())
    # The paper's 1 : 1, in every micro-batch: under ZeRO-3 all ranks must make the same calls.
    ratio: tuple[int, int] = key("segmentation : language items in every micro-batch", (1, 1), ge=0)
    targets_per_image: int = key("targets drawn per segmentation image (K)", 1, ge=1)
    target_sampling_power: float = key(
        "a target is drawn with weight count**-power, so rare targets are not starved", 0.5, ge=0
    )
    prompts: PromptMixConfig = key(
        "visual prompts of a training row", default_factory=PromptMixConfig
    )
    augment: bool = key("random crop, flip and intensity", True)
    # Safe by default: a mirrored CT has its liver on the left, and no error tells.
    flip: Literal["safe", "names", "never"] = key(
        "what may be mirrored. safe: only kinds of images without a left and right of their own "
        "(dermoscopy, microscopy, pathology, endoscopy of hollow organs); names: all whose texts "
        "name no side",
        "safe",
    )
    max_tokens: int = key("a longer conversation is an error, never cut in silence", 2048, ge=16)
    pack_sequences: bool = key(
        "the LLM reads a micro-batch as one row without padding; same losses, less time", True
    )
    num_workers: int = key("loader processes per rank; 0 loads in the training process", 2, ge=0)
    # A few damaged files must not end weeks of training; more are a disk or a path gone wrong.
    max_bad_samples: float = key(
        "abort when more than this share of samples is unreadable", 0.001, ge=0, le=1
    )
    # Off: it reads every byte of every folder. A changed letter in a text is found by this alone.
    verify: bool = key("compare all records with their content hashes before training", False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(StrictSection):
    mllm: str | None = key(
        "HF folder or Hub id of the image-text model; unset in the vision stage", None
    )
    vision: Literal[
        "imis_b", "sam_vit_b", "sam_vit_l", "sam_vit_h", "medsam", "litemedsam", "tiny"
    ] = key("architecture of the vision pathway", "imis_b")
    vision_weights: str | None = key(
        "to start from: stage 1's export, or stage 2's with its query attention; or a file of "
        "SAM, MedSAM, IMIS-Net or LiteMedSAM; unset: random",
        None,
    )
    # A head that the weights' own training never reached gives masks of chance.
    multimask: Literal["never", "ambiguous", "always"] | None = key(
        "take the best of three candidate masks, by predicted quality. ambiguous: where there is "
        "at most one click, or a box alone; unset: as the weights of model.vision were trained",
        None,
    )
    mask_prompt_limit: float | None = key(
        "largest logit, in size, of the mask that a correction sees; unset: as the decoder gave it",
        None,
        gt=0,
    )
    # The paper's; both pathways see the same square, so a click means the same place in both.
    image_size: int = key("pixels, both pathways", 256, ge=32)
    num_queries: int = key("pooled query tokens (Eq. 1)", 1, ge=1)
    query_heads: int = key("heads of the cross-modal query attention", 8, ge=1)
    lora_rank: int = key("rank of the LoRA adapter", 8, ge=1)
    lora_alpha: int = key("scale of the LoRA adapter", 16, ge=1)
    lora_dropout: float = key("dropout before the LoRA adapter", 0.01, ge=0, le=1)
    # sdpa comes with torch; flash-attn has to be installed.
    attention: Literal["sdpa", "eager", "flash_attention_2"] = key(
        "attention kernel of the LLM", "sdpa"
    )
    activation_checkpointing: bool = key("recompute activations in the backward pass", False)
    labels: tuple[str, ...] = key(
        "labels of the head (labels stage); unset: all of data.labelled", ()
    )
    exclusive_labels: bool = key(
        "exactly one label holds (diagnoses); else any number (findings)", False
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(StrictSection):
    # What the paper proposes is on; an ablation switches it off.
    uncertainty_weighting: bool = key("weight each row's Dice by exp(lambda_u * u) (Eq. 7)", True)
    beta_vl: float = key("share of semantic uncertainty in Eq. 6", 0.5, ge=0)
    lambda_u: float = key("temperature of Eq. 7", 1.0, ge=0)
    weight_gradient: Literal["detach", "full"] = key(
        "whether gradients flow through the weight", "detach"
    )
    # A sum, as in the paper, grows with the rows of a micro-batch; the log shows a mean too.
    reduction: Literal["sum", "mean"] = key(
        "sum is Eq. 9-10; mean divides by the valid rows", "sum"
    )
    # Chosen on real images, where it ranks failures better than chance: docs/EXPERIMENTS.md.
    alignment: Literal["none", "cosine", "contrastive"] = key(
        "term that makes the mask and text vectors of Eq. 4 comparable", "contrastive"
    )
    alignment_weight: float = key("weight of the alignment term", 0.1, ge=0)
    quality_weight: float = key("weight of the predicted-Dice regression", 0.1, ge=0)
    click_weight: float = key(
        "weight of the term that puts clicks on their side of a corrected mask", 0.0, ge=0
    )
    pixel_weight: float = key("weight of the focal loss of the pixels beside Dice", 0.0, ge=0)
    pixel_focus: float = key("its exponent; 0: cross entropy", 2.0, ge=0)


@dataclass(frozen=True, kw_only=True)
class HITLConfig(StrictSection):
    enabled: bool = key("simulate an expert who corrects the hardest rows", True)
    ratio: float = key("share r of rows refined, at least one", 0.3, gt=0, le=1)
    num_rounds: int = key("correction rounds", 1, ge=1)
    clicks_per_round: int = key("clicks added in each round", 1, ge=1)
    policy: Literal["uniform", "center"] = key(
        "where in the error region the click falls", "uniform"
    )
    # Inference asks for the same, so it travels in the export.
    mask_prompt: bool = key("feed the previous low-resolution logits back", True)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(StrictSection):
    # This and the next are the paper's, confirmed by its authors' command line.
    lr: float = key("vision pathway and query attention", 1e-5, gt=0)
    mllm_lr: float = key("MLLM pathway", 5e-6, gt=0)
    betas: tuple[float, float] = key("AdamW moments", (0.9, 0.98), ge=0, lt=1)
    weight_decay: float = key("not applied to norms and biases", 0.01, ge=0)
    grad_clip: float = key("global gradient norm", 1.0, gt=0)
    warmup_steps: int = key("linear warm-up", 500, ge=0)
    final_lr_ratio: float = key("linear decay ends at this share of the peak", 0.05, ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class TrainableConfig(StrictSection):
    lora: bool = key("LoRA adapter of the language model", True)
    vision_encoder: bool = key("image encoder of the vision pathway", True)
    prompt_encoder: bool = key("prompt encoder, click embeddings included", True)
    mask_decoder: bool = key("mask decoder", True)
    query_attention: bool = key("cross-modal query attention", True)
    label_head: bool = key("linear label head (labels stage only)", True)
    mllm_vision_tower: bool = key("the LLM's own vision tower", False)
    # Off, as in the paper's recipe: 1.09 billion parameters of a 7B model would need Adam's states.
    embeddings: bool = key("token embeddings and language head", False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StrictSection):
    stage: Literal["vision", "joint", "labels"] = key(
        "vision: the vision pathway alone; joint: everything; labels: a linear label head on the "
        "image encoder, which train.trainable freezes (probe) or trains (fine-tuning)",
        "joint",
    )
    max_steps: int = key("optimizer steps", ge=1)
    output_dir: str = key("folder of checkpoints, metrics and the export")
    seed: int = key("of the stream, the prompts, the clicks and the initialisation", 0, ge=0)
    # The paper's 4 GPUs x 4 x 2; fixed, so that a run is the same on another number of GPUs.
    global_batch: int = key("items per optimizer step over all ranks", 32, ge=1)
    micro_batch: int = key("items per rank and forward", 4, ge=1)
    # auto: the command that started a run continues it after a crash, without a second thought.
    resume: str = key(
        "auto: newest checkpoint that verifies; never; or a checkpoint folder", "auto"
    )
    precision: Literal["bf16", "fp32"] = key(
        "of weights and activations; losses are always fp32", "bf16"
    )
    compile: bool = key("compile the image encoder (torch.compile; needs a C++ compiler)", False)
    deepspeed: str = key("DeepSpeed file: ZeRO and communication only", "ds_config.json")
    trainable: TrainableConfig = key("what is trained", default_factory=TrainableConfig)
    log_every: int = key("steps between progress lines", 10, ge=1)
    eval_every: int = key("steps between evaluations; 0: only at the end", 1000, ge=0)
    save_every: int = key("steps between checkpoints; 0: only at the end", 1000, ge=0)
    keep_checkpoints: int = key("newest checkpoints kept", 2, ge=1)
    # raise: a NaN is nearly always a mistake in the data or the settings, and skipping hides it.
    nonfinite: Literal["raise", "skip"] = key("what a non-finite loss or gradient does", "raise")
    max_skipped_steps: int = key("with nonfinite=skip: abort after this many", 10, ge=1)
    tensorboard: bool = key("write TensorBoard event files", True)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(StrictSection):
    # Without it nobody can say what training changed.
    at_start: bool = key("evaluate before the first step too", True)
    max_images: int = key("held-out images per evaluation; 0: all", 0, ge=0)
    max_questions: int = key("held-out questions per evaluation; 0: all", 0, ge=0)
    batch_size: int = key("items per forward in evaluation", 8, ge=1)
    num_clicks: int = key("simulated corrective clicks after the first prediction", 1, ge=0)
    max_new_tokens: int = key("longest generated answer", 32, ge=1)
    prevalence: str | None = key(
        "prevalence.json of scripts/data_bias.py or of an earlier run; unset: head, medium and "
        "tail follow from the training sources and the shares below",
        None,
    )
    head_share: float = key(
        "most frequent targets that together hold this share of masks are head", 0.5, gt=0, le=1
    )
    tail_share: float = key(
        "rarest targets that together hold this share of masks are tail", 0.1, ge=0, le=1
    )


MLLM_FAMILIES = ("qwen2_5_vl", "llava")
"""`model_type` of the image-text models whose image features and positions are tested here."""

MOVABLE = ("model.mllm", "model.vision_weights")
"""Keys of a finished run that say where files lie; all others are part of what was trained."""


@dataclass(frozen=True, kw_only=True)
class Config(StrictSection):
    """One run."""

    data: DataConfig = key("what is learned from", default_factory=DataConfig)
    model: ModelConfig = key("the dual-path model", default_factory=ModelConfig)
    objective: ObjectiveConfig = key("Eqs. 3-12", default_factory=ObjectiveConfig)
    hitl: HITLConfig = key("human in the loop, Eqs. 8 and 10", default_factory=HITLConfig)
    optim: OptimConfig = key("AdamW and its schedule", default_factory=OptimConfig)
    eval: EvalConfig = key("periodic evaluation", default_factory=EvalConfig)
    train: TrainConfig = key("the run itself")

    @property
    def image_sources(self) -> tuple[SourceConfig, ...]:
        """Folders of the first part of `data.ratio`: with masks, or with labels in their stage."""
        return self.data.labelled if self.train.stage == "labels" else self.data.segmentation
