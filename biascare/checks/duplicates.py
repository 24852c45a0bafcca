"""Equal and nearly equal images, and keys that stand on both sides of a split.

    print_ = fingerprint(decode_image(row["image"]))
    near = near_pairs(np.stack(perceptual), keep=lambda a, b: split[a] != split[b])
    leak = shared_keys(keys, split)

Two hashes per image, 48 bytes together. `exact` is of the decoded pixels: re-encoding without loss
changes nothing. `perceptual` is the sign of 256 low frequencies; on 1,188 real images of 12 sources
JPEG compression moved at most 10 of its bits and halving the size 16, while one pair in 700,000 of
different images was as near as `NEAR_BITS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

NEAR_BITS = 12
"""Images whose perceptual hashes differ in at most so many of 256 bits are near duplicates."""

_BANDS = 16  # more than NEAR_BITS, so two near hashes agree in at least one band
_LONGEST_RUN = 512  # neighbours compared within a band; equal hashes are neighbours and always met
_SIDE, _FREQUENCIES = 64, 16
_BIT_ORDER = np.random.default_rng(0).permutation(_FREQUENCIES**2)


class Fingerprint(NamedTuple):
    """Of one image."""

    exact: NDArray[np.uint64]  # [2] 128 bits of the decoded pixels and their size
    perceptual: NDArray[np.uint64]  # [4] 256 bits; zeros for a blank image
    is_blank: bool  # hardly any contrast: nothing to compare by


class Shared(NamedTuple):
    """Keys that occur in more than one part."""

    items: NDArray[np.int64]  # [n] every item with such a key, ascending
    examples: list[tuple[int, int]]  # one pair of items of different parts per key


def fingerprint(image: NDArray[np.uint8]) -> Fingerprint:
    """Of an image [H, W, 3] uint8."""
    # With the shape: the same bytes as 10 x 20 and as 20 x 10 are two images.
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(image.tobytes())
    # BOX averages: a sharper filter would hash the noise that compression changes.
    grey = Image.fromarray(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, np.float64)
    # All blank images would be near duplicates of one another.
    is_blank = bool(values.std() < 1)
    # One more row and column than needed leaves 256 frequencies besides the mean.
    low = dctn(values)[: _FREQUENCIES + 1, : _FREQUENCIES + 1].ravel()[1 : _FREQUENCIES**2 + 1]
    # The median halves the bits, so that every hash tells as much.
    bits = (low > np.median(low)) & (not is_blank)
    return Fingerprint(
        exact=np.frombuffer(digest.digest(), np.uint64),
        perceptual=np.packbits(bits[_BIT_ORDER]).view(np.uint64),
        is_blank=is_blank,
    )


def hamming(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[n, 4] and [n, 4] hashes -> [n] number of different bits."""
    different = np.ascontiguousarray(first ^ second).view(np.uint8)
    return _BITS_SET[different].sum(axis=1, dtype=np.int64)


def near_pairs(
    hashes: NDArray[np.uint64],
    keep: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """Pairs [p, 2] of different items whose hashes [n, 4] differ in at most `NEAR_BITS` bits.

    `keep` says of candidate items [m], [m] which pairs are of interest; others cost no memory.
    """
    bands = np.ascontiguousarray(hashes).view(np.uint16)
    found = [np.empty((0, 2), np.int64)]
    for band in range(_BANDS):
        # Sorted by band, then by the rest: equal hashes lie side by side, so that a long run of one
        # band (black borders make some) cannot hide them beyond _LONGEST_RUN.
        order = np.lexsort((*hashes.T, bands[:, band]))
        value = bands[order, band]
        for step in range(1, min(_LONGEST_RUN, len(order) - 1) + 1):
            here = np.flatnonzero(value[:-step] == value[step:])
            if not len(here):
                break
            first, second = order[here], order[here + step]
            # Before the distances: neighbouring slices of a volume are near one another, and no
            # finding.
            wanted = keep(first, second)
            first, second = first[wanted], second[wanted]
            near = hamming(hashes[first], hashes[second]) <= NEAR_BITS
            pair = np.stack([first[near], second[near]], axis=1)
            # Two bands may find the same pair, in either order; `np.unique` at the end keeps one.
            found.append(np.sort(pair, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def shared_keys(
    keys: NDArray[np.uint64], parts: NDArray[np.int64], limit: int | None = None
) -> Shared:
    """Items whose key [n] or [n, k] occurs in more than one of the parts [n].

    Examples are at most `limit`.
    """
    columns = keys[:, None] if keys.ndim == 1 else keys
    order = np.lexsort((parts, *columns.T))
    ordered = columns[order]
    is_new = np.ones(len(keys), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = np.flatnonzero(is_new)
    lengths = np.diff(starts, append=len(keys))
    # Sorted by part within a key: a key is shared when its first and last part differ.
    first, last = order[starts], order[starts + lengths - 1]
    mixed = parts[first] != parts[last]
    examples = list(zip(first[mixed][:limit].tolist(), last[mixed][:limit].tolist(), strict=True))
    return Shared(items=np.sort(order[np.repeat(mixed, lengths)]), examples=examples)


def key_of(*parts: str) -> int:
    """64 bits of some strings, the same in every process."""
    # Not `hash`, which differs between processes; and ("ab", "c") is another key than ("a", "bc").
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


_BITS_SET = np.array([bin(value).count("1") for value in range(256)], np.uint8)
