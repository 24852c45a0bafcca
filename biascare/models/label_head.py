"""A linear head that gives every label of an image a probability.

head = LabelHead(256, ("melanoma", "melanocytic nevus"), exclusive=True)
logits = head(image_embedding)          # [S, K]

On frozen embeddings it is a linear probe, with a trained encoder a fine-tuned classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LabelHead(nn.Module):
    """Mean over the embedding grid, layer norm, one linear layer."""

    def __init__(self, channels: int, labels: Sequence[str], exclusive: bool):
        """`labels`: at least two different names; `exclusive`: exactly one of them holds.

        Raises ValueError for fewer, or for a name twice.
        """
        super().__init__()
        if len(labels) < 1 + exclusive or len(set(labels)) < len(labels):
            raise ValueError(f"labels: got {list(labels)}, expected different names")
        self.labels = tuple(labels)
        self.exclusive = exclusive
        # Channels of an encoder differ in scale by orders of magnitude, and one learning rate has
        # to do for all of them.
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, len(labels))
        # Zero: before the first step every label is as likely as every other.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, image_embedding: Tensor) -> Tensor:
        """[S, C, h, w] -> logits [S, K]."""
        logits: Tensor = self.linear(self.norm(image_embedding.flatten(2).mean(2)))
        return logits

    def probabilities(self, image_embedding: Tensor) -> Tensor:
        """[S, K] fp32: softmax of exclusive labels, else a sigmoid for each."""
        logits = self(image_embedding).float()
        return logits.softmax(1) if self.exclusive else logits.sigmoid()
