"""Shards: the same bytes whoever did what, and nothing lost or doubled when it goes wrong."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from biascare.records import Record, Records, RecordWriter, Turn
from data_prep.pipeline import shards
from data_prep.pipeline.fingerprints import options_of, sources_of, stable_form
from data_prep.pipeline.ledger import Ledger, check_skipped
from data_prep.pipeline.shards import (
    Incomplete,
    Release,
    SetAsideError,
    UnusableItemError,
    convert_shard,
    plan_release,
)
from data_prep.pipeline.workers import ShardTask

ROOT = Path(__file__).parents[2]


def make_record(item: str, **changes: Any) -> Record:
    """A 4 x 6 image with one target and one question, all derived from the item."""
    number = int(item.rpartition("-")[2])
    mask = np.zeros((4, 6), dtype=np.bool_)
    mask[number % 4, number % 6] = True
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), number % 256, dtype=np.uint8)).save(buffer, "PNG")
    turns = [Turn("user", f"which {number}?", "open"), Turn("assistant", f"{number}", "open")]
    fields: dict[str, Any] = {
        "id": item, "image": buffer.getvalue(), "height": 4, "width": 6, "task": "vqa",
        "targets": [(f"target {number % 3}", mask)], "conversations": turns, "modality": "ct",
        "source": "toy", "split": "train", "patient_id": None, "study_id": None,
        "sex": "F" if number % 2 else None, "age": float(number % 90), "race": None,
    }  # fmt: skip
    return Record(**(fields | changes))


def convert(item: str) -> Record | list[Record] | None:
    """bad-* is unusable, left-* is not wanted, many-* are two records, kill-* ends the process."""
    kind = item.partition("-")[0]
    if kind == "bad":
        raise UnusableItemError("file missing")
    if kind == "aside":
        raise SetAsideError("a report, no image")
    if kind == "left":
        return None
    if kind == "many":
        return [make_record(item), make_record(item, id=f"{item}/second")]
    if kind == "broken":
        raise KeyError("column")
    if kind == "invalid":
        return make_record(item, sex="x")
    return make_record(item)


def slow_convert(folder: str, item: str) -> Record:
    """Says in a file that it has begun."""
    (Path(folder) / item).touch()
    time.sleep(0.05)
    return make_record(item)


def dying_convert(folder: str, item: str) -> Record:
    """Kills its process at one item, once."""
    flag = Path(folder) / "died"
    if item == "image-7" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make_record(item)


def silent_convert(item: str) -> Record:
    """A record that has nothing to learn."""
    return make_record(item, targets=[], conversations=[])


def forbidden_convert(item: str) -> Record:
    raise PermissionError(13, "Permission denied", "a.png")


class Options(NamedTuple):
    masks: Path
    labels: tuple[tuple[int, str], ...]
    turn: str | None


def convert_with(options: Options, item: str) -> Record:
    return make_record(item)


def names(count: int, kind: str = "image") -> list[str]:
    return [f"{kind}-{number}" for number in range(count)]


def release(items: Iterable[str], **changes: Any) -> Release:
    fields: dict[str, Any] = {
        "source": "toy", "split": "train", "version": "1", "licence": "test",
        "items": list(items), "convert": convert,
    }  # fmt: skip
    return Release(**(fields | changes))


def arguments(output: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser, items_per_shard=4)
    return parser.parse_args(["--output", str(output), *more])


def run(output: Path, items: Iterable[str], *more: str, **changes: Any) -> Path:
    shards.run(arguments(output, *more), [release(items, **changes)])
    return output / "toy" / "train"


def skipped(folder: Path) -> list[str]:
    path = shards.ledger_path(folder)
    return [json.loads(line)["item"] for line in path.read_text().splitlines()]


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


MIXED = [*names(9), "bad-1", *names(3, "many"), "left-1", *names(2, "late"), "bad-2"]
LENIENT = ("--max-skipped", "0.2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The same items written by hand, by one writer."""
    folder = tmp_path_factory.mktemp("reference") / "train"
    with RecordWriter(folder, source="toy", split="train", version="1", licence="test") as writer:
        for item in MIXED:
            if not item.startswith(("bad", "left")):
                made = convert(item)
                for record in made if isinstance(made, list) else [made]:
                    assert record is not None
                    writer.write(record)
    return Records(folder)


