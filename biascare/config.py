"""One run is one tree of frozen dataclasses, read from strict YAML.

    config = load_config("configs/stage2.yaml", ["train.max_steps=100"])

Every default of the project lives here, once. The file is checked completely before anything else
happens: all problems are reported together, each with file, line, dotted key and the nearest valid
name. No config object travels below a constructor; modules take explicit keyword arguments.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from biascare.schema import KeyHelp, build, describe
from biascare.strict_yaml import ConfigError, Problem, did_you_mean, dump, read_tree

__all__ = [
    "Config",
    "ConfigError",
    "describe_config",
    "dump_config",
    "load_config",
    "resolve_deepspeed",
    "to_dict",
]


def _key(help: str, default: Any = ..., *, default_factory: Any = None, **bounds: float) -> Any:
    """A configuration key: one line of help, a default (required without), numeric bounds.

    Bounds are `ge`, `gt`, `le`, `lt`; on a tuple they hold for every element.
    """
    metadata = {"help": help, "bounds": bounds}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class _Section:
    """Strict for pydantic: no unknown key, no conversion between types, no NaN or infinity."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }


@dataclass(frozen=True, kw_only=True)
class SourceConfig(_Section):
    """One prepared record folder of a mixture."""

    path: str = _key("folder written by a data_prep program (one dataset, one split)")
    weight: float | None = _key("share inside its task; default: its number of units", None, gt=0)


