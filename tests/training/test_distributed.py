"""Worlds of real processes: the same training whatever the ZeRO stage and the number of ranks."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from biascare.models.export_folder import open_network
from biascare.training.engine import GradientGuard, fp32_buffers, resolve_deepspeed_config
from biascare.training.optimizer import OptimizerSettings, learning_rate_factor, parameter_groups
from tests.tiny import tiny_chat, tiny_model
from tests.training.training_runs import (
    Job,
    Run,
    World,
    equal,
    largest_difference,
    largest_weight_difference,
)
from tests.training.training_worker import probe_batch

pytestmark = pytest.mark.timeout(300)  # the first test waits for all runs

AGREEMENT = 1e-4
"""Largest difference between trajectories in fp32: the order of sums differs, nothing else."""

QUIET = ("data.eval_segmentation=[]", "data.eval_language=[]")
SHORT = (*QUIET, "train.max_steps=4", "train.save_every=0")
SKIP = (*SHORT, "train.nonfinite=skip")
RESUMED = (*QUIET, "train.max_steps=4", "train.save_every=2")
BRIEF = (*QUIET, "train.max_steps=2", "train.save_every=1")

ONE_RANK = [
    Job("zero0", 0),
    Job("zero2", 2),
    Job("whole", 2, RESUMED),
    Job("stopped", 2, RESUMED, {"interrupt": 2}),
    Job("resumed", 2, RESUMED, folder="stopped"),
    Job("again", 2, RESUMED, folder="whole"),
    Job("left_out", 2, SKIP, {"leave_out": 2}),
    *(
        Job(f"skip{z}", z, SKIP, {"poison": {"step": 2, "on_rank": 0, "what": w, "num_micro": 2}})
        for z, w in ((0, "gradient"), (2, "loss"), (3, "gradient"))
    ),
    Job("bf16", 2, (*SHORT, "train.precision=bf16")),
    Job("zero3", 3),
    Job("whole3", 3, BRIEF),
    Job("stopped3", 3, BRIEF, {"interrupt": 1}),
    Job("resumed3", 3, BRIEF, folder="stopped3"),
]
TWO_RANKS = [
    Job("zero2", 2),
    Job(
        "raise",
        2,
        SHORT,
        {"poison": {"step": 2, "on_rank": 1, "what": "gradient", "num_micro": 1}},
    ),
    Job("skip", 2, SKIP, {"poison": {"step": 2, "on_rank": 1, "what": "loss", "num_micro": 1}}),
    Job(
        "abort",
        2,
        (*SKIP, "train.max_skipped_steps=1"),
        {"poison": {"step": 2, "on_rank": 1, "what": "loss", "num_micro": 1, "steps": 2}},
    ),
    Job("zero3", 3, ("eval.at_start=true",)),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_mllm: Path, tiny_records: Path) -> World:
    return World(tmp_path_factory.mktemp("runs"), tiny_mllm, tiny_records)


@pytest.fixture(scope="module")
def runs(world: World) -> dict[str, Run]:
    """All runs of both worlds, side by side; names of two ranks end in "x2"."""
    with ThreadPoolExecutor(2) as pool:
        alone, pair = pool.map(world.run, (1, 2), (ONE_RANK, TWO_RANKS))
    return alone | {f"{name}x2": run for name, run in pair.items()}


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2x2", "zero3x2"])
def test_every_zero_stage_and_number_of_ranks_trains_the_same(
    runs: dict[str, Run], name: str
) -> None:
    difference = largest_difference(runs["zero0"], runs[name])
    assert difference < AGREEMENT, difference
    assert largest_weight_difference(runs["zero0"], runs[name]) < 1e-3


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2x2", "zero3x2"])
def test_every_zero_stage_and_number_of_ranks_evaluates_the_same(
    runs: dict[str, Run], name: str
) -> None:
    """Dice at native size is thresholded: a pixel at the boundary may fall on either side. Options
    are not scored under ZeRO-3, where all ranks must make the same calls."""
    mine, reference = (runs[n].records("eval")[-1] for n in (name, "zero0"))
    for entry in (mine, reference):
        for row in entry["answers"].values():
            row.pop("calibration")  # of log-probabilities, which differ in their last bits
    if name.startswith("zero3"):
        for row in reference["answers"].values():
            row.pop("num_scored", None)
            row.pop("accuracy_by_option", None)
            row.get("readings", {}).pop("option", None)
    assert mine["answers"] == reference["answers"]
    scores = [entry["segmentation"]["dice"]["mean"] for entry in (mine, reference)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_training_moves_the_loss(runs: dict[str, Run]) -> None:
    terms = runs["zero0"].trajectory()
    assert {"total", "dur", "hitl", "vlm", "quality", "alignment"} < terms.keys()
    assert all(value > 0 for value in terms["grad_norm"])
    assert len(set(terms["vlm"])) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_batches_of_one_kind_train_on_partitioned_parameters(world: World) -> None:
    """Parts without any gradient in a step, on every rank: no rank may wait for another."""
    kinds = {
        "vision": ("train.stage=vision", "data.ratio=[1,0]", "data.language=[]"),
        "language": ("data.ratio=[0,1]", "data.segmentation=[]"),
        "masks": ("data.ratio=[1,0]", "data.language=[]"),
    }
    jobs = [
        Job(f"{kind}{zero}", zero, (*SHORT, *changes, "train.precision=fp32"))
        for kind, changes in kinds.items()
        for zero in (2, 3)
    ]
    found = world.run(2, jobs, timeout=800)
    for kind in kinds:
        assert largest_difference(found[f"{kind}2"], found[f"{kind}3"]) < AGREEMENT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bf16_skips_at_every_stage_as_if_the_step_had_not_been_taken(world: World) -> None:
    low = (*SKIP, "train.precision=bf16")
    poison = {"step": 2, "on_rank": 0, "what": "gradient", "num_micro": 2}
    jobs = []
    # Stage by stage: ZeRO-3 replaces torch's linear layer for the rest of the process.
    for zero in (0, 1, 2, 3):
        jobs.append(Job(f"low_skip{zero}", zero, low, {"poison": poison}))
        jobs.append(Job(f"low_left_out{zero}", zero, low, {"leave_out": 2}))
    found = world.run(1, jobs, timeout=800)
    for zero in (0, 1, 2, 3):
        skipped, reference = found[f"low_skip{zero}"], found[f"low_left_out{zero}"]
        assert equal(skipped.weights(), reference.weights()), zero


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_steps_agree_over_all_stages_and_worlds(world: World) -> None:
    twenty = (*QUIET, "train.max_steps=20", "train.save_every=0", "train.global_batch=8")
    jobs = [Job(f"twenty{zero}", zero, twenty) for zero in (0, 1, 2, 3)]
    # A single unit of the quality head that gets hardly any gradient moves by Adam's full step to
    # wherever rounding sends it: its loss drifts apart by some 1e-4, which no other term sees.
    drifting = ("quality", "grad_norm")
    alone, pair = (world.run(ranks, jobs, timeout=800) for ranks in (1, 2))
    differences = {
        (ranks, name): largest_difference(alone["twenty0"], run, leaving_out=drifting)
        for ranks, found in ((1, alone), (2, pair))
        for name, run in found.items()
    }
    assert max(differences.values()) < AGREEMENT, differences


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(("resumed", "whole"), [("resumed", "whole"), ("resumed3", "whole3")])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    runs: dict[str, Run], resumed: str, whole: str
) -> None:
    assert equal(runs[resumed].weights(), runs[whole].weights())
    assert runs[resumed].trajectory() == runs[whole].trajectory()
    steps, expected = (
        [entry["step"] for entry in runs[name].records("train")] for name in (resumed, whole)
    )
    assert steps == expected == [*range(1, len(steps) + 1)]


def test_a_run_that_is_already_finished_exports_again_and_trains_nothing(
    runs: dict[str, Run],
) -> None:
    assert runs["again"].errors == [None]
    assert [entry["step"] for entry in runs["again"].records("train")] == [1, 2, 3, 4]
    assert equal(runs["again"].weights(), runs["resumed"].weights())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_resume_at_half_bit_for_bit(world: World, zero: int) -> None:
    twenty = (*QUIET, "train.max_steps=20", "train.save_every=10")
    jobs = [
        Job(f"half{zero}", zero, twenty),
        Job(f"half_stopped{zero}", zero, twenty, {"interrupt": 10}),
        Job(f"half_resumed{zero}", zero, twenty, folder=f"half_stopped{zero}"),
    ]
    found = world.run(2, jobs, timeout=800)
    whole, resumed = found[f"half{zero}"], found[f"half_resumed{zero}"]
    assert resumed.trajectory() == whole.trajectory()
    assert equal(resumed.weights(), whole.weights())


# ---------------------------------------------------------------- non-finite numbers


@pytest.mark.parametrize("name", ["skip0", "skip2", "skip3"])
def test_a_skipped_step_is_as_if_it_had_not_been_taken(runs: dict[str, Run], name: str) -> None:
    assert runs[name].errors == [None]
    assert runs[name].outcomes()[0]["unchanged"]
    mine, reference = runs[name].trajectory(), runs["left_out"].trajectory()
    for term in ("total", "dur", "vlm", "hitl"):
        assert mine[term] == pytest.approx(reference[term], abs=AGREEMENT), term
    assert largest_weight_difference(runs[name], runs["left_out"]) < 1e-3
    train = runs[name].records("train")
    assert [entry["skipped_steps"] for entry in train] == [0, 1, 0, 0]
    reference_rates = [entry["lr"] for entry in runs["left_out"].records("train")]
    assert [entry["lr"] for entry in train] == reference_rates


def test_at_one_stage_a_skipped_step_leaves_the_very_same_weights(runs: dict[str, Run]) -> None:
    assert equal(runs["skip2"].weights(), runs["left_out"].weights())


def test_a_bad_gradient_on_one_rank_changes_no_weight_on_any(runs: dict[str, Run]) -> None:
    outcomes = runs["raisex2"].outcomes()
    assert [outcome["unchanged"] for outcome in outcomes] == [True, True]
    for outcome in outcomes:
        assert outcome["error"].startswith("NonFiniteError: ")
        assert "tiny/train/" in outcome["error"] and "train.nonfinite=skip" in outcome["error"]


def test_a_bad_loss_on_one_rank_is_skipped_by_all(runs: dict[str, Run]) -> None:
    assert runs["skipx2"].errors == [None, None]
    difference = largest_weight_difference(runs["skipx2"], runs["left_out"])
    assert difference < 1e-3, difference


def test_too_many_skipped_steps_end_the_run_on_every_rank(runs: dict[str, Run]) -> None:
    for error in runs["abortx2"].errors:
        assert error is not None and "train.max_skipped_steps 1" in error


def test_the_guard_sees_what_cannot_be_clipped() -> None:
    layer = nn.Linear(2, 1, bias=False)
    guard = GradientGuard(layer)
    for scale, bad in ((1.0, 0.0), (1e30, 1.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        (layer(torch.ones(1, 2)) * scale).sum().backward()
        assert guard.take().item() == bad, scale
    assert guard.take().item() == 0


# ---------------------------------------------------------------- precision


def test_bf16_training_keeps_positions_in_fp32(runs: dict[str, Run], tiny_mllm: Path) -> None:
    assert runs["bf16"].errors == [None]
    buffers = torch.load(runs["bf16"].folder / "probe.pt", weights_only=True)["buffers"]
    reference = dict(tiny_model(tiny_mllm).named_buffers())
    positions = [name for name in buffers if "inv_freq" in name or "gaussian" in name]
    assert any("inv_freq" in name for name in positions)
    assert any("positional_encoding_gaussian_matrix" in name for name in positions)
    for name in (name for name in positions if "inv_freq" in name):
        assert torch.equal(buffers[name], reference[name]), name
    assert all(buffers[name].dtype == torch.float32 for name in positions)
    matrix = next(value for name, value in buffers.items() if "gaussian" in name)
    assert not torch.equal(matrix, matrix.bfloat16().float())  # drawn in fp32 and never rounded
    dtypes = {value.dtype for value in runs["bf16"].weights().values()}
    assert torch.bfloat16 in dtypes


def test_fp32_buffers_survive_a_cast_of_the_module() -> None:
    module = nn.BatchNorm1d(2)
    module.running_mean = torch.tensor([1 / 3, 1 / 7])
    with fp32_buffers(module):
        module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.running_mean, torch.tensor([1 / 3, 1 / 7]))


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2x2", "zero3x2"])
def test_the_export_predicts_what_the_trained_model_predicted(
    runs: dict[str, Run], name: str, tiny_mllm: Path
) -> None:
    folder = runs[name].folder
    probe = torch.load(folder / "probe.pt", weights_only=True)
    model = open_network(folder / "export")[0]
    with torch.no_grad():
        features, prediction = model(probe_batch(tiny_chat(tiny_mllm)))
    for got, expected in (
        (features.hidden_states, probe["hidden_states"]),
        (prediction.mask_logits, probe["mask_logits"]),
    ):
        assert (got - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_the_exported_adapter_opens_with_plain_peft(runs: dict[str, Run], tiny_mllm: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    adapter = runs["zero3"].folder / "export" / "adapter"
    base = AutoModelForImageTextToText.from_pretrained(tiny_mllm)
    named = dict(PeftModel.from_pretrained(base, str(adapter)).named_parameters())
    matrices = [p for name, p in named.items() if "lora_B" in name]
    assert matrices and all(p.any() for p in matrices)  # they start at zero: these were trained


def test_the_frozen_base_model_is_not_copied(runs: dict[str, Run]) -> None:
    names = runs["zero3"].weights()
    assert not [name for name in names if "embed_tokens" in name or "base_layer" in name]


# ---------------------------------------------------------------- learning rates

SETTINGS = OptimizerSettings(
    lr=1e-5,
    mllm_lr=5e-6,
    betas=(0.9, 0.98),
    weight_decay=0.01,
    grad_clip=1.0,
    warmup_steps=4,
    final_lr_ratio=0.05,
    max_steps=14,
)


def test_warm_up_and_decay_are_linear() -> None:
    factors = [learning_rate_factor(step, SETTINGS) for step in range(16)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(1 - 0.95 * 0.5)
    assert factors[13] == pytest.approx(1 - 0.95 * 0.9)
    assert factors[14:] == [pytest.approx(0.05)] * 2


@settings(max_examples=30, deadline=None)
@given(
    warmup=st.integers(0, 50),
    more=st.integers(0, 50),
    ratio=st.floats(0, 1),
    step=st.integers(0, 99),
)
def test_the_rate_never_leaves_its_bounds(warmup: int, more: int, ratio: float, step: int) -> None:
    chosen = SETTINGS._replace(warmup_steps=warmup, max_steps=warmup + more, final_lr_ratio=ratio)
    factor, following = (learning_rate_factor(s, chosen) for s in (step, step + 1))
    assert 0 <= factor <= 1
    assert following >= factor - 1e-12 if step + 1 < warmup else following <= factor + 1e-12


def test_the_ratio_between_pathways_holds_in_every_step(runs: dict[str, Run]) -> None:
    for name in ("zero0", "zero2", "zero3x2"):
        rates = [entry["lr"] for entry in runs[name].records("train")]
        assert [rate["vision"] / rate["mllm"] for rate in rates] == [pytest.approx(2)] * 6
        vision = [1e-3 * factor for factor in (0.5, 1.0, 1.0, 0.7625, 0.525, 0.2875)]
        assert [rate["vision"] for rate in rates] == pytest.approx(vision)


def test_norms_and_biases_do_not_decay_and_empty_groups_do_not_exist() -> None:
    layer, norm = nn.Linear(2, 2), nn.LayerNorm(2)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    parts = {"vision": [*layer.parameters(), *norm.parameters()], "mllm": [*frozen.parameters()]}
    groups = parameter_groups(parts, SETTINGS)
    assert [group["name"] for group in groups] == ["vision", "vision_no_decay"]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert groups[0]["params"] == [layer.weight]
    assert [id(p) for p in groups[1]["params"]] == [
        id(p) for p in (layer.bias, norm.weight, norm.bias)
    ]


def test_each_pathway_has_its_own_rate() -> None:
    vision, lora = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    parts = {"vision": [*vision.parameters()], "mllm": [*lora.parameters()]}
    groups = parameter_groups(parts, SETTINGS)
    assert {group["name"]: group["lr"] for group in groups} == {"vision": 1e-5, "mllm": 5e-6}


def test_training_nothing_is_an_error() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"train\.trainable"):
        parameter_groups({"vision": [*frozen.parameters()]}, SETTINGS)


# ---------------------------------------------------------------- the DeepSpeed file


def resolve(tmp_path: Path, tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    values: dict[str, Any] = {
        "global_batch": 8,
        "micro_batch": 2,
        "grad_clip": 1.0,
        "precision": "bf16",
    }
    return resolve_deepspeed_config(path, **(values | changes))


def test_every_auto_is_resolved(tmp_path: Path) -> None:
    shipped = json.loads((Path(__file__).resolve().parents[2] / "ds_config.json").read_text())
    found = resolve(tmp_path, shipped)
    assert "auto" not in json.dumps(found)
    assert found["gradient_accumulation_steps"] == 4
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train_batch_size": 16}, '"train_batch_size" is 16'),
        ({"bf16": {"enabled": False}}, '"bf16.enabled" is False'),
        ({"fp16": {"enabled": True}}, r"train\.precision"),
        ({"optimizer": {"type": "AdamW"}}, 'remove "optimizer"'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"zero_optimization\.reduce_buck"),
    ],
)
def test_a_number_in_two_places_is_refused(
    tmp_path: Path, tree: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path, tree)


def test_a_batch_that_does_not_divide_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the nearest is 9"):
        resolve(tmp_path, {}, global_batch=10, micro_batch=3)