def check_equal(folder: Path, reference: Records) -> None:
    records = Records(folder)
    records.verify()
    manifest = dict(records.manifest)
    preparation = manifest.pop("preparation")
    assert manifest == reference.manifest
    assert (preparation["num_items"], preparation["num_skipped"]) == (len(MIXED) - 1, 2)
    np.testing.assert_array_equal(records.segmentation_units, reference.segmentation_units)
    np.testing.assert_array_equal(records.language_units, reference.language_units)
    assert [records[k] for k in range(len(records))] == [
        reference[k] for k in range(len(reference))
    ]
    assert skipped(folder) == ["bad-1", "bad-2"]
    assert beside(folder) == ["train", "train.skipped.jsonl"]  # shards are gone


def test_shards_give_what_one_writer_gives(tmp_path: Path, reference: Records) -> None:
    check_equal(run(tmp_path, MIXED, *LENIENT), reference)


@pytest.mark.parametrize("size", ["1", "3", "100"])
def test_the_cut_into_shards_changes_nothing(tmp_path: Path, reference: Records, size: str) -> None:
    check_equal(run(tmp_path, MIXED, *LENIENT, "--items-per-shard", size), reference)


def test_worker_processes_change_nothing(tmp_path: Path, reference: Records) -> None:
    check_equal(run(tmp_path, MIXED, *LENIENT, "--num-workers", "2"), reference)


def test_jobs_in_any_order_change_nothing(tmp_path: Path, reference: Records) -> None:
    folder = tmp_path / "toy" / "train"
    for index in ("2", "0", "1"):
        assert not folder.exists()
        run(tmp_path, MIXED, *LENIENT, "--num-jobs", "3", "--job-index", index)
    check_equal(folder, reference)


