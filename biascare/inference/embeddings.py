"""Encoded images that are kept, because a person comes back to them.

    cache = EmbeddingCache(model.segmenter, max_bytes=512 << 20)
    encoded = cache.encode(image_sha256, pixels, instruction)    # computed once, then found

What was not looked at for the longest time goes first when the bytes are used up.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from biascare.inference.segmenter import Encoded, Segmenter


class EmbeddingCache:
    """Encodings by image and instruction, at most `max_bytes` of them. Safe among threads."""

    def __init__(self, segmenter: Segmenter, *, max_bytes: int):
        self.segmenter = segmenter
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[str, str | None], Encoded] = OrderedDict()
        # One encoding at a time: two would share the same cores, and the next case of a queue,
        # which is encoded ahead, may be asked for meanwhile.
        self._lock = threading.Lock()

    def encode(
        self, image_sha256: str, pixels: NDArray[np.uint8], instruction: str | None
    ) -> Encoded:
        """`Segmenter.encode` of one row, or what it gave before."""
        key = (image_sha256, instruction)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            encoded = self.segmenter.encode(pixels, [instruction])
            # No decoder reads the hidden states, and of a language model they are most of it.
            encoded = encoded._replace(features=encoded.features._replace(hidden_states=None))
            self._kept[key] = encoded
            self.num_bytes += _bytes_of(encoded)
            # One that is larger than the cap by itself is used and not kept.
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= _bytes_of(self._kept.popitem(last=False)[1])
            return encoded

    def __len__(self) -> int:
        return len(self._kept)


def _bytes_of(encoded: Encoded) -> int:
    tensors = (value for value in encoded.features if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
