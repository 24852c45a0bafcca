"""Seven procedural renderers of modality-like images with exact masks, used by `demo.py`.

    rendering = render("ct", rng, 128, {"liver": 0.0, "liver lesion": 0.1}, Look(1.0, 1.0, habitus))

Each renderer follows the signal chain of its modality (Hounsfield units and a display window, a
Rician magnitude image under a coil field, speckle and acoustic shadow, Beer-Lambert projection,
reflected colour). It is a caricature: right in what a segmentation or question-answering model can
use (texture, colour, contrast, topology), wrong in what a physician would measure.

Frame: x and y run from -1 to 1 over the image, x to the right, y down; lengths share that unit.
CT, MR and X-ray follow the radiological convention: the patient's right is at the image's left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Array = NDArray[Any]
"""Float [S, S], or [S, S, 3] for colour; masks are soft, in 0..1."""
Point = tuple[float, float]


class Look(NamedTuple):
    """What of an image depends on its patient and not on the finding."""

    contrast: float  # factor on the difference between a finding and its surroundings
    noise: float  # factor on the standard deviation of the acquisition noise
    habitus: NDArray[np.float64]  # [4] in [0, 1]: width, height, fat or pigment, individual detail


class Rendering(NamedTuple):
    """One image and the masks of everything named in it."""

    image: NDArray[np.uint8]  # [S, S, 3]
    targets: dict[str, NDArray[np.bool_]]  # name -> [S, S], never empty


class Canvas:
    """The image being painted and the soft masks painted into it.

    Args:
        size: side S in pixels.
        rng: source of every random choice of this image.
        present: name -> radius of findings (0 for organs) that this image shows.
        look: appearance of the patient.
        background: initial value, one number or one per colour.
    """

    def __init__(
        self,
        size: int,
        rng: np.random.Generator,
        present: Mapping[str, float],
        look: Look,
        background: float | tuple[float, ...] = 0.0,
    ) -> None:
        axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
        self.size, self.rng, self.present, self.look = size, rng, present, look
        self.x, self.y = np.meshgrid(axis, axis)
        shape = (size, size, *np.shape(background))
        self.image: Array = np.full(shape, background, np.float32)
        self.targets: dict[str, Array] = {}

    def blob(
        self, center: Point, radii: Point, angle: float = 0.0, roughness: float = 0.12
    ) -> Array:
        """An ellipse whose radius is modulated by random Fourier terms: [S, S] soft mask."""
        terms = (
            self.rng.normal(size=(5, 2)) * roughness / np.arange(2, 7)[:, None] ** 1.3
        ).tolist()
        # A window of twice the radius holds the clipped contour: most findings are small, and the
        # rest of the canvas need not be computed.
        reach = 2.0 * max(radii)
        low = [max(int((value - reach + 1) * self.size / 2) - 1, 0) for value in center]
        high = [max(int((value + reach + 1) * self.size / 2) + 2, 0) for value in center]
        rows, columns = slice(low[1], high[1]), slice(low[0], high[0])
        dx, dy = self.x[rows, columns] - center[0], self.y[rows, columns] - center[1]
        cosine, sine = float(np.cos(angle)), float(np.sin(angle))
        u = (dx * cosine + dy * sine) / radii[0]
        v = (dy * cosine - dx * sine) / radii[1]
        # The centre has no direction: without a floor the phasor would be 0 / 0.
        distance = np.maximum(np.hypot(u, v), 1e-6)
        # Powers of a unit phasor are the harmonics of the polar angle, without trigonometry.
        phasor = (u + 1j * v) / distance
        radius, harmonic = np.ones_like(distance), phasor
        for real, imaginary in terms:
            harmonic = harmonic * phasor
            radius += real * harmonic.real + imaginary * harmonic.imag
        mask = np.zeros_like(self.x)
        # Clipped, or rare draws of the harmonics would leave nothing or leave the window.
        mask[rows, columns] = self.edge((np.clip(radius, 0.4, 1.9) - distance) * min(radii))
        return mask

    def edge(self, signed_distance: Array) -> Array:
        """Anti-aliased inside of a signed distance (positive inside, image units)."""
        return np.clip(signed_distance * (self.size / 2) + 0.5, 0, 1).astype(np.float32)

    def noise(self, scale: float) -> Array:
        """Gaussian field of unit variance, [S, S], correlated over `scale` image units."""
        sigma = scale * self.size / 2
        # Coarse fields are drawn small and enlarged: the same statistics at a tenth of the cost.
        step = max(1, int(sigma / 2))
        small = self.rng.standard_normal((-(-self.size // step) + 4,) * 2).astype(np.float32)
        field = ndimage.gaussian_filter(small, sigma / step, mode="wrap") if sigma > 0.3 else small
        if step > 1:
            field = ndimage.zoom(field, step, order=1)
        field = field[: self.size, : self.size]
        return field / max(float(field.std()), 1e-6)

    def paint(self, mask: Array, value: float | Array | tuple[float, ...]) -> None:
        """Replace the image by `value` where `mask` is 1, blend at its edge."""
        alpha = mask[..., None] if self.image.ndim == 3 else mask
        self.image += alpha * (np.asarray(value, np.float32) - self.image)

    def add(self, mask: Array, value: float | Array | tuple[float, ...]) -> None:
        """Add `value` times `mask` to the image."""
        alpha = mask[..., None] if self.image.ndim == 3 else mask
        self.image += alpha * np.asarray(value, np.float32)

    def organ(self, name: str, mask: Array, value: float | Array | tuple[float, ...]) -> None:
        """Paint a named organ if the image shows it; it hides what was painted before."""
        if name not in self.present:
            return
        self.paint(mask, value)
        # A mask shows what can be seen: a hidden pixel belongs to what lies over it.
        self.targets = {key: other * (1 - mask) for key, other in self.targets.items()}
        self.targets[name] = mask

    def finding(self, name: str, mask: Array, change: float | Array | tuple[float, ...]) -> None:
        """Add a named finding on top of its organ, which keeps its own mask."""
        # The planted appearance bias changes the contrast of findings, and nothing of the organs.
        self.add(mask, np.asarray(change, np.float32) * self.look.contrast)
        self.targets[name] = mask

    def place(self, inside: Array, radius: float, off_midline: float = 0.0) -> Point:
        """A random point of the mask `inside`, as far from its edge as `radius` allows."""
        depth = ndimage.distance_transform_edt(inside > 0.5)
        # Off the midline, so that a question about the side has an answer.
        depth = np.where(np.abs(self.x) >= off_midline, depth, 0)
        # A finding larger than its organ still gets a place, near the organ's middle.
        margin = min(radius * self.size / 2, 0.7 * float(depth.max()))
        rows, columns = np.nonzero(depth >= max(margin, 1e-6))
        if len(rows) == 0:
            return 0.0, 0.0
        pick = self.rng.integers(len(rows))
        return float(self.x[rows[pick], columns[pick]]), float(self.y[rows[pick], columns[pick]])

    def round_finding(self, name: str, inside: Array, off_midline: float = 0.0) -> Array | None:
        """Shape of finding `name` somewhere in `inside`: [S, S], or None if it is not present."""
        if name not in self.present:
            return None
        # Below 0.8 pixels a contour may pass between pixel centres.
        radius = max(self.present[name], 1.6 / self.size)
        stretch = float(self.rng.uniform(0.75, 1.0))
        center = self.place(inside, radius, off_midline)
        mask = self.blob(center, (radius, radius * stretch), self.rng.uniform(0, 3.14), 0.18)
        # These two grow over the edge of what they lie in; everything else ends where its organ
        # does.
        return mask * inside if name not in {"lung nodule", "polyp"} else mask

    def strokes(self, lines: list[tuple[list[Point], float]]) -> Array:
        """Polylines of (points, width in image units) drawn with four-fold oversampling."""
        scale = 4 * self.size / 2
        # Pillow draws without anti-aliasing: four times too large, then averaged.
        sheet = Image.new("L", (4 * self.size, 4 * self.size))
        draw = ImageDraw.Draw(sheet)
        for points, width in lines:
            pixels = [((x + 1) * scale, (y + 1) * scale) for x, y in points]
            draw.line(pixels, fill=255, width=max(1, round(width * scale)), joint="curve")
        small = sheet.resize((self.size, self.size), Image.Resampling.BOX)
        return np.asarray(small, np.float32) / 255

    def blur(self, mask: Array, scale: float) -> Array:
        """Gaussian blur with a standard deviation of `scale` image units."""
        blurred: Array = ndimage.gaussian_filter(mask, scale * self.size / 2)
        return blurred


def render(
    modality: str, rng: np.random.Generator, size: int, present: Mapping[str, float], look: Look
) -> Rendering:
    """Draw one image.

    Args:
        modality: a key of `RENDERERS`.
        rng: source of every random choice; equal generators give equal bytes.
        size: side of the image in pixels.
        present: target name -> radius in image units (ignored for organs). A finding needs the
            organ it lies in.
        look: appearance of the patient.

    Returns:
        the image and a non-empty mask for every name in `present`.

    Raises:
        ValueError: for an unknown modality.
    """
    if modality not in RENDERERS:
        raise ValueError(f"Unknown modality {modality!r}. Expected one of {sorted(RENDERERS)}.")
    canvas, display = RENDERERS[modality](size, rng, present, look)
    levels = np.clip(display * 255 + 0.5, 0, 255).astype(np.uint8)
    if levels.ndim == 2:
        # Three equal channels, because vision encoders take RGB.
        levels = np.repeat(levels[..., None], 3, axis=2)
    # What was drawn as present must have a mask: questions and prevalences count on it.
    missing = set(present) - set(canvas.targets)
    assert not missing, f"{modality} cannot draw {sorted(missing)}"
    targets = {}
    for name in sorted(present):
        soft = canvas.targets[name]
        targets[name] = soft > 0.5
        # A microbleed or vessel thinner than a pixel keeps its strongest pixel.
        if not targets[name].any():
            targets[name][np.unravel_index(int(np.argmax(soft)), soft.shape)] = True
    return Rendering(levels, targets)


def _rgb(red: float, green: float, blue: float) -> Array:
    """A colour: [3] float32."""
    return np.array([red, green, blue], np.float32)


def _ct(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Contrast-enhanced abdomen in Hounsfield units, window level 60 and width 340."""
    c = Canvas(size, rng, present, look, -1000.0)
    rx, ry = 0.80 + 0.12 * look.habitus[0], 0.60 + 0.12 * look.habitus[1]
    rim = 0.03 + 0.09 * look.habitus[2]
    # From the outside in and from back to front: what is painted later hides what was there.
    cavity = _ct_trunk(c, rx, ry, rim)
    _ct_bowel(c, cavity, rx, ry)
    _ct_spine(c, ry)
    liver = c.blob((-0.42 * rx, -0.10), (0.46 * rx, 0.56 * ry), rng.uniform(0.1, 0.5), 0.14)
    c.organ("liver", liver * cavity, 108 + 5 * c.noise(0.05))
    spleen = c.blob((0.66 * rx, 0.02), (0.15, 0.42 * ry), rng.uniform(-0.4, -0.1), 0.12)
    c.organ("spleen", spleen * cavity, 122 + 5 * c.noise(0.05))
    for name, side in (("right kidney", -1), ("left kidney", 1)):
        center = (side * (0.44 * rx + rng.uniform(-0.02, 0.02)), 0.46 * ry + rng.uniform(0, 0.06))
        kidney = c.blob(center, (0.115, 0.16), side * rng.uniform(0.2, 0.5), 0.10)
        sinus = c.blob((center[0] - side * 0.05, center[1]), (0.04, 0.06), 0, 0.2)
        c.organ(name, kidney * cavity, 175 - 190 * sinus)
    c.organ("aorta", c.blob((0.07, 0.34 * ry), (0.062, 0.062), 0, 0.03), 215.0)
    _ct_findings(c)
    # Noise after all structures, as the detector adds it; its grain is about a pixel at any size.
    hu = c.image + 13 * look.noise * c.noise(0.9 / size)
    return c, (hu + 110) / 340


