"""The stream at the size of the paper: 3.44 M samples of 116 sources, on an index without pixels.

The index is written with the columns, lists and files of real records, only the images are empty:
opening, locating and counting never look at them. Times are measured by scripts/bench.py; here
memory is bounded and results are compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from biascare.checks.statistics import SourceUse, profile_sources
from biascare.data import transforms
from biascare.data.loader import first
from biascare.data.mixture import GlobalBatchSampler, Mixture, apportion
from biascare.data.transforms import (
    Geometry,
    apply_image,
    decode_image,
    draw_intensity,
    read_image,
)
from biascare.records import FEATURES, Records
from tests.tiny import tiny_record_folder, tiny_stream

ROOT = Path(__file__).parents[2]
NUM_SUB_DATASETS = 110
ROWS_PER_FILE = 2000  # of the real writer
NUM_SEGMENTATION = 2_250_000
LANGUAGE = {
    "pubmedvision": 645_142,
    "mimic_cxr": 368_960,
    "pmc_vqa": 152_603,
    "pathvqa": 19_654,
    "slake": 1_848,
    "vqa_rad": 1_793,
}
NUM_SAMPLES = NUM_SEGMENTATION + sum(LANGUAGE.values())
MODALITIES = ("ct", "mri", "xray", "ultrasound", "dermoscopy", "fundus", "endoscopy", "oct")
TARGETS = tuple(f"target {i}" for i in range(200))


def sub_dataset_sizes(total: int, count: int = NUM_SUB_DATASETS) -> list[int]:
    """A long tail like that of IMed-361M: size i is proportional to 1 / (i + 3)."""
    shares = [Fraction(1, i + 3) for i in range(count)]
    return apportion([share / sum(shares) for share in shares], total)


def index_table(name: str, split: str, num_rows: int, seed: int, *, questions: bool) -> pa.Table:
    """`num_rows` rows with one or two targets, or with one question."""
    rng = np.random.default_rng(seed)
    tail = (rng.pareto(1.0, 2 * num_rows) * 3).astype(np.int64) % len(TARGETS)
    counts = np.zeros(num_rows, np.int64) if questions else 1 + np.arange(num_rows) % 2
    num_targets = int(counts.sum())
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    targets = pa.StructArray.from_arrays(
        [pa.array(TARGETS).take(pa.array(tail[:num_targets])), constant(b"PPYo0", num_targets)],
        ["name", "rle"],
    )
    num_turns = 2 * num_rows if questions else 0
    turns = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant"]).take(pa.array(np.arange(num_turns) % 2)),
            constant("Is there an effusion?", num_turns),
            constant("closed", num_turns),
            pa.ListArray.from_arrays(
                pa.array(np.zeros(num_turns + 1), pa.int32()), pa.array([], pa.string())
            ),
            constant("{}", num_turns),
        ],
        ["role", "text", "kind", "options", "facts"],
    )
    starts = pa.array(np.arange(num_rows + 1) * (2 if questions else 0), pa.int32())
    ages = rng.integers(0, 95, num_rows).astype(float)
    columns: dict[str, Any] = {
        "id": pa.array([f"{name}/{i}" for i in range(num_rows)]),
        "image": constant(b"", num_rows),
        "height": constant(512, num_rows),
        "width": constant(512, num_rows),
        "targets": pa.ListArray.from_arrays(offsets, targets),
        "conversations": pa.ListArray.from_arrays(starts, turns),
        "task": constant("vqa" if questions else "segmentation", num_rows),
        "modality": pa.array(MODALITIES).take(pa.array(rng.integers(0, 8, num_rows))),
        "anatomy": constant("chest", num_rows),
        "labels": pa.ListArray.from_arrays(pa.array(np.zeros(num_rows + 1), pa.int32()), []),
        "source": constant(name, num_rows),
        "split": constant(split, num_rows),
        "patient_id": pa.array([f"p{i // 7}" for i in range(num_rows)]),
        "study_id": pa.nulls(num_rows, pa.string()),
        "sex": pa.array(["F", "M", None]).take(pa.array(rng.integers(0, 3, num_rows))),
        "age": pa.array(ages, mask=ages < 20),
        "race": pa.nulls(num_rows, pa.string()),
        "extra": constant("{}", num_rows),
        "checksum": constant(64 * "0", num_rows),  # wrong: rows are read unchecked here
    }
    schema = FEATURES.arrow_schema
    arrays = [columns[field.name].cast(field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def constant(value: Any, num: int) -> pa.Array:
    return pa.array([value]).take(pa.array(np.zeros(num, np.int64)))


def write_index(
    folder: Path, template: Path, name: str, num_rows: int, seed: int, *, questions: bool
) -> Path:
    """A record folder around the table: the files a converter would leave, without pixels.

    `template` is a folder of the real writer: its manifest, state and file layout are taken over.
    """
    table = index_table(name, "train", num_rows, seed, questions=questions)
    path = folder / name / "train"
    path.mkdir(parents=True)
    starts = range(0, num_rows, ROWS_PER_FILE)
    files = [f"data-{i:05d}-of-{len(starts):05d}.arrow" for i in range(len(starts))]
    for file, start in zip(files, starts, strict=True):
        with pa.OSFile(str(path / file), "wb") as sink:
            batch = table.slice(start, ROWS_PER_FILE).combine_chunks()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_table(batch)
    state = json.loads((template / "state.json").read_text())
    state["_data_files"] = [{"filename": file} for file in files]
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_bytes((template / "dataset_info.json").read_bytes())
    names = table["targets"].combine_chunks().flatten().field("name").value_counts()
    counts = {str(e["values"]): e["counts"] for e in names.to_pylist()}
    manifest = json.loads((template / "manifest.json").read_text()) | {
        "source": name,
        "content_hash": hashlib.sha256(f"{name} {num_rows}".encode()).hexdigest(),
        "num_rows": num_rows,
        "num_segmentation_units": 0 if questions else num_rows,
        "num_language_units": num_rows if questions else 0,
        "num_targets": sum(counts.values()),
        "targets": counts,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    rows = np.arange(num_rows, dtype=np.int64)
    none = np.zeros(0, np.int64)
    pairs = np.stack([rows, 0 * rows], axis=1) if questions else none.reshape(0, 2)
    np.save(path / "segmentation_units.npy", none if questions else rows)
    np.save(path / "language_units.npy", pairs)
    return path


def write_mixture(folder: Path, divisor: int) -> Path:
    """All 116 sources of the paper's size divided by `divisor`; their paths in a JSON file."""
    template = tiny_record_folder(folder / "template", 2)
    sizes = sub_dataset_sizes(NUM_SEGMENTATION // divisor)
    sources: dict[str, list[str]] = {"segmentation": [], "language": []}
    for number, size in enumerate(sizes):
        path = write_index(folder, template, f"sub{number:03d}", size, number, questions=False)
        sources["segmentation"].append(str(path))
    for number, (name, size) in enumerate(LANGUAGE.items()):
        rows = max(1, size // divisor)
        path = write_index(folder, template, name, rows, 1000 + number, questions=True)
        sources["language"].append(str(path))
    index = folder / "sources.json"
    index.write_text(json.dumps(sources))
    return index


OPEN = """
import gc, json, sys, time
import numpy as np, torch
import biascare.data.loader
from biascare.data.mixture import Mixture
from biascare.records import Records
sources = json.load(open(sys.argv[1]))
def private_mib():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024
gc.collect()
before = private_mib()
began, began_cpu = time.perf_counter(), time.process_time()
opened = {task: [Records(path) for path in paths] for task, paths in sources.items()}
mixture = Mixture(
    [(len(r.segmentation_units), None) for r in opened["segmentation"]],
    [(len(r.language_units), None) for r in opened["language"]], seed=0)
open_seconds = time.perf_counter() - began
open_cpu_seconds = time.process_time() - began_cpu
began = time.perf_counter()
items = [mixture.locate(position) for position in range(10**9, 10**9 + 1000)]
locate_seconds = (time.perf_counter() - began) / len(items)
began = time.perf_counter()
ids = []
for item in items[:200]:
    records = opened[item.task][item.source]
    segments = item.task == "segmentation"
    units = records.segmentation_units if segments else records.language_units[:, 0]
    ids.append(records.unchecked(int(units[item.unit]))["id"])
read_seconds = (time.perf_counter() - began) / len(ids)
gc.collect()
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps({
    "open_seconds": open_seconds, "open_cpu_seconds": open_cpu_seconds,
    "locate_seconds": locate_seconds, "read_seconds": read_seconds,
    "num_rows": sum(len(r) for task in opened.values() for r in task), "ids": ids,
    "added_mib": private_mib() - before}), flush=True)
sys.stdin.readline()
"""


def measure(index: Path) -> list[dict[str, Any]]:
    """Open the whole mixture in two processes at once, as ranks and workers do, find and read rows.
    Memory is what no other process can share, Linux's "Anonymous": pages of mapped files belong to
    the page cache, however many processes map them."""
    command = [sys.executable, "-c", OPEN, str(index)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    found = []
    for process in both:
        process.stdin.write("measure\n")
        process.stdin.flush()
        found.append(json.loads(process.stdout.readline()))
    for process, result in zip(both, found, strict=True):
        process.communicate()
        assert process.returncode == 0
        print({name: value for name, value in result.items() if name != "ids"})
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps")
def test_the_papers_mixture_costs_each_process_little_memory(tmp_path: Path) -> None:
    first_process, second_process = measure(write_mixture(tmp_path, divisor=1))
    assert first_process["num_rows"] == NUM_SAMPLES
    assert first_process["ids"] == second_process["ids"]
    assert max(first_process["added_mib"], second_process["added_mib"]) <= 60


# ---------------------------------------------------------------- the order


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    """The paper's: every unit of a task equally often."""
    return Mixture(
        [(size, None) for size in sub_dataset_sizes(NUM_SEGMENTATION)],
        [(size, None) for size in LANGUAGE.values()],
        seed=0,
    )


def test_the_sizes_add_up_to_the_papers_number_of_samples(mixture: Mixture) -> None:
    assert sum(sub_dataset_sizes(NUM_SEGMENTATION)) == NUM_SEGMENTATION
    assert NUM_SAMPLES == 3_440_000


def test_realised_shares_are_within_one_sample_per_block(mixture: Mixture) -> None:
    block = 2**20  # items of one task; the two tasks alternate
    for task, sizes in (
        ("segmentation", sub_dataset_sizes(NUM_SEGMENTATION)),
        ("language", list(LANGUAGE.values())),
    ):
        for blocks in (1, 7):
            drawn = mixture.num_drawn(2 * block * blocks)[task]
            assert sum(drawn) == block * blocks
            wanted = [block * blocks * size / sum(sizes) for size in sizes]
            worst = max(abs(d - w) for d, w in zip(drawn, wanted, strict=True))
            print(f"{task}, {blocks} blocks: largest deviation {worst:.3f} samples")
            assert worst <= blocks


def test_a_far_stretch_of_the_stream_holds_what_was_counted_for_it(mixture: Mixture) -> None:
    start, length = 10**9, 4096
    before, after = mixture.num_drawn(start), mixture.num_drawn(start + length)
    items = [mixture.locate(position) for position in range(start, start + length)]
    found = Counter((item.task, item.source) for item in items)
    for task in ("segmentation", "language"):
        for source, (a, b) in enumerate(zip(before[task], after[task], strict=True)):
            assert found[task, source] == b - a


def test_a_position_is_the_same_for_a_run_that_starts_there(mixture: Mixture) -> None:
    positions = [10**9 + 97 * i for i in range(200)]
    for position in range(1000):  # progress of the first run
        mixture.locate(position)
    fresh = Mixture(
        [(size, None) for size in sub_dataset_sizes(NUM_SEGMENTATION)],
        [(size, None) for size in LANGUAGE.values()],
        seed=0,
    )
    assert [mixture.locate(p) for p in positions] == [fresh.locate(p) for p in reversed(positions)][
        ::-1
    ]


# ---------------------------------------------------------------- ranks and workers


def digest(value: Any) -> str:
    """Of a batch or any part of it: tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return repr([(key, digest(item)) for key, item in sorted(value.items())])
    if isinstance(value, list | tuple):
        return repr([digest(item) for item in value])
    return repr(value)


def batches_of(records: Path, world_size: int, num_workers: int) -> list[str]:
    """Digests of all micro-batches of two steps, in the order of their positions."""
    stream = tiny_stream(records, None)
    found = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(8, 2, rank, world_size, 3, 2)
        loader = DataLoader(
            stream, batch_sampler=sampler, collate_fn=first, num_workers=num_workers
        )
        for positions, batch in zip(sampler, loader, strict=True):
            found.append((positions[0], digest(batch)))
    return [text for _, text in sorted(found)]


@pytest.fixture(scope="module")
def one_process(tiny_records: Path) -> list[str]:
    return batches_of(tiny_records, 1, 0)


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_the_stream_is_the_same_for_any_number_of_ranks_and_workers(
    tiny_records: Path, one_process: list[str], world_size: int, num_workers: int
) -> None:
    assert len(one_process) == 8 and len(set(one_process)) == 8
    assert batches_of(tiny_records, world_size, num_workers) == one_process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 4), (2, 4), (4, 2), (4, 4)])
def test_the_stream_is_the_same_for_many_ranks_with_many_workers(
    tiny_records: Path, one_process: list[str], world_size: int, num_workers: int
) -> None:
    assert batches_of(tiny_records, world_size, num_workers) == one_process


# ---------------------------------------------------------------- columns


def test_statistics_of_many_files_agree_with_a_walk_over_the_rows(tmp_path: Path) -> None:
    template = tiny_record_folder(tmp_path / "template", 2)
    masks = Records(write_index(tmp_path, template, "sub", 2400, 0, questions=False))
    asked = Records(write_index(tmp_path, template, "vqa", 800, 1, questions=True))
    uses = [SourceUse(masks, "segmentation", 300), SourceUse(asked, "language", 100)]
    profile = profile_sources(uses)
    rows = [records.unchecked(i) for records in (masks, asked) for i in range(len(records))]
    for axis in ("modality", "sex"):
        expected = Counter("missing" if row[axis] is None else row[axis] for row in rows)
        assert profile[axis].raw == expected
    names = Counter(t["name"] for row in rows for t in row["targets"])
    assert profile["target"].raw == names
    decades = Counter(
        "missing" if row["age"] is None else f"{int(row['age'] // 10) * 10}" for row in rows
    )
    found = {band.split("-")[0].rstrip("+"): n for band, n in profile["age"].raw.items()}
    assert found == decades
    shares = Counter[str]()
    for records, weight in ((masks, 0.75), (asked, 0.25)):
        for i in range(len(records)):
            shares[records.unchecked(i)["modality"]] += weight / len(records)
    assert profile["modality"].stream == pytest.approx(dict(shares))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P", "I;16"])
@pytest.mark.parametrize("flip", [False, True])
def test_reading_straight_to_the_model_size_gives_the_very_same_pixels(
    mode: str, flip: bool
) -> None:
    rng = np.random.default_rng(len(mode))
    colours = Image.fromarray(rng.integers(0, 256, (37, 53, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 4096, (37, 53)).astype(np.uint16))
    buffer = io.BytesIO()
    (deep if mode == "I;16" else colours.convert(mode)).save(buffer, "PNG")
    geometry = Geometry(x0=2, y0=0.5, x1=50.25, y1=37, flip=flip, size=24)
    expected = apply_image(decode_image(buffer.getvalue()), geometry)
    found = read_image(buffer.getvalue(), geometry)
    assert found.shape == (24, 24, 3) and found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("side", "reduction"), [(300, 1), (704, 2), (1601, 4), (3001, 8)])
def test_a_large_jpeg_is_reduced_while_it_is_decoded_and_stays_in_place(
    side: int, reduction: int
) -> None:
    rng = np.random.default_rng(side)
    pixels = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    large = np.array(pixels.resize((side, side), Image.Resampling.BICUBIC))
    lesion = side // 3, side // 100 + 1
    large[lesion[0] : sum(lesion), lesion[0] : sum(lesion)] = 255
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, "JPEG", quality=95)
    geometry = Geometry(x0=20, y0=11, x1=side, y1=side - 7, flip=True, size=256)

    _, used = transforms._decode(buffer.getvalue(), geometry)
    found = read_image(buffer.getvalue(), geometry).astype(float)

    expected = apply_image(decode_image(buffer.getvalue()), geometry).astype(float)
    assert used == reduction
    assert np.abs(found - expected).mean() < 1
    assert np.abs(found - expected).max() < 40 if reduction > 1 else (found == expected).all()


def test_a_grey_image_is_augmented_in_one_channel_as_in_three() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    geometry = Geometry.full(40, 50, 32)

    found = read_image(buffer.getvalue(), geometry, intensity_key=5)

    expected = draw_intensity(apply_image(decode_image(buffer.getvalue()), geometry), 5)
    np.testing.assert_array_equal(found, expected)
