"""What an image of the second model shows, in words, as tokens, and drawn: one or two coloured shapes on a textured background."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32  # pixels a side
TEXTURES = ("flat", "stripes", "checks", "clouds")
TINTS = {"grey": (0.50, 0.50, 0.50), "sand": (0.66, 0.54, 0.40), "slate": (0.38, 0.48, 0.62)}
# (down, right) of a place's centre, in pixels
PLACES = {"top-left": (8.5, 8.5), "top-right": (8.5, 23.5), "bottom-left": (23.5, 8.5), "bottom-right": (23.5, 23.5)}
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.75, 0.15),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.15, 0.20, 0.95),
    "magenta": (0.90, 0.15, 0.85),
}
SHAPES = ("disc", "square", "triangle", "ring")
NOTHING = "nothing"  # fills the words of the second shape where there is one shape

VOCABULARY = (*TEXTURES, *TINTS, *PLACES, *COLOURS, *SHAPES, NOTHING)
WORDS = 8  # tokens of a scene: texture, tint, then place, colour and shape of each of two shapes
TEXT_DIM = len(VOCABULARY) + WORDS  # a token is a word and its position


@dataclass(frozen=True)
class Scene:
    """One image in words.

    Args:
        texture: of the background.
        tint: colour of the background.
        shapes: one or two of (place, colour, shape), at different places.
    """

    texture: str
    tint: str
    shapes: tuple[tuple[str, str, str], ...]

    def words(self) -> tuple[str, ...]:
        placed = [word for shape in self.shapes for word in shape]
        return (self.texture, self.tint, *placed, *[NOTHING] * (WORDS - 2 - len(placed)))

    def __str__(self) -> str:
        placed = " and ".join(f"a {colour} {shape} at the {place}" for place, colour, shape in self.shapes)
        return f"{placed}, on {self.tint} {self.texture}"

    @property
    def held_out(self) -> bool:
        """True for one scene of sixteen: training never shows it. The order of its shapes makes no difference."""
        text = repr((self.texture, self.tint, sorted(self.shapes)))
        return zlib.crc32(text.encode()) % 16 == 0


def random_scenes(count: int, generator: torch.Generator, held_out: bool = False) -> list[Scene]:
    """`count` scenes, every word drawn uniformly, two shapes in two of three; all of them held out from training, or none."""

    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    pairs = list(itertools.permutations(PLACES, 2))
    scenes: list[Scene] = []
    while len(scenes) < count:
        places = pairs[int(torch.randint(len(pairs), (), generator=generator))]
        number = 1 + int(torch.randint(3, (), generator=generator) > 0)
        shapes = tuple((place, pick(tuple(COLOURS)), pick(SHAPES)) for place in places[:number])
        scene = Scene(pick(TEXTURES), pick(tuple(TINTS)), shapes)
        if scene.held_out == held_out:
            scenes.append(scene)
    return scenes


def encode(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Tokens [B, WORDS, TEXT_DIM] (one-hot word beside one-hot position) and the bag of words [B, TEXT_DIM], both float32.

    The tokens are in the place of a text encoder's output, the bag of words of its pooled output: it does not tell which
    colour belongs to which shape. Both have about unit mean square.
    """
    index = torch.tensor([[VOCABULARY.index(word) for word in scene.words()] for scene in scenes])
    words = torch.nn.functional.one_hot(index, len(VOCABULARY)).float()
    positions = torch.eye(WORDS).expand(len(scenes), WORDS, WORDS)
    tokens = torch.cat([words, positions], -1) * (TEXT_DIM / 2) ** 0.5
    return tokens, tokens.sum(1) / WORDS**0.5


def unconditional(batch: int) -> tuple[Tensor, Tensor]:
    """What the network reads where the condition was dropped: zeros in the shapes of `encode`."""
    return torch.zeros(batch, WORDS, TEXT_DIM), torch.zeros(batch, TEXT_DIM)


def draw(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Images of the scenes with random place, size, light and texture: float32 [B, 3, SIZE, SIZE] in [−1, 1]."""
    b = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    y, x = torch.arange(SIZE).view(1, SIZE, 1) + 0.5, torch.arange(SIZE).view(1, 1, SIZE) + 0.5
    angle, phase = uniform(0, torch.pi, 1, 1), uniform(0, 2 * torch.pi, 1, 1)
    wave = torch.sin(2 * torch.pi / 9 * (y * angle.sin() + x * angle.cos()) + phase)
    cell = uniform(3.5, 5.5, 1, 1)
    checks = torch.sign(torch.sin(torch.pi / cell * y + phase) * torch.sin(torch.pi / cell * x + phase))
    clouds = torch.nn.functional.interpolate(
        torch.randn(b, 1, 6, 6, generator=generator), size=(SIZE, SIZE), mode="bicubic", align_corners=True
    )[:, 0].clamp(-1.5, 1.5)
    textures = torch.stack([torch.zeros_like(clouds), wave, checks, clouds], 1)
    which = torch.tensor([TEXTURES.index(s.texture) for s in scenes])
    texture = textures[torch.arange(b), which]
    tint = torch.tensor([TINTS[s.tint] for s in scenes]) + uniform(-0.06, 0.06, 1)
    image = tint[:, :, None, None] + (uniform(0.09, 0.15, 1, 1) * texture)[:, None]

    for number in range(2):
        there = torch.tensor([len(s.shapes) > number for s in scenes])
        asked = [s.shapes[number] if len(s.shapes) > number else ("top-left", "red", "disc") for s in scenes]
        centre = torch.tensor([PLACES[place] for place, _, _ in asked]) + uniform(-1.5, 1.5, 2)
        radius = uniform(4.6, 6.2, 1, 1)
        dy, dx = y - centre[:, :1, None], x - centre[:, 1:, None]
        far = (dy**2 + dx**2).sqrt()
        edges = torch.stack(  # below zero is inside; 1 unit a pixel, so that a clamp draws soft borders
            [
                far - radius,
                torch.maximum(dy.abs(), dx.abs()) - 0.87 * radius,
                torch.maximum(dy - 0.8 * radius, 1.8 * dx.abs() - dy - 0.9 * radius),
                (far - 0.74 * radius).abs() - 0.26 * radius,
            ],
            1,
        )
        edge = edges[torch.arange(b), torch.tensor([SHAPES.index(shape) for _, _, shape in asked])]
        alpha = (0.5 - edge).clamp(0, 1) * there[:, None, None]
        light = 1 - uniform(0.0, 0.25, 1, 1) * ((dy + dx) / (2 * radius) + 0.5).clamp(0, 1)  # darker towards the lower right
        colour = torch.tensor([COLOURS[colour] for _, colour, _ in asked])[:, :, None, None] * light[:, None]
        image = image + alpha[:, None] * (colour - image)
    return (2 * image - 1).clamp(-1, 1)
