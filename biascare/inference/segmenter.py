"""Encode an image and its instructions once, decode as often as there are clicks.

    segmenter = Segmenter(network, chat, image_size=256, beta_vl=0.5)
    encoded = segmenter.encode(pixels, ["Outline the liver."])
    decoded = segmenter.decode(encoded, prompts)
    decoded = segmenter.decode(encoded, more_prompts, decoded.prediction.low_res_logits)

Training's evaluation and the benchmark runner enter with a whole batch (`encode_batch`); the rest
is the same, so a simulated click and a person's give the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from biascare.data.chat import ChatBuilder
from biascare.data.loader import collate, to_device
from biascare.data.transforms import apply_whole
from biascare.interfaces import Batch, DualPathModel, Features, Prediction, Prompts, Sample
from biascare.records import Turn
from biascare.uncertainty import JITTER, disagreement, jittered, label_free


class Encoded(NamedTuple):
    """R rows, ready to decode."""

    features: Features
    row_image: Tensor  # [R] int64 into the image embeddings


class Decoded(NamedTuple):
    """Masks of R rows and what can be said of them without their truth."""

    prediction: Prediction
    uncertainty: dict[str, Tensor]  # by name, [R] fp32 each; see `label_free`


class Segmenter:
    """A network that segments, with what it needs to read images and words."""

    def __init__(
        self,
        network: DualPathModel,
        chat: ChatBuilder | None,
        *,
        image_size: int,
        beta_vl: float,
    ):
        """`chat`: None where the network reads no text; `image_size`: pixels of its square input;
        `beta_vl`: of Eq. 6, as it was trained."""
        self.network = network
        self.chat = chat
        self.image_size = image_size
        self.beta_vl = beta_vl

    def encode(self, image: NDArray[np.uint8], instructions: Sequence[str | None]) -> Encoded:
        """`image` [H, W, 3] uint8, native; one row per instruction. None asks without words: then
        all of them are None."""
        pixels = apply_whole(image, self.image_size)
        sequences = []
        if self.chat is not None and instructions[0] is not None:
            inputs = self.chat.image_inputs(pixels)
            for text in instructions:
                assert text is not None
                turns = [Turn("user", text, "segmentation")]
                sequences.append(self.chat.sequence(turns) | {"image": inputs})
        num_rows = len(instructions)
        sample = Sample(
            sequences=sequences,
            image=torch.from_numpy(pixels).permute(2, 0, 1),
            masks=None,
            point_coords=torch.zeros(num_rows, 0, 2),
            point_labels=torch.zeros(num_rows, 0, dtype=torch.int64),
            facts=[],
        )
        pad = self.chat.tokenizer.pad_token_id if self.chat else 0
        # Through the collator of training, so that a person's image becomes what a record's does.
        return self.encode_batch(collate([sample], seed=0, pad_token_id=pad))

    @torch.inference_mode()
    def encode_batch(self, batch: Batch) -> Encoded:
        """A collated batch with images, on any device."""
        batch = to_device(batch, self.network.device)
        assert batch.row_image is not None, "a batch of questions has nothing to segment"
        # Dropout would make an evaluation in the middle of training random.
        self.network.eval()
        return Encoded(features=self.network.encode(batch), row_image=batch.row_image)

    @torch.inference_mode()
    def decode(self, encoded: Encoded, prompts: Prompts, previous: Tensor | None = None) -> Decoded:
        """`prompts` of the R rows in pixels of the model input; `previous` [R, 4h, 4w]: the logits
        of the round before."""
        device = encoded.row_image.device
        prediction = self.network.decode_masks(
            encoded.features,
            Prompts(*(field.to(device) for field in prompts)),
            encoded.row_image,
            mask_prompt=previous,
        )
        # With every mask: after each click a person sees whether it helped.
        uncertainty = label_free(encoded.features, prediction, encoded.row_image, self.beta_vl)
        return Decoded(prediction=prediction, uncertainty=uncertainty)

    @torch.inference_mode()
    def click_disagreement(
        self,
        encoded: Encoded,
        prompts: Prompts,
        decoded: Decoded,
        previous: Tensor | None = None,
    ) -> Tensor:
        """[R] how far the masks change when clicks or box corners move by a few pixels.

        `decoded` is what the same `prompts` and `previous` gave. One more call of the decoder, with
        all directions of all rows: too much for every click, so it is asked for where it is read.
        """
        num, features = len(JITTER), encoded.features
        text = features.text_embedding
        if text is not None:
            features = features._replace(text_embedding=text.repeat(num, 1, 1))
        moved = jittered(prompts, self.image_size)
        others = self.network.decode_masks(
            features,
            Prompts(*(field.to(encoded.row_image.device) for field in moved)),
            encoded.row_image.repeat(num),
            mask_prompt=None if previous is None else previous.repeat(num, 1, 1),
        )
        # At the decoder's own size: it ranks masks as well as the larger one.
        return disagreement(decoded.prediction.low_res_logits, others.low_res_logits)
