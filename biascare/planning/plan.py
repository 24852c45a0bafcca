"""What a run needs before it is started: parameters, memory per GPU, operations, tokens.

    plan = make_plan(step, groups, batch, settings)       # `step` on the meta device
    print(verdict(plan, 80, remedies))
    for table in tables(plan, tflops=100, epochs={}):
        console.print(table)

Operations and activations come from running the training step on shapes (`dry_run`), so they follow
the code. Weights, gradients and optimizer states come from what DeepSpeed 0.19 allocates at each
ZeRO stage, padding included (`engine_bytes`); a test holds them against a real engine.

Not planned: offloading to the CPU, `torch.compile`, and what libraries allocate for themselves,
for which `DEVICE_ALLOWANCE` stands in.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from rich.table import Table
from torch import nn

from biascare.interfaces import Batch
from biascare.planning.dry_run import BACKWARD, FORWARD, OTHER, PHASES, RECOMPUTE, StepCost, dry_run

GIB = 2**30

DEVICE_ALLOWANCE = 2 * GIB
"""CUDA context, NCCL and gaps of the allocator. An allowance, not a measurement."""

LOGITS = "lm_head (logits at answer positions)"

PARTS = {
    r"\.lora_": "LoRA",
    r"vision\.image_encoder": "vision encoder",
    r"vision\.prompt_encoder": "prompt encoder",
    r"vision\.mask_decoder": "mask decoder",
    r"query_attention": "query attention",
    r"\.visual\.merger|multi_modal_projector": "projector",
    r"\.visual|vision_tower": "MLLM vision tower",
    r"embed_tokens": "embeddings",
    r"lm_head": "lm_head",
    r"language_model": "LLM layers",
}
"""Name of a module or parameter -> part; the first pattern that is found decides."""


def part_of(name: str) -> str | None:
    """Part of a module or parameter of `TrainStep`, by its dotted name."""
    return next((part for pattern, part in PARTS.items() if re.search(pattern, name)), None)


# ---------------------------------------------------------------- settings


class ZeroSettings(NamedTuple):
    """What of the DeepSpeed file and the run decides memory."""

    stage: int
    world_size: int
    accumulation: int  # micro-batches per rank and optimizer step
    bf16: bool
    reduce_bucket_size: int  # elements
    num_buckets: int
    round_robin: bool
    sub_group_size: int  # elements
    max_live_parameters: int  # elements
    persistence_threshold: int  # elements
    model_persistence_threshold: int  # elements

    @property
    def element_size(self) -> int:
        return 2 if self.bf16 else 4


def read_zero_settings(
    path: str | Path, *, world_size: int, global_batch: int, micro_batch: int, precision: str
) -> ZeroSettings:
    """Settings of a DeepSpeed file with DeepSpeed's own defaults.

    Raises ValueError where the batch does not divide over the ranks, and for offloading.
    """
    per_forward = micro_batch * world_size
    if global_batch % per_forward:
        nearest = max(1, round(global_batch / per_forward)) * per_forward
        raise ValueError(
            f"train.global_batch {global_batch} is not a multiple of train.micro_batch "
            f"{micro_batch} x {world_size} ranks (--world-size); the nearest is {nearest}"
        )
    # DeepSpeed's own class fills in what the file leaves out: its defaults change with versions.
    section = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        if section.get(name, {}).get("device", "none") != "none":
            raise ValueError(f"{path}: --plan cannot plan {name}; remove it to plan without it")
    zero = DeepSpeedZeroConfig(**section)
    staged = zero.contiguous_gradients and zero.stage > 0
    return ZeroSettings(
        stage=int(zero.stage),
        world_size=world_size,
        accumulation=global_batch // per_forward,
        bf16=precision == "bf16",
        reduce_bucket_size=int(zero.reduce_bucket_size),
        # Two with overlap_comm: one is sent while the other fills. ZeRO-3 has a single one.
        num_buckets=(2 if zero.overlap_comm and zero.stage < 3 else 1) if staged else 0,
        round_robin=bool(zero.round_robin_gradients),
        sub_group_size=int(zero.sub_group_size),
        max_live_parameters=int(zero.max_live_parameters),
        persistence_threshold=int(zero.param_persistence_threshold),
        model_persistence_threshold=int(zero.model_persistence_threshold),
    )


# ---------------------------------------------------------------- engine


class EngineBytes(NamedTuple):
    """What DeepSpeed holds on the fullest rank."""

    weights: int
    gathered: int  # ZeRO-3: parameters of other ranks at hand during a forward
    gradients: int  # when the last micro-batch of a step has been accumulated
    master: int  # fp32 copy of what is trained
    moments: int  # both of Adam's and its step counters, fp32
    buckets: int  # staging of communication
    step_workspace: int  # in the optimizer step alone, when activations are gone

    @property
    def lasting(self) -> int:
        """All but the workspace of the optimizer step."""
        return sum(self) - self.step_workspace


def engine_bytes(
    parameters: Iterable[nn.Parameter], groups: Sequence[Sequence[int]], zero: ZeroSettings
) -> EngineBytes:
    """Bytes on one rank. `groups`: sizes of the parameters of each optimizer group, in order."""
    sizes = [(p.numel(), p.requires_grad) for p in parameters]
    compute = {0: _replicated, 1: _partitioned_states, 2: _partitioned_states, 3: _partitioned_all}
    return compute[zero.stage](sizes, groups, zero)


_Sizes = list[tuple[int, bool]]  # (elements, trainable) of every parameter


def _replicated(sizes: _Sizes, groups: Sequence[Sequence[int]], zero: ZeroSettings) -> EngineBytes:
    trained = sum(map(sum, groups))
    size, fp32 = zero.element_size, 4
    # A world of one sends nothing.
    bucket = min(MEMORY_OPT_ALLREDUCE_SIZE, trained) if zero.world_size > 1 else 0
    return EngineBytes(
        weights=sum(n for n, _ in sizes) * size,
        gathered=0,
        gradients=trained * size,
        master=trained * fp32 if zero.bf16 else 0,
        moments=2 * trained * fp32 + sum(map(len, groups)) * fp32,
        buckets=bucket * size,
        # The bf16 wrapper makes fp32 gradients of everything, then AdamW's temporary per group.
        step_workspace=(trained * fp32 if zero.bf16 else 0) + max(map(sum, groups)) * fp32,
    )


def _partitioned_states(
    sizes: _Sizes, groups: Sequence[Sequence[int]], zero: ZeroSettings
) -> EngineBytes:
    """ZeRO-1 and 2: a flat buffer per group, aligned to two elements per rank, cut evenly."""
    size, fp32 = zero.element_size, 4
    aligned = 2 * zero.world_size
    flat = [-(-sum(group) // aligned) * aligned for group in groups]
    shards = [n // zero.world_size for n in flat]
    # The fullest rank decides whether a run fits; the others wait for it.
    owned = max(
        sum(_owned(group, shard, rank, zero) for group, shard in zip(groups, shards, strict=True))
        for rank in range(zero.world_size)
    )
    # ZeRO-1 accumulates whole gradients and partitions them in the last micro-batch.
    whole = sum(map(sum, groups)) if zero.stage == 1 and zero.accumulation > 1 else 0
    frozen = sum(n for n, trainable in sizes if not trainable)
    return EngineBytes(
        weights=(frozen + sum(flat)) * size,
        gathered=0,
        gradients=(whole + owned) * size,
        master=sum(shards) * fp32,
        moments=2 * sum(shards) * fp32 + len(groups) * fp32,
        buckets=zero.num_buckets * zero.reduce_bucket_size * size,
        step_workspace=2 * max(shards) * fp32,
    )


def _owned(group: Sequence[int], shard: int, rank: int, zero: ZeroSettings) -> int:
    """Elements of the gradients a rank keeps: of every parameter that reaches into its shard."""
    # Dealt like cards: gradients of the last layers come first, and would all fall to one rank.
    order = list(group)
    if zero.round_robin:
        order = [n for first in range(zero.world_size) for n in group[first :: zero.world_size]]
    total = start = 0
    for n in order:
        if start < (rank + 1) * shard and start + n > rank * shard:
            total += n
        start += n
    return total


def _partitioned_all(
    sizes: _Sizes, groups: Sequence[Sequence[int]], zero: ZeroSettings
) -> EngineBytes:
    """ZeRO-3: every parameter is cut by itself; small ones also stay whole on every rank."""
    size, fp32 = zero.element_size, 4
    shards = [[-(-n // zero.world_size) for n in group] for group in groups]
    trained = sum(map(sum, shards))
    kept_whole = 0
    for n, _ in sizes:
        # In this order, as DeepSpeed does: once the total is reached, later ones are cut.
        fits_total = n + kept_whole <= zero.model_persistence_threshold
        kept_whole += n if fits_total and n <= zero.persistence_threshold else 0
    num_states = sum(-(-sum(group) // zero.sub_group_size) for group in shards)
    largest = max(min(sum(group), zero.sub_group_size) for group in shards)
    elements = sum(n for n, _ in sizes)
    return EngineBytes(
        weights=(sum(-(-n // zero.world_size) for n, _ in sizes) + kept_whole) * size,
        gathered=min(elements - kept_whole, zero.max_live_parameters) * size,
        gradients=trained * size,
        master=trained * fp32,
        moments=2 * trained * fp32 + num_states * fp32,
        buckets=zero.num_buckets * zero.reduce_bucket_size * size,
        step_workspace=2 * largest * fp32,
    )


# ---------------------------------------------------------------- plan


class Plan(NamedTuple):
    """Everything the tables say."""

    parameters: dict[str, tuple[int, int]]  # part -> (all, trainable)
    zero: ZeroSettings
    engine: EngineBytes
    cost: StepCost  # of one micro-batch on one rank
    checkpointing: bool
    num_images: int  # distinct images of a micro-batch
    num_masks: int
    num_sequences: int
    num_tokens: int  # of the LLM, without padding
    num_answer_tokens: int
    max_steps: int

    @property
    def num_micro_batches(self) -> int:
        """In one optimizer step, over all ranks."""
        return self.zero.world_size * self.zero.accumulation

    @property
    def peak(self) -> int:
        """Bytes on the fullest GPU at its fullest moment."""
        # Never both: activations are gone when the optimizer steps.
        moment = max(self.cost.peak, self.engine.step_workspace)
        return self.engine.lasting + moment + DEVICE_ALLOWANCE


def count_parameters(step: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, trainable ones), shared ones once."""
    counts: dict[str, tuple[int, int]] = {part: (0, 0) for part in PARTS.values()}
    for name, parameter in step.named_parameters():
        part = part_of(name) or OTHER
        total, trained = counts.get(part, (0, 0))
        size = parameter.numel()
        counts[part] = (total + size, trained + (size if parameter.requires_grad else 0))
    return {part: count for part, count in counts.items() if count[0]}