def test_interrupted_work_continues_and_no_shard_is_done_twice(
    tmp_path: Path, reference: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def interrupted(task: ShardTask, advance: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        convert_shard(task, advance)
        made.append(task.folder.name)

    monkeypatch.setattr(shards, "convert_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, MIXED, *LENIENT)
    first = list(made)
    monkeypatch.setattr(
        shards,
        "convert_shard",
        lambda task, advance: (made.append(task.folder.name), convert_shard(task, advance)),
    )
    check_equal(run(tmp_path, MIXED, *LENIENT), reference)
    assert len(made) == len(set(made)) == 5
    assert made[:2] == first


def test_a_shard_that_fails_leaves_nothing_and_names_its_item(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="toy, item broken-0: KeyError: 'column'"):
        run(tmp_path, [*names(5), "broken-0"])
    kept = list((tmp_path / "toy" / ".train.shards").iterdir())
    assert [path.name[:5] for path in kept] == ["00000"]
    with pytest.raises(ValueError, match=r"toy, item invalid-0: .*sex must be one of"):
        run(tmp_path, ["invalid-0"])


def test_a_finished_folder_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, names(5))
    before = folder.stat().st_mtime_ns
    run(tmp_path, names(5), "--items-per-shard", "2")
    assert "prepared before, left as it is" in capsys.readouterr().out
    assert folder.stat().st_mtime_ns == before


def test_other_items_or_a_foreign_folder_are_noticed(tmp_path: Path) -> None:
    folder = run(tmp_path, names(5))
    with pytest.raises(ValueError, match="not prepared from these items; give --overwrite"):
        run(tmp_path, names(6))
    assert len(Records(folder)) == 5
    run(tmp_path, names(6), "--overwrite")
    assert len(Records(folder)) == 6
    assert beside(folder) == ["train"]
    (tmp_path / "by_hand" / "toy" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="not prepared from these items"):
        run(tmp_path / "by_hand", names(2))


LIVER = Options(Path("private/anna"), ((1, "liver"),), None)


def test_a_rerun_with_other_options_is_refused_and_told_which(tmp_path: Path) -> None:
    """Items are the same, so that only the options tell the two folders apart."""
    folder = run(tmp_path, names(5), convert=functools.partial(convert_with, LIVER))
    before = folder.stat().st_mtime_ns
    both = LIVER._replace(labels=((1, "liver"), (2, "spleen")), turn="rotate_90")
    with pytest.raises(ValueError, match="prepared with other options") as refused:
        run(tmp_path, names(5), convert=functools.partial(convert_with, both))
    assert 'labels was [[1, "liver"]], is [[1, "liver"], [2, "spleen"]]' in str(refused.value)
    assert 'turn was none, is "rotate_90"' in str(refused.value)
    assert "--overwrite" in str(refused.value) and "another --output" in str(refused.value)
    elsewhere = functools.partial(convert_with, LIVER._replace(masks=Path("private/berta")))
    with pytest.raises(ValueError, match="other options: masks is another one"):
        run(tmp_path, names(5), convert=elsewhere)
    plain = functools.partial(convert_with, LIVER)
    with pytest.raises(ValueError, match=r'licence was "test", is "CC BY 4.0"'):
        run(tmp_path, names(5), convert=plain, licence="CC BY 4.0")
    assert folder.stat().st_mtime_ns == before
    run(tmp_path, names(5), "--overwrite", convert=elsewhere)
    run(tmp_path, names(5), convert=elsewhere)


def test_paths_of_the_options_are_compared_but_never_written_down(tmp_path: Path) -> None:
    folder = run(tmp_path, names(2), convert=functools.partial(convert_with, LIVER))
    manifest = (folder / "manifest.json").read_text()
    assert "liver" in manifest
    assert "anna" not in manifest and "private" not in manifest
    absolute = LIVER._replace(masks=Path("private/anna").absolute())
    run(tmp_path, names(2), convert=functools.partial(convert_with, absolute))  # the same folder
    table = functools.partial(convert_with, {"names": [f"patient {k}" for k in range(20)]})
    assert options_of(table)["options"].startswith("#")
    nested = options_of(functools.partial(convert_with, [Path("private/anna")]))
    assert "anna" not in nested["options"] and "path" in nested["options"]


def test_newer_code_keeps_the_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, names(5), convert=functools.partial(convert_with, LIVER))
    before = folder.stat().st_mtime_ns
    monkeypatch.setattr(shards, "__version__", "99")
    run(tmp_path, names(5), convert=functools.partial(convert_with, LIVER))
    assert "an earlier converter prepared it" in capsys.readouterr().out
    assert folder.stat().st_mtime_ns == before


def test_a_folder_of_before_options_were_noted_is_kept_with_the_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, names(5), convert=functools.partial(convert_with, LIVER))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["preparation"]["options"]
    manifest["preparation"]["code"] = "of another time"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    other = functools.partial(convert_with, LIVER._replace(turn="rotate_90"))
    run(tmp_path, names(5), convert=other)
    assert "an earlier converter prepared it" in capsys.readouterr().out


def test_shards_of_other_options_are_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 5 items skipped"):
        run(tmp_path, [*names(4), "bad-0"])
    shelf = tmp_path / "toy" / ".train.shards"
    kept = {path.name for path in shelf.iterdir()}
    plans = [
        plan_release(release([*names(4), "bad-0"], **changes), tmp_path, 4)
        for changes in ({}, {"convert": functools.partial(convert_with, LIVER)})
    ]
    assert {path.name for path in plans[0].shard_folders} == kept
    again = functools.partial(convert_with, LIVER._replace(labels=((2, "liver"),)))
    other = plan_release(release([*names(4), "bad-0"], convert=again), tmp_path, 4)
    assert plans[1].code_fingerprint == other.code_fingerprint
    assert not set(plans[1].shard_folders) & set(other.shard_folders)


def test_records_that_teach_nothing_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, names(3), convert=silent_convert, how_to_learn="--masks adds masks")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "3 records that hold neither masks nor questions: training cannot use them "
        "(--masks adds masks)"
    ) in said
    run(tmp_path / "other", names(3))
    assert "neither" not in capsys.readouterr().out


