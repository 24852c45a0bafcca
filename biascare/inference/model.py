"""BiasCareVL as a person meets it: an exported folder that segments and answers.

    model = BiasCareVL.from_pretrained("outputs/demo/stage2/export")
    segmentation = model.segment("scan.png", "liver", modality="ct", points=[(120, 88)])
    answer = model.ask("scan.png", "Is there a pneumothorax?", options=["yes", "no"])

Everything is in pixels of the original image; resizing, tokens and prompts are made here as in
training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from biascare.data.chat import ChatBuilder, segmentation_instruction
from biascare.data.labels import LabelSpace
from biascare.data.loader import collate
from biascare.data.transforms import apply_whole
from biascare.inference.answerer import DEFAULT_MAX_NEW_TOKENS, Answerer, Case
from biascare.inference.images import ImageLike, as_pixels
from biascare.inference.labeller import Labeller
from biascare.inference.segmenter import Encoded, Segmenter
from biascare.inference.session import Box, Segmentation, Session, check_prompts
from biascare.interfaces import POINT_POSITIVE, Sample
from biascare.models.export_folder import TrainingFacts, open_network
from biascare.models.language.pathway import load_processor
from biascare.models.network import DualPathNetwork
from biascare.records import Turn
from biascare.settings.keys import ObjectiveConfig


class Answer(NamedTuple):
    """What the model says, and how sure it is of it."""

    text: str
    confidence: float  # 0 to 1, see `BiasCareVL.ask`
    probabilities: dict[str, float]  # of the options among each other; empty without options
    token_log_probs: list[float]  # of generated text; empty with options


class BiasCareVL:
    """A trained network with everything that travels beside its weights."""

    def __init__(
        self,
        network: DualPathNetwork,
        chat: ChatBuilder | None,
        facts: TrainingFacts | None = None,
    ):
        """`chat`: None in the vision stage; `facts`: of the training, None for foreign weights."""
        self.network = network
        self.chat = chat
        self.facts = facts
        size = network.vision.image_size
        # A network that nobody trained is judged by the paper's Eq. 6.
        beta_vl = ObjectiveConfig().beta_vl if facts is None else facts.beta_vl
        self.segmenter = Segmenter(network, chat, image_size=size, beta_vl=beta_vl)
        self.answerer = None if chat is None else Answerer(network, chat, image_size=size)
        head = network.label_head
        space = None if head is None else LabelSpace(head.labels, head.exclusive)
        self.labeller = None if space is None else Labeller(space, network)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        mllm: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> BiasCareVL:
        """Open an exported folder.

        `mllm`: where the base image-text model lies now, if not where it lay in training; `device`:
        a GPU if there is one.

        Raises ValueError when the folder is no export, or something of it is missing.
        """
        network, facts = open_network(folder, mllm=mllm, dtype=dtype)
        # Once, before the first image: a person's click must not wait for gigabytes to move.
        network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chat = None
        if network.mllm is not None:
            chat = ChatBuilder(
                load_processor(str(Path(folder) / "processor")),
                image_size=network.vision.image_size,
                max_tokens=1 << 20,  # a question that a person types is never too long to try
            )
        return cls(network, chat, facts)

    @property
    def mask_prompt(self) -> bool:
        """Whether corrections see the mask before; SAM's weights know it too."""
        return self.facts is None or self.facts.mask_prompt

    def segment(
        self,
        image: ImageLike,
        target: str | None = None,
        *,
        modality: str | None = None,
        points: Sequence[tuple[float, float]] = (),
        labels: Sequence[int] | None = None,
        box: Box | None = None,
    ) -> Segmentation:
        """A first mask, to be looked at and corrected.

        Args:
            image: see `as_pixels`.
            target: the structure in words; None asks by points or a box alone.
            modality: as records name it ("ct", "mri", ...); it makes the instruction the one that
                evaluation uses.
            points: x, y in pixels of the image.
            labels: per point 1 (inside the target, the default) or 0 (outside).
            box: x0, y0, x1, y1.

        Raises ValueError for an unreadable image, prompts outside it, or nothing to go by.
        """
        pixels = as_pixels(image)
        if labels is None:
            labels = [POINT_POSITIVE] * len(points)
        # SAM has more labels (padding, corners of a box) than a person may give by a click.
        if len(labels) != len(points) or not set(labels) <= {0, 1}:
            raise ValueError(
                f"labels: got {list(labels)} for {len(points)} points, expected one 1 (inside the "
                "target) or 0 (outside it) per point"
            )
        instruction = self._instruction(target, modality)
        if instruction is None and not points and box is None:
            raise ValueError(
                "nothing says what to segment; give points=[(x, y)], box=(x0, y0, x1, y1)"
                + (" or a target in words" if self.chat else " (this model reads no text)")
            )
        size = pixels.shape[0], pixels.shape[1]
        placed = zip(points, labels, strict=True)
        clicks = tuple((float(x), float(y), int(label)) for (x, y), label in placed)
        # Before the image is encoded, which may take seconds.
        check_prompts(clicks, box, size)
        return Segmentation.start(
            self.segmenter,
            self.segmenter.encode(pixels, [instruction]),
            size,
            mask_prompt=self.mask_prompt,
            clicks=clicks,
            box=box,
        )

    def session(
        self,
        image: ImageLike,
        target: str | None = None,
        *,
        modality: str | None = None,
        encode: Callable[[NDArray[np.uint8], str | None], Encoded] | None = None,
    ) -> Session:
        """A session of clicks, boxes, undo and redo; `target` and `modality` as in `segment`.

        `encode`: takes the place of the segmenter's, to find what was encoded before; see
        `EmbeddingCache`. Raises ValueError for an unreadable image.
        """
        pixels, instruction = as_pixels(image), self._instruction(target, modality)
        if encode is None:
            encoded = self.segmenter.encode(pixels, [instruction])
        else:
            encoded = encode(pixels, instruction)
        return Session(self.segmenter, pixels, encoded, mask_prompt=self.mask_prompt)

    def _instruction(self, target: str | None, modality: str | None) -> str | None:
        if target is None:
            return None
        if self.chat is None:
            warnings.warn(
                f"target {target!r} is not read: this model has no language side", stacklevel=3
            )
            return None
        # Records name structures without an article; the phrasings bring their own.
        return segmentation_instruction(target.strip().removeprefix("the "), modality)

    def classify(self, image: ImageLike) -> dict[str, float]:
        """Label -> probability, by the label head, the likeliest first.

        Raises ValueError for an unreadable image, or a model without a label head.
        """
        if self.labeller is None:
            raise ValueError(
                "this model has no label head: it was not trained in the labels stage; ask it with "
                "options instead"
            )
        pixels = apply_whole(as_pixels(image), self.segmenter.image_size)
        shown = torch.from_numpy(pixels).permute(2, 0, 1)
        sample = Sample([], shown, None, None, None, facts=[])
        found = self.labeller.probabilities(collate([sample], seed=0, pad_token_id=0))[0]
        shares = dict(zip(self.labeller.space.names, found.tolist(), strict=True))
        return dict(sorted(shares.items(), key=lambda pair: -pair[1]))

    def ask(
        self,
        image: ImageLike,
        question: str,
        *,
        options: Sequence[str] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> Answer:
        """Answer a question about an image.

        With `options` the answer is the likeliest of them, and its confidence their normalised
        probability; the model reads them as it read them in training, lettered, unless they are yes
        and no. Without, the answer is generated, and its confidence is the geometric mean of its
        tokens' probabilities.

        Raises ValueError for an unreadable image, fewer than two options or equal ones, or a model
        without a language side.
        """
        if self.answerer is None:
            raise ValueError(
                "this model answers no questions: it was trained in the vision stage and has no "
                "MLLM pathway"
            )
        pixels = as_pixels(image)
        if options is None:
            turn = Turn("user", question, "open")
            answered = self.answerer.generate(Case(pixels, turn), max_new_tokens=max_new_tokens)[0]
            log_probs = answered.token_log_probs
            # The geometric mean: a product would call every long answer doubtful.
            confidence = math.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0
            return Answer(answered.text, confidence, {}, log_probs)
        if len(options) < 2 or len(set(options)) < len(options):
            raise ValueError(f"options: got {list(options)}, expected two or more different ones")
        # As in training: yes and no are understood, other options are shown with letters.
        kind = "closed" if {option.lower() for option in options} == {"yes", "no"} else "choice"
        scores = self.answerer.score(Case(pixels, Turn("user", question, kind)), options)
        shares = dict(zip(options, scores.softmax(0).tolist(), strict=True))
        best = max(shares, key=lambda option: shares[option])
        return Answer(best, shares[best], shares, [])
