"""What a run needs, from its configuration: its paths need not exist, its weights are not read.

planned = load_planned("configs/stage2.yaml", ["train.micro_batch=8"])
print_plan(planned, PlanOptions(...))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from biascare.config import Config, load_config, resolve_deepspeed
from biascare.models.language.pathway import open_mllm
from biascare.planning.blank import BatchShape, blank_batch, mllm_config, weightless
from biascare.planning.plan import fits, make_plan, read_zero_settings, tables
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
    values = read_tree(path, overrides).values
    data, model, train = (
        section if isinstance(section := values.get(name), dict) else {}
        for name in ("data", "model", "train")
    )
    sources: dict[str, list[str]] = {}
    found = ["train.output_dir=."] if isinstance(train.get("output_dir", ""), str) else []
    for task in ("segmentation", "language", "eval_segmentation", "eval_language"):
        entries = [{"path": "."}] if data.get(task) == UNSET else data.get(task)
        written = [x for x in entries if isinstance(x, dict)] if isinstance(entries, list) else []
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
    prompt_tokens: int  # text of a question
    answer_tokens: int


def print_plan(planned: Planned, options: PlanOptions) -> bool:
    """Print what the run needs; whether it fits."""
    config, train = planned.config, planned.config.train
    most = max(1, train.global_batch // train.micro_batch)
    zero = read_zero_settings(
        resolve_deepspeed(train.deepspeed),
        world_size=min(4, most) if options.world_size is None else options.world_size,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        precision=train.precision,
    )
    mllm = planned.mllm if train.stage == "joint" else None
    opener = open_mllm if mllm is None else weightless(mllm_config(mllm))
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
        num_points=3 if prompts.point_and_box else 2 if prompts.box else 1,
    )
    made = make_plan(
        step,
        parameter_groups(network.pathway_parameters(), optimizer_settings(config)),
        blank_batch(network, shape),
        zero,
        max_steps=train.max_steps,
        checkpointing=config.model.activation_checkpointing,
    )
    console = Console(soft_wrap=True)
    for table in tables(made, gpu_memory_gib=options.gpu_memory, epochs=passes(planned)):
        console.print(table, highlight=False)
    return fits(made, options.gpu_memory)


def passes(planned: Planned) -> dict[str, float]:
    """Passes over the records of each task, where all its folders are there."""
    config, found = planned.config, {}
    for part, task in enumerate(("segmentation", "language")):
        folders = planned.sources.get(task, [])
        if folders and len(folders) == len(getattr(config.data, task)):
            units = sum(len(getattr(Records(folder), f"{task}_units")) for folder in folders)
            share = config.data.ratio[part] / sum(config.data.ratio)
            found[task] = config.train.max_steps * config.train.global_batch * share / max(units, 1)
    return found
