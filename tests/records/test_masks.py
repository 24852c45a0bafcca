"""Mask codes: ours agree with COCO's, and no bytes whatever crash or pass for another mask."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from biascare.records import decode_mask, encode_mask, mask_runs

KILLER = b"0" * 23 + b"P"
"""pycocotools 2.0.11 writes beyond its memory when it decodes this."""

MASKS = hnp.arrays(
    np.bool_,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.booleans(),
)


def blob(size: int) -> np.ndarray:
    """A disc with a hole: [S, S] bool."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    radius = np.hypot(rows, columns)
    return (radius < 0.4) & (radius > 0.1)


def decoded_or_refused(rle: bytes, height: int, width: int) -> None:
    """Whatever the bytes are: a mask of this size that they are the code of, or an error."""
    try:
        mask = decode_mask(rle, height, width)
    except ValueError as error:
        assert f"does not describe {height} x {width} pixels" in str(error)
        return
    assert mask.shape == (height, width) and mask.max(initial=0) <= 1
    runs = mask_runs(rle, height, width)
    assert runs.sum() == height * width and runs[0] >= 0 and (runs[1:] > 0).all()
    assert mask_runs(encode_mask(mask > 0), height, width).tolist() == runs.tolist()


@settings(deadline=None, max_examples=100)
@given(MASKS)
@example(np.zeros((1, 1), np.bool_))
@example(np.ones((7, 3), np.bool_))
def test_decoding_agrees_with_pycocotools(mask: np.ndarray) -> None:
    rle = encode_mask(mask)
    ours = decode_mask(rle, *mask.shape)
    theirs = coco.decode({"size": list(mask.shape), "counts": rle})
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous and ours.flags.writeable
    np.testing.assert_array_equal(decode_mask(rle, *mask.shape, by_rows=False), mask)


@pytest.mark.parametrize("size", [512, 2000])
def test_large_masks_agree_with_pycocotools_too(size: int) -> None:
    mask = blob(size)
    rle = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(rle, size, size), mask)
    np.testing.assert_array_equal(coco.decode({"size": [size, size], "counts": rle}), mask)


@settings(deadline=None, max_examples=60)
@given(mask=MASKS, data=st.data())
def test_no_flipped_bit_and_no_cut_passes_for_another_size(
    mask: np.ndarray, data: st.DataObject
) -> None:
    rle = encode_mask(mask)
    for bit in range(8 * len(rle)):
        changed = bytearray(rle)
        changed[bit // 8] ^= 1 << bit % 8
        decoded_or_refused(bytes(changed), *mask.shape)
    for length in range(len(rle)):
        with pytest.raises(ValueError, match="does not describe"):
            decode_mask(rle[:length], *mask.shape)
    with pytest.raises(ValueError, match="does not describe"):
        decode_mask(rle, mask.shape[0] + data.draw(st.integers(1, 9)), mask.shape[1])


@settings(deadline=None, max_examples=300)
@given(rle=st.binary(max_size=60) | st.text("0123PQ`oW", max_size=40).map(str.encode))
@example(KILLER)
@example(b"")
@example(b"o" * 30 + b"0")
def test_no_bytes_whatever_crash_or_hang(rle: bytes) -> None:
    decoded_or_refused(rle, 6, 7)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (b"", "it is empty"),
        (b"6\x00", "bytes that no code has"),
        (b"6~", "bytes that no code has"),
        (b"6P", "ends inside a number"),
        (b"PPPPPP1", "a number in it is too long"),
        (b"150", "a run has no pixel"),
        (b"O7", "a run has no pixel"),  # -1, 7
        (b"15", "it has 6 pixels"),
    ],
)
def test_a_damaged_code_says_what_is_wrong(rle: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"{len(rle)} bytes does not describe 2 x 2.*{message}"):
        decode_mask(rle, 2, 2)


def test_the_code_that_kills_pycocotools_is_refused_a_thousand_times() -> None:
    program = (
        "from biascare.records import decode_mask\n"
        "for _ in range(1000):\n"
        "    try:\n"
        f"        decode_mask({KILLER!r}, 64, 64)\n"
        "    except ValueError:\n"
        "        continue\n"
        "    raise SystemExit('decoded')\n"
        "print('alive')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(ValueError, match="bool array"):
        encode_mask(np.zeros((2, 2), dtype=np.uint8))
