"""What a run needs, from its configuration: its paths need not exist, its weights are not read.

planned = load_planned("configs/stage2.yaml", ["train.micro_batch=8"])
print_plan(planned, PlanOptions(...))
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from biascare.config import DATA_SOURCES, Config, load_config, resolve_deepspeed
from biascare.models.language.pathway import open_mllm
from biascare.planning.blank import BatchShape, blank_batch, mllm_config, weightless
from biascare.planning.plan import (
    GIB,
    Plan,
    Remedy,
    ZeroSettings,
    fits,
    make_plan,
    read_zero_settings,
    tables,
    verdict,
)
from biascare.records import Records
from biascare.runs.build import build_network, build_step, optimizer_settings
from biascare.settings.schema import UNSET
from biascare.settings.strict_yaml import read_tree
from biascare.training.optimizer import parameter_groups

PLANNED_MLLM = "HuatuoGPT-Vision-7B-Qwen2.5VL"
"""What --plan assumes where model.mllm is left open: the paper's."""


class Planned(NamedTuple):
    """A configuration whose paths need not exist, and what it said of them."""

    config: Config
    mllm: str | None
    sources: dict[str, list[str]]  # task -> record folders that are there


def load_planned(path: str, overrides: list[str]) -> Planned:
    """`load_config` with every path replaced by one that exists; all other problems stand."""
    # A plan is made where neither data nor weights are; so paths are replaced by what exists, and
    # the one check of the configuration serves both.
    values = read_tree(path, overrides).values
    data, model, train = (
        section if isinstance(section := values.get(name), dict) else {}
        for name in ("data", "model", "train")
    )
    sources: dict[str, list[str]] = {}
    found = ["train.output_dir=."] if isinstance(train.get("output_dir", ""), str) else []
    for task in DATA_SOURCES:
        entries = [{"path": "."}] if data.get(task) == UNSET else data.get(task)
        written = [x for x in entries if isinstance(x, dict)] if isinstance(entries, list) else []
        # Anything else is a mistake, which the check is left to find.
        if written and all(isinstance(x.get("path"), str) for x in written):
            paths = [x["path"] for x in written]
            sources[task] = [path for path in paths if (Path(path) / "manifest.json").is_file()]
            found.append(f"data.{task}={json.dumps([x | {'path': '.'} for x in written])}")
    mllm = model.get("mllm")
    if isinstance(mllm, str):
        found.append("model.mllm=.")
    if isinstance(model.get("vision_weights"), str):
        found.append("model.vision_weights=null")
    if isinstance(values.get("eval"), dict) and values["eval"].get("prevalence") is not None:
        found.append("eval.prevalence=null")
    if isinstance(train.get("resume"), str):
        found.append("train.resume=never")
    config = load_config(path, [*overrides, *found])
    return Planned(config, PLANNED_MLLM if mllm == UNSET else mllm, sources)


class PlanOptions(NamedTuple):
    """What the configuration does not say."""

    world_size: int | None  # GPUs; None: 4, where the batch allows
    gpu_memory: float  # GiB of one
    tflops: float  # of one, in a second
    prompt_tokens: int  # text of a question
    answer_tokens: int


