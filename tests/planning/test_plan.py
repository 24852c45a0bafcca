"""`scripts/train.py --plan`: held against real steps, real engines and torch's own counters.

Run as a program, this file is one rank of a world that measures DeepSpeed engines:

    RANK=0 WORLD_SIZE=2 ... python tests/planning/test_plan.py '{"cases": [[2, "bf16"]]}' out.json
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from biascare.data.loader import collate
from biascare.interfaces import Batch
from biascare.models.export_folder import build_network
from biascare.models.network import DualPathNetwork
from biascare.models.vision import encoder
from biascare.models.vision.relative_attention import attend
from biascare.planning.blank import (
    KNOWN_MLLMS,
    BatchShape,
    blank_batch,
    known_architecture,
    mllm_config,
    weightless,
)
from biascare.planning.dry_run import dry_run
from biascare.planning.plan import (
    DEVICE_ALLOWANCE,
    GIB,
    Plan,
    Remedy,
    ZeroSettings,
    count_parameters,
    engine_bytes,
    fits,
    flops_by_part,
    hours_table,
    memory_rows,
    part_of,
    read_zero_settings,
    tables,
    verdict,
)
from biascare.runs.plan import PlanOptions, load_planned, print_plan
from biascare.training.optimizer import OptimizerSettings, parameter_groups
from biascare.training.step import TrainStep
from scripts import train
from tests.tiny import (
    HITL,
    LORA,
    OBJECTIVE,
    language_sample,
    pad_token_id,
    segmentation_sample,
    tiny_chat,
    tiny_model,
)
from tests.training.training_runs import ROOT, environment, free_port

TRAINABLE = {
    "lora": True,
    "vision_encoder": True,
    "prompt_encoder": False,
    "mask_decoder": True,
    "query_attention": True,
}


def tiny_step(folder: Path | None, **keywords: Any) -> TrainStep:
    model = tiny_model(folder, **keywords)
    model.set_trainable(TRAINABLE)
    return TrainStep(model, OBJECTIVE, HITL._replace(ratio=0.5)).train()


def tiny_batch_of(folder: Path | None) -> Batch:
    """Two images with three masks, and two questions where there is a language model."""
    chat = None if folder is None else tiny_chat(folder)
    samples = [segmentation_sample(chat, 0, ("liver", "spleen")), segmentation_sample(chat, 1)]
    if chat is None:
        return collate(samples, 0, 0)
    samples += [language_sample(chat, 2), language_sample(chat, 3)]
    return collate(samples, 0, pad_token_id(chat))


def as_shapes(batch: Batch) -> Batch:
    """Pixels on the meta device, the rest as it is."""
    inputs = {
        name: value.to("meta") if name == "pixel_values" else value
        for name, value in batch.mllm_inputs.items()
    }
    assert batch.images is not None
    return batch._replace(images=batch.images.to("meta"), mllm_inputs=inputs)


# ---------------------------------------------------------------- against a real step


def _cpu_forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _cpu_backward(g: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(g, q, k, v))


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
}
"""torch's counter knows the fused attention of GPUs alone."""


