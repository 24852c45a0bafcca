"""Records to batches: the same positions give the same tensors, and nothing is lost quietly."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biascare.data import loader as module
from biascare.data.heldout import (
    HeldOut,
    HeldOutBatch,
    HeldOutImages,
    HeldOutQuestions,
    heldout_loader,
)
from biascare.data.loader import (
    MAX_REPLACEMENTS,
    TrainingStream,
    collate,
    to_device,
    training_loader,
)
from biascare.data.mixture import GlobalBatchSampler
from biascare.data.prevalence import prevalence_groups, total_counts
from biascare.data.prompts import first_point
from biascare.data.transforms import Geometry, apply_image, decode_image, names_side, read_image
from biascare.interfaces import Batch
from biascare.records import Records, decode_mask
from biascare.settings.keys import DataConfig
from tests.tiny import (
    HEIGHT,
    IMAGE_SIZE,
    SETTINGS,
    TARGETS,
    WIDTH,
    pad_token_id,
    rows_of,
    segmentation_sample,
    tiny_batch,
    tiny_chat,
    tiny_record,
    tiny_record_folder,
    tiny_stream,
    write_records,
)


def assert_same(first: Any, second: Any) -> None:
    """Equal batches, tensor by tensor."""
    assert type(first) is type(second)
    if torch.is_tensor(first):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def batches(stream: TrainingStream, num_workers: int, steps: int = 3) -> list[Batch]:
    sampler = GlobalBatchSampler(4, 4, 0, 1, 0, steps)
    return list(training_loader(stream, sampler, num_workers))


# ---------------------------------------------------------------- determinism and layout


def test_the_same_positions_give_the_same_tensors_in_any_process(
    tiny_records: Path, mllm_folder: Path
) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(mllm_folder))
    alone, workers = batches(stream, 0), batches(stream, 2)
    assert len(alone) == len(workers) == 3
    assert_same(alone, workers)
    assert len({batch.seed for batch in alone}) == 3


def test_a_stream_can_be_sent_to_another_process(tiny_records: Path, tiny_mllm: Path) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm))
    copy = pickle.loads(pickle.dumps(stream))
    assert_same(stream.__getitems__([0, 1]), copy.__getitems__([0, 1]))


def test_another_seed_gives_another_stream(tiny_records: Path, tiny_mllm: Path) -> None:
    chat = tiny_chat(tiny_mllm)
    first, second = (
        tiny_stream(tiny_records, chat, SETTINGS._replace(seed=seed)).__getitems__([0, 1])[0]
        for seed in (0, 1)
    )
    assert first.seed != second.seed
    assert first.images is not None and second.images is not None
    assert not torch.equal(first.images, second.images)


def test_a_batch_holds_segmentation_rows_first_then_as_many_questions(
    tiny_records: Path, mllm_folder: Path
) -> None:
    chat = tiny_chat(mllm_folder)
    stream = tiny_stream(tiny_records, chat, SETTINGS._replace(targets_per_image=3))
    batch = stream.__getitems__([0, 1, 2, 3])[0]
    assert [facts.task for facts in batch.facts] == ["segmentation"] * 6 + ["language"] * 2
    assert batch.images is not None and batch.masks is not None and batch.prompts is not None
    assert batch.images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.images.dtype == batch.masks.dtype == torch.uint8
    assert batch.masks.shape == (6, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.prompts.point_coords.shape == (6, 3, 2)
    assert batch.row_image is not None and batch.row_image.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.row_sequence is not None and batch.row_sequence.tolist() == list(range(6))
    assert batch.image_slots == [0, 0, 0, 1, 1, 1, 2, 3]
    assert len(batch.mllm_inputs["input_ids"]) == 8
    assert batch.prompt_mask is not None
    assert not batch.prompt_mask[batch.mllm_inputs["attention_mask"] == 0].any()
    names = [facts.target for facts in batch.facts[:6]]
    assert batch.row_target is not None
    numbers = batch.row_target.tolist()
    assert len(set(zip(names, numbers, strict=True))) == len(set(names)) == len(set(numbers))


def test_each_distinct_image_is_processed_once_for_the_language_model(
    tiny_records: Path, tiny_llava: Path
) -> None:
    stream = tiny_stream(
        tiny_records, tiny_chat(tiny_llava), SETTINGS._replace(targets_per_image=3)
    )
    batch = stream.__getitems__([0, 1, 2, 3])[0]
    assert len(batch.mllm_inputs["pixel_values"]) == 4


def test_facts_name_the_sample_its_attributes_and_its_prevalence_group(
    tiny_records: Path, tiny_mllm: Path
) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm))
    stream.groups = {"liver": "head"}
    sample = next(s for s in map(stream.__getitem__, range(0, 16, 2)) if s.facts[0].sex is None)
    facts = sample.facts[0]
    row = next(r for r in rows_of(stream.sources["segmentation"][0]) if r["id"] == facts.image_id)
    for name in ("modality", "anatomy", "source", "patient_id", "sex", "age", "race"):
        assert getattr(facts, name) == row[name]
    assert facts.prevalence == {"liver": "head"}.get(facts.target or "", "unseen")
    assert sample.replaced == () and sample.position is not None and sample.position % 2 == 0
    assert stream[1].facts[0].prevalence is None  # questions have no prevalence group


def test_the_vision_stage_needs_no_chat(tiny_records: Path) -> None:
    batch = tiny_batch(tiny_records, None)
    assert batch.mllm_inputs == {} and batch.image_slots == []
    assert batch.row_sequence is batch.prompt_mask is batch.answer_tokens is None
    assert batch.images is not None and batch.masks is not None and batch.prompts is not None
    assert batch.images.shape[0] == batch.masks.shape[0] == 4
    assert all((labels >= 0).any() for labels in batch.prompts.point_labels)


def test_to_device_moves_every_tensor_however_nested(tiny_records: Path, tiny_mllm: Path) -> None:
    batch = tiny_batch(tiny_records, tiny_chat(tiny_mllm))
    moved = to_device(batch, torch.device("meta"))
    found: list[str] = []

    def visit(value: Any) -> None:
        if torch.is_tensor(value):
            found.append(value.device.type)
        elif isinstance(value, (dict, tuple)):
            for inner in value.values() if isinstance(value, dict) else value:
                visit(inner)

    visit(moved)
    assert len(found) > 10 and set(found) == {"meta"}
    assert moved.facts == batch.facts and moved.image_slots == batch.image_slots


# ---------------------------------------------------------------- what augmentation may not do


def geometries(stream: TrainingStream, monkeypatch: pytest.MonkeyPatch) -> list[Geometry]:
    """Grows by the geometry of each image the stream makes."""
    used: list[Geometry] = []

    def spy(data: bytes, geometry: Geometry, **options: Any) -> Any:
        used.append(geometry)
        return read_image(data, geometry, **options)

    monkeypatch.setattr(module, "read_image", spy)
    return used


def test_an_image_is_never_mirrored_where_a_text_names_a_side(
    tiny_records: Path, tiny_mllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm))
    used = geometries(stream, monkeypatch)
    flips: Counter[tuple[str, bool, bool]] = Counter()
    for position in range(160):
        sequence = stream[position].sequences[0]
        text = stream.chat.tokenizer.decode(sequence["input_ids"]) if stream.chat else ""
        task = "language" if position % 2 else "segmentation"
        flips[task, names_side(text), used[-1].flip] += 1
    print(flips)
    for task in ("segmentation", "language"):
        assert flips[task, True, False] > 0 and flips[task, True, True] == 0
        assert flips[task, False, True] > 10 and flips[task, False, False] > 10


def test_a_ct_is_not_mirrored_by_default(
    tiny_records: Path, tiny_mllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DataConfig().flip == "safe"
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm))
    stream.settings = stream.settings._replace(flip="safe")
    used = geometries(stream, monkeypatch)
    for position in range(60):
        stream[position]
    assert len(used) == 60 and not any(geometry.flip for geometry in used)


def test_an_image_with_a_question_is_never_cropped(
    tiny_records: Path, tiny_mllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm))
    used = geometries(stream, monkeypatch)
    for position in range(40):
        stream[position]
    whole = [g[:4] == (0, 0, WIDTH, HEIGHT) for g in used]
    assert all(whole[1::2])
    assert not all(whole[0::2])


def test_without_augmentation_an_image_is_only_resized(tiny_records: Path, tiny_mllm: Path) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm), SETTINGS._replace(augment=False))
    sample = stream[0]
    row = next(
        r for r in rows_of(stream.sources["segmentation"][0]) if r["id"] == sample.facts[0].image_id
    )
    whole = Geometry.full(HEIGHT, WIDTH, IMAGE_SIZE)
    resized = apply_image(decode_image(row["image"]), whole)
    assert sample.image is not None
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), resized)


def test_a_target_of_one_pixel_reaches_the_batch(tmp_path: Path) -> None:
    masks = [tiny_record(0, "train").targets[-1]]
    assert masks[0][1].sum() == 1
    record = tiny_record(0, "train")
    folder = write_records(tmp_path / "one", [type(record)(**(vars(record) | {"targets": masks}))])
    batch = tiny_batch(folder, None, micro_batch=24)
    assert batch.masks is not None and batch.prompts is not None
    assert (batch.masks.flatten(1).sum(1) >= 1).all()
    for row, labels in enumerate(batch.prompts.point_labels):
        for (x, y), label in zip(
            batch.prompts.point_coords[row].int().tolist(), labels, strict=True
        ):
            assert label != 1 or batch.masks[row, y, x] == 1


# ---------------------------------------------------------------- targets


def test_k_targets_are_distinct_while_there_are_enough_and_repeat_in_turn_after_that(
    tiny_records: Path,
) -> None:
    stream = tiny_stream(tiny_records, None, SETTINGS._replace(targets_per_image=3))
    for position in range(16):
        names = [facts.target for facts in stream[position].facts]
        row = next(
            r
            for r in rows_of(stream.sources["segmentation"][0])
            if r["id"] == stream[position].facts[0].image_id
        )
        available = len(row["targets"])
        assert len(names) == 3 and len(set(names)) == min(3, available)
        assert names[: min(3, available)] == list(dict.fromkeys(names))


def test_rare_targets_are_drawn_more_often_than_their_share(tiny_records: Path) -> None:
    stream = tiny_stream(tiny_records, None)
    stream.counts = {"liver": 900, "lesion": 9}
    for power, expected in ((0.0, 1 / 2), (0.5, 1 / (1 + 0.1)), (1.0, 1 / (1 + 0.01))):
        stream.settings = SETTINGS._replace(target_sampling_power=power)
        drawn = [stream._draw_targets(["liver", "lesion"], key)[0] for key in range(400)]
        share = sum(drawn) / len(drawn)
        assert abs(share - expected) < 0.08  # three standard deviations of the first


# ---------------------------------------------------------------- unreadable samples


def spoil(stream: TrainingStream, bad: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the image bytes of some rows, as a damaged disk would."""
    original = Records.__getitem__

    def damaged(self: Records, index: int) -> dict[str, Any]:
        row = original(self, index)
        return row | {"image": row["image"][:40]} if row["id"] in bad else row

    monkeypatch.setattr(Records, "__getitem__", damaged)