def convert_without_masks(item: str) -> Iterable[Incomplete | Record]:
    """A volume of two slices: the masks of one are lost, of the other something is noted."""
    if not item.startswith("lost"):
        return [make_record(item)]
    first = Incomplete(make_record(item, targets=[]), lost="mask unreadable", noted=("old age",))
    return [first, Incomplete(make_record(f"second-{item}", targets=[]), lost="mask unreadable")]


def test_lost_masks_count_once_per_item_and_what_is_noted_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [*names(18), "lost-1", "lost-2"]
    with pytest.raises(ValueError, match=r"2 of 20 items skipped, 2 of them with a record that"):
        run(tmp_path, items, "--max-skipped", "0.05", convert=convert_without_masks)
    folder = run(tmp_path, items, "--max-skipped", "0.1", convert=convert_without_masks)
    assert skipped(folder) == ["lost-1", "lost-1", "lost-2", "lost-2"]
    assert len(Records(folder)) == 22
    told = "22 records, 2 without their masks (2 x mask unreadable), 2 noted (2 x old age)"
    assert told in capsys.readouterr().out


def test_overwriting_with_fewer_splits_leaves_no_stale_one_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.run(arguments(tmp_path), [release(names(4)), *dropped(names(2, "late"))])
    foreign = tmp_path / "toy" / "notes"
    foreign.mkdir()
    # The same items without a held-out share: train holds all of them now.
    run(tmp_path, [*names(4), *names(2, "late")], "--overwrite")
    assert beside(tmp_path / "toy" / "train") == [".val.previous", "notes", "train"]
    assert "toy/val: not among the splits any more" in capsys.readouterr().out


def dropped(items: list[str]) -> list[Release]:
    return [release(items, split="val", convert=convert_val)]


def convert_val(item: str) -> Record:
    return make_record(item, split="val")


def test_the_reasons_of_skipped_items_add_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "skipped.jsonl")
    for item, reason in enumerate("aaabb" + "cdefghijklmnopqrstuvw"):
        ledger.skip(str(item), reason)
    with pytest.raises(ValueError, match=r"3 x a; 2 x b; 1 x c; .*1 x t; and 3 others\)"):
        check_skipped(ledger.path, num_items=30, limit=0.1)
    ledger = Ledger(tmp_path / "skipped.jsonl")
    for item, reason in enumerate("abcdefghijklmnopqrstu"):
        ledger.skip(str(item), reason)
    with pytest.raises(ValueError, match=r"1 x t; and 1 other\)"):
        check_skipped(ledger.path, num_items=30, limit=0.1)


def test_what_is_set_aside_is_told_and_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [*names(9, "aside"), "bad-0", *names(9)]
    # One of ten, not one of nineteen: reports beside the images would widen the limit.
    told = r"1 of 10 items skipped, .* \(1 x file missing\), 9 set aside \(9 x a report, no image\)"
    with pytest.raises(ValueError, match=told):
        run(tmp_path, items, "--max-skipped", "0.09")
    folder = run(tmp_path, items, "--max-skipped", "0.1")
    said = " ".join(capsys.readouterr().out.split())
    assert "9 records, 1 skipped (1 x file missing), 9 set aside (9 x a report, no image)" in said
    assert len(Records(folder)) == 9
    with pytest.raises(ValueError, match=r"no record was written, 4 set aside"):
        run(tmp_path / "none", names(4, "aside"))


def test_a_file_that_may_not_be_read_is_no_fault_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"toy, item image-0: .*denied"):
        run(tmp_path, names(1), convert=forbidden_convert)


def test_only_shards_whose_items_changed_are_converted_again(tmp_path: Path) -> None:
    old = plan_release(release(names(10)), tmp_path, 4)
    new = plan_release(release([*names(9), "other-9"]), tmp_path, 4)
    assert old.shard_folders[:2] == new.shard_folders[:2]
    assert old.shard_folders[2] != new.shard_folders[2]
    assert old.items_fingerprint != new.items_fingerprint
    recut = plan_release(release(names(10)), tmp_path, 3)
    assert recut.items_fingerprint == old.items_fingerprint
    other = plan_release(release(names(10), version="2"), tmp_path, 4)
    assert not set(other.shard_folders) & set(old.shard_folders)


