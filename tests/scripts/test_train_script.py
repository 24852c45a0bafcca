"""`scripts/train.py` as a user meets it: messages, exit codes, the launcher, the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from biascare.config import describe_config, load_config
from biascare.data.prevalence import load_prevalence, prevalence_groups, save_prevalence
from biascare.interfaces import Batch
from biascare.records import Records
from biascare.runs.build import deepspeed_settings, prevalence
from biascare.runs.origin import save_prevalence_file
from biascare.training import hooks, progress
from biascare.training.hooks import BadDataError, LedgerHook, LogHook, StepState
from biascare.training.progress import GroupMeter, RunLog, progress_line
from biascare.training.terms import RowOutcome
from scripts import train
from tests.tiny import tiny_facts
from tests.training.training_runs import ROOT, Job, Run, World, environment, free_port

pytestmark = pytest.mark.timeout(240)

SCRIPT = [sys.executable, "scripts/train.py"]
SMALL = (
    "train.global_batch=4",
    "train.max_steps=3",
    "eval.max_images=2",
    "eval.max_questions=2",
    "eval.at_start=true",
)


def start(*arguments: str, launcher: bool = False, timeout: float = 200) -> Any:
    """Run the program, alone or on two ranks through DeepSpeed's launcher; the finished process."""
    program = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    program += ["--master_port", str(free_port()), "scripts/train.py"]
    return subprocess.run(
        [*(program if launcher else SCRIPT), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_mllm: Path, tiny_records: Path) -> World:
    return World(tmp_path_factory.mktemp("script"), tiny_mllm, tiny_records)


@pytest.fixture(scope="module")
def alone(world: World) -> Any:
    """A normal run on one process: (finished process, run)."""
    job = Job("alone")
    done = start("--config", str(world.config(job, 1)), *SMALL, "train.tensorboard=true")
    return done, Run(world.folder / "world1" / "alone")


# ---------------------------------------------------------------- before anything is loaded


def test_a_wrong_configuration_fails_fast_and_without_torch(world: World) -> None:
    path = world.config(Job("wrong"), 1)
    spying = (
        "import atexit, runpy, sys; sys.argv[:] = sys.argv[1:]; "
        "atexit.register(lambda: print('torch' in sys.modules)); "
        "runpy.run_path('scripts/train.py', run_name='__main__')"
    )
    wrong = ["--config", str(path), "optim.lrr=1e-3", "train.micro_batch=3"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", spying, "scripts/train.py", *wrong],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    assert done.returncode == 1
    assert "optim.lrr" in done.stderr and "did you mean" in done.stderr
    assert "train.micro_batch" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.strip() == "False", "torch was imported to check a configuration"
    assert seconds < 2 or _busy(), seconds


def _busy() -> bool:
    """Whether other processes hold the machine; wall-clock bounds mean nothing then."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


@pytest.mark.parametrize("copied", [False, True], ids=["same folder", "copy"])
def test_evaluating_on_training_records_is_refused_before_a_model_is_built(
    world: World, tmp_path: Path, copied: bool
) -> None:
    place = tmp_path / "copy" if copied else world.records
    if copied:
        shutil.copytree(world.records, place)
    config = world.config(Job("overlap"), 1)
    done = start("--config", str(config), f"data.eval_segmentation=[{{path: {place}}}]")
    assert done.returncode == 1
    assert f"{place} is held out, but is trained on too (as {world.records})" in done.stderr
    assert "parameters" not in done.stdout


def test_help_lists_every_key_with_its_default() -> None:
    done = start("--help")
    assert done.returncode == 0
    for key in describe_config():
        line = f"  {key.key} ({key.type}, default {key.default}): {key.help}"
        assert line in done.stdout, key.key


def test_the_launchers_own_argument_is_swallowed() -> None:
    arguments = ["--local_rank=0", "--config", "a.yaml", "train.seed=1", "optim.lr=1"]
    options = train.parse(arguments)
    assert (options.config, options.overrides) == ("a.yaml", ["train.seed=1", "optim.lr=1"])


# ---------------------------------------------------------------- a normal run


def test_a_run_ends_well_and_leaves_its_files(alone: Any) -> None:
    done, run = alone
    assert done.returncode == 0, done.stderr[-2000:]
    written = ("config.yaml", "run.json", "prevalence.json", "metrics.jsonl", "tensorboard")
    for name in (*written, "export/config.json"):
        assert (run.folder / name).exists(), name
    assert sorted(p.name for p in (run.folder / "cases").iterdir()) == [
        "step_00000000.jsonl",
        "step_00000003.jsonl",
    ]
    assert load_config(run.folder / "config.yaml").train.max_steps == 3


def test_a_prevalence_file_decides_the_groups_of_a_run(
    alone: Any, world: World, tmp_path: Path
) -> None:
    _, run = alone
    path, counts = world.config(Job("alone"), 1), Records(world.records).target_counts
    sources = [Records(world.records)]
    own = prevalence(load_config(path), sources)
    given = load_config(path, [f"eval.prevalence={run.folder / 'prevalence.json'}"])
    assert prevalence(given, sources) == own == prevalence_groups(counts, 0.5, 0.1)

    everything_head = save_prevalence(tmp_path / "all.json", counts, 1.0, 0.0)
    config = load_config(path, [f"eval.prevalence={tmp_path / 'all.json'}"])
    assert prevalence(config, sources) == everything_head != own
    save_prevalence_file(config, tmp_path / "copy.json", sources)
    assert load_prevalence(tmp_path / "copy.json") == everything_head


def test_the_terminal_shows_the_run_and_not_its_libraries(alone: Any) -> None:
    done, _ = alone
    assert done.stderr == ""
    for noise in (
        "real_accelerator",
        "Loading weights",
        "Warning",
        "uint8",
        "[INFO]",
        "deprecated",
    ):
        assert noise not in done.stdout, noise
    assert len(re.findall(r"^step \d/3 \| total", done.stdout, re.MULTILINE)) == 3
    assert "Parameters" in done.stdout and "Held-out records at step 3" in done.stdout


def test_every_step_is_logged_with_its_terms_groups_and_rates(alone: Any) -> None:
    entries = alone[1].records("train")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert {"total", "dur", "hitl", "vlm"} <= entry["loss"].keys()
        assert set(entry["by"]) == {"modality", "prevalence"}
        assert sum(cell["num"] for cell in entry["by"]["prevalence"].values()) == 4
        assert entry["lr"].keys() == {"vision", "mllm"}
        assert entry["samples_per_second"] > 0 and entry["peak_memory_gib"] > 0


# ---------------------------------------------------------------- mistakes that only a run can see


def test_a_batch_that_does_not_fit_the_ranks_is_a_message_on_every_rank(world: World) -> None:
    path = world.config(Job("indivisible"), 2)
    done = start("--config", str(path), "train.global_batch=6", launcher=True)
    assert done.returncode != 0
    assert "train.global_batch 6 is not a multiple of train.micro_batch 2 x 2 ranks" in done.stderr
    assert "Traceback" not in done.stderr and "Parameters" not in done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for what a failure leaves."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not name.startswith("traceback")}


def test_continuing_with_other_settings_is_refused_in_plain_words_and_changes_nothing(
    alone: Any, world: World
) -> None:
    path = world.config(Job("alone"), 1)
    before = contents(alone[1].folder)
    done = start("--config", str(path), *SMALL, "train.seed=3", "optim.lr=0.5")
    assert done.returncode == 1
    after = contents(alone[1].folder)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    assert "train.seed 0 there, 3 here" in done.stderr
    assert "optim.lr 0.001 there, 0.5 here" in done.stderr
    assert "train.output_dir" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in (alone[1].folder / "traceback.rank0.txt").read_text()

    again = start("--config", str(path), *SMALL)
    assert again.returncode == 0 and "continuing after step 3" in again.stdout
    assert not (alone[1].folder / "traceback.rank0.txt").exists(), "of a failure that is over"
    assert contents(alone[1].folder)["run.json"] == before["run.json"]


def test_gradients_that_cannot_be_discarded_are_refused(world: World) -> None:
    path = world.config(Job("offload"), 1)
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (path.parent / "ds_config.json").write_text(json.dumps({"zero_optimization": zero}))
    config = load_config(path, ["train.nonfinite=skip"])
    with pytest.raises(ValueError, match=r"train\.nonfinite=skip .* offload_optimizer"):
        deepspeed_settings(config)


# ---------------------------------------------------------------- several ranks


def test_two_ranks_train_through_the_launcher(world: World) -> None:
    path = world.config(Job("launched", 2), 2)
    done = start("--config", str(path), *SMALL, "eval.at_start=false", launcher=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run(world.folder / "world2" / "launched")
    assert [entry["step"] for entry in run.records("train")] == [1, 2, 3]
    assert len(re.findall(r"^step \d/3 ", done.stdout, re.MULTILINE)) == 3, "one rank speaks"
    for noise in ("real_accelerator.py", "Loading weights", "FutureWarning"):
        assert noise not in done.stderr + done.stdout.split("spawned with command")[-1], noise


def test_a_rank_that_dies_ends_the_others(world: World) -> None:
    began = time.perf_counter()
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)) as caught:
        world.run(2, [Job("dies", 2, ("train.max_steps=2",), {"die": 1})], timeout=150)
    assert caught.type is AssertionError, "a rank waited for a dead one"
    assert "this rank died" in str(caught.value)
    left = Run(world.folder / "world2" / "dies", "dies").errors[0]
    assert left is not None and left.startswith("MachineError: another rank has ended")
    assert time.perf_counter() - began < 150


def test_ctrl_c_ends_every_rank_and_says_in_one_line_how_to_go_on(world: World) -> None:
    """With a reading process on each rank, which Ctrl-C reaches too."""
    path = world.config(Job("interrupted", 2), 2)
    more = ("train.max_steps=9999", "train.save_every=2", "data.num_workers=1", *SMALL[0:1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    ranks = [
        subprocess.Popen(
            [*SCRIPT, "--config", str(path), *more],
            cwd=ROOT,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    assert ranks[0].stdout is not None
    shown = iter(ranks[0].stdout.readline, "")
    assert any(line.startswith("step 3/") for line in shown)
    for process in ranks:
        os.killpg(process.pid, signal.SIGINT)
    said = [process.communicate(timeout=100) for process in ranks]
    assert [process.returncode for process in ranks] == [130, 130], said
    assert said[1] == ("", "")
    (line,) = said[0][1].splitlines()
    folder = world.folder / "world2" / "interrupted"
    newest = sorted((folder / "checkpoints").glob("step_????????"))[-1]
    assert line == f"interrupted; the same command continues from {newest}"
    assert all(text.startswith("step ") for text in said[0][0].splitlines())
    assert not list(folder.glob("traceback*"))


# ---------------------------------------------------------------- hooks


def state(step: int, batches: list[Batch], **changes: Any) -> StepState:
    values: dict[str, Any] = {
        "step": step,
        "micro_batches": batches,
        "outcomes": [{"loss": torch.tensor(1.0), "terms": {}, "rows": None} for _ in batches],
        "seconds": 1.0,
        "data_seconds": 0.25,
        "learning_rates": {"vision": 1e-3},
        "skipped": False,
    }
    return StepState(**(values | changes))


def batch_of(*replaced: list[str]) -> Batch:
    bad = {i: tuple(reasons) for i, reasons in enumerate(replaced) if reasons}
    tensors: list[Any] = [None] * 6
    return Batch(*tensors, {}, [], None, None, None, 0, [], bad, len(replaced))


def test_replaced_samples_are_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = LedgerHook(tmp_path, 0.002, 0, 2)
    hook(state(1, [batch_of([], ["cannot decode"])]))
    line = json.loads((tmp_path / "replaced_samples.rank0.jsonl").read_text())
    assert line == {"step": 1, "position": 1, "reasons": ["cannot decode"]}
    assert "WARNING 1 unreadable" in capsys.readouterr().out


def test_too_many_replaced_samples_end_the_run(tmp_path: Path) -> None:
    hook = LedgerHook(tmp_path, 0.002, 0, 2)  # 2 of the first 1000
    for step in (1, 2):
        hook(state(step, [batch_of([], ["bad"])]))
    with pytest.raises(BadDataError, match=r"3 of 6 samples .* data\.max_bad_samples 0\.20%"):
        hook(state(3, [batch_of([], ["bad"])]))


def test_a_ledger_goes_on_where_its_run_goes_on(tmp_path: Path) -> None:
    """Steps after the checkpoint come again: neither twice in the file nor twice in the share."""
    hook = LedgerHook(tmp_path, 0.002, 0, 2)
    for step in (1, 2):
        hook(state(step, [batch_of([], [f"bad {step}"])]))
    with (tmp_path / "replaced_samples.rank0.jsonl").open("a") as file:
        file.write('{"step": 3, "posi')  # cut by a crash

    again = LedgerHook(tmp_path, 0.002, 1, 2)
    assert (again.seen, again.replaced) == (2, 1)
    again(state(2, [batch_of([], ["bad 2"])]))
    lines = (tmp_path / "replaced_samples.rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["reasons"] for line in lines] == [["bad 1"], ["bad 2"]]
    with pytest.raises(BadDataError, match=r"3 of 6 samples"):
        LedgerHook(tmp_path, 0.002, 2, 2)(state(3, [batch_of([], ["bad 3"])]))


def test_no_bad_sample_is_tolerated_where_none_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(BadDataError):
        LedgerHook(tmp_path, 0.0, 0, 1)(state(1, [batch_of(["bad"])]))


def outcome(*dice: float, valid: tuple[bool, ...]) -> RowOutcome:
    values = torch.tensor(dice)
    return RowOutcome(values, values / 2, values * 2, values, torch.tensor(valid))


def test_the_meter_keeps_groups_apart_and_leaves_out_empty_masks() -> None:
    meter = GroupMeter()
    facts = [
        tiny_facts("image", modality=modality, prevalence=prevalence)
        for modality, prevalence in (("CT", "head"), ("MR", "head"), ("CT", "tail"))
    ]
    meter.add(outcome(0.2, 0.4, 0.9, valid=(True, True, False)), facts)
    meter.add(outcome(0.6, valid=(True,)), facts[:1])
    found = meter.take()
    assert found["modality"]["CT"] == pytest.approx(
        {"num": 2, "dice_loss": 0.4, "semantic": 0.2, "weight": 0.8}
    )
    assert found["prevalence"].keys() == {"head"}
    assert found["prevalence"]["head"]["num"] == 3
    assert meter.take() == {"modality": {}, "prevalence": {}}


def test_the_meter_merges_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over rows, not means of means."""
    other = {("modality", "CT"): [3.0, 3.0, 0.0, 0.0], ("prevalence", "tail"): [3.0, 3.0, 0.0, 0.0]}
    monkeypatch.setattr(progress, "gather_objects", lambda mine: [mine, other])
    meter = GroupMeter()
    meter.add(outcome(0.2, valid=(True,)), [tiny_facts("image", prevalence="head")])
    found = meter.take()
    assert found["modality"]["CT"]["num"] == 4
    assert found["modality"]["CT"]["dice_loss"] == pytest.approx(3.2 / 4)
    assert set(found["prevalence"]) == {"head", "tail"}


class SilentEngine:
    def get_global_grad_norm(self) -> float:
        return 2.0


def test_terms_are_means_over_all_micro_batches_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A term that a micro-batch lacks counts as 0, as in the objective; a skipped step does not."""
    monkeypatch.setattr(hooks, "gather_objects", lambda mine: [mine, (2, {"total": 2.0})])
    hook = LogHook(RunLog(tmp_path), SilentEngine(), every=2, max_steps=9, summed=True)
    given = [
        {"loss": torch.tensor(3.0), "terms": {"vlm": torch.tensor(2.0)}, "rows": None},
        {"loss": torch.tensor(1.0), "terms": {}, "rows": None},
    ]
    hook(state(1, [batch_of([])] * 2, outcomes=given))
    nan = [{"loss": torch.tensor(float("nan")), "terms": {}, "rows": None}]
    hook(state(2, [batch_of([])], outcomes=nan, skipped=True))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0]["loss"] == {"total": 1.5, "vlm": 0.5}
    assert entries[1]["skipped_steps"] == 1 and entries[1]["loss"] == {"total": 1.0}
    assert entries[0]["data_wait"] == 0.25 and entries[0]["eta_seconds"] == 8.0


def test_a_progress_line_says_where_the_run_is_and_what_it_waits_for() -> None:
    values = {
        "loss": {"total": 2.5, "dur": 1.25},
        "rows_per_micro_batch": 3.0,
        "by": {
            "modality": {"CT": {"num": 2, "dice_loss": 0.5}, "MR": {"num": 4, "dice_loss": 0.35}}
        },
        "grad_norm": 0.5,
        "lr": {"vision": 1e-5, "mllm": 5e-6},
        "skipped_steps": 1,
        "samples_per_second": 12.34,
        "tokens_per_second": 1234.5,
        "data_wait": 0.25,
        "pad_share": 0.1,
        "peak_memory_gib": 3.21,
        "eta_seconds": 26 * 3600.0,
    }
    assert progress_line(7, 100, values, summed=True) == (
        "step 7/100 | total 2.500 dur 1.250 (sums over 3.0 rows, Dice loss 0.400 a row) | "
        "grad 0.50 | lr vision 1.0e-05 mllm 5.0e-06 | "
        "12.3 samples/s 1234 tok/s | data-wait 25% pad 10% | 3.2 GiB | ETA 1 day, 2:00:00 | "
        "1 skipped"
    )
    nothing = values | {"by": {"modality": {}}}
    assert progress_line(7, 100, values, summed=False).count("(Dice loss 0.400 a row)") == 1
    assert " dur 1.250 | grad" in progress_line(7, 100, nothing, summed=True)


def test_a_resumed_log_drops_what_is_repeated_and_what_a_crash_cut(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for event, step in (("train", 1), ("eval", 2), ("train", 2), ("train", 3)):
        log.record(event, step, {})
    with log.path.open("a") as file:
        file.write('{"event": "tra')

    def events() -> list[tuple[str, int]]:
        entries = map(json.loads, log.path.read_text().splitlines())
        return [(entry["event"], entry["step"]) for entry in entries]

    log.open(2, tensorboard=False)
    assert events() == [("train", 1), ("eval", 2), ("train", 2)]
    log.open(2, tensorboard=False, evaluates_again=True)
    assert events() == [("train", 1), ("train", 2)]
    log.open(0, tensorboard=False)
    assert not log.path.exists() and len(list(tmp_path.glob("metrics.before-*.jsonl"))) == 1