def test_an_unreadable_sample_is_replaced_by_the_next_of_its_source_and_reported(
    tiny_records: Path, tiny_mllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm))
    before = [stream[position] for position in range(16)]
    bad = before[0].facts[0].image_id
    spoil(stream, {bad}, monkeypatch)
    first = [stream[position] for position in range(16)]
    again = [stream[position] for position in range(16)]
    for was, now, twice in zip(before, first, again, strict=True):
        assert_same(now.facts, twice.facts)
        if was.facts[0].image_id == bad:
            assert now.facts[0].image_id != bad and now.facts[0].task == was.facts[0].task
            assert now.replaced[0].startswith(f"{bad}: image: got 40 bytes")
        else:
            assert_same(was.facts, now.facts)
    number = int(bad.rsplit("/", 1)[1])
    assert first[0].facts[0].image_id == f"tiny/train/{(number + 1) % 8}"


def test_a_sample_whose_bytes_were_altered_is_replaced_and_reported(tmp_path: Path) -> None:
    folder = tiny_record_folder(tmp_path / "train")
    before = tiny_stream(folder, None)[0].facts[0].image_id
    rle = next(r for r in rows_of(Records(folder)) if r["id"] == before)["targets"][0]["rle"]
    (shard,) = folder.glob("*.arrow")
    data = shard.read_bytes()
    assert data.count(rle) == 1
    shard.write_bytes(data.replace(rle, bytes([rle[0] ^ 1]) + rle[1:]))
    sample = tiny_stream(folder, None)[0]
    assert sample.facts[0].image_id != before
    (reason,) = sample.replaced
    assert reason.startswith(f"{before}: ") and "were altered after they were written" in reason


