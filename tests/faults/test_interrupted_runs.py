"""Runs that are ended, damaged and taken up again: nothing is lost, doubled or believed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from biascare.data import loader
from biascare.data.loader import training_loader
from biascare.runs.faults import MachineError, explained
from biascare.training.checkpoint import verify
from tests.tiny import QUESTIONS, tiny_record, write_records
from tests.training.training_runs import ROOT, Job, Run, World, environment

pytestmark = pytest.mark.timeout(500)

QUIET = ("data.eval_segmentation=[]", "data.eval_language=[]")
SIX = (*QUIET, "train.save_every=2", "train.max_steps=6", "train.keep_checkpoints=3")
LOGGED = (*SIX, "train.tensorboard=true")
HELD = (
    "eval.max_images=0",
    "train.save_every=2",
    "train.eval_every=2",
    "train.max_steps=4",
    "data.num_workers=1",
)
READING = (*SIX, "data.num_workers=1")


def spoil(folder: Path, found: bytes, spoiled: bytes) -> None:
    """Change bytes of a record folder where they stand first."""
    for path in sorted(folder.glob("*.arrow")):
        content = path.read_bytes()
        if found in content:
            path.write_bytes(content.replace(found, spoiled, 1))
            return
    raise AssertionError(f"{found!r} is in no file of {folder}")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_records: Path) -> dict[str, Path]:
    """Record folders with one damage each."""
    root = tmp_path_factory.mktemp("places")
    found = {name: root / name for name in ("question", "letter", "image")}
    question = QUESTIONS[0][0].text.encode()
    for name, first in (("question", b"\xff"), ("letter", b"J")):
        shutil.copytree(tiny_records, found[name])
        spoil(found[name], question, first + question[1:])
    held_out = [tiny_record(index, "test") for index in range(6)]
    held_out[3] = replace(held_out[3], image=held_out[3].image[:-60])  # as a cut download is
    write_records(found["image"], held_out)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_mllm: Path, tiny_records: Path) -> World:
    return World(tmp_path_factory.mktemp("runs"), tiny_mllm, tiny_records)


@pytest.fixture(scope="module")
def runs(world: World, places: dict[str, Path]) -> dict[str, Run]:
    """Runs of one process, each in a folder of its own or in that of an earlier one."""

    def read(task: str, name: str) -> tuple[str, ...]:
        return (f"data.{task}=[{{path: {places[name]}}}]", "data.max_bad_samples=1")

    early = world.folder / "world1" / "branched" / "checkpoints" / "step_00000002"
    jobs = [
        # Killed before its first checkpoint, and again after it.
        Job("logged", 2, (*LOGGED, "train.save_every=4"), {"interrupt": 3}),
        Job("logged again", 2, (*LOGGED, "train.save_every=4"), {"interrupt": 5}, "logged"),
        Job("logged at last", 2, LOGGED, folder="logged"),
        Job("whole", 2, SIX),
        Job("shorter", 2, (*SIX, "train.max_steps=4"), folder="whole"),
        Job("longer", 2, (*SIX, "train.max_steps=8"), {"interrupt": 7}, "whole"),
        Job("branched", 2, SIX),
        Job(
            "branch",
            2,
            (*SIX, f"train.resume={early}", "train.save_every=1", "train.keep_checkpoints=2"),
            {"interrupt": 4},
            "branched",
        ),
        Job("branch again", 2, (*SIX, "train.max_steps=5"), folder="branched"),
        Job("bad question", 2, (*SIX, *read("language", "question"))),
        Job("bad letter", 2, (*SIX, *read("language", "letter"), "train.max_steps=2")),
        Job("verified", 2, (*SIX, *read("language", "letter"), "data.verify=true")),
        Job("bad evaluation", 2, (*HELD, *read("eval_segmentation", "image"))),
        Job("mended evaluation", 2, HELD, folder="bad evaluation"),
        Job("dead reader", 2, READING, {"accident": {"name": "dead_reader", "step": 2}}),
        Job("no files", 2, READING, {"accident": {"name": "no_more_files", "step": 2}}),
    ]
    (world.folder / "world1" / "branched" / "checkpoints").mkdir(parents=True)
    for stray in ("step_00000009.bak", "step_99999999_old"):  # a person's own
        (early.parent / stray).mkdir()
    (early.parent / "step_00000099").write_text("a note")
    return world.run(1, jobs, timeout=450)


def error_of(run: Run) -> str:
    (error,) = run.errors
    assert error is not None
    return error


def output(world: World) -> str:
    return (world.folder / "jobs.world1.logged.log").read_text()


# ---------------------------------------------------------------- what was logged


def test_every_step_is_logged_once_however_often_a_run_was_killed(runs: dict[str, Run]) -> None:
    folder = runs["logged at last"].folder
    assert [entry["step"] for entry in runs["logged"].records("train")] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for tag in ("train/loss/total", "train/grad_norm"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5, 6], tag
    assert (folder / "tensorboard.before-1").is_dir(), "of the start that saved nothing"


# ---------------------------------------------------------------- other numbers of steps


def test_fewer_steps_than_are_done_is_an_error_that_says_so(runs: dict[str, Run]) -> None:
    error = error_of(runs["shorter"])
    assert "train.max_steps is 4, but " in error and "step_00000006 has done 6 steps" in error
    assert "num_steps" not in error


def test_more_steps_change_the_learning_rate_and_it_is_said(
    runs: dict[str, Run], world: World
) -> None:
    assert "train.max_steps was 6 and is 8" in output(world)
    rates = [entry["lr"]["vision"] for entry in runs["longer"].records("train")]
    # Warm-up of 2, then down to a twentieth: at step 7 of 8 the rate is that of step 6 of 8.
    assert rates[6] == pytest.approx(1e-3 * (1 - 0.95 * 4 / 6))
    assert f"{1 - 0.95 * 4 / 6:.1%} of its peak, where it would have been at 5.0%" in output(world)


# ---------------------------------------------------------------- branches


def test_a_branch_keeps_what_it_leaves_and_is_itself_continued(
    runs: dict[str, Run], world: World
) -> None:
    folder = runs["branched"].folder
    kept = sorted(path.name for path in (folder / "checkpoints.before-1").iterdir())
    assert kept == ["step_00000004", "step_00000006"]
    assert all(verify(folder / "checkpoints.before-1" / name) is None for name in kept)
    assert f"are kept in {folder / 'checkpoints.before-1'}" in output(world)
    # It saved 3 and 4 and kept both; automatic resume went on from there and not from step 6.
    assert runs["branch again"].errors == [None]
    place = folder / "checkpoints"
    newest = sorted(p.name for p in place.iterdir() if (p / "manifest.json").is_file())
    assert newest == ["step_00000003", "step_00000004", "step_00000005"]
    assert (place / "latest").read_text() == "step_00000005\n"
    steps = [entry["step"] for entry in runs["branch again"].records("train")]
    assert steps == [1, 2, 3, 4, 5]
    earlier = (folder / "metrics.before-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in earlier][-1] == 6


def test_names_that_no_save_gives_are_left_alone(runs: dict[str, Run]) -> None:
    place = runs["branch again"].folder / "checkpoints"
    assert (place / "step_00000009.bak").is_dir() and (place / "step_99999999_old").is_dir()
    assert (place / "step_00000099").read_text() == "a note"


# ---------------------------------------------------------------- damaged records


def test_an_undecodable_byte_of_a_question_goes_to_the_ledger(
    runs: dict[str, Run], places: dict[str, Path]
) -> None:
    assert runs["bad question"].errors == [None]
    ledger = runs["bad question"].folder / "replaced_samples.rank0.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert lines
    # One for every question of that record in a row.
    for reason in (reason for line in lines for reason in line["reasons"]):
        assert reason.startswith("tiny/train/0: ") and str(places["question"]) in reason
        assert "is damaged" in reason


def test_a_changed_letter_is_found_where_the_hashes_are_compared(
    runs: dict[str, Run], places: dict[str, Path]
) -> None:
    assert runs["bad letter"].errors == [None], "nothing else can see it"
    error = error_of(runs["verified"])
    assert error.startswith(f"ValueError: {places['letter']}: content hash is")
    assert not (runs["verified"].folder / "metrics.jsonl").exists()


def test_a_damaged_image_in_evaluation_is_named_after_the_checkpoint_is_saved(
    runs: dict[str, Run], places: dict[str, Path]
) -> None:
    error = error_of(runs["bad evaluation"])
    assert error.startswith(
        f"ValueError: {places['image']}, record 'tiny/test/3' cannot be evaluated (image: got"
    )
    assert "Traceback" not in error
    # What it did up to there was saved, and the evaluation is made up for.
    assert runs["mended evaluation"].errors == [None]
    events = [
        *runs["mended evaluation"].records("train"),
        *runs["mended evaluation"].records("eval"),
    ]
    counts = Counter((entry["event"], entry["step"]) for entry in events)
    assert counts == {("train", n): 1 for n in (1, 2, 3, 4)} | {("eval", n): 1 for n in (2, 4)}


# ---------------------------------------------------------------- the machine


def test_a_reading_process_that_dies_is_told_in_plain_words(runs: dict[str, Run]) -> None:
    error = error_of(runs["dead reader"])
    assert error.startswith("MachineError: a process that reads records has ended")
    assert "data.num_workers" in error


def test_a_limit_of_open_files_is_told_in_plain_words(runs: dict[str, Run]) -> None:
    error = error_of(runs["no files"])
    assert error.startswith("MachineError: ") and "ulimit -Hn" in error


@pytest.mark.parametrize(
    ("resume", "command"),
    [
        ("auto", "the same command continues from"),
        ("never", "the same command with train.resume=auto continues from"),
        ("runs/other/step_00000002", "the same command with train.resume=auto continues from"),
    ],
)
def test_an_interrupted_run_says_which_command_continues_it(
    tmp_path: Path, resume: str, command: str
) -> None:
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.mkdir(parents=True)
    program = "import sys; from biascare.runs.process import stop; stop([2], *sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), resume],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr == f"interrupted; {command} {newest}\n"


class Stuck(Dataset):
    """Records on a disk that hangs."""

    def __getitems__(self, positions: list[int]) -> list[int]:
        time.sleep(600)
        return positions


def test_a_reading_process_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "READ_TIMEOUT", 1)
    reading = training_loader(Stuck(), [[0]], num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(MachineError, match="no batch came from"), explained(tmp_path):
        next(iter(reading))


def test_a_run_may_open_as_many_files_as_the_system_allows() -> None:
    program = (
        "import resource; from biascare.runs.process import prepare_process; prepare_process(); "
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        ["bash", "-c", f"ulimit -Sn 100; {sys.executable} -c '{program}'"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    soft, hard = done.stdout.split()[-2:]
    assert soft == hard != "100"
