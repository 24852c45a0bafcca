"""Image, masks and prompts move together, and nothing small is lost."""

import io
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from biascare.data import mask_resize, transforms
from biascare.data.prompts import PROMPT_KINDS, box_from_mask, draw_prompts, first_point
from biascare.data.transforms import (
    Geometry,
    apply_image,
    apply_mask,
    apply_points,
    decode_image,
    draw_geometry,
    draw_intensity,
    invert_points,
    names_side,
    restore_logits,
    restore_mask,
)
from biascare.records.vocabulary import MODALITIES
from biascare.settings.keys import DataConfig

FEW = settings(deadline=None, max_examples=25)
EIGHT = np.ones((3, 3), bool)
PACK = Path(__file__).resolve().parents[3] / "shared" / "data"


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def disc(height, width, x, y, radius):
    """Pixels whose centre lies in a circle, x and y as edges."""
    rows, columns = np.indices((height, width)) + 0.5
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2).astype(np.uint8)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


# ---------------------------------------------------------------- decoding


def test_grey_becomes_three_equal_channels():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    decoded = decode_image(encode(Image.fromarray(grey)))
    assert decoded.shape == (3, 4, 3) and decoded.dtype == np.uint8 and decoded.flags.writeable
    assert (decoded == grey[..., None]).all()


def test_sixteen_bit_grey_is_stretched_between_its_own_extremes():
    deep = np.array([[1000, 1100], [1200, 2000]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(deep)))[..., 0]
    assert decoded.tolist() == [[0, 26], [51, 255]]  # 25.5 rounds to even, 51.0
    assert not decode_image(encode(Image.fromarray(np.full((2, 2), 900, np.uint16)))).any()


def test_floating_point_grey_ignores_what_is_not_finite():
    grey = np.array([[-1.0, 0.0], [1.0, np.nan]], np.float32)
    decoded = decode_image(encode(Image.fromarray(grey), "TIFF"))[..., 0]
    assert decoded.tolist() == [[0, 128], [255, 0]]


