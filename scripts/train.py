"""Train BiasCareVL.

    deepspeed scripts/train.py --config configs/stage2.yaml [section.key=value ...]

Stage 1 (train.stage=vision) trains the vision pathway alone, stage 2 (joint) everything, starting
from stage 1's export. The same command continues an interrupted run. What a run needs:

    python scripts/train.py --plan --config configs/stage2.yaml [--world-size 4]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from biascare.config import describe_config, dump_config, load_config, resolve_deepspeed, to_dict
from biascare.runs.process import prepare_process
from biascare.settings.keys import Config
from biascare.settings.schema import UNSET
from biascare.settings.strict_yaml import read_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from biascare.data.chat import ChatBuilder
    from biascare.data.mixture import Mixture
    from biascare.models.network import DualPathNetwork
    from biascare.records import Records
    from biascare.training.optimizer import OptimizerSettings
    from biascare.training.progress import RunLog

ROOT = Path(__file__).resolve().parents[1]

FREE_ON_RESUME = (
    "data.segmentation",  # their contents are compared instead
    "data.language",
    "data.eval_segmentation",
    "data.eval_language",
    "data.max_tokens",
    "data.num_workers",
    "data.max_bad_samples",
    "model.mllm",
    "model.vision_weights",
    "model.activation_checkpointing",
    "eval.",
    "train.max_steps",
    "train.output_dir",
    "train.resume",
    "train.deepspeed",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.nonfinite",
    "train.max_skipped_steps",
    "train.tensorboard",
)
"""Keys a resumed run may change; every other decides what the next step computes."""


def parse(arguments: list[str]) -> tuple[str, list[str]]:
    """(config file, overrides)."""
    known = read_arguments(arguments)
    return known.config, known.overrides


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    lines = [f"  {k.key} ({k.type}, default {k.default}): {k.help}" for k in describe_config()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="keys of the YAML file, each also as section.key=value:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    plan = parser.add_argument_group(
        "planning",
        "--plan prints parameters, memory per GPU, operations and tokens of the run, and ends. It "
        "reads no weights: model.mllm may be a folder with only a config.json, or the name of a "
        "known architecture (unset: the paper's). Paths of data, weights and output may be unset "
        "or absent; everything else in the configuration must be right. The exit code is 1 if the "
        "run does not fit.",
    )
    plan.add_argument("--plan", action="store_true", help="plan the run instead of starting it")
    plan.add_argument("--world-size", type=int, metavar="N", help="GPUs (4 where the batch allows)")
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of a GPU (80)")
    plan.add_argument("--prompt-tokens", type=int, default=64, help="text of a question (64)")
    plan.add_argument("--answer-tokens", type=int, default=64, help="of an answer (64)")
    return parser.parse_intermixed_args(arguments)


def fail(error: Exception, folder: str | None = None) -> NoReturn:
    """End with the message of an error that explains itself; its traceback goes to a file."""
    number = os.environ.get("RANK", "0")
    message = str(error) if number == "0" else f"[rank {number}] {error}"
    if folder is not None and Path(folder).is_dir():
        path = Path(folder) / f"traceback.rank{number}.txt"
        with contextlib.suppress(OSError):
            path.write_text(traceback.format_exc(), encoding="utf-8")
            message += f"\n(traceback in {path})"
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)


def open_sources(sources: tuple[Any, ...]) -> list[Records]:
    from biascare.records import Records

    return [Records(source.path) for source in sources]


def open_training(config: Config) -> tuple[list[Records], list[Records], Mixture]:
    """Segmentation and language records and their mixture; what is held out must be other records.

    Raises ValueError before a model is built.
    """
    from biascare.data.heldout import check_held_out

    segmentation = open_sources(config.data.segmentation)
    language = open_sources(config.data.language)
    held_out = open_sources(config.data.eval_segmentation + config.data.eval_language)
    check_held_out(segmentation + language, held_out)
    mixture = build_mixture(config, segmentation, language)
    mixture.check_micro_batch(config.train.micro_batch)
    return segmentation, language, mixture


def prevalence(config: Config, segmentation: list[Records]) -> dict[str, str]:
    """Group of each target: of the file that is named, or from the training sources."""
    from biascare.data.prevalence import groups_of, total_counts

    counts = total_counts(source.target_counts for source in segmentation)
    shares = config.eval.head_share, config.eval.tail_share
    return groups_of(config.eval.prevalence, counts, *shares)


def build_mixture(config: Config, segmentation: list[Records], language: list[Records]) -> Mixture:
    from biascare.data.mixture import Mixture

    seen = zip(config.data.segmentation, segmentation, strict=True)
    read = zip(config.data.language, language, strict=True)
    return Mixture(
        segmentation=[(len(r.segmentation_units), s.weight) for s, r in seen],
        language=[(len(r.language_units), s.weight) for s, r in read],
        ratio=config.data.ratio,
        seed=config.train.seed,
    )


def build_chat(config: Config) -> ChatBuilder | None:
    if config.train.stage == "vision":
        return None
    from biascare.data.chat import ChatBuilder
    from biascare.models.language.pathway import load_processor

    assert config.model.mllm is not None
    return ChatBuilder(
        load_processor(config.model.mllm),
        image_size=config.model.image_size,
        max_tokens=config.data.max_tokens,
    )


def build_loader(
    config: Config,
    segmentation: list[Records],
    language: list[Records],
    mixture: Mixture,
    chat: ChatBuilder | None,
    groups: dict[str, str],
    start_step: int,
) -> Any:
    """The training DataLoader of this rank, continuing after `start_step` optimizer steps."""
    from dataclasses import asdict

    from biascare.data.loader import StreamSettings, TrainingStream, training_loader
    from biascare.data.mixture import GlobalBatchSampler
    from biascare.training.ranks import rank, world_size

    mix = asdict(config.data.prompts)
    settings = StreamSettings(
        image_size=config.model.image_size,
        targets_per_image=config.data.targets_per_image,
        target_sampling_power=config.data.target_sampling_power,
        prompt_mix=mix if chat else mix | {"text": 0.0},  # without a text there must be a prompt
        augment=config.data.augment,
        seed=config.train.seed,
    )
    stream = TrainingStream(segmentation, language, mixture, chat, groups, settings)
    sampler = GlobalBatchSampler(
        config.train.global_batch,
        config.train.micro_batch,
        rank(),
        world_size(),
        start_step,
        config.train.max_steps - start_step,
    )
    return training_loader(stream, sampler, config.data.num_workers)


def build_network(config: Config) -> DualPathNetwork:
    import torch

    from biascare.models.export_folder import build_network
    from biascare.models.language.pathway import LoraSettings

    torch.manual_seed(config.train.seed)
    model = config.model
    built = build_network(
        vision=model.vision,
        image_size=model.image_size,
        vision_weights=model.vision_weights,
        mllm=model.mllm if config.train.stage == "joint" else None,
        lora=LoraSettings(model.lora_rank, model.lora_alpha, model.lora_dropout),
        num_queries=model.num_queries,
        query_heads=model.query_heads,
        attention=model.attention,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        activation_checkpointing=model.activation_checkpointing,
    )
    if built.mllm is not None:
        built.mllm.packing = config.data.pack_sequences
    built.set_trainable(vars(config.train.trainable))
    if config.train.compile:
        # In place: a wrapper would rename every parameter. The LLM's lengths change at every step.
        built.vision.image_encoder.compile()
    return built


def optimizer_settings(config: Config) -> OptimizerSettings:
    from biascare.training.optimizer import OptimizerSettings

    optim = config.optim
    return OptimizerSettings(
        lr=optim.lr,
        mllm_lr=optim.mllm_lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        warmup_steps=optim.warmup_steps,
        final_lr_ratio=optim.final_lr_ratio,
        max_steps=config.train.max_steps,
    )


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """The resolved DeepSpeed file; checked before any model is loaded."""
    from biascare.training.engine import can_discard, resolve_deepspeed_config

    train = config.train
    path = resolve_deepspeed(train.deepspeed)
    settings = resolve_deepspeed_config(
        path,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        grad_clip=config.optim.grad_clip,
        precision=train.precision,
    )
    if train.nonfinite == "skip" and not can_discard(settings):
        raise ValueError(
            f"train.nonfinite=skip cannot discard gradients that {path} offloads; set "
            "train.nonfinite=raise or remove offload_optimizer"
        )
    return settings


def build_engine(
    config: Config, model: DualPathNetwork, deepspeed_config: dict[str, Any], log: RunLog
) -> Any:
    """Engine around the training step; prints what is trainable."""
    from biascare.training.engine import build_engine
    from biascare.training.optimizer import parameter_groups
    from biascare.training.progress import trainable_table
    from biascare.training.step import TrainStep
    from biascare.training.terms import HITLSettings, ObjectiveSettings

    settings = optimizer_settings(config)
    log.say(trainable_table(count_parameters(model, settings)))
    step = TrainStep(
        model, ObjectiveSettings(**vars(config.objective)), HITLSettings(**vars(config.hitl))
    )
    groups = parameter_groups(model.pathway_parameters(), settings)
    return build_engine(step, groups, settings, deepspeed_config)


def count_parameters(
    model: DualPathNetwork, settings: OptimizerSettings
) -> dict[str, tuple[int, int, float]]:
    """Rows of the trainable-parameter table; what belongs to no part is the rest."""
    from biascare.models.network import PARTS

    rates = {"vision": settings.lr, "mllm": settings.mllm_lr}
    rows, named = {}, set()
    for part in PARTS:
        parameters = part.parameters(model)
        named |= {id(p) for p in parameters}
        if parameters:
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            total = sum(p.numel() for p in parameters)
            rows[part.name] = (total, trainable, rates[part.pathway])
    rest = [p for p in model.parameters() if id(p) not in named]
    rows["rest"] = (sum(p.numel() for p in rest), 0, 0.0)
    return rows


def provenance(
    config: Config, sources: list[Records], deepspeed_config: dict[str, Any]
) -> dict[str, Any]:
    """What exact resume depends on; stands in every checkpoint."""
    settings = {
        key: value for key, value in dotted(to_dict(config)) if not key.startswith(FREE_ON_RESUME)
    }
    weights = [s.weight for s in config.data.segmentation + config.data.language]
    hashes = [source.manifest["content_hash"] for source in sources]
    settings["data"] = [list(pair) for pair in zip(hashes, weights, strict=True)]
    settings["zero_stage"] = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    return settings


def dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def save_run_files(
    config: Config, groups: dict[str, str], segmentation: list[Records], language: list[Records]
) -> None:
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(config, folder / "config.yaml")
    save_prevalence_file(config, folder / "prevalence.json", segmentation)
    weights = [source.weight for source in config.data.segmentation + config.data.language]
    tasks = ["segmentation"] * len(segmentation) + ["language"] * len(language)
    from biascare.runs.origin import git_commit

    about = {
        "git_commit": git_commit(),
        "prevalence_groups": groups,
        "data": [
            about_source(task, records, weight)
            for task, records, weight in zip(tasks, segmentation + language, weights, strict=True)
        ],
    }
    (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def save_prevalence_file(config: Config, path: Path, segmentation: list[Records]) -> None:
    """The groups of this run, for `scripts/evaluate.py --prevalence` and for later runs."""
    from biascare.data.prevalence import save_prevalence, total_counts

    given = config.eval.prevalence
    if given is None:
        counts = total_counts(source.target_counts for source in segmentation)
        folders = [str(source.folder) for source in segmentation]
        shares = config.eval.head_share, config.eval.tail_share
        save_prevalence(path, counts, *shares, folders=folders)
    elif Path(given).resolve() != path.resolve():
        shutil.copyfile(given, path)


def about_source(task: str, records: Records, weight: float | None) -> dict[str, Any]:
    """What the card of the model says about a record folder."""
    manifest = records.manifest
    copied = {name: manifest[name] for name in ("source", "split", "version", "licence")}
    return copied | {
        "task": task,
        "images": manifest["num_rows"],
        "weight": weight,
        "content": manifest["content_hash"],
    }


def export(config: Config, engine: Any, chat: ChatBuilder | None) -> None:
    """OUTPUT_DIR/export: the portable folder that `BiasCareVL.from_pretrained` opens."""
    from biascare.models.export_folder import save_network
    from biascare.runs.export import write_export
    from biascare.runs.origin import read_run
    from biascare.training.engine import gathered_state

    exported = engine.module.model.exported_parameters()
    state = gathered_state(engine.module.model, lambda name, parameter: name in exported)
    if state is None:
        return
    folder = Path(config.train.output_dir)
    write_export(
        folder / "export",
        lambda partial: save_network(engine.module.model, partial, state),
        read_run(folder, config.train.max_steps, to_dict(config)),
        None if chat is None else chat.processor,
        replace=True,
    )


def run(config: Config) -> None:
    from biascare.data.loader import to_device
    from biascare.runs.evaluate import Evaluator
    from biascare.training.checkpoint import CheckpointStore
    from biascare.training.hooks import CheckpointHook, EvalHook, LedgerHook, LogHook
    from biascare.training.progress import RunLog
    from biascare.training.ranks import from_rank_zero, init_process_group, leave_process_group
    from biascare.training.trainer import Trainer

    train = config.train
    folder = Path(train.output_dir)
    init_process_group()
    deepspeed_config = deepspeed_settings(config)
    segmentation, language, mixture = open_training(config)
    groups = prevalence(config, segmentation)
    from_rank_zero(lambda: save_run_files(config, groups, segmentation, language))
    chat = build_chat(config)
    log = RunLog(folder)
    engine = build_engine(config, build_network(config), deepspeed_config, log)
    store = CheckpointStore(folder / "checkpoints", train.keep_checkpoints)
    fingerprint = provenance(config, segmentation + language, deepspeed_config)
    start_step = resume(train.resume, store, engine, fingerprint, log)
    finished = start_step >= train.max_steps
    log.open(start_step, tensorboard=train.tensorboard, evaluates_again=finished)
    evaluator = Evaluator(config, engine, chat, groups, log)
    if finished or (config.eval.at_start and start_step == 0):
        evaluator(start_step)
    Trainer(
        engine,
        build_loader(config, segmentation, language, mixture, chat, groups, start_step),
        to_device,
        [
            LogHook(log, engine, train.log_every, train.max_steps),
            LedgerHook(folder, config.data.max_bad_samples),
            EvalHook(evaluator, train.eval_every, train.max_steps),
            CheckpointHook(store, engine, train.save_every, train.max_steps, fingerprint),
        ],
        max_steps=train.max_steps,
        start_step=start_step,
        nonfinite=train.nonfinite,
        max_skipped_steps=train.max_skipped_steps,
    ).run()
    export(config, engine, chat)
    log.say(f"exported to {folder / 'export'}")
    log.close()
    leave_process_group()


def resume(choice: str, store: Any, engine: Any, fingerprint: dict[str, Any], log: RunLog) -> int:
    """Optimizer steps already done; loads the checkpoint `train.resume` asks for."""
    if choice == "never":
        store.set_aside()
        return 0
    path = store.newest() if choice == "auto" else Path(choice)
    if path is None:
        return 0
    step: int = store.load(engine, path, fingerprint)[0]
    log.say(f"continuing after step {step} from {path}")
    return step


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


def plan(planned: Planned, options: argparse.Namespace) -> None:
    """Print what the run needs; see biascare/training/plan.py. Exits with 1 if it does not fit."""
    from rich.console import Console

    from biascare.planning.blank import BatchShape, blank_batch, mllm_config, weights_left_out
    from biascare.planning.plan import fits, make_plan, read_zero_settings, tables
    from biascare.training.optimizer import parameter_groups
    from biascare.training.step import TrainStep
    from biascare.training.terms import HITLSettings, ObjectiveSettings

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
    with weights_left_out(None if mllm is None else mllm_config(mllm)):
        model = build_network(config)
        step = TrainStep(
            model, ObjectiveSettings(**vars(config.objective)), HITLSettings(**vars(config.hitl))
        )
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
        parameter_groups(model.pathway_parameters(), optimizer_settings(config)),
        blank_batch(model, shape),
        zero,
        max_steps=train.max_steps,
        checkpointing=config.model.activation_checkpointing,
    )
    console = Console(soft_wrap=True)
    for table in tables(made, gpu_memory_gib=options.gpu_memory, epochs=passes(planned)):
        console.print(table, highlight=False)
    if not fits(made, options.gpu_memory):
        raise SystemExit(1)


def passes(planned: Planned) -> dict[str, float]:
    """Passes over the records of each task, where all its folders are there."""
    config, found = planned.config, {}
    for part, task in enumerate(("segmentation", "language")):
        folders = planned.sources.get(task, [])
        if folders and len(folders) == len(getattr(config.data, task)):
            from biascare.records import Records

            units = sum(len(getattr(Records(folder), f"{task}_units")) for folder in folders)
            share = config.data.ratio[part] / sum(config.data.ratio)
            found[task] = config.train.max_steps * config.train.global_batch * share / max(units, 1)
    return found


def main() -> None:
    options = read_arguments(sys.argv[1:])
    try:
        if options.plan:
            planned = load_planned(options.config, options.overrides)
            prepare_process()
            return plan(planned, options)
        config = load_config(options.config, options.overrides)
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":  # every rank reads the same file
            raise SystemExit(1) from None
        fail(error)
    prepare_process()
    from biascare.training.hooks import BadDataError
    from biascare.training.trainer import NonFiniteError

    try:
        run(config)
    except (ValueError, OSError, NonFiniteError, BadDataError) as error:
        fail(error, config.train.output_dir)


if __name__ == "__main__":
    main()