def make_plan(
    step: nn.Module,
    groups: Sequence[dict[str, Any]],
    batch: Batch,
    zero: ZeroSettings,
    *,
    max_steps: int,
    checkpointing: bool,
) -> Plan:
    """The plan of a run. `step` is a `TrainStep` on the meta device, `groups` are its AdamW groups,
    `batch` a typical micro-batch (see `dry_run`). Casts the step as the engine would."""
    for parameter in step.parameters():
        # On the meta device this moves nothing, but sizes follow the type.
        parameter.data = parameter.data.to(torch.bfloat16 if zero.bf16 else torch.float32)
    group_sizes = [[p.numel() for p in group["params"]] for group in groups]
    mask = batch.mllm_inputs.get("attention_mask")
    num_images = 0 if batch.images is None else len(batch.images)  # where no LLM counts them
    return Plan(
        parameters=count_parameters(step),
        zero=zero,
        engine=engine_bytes(step.parameters(), group_sizes, zero),
        cost=dry_run(step.train(), batch, part_of),
        checkpointing=checkpointing,
        # Distinct ones: those of segmentation rows stand in both pathways and are one image.
        num_images=len(set(batch.image_slots)) or num_images,
        num_masks=0 if batch.masks is None else len(batch.masks),
        num_sequences=0 if mask is None else len(mask),
        num_tokens=0 if mask is None else int(mask.sum()),
        num_answer_tokens=0 if batch.answer_tokens is None else len(batch.answer_tokens),
        max_steps=max_steps,
    )