def test_overwriting_keeps_the_older_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = run(tmp_path, names(5))
    with pytest.raises(RuntimeError):
        run(tmp_path, [*names(5), "broken-0"], "--overwrite")
    assert len(Records(folder.with_name(".train.previous"))) == 5
    run(tmp_path, names(6))
    assert beside(folder) == ["train"]


def test_too_many_skipped_items_are_an_error_that_keeps_everything(tmp_path: Path) -> None:
    items = [*names(2, "bad"), *names(17), "bad-2"]
    with pytest.raises(ValueError, match=r"3 of 20 items skipped, more .* 10\.00% \(3 x file mis"):
        run(tmp_path, items, "--max-skipped", "0.1")
    folder = tmp_path / "toy" / "train"
    assert beside(folder) == [".train.shards", "train.skipped.jsonl"]
    assert skipped(folder) == names(3, "bad")
    # Also what lies after the first bad shard: the message counts all of the release.
    assert len(list((tmp_path / "toy" / ".train.shards").iterdir())) == 5
    run(tmp_path, items, "--max-skipped", "0.15")
    assert len(Records(folder)) == 17


def test_the_limit_is_judged_over_the_whole_release(tmp_path: Path) -> None:
    items = ["bad-0", *names(39)]  # a quarter of the first shard, 2.5 % of all
    folder = run(tmp_path, items, "--max-skipped", "0.025")
    assert len(Records(folder)) == 39


def test_items_left_out_on_purpose_are_not_counted(tmp_path: Path) -> None:
    items = ["bad-0", *names(3), *names(6, "left")]
    with pytest.raises(ValueError, match="1 of 4 items skipped"):
        run(tmp_path, items, "--max-skipped", "0.2")


def test_an_id_in_two_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 ids occur more than once, for example \['image-0'\]"):
        run(tmp_path, [*names(5), "image-0"])
    assert beside(tmp_path / "toy" / "train") == [".train.shards"]


def test_a_release_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = release(["bad-0"], split="test")
    with pytest.raises(ValueError, match="toy/test: 1 of 1 items skipped"):
        shards.run(arguments(tmp_path), [bad, release(names(2))])
    assert len(Records(tmp_path / "toy" / "train")) == 2


def test_a_release_without_a_record_is_an_error_and_one_without_items_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no record was written"):
        run(tmp_path, names(3, "left"))
    run(tmp_path / "other", [])
    assert "lists no items" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