def test_a_conversation_that_is_too_long_is_replaced_and_reported(
    tiny_records: Path, tiny_mllm: Path
) -> None:
    stream = tiny_stream(tiny_records, tiny_chat(tiny_mllm, max_tokens=34))
    samples = [stream[position] for position in range(1, 32, 2)]
    reasons = [reason for sample in samples for reason in sample.replaced]
    assert reasons and all("data.max_tokens = 34" in reason for reason in reasons)
    assert all(len(sample.sequences[0]["input_ids"]) <= 34 for sample in samples)


def test_a_source_of_unreadable_samples_stops_the_run_with_the_last_reason(
    tiny_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny_stream(tiny_records, None)
    spoil(stream, {f"tiny/train/{index}" for index in range(8)}, monkeypatch)
    with pytest.raises(ValueError, match=rf"{MAX_REPLACEMENTS} samples in a row of .*decode"):
        stream[0]


def test_a_defect_of_the_program_is_not_taken_for_a_bad_sample(
    tiny_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(module, "read_image", broken)
    with pytest.raises(TypeError, match="a defect"):
        tiny_stream(tiny_records, None)[0]


# ---------------------------------------------------------------- collation by hand


def test_padding_goes_to_the_side_that_is_asked_for(tiny_llava: Path) -> None:
    chat = tiny_chat(tiny_llava)
    samples = [
        segmentation_sample(chat, 1, ("liver",)),
        segmentation_sample(chat, 2, ("left kidney",)),
    ]
    lengths = [len(s.sequences[0]["input_ids"]) for s in samples]
    assert lengths[0] != lengths[1]
    short, long = (0, 1) if lengths[0] < lengths[1] else (1, 0)
    for side, edge in (("left", slice(0, 1)), ("right", slice(-1, None))):
        batch = collate(samples, 0, pad_token_id(chat), padding_side=side)
        assert batch.mllm_inputs["attention_mask"].sum(1).tolist() == lengths
        assert (batch.mllm_inputs["attention_mask"][short, edge] == 0).all()
        assert (batch.mllm_inputs["input_ids"][short, edge] == pad_token_id(chat)).all()
        assert batch.mllm_inputs["attention_mask"][long].all()
        assert batch.prompt_mask is not None
        assert torch.equal(batch.prompt_mask, batch.mllm_inputs["attention_mask"].bool())
        assert batch.answer_tokens is not None and len(batch.answer_tokens) == 0


# ---------------------------------------------------------------- prevalence


def test_groups_are_the_ones_computed_by_hand() -> None:
    counts = {"liver": 50, "spleen": 25, "aorta": 15, "adrenal": 6, "duct": 4}
    # Half of 100 is the liver alone; a tenth is duct (4) and adrenal (6).
    assert prevalence_groups(counts, 0.5, 0.1) == {
        "liver": "head",
        "spleen": "medium",
        "aorta": "medium",
        "adrenal": "tail",
        "duct": "tail",
    }
    # 51 % needs the spleen too; 9 % leaves the adrenal out of the tail.
    groups = prevalence_groups(counts, 0.51, 0.09)
    assert groups["spleen"] == "head" and groups["adrenal"] == "medium"
    # The rarest is tail, however common; the only one is head.
    assert prevalence_groups({"a": 10, "b": 9}, 0.5, 0.1) == {"a": "head", "b": "tail"}
    assert prevalence_groups({"a": 10}, 0.5, 0.1) == {"a": "head"}
    assert prevalence_groups({}, 0.5, 0.1) == {}


def test_targets_of_equal_count_are_in_one_group_whatever_their_names() -> None:
    assert prevalence_groups({"a": 10, "b": 10}, 0.5, 0.1) == {"a": "head", "b": "head"}
    counts = {"cup": 12, "disc": 12, "liver": 30, "mole": 2, "spleen": 2}
    groups = prevalence_groups(counts, 0.6, 0.05)  # 42 of 58 need both twelves; 4 exceed 2.9
    assert groups == {
        "liver": "head",
        "cup": "head",
        "disc": "head",
        "mole": "tail",
        "spleen": "tail",
    }


COUNTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 50), max_size=12)


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, head=st.integers(1, 10), tail=st.integers(0, 10))
def test_every_target_has_one_group_and_the_shares_hold(
    counts: dict[str, int], head: int, tail: int
) -> None:
    tail = min(tail, 10 - head)
    groups = prevalence_groups(counts, head / 10, tail / 10)
    assert groups.keys() == counts.keys()
    assert set(groups.values()) <= {"head", "medium", "tail"}
    shuffled = dict(sorted(counts.items(), reverse=True))
    assert prevalence_groups(shuffled, head / 10, tail / 10) == groups
    held = {g: [counts[n] for n in groups if groups[n] == g] for g in ("head", "medium", "tail")}
    total = sum(counts.values())
    if len(set(held["tail"])) > 1:
        assert 10 * sum(held["tail"]) <= tail * total + 1e-6
    if len(set(counts.values())) > 1:
        assert held["tail"] and min(held["tail"]) == min(counts.values())
    for first, second in itertools.combinations(counts, 2):
        assert counts[first] != counts[second] or groups[first] == groups[second]
        order = [c for g in ("tail", "medium", "head") for c in sorted(held[g])]
        assert order == sorted(order)


