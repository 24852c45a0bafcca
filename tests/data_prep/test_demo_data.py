"""The embedded data set keeps what its tables state, and its answers follow from its masks."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biascare.data.chat import answer_text, question_text
from biascare.records import Records, Turn, decode_mask
from data_prep import demo
from data_prep.embedded import draws, questions, tables
from data_prep.embedded.renderers import RENDERERS, Look, Rendering, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with both biases."""
    output = tmp_path_factory.mktemp("demo")
    demo.generate(output, size="tiny", seed=3, bias="both")
    return output


def test_worker_processes_write_the_same_records(folder: Path, tmp_path: Path) -> None:
    demo.generate(tmp_path, size="tiny", seed=3, bias="both", num_workers=2)

    for split in ("train", "val", "test"):
        expected = Records(folder / split).manifest["content_hash"]
        assert Records(tmp_path / split).manifest["content_hash"] == expected


def _rows(folder: Path, split: str) -> list[dict]:
    records = Records(folder / split)
    return [records[index] for index in range(len(records))]


def _all_rows(folder: Path) -> list[dict]:
    return [row for split in ("train", "val", "test") for row in _rows(folder, split)]


def _masks(row: dict) -> dict[str, np.ndarray]:
    size = row["height"], row["width"]
    return {t["name"]: decode_mask(t["rle"], *size).astype(bool) for t in row["targets"]}


def _pairs(row: dict) -> list[tuple[str, str, str]]:
    """Kind, question and answer as a language model reads them."""
    turns = [Turn(**turn) for turn in row["conversations"]]
    return [
        (asked.kind, question_text(asked), answer_text(asked, answered))
        for asked, answered in zip(turns[::2], turns[1::2], strict=True)
    ]


