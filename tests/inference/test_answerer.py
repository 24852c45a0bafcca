"""Answers: generated with their log-probabilities, or chosen among options by likelihood."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from biascare.data.chat import ChatBuilder
from biascare.data.heldout import HeldOutQuestions, heldout_loader
from biascare.inference.answerer import Answerer, Case, spoken
from biascare.models.language import scoring
from biascare.models.network import DualPathNetwork
from biascare.records import Records, Turn
from tests.tiny import HEIGHT, IMAGE_SIZE, WIDTH, tiny_chat, tiny_model

CLOSED = Turn("user", "Is the liver visible?", "closed")
CHOICE = Turn("user", "Which modality is this?", "choice", ("CT", "MR"))


@pytest.fixture(scope="module")
def answerer(mllm_folder: Path) -> Answerer:
    return Answerer(tiny_model(mllm_folder), tiny_chat(mllm_folder), image_size=IMAGE_SIZE)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def literal_log_prob(answerer: Answerer, case: Case, tokens: list[int]) -> float:
    """The sequence likelihood by a forward pass over prompt and continuation, without a cache."""
    batch = answerer._prompt(case)
    inputs = dict(batch.mllm_inputs)
    length = inputs["input_ids"].shape[1]
    more = torch.tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    for name in ("attention_mask", *answerer.chat.extra_keys):
        filler = torch.ones_like(more) if name == "attention_mask" else torch.zeros_like(more)
        inputs[name] = torch.cat([inputs[name], filler.to(inputs[name])], 1)
    with torch.no_grad():
        hidden = answerer.mllm.hidden_states(inputs, batch.image_slots)[0]
        logits = answerer.mllm.base.lm_head(hidden[length - 1 : -1]).float()
    return float(logits.log_softmax(-1).gather(1, more.T).sum())


@pytest.mark.parametrize("question", [CLOSED, CHOICE])
def test_options_score_as_a_whole_forward_pass_scores_each_of_their_spellings(
    answerer: Answerer, question: Turn
) -> None:
    options = ("yes", "no") if question is CLOSED else ("CT", "MR")
    case = Case(image(), question)
    scores = answerer.score(case, options)
    spellings = answerer.spellings(spoken(question, options))
    for score, variants in zip(scores, spellings, strict=True):
        literal = [literal_log_prob(answerer, case, tokens) for tokens in variants]
        assert float(score) == pytest.approx(torch.tensor(literal).logsumexp(0).item(), abs=1e-4)
    assert any(len(tokens) > 1 for variants in spellings for tokens in variants)
    assert float(scores.exp().sum()) < 1  # of the full vocabulary, not of the options


def test_a_batch_of_unequal_questions_scores_as_each_of_them_alone(
    answerer: Answerer, tiny_records: Path
) -> None:
    questions = HeldOutQuestions([Records(tiny_records)], answerer.chat, {}, image_size=IMAGE_SIZE)
    (held,) = heldout_loader(questions, range(6), 6)
    options = [["yes", "no"], [], ["A: CT", "B: MR"], ["the liver", "the spleen"], [], ["no"]]
    together = answerer.score_batch(held.batch, options)
    for number, said in enumerate(options):
        (alone,) = heldout_loader(questions, [number], 1)
        single = answerer.score_batch(alone.batch, [said])[0]
        assert together[number].tolist() == pytest.approx(single.tolist(), abs=1e-4)


def test_many_continuations_are_read_in_parts_with_the_same_result(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answerer.score(Case(image(), CHOICE), ("CT", "MR"))
    monkeypatch.setattr(scoring, "MAX_CONTINUATIONS", 3)
    parts = answerer.score(Case(image(), CHOICE), ("CT", "MR"))
    assert parts.tolist() == pytest.approx(whole.tolist(), abs=1e-5)


def test_image_and_prompt_are_read_once_for_all_options(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = answerer.mllm.base.model.get_image_features
    calls: list[int] = []

    def counted(**inputs: torch.Tensor) -> object:
        calls.append(len(inputs["pixel_values"]))
        return features(**inputs)

    monkeypatch.setattr(answerer.mllm.base.model, "get_image_features", counted)
    answerer.score(Case(image(), CHOICE), ("CT", "MR", "PET", "ultrasound"))
    assert len(calls) == 1


def test_questions_about_one_image_encode_it_once(answerer: Answerer, tiny_records: Path) -> None:
    questions = HeldOutQuestions([Records(tiny_records)], answerer.chat, {}, image_size=IMAGE_SIZE)
    (held,) = heldout_loader(questions, range(6), 6)
    images = [item.id.rpartition("/")[0] for item in held.items]
    assert len(set(images)) < len(images)
    slots = held.batch.image_slots
    assert len(set(slots)) == len(set(images))
    # Of those that share it, and of no others.
    assert len(set(zip(images, slots, strict=True))) == len(set(images))


def test_spellings_that_begin_alike_are_read_together(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    continuations = [[5, 6, 7], [5, 6, 8], [5, 6], [5, 9], [9, 6, 7]]
    prefix = scoring.read_prefix(answerer.mllm, *_inputs(answerer))
    apart = [
        scoring.continuation_log_probs(answerer.mllm, prefix, [0], [tokens]).item()
        for tokens in continuations
    ]
    read: list[torch.Tensor] = []
    forward = answerer.mllm.base.model.forward

    def counted(**inputs: torch.Tensor) -> object:
        read.append(inputs["input_ids"])
        return forward(**inputs)

    monkeypatch.setattr(answerer.mllm.base.model, "forward", counted)
    rows = [0] * len(continuations)
    together = scoring.continuation_log_probs(answerer.mllm, prefix, rows, continuations)
    assert together.tolist() == pytest.approx(apart, abs=1e-5)
    assert [sorted(tokens.tolist()) for tokens in read] == [[[5, 6], [9, 6]]]


def test_spellings_vary_case_and_leading_space_only_where_options_stay_apart(
    answerer: Answerer,
) -> None:
    def texts(options: list[str]) -> list[set[str]]:
        decode = answerer.chat.tokenizer.decode
        return [{decode(t) for t in variants} for variants in answerer.spellings(options)]

    yes, no = texts(["yes", "no"])
    assert {"yes", "Yes", "YES"} <= {text.strip() for text in yes}
    assert {text.strip() for text in no} == {"no", "No", "NO"}
    # Stage "IV" and the vein "iv" differ in their case alone.
    for variants, text in zip(texts(["IV", "iv"]), ("IV", "iv"), strict=True):
        assert {found.strip() for found in variants} == {text}


def test_an_option_that_begins_another_is_not_credited_with_it(answerer: Answerer) -> None:
    short, long = answerer.spellings(["no", "no lesion"])
    end = answerer.chat.tokenizer(answerer.chat.end_of_answer, add_special_tokens=False)
    last = end["input_ids"][-1]
    assert all(tokens[-1] == last for tokens in (*short, *long))
    case = Case(image(), CLOSED)
    alone = answerer.score(case, ("no", "yes"))[0]
    beside = answerer.score(case, ("no", "no lesion"))[0]
    assert beside < alone  # the end of the answer has a probability too


def test_an_empty_option_is_refused(answerer: Answerer) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        scoring.continuation_log_probs(
            answerer.mllm, scoring.read_prefix(answerer.mllm, *_inputs(answerer)), [0], [[]]
        )


def _inputs(answerer: Answerer) -> tuple[dict[str, torch.Tensor], list[int]]:
    batch = answerer._prompt(Case(image(), CLOSED))
    return batch.mllm_inputs, batch.image_slots


# ---------------------------------------------------------------- generation


def test_generated_tokens_come_with_their_untempered_log_probs(answerer: Answerer) -> None:
    case = Case(image(), CLOSED)
    torch.manual_seed(0)
    for answered in (
        *answerer.generate(case, max_new_tokens=5),
        *answerer.generate(case, 3, 2.5, max_new_tokens=5),
    ):
        assert 1 <= len(answered.token_log_probs) <= 5
    batch = answerer._prompt(case)
    torch.manual_seed(0)
    generated = answerer.mllm.generate(
        batch.mllm_inputs, batch.image_slots, max_new_tokens=5, do_sample=True, temperature=2.5
    )
    tokens = generated.tokens[0].tolist()
    for n in range(1, len(tokens) + 1):
        literal = literal_log_prob(answerer, case, tokens[:n])
        assert float(generated.log_probs[0, :n].sum()) == pytest.approx(literal, abs=1e-3)


def test_tokens_count_up_to_the_end_of_an_answer(answerer: Answerer) -> None:
    config = answerer.mllm.base.generation_config
    batch = answerer._prompt(Case(image(), CLOSED))
    free = answerer.mllm.generate(batch.mllm_inputs, batch.image_slots, max_new_tokens=6)
    end = config.eos_token_id
    config.eos_token_id = int(free.tokens[0, 2])  # the model will say it
    try:
        asked = batch.mllm_inputs, batch.image_slots
        ended = answerer.mllm.generate(*asked, max_new_tokens=6)
    finally:
        config.eos_token_id = end
    place = free.tokens[0].tolist().index(int(free.tokens[0, 2]))
    assert int(ended.spoken[0].sum()) == place + 1
    assert ended.log_probs.shape == ended.tokens.shape


def test_several_answers_need_a_temperature(answerer: Answerer) -> None:
    with pytest.raises(ValueError, match="n=2 at temperature=0"):
        answerer.generate(Case(image(), CLOSED), 2)


def test_a_batch_answers_as_each_question_alone(answerer: Answerer, tiny_records: Path) -> None:
    questions = HeldOutQuestions([Records(tiny_records)], answerer.chat, {}, image_size=IMAGE_SIZE)
    (held,) = heldout_loader(questions, range(5), 5)
    together = answerer.generate_batch(held.batch, max_new_tokens=4)
    for number, said in enumerate(together):
        (alone,) = heldout_loader(questions, [number], 1)
        single = answerer.generate_batch(alone.batch, max_new_tokens=4)[0]
        assert said.text == single.text
        assert said.token_log_probs == pytest.approx(single.token_log_probs, abs=1e-3)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5}])
def test_an_answer_goes_on_after_the_prompt_that_scoring_read(
    answerer: Answerer, tiny_records: Path, sampling: dict[str, float]
) -> None:
    questions = HeldOutQuestions([Records(tiny_records)], answerer.chat, {}, image_size=IMAGE_SIZE)
    (held,) = heldout_loader(questions, range(5), 5)
    torch.manual_seed(0)
    alone = answerer.generate_batch(held.batch, max_new_tokens=6, **sampling)
    prefix = answerer.read(held.batch)
    scores = answerer.score_batch(held.batch, [["yes", "no"]] * 5, prefix)
    torch.manual_seed(0)
    after = answerer.generate_batch(held.batch, max_new_tokens=6, prefix=prefix, **sampling)
    for one, other in zip(alone, after, strict=True):
        assert one.text == other.text
        assert one.token_log_probs == pytest.approx(other.token_log_probs, abs=1e-4)
    # What was read is left as it was.
    again = answerer.score_batch(held.batch, [["yes", "no"]] * 5, prefix)
    assert torch.stack(again).tolist() == torch.stack(scores).tolist()


def test_scores_and_greedy_generation_agree_on_what_comes_first(answerer: Answerer) -> None:
    """The first token of the greedy answer is at least as likely as any option's."""
    case = Case(image(), CLOSED)
    greedy = answerer.generate(case, max_new_tokens=1)[0].token_log_probs[0]
    single = [s for s in answerer.score(case, ("yes", "no")).tolist() if math.isfinite(s)]
    assert single and all(score <= greedy + math.log(8) for score in single)


def test_a_model_of_the_vision_stage_answers_nothing(tiny_mllm: Path) -> None:
    chat: ChatBuilder = tiny_chat(tiny_mllm)
    network: DualPathNetwork = tiny_model(None)
    with pytest.raises(ValueError, match="vision stage"):
        Answerer(network, chat, image_size=IMAGE_SIZE)
