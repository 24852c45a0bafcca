"""Blind baselines and counterfactual words: through the loop, and to numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from biascare.data.heldout import HeldOutImages, HeldOutQuestions, heldout_loader
from biascare.data.loader import collate
from biascare.data.variants import BLIND
from biascare.evaluation.cases import AnswerCase, Variant, read_cases
from biascare.evaluation.evaluate import evaluate, summarise
from biascare.evaluation.metrics.answers import summarise_answers
from biascare.inference.answerer import Answered, Answerer
from biascare.interfaces import Batch, Sample
from biascare.records import Records
from tests.evaluation.test_evaluate import HEADER, SETTINGS
from tests.evaluation.test_metrics import answer_case
from tests.tiny import IMAGE_SIZE, pad_token_id, tiny_chat, tiny_model, tiny_record_folder

NOBODY: Any = SimpleNamespace(network=SimpleNamespace(device=torch.device("cpu")))
"""In place of a segmenter: nothing is segmented here."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(tiny_record_folder(tmp_path_factory.mktemp("otherwise") / "test", 4, "test"))


def asked(records: Records, folder: Path, answerer: Any, path: Path, **changes: Any) -> Any:
    """Cases of all questions in every way."""
    questions = HeldOutQuestions(
        [records], tiny_chat(folder), {}, image_size=IMAGE_SIZE, blind=True, counterfactual=True
    )
    images = HeldOutImages([], None, {}, image_size=IMAGE_SIZE)
    settings = SETTINGS._replace(**changes)
    return evaluate(NOBODY, answerer, images, questions, path, HEADER, settings)


def an_answerer(folder: Path) -> Answerer:
    return Answerer(tiny_model(folder), tiny_chat(folder), image_size=IMAGE_SIZE)


