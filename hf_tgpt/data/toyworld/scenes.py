"""What the toy world's pictures show and how they are drawn.

A picture shows one shape with one surface in one colour on one background. Place, size, rotation, light and noise
vary freely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

SHAPES = (
    *("circle", "square", "triangle", "star", "heart", "cross"),
    *("ring", "crescent", "arrow", "drop", "hourglass", "bolt"),
)
SURFACES = ("plain", "striped", "dotted", "checkered", "speckled", "ringed")
COLOURS = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.98, 0.90, 0.12),
    "green": (0.12, 0.66, 0.16),
    "cyan": (0.10, 0.82, 0.86),
    "blue": (0.12, 0.22, 0.86),
    "purple": (0.52, 0.12, 0.72),
    "pink": (0.98, 0.52, 0.76),
    "brown": (0.44, 0.25, 0.10),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {
    "dark": (0.13, 0.13, 0.15),
    "grey": (0.52, 0.52, 0.52),
    "sandy": (0.72, 0.65, 0.48),
    "grassy": (0.36, 0.46, 0.30),
    "misty": (0.58, 0.66, 0.72),
}
DOMAINS = ("photo", "line_drawing", "negative", "fog")

IMAGE_SIZE = 64
_SUPERSAMPLING = 4
_MAX_TILT = math.radians(20)
_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Scene:
    """Everything that decides one picture. Lengths are in units of half the picture's side, angles in radians."""

    shape: int
    surface: int
    colour: int
    background: int
    radius: float
    x: float
    y: float
    angle: float
    light: float
    noise: float
    seed: int

    @property
    def size_word(self) -> str:
        return "small" if self.radius < 0.58 else "large" if self.radius > 0.74 else "medium"

    @property
    def place_word(self) -> str:
        vertical = "upper" if self.y < -0.1 else "lower" if self.y > 0.1 else ""
        horizontal = "left" if self.x < -0.1 else "right" if self.x > 0.1 else ""
        return " ".join(word for word in (vertical, horizontal) if word) or "middle"

    @property
    def caption(self) -> str:
        """One sentence about this picture, as an annotator would write it."""
        return (
            f"a {self.size_word} {SURFACES[self.surface]} {_COLOUR_NAMES[self.colour]} {SHAPES[self.shape]}"
            f" in the {self.place_word} on a {_BACKGROUND_NAMES[self.background]} background."
        )


def sample_scene(
    rng: np.random.Generator, shape: int | None = None, surface: int | None = None, colour: int | None = None
) -> Scene:
    """Draws a random scene; parts that are given (as indices) are kept."""
    radius = float(rng.uniform(0.48, 0.86))
    slack = min(0.96 - radius, 0.3)
    return Scene(
        shape=int(rng.integers(len(SHAPES))) if shape is None else shape,
        surface=int(rng.integers(len(SURFACES))) if surface is None else surface,
        colour=int(rng.integers(len(COLOURS))) if colour is None else colour,
        background=int(rng.integers(len(BACKGROUNDS))),
        radius=radius,
        x=float(rng.uniform(-slack, slack)),
        y=float(rng.uniform(-slack, slack)),
        angle=float(rng.uniform(-_MAX_TILT, _MAX_TILT)),
        light=float(rng.uniform(0.75, 1.15)),
        noise=float(rng.uniform(0.0, 0.05)),
        seed=int(rng.integers(2**31)),
    )


def is_held_out(shape: int, surface: int, colour: int) -> bool:
    """One in nine combinations never appears in the toy CLIP's pretraining; every single word does."""
    return (shape + 2 * surface + 5 * colour) % 9 == 0


# Drawing -------------------------------------------------------------------------------------------------------------


def _circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0, corners: int = 48) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    turns = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [((inner if i % 2 else 1) * math.cos(t), (inner if i % 2 else 1) * math.sin(t)) for i, t in enumerate(turns)]


def _heart(corners: int = 48) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / corners for i in range(corners)]
    wave = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(math.sin(t) ** 3, -(w + 2.5) / 15) for t, w in zip(turns, wave, strict=True)]


def _drop(corners: int = 36) -> list[tuple[float, float]]:
    turns = [math.pi * (i / (corners - 1) * 1.5 - 0.25) for i in range(corners)]
    return [(0.0, -1.0), *((0.66 * math.cos(t), 0.33 + 0.66 * math.sin(t)) for t in turns)]