def test_counts_of_several_sources_add_up() -> None:
    assert total_counts([{"a": 1, "b": 2}, {"b": 3}]) == {"a": 1, "b": 5}


# ---------------------------------------------------------------- held-out records


@pytest.fixture(scope="module")
def heldout_records(tmp_path_factory: pytest.TempPathFactory) -> list[Records]:
    folder = tmp_path_factory.mktemp("heldout")
    return [
        Records(tiny_record_folder(folder / "first", 5, "test")),
        Records(tiny_record_folder(folder / "second", 4, "val")),
    ]


def share(items: HeldOut, batch_size: int, rank: int, world_size: int) -> list[HeldOutBatch]:
    whole = range(len(items))
    return list(heldout_loader(items, whole, batch_size, rank=rank, world_size=world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_target_is_evaluated_once_over_all_ranks_in_as_many_batches_each(
    heldout_records: list[Records], world_size: int, batch_size: int
) -> None:
    items = HeldOutImages(heldout_records, None, {"liver": "head"}, image_size=IMAGE_SIZE)
    assert len(items) == 9
    shares = [share(items, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in shares}) == 1
    seen = Counter(
        (item.facts.image_id, item.facts.target)
        for batches in shares
        for held in batches
        for item, repeated in zip(held.items, held.repeated, strict=True)
        if not repeated
    )
    wanted = {
        (row["id"], t["name"])
        for r in heldout_records
        for row in rows_of(r)
        for t in row["targets"]
    }
    assert set(seen) == wanted and set(seen.values()) == {1}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_question_of_the_answered_kinds_is_asked_once_over_all_ranks(
    heldout_records: list[Records], tiny_mllm: Path, world_size: int
) -> None:
    chat = tiny_chat(tiny_mllm)
    items = HeldOutQuestions(heldout_records, chat, {}, image_size=IMAGE_SIZE)
    shares = [share(items, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in shares}) == 1
    seen = Counter(
        item.id
        for batches in shares
        for held in batches
        for item, repeated in zip(held.items, held.repeated, strict=True)
        if not repeated
    )
    wanted = {
        f"{row['id']}/{turn}"
        for records in heldout_records
        for row in rows_of(records)
        for turn in range(0, len(row["conversations"]), 2)
        if row["conversations"][turn]["kind"] != "report"
    }
    assert set(seen) == wanted and set(seen.values()) == {1}


def test_questions_come_without_answers_and_padded_for_generation(
    heldout_records: list[Records], tiny_mllm: Path
) -> None:
    chat = tiny_chat(tiny_mllm)
    items = HeldOutQuestions(heldout_records, chat, {}, image_size=IMAGE_SIZE)
    batch, asked, _ = share(items, 4, 0, 1)[0]
    assert batch.answer_tokens is not None and len(batch.answer_tokens) == 0
    assert batch.images is None and batch.masks is None
    assert batch.mllm_inputs["attention_mask"][:, -1].all()
    assert [item.answer.text for item in asked] == ["yes", "no", "CT", "the liver"]
    assert asked[0].question.text == "Is the liver visible?"
    assert [item.question.options for item in asked] == [(), (), ("CT", "MR"), ()]
    assert [f.kind for f in batch.facts] == ["closed", "closed", "choice", "open"]
    assert {f.target for f in batch.facts} == {None}


def test_held_out_images_are_whole_and_prompted_by_the_first_click(
    heldout_records: list[Records],
) -> None:
    items = HeldOutImages(heldout_records, None, {"liver": "head"}, image_size=IMAGE_SIZE)
    batch, shown, _ = share(items, 2, 0, 1)[0]
    assert batch.prompts is not None and batch.masks is not None
    for r, item in enumerate(shown):
        mask = decode_mask(item.truth, item.height, item.width)
        x, y = first_point(mask)
        assert item.points == [(x, y, 1)] and mask[y, x] == 1
        scaled = [(x + 0.5) * IMAGE_SIZE / WIDTH - 0.5, (y + 0.5) * IMAGE_SIZE / HEIGHT - 0.5]
        assert batch.prompts.point_coords[r, 0].tolist() == pytest.approx(scaled, abs=1e-4)
        assert batch.masks[r].any()
    assert batch.prompts.point_labels.tolist() == [[1]] * len(batch.facts)
    assert {item.facts.target for item in shown} == set(TARGETS)
    assert batch.facts[0].prevalence == "head" and batch.facts[0].split == "test"
    assert batch.facts[1].prevalence == "unseen"


def test_held_out_instructions_are_always_the_canonical_ones(
    heldout_records: list[Records], tiny_mllm: Path
) -> None:
    chat = tiny_chat(tiny_mllm)
    items = HeldOutImages(heldout_records, chat, {}, image_size=IMAGE_SIZE)
    first, second = share(items, 3, 0, 1), share(items, 3, 0, 1)
    assert_same(first, second)
    text = chat.tokenizer.decode(first[0].batch.mllm_inputs["input_ids"][0])
    assert "Segment the liver in this MR image." in text


@pytest.mark.parametrize("limit, expected", [(1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (0, None)])
def test_a_limit_takes_evenly_spaced_items(
    heldout_records: list[Records], limit: int, expected: list[int] | None
) -> None:
    everything = HeldOutImages(heldout_records, None, {}, image_size=IMAGE_SIZE)
    limited = HeldOutImages(heldout_records, None, {}, image_size=IMAGE_SIZE, limit=limit)
    wanted = range(9) if expected is None else expected
    assert limited.units == [everything.units[i] for i in wanted]


@settings(deadline=None, max_examples=40)
@given(num=st.integers(0, 40), batch_size=st.integers(1, 7), world_size=st.integers(1, 5))
def test_ranks_cover_any_number_of_items_with_equally_many_batches(
    num: int, batch_size: int, world_size: int
) -> None:
    class Numbers(HeldOut):
        def __init__(self, count: int) -> None:
            self.units: list[Any] = list(range(count))

        def _units(self, source: Records) -> list[Any]:
            return self.units

        def case_keys(self) -> list[list[str]]:
            return [[str(unit)] for unit in self.units]

        def _sample(self, source: Records, unit: Any) -> Any:
            raise AssertionError("numbers are never opened")

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [indices]

    shares: list[list[Any]] = [
        list(heldout_loader(Numbers(num), range(num), batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in shares}) == 1
    indices = [index for batches in shares for batch in batches for index in batch]
    assert sorted(index for index in indices if index >= 0) == list(range(num))
    assert all(0 <= -1 - index < num for index in indices if index < 0)
    assert all(0 < len(batch) <= batch_size for batches in shares for batch in batches)