# ---------------------------------------------------------------- tables


def tables(plan: Plan, *, tflops: float, epochs: dict[str, float]) -> Iterator[Table]:
    """What is printed below the verdict: memory, its parts, operations, the run, its hours.

    `tflops`: what a GPU does in a second; `epochs`: task -> passes over its records, for tasks
    whose records are at hand.
    """
    yield memory_table(plan)
    yield parameter_table(plan)
    yield activation_table(plan)
    yield flops_table(plan)
    yield run_table(plan, epochs)
    yield hours_table(plan, tflops)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def parameter_table(plan: Plan) -> Table:
    table = _table("Parameters", "part", "parameters", "trainable")
    for part, (total, trained) in plan.parameters.items():
        table.add_row(part, f"{total:,}", f"{trained:,}" if trained else "frozen")
    table.add_section()
    everything = [sum(count[i] for count in plan.parameters.values()) for i in (0, 1)]
    table.add_row("all", *(f"{n:,}" for n in everything))
    return table


def memory_rows(plan: Plan) -> dict[str, int]:
    """Bytes by purpose at the fullest moment; they add up to `Plan.peak`."""
    engine, zero = plan.engine, plan.zero
    rows = {
        "weights": engine.weights,
        "weights gathered from other ranks": engine.gathered,
        "gradients": engine.gradients,
        "optimizer: fp32 master weights": engine.master,
        "optimizer: Adam's moments": engine.moments,
        f"communication buckets ({zero.num_buckets} x {zero.reduce_bucket_size:,})": engine.buckets,
    }
    # Only the larger of the two, so that the rows add up to the peak that the verdict judges.
    if engine.step_workspace > plan.cost.peak:
        rows["workspace of the optimizer step"] = engine.step_workspace
    else:
        rows["activations and workspace of a micro-batch"] = plan.cost.peak
    rows["allowance for CUDA, NCCL and gaps"] = DEVICE_ALLOWANCE
    return {name: size for name, size in rows.items() if size}


