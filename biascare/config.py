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
from pathlib import Path
from typing import Any

from biascare.choices import did_you_mean, unknown
from biascare.settings.keys import MLLM_FAMILIES, Config, TrainConfig
from biascare.settings.schema import KeyHelp, build, describe
from biascare.settings.strict_yaml import ConfigError, Problem, dump, read_tree

__all__ = [
    "Config",
    "ConfigError",
    "describe_config",
    "dump_config",
    "load_config",
    "resolve_deepspeed",
    "to_dict",
]


DATA_SOURCES = (
    "segmentation",
    "language",
    "labelled",
    "eval_segmentation",
    "eval_language",
    "eval_labelled",
)
"""Keys of `data` that list record folders."""


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
            # What lies inside a key that is wrong, or around it, would only repeat the problem.
            if not any(
                all(a == b for a, b in zip(_location(key), _location(bad), strict=False))
                for key in keys
                for bad in bad_keys
            ):
                # At the key that stands in the file; a default has no line to point to.
                key = next((key for key in keys if _location(key) in tree.origins), keys[0])
                problems.append(Problem(tree.where(_location(key)), key, message))
    if problems or result.value is None:
        raise ConfigError(sorted(problems, key=_file_and_line))
    # After all errors: a warning about a run that does not start would only distract.
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
    # A run outside the checkout has no ds_config.json beside it and takes the one that ships.
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
    trained = dataclasses.asdict(config.train.trainable)
    trained["label_head"] &= config.train.stage == "labels"
    if not any(trained.values()):
        yield ("train.trainable",), "nothing is trained; set at least one part to true"


def _batch(config: Config) -> Iterator[_Finding]:
    micro, total, ratio = config.train.micro_batch, config.train.global_batch, config.data.ratio
    # Every micro-batch has the same composition: ZeRO-3 needs the same calls on every rank.
    parts = sum(ratio)
    if parts == 0:
        yield ("data.ratio",), "got [0, 0], a batch of nothing; the paper's is [1, 1]"
    elif micro % parts:
        split = f"cannot be split {ratio[0]} : {ratio[1]} (data.ratio)"
        fix = f"set train.micro_batch={-(-micro // parts) * parts}"
        keys = ("train.micro_batch", "data.ratio")
        yield keys, f"train.micro_batch = {micro} {split}; {fix}"
    # Of one rank; how many there are only the launcher knows, and the engine checks it.
    if total % micro:
        keys = ("train.global_batch", "train.micro_batch")
        fix = f"set train.global_batch={-(-total // micro) * micro}"
        yield keys, f"{keys[0]} = {total} is not a multiple of {keys[1]} = {micro}; {fix}"


def _sources(config: Config) -> Iterator[_Finding]:
    image_task = "labelled" if config.train.stage == "labels" else "segmentation"
    parts = (image_task, "language") if config.train.stage == "joint" else (image_task,)
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
    stage = config.train.stage
    if data.ratio[1] > 0:
        message = f"data.ratio = {list(data.ratio)}, but the {stage} stage has no language items"
        yield ("data.ratio", "train.stage"), f"{message}; use [1, 0]"
    if data.language:
        message = f"the {stage} stage has no language items; remove it"
        yield ("data.language", "train.stage"), message
    if stage == "labels":
        if data.segmentation:
            message = "the labels stage has no masks; name the folders under data.labelled"
            yield ("data.segmentation", "train.stage"), message
        trained = config.train.trainable
        if not trained.label_head and not trained.vision_encoder:
            message = "neither label_head nor vision_encoder is true: nothing is trained"
            yield ("train.trainable", "train.stage"), message
        return
    # Without an LLM nothing reads the text, so a row with text alone has no prompt at all.
    if prompts.text > 0 and not prompts.point + prompts.box + prompts.point_and_box:
        message = "text alone cannot prompt the vision stage; give a point or box a share"
        yield ("data.prompts", "train.stage"), message


def _paths(config: Config) -> Iterator[_Finding]:
    for name in DATA_SOURCES:
        task = name.removeprefix("eval_")
        seen: set[Path] = set()
        for index, source in enumerate(getattr(config.data, name)):
            key, path = f"data.{name}[{index}].path", Path(source.path).resolve()
            if not path.is_dir():
                yield (key,), _absent("folder", source.path)
            elif path in seen:
                yield (key,), f"{source.path!r} is listed twice; give it a weight instead"
            elif _read_json(path / "manifest.json").get(f"num_{task}_units") == 0:
                contents = "masks" if task == "segmentation" else "questions or reports"
                yield (key,), f"{source.path!r} holds no {contents}; remove it from data.{name}"
            seen.add(path)
    # A name with a slash may be on the Hub, which nobody asks here; a path that is written as one
    # can only be a folder.
    mllm, weights, resume = config.model.mllm, config.model.vision_weights, config.train.resume
    if mllm is not None and not Path(mllm).is_dir():
        if mllm.startswith((".", "/", "~")) or Path(mllm).exists():
            yield ("model.mllm",), _absent("folder", mllm)
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", mllm):
            yield ("model.mllm",), f"{_absent('folder', mllm)}, and no Hub id (owner/name) either"
    if mllm is not None and config.train.stage == "joint":
        about = _read_json(Path(mllm) / "config.json")
        family = about.get("model_type")
        # What LLaVA's own code wrote names itself otherwise, and is converted when it is opened.
        if about and family not in MLLM_FAMILIES and "mm_vision_tower" not in about:
            message = unknown(f"model_type in {mllm}/config.json", family, MLLM_FAMILIES)
            yield ("model.mllm",), f"{message}; name an image-text model of these families"
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


def _read_json(path: Path) -> dict[str, Any]:
    """Of a file that others check when they open it: {} where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # opened later, it is told with the file's own error
    return value if isinstance(value, dict) else {}


def _run_files(train: TrainConfig) -> Iterator[_Finding]:
    output = Path(train.output_dir)
    # The folder itself need not exist, but nothing on the way to it may be a file.
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
    # One level down only: a wrong folder further up would need a search of the whole disk.
    near = did_you_mean(Path(path).name, (sibling.name for sibling in siblings))
    place = "" if Path(path).is_absolute() else f" (looked for in {Path.cwd()})"
    return f"no {what} {path!r}{place}{near}"


def _skipped_settings(config: Config) -> Iterator[str]:
    """Settings a user may have made for nothing."""
    data = config.data
    # Warned of, not refused: an ablation switches a part off without rewriting the rest.
    if config.hitl.enabled and data.ratio[0] == 0:
        yield "hitl.enabled has no effect: data.ratio has no segmentation part"
    for part, name in enumerate(("segmentation", "language")):
        if data.ratio[part] == 0 and getattr(data, name):
            yield f"data.{name} is not used: its part of data.ratio is 0"
    stage = config.train.stage
    if stage != "joint" and config.model.mllm is not None:
        yield f"model.mllm is not loaded: train.stage is {stage}"
    unused = {
        "labelled": stage != "labels" and data.labelled,
        "eval_labelled": stage != "labels" and data.eval_labelled,
        "eval_language": stage != "joint" and data.eval_language,
        "eval_segmentation": stage == "labels" and data.eval_segmentation,
    }
    for name in (name for name, is_unused in unused.items() if is_unused):
        yield f"data.{name} is not used: train.stage is {stage}"
