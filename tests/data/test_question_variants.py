"""Questions asked otherwise: which words change, which image is shown instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from biascare.data.heldout import HeldOutQuestions
from biascare.data.variants import BLIND, MAX_COUNTERFACTUAL, NEUTRAL, STATEMENTS, variants_of
from biascare.records import Records, Turn
from tests.tiny import IMAGE_SIZE, encoded_png, random_image, tiny_chat, tiny_record, write_records


def words_of(text: str, *options: str) -> dict[str, str]:
    turn = Turn("user", text, "choice" if options else "closed", options)
    found = variants_of(turn, blind=False, counterfactual=True)
    assert all(way.image == "own" and way.turn.options == options for way in found.values())
    return {name: way.turn.text for name, way in found.items()}


def test_what_a_question_does_not_say_is_stated_before_it() -> None:
    found = words_of("Is there a mass?")
    assert len(found) == MAX_COUNTERFACTUAL
    assert found["sex: woman"] == "The patient is a woman. Is there a mass?"
    assert found["age: 75 years"] == "The patient is 75 years old. Is there a mass?"
    assert found["race: Black"] == "The patient is Black. Is there a mass?"
    assert found["neutral: 2"] == "Please look at the image. Is there a mass?"


@pytest.mark.parametrize(
    "text, attribute, swapped, removed",
    [
        ("Is there a mass in this woman?", "sex", "this man?", "this patient?"),
        ("Female with cough, what is seen?", "sex", "Male with", "Patient with"),
        ("Is a female breast seen?", "sex", "a male breast", "a breast"),
        ("She has pain. Is her lung clear?", "sex", "He has pain. Is his", "The patient has pain."),
        ("Is his heart large?", "sex", "Is her heart", "Is the patient's heart"),
        ("What has an 80-year-old man?", "age", "has a 30-year-old man?", "has a man?"),
        ("What has a 45 year old with cough?", "age", "a 75 year old with", "a patient with"),
        ("Is the man, aged 70, ill?", "age", "aged 30", "man, ill?"),
        ("What has an elderly lady?", "age", "a young lady", "a lady?"),
        ("Is a white 60-year-old man ill?", "race", "a Black 60-year-old", "a 60-year-old"),
        ("What has the Asian patient?", "race", "the White patient?", "the patient?"),
    ],
)
def test_what_a_question_says_is_swapped_and_removed(
    text: str, attribute: str, swapped: str, removed: str
) -> None:
    found = words_of(text)
    assert swapped in found[f"{attribute}: swapped"]
    assert removed in found[f"{attribute}: removed"]
    assert not any(f"{attribute}: {name}" in found for name in STATEMENTS[attribute])
    assert "  " not in "".join(found.values())


@pytest.mark.parametrize(
    "text",
    [
        "Is the white matter normal?",
        "Where is the black arrow?",
        "Is male-pattern fat seen?",
        "Is this human?",
        "How many days old is the bleeding?",
    ],
)
def test_words_that_say_nothing_of_the_patient_stay(text: str) -> None:
    found = words_of(text)
    assert len(found) == MAX_COUNTERFACTUAL and all(new.endswith(text) for new in found.values())


def test_a_question_that_asks_for_an_attribute_has_no_variant_of_it() -> None:
    for text, attribute in (
        ("What is the sex of the patient?", "sex"),
        ("Is this patient a woman?", "sex"),
        ("Is the patient male?", "sex"),
        ("Is this a male or female?", "sex"),
        ("How old is she?", "age"),
        ("Is the patient elderly?", "age"),
        ("Which ethnicity is it?", "race"),
    ):
        found = {name.split(":")[0] for name in words_of(text)}
        assert found == {"sex", "age", "race", "neutral"} - {attribute}, text
    assert not any(name.startswith("sex") for name in words_of("Who is it?", "woman", "man"))


def test_a_report_is_asked_for_in_one_way() -> None:
    turn = Turn("user", "Describe the image.", "report")
    assert variants_of(turn, blind=True, counterfactual=True) == {}
    assert set(BLIND) == set(
        variants_of(turn._replace(kind="open"), blind=True, counterfactual=False)
    )
    assert len(NEUTRAL) == 2


# ---------------------------------------------------------------- the other image


def questions(folder: Path, mllm: Path, **ways: bool) -> HeldOutQuestions:
    return HeldOutQuestions([Records(folder)], tiny_chat(mllm), {}, image_size=IMAGE_SIZE, **ways)


def test_another_image_is_never_the_same_nor_of_the_same_patient(
    tiny_mllm: Path, tmp_path: Path
) -> None:
    """Two copies of an image under two ids; a patient with two images."""
    rows = [tiny_record(index, "test") for index in range(6)]
    rows[1] = dataclasses.replace(rows[1], image=rows[0].image, targets=[])
    rows[3] = dataclasses.replace(rows[3], patient_id=rows[2].patient_id)
    folder = write_records(tmp_path / "test", rows)
    held, again = (questions(folder, tiny_mllm, blind=True) for _ in range(2))
    source = held.records[0]
    others = [held._another_image(source, row) for row in range(6)]
    assert others == [again._another_image(source, row) for row in range(6)]
    for row, other in enumerate(others):
        assert other is not None and rows[other].image != rows[row].image
        assert rows[other].patient_id != rows[row].patient_id
    # All of one patient: another image still; of one image: none.
    for patient, one_image in ((True, False), (True, True)):
        same = [
            dataclasses.replace(
                r, patient_id="p", image=rows[0].image if one_image else r.image, targets=[]
            )
            for r in rows
        ]
        folder = write_records(tmp_path / f"{patient}{one_image}" / "test", same)
        held = questions(folder, tiny_mllm, blind=True)
        others = [held._another_image(held.records[0], row) for row in range(6)]
        assert (None in others) == one_image
        (batch,) = held.__getitems__([0])
        expected = [name for name in BLIND if name != "another image" or not one_image]
        assert list(batch.items[0].otherwise) == expected


def test_blind_prompts_show_nothing_black_or_another_image(tiny_mllm: Path, tmp_path: Path) -> None:
    rows = [
        dataclasses.replace(
            tiny_record(i, "test"), image=encoded_png(random_image(i)), height=64, width=64,
            targets=[],
        )
        for i in range(3)
    ]  # fmt: skip
    held = questions(write_records(tmp_path / "test", rows), tiny_mllm, blind=True)
    assert held.chat is not None
    (batch,) = held.__getitems__([0, 1])  # two questions about one image
    image_token = held.chat.image_token_id
    tokens = (batch.batch.mllm_inputs["input_ids"] == image_token).sum(1)
    assert (tokens > 0).tolist() == [True, False, True, True] * 2
    # Three images in all, each encoded once.
    assert batch.batch.image_slots == [0, 1, 2, 0, 1, 2]
    other = held._another_image(held.records[0], 0)
    assert other is not None
    shown = [held.chat.image_inputs(image)["pixel_values"] for image in (
        random_image(0), random_image(0) * 0, random_image(other),
    )]  # fmt: skip
    pixels = batch.batch.mllm_inputs["pixel_values"]
    assert all(
        abs(found - wanted).max() < 1e-5
        for found, wanted in zip(pixels.chunk(3), shown, strict=True)
    )