def _mask_with(left: int, right: int) -> np.ndarray:
    """A [8, 8] mask with so many pixels in the left and in the right half."""
    mask = np.zeros((8, 8), bool)
    mask[np.arange(left) % 8, np.arange(left) // 8] = True
    mask[np.arange(right) % 8, 4 + np.arange(right) // 8] = True
    return mask


def _facts(seed: int, modality: str) -> questions.Observation:
    """Facts of one image as drawn from the tables, with made-up sizes; nothing is rendered."""
    patient = draws.draw_patient(seed, "train", modality, 0)
    truth = draws.draw_truth(seed, draws.Case(patient, 1), "none")
    rng = np.random.default_rng(seed)
    shares = {name: float(rng.uniform(0.001, 0.3)) for name in truth.present}
    sides = {name: (None, "left", "right")[rng.integers(3)] for name in shares}
    return questions.Observation(modality, shares, sides)


def _cases(size: str, seed: int = 0) -> list[draws.Case]:
    return draws.plan(size, seed, "train")


def test_same_seed_gives_the_same_bytes_whatever_the_order(folder: Path) -> None:
    cases = draws.plan("tiny", 3, "val")
    again = {r.id: r for r in (demo.make_record(c, 3, "both", 128) for c in reversed(cases))}
    for row in _rows(folder, "val"):
        assert row["image"] == again[row["id"]].image
        assert [t["name"] for t in row["targets"]] == [name for name, _ in again[row["id"]].targets]
        turns = [turn._asdict() for turn in again[row["id"]].conversations]
        assert row["conversations"] == turns


def test_another_seed_gives_other_images() -> None:
    first, second = (demo.make_record(_cases("tiny", s)[0], s, "none", 64) for s in (0, 1))
    assert first.image != second.image


def test_no_patient_occurs_in_two_splits_or_modalities() -> None:
    home: dict[str, set[tuple[str, str]]] = {}
    for split in ("train", "val", "test"):
        for case in draws.plan("small", 0, split):
            row = case.patient
            name = f"{row.split}-{row.modality}-{row.number}"
            home.setdefault(name, set()).add((split, row.modality))
    assert all(len(places) == 1 for places in home.values())


def test_patients_have_one_to_three_images_and_constant_attributes() -> None:
    images = Counter(case.patient for case in _cases("small"))
    assert set(images.values()) == {1, 2, 3}
    numbers = Counter((p.modality, p.number) for p in images)
    assert set(numbers.values()) == {1}


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_every_split_has_its_size_and_every_modality(size: str) -> None:
    for split, num_images in tables.NUM_IMAGES[size].items():
        modalities = Counter(case.patient.modality for case in draws.plan(size, 0, split))
        assert sum(modalities.values()) == num_images
        assert set(modalities) == set(tables.AVAILABILITY)


def test_modality_counts_follow_the_availability_table() -> None:
    # 1193 images beyond one each: xray 1 + 274.39, endoscopy 1 + 47.72 rounded up.
    quota = draws._quota(1200)
    assert quota["ct"] == 359
    assert quota["xray"] == 275
    assert quota["endoscopy"] == 49
    assert list(quota.values()) == sorted(quota.values(), reverse=True)


def test_tables_are_consistent() -> None:
    assert set(tables.TARGETS) == set(tables.AVAILABILITY) == set(tables.ANATOMY) == set(RENDERERS)
    assert sum(tables.AVAILABILITY.values()) == pytest.approx(1)
    assert sum(tables.RACE_SHARES.values()) == pytest.approx(1)
    for targets in tables.TARGETS.values():
        names = list(targets)
        for name, target in targets.items():
            assert all(names.index(organ) < names.index(name) for organ in target.needs)


@pytest.mark.parametrize("modality", ["ct", "mri", "endoscopy"])
def test_each_target_is_as_frequent_as_its_table_says(modality: str) -> None:
    patients = [draws.draw_patient(1, "train", modality, number) for number in range(700)]
    shown = [draws.draw_truth(1, draws.Case(patient, 2), "none").present for patient in patients]
    for name, target in tables.TARGETS[modality].items():
        possible = [p for p in shown if not target.needs or set(target.needs) & set(p)]
        rate = np.mean([name in present for present in possible])
        assert rate == pytest.approx(target.prevalence, abs=0.06), name


def test_targets_are_long_tailed_in_the_training_split() -> None:
    truths = [draws.draw_truth(0, case, "none") for case in _cases("small")]
    counts = Counter(name for truth in truths for name in truth.present)
    ordered = [count for _, count in counts.most_common()]
    assert len(ordered) == 28
    assert sum(ordered[:9]) > 0.6 * sum(ordered)
    assert ordered[-1] < 0.04 * ordered[0]
    assert {"liver", "left lung"} <= {name for name, _ in counts.most_common(5)}
    assert {"instrument", "ulcer", "microbleed"} <= {name for name, _ in counts.most_common()[-6:]}


def _prevalence_gap(bias: str, split: str) -> tuple[float, float]:
    """Share of brain tumors among the images of women and of men, of 500 patients."""
    found: dict[str, list[int]] = {"F": [], "M": []}
    for number in range(500):
        patient = draws.draw_patient(0, split, "mri", number)
        present = draws.draw_truth(0, draws.Case(patient, 1), bias).present
        found[patient.sex].append("brain tumor" in present)
    return float(np.mean(found["F"])), float(np.mean(found["M"]))


def test_planted_prevalence_is_in_the_training_split_and_absent_without_bias() -> None:
    women, men = _prevalence_gap("both", "train")
    assert women == pytest.approx(0.35 * 0.45, abs=0.06)
    assert men == pytest.approx(0.45, abs=0.08)
    for bias, split in (("none", "train"), ("appearance", "train"), ("both", "test")):
        women, men = _prevalence_gap(bias, split)
        assert abs(women - men) < 0.11, (bias, split)


def test_planted_appearance_follows_race_and_age_and_is_absent_without_bias() -> None:
    for number in range(300):
        patient = draws.draw_patient(0, "test", "ct", number)
        case = draws.Case(patient, 1)
        truth = draws.draw_truth(0, case, "both")
        assert truth.contrast == (0.5 if patient.race == "group C" else 1.0)
        assert truth.noise == (2.0 if patient.age >= 60 else 1.0)
        for bias in ("none", "prevalence"):
            plain = draws.draw_truth(0, case, bias)
            assert (plain.contrast, plain.noise) == (1.0, 1.0)


def test_without_bias_attributes_do_not_reach_the_image() -> None:
    case = _cases("tiny")[0]
    other = case.patient._replace(sex="F", age=80.0, race="group C")
    plain = demo.make_record(case, 0, "none", 64)
    assert demo.make_record(case._replace(patient=other), 0, "none", 64).image == plain.image
    assert demo.make_record(case._replace(patient=other), 0, "appearance", 64).image != plain.image


def test_appearance_bias_leaves_masks_and_answers_alone(folder: Path) -> None:
    for case in draws.plan("tiny", 3, "test"):
        plain = demo.make_record(case, 3, "none", 64)
        biased = demo.make_record(case, 3, "appearance", 64)
        assert plain.conversations == biased.conversations
        for (_, expected), (_, mask) in zip(plain.targets, biased.targets, strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_planted_bias_file_states_what_was_planted(folder: Path) -> None:
    planted = json.loads((folder / "planted_bias.json").read_text())
    assert [e["attribute"] for e in planted["effects"]] == ["sex", "race", "age"]
    women = sum(row["sex"] == "F" for row in _rows(folder, "train"))
    assert planted["effects"][0]["images_in_group"]["train"] == women
    assert draws.planted_bias({"train": []}, 0, "none")["effects"] == []


def test_masks_are_never_empty_and_findings_lie_in_their_organ(folder: Path) -> None:
    for row in _all_rows(folder):
        masks = _masks(row)
        assert all(mask.any() for mask in masks.values())
        assert set(masks) == set(row["extra"]["radius"])
        for name, organ in (("ulcer", "skin lesion"), ("gallstone", "gallbladder")):
            if name in masks:
                assert masks[name][masks[organ]].sum() >= 0.9 * masks[name].sum()


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), radius=st.floats(1e-6, 0.02), size=st.sampled_from([64, 100]))
def test_a_finding_smaller_than_a_pixel_keeps_a_pixel_near_the_brain(
    seed: int, radius: float, size: int
) -> None:
    rng = np.random.default_rng(seed)
    present = {"brain": 0.0, "ventricles": 0.0, "microbleed": radius}
    targets = render("mri", rng, size, present, Look(1.0, 1.0, rng.random(4))).targets
    assert targets["microbleed"].any()
    assert (targets["microbleed"] & targets["brain"]).any()


@pytest.mark.parametrize("modality", list(RENDERERS))
def test_every_renderer_draws_everything_in_its_table(modality: str) -> None:
    present = {name: target.radius for name, target in tables.TARGETS[modality].items()}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rendering = render(modality, rng, 96, present, Look(1.0, 1.0, rng.random(4)))
        assert rendering.image.shape == (96, 96, 3)
        assert rendering.image.dtype == np.uint8
        assert rendering.image.std() > 10
        assert set(rendering.targets) == set(present)


def test_paired_organs_lie_on_their_side_in_radiological_convention(folder: Path) -> None:
    for row in _all_rows(folder):
        for name, mask in _masks(row).items():
            center = np.nonzero(mask)[1].mean()
            if name.startswith("left "):
                assert center > row["width"] / 2, (row["id"], name)
            if name.startswith("right ") or (name == "liver" and row["modality"] == "ct"):
                assert center < row["width"] / 2, (row["id"], name)


def test_side_is_nine_tenths_of_the_pixels_in_the_frame_of_the_modality() -> None:
    def side(modality: str, left: int, right: int) -> str | None:
        image = np.zeros((8, 8, 3), np.uint8)
        rendering = Rendering(image, {"target": _mask_with(left, right)})
        return questions.observe(modality, rendering).sides["target"]

    assert side("fundus", 9, 1) == "left"
    assert side("fundus", 1, 9) == "right"
    assert side("fundus", 8, 2) is None
    assert side("ct", 9, 1) == "right"
    assert side("xray", 0, 5) == "left"


def test_side_answers_agree_with_the_centroid_of_the_mask(folder: Path) -> None:
    num_checked = 0
    for row in _all_rows(folder):
        masks = _masks(row)
        for _, question, answer in _pairs(row):
            match = re.match(
                r"(?:is|does) the (.+?) (?:lie )?on the (.*)(left|right) side", question
            )
            if match is None:
                continue
            name, patient, side = match.groups()
            at_left = np.nonzero(masks[name])[1].mean() + 0.5 < row["width"] / 2
            expected = "left" if at_left != bool(patient) else "right"
            assert answer == ("yes" if side == expected else "no"), (row["id"], question)
            num_checked += 1
    assert num_checked >= 3


def test_presence_answers_agree_with_the_masks(folder: Path) -> None:
    names = {name for targets in tables.TARGETS.values() for name in targets}
    num_checked = 0
    for row in _all_rows(folder):
        masks = _masks(row)
        for kind, question, answer in _pairs(row):
            asked = [n for n in names if re.search(rf"\b{n}\b", question)]
            if kind != "closed" or not asked or "side" in question:
                continue
            expected = max(asked, key=len) in masks
            assert answer == ("yes" if expected else "no"), (row["id"], question)
            num_checked += 1
    assert num_checked > 20


def test_questions_have_the_stated_form(folder: Path) -> None:
    for row in _all_rows(folder):
        pairs = _pairs(row)
        assert 3 <= len(pairs) <= 6
        for kind, question, answer in pairs:
            if kind == "closed":
                assert answer in ("yes", "no")
            if kind == "choice":
                options = question.split("\n")[1:]
                assert [option[:3] for option in options] == ["A: ", "B: ", "C: ", "D: "]
                assert answer in options
                assert len({option[3:] for option in options}) == 4
            if kind == "report":
                assert answer.startswith(f"{row['modality']} of the {row['anatomy']}")
                assert answer.count(".") == 2


def test_yes_is_half_of_the_answers_for_every_question_type_and_finding() -> None:
    answers: dict[str, list[bool]] = {}
    for modality in tables.TARGETS:
        patient = draws.draw_patient(0, "train", modality, 0)
        prevalence = draws.expected_prevalence(patient, "none")
        for seed in range(700):
            rng = np.random.default_rng([seed, 1])
            facts = _facts(seed, modality)
            asked = [
                *questions._ask_finding(rng, facts, prevalence),
                questions._ask_modality(rng, facts),
            ]
            if questions._structures(facts):
                asked.append(questions._ask_visible(rng, facts))
            for (question, _), task in zip(asked[::-1], "vms", strict=False):
                finding = [n for n in prevalence if n in question.text]
                name = max(finding, key=len, default=task)
                answers.setdefault(name, []).append(question.answer == "yes")
    common = {name: np.mean(values) for name, values in answers.items() if len(values) > 150}
    assert {"liver lesion", "pneumothorax", "brain tumor", "v", "m"} <= set(common)
    assert all(abs(share - 0.5) < 0.12 for share in common.values()), common


def test_no_place_among_the_options_is_favoured() -> None:
    asked = (questions._choice(np.random.default_rng(k), _facts(k, "ct"))[0] for k in range(800))
    places = Counter(question.options.index(question.answer) for question in asked)
    assert all(150 < places[place] < 250 for place in range(4)), places


def test_every_question_says_which_of_the_phrasings_it_is(folder: Path) -> None:
    asked = [t for row in _all_rows(folder) for t in row["conversations"] if t["role"] == "user"]
    assert {turn["facts"]["question_type"] for turn in asked} == set(questions.PHRASES)
    choices = [turn for turn in asked if turn["kind"] == "choice"]
    names = {"modality", "finding", "which structure"}
    assert {turn["facts"]["question_type"] for turn in choices} == names


def test_report_names_size_and_side_of_each_finding() -> None:
    facts = questions.Observation(
        "ct",
        {"aorta": 0.01, "kidney stone": 0.001, "liver": 0.2, "liver lesion": 0.03},
        {"aorta": None, "kidney stone": "left", "liver": "right", "liver lesion": None},
    )
    assert questions.report(facts) == (
        "ct of the abdomen showing the aorta and liver. there is a small kidney stone "
        "on the patient's left side and a medium liver lesion."
    )
    healthy = questions.Observation("dermoscopy", {}, {})
    assert questions.report(healthy) == "dermoscopy of the skin. no finding is seen."


def test_the_vocabulary_is_small_enough_for_a_tiny_language_model() -> None:
    words: set[str] = set()
    for modality in tables.TARGETS:
        prevalence = draws.expected_prevalence(draws.draw_patient(0, "val", modality, 0), "none")
        for seed in range(80):
            turns = questions.converse(
                np.random.default_rng(seed), _facts(seed, modality), prevalence
            )
            for turn in turns:
                words |= set(re.findall(r"[A-Za-z'-]+|[^\sA-Za-z]", turn.text))
    assert 60 < len(words) < 250, len(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "smal"}, "did you mean 'small'"),
        ({"bias": "prevalance"}, "did you mean 'prevalence'"),
        ({"seed": -1}, "seed must be 0 or larger"),
        ({"image_size": 8}, "between 64 and 1024"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        demo.generate(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()


def test_an_unknown_modality_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'pet'"):
        render("pet", np.random.default_rng(0), 64, {}, Look(1.0, 1.0, np.zeros(4)))


def test_the_program_reports_errors_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="size: got 'huge', expected one of tiny, small, large"):
        demo.main(["--output", str(tmp_path), "--size", "huge"])
