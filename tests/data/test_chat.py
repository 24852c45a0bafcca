"""Conversations to token ids: one template for training and inference, labels on answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biascare.data.chat import (
    SEGMENTATION_INSTRUCTIONS,
    ChatBuilder,
    answer_text,
    question_text,
    segmentation_instruction,
    written,
)
from biascare.data.loader import collate
from biascare.interfaces import IGNORE_INDEX
from biascare.models.language.pathway import load_processor
from biascare.records import Turn
from tests.tiny import IMAGE_SIZE, language_sample, pad_token_id, random_image, tiny_chat

WORDS = st.text("abc de\n?.,", min_size=1, max_size=30).filter(str.strip)


def turns(*texts: str) -> list[Turn]:
    """User, assistant, user, ..."""
    return [Turn(("user", "assistant")[i % 2], text, "open") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def chat(mllm_folder: Path) -> ChatBuilder:
    return tiny_chat(mllm_folder)


def answered_text(chat: ChatBuilder, sequence: dict[str, Any]) -> str:
    labels = sequence["labels"]
    return str(chat.tokenizer.decode(labels[labels != IGNORE_INDEX]))


CHOICE = [
    Turn("user", "Which modality is this?", "choice", ("CT", "MR", "A: CT")),
    Turn("assistant", "MR", "choice"),
]


def test_options_are_lettered_in_the_prompt_and_the_answer_is_the_option_with_its_letter() -> None:
    question, answer = CHOICE
    assert question_text(question) == "Which modality is this?\nA: CT\nB: MR\nC: A: CT"
    assert answer_text(question, answer) == "B: MR"
    assert answer_text(question, answer._replace(text="A: CT")) == "C: A: CT"
    many = question._replace(options=tuple(f"option {n}" for n in range(26)))
    assert question_text(many).splitlines()[-1] == "Z: option 25"
    with pytest.raises(ValueError, match="27 options, there are only 26 letters"):
        question_text(question._replace(options=(*many.options, "one more")))
    assert written([*turns("Is it?", "yes"), *CHOICE]) == [
        "Is it?", "yes", question_text(question), "B: MR",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"not in"):
        answer_text(question, answer._replace(text="X-ray"))


def test_the_model_reads_lettered_options_and_learns_the_letter(chat: ChatBuilder) -> None:
    sequence = chat.sequence(CHOICE)
    assert answered_text(chat, sequence) == "B: MR<|im_end|>"
    prompt = chat.tokenizer.decode(sequence["input_ids"][sequence["prompt_mask"]])
    assert "Which modality is this?\nA: CT\nB: MR\nC: A: CT<|im_end|>" in prompt
    plain = chat.sequence(turns(*written(CHOICE)))  # as if letters stood in the texts
    assert torch.equal(sequence["input_ids"], plain["input_ids"])
    assert torch.equal(sequence["labels"], plain["labels"])
    asked = chat.sequence(CHOICE[:1])["input_ids"]
    assert torch.equal(sequence["input_ids"][: len(asked)], asked)


def test_a_control_token_inside_an_option_is_refused(chat: ChatBuilder) -> None:
    options = ("CT", "<|im_end|>")
    with pytest.raises(ValueError, match="a control token of this model"):
        chat.sequence([CHOICE[0]._replace(options=options)])


def test_labels_fall_on_the_answer_and_its_end_alone(chat: ChatBuilder) -> None:
    sequence = chat.sequence(turns("Is the liver visible?", "yes"))
    labelled = sequence["labels"] != IGNORE_INDEX
    assert answered_text(chat, sequence) == "yes<|im_end|>"
    assert torch.equal(sequence["labels"][labelled], sequence["input_ids"][labelled])
    assert torch.equal(sequence["prompt_mask"], ~labelled)  # nothing follows the answer
    assert sequence["prompt_mask"].dtype == torch.bool


def test_every_answer_of_a_conversation_is_labelled_and_only_the_first_prompt_conditions(
    chat: ChatBuilder,
) -> None:
    first = chat.sequence(turns("Is the liver visible?", "yes"))
    both = chat.sequence(
        turns("Is the liver visible?", "yes", "Which organ is bright?", "the liver")
    )
    assert answered_text(chat, both) == "yes<|im_end|>the liver<|im_end|>"
    length = len(first["input_ids"])
    assert torch.equal(both["input_ids"][:length], first["input_ids"])
    assert int(both["prompt_mask"].sum()) == int(first["prompt_mask"].sum())
    assert not both["prompt_mask"][length:].any()


def test_a_conversation_without_an_answer_has_no_labels_and_is_all_prompt(
    chat: ChatBuilder,
) -> None:
    sequence = chat.sequence(turns("Outline the liver."))
    assert (sequence["labels"] == IGNORE_INDEX).all() and sequence["prompt_mask"].all()
    text = chat.tokenizer.decode(sequence["input_ids"])
    assert text.endswith("<|im_start|>assistant\n")


@settings(deadline=None, max_examples=20)
@given(question=WORDS, answer=WORDS, follow_up=WORDS)
def test_a_prompt_has_the_same_ids_whether_an_answer_follows_or_not(
    both_chats: list[ChatBuilder], question: str, answer: str, follow_up: str
) -> None:
    for chat in both_chats:
        asked = chat.sequence(turns(question))["input_ids"]
        answered = chat.sequence(turns(question, answer))
        assert torch.equal(answered["input_ids"][: len(asked)], asked)
        assert torch.equal(answered["prompt_mask"].nonzero()[:, 0], torch.arange(len(asked)))
        again = chat.sequence(turns(question, answer, follow_up))["input_ids"]
        length = len(answered["input_ids"])
        assert torch.equal(again[:length], answered["input_ids"])
        assert answered_text(chat, answered) == answer + "<|im_end|>"


@pytest.fixture(scope="module")
def both_chats(tiny_mllm: Path, tiny_llava: Path) -> list[ChatBuilder]:
    return [tiny_chat(tiny_mllm), tiny_chat(tiny_llava)]


@settings(deadline=None, max_examples=10)
@given(question=WORDS)
def test_our_tokens_and_pixels_are_the_processors_own(
    both_chats: list[ChatBuilder], question: str
) -> None:
    image = random_image(1)
    for chat in both_chats:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = chat.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        theirs = chat.processor(text=[text], images=[image], return_tensors="pt")
        ours = chat.sequence(turns(question))
        for name in ("input_ids", *chat.extra_keys):
            assert torch.equal(ours[name], theirs[name][0]), name
        pixels = chat.image_inputs(image)
        assert set(pixels) | {"input_ids", "attention_mask", *chat.extra_keys} == set(theirs)
        assert all(torch.equal(pixels[name], theirs[name]) for name in pixels)


def test_a_batch_carries_the_position_kinds_that_qwen_needs(
    tiny_mllm: Path, tiny_llava: Path
) -> None:
    chat = tiny_chat(tiny_mllm)
    batch = collate([language_sample(chat, s) for s in (1, 2)], 0, pad_token_id(chat))
    inputs = batch.mllm_inputs
    kinds = inputs["mm_token_type_ids"]
    image_token = chat.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(kinds == 1, inputs["input_ids"] == image_token)
    assert int(kinds.sum()) == 2 * 4  # 64 px become 56: 4 x 4 patches, merged by 2 x 2
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    other = tiny_chat(tiny_llava)
    batch = collate([language_sample(other, 1)], 0, pad_token_id(other))
    assert "mm_token_type_ids" not in batch.mllm_inputs
    assert other.tokens_per_image == 16  # 64 px in patches of 16


def test_answer_positions_point_at_the_token_before_each_answer_token(
    mllm_folder: Path,
) -> None:
    chat = tiny_chat(mllm_folder)
    samples = [language_sample(chat, 1, answer="yes"), language_sample(chat, 2, answer="the liver")]
    for side in ("left", "right"):
        batch = collate(samples, 0, pad_token_id(chat), padding_side=side)
        assert batch.answer_positions is not None and batch.answer_tokens is not None
        flat = batch.mllm_inputs["input_ids"].flatten()
        assert torch.equal(flat[batch.answer_positions + 1], batch.answer_tokens)
        assert batch.mllm_inputs["attention_mask"].flatten()[batch.answer_positions].all()
        text = chat.tokenizer.decode(batch.answer_tokens)
        assert text == "yes<|im_end|>the liver<|im_end|>"


def test_too_long_a_conversation_is_an_error_and_never_cut(tiny_mllm: Path) -> None:
    conversation = turns("Is the liver visible? " * 5, "yes")
    length = len(tiny_chat(tiny_mllm).sequence(conversation)["input_ids"])
    exact = tiny_chat(tiny_mllm, max_tokens=length)
    assert len(exact.sequence(conversation)["input_ids"]) == length
    with pytest.raises(ValueError, match=rf"'Is the .* has {length} tokens.*data.max_tokens = "):
        tiny_chat(tiny_mllm, max_tokens=length - 1).sequence(conversation)


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>", "<|image_pad|>"])
def test_a_control_token_inside_a_text_is_refused(chat: ChatBuilder, token: str) -> None:
    with pytest.raises(ValueError, match="a control token of this model"):
        chat.sequence(turns(f"What is {token} here?", "a lesion"))
    with pytest.raises(ValueError, match="a control token of this model"):
        chat.sequence(turns("What is this?", f"a lesion {token}"))


def with_template(folder: Path, template: str) -> ChatBuilder:
    processor = load_processor(str(folder))
    processor.chat_template = template
    return ChatBuilder(processor, image_size=IMAGE_SIZE, max_tokens=256)


BODY = (
    "{% for m in messages %}"
    "{% if m.role == 'user' or EARLIER %}[{{ m.role }}]"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_llava: Path) -> None:
    forgetful = with_template(tiny_llava, BODY.replace("EARLIER", "loop.last"))
    assert answered_text(forgetful, forgetful.sequence(turns("a", "b"))) == "b<|im_end|>"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        forgetful.sequence(turns("a", "b", "c", "d"))


def test_a_template_that_writes_the_first_token_itself_gets_it_once(tiny_llava: Path) -> None:
    processor = load_processor(str(tiny_llava))
    processor.tokenizer.bos_token = "<|endoftext|>"
    processor.chat_template = "<|endoftext|>" + BODY.replace("EARLIER", "true")
    bos = processor.tokenizer.bos_token_id
    chat = ChatBuilder(processor, image_size=IMAGE_SIZE, max_tokens=256)
    ids = chat.sequence(turns("a", "b"))["input_ids"]
    assert ids[0] == bos and int((ids == bos).sum()) == 1
    content = [{"type": "image", "image": random_image(1)}, {"type": "text", "text": "a"}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(theirs["input_ids"][0], chat.sequence(turns("a"))["input_ids"])


def test_a_processor_that_expands_images_in_its_own_way_is_refused(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(str(tiny_llava))
    original = type(processor).__call__

    def surrounded(self: Any, *, text: list[str], **keywords: Any) -> Any:
        return original(self, text=["\n" + text[0]], **keywords)

    monkeypatch.setattr(type(processor), "__call__", surrounded)
    with pytest.raises(ValueError, match="LlavaProcessor expands images in a way"):
        ChatBuilder(processor, image_size=IMAGE_SIZE, max_tokens=256)


def test_decoding_drops_control_tokens_and_outer_space(chat: ChatBuilder) -> None:
    ids = chat.tokenizer(" the liver <|im_end|><|endoftext|>")["input_ids"]
    assert chat.decode(torch.tensor([ids])) == ["the liver"]


def test_the_canonical_instruction_is_the_first_and_a_key_draws_each() -> None:
    assert segmentation_instruction("liver", "ct") == "Segment the liver in this CT image."
    assert segmentation_instruction("cup", "fundus") == "Segment the cup in this fundus image."
    drawn = {segmentation_instruction("liver", "CT", key) for key in range(50)}
    assert drawn == {s.format(target="liver", modality="CT") for s in SEGMENTATION_INSTRUCTIONS}
    assert all("liver" in text for text in drawn)


def test_image_inputs_do_not_depend_on_memory_layout(chat: ChatBuilder) -> None:
    image = random_image(2)
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    ours, theirs = chat.image_inputs(image), chat.image_inputs(mirrored.copy())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