def _ct_trunk(c: Canvas, rx: float, ry: float, rim: float) -> Array:
    """Skin, fat rim, muscle wall with ribs, table; returns the peritoneal cavity."""
    body = c.blob((0, 0), (rx, ry), 0, 0.03)
    c.paint(c.edge(0.015 - np.abs(c.y - ry - 0.06 + 0.1 * c.x**2)) * (np.abs(c.x) < 0.85), -300.0)
    c.paint(body, -100 + 7 * c.noise(0.03))
    c.paint(c.blob((0, 0.01), (rx - rim, ry - rim), 0, 0.02), 55 + 8 * c.noise(0.02))
    cavity = c.blob((0, -0.02), (rx - rim - 0.06, ry - rim - 0.07), 0, 0.02)
    c.paint(cavity, -85 + 16 * c.noise(0.06))
    for angle in np.linspace(-0.5, 3.64, 11) + c.rng.uniform(-0.08, 0.08):
        x, y = (rx - rim - 0.035) * np.cos(angle), (ry - rim - 0.035) * np.sin(angle)
        c.paint(c.blob((x, y), (0.045, 0.018), angle + 1.57, 0.05), 330.0)
    return cavity


def _ct_bowel(c: Canvas, cavity: Array, rx: float, ry: float) -> None:
    """Stomach with a gas bubble that rises to the front, and loops of bowel."""
    for _ in range(9):
        center = c.rng.uniform(-0.1, 0.68) * rx, c.rng.uniform(-0.72, 0.25) * ry
        radius = c.rng.uniform(0.05, 0.11)
        loop = c.blob(center, (radius, radius * c.rng.uniform(0.6, 1)), c.rng.uniform(0, 3), 0.15)
        c.paint(loop * cavity, float(c.rng.uniform(35, 75)))
        if c.rng.random() < 0.35:
            gas = c.blob((center[0], center[1] - 0.3 * radius), (0.6 * radius, 0.4 * radius))
            c.paint(gas * loop * cavity, -700.0)
    stomach = c.blob((0.30 * rx, -0.45 * ry), (0.24, 0.15), 0.5, 0.12) * cavity
    c.paint(stomach, 30.0)
    level = -0.45 * ry - c.rng.uniform(0.0, 0.08)
    c.paint(stomach * c.edge(level - c.y), -850.0)


