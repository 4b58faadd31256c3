"""The quality check of the second model: a small classifier reads off an image what it shows, and that is compared with the words.

    python -m bench.second_model.classifier train
    python -m bench.second_model.classifier check

The classifier is trained on drawn images alone, some of them blurred or noisy. On drawn images of held-out scenes it must read
at least `MUST_READ` of the words. The trained model passes if, on `CHECKED` held-out scenes with 50 steps of DDIM and guidance,
at least `MUST_SHOW` of the words that were asked for are shown, and at least `MUST_BE_EMPTY` of the other places are empty.
These numbers were written before the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.common import Bench
from bench.second_model.scenes import COLOURS, NOTHING, PLACES, SHAPES, TEXTURES, TINTS, Scene, draw, random_scenes

PATH = Path(__file__).parents[1] / "assets" / "second_classifier.safetensors"
MUST_READ, MUST_SHOW, MUST_BE_EMPTY = 0.98, 0.90, 0.90
CHECKED = 128  # scenes
STEPS, TRAIN_BATCH, RATE = 1500, 64, 2e-3
_COLOURS, _SHAPES = (*COLOURS, NOTHING), (*SHAPES, NOTHING)


class Classifier(nn.Module):
    """Images [B, 3, 32, 32] in [−1, 1] to scores: texture [B, 4], tint [B, 3], colour [B, 4 places, 7], shape [B, 4 places, 5]."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())

        self.body = nn.Sequential(layer(3, 32, 1), layer(32, 48, 2), layer(48, 64, 2), layer(64, 64, 1))  # [B, 64, 8, 8]
        self.ground = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 64), nn.SiLU(), nn.Linear(64, len(TEXTURES) + len(TINTS)))
        self.place = nn.Sequential(nn.Linear(64 * 16, 96), nn.SiLU(), nn.Linear(96, len(_COLOURS) + len(_SHAPES)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seen = self.body(images)
        texture, tint = self.ground(seen).split([len(TEXTURES), len(TINTS)], -1)
        quarters = seen.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)  # [B, 4, 1024]
        colour, shape = self.place(quarters).split([len(_COLOURS), len(_SHAPES)], -1)
        return texture, tint, colour, shape


def labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices: texture [B], tint [B], colour [B, 4 places], shape [B, 4 places]."""
    texture = torch.tensor([TEXTURES.index(s.texture) for s in scenes])
    tint = torch.tensor([tuple(TINTS).index(s.tint) for s in scenes])
    at = [{place: (colour, shape) for place, colour, shape in s.shapes} for s in scenes]
    nothing = (NOTHING, NOTHING)
    colour = torch.tensor([[_COLOURS.index(a.get(p, nothing)[0]) for p in PLACES] for a in at])
    shape = torch.tensor([[_SHAPES.index(a.get(p, nothing)[1]) for p in PLACES] for a in at])
    return texture, tint, colour, shape


@dataclass(frozen=True)
class Verdict:
    """Shares of what was asked for.

    Args:
        words: textures, tints, colours and shapes that are shown where they were asked for.
        empty: places without a shape that are empty.
        scenes: images in which everything is right.
        by_kind: the share of words of each kind.
    """

    words: float
    empty: float
    scenes: float
    by_kind: dict[str, float]

    @property
    def passes(self) -> bool:
        return self.words >= MUST_SHOW and self.empty >= MUST_BE_EMPTY


def judge(images: Tensor, scenes: Sequence[Scene], classifier: nn.Module | None = None) -> Verdict:
    """Judge images [B, 3, 32, 32] in [−1, 1]."""
    with torch.no_grad():
        scores = (classifier or load_classifier())(images.clamp(-1, 1))
    texture, tint, colour, shape = (s.argmax(-1) == told for s, told in zip(scores, labels(scenes), strict=True))
    asked = labels(scenes)[2] != _COLOURS.index(NOTHING)
    by_kind = {"texture": texture, "tint": tint, "colour": colour[asked], "shape": shape[asked]}
    words = torch.cat(list(by_kind.values())).float().mean()
    everything = texture & tint & colour.all(1) & shape.all(1)
    empty = (colour & shape)[~asked]
    return Verdict(
        float(words), float(empty.float().mean()), float(everything.float().mean()), {k: float(v.float().mean()) for k, v in by_kind.items()}
    )  # fmt: skip


def load_classifier(path: Path = PATH) -> nn.Module:
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


app = typer.Typer(add_completion=False, help="The quality check of the second model.")


@app.command()
def train(out: Annotated[Path, typer.Option(help="Where the float16 weights go.")] = PATH) -> None:
    """Train the classifier on drawn images (two minutes), and require that it can read."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS)
    for _ in range(STEPS):
        scenes = random_scenes(TRAIN_BATCH, generator)
        images = draw(scenes, generator)
        worse = torch.rand(TRAIN_BATCH, 2, 1, 1, 1, generator=generator)
        blurred = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        images = torch.where(worse[:, 0] < 0.3, blurred, images)
        images = images + 0.12 * worse[:, 1] * torch.randn(images.shape, generator=generator)
        scores = model(images.clamp(-1, 1))
        parts = [
            nn.functional.cross_entropy(s.flatten(0, -2), told.flatten())
            for s, told in zip(scores, labels(scenes), strict=True)
        ]
        loss = torch.stack(parts).sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        plan.step()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}, out)
    verdict = on_drawn(load_classifier(out))
    print(verdict)
    if verdict.words < MUST_READ:
        raise typer.Exit(1)