@dataclass(frozen=True, kw_only=True)
class PromptMixConfig(_Section):
    """Relative frequency of the visual prompts a training row gets."""

    point: float = _key("one click inside the target", 0.5, ge=0)
    box: float = _key("a jittered box", 0.2, ge=0)
    point_and_box: float = _key("a click and a box", 0.1, ge=0)
    text: float = _key("no visual prompt, the instruction alone (joint stage only)", 0.2, ge=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    segmentation: tuple[SourceConfig, ...] = _key("record folders with masks", ())
    language: tuple[SourceConfig, ...] = _key("record folders with questions or reports", ())
    eval_segmentation: tuple[SourceConfig, ...] = _key("held-out folders with masks", ())
    eval_language: tuple[SourceConfig, ...] = _key("held-out folders with questions", ())
    ratio: tuple[int, int] = _key(
        "segmentation : language items in every micro-batch", (1, 1), ge=0
    )
    targets_per_image: int = _key("targets drawn per segmentation image (K)", 1, ge=1)
    target_sampling_power: float = _key(
        "a target is drawn with weight count**-power, so rare targets are not starved", 0.5, ge=0
    )
    prompts: PromptMixConfig = _key(
        "visual prompts of a training row", default_factory=PromptMixConfig
    )
    augment: bool = _key("random crop, flip (never where text names a side) and intensity", True)
    max_tokens: int = _key("a longer conversation is an error, never cut in silence", 2048, ge=16)
    pack_sequences: bool = _key(
        "the LLM reads a micro-batch as one row without padding; same losses, less time", True
    )
    num_workers: int = _key("loader processes per rank; 0 loads in the training process", 2, ge=0)
    max_bad_samples: float = _key(
        "abort when more than this share of samples is unreadable", 0.001, ge=0, le=1
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    mllm: str | None = _key(
        "HF folder or Hub id of the image-text model; unset in the vision stage", None
    )
    vision: Literal["imis_b", "sam_vit_b", "sam_vit_l", "sam_vit_h", "litemedsam", "tiny"] = _key(
        "architecture of the vision pathway", "imis_b"
    )
    vision_weights: str | None = _key(
        "to start from: stage 1's export, or stage 2's with its query attention; or a file of "
        "SAM, MedSAM, IMIS-Net or LiteMedSAM; unset: random",
        None,
    )
    image_size: int = _key("pixels, both pathways", 256, ge=32)
    num_queries: int = _key("pooled query tokens (Eq. 1)", 1, ge=1)
    query_heads: int = _key("heads of the cross-modal query attention", 8, ge=1)
    lora_rank: int = _key("rank of the LoRA adapter", 8, ge=1)
    lora_alpha: int = _key("scale of the LoRA adapter", 16, ge=1)
    lora_dropout: float = _key("dropout before the LoRA adapter", 0.01, ge=0, le=1)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = _key(
        "attention kernel of the LLM", "sdpa"
    )
    activation_checkpointing: bool = _key("recompute activations in the backward pass", False)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(_Section):
    uncertainty_weighting: bool = _key("weight each row's Dice by exp(lambda_u * u) (Eq. 7)", True)
    beta_vl: float = _key("share of semantic uncertainty in Eq. 6", 0.5, ge=0)
    lambda_u: float = _key("temperature of Eq. 7", 1.0, ge=0)
    weight_gradient: Literal["detach", "full"] = _key(
        "whether gradients flow through the weight", "detach"
    )
    reduction: Literal["sum", "mean"] = _key(
        "sum is Eq. 9-10; mean divides by the valid rows", "sum"
    )
    alignment: Literal["none", "cosine", "contrastive"] = _key(
        "term that makes the mask and text vectors of Eq. 4 comparable", "contrastive"
    )
    alignment_weight: float = _key("weight of the alignment term", 0.1, ge=0)
    quality_weight: float = _key("weight of the predicted-Dice regression", 0.1, ge=0)


@dataclass(frozen=True, kw_only=True)
class HITLConfig(_Section):
    enabled: bool = _key("simulate an expert who corrects the hardest rows", True)
    ratio: float = _key("share r of rows refined, at least one", 0.3, gt=0, le=1)
    num_rounds: int = _key("correction rounds", 1, ge=1)
    clicks_per_round: int = _key("clicks added in each round", 1, ge=1)
    policy: Literal["uniform", "center"] = _key(
        "where in the error region the click falls", "uniform"
    )
    mask_prompt: bool = _key("feed the previous low-resolution logits back", True)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Section):
    lr: float = _key("vision pathway and query attention", 1e-5, gt=0)
    mllm_lr: float = _key("MLLM pathway", 5e-6, gt=0)
    betas: tuple[float, float] = _key("AdamW moments", (0.9, 0.98), ge=0, lt=1)
    weight_decay: float = _key("not applied to norms and biases", 0.01, ge=0)
    grad_clip: float = _key("global gradient norm", 1.0, gt=0)
    warmup_steps: int = _key("linear warm-up", 500, ge=0)
    final_lr_ratio: float = _key("linear decay ends at this share of the peak", 0.05, ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class TrainableConfig(_Section):
    lora: bool = _key("LoRA adapter of the language model", True)
    vision_encoder: bool = _key("image encoder of the vision pathway", True)
    prompt_encoder: bool = _key("prompt encoder, click embeddings included", True)
    mask_decoder: bool = _key("mask decoder", True)
    query_attention: bool = _key("cross-modal query attention", True)
    mllm_vision_tower: bool = _key("the LLM's own vision tower", False)
    embeddings: bool = _key("token embeddings and language head", False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    stage: Literal["vision", "joint"] = _key(
        "vision: the vision pathway alone; joint: everything", "joint"
    )
    max_steps: int = _key("optimizer steps", ge=1)
    output_dir: str = _key("folder of checkpoints, metrics and the export")
    seed: int = _key("of the stream, the prompts, the clicks and the initialisation", 0, ge=0)
    global_batch: int = _key("items per optimizer step over all ranks", 32, ge=1)
    micro_batch: int = _key("items per rank and forward", 4, ge=1)
    resume: str = _key(
        "auto: newest checkpoint that verifies; never; or a checkpoint folder", "auto"
    )
    precision: Literal["bf16", "fp32"] = _key(
        "of weights and activations; losses are always fp32", "bf16"
    )
    compile: bool = _key("compile the image encoder (torch.compile; needs a C++ compiler)", False)
    deepspeed: str = _key("DeepSpeed file: ZeRO and communication only", "ds_config.json")
    trainable: TrainableConfig = _key("what is trained", default_factory=TrainableConfig)
    log_every: int = _key("steps between progress lines", 10, ge=1)
    eval_every: int = _key("steps between evaluations; 0: only at the end", 1000, ge=0)
    save_every: int = _key("steps between checkpoints; 0: only at the end", 1000, ge=0)
    keep_checkpoints: int = _key("newest checkpoints kept", 2, ge=1)
    nonfinite: Literal["raise", "skip"] = _key("what a non-finite loss or gradient does", "raise")
    max_skipped_steps: int = _key("with nonfinite=skip: abort after this many", 10, ge=1)
    tensorboard: bool = _key("write TensorBoard event files", True)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Section):
    at_start: bool = _key("evaluate before the first step too", True)
    max_images: int = _key("held-out images per evaluation; 0: all", 0, ge=0)
    max_questions: int = _key("held-out questions per evaluation; 0: all", 0, ge=0)
    batch_size: int = _key("items per forward in evaluation", 8, ge=1)
    num_clicks: int = _key("simulated corrective clicks after the first prediction", 1, ge=0)
    max_new_tokens: int = _key("longest generated answer", 32, ge=1)
    prevalence: str | None = _key(
        "prevalence.json of scripts/data_bias.py or of an earlier run; unset: head, medium and "
        "tail follow from the training sources and the shares below",
        None,
    )
    head_share: float = _key(
        "most frequent targets that together hold this share of masks are head", 0.5, gt=0, le=1
    )
    tail_share: float = _key(
        "rarest targets that together hold this share of masks are tail", 0.1, ge=0, le=1
    )


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """One run."""

    data: DataConfig = _key("what is learned from", default_factory=DataConfig)
    model: ModelConfig = _key("the dual-path model", default_factory=ModelConfig)
    objective: ObjectiveConfig = _key("Eqs. 3-12", default_factory=ObjectiveConfig)
    hitl: HITLConfig = _key("human in the loop, Eqs. 8 and 10", default_factory=HITLConfig)
    optim: OptimConfig = _key("AdamW and its schedule", default_factory=OptimConfig)
    eval: EvalConfig = _key("periodic evaluation", default_factory=EvalConfig)
    train: TrainConfig = _key("the run itself")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run from YAML, apply `section.key=value` overrides, check everything.

    Paths are relative to the working directory. Raises ConfigError, a ValueError, that lists every
    problem; warns of settings that this run skips.
    """
    tree = read_tree(path, overrides)
    result = build(Config, tree)
    problems = [*tree.problems, *result.problems]
    bad_keys = {*result.bad_keys, *(problem.key for problem in tree.problems if problem.key)}
    if result.value is not None:
        for keys, message in (*_across_keys(result.value), *_paths(result.value)):
            if not any(_overlap(key, bad) for key in keys for bad in bad_keys):
                key = next((key for key in keys if _location(key) in tree.origins), keys[0])
                problems.append(Problem(tree.where(_location(key)), key, message))
    if problems or result.value is None:
        raise ConfigError(sorted(problems, key=_file_and_line))
    for message in _skipped_settings(result.value):
        warnings.warn(message, UserWarning, stacklevel=2)
    return result.value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain mappings, lists and scalars, with every default written out."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def dump_config(config: Config, path: str | Path) -> None:
    """Write the resolved run as YAML that `load_config` reads back equal."""
    Path(path).write_text(dump(to_dict(config)), encoding="utf-8")


def describe_config() -> list[KeyHelp]:
    """Every key with its type, default and help line, in order of writing."""
    return list(describe(Config))


def resolve_deepspeed(path: str) -> Path:
    """The DeepSpeed file, looked for in the working directory, then in the repository root."""
    local = Path(path)
    return local if local.exists() else Path(__file__).parents[1] / path


def _file_and_line(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)


# Each check yields the keys it judges, the one to change first, and what to do. A check is left out
# where one of its keys is already reported.
_Finding = tuple[tuple[str, ...], str]


def _location(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))


def _overlap(key: str, other: str) -> bool:
    """Whether one key is the other or lies inside it."""
    ours, theirs = _location(key), _location(other)
    shared = min(len(ours), len(theirs))
    return ours[:shared] == theirs[:shared]


def _across_keys(config: Config) -> Iterator[_Finding]:
    yield from _batch(config)
    yield from _sources(config)
    yield from _stage(config)
    if config.model.image_size % 32:
        low = config.model.image_size // 32 * 32
        # Patches are 16 pixels; an odd grid of them has no half-size level and wastes padding.
        reason = "not divisible by 32 (16-pixel patches in an even grid)"
        fix = f"use {low} or {low + 32}"
        yield ("model.image_size",), f"got {config.model.image_size}, {reason}; {fix}"
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if warmup > steps:
        fix = f"set optim.warmup_steps={steps // 10}"
        keys = ("optim.warmup_steps", "train.max_steps")
        yield keys, f"{keys[0]} = {warmup} is more than {keys[1]} = {steps}; {fix}"
    shares = config.eval.head_share + config.eval.tail_share
    if shares > 1:
        message = f"head_share + tail_share = {shares:g} is more than the whole; lower one"
        yield ("eval.head_share", "eval.tail_share"), message
    if not any(dataclasses.asdict(config.train.trainable).values()):
        yield ("train.trainable",), "nothing is trained; set at least one part to true"


def _batch(config: Config) -> Iterator[_Finding]:
    micro, total, ratio = config.train.micro_batch, config.train.global_batch, config.data.ratio
    parts = sum(ratio)
    if parts == 0:
        yield ("data.ratio",), "got [0, 0], a batch of nothing; the paper's is [1, 1]"
    elif micro % parts:
        split = f"cannot be split {ratio[0]} : {ratio[1]} (data.ratio)"
        fix = f"set train.micro_batch={-(-micro // parts) * parts}"
        keys = ("train.micro_batch", "data.ratio")
        yield keys, f"train.micro_batch = {micro} {split}; {fix}"
    if total % micro:
        keys = ("train.global_batch", "train.micro_batch")
        fix = f"set train.global_batch={-(-total // micro) * micro}"
        yield keys, f"{keys[0]} = {total} is not a multiple of {keys[1]} = {micro}; {fix}"


def _sources(config: Config) -> Iterator[_Finding]:
    parts = ("segmentation", "language") if config.train.stage == "joint" else ("segmentation",)
    for part, name in enumerate(parts):
        if config.data.ratio[part] > 0 and not getattr(config.data, name):
            message = f"empty, but data.ratio = {list(config.data.ratio)} asks for {name} items"
            fix = "add a source ([{path: ...}]) or set its part of data.ratio to 0"
            yield (f"data.{name}", "data.ratio", "train.stage"), f"{message}; {fix}"
    if not any(dataclasses.asdict(config.data.prompts).values()):
        yield ("data.prompts",), "all four frequencies are 0; give one of them a share"


def _stage(config: Config) -> Iterator[_Finding]:
    data, prompts = config.data, config.data.prompts
    if config.train.stage == "joint":
        if config.model.mllm is None:
            message = "not set, but train.stage = joint trains it; name an HF folder or a Hub id"
            yield ("model.mllm", "train.stage"), message
        return
    if data.ratio[1] > 0:
        message = f"data.ratio = {list(data.ratio)}, but the vision stage has no language items"
        yield ("data.ratio", "train.stage"), f"{message}; use [1, 0]"
    if data.language:
        yield ("data.language", "train.stage"), "the vision stage has no language items; remove it"
    if prompts.text > 0 and not prompts.point + prompts.box + prompts.point_and_box:
        message = "text alone cannot prompt the vision stage; give a point or box a share"
        yield ("data.prompts", "train.stage"), message


def _paths(config: Config) -> Iterator[_Finding]:
    for name in ("segmentation", "language", "eval_segmentation", "eval_language"):
        seen: set[Path] = set()
        for index, source in enumerate(getattr(config.data, name)):
            key, path = f"data.{name}[{index}].path", Path(source.path).resolve()
            if not path.is_dir():
                yield (key,), _absent("folder", source.path)
            elif path in seen:
                yield (key,), f"{source.path!r} is listed twice; give it a weight instead"
            seen.add(path)
    mllm, weights, resume = config.model.mllm, config.model.vision_weights, config.train.resume
    if mllm is not None and not Path(mllm).is_dir():
        if mllm.startswith((".", "/", "~")) or Path(mllm).exists():
            yield ("model.mllm",), _absent("folder", mllm)
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", mllm):
            yield ("model.mllm",), f"{_absent('folder', mllm)}, and no Hub id (owner/name) either"
    if weights is not None and not Path(weights).exists():
        yield ("model.vision_weights",), _absent("file or folder", weights)
    if config.eval.prevalence is not None and not Path(config.eval.prevalence).is_file():
        yield ("eval.prevalence",), _absent("file", config.eval.prevalence)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        near = did_you_mean(resume, ("auto", "never"))
        yield (
            ("train.resume",),
            f"got {resume!r}, allowed: auto | never | a checkpoint folder{near}",
        )
    yield from _run_files(config.train)


def _run_files(train: TrainConfig) -> Iterator[_Finding]:
    output = Path(train.output_dir)
    blocking = next((path for path in (output, *output.parents) if path.exists()), output)
    if not blocking.is_dir():
        yield ("train.output_dir",), f"{blocking} is a file; a folder must be made here"
    deepspeed = resolve_deepspeed(train.deepspeed)
    if not deepspeed.is_file():
        yield ("train.deepspeed",), _absent("file", train.deepspeed)
        return
    try:
        json.loads(deepspeed.read_text(encoding="utf-8"))
    except ValueError as error:
        yield ("train.deepspeed",), f"{deepspeed} is not JSON: {error}"


def _absent(what: str, path: str) -> str:
    """Names what is missing, from where it was looked for, and the nearest sibling that exists."""
    parent = Path(path).parent
    kinds = {"folder": Path.is_dir, "file": Path.is_file}
    siblings = filter(kinds.get(what, Path.exists), sorted(parent.glob("*")))
    near = did_you_mean(Path(path).name, (sibling.name for sibling in siblings))
    place = "" if Path(path).is_absolute() else f" (looked for in {Path.cwd()})"
    return f"no {what} {path!r}{place}{near}"


def _skipped_settings(config: Config) -> Iterator[str]:
    """Settings a user may have made for nothing."""
    data = config.data
    if config.hitl.enabled and data.ratio[0] == 0:
        yield "hitl.enabled has no effect: data.ratio has no segmentation part"
    for part, name in enumerate(("segmentation", "language")):
        if data.ratio[part] == 0 and getattr(data, name):
            yield f"data.{name} is not used: its part of data.ratio is 0"
    if config.train.stage == "vision" and config.model.mllm is not None:
        yield "model.mllm is not loaded: train.stage is vision"
    if config.train.stage == "vision" and data.eval_language:
        yield "data.eval_language is not used: train.stage is vision"