def print_plan(planned: Planned, options: PlanOptions) -> bool:
    """Print what the run needs, the verdict first; whether it fits."""
    train = planned.config.train
    # The paper's four, but a small batch may not divide over so many.
    most = max(1, train.global_batch // train.micro_batch)
    zero = read_zero_settings(
        resolve_deepspeed(train.deepspeed),
        world_size=min(4, most) if options.world_size is None else options.world_size,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        precision=train.precision,
    )
    made = plan_run(planned, zero, options)
    fitting = fits(made, options.gpu_memory)
    remedies = [] if fitting else find_remedies(planned, zero, options, made)
    console = Console(soft_wrap=True)
    console.print(verdict(made, options.gpu_memory, remedies), highlight=False)
    for table in tables(made, tflops=options.tflops, epochs=passes(planned)):
        console.print(table, highlight=False)
    return fitting


def plan_run(planned: Planned, zero: ZeroSettings, options: PlanOptions) -> Plan:
    config, train = planned.config, planned.config.train
    mllm = planned.mllm if train.stage == "joint" else None
    opener = open_mllm if mllm is None else weightless(mllm_config(mllm))
    # The run's own builder, so that a plan follows the code.
    with torch.device("meta"):
        network = build_network(config, opener)
        step = build_step(config, network)
    share, prompts = train.micro_batch // sum(config.data.ratio), config.data.prompts
    shape = BatchShape(
        num_images=config.data.ratio[0] * share,
        targets_per_image=config.data.targets_per_image,
        num_questions=config.data.ratio[1] * share,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        # A row is as wide as the widest prompt of its micro-batch; a box is two points.
        num_points=3 if prompts.point_and_box else 2 if prompts.box else 1,
    )
    return make_plan(
        step,
        parameter_groups(network.pathway_parameters(), optimizer_settings(config)),
        blank_batch(network, shape),
        zero,
        max_steps=train.max_steps,
        checkpointing=config.model.activation_checkpointing,
    )


def find_remedies(
    planned: Planned, zero: ZeroSettings, options: PlanOptions, made: Plan
) -> list[Remedy]:
    """Changes that let the run need less, each planned with those before it, until it fits.

    Cheap ones first: what is trained beyond the recipe, then time for memory, then more steps of
    communication, then smaller micro-batches with the same batch.
    """
    remedies: list[Remedy] = []
    peak = made.peak
    for change, config, changed_zero in _changes(planned.config, zero):
        if remedies and peak / GIB <= options.gpu_memory:
            break
        # What changes stand before stays changed, whether or not it was worth naming.
        planned = planned._replace(config=config)
        plan = plan_run(planned, changed_zero, options)
        if plan.peak < WORTH_NAMING * peak:
            remedies.append(Remedy(change=change, peak=plan.peak))
            peak = plan.peak
    return remedies


WORTH_NAMING = 0.99
"""A remedy leaves at most this share of what was needed before it."""


def _changes(config: Config, zero: ZeroSettings) -> Iterator[tuple[str, Config, ZeroSettings]]:
    """(what to write, configuration, ZeRO settings), each on top of those before."""
    if config.train.stage == "joint" and config.train.trainable.embeddings:
        trainable = replace(config.train.trainable, embeddings=False)
        config = replace(config, train=replace(config.train, trainable=trainable))
        yield "train.trainable.embeddings=false", config, zero
    if not config.model.activation_checkpointing:
        config = replace(config, model=replace(config.model, activation_checkpointing=True))
        yield "model.activation_checkpointing=true", config, zero
    # Alone there is nothing to share out.
    while zero.stage < 3 and zero.world_size > 1:
        stage = zero.stage + 1
        zero = zero._replace(stage=stage, num_buckets=1 if stage == 3 else zero.num_buckets)
        yield f'"stage": {stage} in {config.train.deepspeed}', config, zero
    # Steps of the smallest micro-batch that keeps the ratio, and divisors of what a rank has to do:
    # the batch that learns stays the same.
    least, rows = sum(config.data.ratio), config.train.global_batch // zero.world_size
    for micro in range(config.train.micro_batch - least, 0, -least):
        if rows % micro == 0:
            config = replace(config, train=replace(config.train, micro_batch=micro))
            zero = zero._replace(accumulation=rows // micro)
            yield f"train.micro_batch={micro}", config, zero


def passes(planned: Planned) -> dict[str, float]:
    """Passes over the records of each task, where all its folders are there."""
    config, found = planned.config, {}
    images = "labelled" if config.train.stage == "labels" else "segmentation"
    for part, task in enumerate((images, "language")):
        folders = planned.sources.get(task, [])
        # With a folder missing, passes over the rest would be told as passes over all.
        if folders and len(folders) == len(getattr(config.data, task)):
            units = sum(len(getattr(Records(folder), f"{task}_units")) for folder in folders)
            share = config.data.ratio[part] / sum(config.data.ratio)
            found[task] = config.train.max_steps * config.train.global_batch * share / max(units, 1)
    return found