# Each shape is an outline and an optional hole, in units of its radius, y pointing down.
_OUTLINES: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {
    "circle": (_circle(0.95), []),
    "square": ([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)], []),
    "triangle": ([(0.0, -1.0), (0.98, 0.78), (-0.98, 0.78)], []),
    "star": (_star(), []),
    "heart": (_heart(), []),
    "cross": (
        [
            (x * s, y * s)
            for s in (1, -1)
            for x, y in ((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3))
        ],
        [],
    ),
    "ring": (_circle(1.0), _circle(0.55)),
    "crescent": (_circle(1.0), _circle(0.82, x=0.42)),
    "arrow": ([(-1, -0.26), (0.05, -0.26), (0.05, -0.8), (1, 0), (0.05, 0.8), (0.05, 0.26), (-1, 0.26)], []),
    "drop": (_drop(), []),
    "hourglass": ([(-0.8, -0.95), (0.8, -0.95), (0.1, 0), (0.8, 0.95), (-0.8, 0.95), (-0.1, 0)], []),
    "bolt": ([(0.25, -1), (-0.7, 0.15), (-0.08, 0.15), (-0.35, 1), (0.7, -0.3), (0.05, -0.3), (0.65, -1)], []),
}


def _mask(scene: Scene) -> np.ndarray:
    """Coverage of every pixel by the shape, (IMAGE_SIZE, IMAGE_SIZE) in 0..1."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    canvas = PILImage.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    cos, sin = math.cos(scene.angle) * scene.radius, math.sin(scene.angle) * scene.radius
    for corners, fill in zip(_OUTLINES[SHAPES[scene.shape]], (255, 0), strict=True):
        placed = [(scene.x + cos * u - sin * v, scene.y + sin * u + cos * v) for u, v in corners]
        if placed:
            pen.polygon([((x + 1) / 2 * side, (y + 1) / 2 * side) for x, y in placed], fill=fill)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _pattern(scene: Scene, rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The share of the dark second tone at every pixel, 0..1; (u, v) are coordinates that turn with the shape."""
    surface = SURFACES[scene.surface]
    if surface == "striped":
        return np.clip(0.5 + 2.5 * np.sin(2 * np.pi * 2.2 * u), 0, 1)
    if surface == "dotted":
        return np.clip(3 * (np.cos(2 * np.pi * 2 * u) + np.cos(2 * np.pi * 2 * v) - 0.7), 0, 1)
    if surface == "checkered":
        return np.clip(0.5 + 4 * np.sin(2 * np.pi * 1.5 * u) * np.sin(2 * np.pi * 1.5 * v), 0, 1)
    if surface == "ringed":
        return np.clip(0.5 + 2.5 * np.sin(2 * np.pi * 2.4 * np.hypot(u, v)), 0, 1)
    if surface == "speckled":
        grains = rng.random((IMAGE_SIZE // 2, IMAGE_SIZE // 2)) < 0.4
        return np.kron(grains, np.ones((2, 2)))
    return np.zeros_like(u)


def draw(scene: Scene, domain: str = "photo") -> PILImage.Image:
    """Draws a scene as an RGB picture of IMAGE_SIZE x IMAGE_SIZE pixels in one of DOMAINS."""
    if domain not in DOMAINS:
        raise ValueError(f"`domain`={domain!r} is not a domain of the toy world; choose one of {', '.join(DOMAINS)}.")
    rng = np.random.default_rng(scene.seed)
    axis = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    x, y = np.meshgrid(axis, axis)
    cos, sin = math.cos(scene.angle) / scene.radius, math.sin(scene.angle) / scene.radius
    u, v = cos * (x - scene.x) + sin * (y - scene.y), cos * (y - scene.y) - sin * (x - scene.x)

    mask = _mask(scene)[..., None]
    pattern = _pattern(scene, rng, u, v)[..., None]
    colour = np.clip(np.array(COLOURS[_COLOUR_NAMES[scene.colour]]) + rng.normal(0, 0.03, 3), 0, 1)
    background = np.clip(np.array(BACKGROUNDS[_BACKGROUND_NAMES[scene.background]]) + rng.normal(0, 0.04, 3), 0, 1)
    grain = rng.normal(0, 1, (IMAGE_SIZE, IMAGE_SIZE, 3))

    if domain == "line_drawing":  # coloured pencil on paper: outline and the edges of the pattern
        edges = [np.abs(np.gradient(layer[..., 0], axis=a)) for layer in (mask, pattern * mask) for a in (0, 1)]
        line = np.clip(1.6 * np.max(edges, axis=0), 0, 1)[..., None]
        picture = (1 - line) * 0.96 + line * colour * 0.75
    else:
        tone = colour * (1 - 0.72 * pattern)
        ramp = rng.normal(0, 0.08, 2)
        light = scene.light * (1 + ramp[0] * x + ramp[1] * y)[..., None]
        picture = (background * (1 - mask) + tone * mask) * light
    picture = np.clip(picture + scene.noise * grain, 0, 1)

    if domain == "negative":
        picture = 1 - picture
    if domain == "fog":
        picture = 0.35 * picture + 0.5
    image = PILImage.fromarray(np.round(picture * 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1.2)) if domain == "fog" else image