def _ct_spine(c: Canvas, ry: float) -> None:
    """Vena cava, psoas, vertebra with cortex and canal, paraspinal muscle."""
    c.paint(c.blob((-0.10, 0.34 * ry), (0.07, 0.05), 0, 0.06), 150.0)
    for side in (-1, 1):
        c.paint(c.blob((side * 0.20, 0.58 * ry), (0.08, 0.10), 0, 0.06), 62.0)
        c.paint(c.blob((side * 0.17, 0.84 * ry), (0.13, 0.07), side * 0.2, 0.06), 58.0)
    c.paint(c.blob((0, 0.60 * ry), (0.145, 0.115), 0, 0.05), 420.0)
    c.paint(c.blob((0, 0.60 * ry), (0.120, 0.09), 0, 0.05), 190 + 30 * c.noise(0.02))
    c.paint(c.blob((0, 0.60 * ry + 0.17), (0.11, 0.07), 0, 0.05), 380.0)
    c.paint(c.blob((0, 0.60 * ry + 0.155), (0.055, 0.045), 0, 0.03), 30.0)
    c.paint(c.blob((0, 0.60 * ry + 0.25), (0.022, 0.06), 0, 0.03), 360.0)


def _ct_findings(c: Canvas) -> None:
    """Hypodense liver lesion with a faint rim; calcified stone in the kidney collecting system."""
    if "liver" in c.targets:
        liver = c.targets["liver"]
        for _ in range(5):
            vessel = c.blob(c.place(liver, 0.05), (0.05, 0.014), c.rng.uniform(0, 3), 0.2)
            c.add(vessel * liver, 42.0)
        lesion = c.round_finding("liver lesion", liver)
        if lesion is not None:
            # First the liver's own mean, or a vessel that crosses would show through the lesion.
            c.paint(lesion, 108.0)
            c.finding("liver lesion", lesion, -72 + 6 * c.noise(0.02))
    kidneys = [name for name in ("left kidney", "right kidney") if name in c.targets]
    if "kidney stone" in c.present:
        # A visible kidney: TARGETS says that a stone needs one.
        kidney = c.targets[kidneys[int(c.rng.integers(len(kidneys)))]]
        stone = c.round_finding("kidney stone", kidney)
        assert stone is not None
        c.finding("kidney stone", stone, 480.0)