def activation_table(plan: Plan) -> Table:
    """Two moments: the end of the forward pass, and the fullest one."""
    cost = plan.cost
    fullest: Counter[str] = Counter()
    for (part, phase), size in cost.peak_bytes.items():
        fullest[part if phase == FORWARD else phase] += size
    names = {
        "lm_head": LOGITS,
        RECOMPUTE: "recomputed inside a checkpointed block",
        BACKWARD: "workspace of the backward pass",
    }
    table = _table(
        "Activations of a micro-batch, MiB", "part", "kept for backward", "at the fullest moment"
    )
    for part in (*PARTS.values(), OTHER, RECOMPUTE, BACKWARD):
        sizes = (cost.kept_bytes.get(part, 0), fullest[part])
        if any(sizes):
            table.add_row(names.get(part, part), *(f"{size / 2**20:,.1f}" for size in sizes))
    table.add_section()
    table.add_row("all", *(f"{size / 2**20:,.1f}" for size in (cost.total_kept, cost.peak)))
    return table


def memory_table(plan: Plan) -> Table:
    zero = plan.zero
    precision = "bf16" if zero.bf16 else "fp32"
    recompute = "with" if plan.checkpointing else "without"
    title = (
        f"Memory per GPU: ZeRO-{zero.stage}, {zero.world_size} ranks, {precision}, {recompute} "
        "activation checkpointing"
    )
    table = _table(title, "what", "GiB", "share")
    for name, size in memory_rows(plan).items():
        table.add_row(name, f"{size / GIB:.3f}", f"{size / plan.peak:.1%}")
    table.add_section()
    table.add_row("at the fullest moment", f"{plan.peak / GIB:.3f}", "")
    return table


def fits(plan: Plan, gpu_memory_gib: float) -> bool:
    """Whether the fullest moment fits the memory of a GPU."""
    return plan.peak / GIB <= gpu_memory_gib


class Remedy(NamedTuple):
    """A change that lets a run need less, and what it needs then."""

    change: str  # what to write, and where
    peak: int  # bytes on the fullest GPU, with this change and all that stand before it