@pytest.fixture
def encoder_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder has a way of its own for CPUs, with other products; a plan is of the other."""
    monkeypatch.setattr(encoder, "relative_attention", attend)


class Measured:
    """Operations, kept activations and peak memory of a real step on the CPU."""

    def __init__(self, step: TrainStep, batch: Batch):
        owned = {x.untyped_storage().data_ptr() for x in (*step.parameters(), *step.buffers())}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = step(batch, 1, 1)["loss"]
            self.kept = sum(kept.values())
            loss.backward()
        self.flops = counter.get_total_flops()
        self.peak = real_peak(step, batch)


def real_peak(step: TrainStep, batch: Batch) -> int:
    """Highest sum of live bytes the CPU's allocator sees in a forward and backward pass."""
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in step.parameters()
        if p.requires_grad
    ]
    step.zero_grad()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(batch, 1, 1)["loss"].backward()
    for handle in handles:
        handle.remove()
    alive = highest = 0
    for event in sorted(_memory_events(profile), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest


def _memory_events(profile: Any) -> list[Any]:
    events = profile.profiler.kineto_results.events()
    return [event for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("qwen2_5_vl", False),
        ("qwen2_5_vl", True),
        ("llava", True),
        ("vision", False),
        pytest.param("llava", False, marks=pytest.mark.slow),
        pytest.param("vision", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("encoder_of_gpus")
def test_operations_and_memory_are_those_of_a_real_step(
    kind: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    fixture = {"qwen2_5_vl": "tiny_mllm", "llava": "tiny_llava"}.get(kind)
    folder = request.getfixturevalue(fixture) if fixture else None
    batch = tiny_batch_of(folder)
    step = tiny_step(folder, activation_checkpointing=checkpointing)
    real = Measured(step, batch)
    step.zero_grad()
    planned = dry_run(step.to("meta"), as_shapes(batch), part_of, attention_of="cpu")
    print(
        f"{kind}: FLOP {planned.total_flops} / {real.flops}, kept {planned.total_kept} / "
        f"{real.kept}, peak {planned.peak} / {real.peak}"
    )
    assert planned.total_flops == pytest.approx(real.flops, rel=0.03)
    assert planned.total_kept == pytest.approx(real.kept, rel=0.25)
    assert planned.peak == pytest.approx(real.peak, rel=0.25)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("encoder_of_gpus")
def test_memory_follows_the_size_of_the_model(tmp_path: Path, checkpointing: bool) -> None:
    """Twice the image, a wider and deeper language model."""
    from biascare.models.language.tiny import build_tiny_mllm
    from tests.tiny import corpus

    build_tiny_mllm(tmp_path, corpus(), hidden_size=128, num_layers=4, vocab_size=400)
    batch = tiny_batch_of(tmp_path)
    step = tiny_step(tmp_path, activation_checkpointing=checkpointing)
    real = Measured(step, batch)
    step.zero_grad()
    planned = dry_run(step.to("meta"), as_shapes(batch), part_of, attention_of="cpu")
    assert planned.total_flops == pytest.approx(real.flops, rel=0.03)
    assert planned.total_kept == pytest.approx(real.kept, rel=0.25)
    assert planned.peak == pytest.approx(real.peak, rel=0.25)


class Halves(nn.Module):
    """Two parts of known cost: [4, 8] times [8, 16], then [4, 16] times [16, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.query_attention = nn.Linear(16, 2, bias=False)

    def forward(self, x: Tensor, *_: Any) -> dict[str, Tensor]:
        return {"loss": self.query_attention(self.lm_head(x)).sum()}


def test_every_part_gets_its_own_forward_and_backward() -> None:
    with torch.device("meta"):
        halves = Halves()
        x = torch.empty(4, 8)
    cost = dry_run(halves, x, part_of)  # type: ignore[arg-type]
    assert cost.flops == {
        ("lm_head", "forward"): 2 * 4 * 8 * 16,
        ("query attention", "forward"): 2 * 4 * 16 * 2,
        ("query attention", "backward"): 2 * 2 * 4 * 16 * 2,
        ("lm_head", "backward"): 2 * 4 * 8 * 16,  # the input wants no gradient
    }
    # Each product keeps its input: the hidden [4, 16] fp32 was made by lm_head, x by nobody.
    assert cost.kept_bytes == {"losses and the rest": 4 * 8 * 4, "lm_head": 4 * 16 * 4}


def test_a_gpu_keeps_no_matrix_of_scores(tiny_mllm: Path) -> None:
    """Doubling the tokens of an attention doubles what is kept, and quadruples the operations."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query_attention = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor, *_: Any) -> dict[str, Tensor]:
            q = self.query_attention(x)
            attended = nn.functional.scaled_dot_product_attention(q, q, q)
            return {"loss": attended.sum()}

    with torch.device("meta"):
        module = Attention()
        costs = [dry_run(module, torch.empty(1, 2, n, 8), part_of) for n in (512, 1024)]  # type: ignore[arg-type]
    assert costs[1].total_kept / costs[0].total_kept == pytest.approx(2, rel=0.01)
    assert costs[1].total_flops / costs[0].total_flops == pytest.approx(4, rel=0.1)


# ---------------------------------------------------------------- against real engines


def settings_of(stage: int, world_size: int, precision: str, accumulation: int = 2) -> ZeroSettings:
    return ZeroSettings(
        stage=stage,
        world_size=world_size,
        accumulation=accumulation,
        bf16=precision == "bf16",
        reduce_bucket_size=5000,
        num_buckets=1,
        round_robin=True,
        sub_group_size=10**9,
        max_live_parameters=10**9,
        persistence_threshold=1000,
        model_persistence_threshold=sys.maxsize,
    )


OPTIM = OptimizerSettings(1e-3, 1e-3, (0.9, 0.98), 0.01, 1.0, 1, 0.05, 10)


def groups_of(model: DualPathNetwork) -> list[dict[str, Any]]:
    return parameter_groups(model.pathway_parameters(), OPTIM)


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of distinct storages."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure_engine(stage: int, precision: str, folder: Path | None) -> dict[str, int]:
    """Bytes a real engine holds after the gradients of a step are there, and after the step."""
    from biascare.training.engine import apply_gradients, build_engine
    from biascare.training.ranks import world_size

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    step = tiny_step(folder, dtype=dtype)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5000, "overlap_comm": False}
    zero["round_robin_gradients"] = True
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 5000}
    config = {
        "train_batch_size": 4 * 2 * world_size(),
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
    }
    engine = build_engine(step, groups_of(step.model), OPTIM, config)
    batch = tiny_batch_of(folder)
    parameters = list(step.parameters())
    for number in range(2):
        if number == 1:
            between = num_bytes(p.grad for p in parameters)
        engine.backward(engine(batch, 5, 2 * world_size())["loss"])
        if number == 0:
            engine.step()
    optimizer = engine.optimizer
    found = {"weights": num_bytes(getattr(p, "ds_tensor", p) for p in parameters)}
    if stage == 3:
        # Also small ones that no computation has read yet: they stay from their first use on.
        whole = [p for p in parameters if p.ds_persist or p.ds_status.name == "AVAILABLE"]
        found["weights"] += sum(p.ds_numel * p.element_size() for p in whole)
    averaged = getattr(optimizer, "averaged_gradients", {}).values()
    held = [t for group in averaged if group is not None for t in group]
    found["gradients"] = num_bytes([*held, *(p.grad for p in parameters)])
    if stage == 1:
        found["gradients"] += between
    apply_gradients(engine)
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [x for state in inner.state.values() for x in state.values()]
    found["moments"] = num_bytes(states)
    found["master"] = num_bytes(master_weights(optimizer, inner, parameters))
    return found


def master_weights(optimizer: Any, inner: Any, parameters: list[Tensor]) -> list[Tensor]:
    """What the optimizer updates, where that is not the model's own."""
    updated = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if updated is None:
        updated = [p for group in inner.param_groups for p in group["params"]]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    return [p for p in updated if p.untyped_storage().data_ptr() not in own]


# ZeRO-3 comes last: it replaces torch's linear layer for the rest of the process.
ALL_CASES = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))
QUICK_CASES = [(2, "bf16"), (3, "bf16")]


