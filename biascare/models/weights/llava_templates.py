"""The prompts that LLaVA's relatives were tuned on, as chat templates with image parts.

template = original_chat_template(config, own=tokenizer.chat_template)
template = with_image_parts(tokenizer.chat_template)     # of any language model
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

IMAGE_TOKEN = "<image>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
"""Written around an image by checkpoints with `mm_use_im_start_end`."""


FLATTEN_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- set text.value = text.value + (IMAGE if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.value}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Jinja that turns messages of image and text parts into messages of plain text."""

MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HUATUO_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA_TEMPLATE = (
    "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions.' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""The prompts these checkpoints were tuned on. No blank before an answer: a SentencePiece tokenizer
begins every piece with one by itself."""


class OriginalFamily(NamedTuple):
    """What a `model_type` of LLaVA's code stands for."""

    language_model: str  # model_type of the language model in transformers
    chat_template: str


ORIGINAL_FAMILIES = {
    "llava": OriginalFamily("llama", VICUNA_TEMPLATE),
    "llava_llama": OriginalFamily("llama", VICUNA_TEMPLATE),
    "llava_mistral": OriginalFamily("mistral", MISTRAL_TEMPLATE),
    "llava_qwen2": OriginalFamily("qwen2", HUATUO_TEMPLATE),
}


def with_image_parts(template: str, image_text: str = IMAGE_TOKEN) -> str:
    """A chat template of plain text, extended to messages with image parts.

    `image_text` stands in the text where the image part stood.
    """
    # Put before the template instead of edited into it: any template can be read as it is.
    return FLATTEN_PARTS.replace("IMAGE", repr(image_text)) + template


def original_chat_template(config: Mapping[str, Any], own: Any) -> str:
    """The checkpoint's `own` template where it knows images, else that of its family.

    `config`: its config.json, which says what stands around an image.
    """
    # Any other is one for plain text, which cannot show the parts of a message.
    if isinstance(own, str) and "image" in own:
        return own
    image = IMAGE_TOKEN
    if config.get("mm_use_im_start_end"):
        image = f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}"
    # The line break is part of what LLaVA's code puts before a question.
    return with_image_parts(ORIGINAL_FAMILIES[config["model_type"]].chat_template, f"{image}\n")
