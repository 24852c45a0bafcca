"""The on-disk record: what is written is read back exactly, and nothing doubtful is written."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from biascare import records as module
from biascare.records import (
    Record,
    Records,
    RecordWriter,
    Turn,
    checksum_of,
    decode_mask,
    encode_mask,
    image_size,
)
from biascare.records import writer as record_writer

HEIGHT, WIDTH = 4, 6
WRITER = {"source": "toy", "split": "train", "version": "1", "licence": "test"}


def png(height: int = HEIGHT, width: int = WIDTH, value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def one_pixel(row: int = 1, column: int = 2) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
    mask[row, column] = True
    return mask


def pair(kind: str = "open") -> list[Turn]:
    return [Turn("user", "which organ?", kind), Turn("assistant", "the liver", kind)]


def choice(answer: str = "liver", **changes: Any) -> list[Turn]:
    asked = Turn("user", "which organ?", "choice", ("liver", "spleen"), {"qid": "7"})
    return [asked._replace(**changes), Turn("assistant", answer, "choice")]


def record(index: int = 0, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "id": f"toy/{index}",
        "image": png(value=index % 256),
        "height": HEIGHT,
        "width": WIDTH,
        "task": "segmentation",
        "modality": "ct",
        "source": "toy",
        "split": "train",
        "patient_id": None,
        "study_id": None,
        "sex": None,
        "age": None,
        "race": None,
    }
    return Record(**(fields | changes))


def write(folder: Path, items: list[Record], **changes: Any) -> Records:
    with RecordWriter(folder, **(WRITER | changes)) as writer:
        for item in items:
            writer.write(item)
    return Records(folder)


def test_the_size_is_height_then_width_and_foreign_bytes_are_refused() -> None:
    assert image_size(png(3, 8)) == (3, 8)
    buffer = io.BytesIO()
    Image.new("L", (5, 2)).save(buffer, "JPEG")
    assert image_size(buffer.getvalue()) == (2, 5)
    for data in (b"", b"GIF89a not an image", png()[:12]):
        with pytest.raises(ValueError, match="not a readable PNG or JPEG"):
            image_size(data)


def test_a_pixel_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (10_000, 60_000):  # Pillow warns about the first and refuses the second itself
        header = bytearray(png())
        header[16:24] = width.to_bytes(4, "big") + (9_000).to_bytes(4, "big")
        chunk = bytes(header[12:29])
        header[29:33] = __import__("zlib").crc32(chunk).to_bytes(4, "big")
        with pytest.raises(ValueError, match="refused"):
            image_size(bytes(header))


def test_every_field_comes_back_as_it_was_written(tmp_path: Path) -> None:
    full = record(
        targets=[("liver", one_pixel()), ("lesion", one_pixel())],
        conversations=[*choice(), *pair("closed")],
        anatomy="abdomen",
        labels=["COVID-19", "Pleural Thickening"],
        patient_id="p1",
        study_id="s1",
        sex="F",
        age=63.5,
        race="Asian",
        extra={"nested": [1, {"é": None}]},
    )
    row = write(tmp_path / "train", [full])[0]
    expected = dataclasses.asdict(full) | {
        "targets": [{"name": name, "rle": encode_mask(mask)} for name, mask in full.targets],
        "conversations": [turn._asdict() for turn in full.conversations],
    }
    assert row == expected | {"checksum": checksum_of(row)}
    assert [Turn(**turn) for turn in row["conversations"]] == full.conversations
    np.testing.assert_array_equal(decode_mask(row["targets"][0]["rle"], HEIGHT, WIDTH), one_pixel())


def test_what_is_unknown_stays_none_and_is_counted_as_missing(tmp_path: Path) -> None:
    records = write(tmp_path / "train", [record(0), record(1, sex="M", age=9.9, race="White")])
    assert [records[0][name] for name in ("sex", "age", "race", "patient_id")] == [None] * 4
    assert records.manifest["sex"] == {"M": 1, "missing": 1}
    assert records.manifest["age_decade"] == {"0s": 1, "missing": 1}
    assert records.manifest["race"] == {"White": 1, "missing": 1}


@settings(deadline=None, max_examples=8)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12),
    rows_per_shard=st.integers(1, 5),
)
def test_units_agree_with_a_walk_over_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], rows_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("units") / "train"
    items = [
        record(
            index,
            targets=[(f"target {n}", one_pixel()) for n in range(num_targets)],
            conversations=pair() * num_pairs,
        )
        for index, (num_targets, num_pairs) in enumerate(rows)
    ]
    records = write(folder, items, rows_per_shard=rows_per_shard)
    segmentation = [index for index, (num_targets, _) in enumerate(rows) if num_targets]
    language = [[index, 2 * n] for index, (_, pairs) in enumerate(rows) for n in range(pairs)]
    for units, expected, columns in (
        (records.segmentation_units, segmentation, ()),
        (records.language_units, language, (2,)),
    ):
        assert units.dtype == np.int32
        assert units.shape == (len(expected), *columns)
        assert units.tolist() == expected
    for name in (module.SEGMENTATION_UNITS, module.LANGUAGE_UNITS):
        (folder / name).unlink()
    rebuilt = Records(folder)
    np.testing.assert_array_equal(rebuilt.segmentation_units, records.segmentation_units)
    np.testing.assert_array_equal(rebuilt.language_units, records.language_units)
    assert sum(records.target_counts.values()) == sum(num_targets for num_targets, _ in rows)


def test_units_are_mapped_from_disk_and_rows_survive_pickling(tmp_path: Path) -> None:
    records = write(tmp_path / "train", [record(0, targets=[("liver", one_pixel())])])
    assert isinstance(records.segmentation_units, np.memmap)
    copy = pickle.loads(pickle.dumps(records))
    assert copy[0] == records[0]
    assert len(pickle.dumps(records)) < 1000  # a path travels to the worker, not the rows


def test_the_folder_opens_with_datasets_alone(tmp_path: Path) -> None:
    write(tmp_path / "train", [record(n) for n in range(5)], rows_per_shard=2)
    dataset = datasets.load_from_disk(str(tmp_path / "train"))
    assert [row["id"] for row in dataset] == [f"toy/{n}" for n in range(5)]
    assert sorted(path.name for path in (tmp_path / "train").glob("*.arrow"))[-1] == (
        "data-00002-of-00003.arrow"
    )


def test_the_content_hash_depends_on_rows_and_their_order_only(tmp_path: Path) -> None:
    items = [record(n, conversations=pair()) for n in range(3)]
    first = write(tmp_path / "a", items)
    sharded = write(tmp_path / "b", items, rows_per_shard=1)
    reversed_ = write(tmp_path / "c", items[::-1])
    changed = write(tmp_path / "d", [*items[:2], record(2, conversations=pair(), sex="F")])
    first.verify()
    assert first.manifest["content_hash"] == sharded.manifest["content_hash"]
    hashes = {r.manifest["content_hash"] for r in (first, reversed_, changed)}
    assert len(hashes) == 3


def test_verify_notices_a_changed_byte(tmp_path: Path) -> None:
    write(tmp_path / "train", [record(conversations=pair())])
    (shard,) = (tmp_path / "train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes().replace(b"the liver", b"the lover"))
    with pytest.raises(ValueError, match="content hash"):
        Records(tmp_path / "train").verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 5}, "height x width is 5 x 6, the image has 4 x 6"),
        ({"targets": [("liver", np.zeros((HEIGHT, WIDTH), np.bool_))]}, "'liver' is empty"),
        ({"targets": [("liver", one_pixel().T)]}, r"must be bool \[4, 6\]"),
        ({"targets": [("liver", one_pixel().astype(np.uint8))]}, r"got uint8 \[4, 6\]"),
        ({"targets": [("liver", one_pixel())] * 2}, "'liver' occurs 2 times"),
        ({"targets": [(" ", one_pixel())]}, "needs a name"),
        ({"image": b"no image"}, "not a readable PNG or JPEG"),
        ({"conversations": pair()[:1]}, "needs an answer"),
        ({"conversations": pair()[::-1]}, "turn 0 has role 'assistant', expected 'user'"),
        ({"conversations": pair("chioce")}, "got 'chioce', expected one of .* mean 'choice'"),
        ({"conversations": [pair("open")[0], pair("closed")[1]]}, "'open' question as 'closed'"),
        ({"conversations": [pair()[0], Turn("assistant", " ", "open")]}, "turn 1 has no text"),
        ({"conversations": choice("A: liver")}, "'A: liver' of turn 1 is not exactly one of"),
        ({"conversations": choice(options=("liver", "liver"))}, "not exactly one of the options"),
        ({"conversations": choice(options=("liver",))}, "a choice of 1; it needs 2 to 26"),
        ({"conversations": choice(options=("liver", "a\nb"))}, "must be one line"),
        ({"conversations": choice(options=("liver", ""))}, "must be one line"),
        (
            {"conversations": [pair()[0]._replace(options=("a", "b")), pair()[1]]},
            "has options, but",
        ),
        ({"conversations": [choice()[0], choice()[0]._replace(role="assistant")]}, "is an answer"),
        ({"conversations": choice(facts={"awnser_type": "open"})}, "did you mean 'answer_type'"),
        ({"conversations": choice(facts={"qid": 7})}, "fact 'qid' of turn 0 must be a text, got 7"),
        ({"sex": "female"}, "sex must be one of"),
        ({"age": float("nan")}, "age must be between 0 and 130"),
        ({"age": 1954}, "age must be between 0 and 130"),
        ({"race": ""}, "race is an empty string; write None"),
        ({"split": "test"}, "one folder holds one dataset and one split"),
        ({"modality": ""}, "modality must be a non-empty string"),
    ],
)
def test_a_doubtful_record_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with (
        pytest.raises(ValueError, match=message),
        RecordWriter(tmp_path / "train", **WRITER) as writer,
    ):
        writer.write(record(**changes))
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_record_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sex must be .*; age must be .*; height x width"):
        write(tmp_path / "train", [record(sex="x", age=-1, width=9)])


def test_an_id_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'toy/3': id written before"):
        write(tmp_path / "train", [record(3), record(3)])


def test_a_failed_run_leaves_the_older_folder_and_no_rest(tmp_path: Path) -> None:
    write(tmp_path / "train", [record(1)])
    with (
        pytest.raises(RuntimeError, match="power cut"),
        RecordWriter(tmp_path / "train", **WRITER, overwrite=True) as writer,
    ):
        writer.write(record(2))
        raise RuntimeError("power cut")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert Records(tmp_path / "train")[0]["id"] == "toy/1"


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    write(tmp_path / "train", [record(1)])
    with pytest.raises(ValueError, match="exists already"):
        RecordWriter(tmp_path / "train", **WRITER)
    replaced = write(tmp_path / "train", [record(2)], overwrite=True)
    assert replaced[0]["id"] == "toy/2"
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_folder_without_records_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record was written"):
        write(tmp_path / "train", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kept", "changed"),  # the last is a sound code of another mask
    [(b"IDAT", b"IDAX"), (b"liver", b"lover"), (b"91>", b"81?")],
)
def test_a_row_whose_image_or_masks_were_altered_is_not_given_out(
    tmp_path: Path, kept: bytes, changed: bytes
) -> None:
    write(tmp_path / "train", [record(n, targets=[("liver", one_pixel())]) for n in range(2)])
    (shard,) = (tmp_path / "train").glob("*.arrow")
    data = shard.read_bytes()
    assert kept in data
    shard.write_bytes(data.replace(kept, changed, 1))
    records = Records(tmp_path / "train")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'train'}, record 'toy/0': .* were altered"):
        records[0]
    assert records.unchecked(0)["id"] == "toy/0" and records[1]["id"] == "toy/1"


def test_a_row_whose_texts_are_no_texts_any_more_says_so_by_its_id(tmp_path: Path) -> None:
    write(tmp_path / "train", [record(conversations=choice()), record(1)])
    (shard,) = (tmp_path / "train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes().replace(b'{"qid": "7"}', b'{"qid": "7"~'))
    records = Records(tmp_path / "train")
    for read in (records.__getitem__, records.unchecked):
        with pytest.raises(ValueError, match=r"record 'toy/0' is damaged .*prepare it again"):
            read(0)
    shard.write_bytes(shard.read_bytes().replace(b"which organ?", b"which\xff\xffrgan?"))
    with pytest.raises(ValueError, match="record 'toy/0' is damaged"):
        Records(tmp_path / "train")[0]
    assert (records.id_of(0), records.id_of(-1)) == ("toy/0", "toy/1")


def test_a_checksum_tells_names_codes_and_image_apart() -> None:
    row = {"image": b"abc", "targets": [{"name": "ab", "rle": b"c"}]}
    others = [
        {"image": b"abca", "targets": [{"name": "b", "rle": b"c"}]},
        {"image": b"abc", "targets": [{"name": "a", "rle": b"bc"}]},
        {"image": b"abc", "targets": [{"name": "ab", "rle": b""}, {"name": "c", "rle": b""}]},
    ]
    assert len({checksum_of(r) for r in (row, *others)}) == 4


def _lose_manifest(folder: Path) -> None:
    (folder / module.MANIFEST).unlink()


def _lose_shard(folder: Path) -> None:
    next(folder.glob("*.arrow")).unlink()


def _cut_shard(folder: Path) -> None:
    shard = next(folder.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])


def _forget_shard(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].pop()
    (folder / "state.json").write_text(json.dumps(state))


def _future_version(folder: Path) -> None:
    path = folder / module.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))


def _foreign_manifest(folder: Path) -> None:
    (folder / module.MANIFEST).write_text('{"format": "other"}')


def _foreign_dataset(folder: Path) -> None:
    manifest = (folder / module.MANIFEST).read_text()
    shutil.rmtree(folder)
    datasets.Dataset.from_dict({"x": [1, 2, 3]}).save_to_disk(str(folder))
    (folder / module.MANIFEST).write_text(manifest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (_lose_manifest, "not a finished record folder"),
        (_lose_shard, "damaged"),
        (_cut_shard, "damaged"),
        (_forget_shard, "has 2 rows, its manifest.json says 3"),
        (_future_version, "format version 99"),
        (_foreign_manifest, "does not describe biascare-records"),
        (_foreign_dataset, "does not have the columns"),
    ],
)
def test_a_missing_foreign_or_damaged_folder_says_so(
    tmp_path: Path, damage: Any, message: str
) -> None:
    write(tmp_path / "train", [record(n) for n in range(3)], rows_per_shard=1)
    damage(tmp_path / "train")
    with pytest.raises(ValueError, match=message):
        Records(tmp_path / "train")


def test_the_parent_of_record_folders_points_to_them(tmp_path: Path) -> None:
    write(tmp_path / "train", [record()])
    with pytest.raises(ValueError, match=r"did you mean one of its folders \['train'\]"):
        Records(tmp_path)


def test_a_shard_closes_early_when_its_bytes_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_writer, "SHARD_BYTES", 1)
    write(tmp_path / "train", [record(n) for n in range(3)])
    assert len(list((tmp_path / "train").glob("*.arrow"))) == 3


def test_a_file_that_links_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    with RecordWriter(folder, **WRITER) as writer:
        writer.write(record())
    (arrow,) = folder.glob("*.arrow")
    shutil.move(arrow, tmp_path / "elsewhere.arrow")
    arrow.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(ValueError, match="is a link that leads out of the folder"):
        Records(folder)
    # A folder may lie on another disk as a whole.
    arrow.unlink()
    shutil.move(tmp_path / "elsewhere.arrow", arrow)
    (tmp_path / "linked").symlink_to(folder)
    assert len(Records(tmp_path / "linked")) == 1