def engine_world(
    num_ranks: int, folder: Path, mllm: Path | None, cases: list[tuple[int, str]]
) -> list[dict[str, dict[str, int]]]:
    """Measurements of every case by every rank."""
    worker = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
    worker += [json.dumps({"cases": cases, "mllm": mllm and str(mllm)})]
    port = str(free_port())
    outputs = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
    ranks = []
    for rank, output in enumerate(outputs):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
        variables |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        named = {name: str(value) for name, value in variables.items()}
        env = environment(MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu", **named)
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [*worker, str(output)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(codes), (folder / "rank0.log").read_text()[-3000:]
    return [json.loads(path.read_text()) for path in outputs]


def check_engines(
    num_ranks: int, folder: Path, mllm: Path | None, cases: list[tuple[int, str]]
) -> None:
    measured = engine_world(num_ranks, folder, mllm, cases)
    for stage, precision in cases:
        step = tiny_step(mllm)
        groups = [[p.numel() for p in group["params"]] for group in groups_of(step.model)]
        planned = engine_bytes(
            step.parameters(), groups, settings_of(stage, num_ranks, precision)
        )._asdict()
        fullest = {
            name: max(rank[f"{stage} {precision}"][name] for rank in measured)
            for name in ("weights", "gradients", "moments", "master")
        }
        assert {name: planned[name] for name in fullest} == fullest, (stage, precision)


@pytest.mark.timeout(240)
def test_weights_gradients_and_optimizer_states_are_deepspeeds_to_the_byte(tmp_path: Path) -> None:
    check_engines(1, tmp_path, None, QUICK_CASES)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_stage_and_precision_of_the_joint_model_holds_what_is_planned(
    tmp_path: Path, tiny_mllm: Path, num_ranks: int
) -> None:
    check_engines(num_ranks, tmp_path, tiny_mllm, ALL_CASES)


def test_a_rank_keeps_the_gradients_of_parameters_that_reach_into_its_shard() -> None:
    """5 + 3 + 4 elements on two ranks: in turn 5, 4 | 3; cut at 6, so 5 + 4 and 4 + 3."""
    parameters = [nn.Parameter(torch.empty(n)) for n in (5, 3, 4)]
    found = engine_bytes(parameters, [[5, 3, 4]], settings_of(2, 2, "fp32"))
    assert found.gradients == 9 * 4
    assert (found.weights, found.master, found.moments) == (12 * 4, 6 * 4, 2 * 6 * 4 + 4)
    assert (found.buckets, found.step_workspace) == (5000 * 4, 2 * 6 * 4)
    one = engine_bytes(parameters, [[5, 3, 4]], settings_of(1, 2, "fp32", accumulation=1))
    assert one.gradients == 9 * 4
    assert one._replace(gradients=0) == found._replace(gradients=0)


def test_zero_3_cuts_every_parameter_and_keeps_small_ones_whole() -> None:
    parameters = [nn.Parameter(torch.empty(n)) for n in (2001, 7)]
    found = engine_bytes(parameters, [[2001, 7]], settings_of(3, 2, "bf16"))
    assert found.weights == (1001 + 4 + 7) * 2
    assert found.gathered == 2001 * 2
    assert (found.gradients, found.master) == (1005 * 2, 1005 * 4)


def test_settings_come_from_the_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    run: dict[str, Any] = {"global_batch": 32, "micro_batch": 4, "precision": "bf16"}
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    zero = read_zero_settings(path, world_size=4, **run)
    assert (zero.stage, zero.accumulation, zero.num_buckets, zero.bf16) == (2, 2, 2, True)
    with pytest.raises(ValueError, match=r"32 is not a multiple of .* 4 x 3 .* nearest is 36"):
        read_zero_settings(path, world_size=3, **run)
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(ValueError, match="cannot plan offload_optimizer"):
        read_zero_settings(path, world_size=4, **run)


# ---------------------------------------------------------------- architectures


def blank_step(name: str, vision: str = "tiny") -> TrainStep:
    with torch.device("meta"):
        model = build_network(
            vision=vision,
            image_size=256,
            mllm=name,
            lora=LORA,
            opener=weightless(mllm_config(name)),
        )
    model.set_trainable(TRAINABLE)
    return TrainStep(model, OBJECTIVE, HITL)


def test_the_7b_model_splits_as_published() -> None:
    counts = {
        part: n / 1e6 for part, (n, _) in count_parameters(blank_step("Qwen2.5-VL-7B")).items()
    }
    tower = counts["MLLM vision tower"] + counts["projector"]
    split = (tower, counts["embeddings"], counts["LLM layers"], counts["lm_head"])
    assert [round(n) for n in split] == [677, 545, 6526, 545]
    assert round(sum(split) / 1e3, 2) == 8.29


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-VL-3B", 3.75),
        ("LLaVA-1.5-7B", 7.06),
        ("LLaVA-Med", 7.57),
        ("HuatuoGPT-Vision-7B", 7.94),
    ],
)
def test_known_architectures_have_their_published_sizes(name: str, billions: float) -> None:
    step = blank_step(name)
    assert step.model.mllm is not None
    base = [p for n, p in step.model.mllm.named_parameters() if ".lora_" not in n]
    assert sum(p.numel() for p in base) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_folder_or_hub_id_is_known_by_how_its_name_begins() -> None:
    assert known_architecture("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen2.5-VL-7B"
    assert known_architecture("weights/HuatuoGPT-Vision-7B-Qwen2.5VL/") == (
        "HuatuoGPT-Vision-7B-Qwen2.5VL"
    )
    assert known_architecture("microsoft/llava-med-v1.5-mistral-7b") == "LLaVA-Med"
    assert known_architecture("gpt2") is None
    with pytest.raises(ValueError, match="no architecture known here") as error:
        mllm_config("someone/unheard-of")
    assert all(name in str(error.value) for name in KNOWN_MLLMS)


def test_a_blank_batch_has_the_layout_of_a_collated_one(tiny_mllm: Path) -> None:
    """Same sizes as the collator's for the same sequences."""
    step = tiny_step(tiny_mllm)
    collated = tiny_batch_of(tiny_mllm)
    lengths = collated.mllm_inputs["attention_mask"].sum(1)
    blank = blank_batch(step.model, BatchShape(2, 1, 2, 30, 5, 1))
    for name, value in collated.mllm_inputs.items():
        mine = blank.mllm_inputs[name]
        assert (mine.dtype, mine.ndim) == (value.dtype, value.ndim), name
        if name in ("pixel_values", "image_grid_thw"):
            assert mine.shape == value.shape, name
    image_tokens = (collated.mllm_inputs["mm_token_type_ids"] == 1).sum(1)
    assert set(image_tokens.tolist()) == set(blank.mllm_inputs["mm_token_type_ids"].sum(1).tolist())
    assert blank.mllm_inputs["attention_mask"].sum(1).tolist() == [34, 34, 39, 39]
    assert blank.answer_positions is not None and len(blank.answer_positions) == 10
    assert lengths.max() > 0 and blank.image_slots == [0, 1, 2, 3]


# ---------------------------------------------------------------- the program


def small_plan(**changes: Any) -> Plan:
    zero = settings_of(2, 4, "bf16")
    cost = dry_run_of_halves()
    engine = engine_bytes([nn.Parameter(torch.empty(8))], [[8]], zero)
    plan = Plan(
        parameters={"lm_head": (8, 8)},
        zero=zero,
        engine=engine,
        cost=cost,
        checkpointing=False,
        num_images=4,
        num_masks=2,
        num_sequences=4,
        num_tokens=100,
        num_answer_tokens=10,
        max_steps=50,
    )
    return plan._replace(**changes)


def dry_run_of_halves() -> Any:
    with torch.device("meta"):
        return dry_run(Halves(), torch.empty(4, 8), part_of)  # type: ignore[arg-type]


def test_the_rows_of_the_memory_table_add_up() -> None:
    plan = small_plan()
    assert sum(memory_rows(plan).values()) == plan.peak
    assert plan.peak == plan.engine.lasting + plan.cost.peak + DEVICE_ALLOWANCE
    later = plan._replace(engine=plan.engine._replace(step_workspace=GIB))
    assert later.peak == plan.engine.lasting + GIB + DEVICE_ALLOWANCE
    assert "workspace of the optimizer step" in memory_rows(later)


def test_operations_are_counted_over_ranks_and_accumulation() -> None:
    plan = small_plan()  # 4 ranks x 2 micro-batches
    assert flops_by_part(plan)["lm_head"]["forward"] == 8 * 2 * 4 * 8 * 16


def test_a_run_that_does_not_fit_is_told_what_to_change() -> None:
    plan = small_plan()
    assert verdict(plan, 80).startswith("fits: 2.0 of 80 GiB per GPU, 78.0 GiB to spare")
    full = small_plan(engine=plan.engine._replace(weights=100 * GIB, step_workspace=0))
    remedies = [
        Remedy("model.activation_checkpointing=true", 90 * GIB),
        Remedy('"stage": 3 in ds_config.json', 70 * GIB),
    ]
    assert verdict(full, 80, remedies).splitlines() == [
        "does not fit: 102.0 of 80 GiB per GPU",
        "  model.activation_checkpointing=true: 90.0 GiB",
        '  and "stage": 3 in ds_config.json: 70.0 GiB, fits',
    ]
    told = verdict(full, 80, remedies[:1])
    assert told.endswith("no key makes it fit: it takes GPUs of 90 GiB or a smaller model")
    assert fits(plan, 80) and not fits(full, 80)


def test_stage_2_is_planned_at_true_size_with_nothing_on_the_disk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "configs" / "stage2.yaml")
    began = time.process_time()
    text = planned_text(capsys, config, "--world-size", "4")
    seconds = time.process_time() - began
    for words in ("6,525,621,760", "ZeRO-2, 4 ranks, bf16", "fits: ", "3,440,000", "lm_head"):
        assert words in text, words
    assert seconds < 15, "of processor time, without the seconds that imports take"