def verdict(plan: Plan, gpu_memory_gib: float, remedies: Sequence[Remedy] = ()) -> str:
    """Whether it fits, and if not, what to change: each remedy together with those before it."""
    needed = plan.peak / GIB
    if fits(plan, gpu_memory_gib):
        left = gpu_memory_gib - needed
        return f"fits: {needed:.1f} of {gpu_memory_gib:g} GiB per GPU, {left:.1f} GiB to spare"
    # Remedies add up, cheapest first: a person stops at the first line that fits.
    lines = [f"does not fit: {needed:.1f} of {gpu_memory_gib:g} GiB per GPU"]
    enough = False
    for number, remedy in enumerate(remedies):
        enough = remedy.peak / GIB <= gpu_memory_gib
        told = f"{remedy.peak / GIB:.1f} GiB{', fits' if enough else ''}"
        lines.append(f"  {'and ' if number else ''}{remedy.change}: {told}")
    if not enough:
        least = min([plan.peak, *(remedy.peak for remedy in remedies)]) / GIB
        lines.append(f"  no key makes it fit: it takes GPUs of {least:.0f} GiB or a smaller model")
    return "\n".join(lines)


def flops_by_part(plan: Plan) -> dict[str, dict[str, int]]:
    """Part -> phase -> operations of one optimizer step over all ranks."""
    rows: dict[str, dict[str, int]] = {}
    for part in (*PARTS.values(), OTHER):
        counted = {phase: plan.cost.flops.get((part, phase), 0) for phase in PHASES}
        if any(counted.values()):
            rows[part] = {phase: n * plan.num_micro_batches for phase, n in counted.items()}
    return rows


def flops_table(plan: Plan) -> Table:
    table = _table("TFLOP per optimizer step, all ranks", "part", *PHASES, "share")
    rows = flops_by_part(plan)
    total = sum(sum(row.values()) for row in rows.values())
    for part, row in rows.items():
        cells = [f"{row[phase] / 1e12:,.3f}" for phase in PHASES]
        table.add_row(part, *cells, f"{sum(row.values()) / total:.1%}")
    table.add_section()
    sums = [sum(row[phase] for row in rows.values()) for phase in PHASES]
    table.add_row("all", *(f"{n / 1e12:,.3f}" for n in sums), f"{total / 1e12:,.3f}")
    return table


def run_table(plan: Plan, epochs: dict[str, float]) -> Table:
    table = _table("The run", "what", "per step", f"in {plan.max_steps:,} steps")
    counts = {
        "images": plan.num_images,
        "masks": plan.num_masks,
        "sequences": plan.num_sequences,
        "tokens": plan.num_tokens,
        "answer tokens": plan.num_answer_tokens,
    }
    for name, count in counts.items():
        each = count * plan.num_micro_batches
        table.add_row(name, f"{each:,}", f"{each * plan.max_steps:,}")
    flops = plan.cost.total_flops * plan.num_micro_batches
    table.add_row("FLOP", f"{flops:.3g}", f"{flops * plan.max_steps:.3g}")
    for task, passes in epochs.items():
        table.add_row(f"passes over the {task} records", "", f"{passes:.2f}")
    return table


def hours_table(plan: Plan, tflops: float) -> Table:
    """How long the run computes on 1, 2, 4, ... GPUs, as far as the batch divides over them."""
    table = _table(f"Hours at {tflops:g} TFLOP/s per GPU", "GPUs", "per 1,000 steps", "the run")
    total = plan.cost.total_flops * plan.num_micro_batches
    # The batch stays what it is, so more GPUs mean less accumulation, down to one micro-batch each.
    sizes = {2**k for k in range(plan.num_micro_batches.bit_length())} | {plan.zero.world_size}
    for num_gpus in sorted(n for n in sizes if plan.num_micro_batches % n == 0):
        seconds = total / (tflops * 1e12 * num_gpus)
        cells = (f"{seconds * steps / 3600:,.1f}" for steps in (1000, plan.max_steps))
        planned = " (planned)" if num_gpus == plan.zero.world_size else ""
        table.add_row(f"{num_gpus}{planned}", *cells)
    # The samples that the log of a run counts: masks and questions.
    per_sample = plan.cost.total_flops / max(plan.num_sequences, plan.num_masks, 1) / 1e12
    table.caption = (
        "without waiting for data and for other GPUs; a measured rate is samples_per_second of "
        f"metrics.jsonl x {per_sample:.3g} TFLOP per sample / GPUs"
    )
    return table