def on_drawn(classifier: nn.Module, count: int = 1024) -> Verdict:
    """What the classifier reads on drawn images of held-out scenes."""
    generator = torch.Generator().manual_seed(2)
    scenes = random_scenes(count, generator, held_out=True)
    return judge(draw(scenes, generator), scenes, classifier)


@app.command()
def check(
    weights: Annotated[Path | None, typer.Option(help="Weights, if not those of bench/assets.")] = None,
    steps: Annotated[int, typer.Option()] = 50,
    solver: Annotated[str, typer.Option()] = "ddim",
    scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = CHECKED,
    picture: Annotated[Path | None, typer.Option(help="Where a picture of the first images goes.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None,
    log: Annotated[Path | None, typer.Option(help="Log of the training, whose losses become rows.")] = None,
) -> None:
    """Judge images of the trained model; the exit code is 1 where it does not pass."""
    from bench.second_model.network import generate
    from bench.second_model.train import WEIGHTS, load

    asked = random_scenes(scenes, torch.Generator().manual_seed(3), held_out=True)
    images = generate(load(weights or WEIGHTS), asked, solver=solver, steps=steps, seed=500)
    verdict = judge(images, asked)
    bench = Bench("second_model", f"{steps} steps of {solver}, {scenes} held-out scenes")
    bench.row("words shown as asked for", verdict.words, "share", f">= {MUST_SHOW}", by_kind=verdict.by_kind)
    bench.row("empty places that are empty", verdict.empty, "share", f">= {MUST_BE_EMPTY}")
    bench.row("images in which everything is right", verdict.scenes, "share")
    read = on_drawn(load_classifier())
    bench.row("words that the classifier reads on drawn images", read.words, "share", f">= {MUST_READ}", by_kind=read.by_kind)
    for line in [] if log is None else log.read_text().splitlines():
        told = json.loads(line)
        if told["step"] % 250 == 0:
            bench.row(f"loss at step {told['step']}", told["loss"], "weighted", minutes=told["minutes"])
    bench.write(rows)
    if picture is not None:
        show(images, asked, picture)
    if not verdict.passes:
        raise typer.Exit(1)


def show(images: Tensor, scenes: Sequence[Scene], path: Path, columns: int = 6) -> None:
    """A picture of up to four rows of images with their words."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, columns, figsize=(2.4 * columns, 11), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, scene in zip(axes.flat, images, scenes, strict=False):
        axis.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(str(scene).replace(" and ", "\nand ").replace(", on ", "\non "), fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    app()