def test_transparent_pixels_lie_on_black_and_opaque_ones_keep_their_colour():
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], np.uint8)
    decoded = decode_image(encode(Image.fromarray(rgba)))
    assert decoded.tolist() == [[[200, 100, 50], [0, 0, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_every_mode_of_pil_decodes_to_three_channels(mode):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG"
    assert decode_image(encode(image, kind)).shape == (8, 8, 3)


def test_an_exif_orientation_leaves_the_stored_pixels_alone():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    assert (decode_image(encode(image, exif=exif)) == pixels).all()


def test_damaged_files_are_refused_with_a_value_error():
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    jpeg = encode(Image.open(io.BytesIO(data)), "JPEG")
    for broken in (b"", b"no image", data[:-200], data[:30], jpeg[: len(jpeg) // 2]):
        with pytest.raises(ValueError, match="do not decode"):
            decode_image(broken)


@FEW
@given(st.integers(0, 400), st.integers(1, 255), st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]))
def test_a_flipped_byte_gives_an_image_or_a_value_error(position, change, kind):
    data = bytearray(encode(Image.fromarray(np.full((16, 16, 3), 77, np.uint8)), kind))
    data[position % len(data)] ^= change
    try:
        assert decode_image(bytes(data)).shape[2] == 3
    except ValueError as error:
        assert "image: got" in str(error)


def test_an_image_with_too_many_pixels_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="11 x 10 pixels, expected at most 100"):
        decode_image(encode(Image.new("L", (11, 10))))


def test_a_bomb_that_pil_itself_refuses_is_a_value_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="do not decode"):
        decode_image(encode(Image.new("L", (30, 30))))


# ---------------------------------------------------------------- geometry of images and points


def test_the_full_geometry_at_equal_size_is_the_identity():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    geometry = Geometry.full(32, 32, 32)
    assert (apply_image(image, geometry) == image).all()
    assert (apply_mask(image[..., 0] > 99, geometry) == (image[..., 0] > 99)).all()
    assert np.allclose(apply_points([[3, 0], [31, 31]], geometry), [[3, 0], [31, 31]])


def test_points_are_pixel_centres():
    # Four times smaller: native pixels 0..3 share result pixel 0, whose centre is native 1.5.
    geometry = Geometry.full(400, 400, 100)
    assert np.allclose(apply_points([[1.5, 1.5], [0, 3]], geometry), [[0, 0], [-0.375, 0.375]])
    mirrored = geometry._replace(flip=True)
    assert np.allclose(apply_points([1.5, 1.5], mirrored), [99, 0])
    crop = Geometry(x0=10, y0=20, x1=30, y1=60, flip=False, size=40)
    assert np.allclose(apply_points([10, 20], crop), [0.5, 0])


@st.composite
def geometries(draw, limit=80):
    height, width = draw(st.integers(2, limit)), draw(st.integers(2, limit))
    x0 = draw(st.integers(0, width - 1))
    y0 = draw(st.integers(0, height - 1))
    x1 = draw(st.integers(x0 + 1, width))
    y1 = draw(st.integers(y0 + 1, height))
    geometry = Geometry(
        x0=x0, y0=y0, x1=x1, y1=y1, flip=draw(st.booleans()), size=draw(st.integers(4, limit))
    )
    return height, width, geometry


@FEW
@given(geometries(), st.floats(-5, 90), st.floats(-5, 90))
def test_inverted_points_come_back(case, x, y):
    _, _, geometry = case
    there = apply_points(np.array([[x, y]]), geometry)
    assert np.allclose(invert_points(there, geometry), [[x, y]])


@FEW
@given(geometries(), st.randoms(use_true_random=False))
def test_a_pixel_of_image_mask_and_point_lands_in_one_place(case, random):
    height, width, geometry = case
    assume(geometry.x1 - geometry.x0 <= geometry.size >= geometry.y1 - geometry.y0)  # enlarging
    x = random.randrange(int(geometry.x0), int(geometry.x1))
    y = random.randrange(int(geometry.y0), int(geometry.y1))
    image = np.zeros((height, width, 3), np.uint8)
    image[y, x] = 255
    bright = apply_image(image, geometry)[..., 0].astype(float)
    rows, columns = np.nonzero(bright == bright.max())
    point = apply_points([x, y], geometry)
    # A plateau at the crop border is clamped, so its centre may lie half a native pixel away.
    reach = 0.5 * geometry.size / np.array([geometry.x1 - geometry.x0, geometry.y1 - geometry.y0])
    assert (abs(np.array([columns.mean(), rows.mean()]) - point) <= reach + 0.51).all()
    mask = apply_mask(image[..., 0], geometry)
    column, row = np.rint(point).astype(int).clip(0, geometry.size - 1)
    # A pixel that straddles two rows of cells gets its area from both, not every cell of either.
    around = mask[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    assert around.any()


def test_mirroring_the_geometry_mirrors_image_and_mask():
    image = np.random.default_rng(1).integers(0, 255, (50, 70, 3), np.uint8)
    geometry = Geometry(x0=5, y0=3, x1=60, y1=48, flip=False, size=32)
    mirrored = geometry._replace(flip=True)
    assert (apply_image(image, mirrored) == apply_image(image, geometry)[:, ::-1]).all()
    mask = image[..., 0] > 200
    assert (apply_mask(mask, mirrored) == apply_mask(mask, geometry)[:, ::-1]).all()


def test_a_crop_outside_the_image_is_refused():
    geometry = Geometry.full(20, 20, 8)
    with pytest.raises(ValueError, match="16 x 20 pixels"):
        apply_mask(np.ones((20, 16)), geometry)
    with pytest.raises(ValueError, match="expected one inside"):
        apply_image(np.zeros((20, 20, 3), np.uint8), geometry._replace(x0=20))


@pytest.mark.parametrize("native", [(512, 512), (100, 60), (64, 64)])
def test_restored_logits_cross_zero_where_the_native_edge_is(native):
    height, width = native
    geometry = Geometry.full(height, width, 64)
    columns = invert_points(np.stack([np.arange(64), np.zeros(64)], -1), geometry)[:, 0]
    logits = torch.tensor(columns - (width * 0.4 - 0.5)).expand(2, 1, 64, 64)
    restored = restore_logits(logits, height, width)
    assert restored.shape == (2, 1, height, width) and restored.dtype == torch.float32
    mask = restore_mask(logits, height, width)
    assert mask.dtype == torch.uint8
    assert abs(mask.float().mean().item() - 0.6) <= 1 / width


# ---------------------------------------------------------------- masks


def by_definition(mask, geometry):
    """`apply_mask` from its definition: dense overlap matrices, one component after another."""

    def overlaps(start, stop, num_pixels):
        edges = np.linspace(start, stop, geometry.size + 1)
        pixel = np.arange(num_pixels)
        shared = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
        return shared.clip(0) / np.diff(edges)[:, None]

    rows = overlaps(geometry.y0, geometry.y1, mask.shape[0])
    columns = overlaps(geometry.x0, geometry.x1, mask.shape[1])
    inside = np.zeros_like(mask)
    crop = np.s_[int(geometry.y0) : int(geometry.y1), int(geometry.x0) : int(geometry.x1)]
    inside[crop] = mask[crop]
    labels, count = ndimage.label(inside, EIGHT)
    result = np.zeros((geometry.size, geometry.size), np.uint8)
    for component in range(1, count + 1):
        covered = rows @ (labels == component) @ columns.T
        nearby = np.maximum(ndimage.maximum_filter(covered, 3, mode="constant"), 1e-9)
        level = np.floor(8 * covered / nearby + 0.5 + 1e-6)
        ranked = []
        for row, column in zip(*np.nonzero(covered > 1e-6), strict=True):
            run = 16 if nearby[row, column] > 1 - 1e-6 else 1
            spread = (0.7548776662 * (row // run + 1) + 0.5698402910 * (column // run + 1)) % 1
            full = covered[row, column] > 1 - 1e-6
            ranked.append((not full, -level[row, column], spread, row, column))
        for *_, row, column in sorted(ranked)[: max(1, math.floor(covered.sum() + 0.5 + 1e-6))]:
            result[row, column] = 1
    return result[:, ::-1] if geometry.flip else result


@settings(deadline=None, max_examples=60)
@given(geometries(limit=40), st.integers(0, 10**6), st.floats(0.02, 0.9))
def test_resizing_all_components_at_once_agrees_with_the_definition(case, seed, density):
    height, width, geometry = case
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    assert (apply_mask(mask, geometry) == by_definition(mask, geometry)).all()


def test_a_straight_edge_gets_a_step_or_two_and_no_teeth():
    mask = np.zeros((240, 320), np.uint8)
    mask[40:100, 60:140] = 1  # at 2.4 by 1.74 pixels a cell, no edge lies between two cells
    resized = apply_mask(mask, Geometry(3.3, 5.7, 310.2, 229.1, False, 128))
    rows, columns = (np.flatnonzero(resized.any(axis=axis)) for axis in (1, 0))
    for edge in (
        resized[rows[0]],
        resized[rows[-1]],
        resized.T[columns[0]],
        resized.T[columns[-1]],
    ):
        steps = np.diff(edge.astype(int))
        assert np.count_nonzero(steps) <= 6  # 2 for each run, at most 3 runs


def test_memory_bounded_chunks_do_not_change_the_result(monkeypatch):
    mask = np.random.default_rng(0).random((90, 70)) < 0.2
    expected = apply_mask(mask, Geometry.full(90, 70, 32))
    monkeypatch.setattr(mask_resize, "_CHUNK", 20)
    assert (apply_mask(mask, Geometry.full(90, 70, 32)) == expected).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(16, 1024), st.integers(16, 1024), st.integers(32, 256), st.data())
def test_a_lesion_of_one_pixel_survives_every_resize(height, width, size, data):
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    mask = np.zeros((height, width), np.uint8)
    mask[y, x] = 1
    resized = apply_mask(mask, Geometry.full(height, width, size))
    expected = max(1, math.floor(size * size / (height * width) + 0.5 + 1e-6))
    assert resized.sum() == expected
    cells = np.argwhere(resized)[:, ::-1]
    reach = 0.5 + 0.5 * size / np.array([width, height])  # half a cell and half the lesion
    away = abs(cells - apply_points([x, y], Geometry.full(height, width, size)))
    assert (away < reach).all()


@FEW
@given(st.integers(40, 400), st.integers(40, 400), st.integers(32, 128), st.data())
def test_a_component_keeps_its_area(height, width, size, data):
    x0, y0 = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 1
    area = mask.sum() * (size / height) * (size / width)
    resized = apply_mask(mask, Geometry.full(height, width, size)).sum()
    assert resized == 1 or abs(resized - area) <= 0.5 + 1e-5


@FEW
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_enlarging_by_whole_numbers_is_nearest_neighbour(vertical, horizontal, seed):
    size = 12 * vertical * horizontal
    shape = (size // vertical, size // horizontal)
    mask = (np.random.default_rng(seed).random(shape) < 0.4).astype(np.uint8)
    nearest = mask.repeat(vertical, axis=0).repeat(horizontal, axis=1)
    assert (apply_mask(mask, Geometry.full(*shape, size)) == nearest).all()


def test_empty_stays_empty_and_full_stays_full():
    geometry = Geometry.full(300, 211, 64)
    assert not apply_mask(np.zeros((300, 211)), geometry).any()
    assert apply_mask(np.full((300, 211), 255), geometry).all()


def test_separate_blobs_stay_separate():
    mask = np.zeros((900, 900), np.uint8)
    for index in range(36):
        row, column = divmod(index, 6)
        mask |= disc(900, 900, 75 + 150 * column, 75 + 150 * row, 1 + index)
    resized = apply_mask(mask, Geometry.full(900, 900, 128))
    assert ndimage.label(resized, EIGHT)[1] == 36


@pytest.mark.parametrize("angle", [0, 2, 10, 27, 45, 80, 90])
def test_a_line_two_pixels_wide_keeps_its_whole_length_at_a_quarter(angle):
    rows, columns = np.indices((1024, 1024))
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    across = (columns - 511.3) * sine - (rows - 507.7) * cosine
    along = (columns - 511.3) * cosine + (rows - 507.7) * sine
    line = (abs(across) < 1) & (abs(along) < 400)
    geometry = Geometry.full(1024, 1024, 256)
    resized = apply_mask(line, geometry)
    distance = ndimage.distance_transform_edt(resized == 0)
    places = apply_points(np.argwhere(line)[:, ::-1], geometry)
    column, row = np.rint(places).astype(int).T
    gap, pieces = distance[row, column], ndimage.label(resized, EIGHT)[1]
    print(
        f"{angle:2d} degrees: {resized.sum()} px in {pieces} pieces, "
        f"{(gap < 1.5).mean():.1%} of the line within one px, farthest {gap.max():.1f} px"
    )
    assert gap.max() <= 4 and (gap < 1.5).mean() > 0.8


@pytest.mark.parametrize(("native", "radius"), [(512, 150.3), (512, 20.2), (1024, 30.7), (300, 90)])
def test_a_disc_agrees_with_the_analytic_disc(native, radius):
    scale = 256 / native
    resized = apply_mask(
        disc(native, native, 0.55 * native, 0.43 * native, radius),
        Geometry.full(native, native, 256),
    )
    score = dice(resized, disc(256, 256, 0.55 * 256, 0.43 * 256, radius * scale))
    print(f"disc of radius {radius} at {native} px: Dice {score:.4f}")
    assert score > 0.97


def test_the_cost_of_resizing_does_not_grow_with_the_number_of_components():
    crowded = np.zeros((512, 512), np.uint8)
    for index in range(300):
        row, column = divmod(index, 20)
        crowded[row * 32 + 4 : row * 32 + 14, column * 25 + 4 : column * 25 + 13] = 1
    for name, mask in (("one component", disc(512, 512, 250, 260, 120)), ("300", crowded)):
        apply_mask(mask, Geometry.full(512, 512, 256))
        start = time.process_time()
        for _ in range(10):
            apply_mask(mask, Geometry.full(512, 512, 256))
        print(f"{name}: {(time.process_time() - start) * 100:.1f} ms")


# ---------------------------------------------------------------- augmentation


@FEW
@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 2**63 - 1), st.data())
def test_a_drawn_crop_keeps_at_least_half_of_every_target(height, width, key, data):
    masks = np.zeros((2, height, width), np.uint8)
    for mask in masks:
        x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        mask[y : y + data.draw(st.integers(1, 40)), x : x + data.draw(st.integers(1, 40))] = 1
    drawn = draw_geometry(height, width, masks, 64, key, augment=True, allow_flip=True)
    assert 0 <= drawn.x0 < drawn.x1 <= width and 0 <= drawn.y0 < drawn.y1 <= height
    for mask in masks:
        inside = mask[int(drawn.y0) : int(drawn.y1), int(drawn.x0) : int(drawn.x1)]
        assert 2 * inside.sum() >= mask.sum() and apply_mask(mask, drawn).any()
    again = draw_geometry(height, width, list(masks), 64, key, augment=True, allow_flip=True)
    assert again == drawn


def test_crops_of_images_without_targets_follow_scale_and_aspect():
    drawn = [draw_geometry(300, 600, [], 64, k, augment=True, allow_flip=True) for k in range(400)]
    shares = np.array([(g.x1 - g.x0) * (g.y1 - g.y0) / 180_000 for g in drawn])
    aspects = np.array([(g.x1 - g.x0) / (g.y1 - g.y0) / 2 for g in drawn])
    assert shares.min() > 0.58 and shares.max() <= 1 and 0.7 < shares.mean() < 0.9
    assert aspects.min() > 0.73 and aspects.max() < 1.37
    assert 140 < sum(g.flip for g in drawn) < 260
    assert min(g.x0 for g in drawn) == 0 and max(g.x1 for g in drawn) == 600


def test_no_crop_without_augmentation_and_no_mirror_unless_allowed():
    plain = [draw_geometry(30, 40, [], 64, k, augment=False, allow_flip=True) for k in range(9)]
    assert plain == [Geometry.full(30, 40, 64)] * 9
    kept = [draw_geometry(30, 40, [], 64, k, augment=True, allow_flip=False) for k in range(99)]
    free = [draw_geometry(30, 40, [], 64, k, augment=True, allow_flip=True) for k in range(99)]
    assert not any(g.flip for g in kept)
    assert kept == [g._replace(flip=False) for g in free]  # forbidding it moves nothing else


def test_a_target_in_two_far_corners_falls_back_to_a_wide_crop():
    masks = np.zeros((2, 100, 100), np.uint8)
    masks[0, :2, :2] = masks[1, -2:, -2:] = 1
    for key in range(30):
        g = draw_geometry(100, 100, masks, 64, key, augment=True, allow_flip=False)
        assert g.x0 <= 1 and g.y0 <= 1 and g.x1 >= 99 and g.y1 >= 99


def test_intensity_is_mild_pure_and_keeps_grey_grey():
    image = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64, 1).repeat(3, axis=2)
    seen = [draw_intensity(image, key) for key in range(40)]
    assert all(i.shape == image.shape and i.dtype == np.uint8 for i in seen)
    assert all((i[..., 0] == i[..., 2]).all() for i in seen)
    assert max(abs(i.astype(int) - image).mean() for i in seen) < 60
    assert (seen[3] == draw_intensity(image, 3)).all() and (seen[3] != seen[4]).any()


def test_crop_intensity_and_prompts_of_one_key_use_separate_streams():
    first = [transforms._generator(7, stream).random() for stream in range(3)]
    assert len(set(first)) == 3


@pytest.mark.parametrize(
    "text",
    ["Left kidney", "kidney_left", "the RIGHT lung.", "right-sided effusion", "bilateral opacities",
     "lateral view", "leftward shift", "contralateral", "RUL nodule", "at 3 o'clock", "OD", "左肺"],
)  # fmt: skip
def test_words_that_name_a_side_are_found(text):
    assert names_side(text)


@pytest.mark.parametrize(
    "text",
    ["liver", "bright upright image", "leftover", "collateral vessels",
     "Is there a fracture at L4?", "od of the lens", "aorta", "copyright", ""],
)  # fmt: skip
def test_words_that_only_look_like_a_side_are_not(text):
    assert not names_side(text)


@pytest.mark.parametrize(
    ("modality", "anatomy", "text", "allowed"),
    [
        ("ct", "abdomen", "liver", {"names"}),
        ("fundus", "eye", "optic disc", {"names"}),
        ("", "", "tumor", {"names"}),
        ("dermoscopy", "skin", "lesion", {"names", "safe"}),
        ("pathology", "", "nucleus", {"names", "safe"}),
        ("endoscopy", "Colon", "polyp", {"names", "safe"}),
        ("endoscopy", "abdomen", "gallbladder", {"names"}),  # laparoscopy
        ("endoscopy", "", "instrument", {"names"}),
        ("dermoscopy", "skin", "left border", set()),
    ],
)  # fmt: skip
def test_what_has_a_side_of_its_own_is_mirrored_only_where_names_alone_decide(
    modality, anatomy, text, allowed
):
    found = {f for f in transforms.FLIPS if transforms.may_mirror(f, modality, anatomy, [text])}
    assert found == allowed


def test_every_modality_that_may_be_mirrored_is_one_of_the_records():
    assert set(transforms.SIDELESS) <= set(MODALITIES)
    assert get_args(get_type_hints(DataConfig)["flip"]) == transforms.FLIPS


# ---------------------------------------------------------------- prompts


def test_kinds_follow_the_mix_and_slots_keep_their_order():
    masks = np.repeat(disc(32, 32, 16, 16, 8)[None], 2000, axis=0)
    mix = {"point": 0.5, "box": 0.2, "point_and_box": 0.1, "text": 0.2}
    coords, labels = draw_prompts(masks, 5, mix)
    assert coords.shape == (2000, 3, 2) and coords.dtype == np.float32
    assert labels.shape == (2000, 3) and labels.dtype == np.int64
    patterns = {"point": (1, -1, -1), "box": (-1, 2, 3), "point_and_box": (1, 2, 3),
                "text": (-1, -1, -1)}  # fmt: skip
    for kind, pattern in patterns.items():
        share = (labels == pattern).all(axis=1).mean()
        assert abs(share - mix[kind]) < 0.05
    assert not coords[labels == -1].any()


@FEW
@given(st.integers(0, 10**6), st.integers(0, 2**63 - 1), st.floats(0.001, 0.6))
def test_clicks_lie_inside_and_boxes_near_the_target(seed, key, density):
    masks = (np.random.default_rng(seed).random((4, 33, 47)) < density).astype(np.uint8)
    masks[0] = 0
    masks[1] = 0
    masks[1, seed % 33, seed % 47] = 1
    coords, labels = draw_prompts(masks, key, {"point_and_box": 1})
    assert (labels[0] == -1).all() and not coords[0].any()
    for mask, points, kinds in zip(masks[1:], coords[1:], labels[1:], strict=True):
        if not mask.any():
            continue
        assert kinds.tolist() == [1, 2, 3]
        x, y = points[0].astype(int)
        assert mask[y, x] == 1 and (points[0] == (x, y)).all()
        (x0, y0), (x1, y1) = points[1:]
        assert 0 <= x0 < x1 <= 46 and 0 <= y0 < y1 <= 32
        tight = box_from_mask(mask)
        sides = np.array([tight[2] - tight[0] + 1, tight[3] - tight[1] + 1] * 2)
        assert (abs(np.array([x0, y0, x1, y1]) - tight) <= np.maximum(0.1 * sides, 1) + 1e-4).all()
    again = draw_prompts(masks, key, {"point_and_box": 1})
    assert (again[0] == coords).all() and (again[1] == labels).all()


def test_small_components_are_clicked_in_proportion_to_the_root_of_their_area():
    mask = np.zeros((64, 64), np.uint8)
    mask[2:32, 2:32] = 1  # 900 pixels, root 30
    mask[50:60, 50:60] = 1  # 100 pixels, root 10
    coords, _ = draw_prompts(np.repeat(mask[None], 1200, axis=0), 1, {"point": 1})
    small = (coords[:, 0, 0] > 40).mean()
    assert abs(small - 0.25) < 0.05


def test_clicks_keep_off_the_border():
    mask = np.zeros((32, 32), np.uint8)
    mask[6:27, 6:27] = 1  # 21 x 21: depth 1 on the 80 border pixels, at most 11 in the middle
    coords, _ = draw_prompts(np.repeat(mask[None], 1500, axis=0), 2, {"point": 1})
    x, y = coords[:, 0].T
    border = (np.minimum.reduce([x - 6, 26 - x, y - 6, 26 - y]) == 0).mean()
    total = sum((21 - 2 * ring) ** 2 for ring in range(11))  # squares in depth >= ring + 1
    assert abs(border - 80 / total) < 0.02  # uniform would give 80 / 441 = 18 %


def test_the_box_ends_on_the_last_pixel():
    mask = np.zeros((10, 12), np.uint8)
    mask[3:5, 7:12] = 1
    assert box_from_mask(mask).tolist() == [7, 3, 11, 4]


def test_the_first_click_is_the_centre_of_the_thickest_part():
    mask = np.zeros((20, 20), np.uint8)
    mask[0, :] = 1  # the image border counts as outside
    mask[8:13, 4:9] = 1
    assert first_point(mask) == (6, 10)
    assert first_point(np.ones((4, 4))) == (1, 1)  # four equal centres: the first in reading order


def test_an_empty_mask_has_neither_box_nor_first_click():
    for prompt in (box_from_mask, first_point):
        with pytest.raises(ValueError, match="non-empty mask"):
            prompt(np.zeros((5, 5)))


def test_the_mix_may_be_any_object_with_the_four_frequencies():
    masks = disc(16, 16, 8, 8, 4)[None].repeat(6, axis=0)
    named = {"point": 1.0, "box": 2.0, "point_and_box": 0.5, "text": 0.0}
    assert (
        draw_prompts(masks, 3, named)[0] == draw_prompts(masks, 3, SimpleNamespace(**named))[0]
    ).all()


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"pont": 1}, "did you mean 'point'"),
        ({"point": 0}, "sum above 0"),
        ({"point": 1, "box": -1}, "frequencies of 0 or more"),
    ],
)
def test_an_impossible_mix_is_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        draw_prompts(np.ones((1, 4, 4)), 0, mix)
    assert len(PROMPT_KINDS) == 4


# ---------------------------------------------------------------- real data


def test_no_real_mask_is_lost_at_a_quarter_of_its_size():
    if not PACK.is_dir():
        pytest.skip("the real pack (shared/data beside the checkout) is absent")
    files = sorted((PACK / "masks").rglob("*.png"))[::25]
    num_masks = num_components = erased = 0
    for file in files:
        values = np.asarray(Image.open(file).convert("L"))
        for value in np.unique(values)[1:]:
            mask = values == value
            labels, count = ndimage.label(mask, EIGHT)
            geometry = Geometry.full(*mask.shape, 64)
            resized = apply_mask(mask, geometry)
            assert abs(resized.sum() - mask.sum() * 64 * 64 / mask.size) <= count
            num_masks, num_components = num_masks + 1, num_components + count
            for component in range(1, count + 1):
                one = labels == component
                assert (apply_mask(one, geometry) <= resized).all()
                soft = Image.fromarray((one * 255).astype(np.uint8)).resize(
                    (64, 64), Image.BILINEAR
                )
                erased += not (np.asarray(soft) > 127).any()
    print(
        f"{num_masks} masks, {num_components} components to 64 px: none lost; "
        f"interpolating and thresholding erases {erased} components"
    )
    assert num_components > erased > 0