def test_of_several_processes_that_find_all_shards_one_joins_them(
    tmp_path: Path, reference: Records
) -> None:
    """Twenty threads start to join at the same moment; the loser's work must leave no trace."""
    for repetition in range(3):
        output = tmp_path / str(repetition)
        plan = plan_release(release(MIXED), output, 4)
        for index, folder in enumerate(plan.shard_folders):
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert_shard(ShardTask(plan.shard(index), folder), lambda _: None)
        barrier, said = threading.Barrier(20), []

        def race(plan: Any = plan, barrier: Any = barrier, said: Any = said) -> None:
            barrier.wait()
            said.append(shards.join(plan, 0.2))

        threads = [threading.Thread(target=race) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(text.split(",")[0] for text in said) == [
            "17 records", *["joined by another job"] * 19,
        ]  # fmt: skip
        check_equal(plan.folder, reference)


def test_twins_of_one_shard_do_no_harm(tmp_path: Path) -> None:
    plan = plan_release(release(names(4)), tmp_path, 4)
    for _ in range(2):
        convert_shard(ShardTask(plan.shard(0), plan.shard_folders[0]), lambda _: None)
    assert beside(plan.shard_folders[0]) == [plan.shard_folders[0].name]


def test_a_worker_that_dies_is_reported_and_costs_its_shards_only(tmp_path: Path) -> None:
    function = functools.partial(dying_convert, str(tmp_path))
    with pytest.raises(RuntimeError, match="a worker process died"):
        run(tmp_path / "out", names(20), "--num-workers", "1", convert=function)
    kept = [path for path in (tmp_path / "out/toy/.train.shards").iterdir() if path.name[0] != "."]
    assert [path.name[:5] for path in kept] == ["00000"]
    run(tmp_path / "out", names(20), convert=function)
    plain = run(tmp_path / "plain", names(20))
    hashes = {
        Records(folder).manifest["content_hash"] for folder in (tmp_path / "out/toy/train", plain)
    }
    assert len(hashes) == 1


SCRIPT = """
import argparse, functools, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_shards
if __name__ == "__main__":
    test_shards.run(Path(sys.argv[1]), test_shards.names(40), *sys.argv[3:],
        convert=functools.partial(test_shards.slow_convert, sys.argv[2]))
"""


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_killed_or_interrupted_program_ends_its_workers_and_resumes(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent)))
    began = tmp_path / "began"
    began.mkdir()
    command = [sys.executable, str(script), str(tmp_path / "out"), str(began)]
    process = subprocess.Popen(
        [*command, "--num-workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _wait_for(lambda: len(list(began.iterdir())) >= 12)
    children = _children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    _wait_for(lambda: not any(_alive(child) for child in children))
    shelf = tmp_path / "out" / "toy" / ".train.shards"
    kept = sorted(path.name for path in shelf.iterdir() if path.name[0] != ".")
    assert kept
    for path in began.iterdir():
        path.unlink()
    folder = run(tmp_path / "out", names(40), convert=functools.partial(slow_convert, str(began)))
    assert len(list(began.iterdir())) == 40 - 4 * len(kept)
    plain = run(tmp_path / "plain", names(40))
    assert Records(folder).manifest["content_hash"] == Records(plain).manifest["content_hash"]
    assert beside(folder) == ["train"]


def _wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute in vain")


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_code_that_counts_is_the_converter_and_what_it_imports() -> None:
    found = {path.name for path in sources_of(ROOT / "data_prep" / "imed361m.py")}
    assert {"imed361m.py", "orientation.py", "vocabulary.py", "shards.py"} <= found
    assert {"record.py", "masks.py", "writer.py"} <= found  # behind a package
    assert not {"demo.py", "sample_pack.py", "numpy.py"} & found


class Pair(NamedTuple):
    path: Path
    number: np.int64


@dataclasses.dataclass(frozen=True)
class Item:
    pair: Pair
    tags: frozenset[str]


def test_equal_items_have_one_form_in_every_process() -> None:
    item = Item(Pair(Path("a/b"), np.int64(3)), frozenset({"y", "x"}))
    assert stable_form(item) == '{"pair":["a/b",3],"tags":["x","y"]}'
    assert stable_form({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'
    with pytest.raises(ValueError, match=r"paths, strings, numbers .* got object"):
        stable_form([object()])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-skipped", "2"), "share between 0 and 1"),
        (("--num-jobs", "2", "--job-index", "2"), "counts from 0 to --num-jobs - 1, got 2 of 2"),
        (("--num-workers", "-1"), "at least 0"),
        (("--num-jobs", "2", "--overwrite"), "each would throw away"),
        (("--ray", "--num-workers", "2"), "choose one"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, names(2), *more)


def test_ray_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'biascare\[cluster\]'"):
        run(tmp_path, names(2), "--ray")


RAY_SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import ray
import test_shards
if __name__ == "__main__":
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False,
        runtime_env={{"env_vars": {{"PYTHONPATH": {root!r} + ":" + {tests!r}}}}})
    test_shards.run(Path(sys.argv[1]), test_shards.MIXED, "--ray", *test_shards.LENIENT)
    try:
        test_shards.run(Path(sys.argv[1]) / "broken", ["broken-0"], "--ray")
    except RuntimeError as error:
        print("told:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_gives_the_same_records(tmp_path: Path, reference: Records) -> None:
    script = tmp_path / "program.py"
    script.write_text(RAY_SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "told: toy, item broken-0: KeyError" in done.stdout
    check_equal(tmp_path / "out" / "toy" / "train", reference)
