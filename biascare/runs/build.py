"""The objects of a run, each made from its configuration: records, loader, network, step, engine.

    segmentation, language, mixture = open_training(config)
    network = build_network(config)
    engine = build_engine(config, network, deepspeed_settings(config), say)

Below this module nothing knows a configuration: everything takes explicit arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from biascare.config import resolve_deepspeed
from biascare.data.chat import ChatBuilder
from biascare.data.heldout import check_held_out
from biascare.data.labels import LabelSpace, trained_labels
from biascare.data.loader import StreamSettings, TrainingStream, training_loader
from biascare.data.mixture import GlobalBatchSampler, Mixture
from biascare.data.prevalence import drawn_counts, groups_of
from biascare.models import export_folder
from biascare.models.language.pathway import LoraSettings, MLLMOpener, load_processor, open_mllm
from biascare.models.network import PARTS, DualPathNetwork
from biascare.records import Records
from biascare.settings.keys import Config, ModelConfig, SourceConfig
from biascare.training import engine
from biascare.training.optimizer import OptimizerSettings, parameter_groups
from biascare.training.progress import trainable_table
from biascare.training.ranks import gather_objects, local_rank, rank, world_size
from biascare.training.step import TrainStep
from biascare.training.terms import HITLSettings, ObjectiveSettings

LOGGER = logging.getLogger("biascare")

# ---------------------------------------------------------------- data


def open_sources(sources: tuple[SourceConfig, ...]) -> list[Records]:
    return [Records(source.path) for source in sources]


def open_training(config: Config) -> tuple[list[Records], list[Records], Mixture]:
    """Records with masks (in the labels stage: with labels), language records and their mixture;
    what is held out must be other records.

    Raises ValueError before a model is built.
    """
    data = config.data
    images, language = open_sources(config.image_sources), open_sources(data.language)
    held_out = open_sources(data.eval_segmentation + data.eval_language + data.eval_labelled)
    if data.verify:
        verify(images + language + held_out)
    # Before minutes go into a model: training on the test set cannot be undone afterwards.
    check_held_out(images + language, held_out)
    mixture = build_mixture(config, images, language)
    mixture.check_micro_batch(config.train.micro_batch)
    return images, language, mixture


def verify(sources: list[Records]) -> None:
    """Compare every byte of record folders with their content hash, once on each machine.

    Raises ValueError, on every rank, with all that differ.
    """
    problems = []
    if local_rank() == 0:  # each machine may have a copy of its own
        for folder, source in {source.folder: source for source in sources}.items():
            try:
                source.verify()
            except ValueError as error:
                problems.append(str(error))
            else:
                LOGGER.info("data.verify: %s is what was prepared", folder)
    found = dict.fromkeys(problem for mine in gather_objects(problems) for problem in mine)
    if found:
        raise ValueError("\n".join(found))


def build_mixture(config: Config, images: list[Records], language: list[Records]) -> Mixture:
    labelled = config.train.stage == "labels"
    seen = zip(config.image_sources, images, strict=True)
    read = zip(config.data.language, language, strict=True)
    units = [(r.labelled_units if labelled else r.segmentation_units, s.weight) for s, r in seen]
    return Mixture(
        segmentation=[(len(rows), weight) for rows, weight in units],
        language=[(len(r.language_units), s.weight) for s, r in read],
        ratio=config.data.ratio,
        seed=config.train.seed,
    )


def prevalence(config: Config, images: list[Records]) -> dict[str, str]:
    """Group of each target or label: of the file that is named, or from the training sources."""
    counts = drawn_counts(images, labelled=config.train.stage == "labels")
    shares = config.eval.head_share, config.eval.tail_share
    return groups_of(config.eval.prevalence, counts, *shares)


def build_labels(config: Config, images: list[Records] | None = None) -> LabelSpace | None:
    """What the head of the labels stage tells apart; None in the other stages."""
    if config.train.stage != "labels":
        return None
    model = config.model
    names = model.labels
    if not names:
        names = trained_labels(open_sources(config.data.labelled) if images is None else images)
    return LabelSpace(names, model.exclusive_labels)


def build_chat(config: Config) -> ChatBuilder | None:
    if config.train.stage != "joint":
        return None
    assert config.model.mllm is not None
    return ChatBuilder(
        load_processor(config.model.mllm),
        image_size=config.model.image_size,
        max_tokens=config.data.max_tokens,
    )


def build_stream(
    config: Config,
    images: list[Records],
    language: list[Records],
    mixture: Mixture,
    chat: ChatBuilder | None,
    groups: dict[str, str],
) -> TrainingStream:
    """Stream positions -> batches, the same on every rank."""
    # All randomness hangs on the seed and the position, so any rank can make any sample.
    mix = asdict(config.data.prompts)
    settings = StreamSettings(
        image_size=config.model.image_size,
        targets_per_image=config.data.targets_per_image,
        target_sampling_power=config.data.target_sampling_power,
        prompt_mix=mix if chat else mix | {"text": 0.0},  # without a text there must be a prompt
        augment=config.data.augment,
        flip=config.data.flip,
        seed=config.train.seed,
    )
    labels = build_labels(config, images)
    return TrainingStream(images, language, mixture, chat, groups, settings, labels)


def training_stream(config: Config) -> tuple[TrainingStream, ChatBuilder | None]:
    """The stream of a run and what its conversations are made with, without any model."""
    images, language, mixture = open_training(config)
    groups, chat = prevalence(config, images), build_chat(config)
    return build_stream(config, images, language, mixture, chat, groups), chat


def build_loader(config: Config, stream: TrainingStream, start_step: int) -> Any:
    """The training DataLoader of this rank, continuing after `start_step` optimizer steps."""
    # The order does not depend on the number of ranks, and starts at a step without replaying it.
    sampler = GlobalBatchSampler(
        config.train.global_batch,
        config.train.micro_batch,
        rank(),
        world_size(),
        start_step,
        config.train.max_steps - start_step,
    )
    return training_loader(stream, sampler, config.data.num_workers)


# ---------------------------------------------------------------- model


LABEL_PARTS = ("vision_encoder", "label_head")
"""Parts that the labels stage can train."""


def lora_settings(model: ModelConfig) -> LoraSettings:
    return LoraSettings(rank=model.lora_rank, alpha=model.lora_alpha, dropout=model.lora_dropout)


def build_network(config: Config, opener: MLLMOpener = open_mllm) -> DualPathNetwork:
    """The network with its initial weights, frozen and thawed as the run wants it.

    `opener` opens the base image-text model; a plan gives one that reads no weights.
    """
    # Random parts (LoRA, query attention) start equal on every rank and in every run of a seed.
    torch.manual_seed(config.train.seed)
    model = config.model
    network = export_folder.build_network(
        vision=model.vision,
        image_size=model.image_size,
        vision_weights=model.vision_weights,
        multimask=model.multimask,
        mask_prompt_limit=model.mask_prompt_limit,
        mllm=model.mllm if config.train.stage == "joint" else None,
        lora=lora_settings(model),
        num_queries=model.num_queries,
        query_heads=model.query_heads,
        attention=model.attention,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        activation_checkpointing=model.activation_checkpointing,
        opener=opener,
        labels=build_labels(config),
    )
    if network.mllm is not None:
        network.mllm.packing = config.data.pack_sequences
    trained = vars(config.train.trainable)
    if config.train.stage == "labels":
        # No mask is decoded: a trainable parameter without a gradient would stop DeepSpeed.
        trained = {part: on and part in LABEL_PARTS for part, on in trained.items()}
    network.set_trainable(trained)
    if config.train.compile:
        # In place: a wrapper would rename every parameter. The LLM's lengths change at every step.
        network.vision.image_encoder.compile()
    return network


def build_step(config: Config, network: DualPathNetwork) -> TrainStep:
    return TrainStep(
        network, ObjectiveSettings(**vars(config.objective)), HITLSettings(**vars(config.hitl))
    )


# ---------------------------------------------------------------- engine


def optimizer_settings(config: Config) -> OptimizerSettings:
    return OptimizerSettings(**vars(config.optim), max_steps=config.train.max_steps)


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """The resolved DeepSpeed file; checked before any model is loaded."""
    train = config.train
    path = resolve_deepspeed(train.deepspeed)
    settings = engine.resolve_deepspeed_config(
        path,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        grad_clip=config.optim.grad_clip,
        precision=train.precision,
    )
    # Found at the first NaN, after days, it would be too late to choose.
    if train.nonfinite == "skip" and not engine.can_discard(settings):
        raise ValueError(
            f"train.nonfinite=skip cannot discard gradients that {path} offloads; set "
            "train.nonfinite=raise or remove offload_optimizer"
        )
    return settings


def build_engine(
    config: Config,
    network: DualPathNetwork,
    deepspeed_config: dict[str, Any],
    say: Callable[[Any], None],
) -> Any:
    """DeepSpeed's engine around the training step; says what is trainable."""
    settings = optimizer_settings(config)
    say(trainable_table(count_parameters(network, settings)))
    groups = parameter_groups(network.pathway_parameters(), settings)
    return engine.build_engine(build_step(config, network), groups, settings, deepspeed_config)


def count_parameters(
    network: DualPathNetwork, settings: OptimizerSettings
) -> dict[str, tuple[int, int, float]]:
    """Rows of the trainable-parameter table; what belongs to no part is the rest."""
    rates = {"vision": settings.lr, "mllm": settings.mllm_lr}
    rows, named = {}, set()
    for part in PARTS:
        parameters = part.parameters(network)
        named |= {id(p) for p in parameters}  # by identity: tied weights have two names
        if parameters:
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            total = sum(p.numel() for p in parameters)
            rows[part.name] = (total, trainable, rates[part.pathway])
    # The frozen base model above all; listed, so that the table adds up to the whole network.
    rest = [p for p in network.parameters() if id(p) not in named]
    rows["rest"] = (sum(p.numel() for p in rest), 0, 0.0)
    return rows