def _mr(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Axial head, FLAIR-like: dark fluid, bright oedema; coil bias field and Rician noise."""
    c = Canvas(size, rng, present, look)
    rx, ry = 0.62 + 0.08 * look.habitus[0], 0.78 + 0.08 * look.habitus[1]
    c.paint(c.blob((0, 0), (rx + 0.10, ry + 0.09), 0, 0.02), 0.75 + 0.05 * c.noise(0.04))
    c.paint(c.blob((0, 0), (rx + 0.055, ry + 0.05), 0, 0.02), 0.06)
    brain = c.blob((0, 0.0), (rx, ry), 0, 0.03)
    c.organ("brain", brain, 0.40 + 0.015 * c.noise(0.05))
    _mr_cortex(c, brain, rx, ry)
    _mr_ventricles(c, ry)
    # Away from the midline, so that the side of the tumour can be asked for.
    tumour = c.round_finding("brain tumor", brain * c.edge(0.95 * rx - np.abs(c.x)), 0.16)
    if tumour is not None:
        radius = c.present["brain tumor"]
        halo = np.clip(c.blur(tumour, 0.45 * radius) - tumour, 0, 1) * brain
        c.add(halo, 0.22 * look.contrast)
        # Over sulci and ventricles, which a solid tumour displaces.
        c.paint(tumour, 0.42)
        core = np.clip(c.blur(tumour, 0.3 * radius) * 2 - 1, 0, 1)
        c.finding("brain tumor", tumour, 0.36 - 0.20 * core + 0.04 * c.noise(0.03))
    bleed = c.round_finding("microbleed", brain * (1 - c.targets.get("ventricles", 0 * brain)))
    if bleed is not None:
        c.finding("microbleed", bleed, -0.30)
    coil = np.exp(0.12 * c.noise(0.5))
    # The coil shades the image but keeps the mean of the brain, so that tissues stay comparable.
    coil /= np.average(coil, weights=brain)
    signal = np.clip(c.image, 0, None) * coil
    sigma = 0.022 * look.noise
    # Noise of both channels before the magnitude: that is what makes it Rician.
    real, imaginary = rng.normal(0, sigma, (2, size, size))
    return c, np.hypot(signal + real, imaginary).astype(np.float32) * 1.25


def _mr_cortex(c: Canvas, brain: Array, rx: float, ry: float) -> None:
    """Grey ribbon, sulci as zero crossings of a smooth field near the surface, the fissure."""
    depth = 1 - np.hypot(c.x / rx, c.y / ry)
    surface = np.clip(1 - depth / 0.34, 0, 1) * brain
    field = c.noise(0.055)
    sulci = np.exp(-((field / 0.30) ** 2)) * np.clip(surface * 1.6, 0, 1)
    ribbon = np.exp(-((field / 0.95) ** 2)) * np.clip(surface * 2.2, 0, 1)
    c.add(ribbon, 0.13)
    c.add(sulci, -0.36)
    waver = 0.012 * np.sin(5 * c.y + c.rng.uniform(0, 6))
    fissure = c.edge(0.010 - np.abs(c.x - waver)) * np.clip(np.abs(c.y) / ry * 2.4 - 0.75, 0, 1)
    c.add(fissure * brain, -0.30)
    for side in (-1, 1):
        nucleus = c.blob((side * 0.20, 0.06), (0.075, 0.16), side * -0.25, 0.08)
        c.add(nucleus, 0.09)


def _mr_ventricles(c: Canvas, ry: float) -> None:
    """A butterfly of frontal horns and trigones, its width the patient's own."""
    width = 0.035 + 0.05 * c.look.habitus[3]
    parts = []
    for side in (-1, 1):
        parts += [
            c.blob((side * 0.085, -0.17), (width, 0.20), side * 0.28, 0.08),
            c.blob((side * 0.155, 0.22), (width * 1.1, 0.20), side * -0.42, 0.08),
            c.blob((side * 0.09, 0.03), (width * 0.8, 0.16), 0, 0.08),
        ]
    c_ventricles = np.maximum.reduce(parts)
    # Drawn in any case and painted where the image shows them: other draws then stay the same.
    if "ventricles" in c.present:
        c.paint(c_ventricles, 0.08)
        c.targets["ventricles"] = c_ventricles


def _ultrasound(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Curved-array sector: echogenicity times Rayleigh speckle, log compression, shadows."""
    c = Canvas(size, rng, present, look, 0.30)
    apex = -1.45
    radius, angle = np.hypot(c.x, c.y - apex), np.arctan2(c.x, c.y - apex)
    fan = c.edge((0.60 - np.abs(angle)) * radius) * c.edge(radius - 0.50) * c.edge(2.38 - radius)
    depth_of_diaphragm = rng.uniform(1.98, 2.14) + 0.10 * np.sin(3 * angle + rng.uniform(0, 6))
    liver = fan * c.edge(depth_of_diaphragm - radius) * c.edge(radius - rng.uniform(0.66, 0.74))
    c.organ("liver", liver, 0.42 + 0.05 * c.noise(0.08))
    c.paint(np.exp(-(((radius - depth_of_diaphragm) / 0.03) ** 2)).astype(np.float32), 1.3)
    for _ in range(4):
        vessel = c.blob(c.place(liver, 0.10), (0.13, 0.030), rng.uniform(0, 3), 0.2)
        c.paint(vessel * liver, 0.05)
    enhancement = np.zeros_like(radius)
    if "gallbladder" in present:
        center = rng.uniform(-0.30, 0.30), rng.uniform(-0.05, 0.20)
        bladder = c.blob(center, (0.30, 0.15), rng.uniform(-0.5, 0.5), 0.10) * fan
        c.paint(np.clip(c.blur(bladder, 0.03) * 2.2, 0, 1) * fan, 0.75)
        c.organ("gallbladder", bladder, 0.02)
        enhancement += 0.8 * _behind(bladder, radius, angle)
    # Not in the gallbladder, where a cyst could not be told from bile.
    elsewhere = c.targets.get("liver", fan) * (
        1 - c.blur(c.targets.get("gallbladder", 0 * fan), 0.05) * 3
    )
    cyst = c.round_finding("cyst", np.clip(elsewhere, 0, 1))
    if cyst is not None:
        c.finding("cyst", cyst, -0.40)
        enhancement += 1.3 * look.contrast * _behind(cyst, radius, angle)
    shadow = np.zeros_like(radius)
    stone = c.round_finding("gallstone", c.targets.get("gallbladder", fan))
    if stone is not None:
        c.finding("gallstone", stone, 1.5)
        shadow = 0.85 * look.contrast * _behind(stone, radius, angle)
    # Enhancement behind fluid and shadow behind stone are how each of them is told in practice.
    echo = np.clip(c.image, 0.004, None) * (1 + enhancement) * (1 - np.clip(shadow, 0, 0.95))
    return c, _speckle(c, echo, radius) * fan


def _behind(mask: Array, radius: Array, angle: Array) -> Array:
    """Soft region in the acoustic path behind `mask`: [S, S] in 0..1."""
    bins = np.clip(((angle + 0.7) / 1.4 * 256).astype(int), 0, 255)
    inside = mask > 0.5
    far, hit = np.zeros(256, np.float32), np.zeros(256, np.float32)
    np.maximum.at(far, bins[inside], radius[inside])
    np.maximum.at(hit, bins[inside], 1)
    # Closed over the angles: between the pixels of a small stone beams would slip through.
    hit = ndimage.gaussian_filter1d(ndimage.grey_closing(hit, 9), 2)
    far = ndimage.grey_dilation(far, 9)
    path: Array = hit[bins] * np.clip((radius - far[bins]) / 0.04, 0, 1)
    return path


def _speckle(c: Canvas, echo: Array, radius: Array) -> Array:
    """Rayleigh speckle wider across the beam than along it, log-compressed to 45 dB."""
    parts = c.rng.standard_normal((2, c.size, c.size)).astype(np.float32)
    # In pixels at 128, scaled: the same grain at every image size.
    spread = np.array([0.7, 1.3]) * c.size / 128
    real, imaginary = (ndimage.gaussian_filter(part, spread) for part in parts)
    envelope = np.hypot(real, imaginary)
    envelope /= envelope.mean()
    signal = echo * envelope ** (0.75 * min(c.look.noise, 2.0)) * np.exp(-0.28 * (radius - 0.5))
    decibel: Array = 20 * np.log10(signal + 0.004)
    return np.clip(1 + decibel / 45, 0, 1) ** 1.25


def _xray(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Frontal chest: Beer-Lambert projection of summed densities, quantum noise, film curve."""
    c = Canvas(size, rng, present, look)
    width, height = 0.34 + 0.05 * look.habitus[0], 0.62 + 0.08 * look.habitus[1]
    soft = 0.50 + 0.30 * look.habitus[2]
    shoulders = c.edge(1.0 - np.abs(c.x) * 0.92 + np.clip(c.y + 0.72, -0.4, 0) * 1.5)
    c.add(c.blur(shoulders, 0.02), soft)
    lungs = {
        "right lung": c.blob((-0.42, -0.08), (width, height), 0.10, 0.10),
        "left lung": c.blob((0.43, -0.10), (width * 0.93, height), -0.10, 0.10),
    }
    for name, side, level in (("right lung", -1, 0.40), ("left lung", 1, 0.47)):
        dome = c.edge(level + 0.9 * (np.abs(c.x) - 0.40) ** 2 - c.y + rng.uniform(-0.05, 0.05))
        hilum = 0.20 - 0.08 * np.cos(2.2 * c.y + 0.5)
        lungs[name] = lungs[name] * dome * c.edge(side * c.x - hilum)
        c.add(c.blur(lungs[name], 0.012), -0.80 * soft)
        c.targets[name] = lungs[name]
    air = np.maximum(lungs["left lung"], lungs["right lung"])
    below = np.clip((c.y - 0.30) * 2.5, 0, 1) * (1 - c.blur(air, 0.02))
    c.add(below * shoulders, 0.26 + 0.03 * c.noise(0.2))
    stomach = c.blob((0.38, 0.66), (0.16, 0.08), -0.2, 0.2)
    c.add(c.blur(stomach, 0.012), -0.28)
    # Hilar vessels that branch and thin out towards the edge of the lungs.
    lines: list[tuple[list[Point], float]] = []
    for side in (-1, 1):
        for heading in np.linspace(-1.3, 1.3, 9):
            lines += _branch(c.rng, (side * 0.17, -0.02), heading, side, 0.020, 10, 0.065)
    vessels = c.blur(c.strokes(lines), 0.010) * air
    # After the lungs and before their vessels are added: collapsed lung leaves gas without vessels.
    collapsed = _xray_pneumothorax(c, lungs)
    c.add(vessels * (1 - collapsed), 0.17)
    c.add((1 - collapsed) * air, 0.022 * c.noise(0.06) + 0.018 * c.noise(0.02))
    _xray_heart(c, soft)
    _xray_bones(c)
    nodule = c.round_finding("lung nodule", air * (np.abs(c.y) < 0.5), 0.25)
    if nodule is not None:
        c.finding("lung nodule", nodule, 0.48 * c.blur(nodule, 0.01))
    # Lungs are always drawn, since heart and vessels need them.
    c.targets = {name: mask for name, mask in c.targets.items() if name in present}
    # Beer and Lambert: densities add up along the beam, the light that is left is their
    # exponential.
    photons = np.exp(-1.7 * c.blur(c.image, 0.006))
    # Quantum noise grows with the square root of the photons.
    noisy = photons + 0.020 * look.noise * np.sqrt(photons) * c.noise(0.5 / size)
    return c, (1 - np.clip(noisy, 0, 1)) * 1.12 - 0.04


def _branch(
    rng: np.random.Generator,
    start: Point,
    heading: float,
    side: int,
    width: float,
    num_steps: int,
    step: float,
) -> list[tuple[list[Point], float]]:
    """A vessel that wanders, thins and forks: list of (two points, width)."""
    x, y = start
    lines: list[tuple[list[Point], float]] = []
    for index in range(num_steps):
        heading += float(rng.normal(0, 0.10))
        end = (x + side * step * float(np.cos(heading)), y + step * float(np.sin(heading)))
        lines.append(([(x, y), end], width * (1 - 0.7 * index / num_steps)))
        x, y = end
        if index in (2, 5) and num_steps > 5:
            fork = heading + float(rng.choice([-1, 1]) * rng.uniform(0.5, 0.9))
            lines += _branch(rng, end, fork, side, 0.6 * width, num_steps - index - 2, step)
    return lines


def _xray_pneumothorax(c: Canvas, lungs: dict[str, Array]) -> Array:
    """Free air between chest wall and collapsed lung: no vessels, darker, a fine line between."""
    if "pneumothorax" not in c.present:
        return np.zeros_like(c.x)
    side = int(c.rng.choice([-1, 1]))
    lung = lungs["left lung" if side == 1 else "right lung"]
    shift = c.present["pneumothorax"]
    middle = float(np.average(c.x, weights=lung))
    shrink = 1 - 0.7 * shift
    inner_x = (c.x - middle + side * 0.8 * shift) / shrink + middle
    inner_y = (c.y - 0.48) / shrink + 0.48
    coordinates = [(inner_y + 1) * c.size / 2 - 0.5, (inner_x + 1) * c.size / 2 - 0.5]
    inner = ndimage.map_coordinates(lung, coordinates, order=1, mode="nearest").astype(np.float32)
    pleura = np.clip(c.blur(inner, 0.02) - c.blur(inner, 0.04), 0, 1) * lung
    gas: Array = np.clip(lung - inner, 0, 1)
    c.add(pleura, 0.9 * c.look.contrast)
    c.add(inner * lung, 0.12 * c.look.contrast)
    c.finding("pneumothorax", gas, -0.09)
    return gas


def _xray_heart(c: Canvas, soft: float) -> None:
    """Mediastinum, trachea and the heart, two thirds of it left of the midline."""
    c.add(c.blur(c.edge(0.13 - np.abs(c.x)) * c.edge(c.y + 0.62), 0.025), 0.20 * soft)
    center = 0.13 + c.rng.uniform(-0.02, 0.03), 0.20 + c.rng.uniform(-0.04, 0.04)
    radii = 0.27 + 0.05 * c.look.habitus[3], 0.25
    heart = c.blob(center, radii, c.rng.uniform(0.4, 0.7), 0.10)
    if "heart" in c.present:
        c.add(c.blur(heart, 0.014), 0.52 * soft)
        c.targets["heart"] = heart
    trachea = c.edge(0.045 - np.abs(c.x + 0.02 * np.sin(4 * c.y))) * c.edge(-0.12 - c.y)
    c.add(c.blur(trachea, 0.012), -0.16)


def _xray_bones(c: Canvas) -> None:
    """Spine, posterior and anterior ribs as thin shells, clavicles."""
    vertebrae = 0.60 + 0.40 * np.clip(2 * np.cos(c.y * 30), -1, 1)
    c.add(c.blur(c.edge(0.085 - np.abs(c.x)), 0.01) * vertebrae, 0.11)
    reach = np.clip((0.90 - np.abs(c.x)) * 8, 0, 1) * np.clip((np.abs(c.x) - 0.08) * 9, 0, 1)
    phase = c.rng.uniform(-0.05, 0.05)
    for index in range(9):
        top = -0.86 + 0.165 * index + phase
        rear = top + 0.42 * np.abs(c.x) ** 1.6 + 0.03 * np.sin(3 * np.abs(c.x))
        shell = np.exp(-(((np.abs(c.y - rear) - 0.022) / 0.014) ** 2))
        c.add((shell * reach * (c.y < 0.62)).astype(np.float32), 0.13)
        front = top + 0.50 - 0.45 * (np.abs(c.x) - 0.25)
        c.add(
            (np.exp(-(((c.y - front) / 0.026) ** 2)) * reach * (c.y < 0.5)).astype(np.float32), 0.05
        )
    clavicle = c.strokes(
        [([(s * 0.07, -0.60), (s * 0.35, -0.70), (s * 0.72, -0.80)], 0.05) for s in (-1, 1)]
    )
    c.add(c.blur(clavicle, 0.01), 0.13)


def _dermoscopy(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Skin under polarised light: pigmented lesion with a network, ulcer, hair, vignette."""
    pigment = 0.75 * look.habitus[2]
    skin = np.array([0.93, 0.74, 0.63]) * np.exp(-pigment * np.array([0.35, 0.55, 0.65]))
    c = Canvas(size, rng, present, look, tuple(float(value) for value in skin))
    c.image *= (1 + 0.030 * c.noise(0.35) + 0.020 * c.noise(0.02))[..., None]
    c.image += 0.007 * c.noise(0.10)[..., None] * _rgb(1.0, -0.6, -0.6)
    if "skin lesion" in present:
        _skin_lesion(c, look.contrast)
    hairs = [_hair(rng) for _ in range(int(rng.integers(0, 9)))]
    if hairs:
        c.paint(0.8 * c.strokes(hairs), (0.16, 0.11, 0.09))
    vignette = 1 - 0.42 * np.clip(np.hypot(c.x, c.y) - 0.55, 0, 1) ** 1.4
    grain = rng.normal(0, 0.016 * look.noise, c.image.shape)
    return c, (c.image * vignette[..., None] + grain).astype(np.float32)


def _skin_lesion(c: Canvas, contrast: float) -> None:
    """Absorbs more in blue than in red; a darker network and blotches inside; maybe an ulcer."""
    radius = c.present["skin lesion"]
    free = max(0.0, 0.85 - radius)
    center = float(c.rng.uniform(-free, free)), float(c.rng.uniform(-free, free))
    shape = c.blob(center, (radius, radius * c.rng.uniform(0.65, 0.95)), c.rng.uniform(0, 3), 0.20)
    soft = np.clip(c.blur(shape, 0.06 * radius + 0.004), 0, 1)
    network = np.exp(-((c.noise(0.028) / 0.35) ** 2))
    depth = 0.75 + 0.28 * c.noise(0.3 * radius + 0.02) + 0.30 * network
    absorbed = np.clip(depth, 0.35, 2.0) * soft * contrast
    colour = _rgb(0.55, 0.95, 1.05) * float(c.rng.uniform(0.85, 1.15))
    # Multiplied, as melanin absorbs light; painting would hide the skin's own texture.
    c.image *= np.exp(-absorbed[..., None] * colour)
    c.targets["skin lesion"] = shape
    ulcer = c.round_finding("ulcer", shape)
    if ulcer is not None:
        moist = (c.noise(0.03) + (c.noise(0.015) > 2.0))[..., None]
        red = _rgb(0.66, 0.24, 0.22) + 0.05 * moist
        c.finding("ulcer", ulcer, red - c.image)


def _hair(rng: np.random.Generator) -> tuple[list[Point], float]:
    """A gently curved line across the image: (points, width)."""
    x, y = rng.uniform(-1, 1, 2)
    heading, bend = rng.uniform(0, 6.28), rng.normal(0, 0.08)
    points = [(float(x), float(y))]
    for _ in range(int(rng.integers(6, 16))):
        x, y = x + 0.11 * np.cos(heading), y + 0.11 * np.sin(heading)
        heading += bend
        points.append((float(x), float(y)))
    return points, float(rng.uniform(0.006, 0.014))


def _fundus(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Retina through the pupil: aperture, disc and cup, vascular arcades, macula, bleeding."""
    c = Canvas(size, rng, present, look, (0.02, 0.015, 0.01))
    aperture = c.edge(0.95 - np.hypot(c.x, c.y))
    pigment = np.array([0.80, 0.36, 0.14]) * (1 - 0.35 * look.habitus[2] * np.array([0.6, 1, 1]))
    mottled = 1 + 0.05 * c.noise(0.25) + 0.03 * c.noise(0.03)
    shade = 1.05 - 0.35 * (c.x**2 + c.y**2)
    c.paint(aperture, (mottled * shade)[..., None] * pigment)
    # Either eye: the disc lies towards the nose.
    nasal = int(rng.choice([-1, 1]))
    disc = nasal * rng.uniform(0.42, 0.52), rng.uniform(-0.08, 0.08)
    macula = np.exp(-(((c.x + nasal * 0.12) ** 2 + (c.y - disc[1] - 0.05) ** 2) / 0.030))
    c.image *= (1 - 0.38 * macula * aperture)[..., None]
    size_of_disc = 0.14 + 0.03 * look.habitus[0]
    # Drawn in any case: haemorrhages keep off it, also where it is no target.
    disc_mask = c.blob(disc, (size_of_disc * 0.92, size_of_disc), 0, 0.05)
    if "optic disc" in present:
        c.paint(0.9 * c.blur(disc_mask, 0.012), (0.95, 0.72, 0.40))
        c.targets["optic disc"] = disc_mask
    if "optic cup" in present:
        share = 0.35 + 0.30 * look.habitus[3]
        cup = c.blob(disc, (share * size_of_disc, 1.08 * share * size_of_disc), 0, 0.06)
        c.finding("optic cup", cup, (0.05, 0.24, 0.40))
    vessels = _arcades(c, disc, nasal) * aperture
    if "vessels" in present:
        c.paint(0.72 * vessels, (0.42, 0.09, 0.05))
        # Half of a one-pixel vessel would vanish under a threshold of one half.
        c.targets["vessels"] = np.clip(vessels * 1.5, 0, 1)
    if "haemorrhage" in present:
        # One finding of one to four patches; they bleed on the retina and not on the disc.
        retina = aperture * (1 - disc_mask)
        parts = [c.round_finding("haemorrhage", retina) for _ in range(int(rng.integers(1, 5)))]
        union = np.maximum.reduce([part for part in parts if part is not None])
        c.finding("haemorrhage", union, 0.9 * (_rgb(0.34, 0.03, 0.03) - c.image))
    grain = rng.normal(0, 0.014 * look.noise, c.image.shape)
    return c, (c.image + grain * aperture[..., None]).astype(np.float32)


def _arcades(c: Canvas, disc: Point, nasal: int) -> Array:
    """Four vessels leave the disc, two arch around the macula, all fork: [S, S] coverage."""
    lines: list[tuple[list[Point], float]] = []
    for up in (-1, 1):
        for side, bend in ((-nasal, 0.105), (nasal, 0.03)):
            heading = up * c.rng.uniform(1.15, 1.45)
            x, y = disc
            for index in range(17):
                heading -= up * bend + float(c.rng.normal(0, 0.06))
                step = 0.075
                end = (x + side * step * float(np.cos(heading)), y + step * float(np.sin(heading)))
                lines.append(([(x, y), end], 0.040 - 0.0013 * index))
                x, y = end
                if index % 4 == 2:
                    fork = heading + up * float(c.rng.uniform(0.5, 0.9)) * (-1) ** (index // 4)
                    lines += _branch(c.rng, end, fork, side, 0.022, 8, 0.06)
    return c.strokes(lines)


def _endoscopy(
    size: int, rng: np.random.Generator, present: Mapping[str, float], look: Look
) -> tuple[Canvas, Array]:
    """Colon lit from the tip: lumen, circular folds, polyp with shading, highlights, instrument."""
    c = Canvas(size, rng, present, look, (0.80, 0.42, 0.36))
    center = rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35)
    warp = 0.09 * c.noise(0.35)
    distance = np.hypot(c.x - center[0], c.y - center[1]) + warp
    rings = np.cos(
        np.log(np.clip(distance + 0.03 * c.noise(0.15), 0.08, None)) * 6.5 + rng.uniform(0, 6.28)
    )
    light = (
        0.55
        + 0.42 * np.clip(distance, 0, 1.1)
        + 0.20 * np.clip(rings, -0.2, 1) ** 4
        - 0.10 * np.clip(-rings, 0, 1) ** 6
    )
    c.image *= light[..., None] * (1 + 0.03 * c.noise(0.04)[..., None])
    # Capillaries of the mucosa are short hairs: thin vessels that wander.
    wandering = [_hair(rng) for _ in range(14)]
    lines = [(points[:7], 0.5 * width + 0.004) for points, width in wandering]
    c.paint(0.28 * c.strokes(lines), (0.55, 0.12, 0.12))
    if "lumen" in present:
        opening = c.edge(0.20 + 0.10 * look.habitus[3] - distance)
        c.paint(np.clip(c.blur(opening, 0.05) * 1.1, 0, 1), (0.07, 0.02, 0.02))
        c.targets["lumen"] = opening
    frame = c.edge(
        0.94
        - np.maximum(np.maximum(np.abs(c.x), np.abs(c.y)), 0.72 * np.abs(np.abs(c.x) + np.abs(c.y)))
    )
    _polyp(c, frame * c.edge(distance - 0.35))
    # Specular reflections of wet mucosa: small, white, away from the lumen; over the polyp, which
    # is wet too, and below the instrument.
    wet = c.noise(0.018) + 0.6 * c.noise(0.12)
    glint = np.clip((wet - 2.5) * 2.5, 0, 1) * np.clip(distance * 3 - 1, 0, 1)
    c.paint(c.blur(glint, 0.006), (1.0, 0.97, 0.93))
    _instrument(c)
    grain = rng.normal(0, 0.016 * look.noise, c.image.shape)
    # What the black frame hides is in no mask.
    c.targets = {name: mask * frame for name, mask in c.targets.items()}
    return c, ((c.image + grain) * frame[..., None]).astype(np.float32)


def _polyp(c: Canvas, wall: Array) -> None:
    """A hemisphere lit from the tip of the instrument, redder than the wall, casting a shadow."""
    polyp = c.round_finding("polyp", wall)
    if polyp is None:
        return
    rise = np.clip(c.blur(polyp, 0.35 * c.present["polyp"]) * 1.6 - 0.45, 0, 1)
    shadow = np.clip(c.blur(np.roll(polyp, c.size // 40, axis=0), 0.03) - polyp, 0, 1)
    c.add(shadow, (-0.30 * c.look.contrast,) * 3)
    lit = (0.58 + 0.50 * rise)[..., None] * _rgb(0.98, 0.36, 0.30)
    texture = 0.04 * c.noise(0.025)[..., None]
    c.finding("polyp", polyp, lit + texture - c.image)


def _instrument(c: Canvas) -> None:
    """A metal shaft that enters from the lower edge, shaded as a cylinder."""
    if "instrument" not in c.present:
        return
    foot, heading = float(c.rng.uniform(-0.6, 0.6)), float(c.rng.uniform(-0.5, 0.5))
    length, half = float(c.rng.uniform(0.6, 1.0)), c.present["instrument"]
    along = (1 - c.y) * np.cos(heading) + (c.x - foot) * np.sin(heading)
    across = (c.x - foot) * np.cos(heading) - (1 - c.y) * np.sin(heading)
    shaft = c.edge(half - np.abs(across)) * c.edge(length - along)
    shine = 0.30 + 0.62 * np.clip(1 - (across / half - 0.3) ** 2, 0, 1)
    c.finding("instrument", shaft, shine[..., None] * _rgb(0.85, 0.90, 0.95) - c.image)


RENDERERS: dict[
    str, Callable[[int, np.random.Generator, Mapping[str, float], Look], tuple[Canvas, Array]]
] = {
    "ct": _ct,
    "xray": _xray,
    "mri": _mr,
    "dermoscopy": _dermoscopy,
    "ultrasound": _ultrasound,
    "fundus": _fundus,
    "endoscopy": _endoscopy,
}
