"""Probabilities of labels: by a label head, or by one yes-or-no question for each.

labeller = Labeller(space, network)                 # the head that the network was trained with
labeller = Labeller(space, network, answerer)       # questions, of a network without a head
labeller.probabilities(batch)                       # [S, K]
"""

from __future__ import annotations

import torch
from torch import Tensor

from biascare.data.labels import LabelSpace
from biascare.data.loader import to_device
from biascare.inference.answerer import Answerer
from biascare.interfaces import Batch
from biascare.models.network import DualPathNetwork

YES_NO = ("yes", "no")


class Labeller:
    """A network that labels images."""

    def __init__(
        self, space: LabelSpace, network: DualPathNetwork, answerer: Answerer | None = None
    ):
        """`answerer`: asks for each label; None where the network's own head knows them."""
        self.space = space
        self.network = network
        self.answerer = answerer

    @torch.inference_mode()
    def probabilities(self, batch: Batch) -> Tensor:
        """[S, K] fp32 on the CPU, of a batch of images, or of K questions about each image."""
        if self.answerer is not None:
            num_questions = len(batch.image_slots)
            scores = self.answerer.score_batch(batch, [YES_NO] * num_questions)
            # Of yes and no among each other: what the model would rather say is no answer.
            yes = torch.stack(scores).softmax(1)[:, 0]
            return yes.reshape(-1, len(self.space.names))
        head = self.network.label_head
        assert head is not None, "this network has no label head"
        self.network.eval()
        features = self.network.encode(to_device(batch, self.network.device))
        assert features.image_embedding is not None
        return head.probabilities(features.image_embedding).cpu()