def test_variants_do_not_depend_on_the_batch_or_on_an_interruption(
    records: Records, mllm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = an_answerer(mllm_folder)
    alone = asked(records, mllm_folder, answerer, tmp_path / "alone.jsonl", batch_size=1).answers
    lines = (tmp_path / "alone.jsonl").read_text().splitlines(keepends=True)
    share = tmp_path / "cut.rank0.jsonl"
    share.write_text("".join(lines[:6]) + lines[6][:200])
    told: list[int] = []
    honest = answerer.answer_batch

    def watched(batch: Batch, *arguments: Any, **keywords: Any) -> Any:
        told.append(len(batch.facts))
        return honest(batch, *arguments, **keywords)

    monkeypatch.setattr(answerer, "answer_batch", watched)
    together = asked(records, mllm_folder, answerer, tmp_path / "cut.jsonl", batch_size=36).answers
    assert sum(told) == len(alone) - 5  # those on disk are not asked again
    for one, other in zip(alone, together, strict=True):
        assert list(one.variants) == list(other.variants) and len(one.variants) == 11
        for mine, theirs in zip(one.variants.values(), other.variants.values(), strict=True):
            assert (mine.prompt, mine.text) == (theirs.prompt, theirs.text)
            assert mine.option_log_probs == pytest.approx(theirs.option_log_probs, abs=1e-3)


def test_a_variant_is_what_the_model_answers_when_asked_so_alone(
    records: Records, mllm_folder: Path, tmp_path: Path
) -> None:
    answerer, chat = an_answerer(mllm_folder), tiny_chat(mllm_folder)
    case = asked(records, mllm_folder, answerer, tmp_path / "cases.jsonl").answers[0]
    held = HeldOutQuestions([records], chat, {}, image_size=IMAGE_SIZE, blind=True)
    (batch,) = list(heldout_loader(held, [0], 1))
    question = batch.items[0].question
    sequence = chat.sequence([question], shows_image=False)
    without = Sample([sequence], None, None, None, None, facts=[])
    prompt = collate([without], 0, pad_token_id(chat), padding_side="left")
    (answered,), scores = answerer.answer_batch(prompt, [["yes", "no"]], max_new_tokens=3)
    found = case.variants["without image"]
    assert found.text == answered.text and scores is not None
    assert found.option_log_probs == pytest.approx(scores[0].tolist(), abs=1e-3)
    # What is shown and said matters to this model.
    assert len({tuple(v.option_log_probs or ()) for v in case.variants.values()}) == 11


class Deaf:
    """Answers by the image, whatever the words; "no" without one."""

    def __init__(self, image_token: int):
        self.network = NOBODY.network
        self.image_token = image_token

    def answer_batch(self, batch: Batch, options: Any, **_: Any) -> Any:
        images = batch.mllm_inputs["pixel_values"].chunk(max(batch.image_slots) + 1)
        slots = iter(batch.image_slots)
        shares = [
            float(images[next(slots)].mean().sigmoid()) if (row == self.image_token).any() else 0.1
            for row in batch.mllm_inputs["input_ids"]
        ]
        scores = [
            torch.tensor([p, 1 - p]).log()[: len(said)]
            for p, said in zip(shares, options or (), strict=False)
        ]
        return [Answered("yes" if p > 0.4 else "no", [-0.1]) for p in shares], scores or None


def test_a_model_that_does_not_read_the_prompt_never_flips(
    records: Records, tiny_mllm: Path, tmp_path: Path
) -> None:
    cases = asked(
        records, tiny_mllm, Deaf(tiny_chat(tiny_mllm).image_token_id), tmp_path / "cases.jsonl"
    )
    for kind, table in summarise(cases)["answers"].items():
        for attribute in ("sex", "age", "race"):
            found = table["counterfactual"][attribute]
            assert found["num"] > 0
            for name in ("flipped", "moved") if kind != "open" else ("flipped",):
                numbers = {key: found[name][key] for key in ("words", "neutral", "difference")}
                assert numbers == {"words": 0.0, "neutral": 0.0, "difference": 0.0}
                assert found[name]["low"] == found[name]["high"] == 0.0
            assert ("moved" in found) == (kind != "open")
    # It looks all the same: its probabilities move with the image.
    shown = [case.variants for case in cases.answers if case.option_log_probs]
    moved = [
        v["black image"].option_log_probs != v["another image"].option_log_probs for v in shown
    ]
    assert all(moved) and moved


# ---------------------------------------------------------------- numbers


def varied(reference: str, text: str, patient: str, **texts: str) -> AnswerCase:
    """A closed case with the blind answers "without_image", "black_image" and "another_image"."""
    case = answer_case("closed", reference, text)
    variants = {
        name.replace("_", " "): Variant(prompt="", text=said, option_log_probs=None)
        for name, said in texts.items()
    }
    facts = case.facts._replace(patient_id=patient)
    return dataclasses.replace(case, facts=facts, variants=variants)


def test_image_reliance_is_against_the_best_blind_answer() -> None:
    cases = []
    for k in range(40):
        # Right with the image 30 of 40 times, without it 20, on black 10, with another one never.
        said = ["yes" if k < limit else "no" for limit in (30, 20, 10, 0)]
        blind = dict(zip(("without_image", "black_image", "another_image"), said[1:], strict=True))
        cases.append(varied("yes", said[0], f"p{k}", **blind))
    # One whose folder has no other image, and one that was not asked blindly.
    cases.append(varied("yes", "yes", "p40", without_image="yes", black_image="yes"))
    cases.append(varied("yes", "yes", "p41"))
    table = summarise_answers(cases)["closed"]["blind"]
    assert table["num"] == 41
    black = table["variants"]["black image"]["text"]
    assert (black["num"], table["variants"]["black image"]["num_missing"]) == (41, 0)
    assert black["with_image"] == pytest.approx(31 / 41)
    assert black["difference"] == pytest.approx(20 / 41)
    assert 0.3 < black["low"] < 20 / 41 < black["high"] < 0.7
    assert table["variants"]["another image"]["num_missing"] == 1
    reliance = table["image_reliance"]["text"]
    assert (reliance["num"], reliance["best_blind"]) == (40, "without image")
    assert reliance["value"] == pytest.approx(10 / 40)
    assert 0.1 < reliance["low"] < 0.25 < reliance["high"] < 0.4
    assert "option" not in table["image_reliance"]
    # Ten questions about each of four patients say less than forty about forty.
    few = [
        dataclasses.replace(case, facts=case.facts._replace(patient_id=f"p{k // 10}"))
        for k, case in enumerate(cases[:40])
    ]
    wide = summarise_answers(few)["closed"]["blind"]["image_reliance"]["text"]
    assert wide["high"] - wide["low"] > reliance["high"] - reliance["low"]


def test_flips_stand_beside_those_of_neutral_words() -> None:
    def scored(yes: float) -> dict[str, Any]:
        return {"text": "", "option_log_probs": [math.log(yes), math.log(1 - yes)], "prompt": ""}

    cases = []
    for k in range(20):
        ways = {
            "neutral: 1": Variant(**scored(0.6)),
            "neutral: 2": Variant(**scored(0.7)),
            # Every second answer flips when the patient is a woman.
            "sex: woman": Variant(**scored(0.3 if k % 2 else 0.7)),
            "sex: man": Variant(**scored(0.7)),
        }
        case = answer_case("closed", "yes", "yes", options=["yes", "no"], variants=ways)
        case = dataclasses.replace(case, option_log_probs=scored(0.7)["option_log_probs"])
        cases.append(dataclasses.replace(case, facts=case.facts._replace(patient_id=f"p{k}")))
    table = summarise_answers(cases)["closed"]["counterfactual"]
    sex = table["sex"]
    assert (sex["num"], sex["num_without"]) == (20, 0)
    assert (sex["flipped"]["words"], sex["flipped"]["neutral"]) == (0.25, 0.0)
    assert sex["flipped"]["low"] > 0
    assert sex["moved"]["words"] == pytest.approx((0.4 / 2 + 0) / 2)
    assert sex["moved"]["neutral"] == pytest.approx(0.05)
    assert sex["by_variant"]["sex: woman"] == {"num": 20, "flipped": 0.5}
    assert table["age"] == {"num": 0, "num_without": 20}


def test_variants_come_back_from_their_file(
    records: Records, tiny_mllm: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cases.jsonl"
    cases = asked(records, tiny_mllm, Deaf(tiny_chat(tiny_mllm).image_token_id), path)
    assert cases == read_cases(path)
    line = json.loads(path.read_text().splitlines()[1])
    assert set(BLIND) < set(line["variants"])


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("B: MR", "MR", "MR"),
        ("MR", "MR", "MR"),
        ("b", "MR", "MR"),
        ("The answer is B.", None, "MR"),
        ("It is an MR image", None, "MR"),
        ("B: CT", "MR", None),  # the letter contradicts the words
        ("A and B", None, None),
        ("CT or MR", None, None),
        ("not CT", None, None),
        ("unknown", None, None),
        ("Yes, there is a nodule", None, None),
        ("", None, None),
        ("I cannot answer that.", None, None),
        ("C", None, None),
        ("a mass", None, None),
    ],
)
def test_choices_are_read_by_each_reading(
    text: str, strict: str | None, lenient: str | None
) -> None:
    case = answer_case("choice", "MR", text, options=["CT", "MR"])
    table = summarise_answers([case])["choice"]
    for reading, said in (("strict", strict), ("lenient", lenient)):
        expected = {"accuracy": float(said == "MR"), "num_unread": int(said is None)}
        assert table["readings"][reading] == expected
    assert table["accuracy"] == table["readings"]["strict"]["accuracy"]
    assert "option" not in table["readings"]


@pytest.mark.parametrize("text", ["Yes, there is a nodule", "unknown", "not normal", "No.", ""])
@pytest.mark.parametrize("kind", ["closed", "choice", "open"])
def test_any_answer_gives_defined_numbers(kind: str, text: str) -> None:
    """Also as the only one, and as that of every variant."""
    options = {} if kind == "open" else {"options": ["yes", "no"], "option_log_probs": [-1.0, -1.0]}
    names = [*BLIND, "neutral: 1", "sex: woman", "age: 30 years", "race: white"]
    said = Variant(prompt="", text=text, option_log_probs=options.get("option_log_probs"))
    case = answer_case(kind, "no", text, variants=dict.fromkeys(names, said), **options)
    table = summarise_answers([case])[kind]
    json.dumps(table, allow_nan=False)
    assert table["blind"]["image_reliance"]["text"]["value"] == 0.0
    assert table["counterfactual"]["sex"]["flipped"]["words"] == 0.0