@pytest.mark.slow
def test_the_program_plans_in_20_s_of_one_quiet_core_and_says_nothing_else() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = ["scripts/train.py", "--plan", "--config", "configs/stage2.yaml", "--world-size", "4"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(COLUMNS="100"),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{seconds:.1f} s of processor time")
    assert seconds < 20
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 100


def planned_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    options = train.parse(["--plan", "--config", *arguments])
    wanted = PlanOptions(**{name: getattr(options, name) for name in PlanOptions._fields})
    print_plan(load_planned(options.config, options.overrides), wanted)
    return capsys.readouterr().out


@pytest.fixture
def config(tmp_path: Path, tiny_mllm: Path) -> Path:
    """A small joint run: data and output left open, a base model of which only config.json is
    there."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((tiny_mllm / "config.json").read_bytes())
    tree = {
        "data": {"segmentation": "???", "language": [{"path": "nowhere/train"}]},
        "model": {
            "mllm": str(base),
            "vision": "tiny",
            "vision_weights": "nowhere/export",
            "image_size": 64,
            "query_heads": 4,
        },
        "optim": {"warmup_steps": 1},
        "train": {"max_steps": 10, "output_dir": "???", "global_batch": 8, "micro_batch": 4},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def test_paths_need_not_exist_and_config_json_is_enough(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned_text(capsys, str(config))
    assert "2 ranks" in text  # as many as the batch allows
    assert "LoRA" in text and "fits: " in text and "passes over" not in text


def test_records_that_are_there_give_the_passes_over_them(
    config: Path, tiny_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override = f"data.segmentation=[{{path: {tiny_records}}}]"
    text = planned_text(capsys, str(config), override)
    # 10 steps x 8 items, half of them images, of which there are 8.
    line = next(line for line in text.splitlines() if "passes over the segmentation" in line)
    assert "5.00" in line


def test_every_other_mistake_in_the_configuration_still_stops_the_plan(config: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.lrr.*did you mean"):
        load_planned(str(config), ["optim.lrr=1"])
    with pytest.raises(ValueError, match=r"data\.language.*expected|data\.language.*allowed"):
        load_planned(str(config), ["data.language=3"])
    with pytest.raises(ValueError, match=r"train\.micro_batch"):
        load_planned(str(config), ["train.micro_batch=3"])


def test_hours_fall_with_the_gpus_and_follow_the_stated_rate() -> None:
    plan = small_plan()  # 4 ranks x 2 micro-batches
    plan = plan._replace(cost=plan.cost._replace(flops={("lm_head", "forward"): 10**15}))
    table = hours_table(plan, 50)
    names, _, hours = (list(column.cells) for column in table.columns)
    assert names == ["1", "2", "4 (planned)", "8"]
    # 50 steps of 8 x 1e15 at 5e13 a second on one GPU
    assert [float(text) for text in hours] == pytest.approx([2.2, 1.1, 0.6, 0.3])
    assert "250 TFLOP per sample" in str(table.caption)  # 1e15 in a micro-batch of 4


def test_what_does_not_fit_is_told_the_keys_that_make_it_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Embeddings, trained beyond the recipe, are named first; then time for memory."""
    sizes = ("model.mllm=Qwen2.5-VL-3B", "model.vision=tiny", "train.trainable.embeddings=true")
    text = planned_text(
        capsys,
        str(ROOT / "configs" / "stage2.yaml"),
        *(*sizes, "model.activation_checkpointing=false"),
        *("--world-size", "4", "--gpu-memory", "12"),
    )
    first, *told = text.splitlines()[:3]
    assert re.fullmatch(r"does not fit: 1\d\.\d of 12 GiB per GPU", first)
    assert re.fullmatch(r"  train\.trainable\.embeddings=false: 1\d\.\d GiB", told[0])
    assert re.fullmatch(r"  and model\.activation_checkpointing=true: 1\d\.\d GiB, fits", told[1])


def test_the_vision_stage_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned_text(capsys, str(ROOT / "configs" / "stage1.yaml"), "--world-size", "1")
    assert "LoRA" not in text and "vision encoder" in text and "1 ranks" in text


def test_every_table_fits_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    for table in tables(small_plan(), tflops=100, epochs={"language": 1.5}):
        Console(width=100).print(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def main() -> None:
    from biascare.training.ranks import init_process_group

    torch.set_num_threads(1)
    init_process_group()
    asked, found = json.loads(sys.argv[1]), {}
    mllm = None if asked["mllm"] is None else Path(asked["mllm"])
    for stage, precision in asked["cases"]:
        found[f"{stage} {precision}"] = measure_engine(stage, precision, mllm)
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
