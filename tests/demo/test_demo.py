"""The shipped model has learned what it claims, is Wan's mathematics, and the demo runs."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import vdcache
from vdcache.cli.main import app
from vdcache.demo.conditions import Condition, encode
from vdcache.demo.data import all_conditions, draw, random_conditions
from vdcache.demo.fixed import schedule
from vdcache.demo.judge import judge
from vdcache.demo.model import DemoConfig, DemoDiT, with_positions
from vdcache.demo.progress import Stages
from vdcache.demo.run import STATIC, run_demo
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model, weights_path


def test_real_videos_are_judged_right_and_masks_are_the_sprite():
    generator = torch.Generator().manual_seed(1)
    conditions = random_conditions(200, generator)
    videos, mask = draw(conditions, generator)
    verdict = judge(videos, conditions)
    assert verdict.colour > 0.98 and verdict.direction > 0.98
    assert videos.shape == (200, 3, 8, 24, 24) and videos.abs().max() <= 1
    assert mask.shape == (200, 8, 24, 24) and 0.02 < mask.float().mean() < 0.3
    vivid = (videos.amax(1) - videos.amin(1)) > 1.1  # half covered pixels at the border are less vivid
    assert (vivid & mask).sum() / vivid.sum() > 0.97 and (vivid & mask).sum() / mask.sum() > 0.8
    assert len(all_conditions()) == 864


def test_conditions_are_checked():
    assert str(Condition("cross", "blue", "up", "still", "flat")) == "a blue cross standing still, on flat"
    assert encode([Condition()]).shape == (1, 5, 32)
    with pytest.raises(ValueError, match="colour must be one of red"):
        Condition(colour="pink")


@torch.no_grad()
def test_weights_are_small_and_load_into_diffusers():
    from diffusers import WanTransformer3DModel

    assert weights_path().stat().st_size < 10 * 2**20
    model = load_model()
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    theirs = WanTransformer3DModel(**DemoConfig().diffusers_kwargs()).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("rope" in name for name in missing)
    generator = torch.Generator().manual_seed(0)
    x = with_positions(torch.randn(2, 3, 8, 24, 24, generator=generator))
    t, text = torch.tensor([900.0, 100.0]), encode([Condition(), Condition(colour="blue")])
    a, b = model(x, t, text), theirs(x, t, text, return_dict=False)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


CONDITIONS = [
    Condition(("disc", "square", "cross", "disc")[i], colour, direction, "fast", background)
    for i, direction in enumerate(("up", "down", "left", "right"))
    for colour, background in (("red", "flat"), ("cyan", "clouds"), ("yellow", "stripes"), ("green", "flat"), ("blue", "flat"))
]


@pytest.mark.slow
def test_the_model_has_learned_colour_and_direction():
    """By chance: 1 in 6, and 1 in 4."""
    verdict = judge(sample(load_model(), CONDITIONS, steps=8, seed=3), CONDITIONS)
    assert verdict.colour >= 0.85
    assert verdict.direction >= 0.75


def test_every_word_is_heard():
    """A wrong word makes the loss larger; for an untrained network it makes no difference."""
    from vdcache.demo.train import words_heard

    heard = words_heard(load_model(), "cpu", batch=16)
    assert heard["colour"] > 1.5 and heard["direction"] > 1.2 and heard["speed"] > 1.1
    assert all(abs(ratio - 1) < 0.02 for ratio in words_heard(DemoDiT(), "cpu", batch=16).values())


def test_training_teaches_something():
    from vdcache.demo.train import loss_of

    torch.manual_seed(0)
    model = DemoDiT(DemoConfig(num_layers=2))
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = loss_of(model, 4, generator, "cpu")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_the_demo_writes_what_it_says(tmp_path):
    torch._dynamo.reset()
    recipes = ["every-2", vdcache.methods.adacache([(0.4, 3), (1.0, 1)], moreg=True, name="adacache-test")]
    conditions = [Condition(), Condition(speed="still")]
    log = io.StringIO()
    rows = run_demo(
        tmp_path, recipes=recipes, conditions=conditions, steps=6, rounds=1, inner="eager", console=Console(file=log, width=100)
    )
    lines = [re.sub(r"^ +\d+ s  ", "", line) for line in log.getvalue().splitlines()]  # every stage, as it begins
    ways = ["eager", "torch.compile", "every-2", "adacache-test+moreg"]
    assert lines[1:11] == [
        *(f"compiling: {way} ({i} of 4)" for i, way in enumerate(ways, start=1)),
        *(f"generating: {way} (round 1 of 1)" for way in ways),
        *(f"the honest rivals: plain, in the time of {way}" for way in ways[2:]),
    ]
    by_name = {r.recipe: r for r in rows}
    assert by_name["every-2"].computed == 4
    assert by_name["eager"].psnr == float("inf") and by_name["torch.compile"].psnr is None
    assert by_name["adacache-test+moreg"].cache_mib > 0
    assert all(r.rival_steps and r.rival_psnr for r in rows if r.recipe.startswith(("every", "ada")))
    written = json.loads((tmp_path / "rows.json").read_text())
    assert len(written["rows"]) == 4 and written["machine"]["torch"] == torch.__version__
    import imageio.v3 as iio

    assert iio.imread(tmp_path / "videos.gif").shape[0] == 8
    assert iio.imread(tmp_path / "timeline.png").shape[0] > 100


def test_a_terminal_has_bars_and_no_lines():
    out = io.StringIO()
    with Stages(Console(file=out, force_terminal=True, width=100)) as stages:
        stage = stages.stage("compiling", 2)
        stage.now("one", "1 of 2")
        stage.done()
        assert (stages.bars.tasks[0].completed, stages.bars.tasks[0].description) == (1, "compiling: one")
    assert "1 of 2" not in out.getvalue()


@pytest.mark.slow
def test_the_demo_runs_fixed_graphs(tmp_path):
    rows = run_demo(tmp_path, recipes=[STATIC], conditions=[Condition()], steps=8, rounds=1, inner="eager")
    (row,) = [r for r in rows if r.recipe == STATIC]
    assert row.computed == len(schedule(8).computed) < 8 and row.psnr > 20 and row.cache_mib > 0 and row.rival_steps
    assert (tmp_path / "package/manifest.json").is_file()


def test_command_line():
    run = CliRunner().invoke
    assert "adacache-fast+moreg" in run(app, ["recipes"]).output
    output = run(app, ["info"]).output
    assert torch.__version__ in output and "registered: torch.compile" in output
    result = run(app, ["demo", "--recipe", "adacache-quick", "--inner", "eager"])
    assert result.exit_code == 2 and "no recipe is called 'adacache-quick'" in result.output.replace("\n", " ")
