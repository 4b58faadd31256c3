"""How far is a plain sampler with few steps from the converged video, and which solver gets closest?

The shipped model sampled by Euler (the demo's), DPM-Solver++ 2M and UniPC, all on Euler's uniform grid of sigmas from 1 to 0.
Each is compared with the converged solution of the same noise: `converged` takes 200 steps of UniPC.

What the two schedulers of diffusers do with a flow model, seen in their code (0.42) and checked by `agreement`:

- Both round the timesteps that they hand out to whole numbers, and the grid of DPM-Solver++ starts at 0.999. So the network is
  asked at 1000 · sigma here, as in the demo, and DPM-Solver++ gets Euler's grid by assignment, since its `set_timesteps` takes
  no sigmas. Only its first sigma stays 0.999.
- At sigma = 1 there is no signal, alpha = 0 and lambda = log(alpha / sigma) = −∞. DPM-Solver++ bears even that, since it reads
  only exp(−h) = 0 and 1 / r0 = 0 from it; but its second step then falls back to first order, and with few steps 0.999 is
  better by half a decibel. UniPC would divide by it and moves the first sigma to 1 − 1e-6 by itself: lambda is −14, and the
  second step hardly looks back.
- The last sigma must be 0 (`final_sigmas_type="zero"`): lambda is +∞ there, and the last step of both is of first order, which
  lands on the predicted clean video, as Euler's does. UniPC with `solver_type="bh1"` gives NaN there; "bh2" is the default.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.common import Bench, arguments
from bench.profilingdit import psnr_of
from vdcache.demo.conditions import Condition, encode, unconditional
from vdcache.demo.data import FRAMES, SIZE, random_conditions
from vdcache.demo.judge import judge
from vdcache.demo.model import with_positions
from vdcache.demo.sampler import GUIDANCE
from vdcache.demo.weights import load_model

SOLVERS = ("euler", "dpm++2m", "unipc")
BATCH = 4
CONVERGED = ("unipc", 200)
FEW = (6, 8, 10, 13, 17, 20, 30)


class Euler:
    """The step of the demo's sampler."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas, self.index = sigmas, 0

    def step(self, direction: Tensor, x: Tensor) -> Tensor:
        self.index += 1
        return x + (self.sigmas[self.index] - self.sigmas[self.index - 1]).item() * direction


class Multistep:
    """A multistep scheduler of diffusers on the given sigmas."""

    def __init__(self, solver: str, sigmas: Tensor) -> None:
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0, "solver_order": 2}
        if solver == "unipc":
            self.scheduler: Any = UniPCMultistepScheduler(final_sigmas_type="zero", **flow)
            self.scheduler.set_timesteps(sigmas=sigmas[:-1].double().numpy().copy())
        else:
            self.scheduler = DPMSolverMultistepScheduler(final_sigmas_type="zero", algorithm_type="dpmsolver++", **flow)
            self.scheduler.set_timesteps(len(sigmas) - 1)
            self.scheduler.sigmas[1:] = sigmas[1:]
        self.scheduler.set_begin_index(0)  # it would look the step up by a rounded timestep, which is not unique in many steps

    def step(self, direction: Tensor, x: Tensor) -> Tensor:
        return self.scheduler.step(direction, None, x, return_dict=False)[0]


def solve(
    velocity: Callable[..., Tensor], conditions: Sequence[Condition], *, solver: str, steps: int, seed: int, guidance: float
) -> Tensor:
    """One batch. With Euler this is `vdcache.demo.sampler.sample`, bit for bit."""
    b = len(conditions)
    x = torch.randn(b, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    text = torch.cat([encode(conditions), unconditional(b)])
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    method = Euler(sigmas) if solver == "euler" else Multistep(solver, sigmas)
    with torch.no_grad():
        for sigma in sigmas[:-1]:
            timestep = (1000 * sigma).expand(2 * b)
            with_text, without = velocity(with_positions(torch.cat([x, x])), timestep, text).chunk(2)
            x = method.step(without + guidance * (with_text - without), x)
    return x


def generate(
    velocity: Callable[..., Tensor],
    conditions: Sequence[Condition],
    *,
    solver: str = "euler",
    steps: int = 30,
    seed: int = 0,
    guidance: float = GUIDANCE,
    begin: Callable[[int], None] | None = None,
) -> Tensor:
    """Videos of the conditions, four a batch; batch i starts from the noise of `seed + i`.

    Args:
        velocity: the model, called once a step with the conditional and the unconditional half in one batch.
        begin: told the number of steps before each batch: there a cache forgets the batch before.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    videos = []
    for i, at in enumerate(range(0, len(conditions), BATCH)):
        if begin is not None:
            begin(steps)
        part = conditions[at : at + BATCH]
        videos.append(solve(velocity, part, solver=solver, steps=steps, seed=seed + i, guidance=guidance))
    return torch.cat(videos)


def in_two_lanes(
    velocity: Callable[..., Tensor], lane: Callable[[str], AbstractContextManager[Any] | None] = lambda name: None
) -> Callable[..., Tensor]:
    """The model called twice a step, with the conditional and then the unconditional half, as pipelines without batched
    guidance do.

    Args:
        lane: told "cond" or "uncond" before each call; a context manager that it returns goes around the call.
    """

    def both(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        halves = zip(*(given.chunk(2) for given in (hidden_states, timestep, encoder_hidden_states)), strict=True)
        out = []
        for name, half in zip(("cond", "uncond"), halves, strict=True):
            with lane(name) or nullcontext():
                out.append(velocity(*half))
        return torch.cat(out)

    return both


def converged(model: nn.Module, conditions: Sequence[Condition], seed: int = 0) -> Tensor:
    """Where all solvers go with ever more steps. Kept in a folder for temporary files, by weights, conditions and seed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    digest.update(repr((CONVERGED, list(conditions), seed, BATCH, GUIDANCE)).encode())
    path = Path(tempfile.gettempdir()) / "vdcache-converged" / f"{digest.hexdigest()[:24]}.pt"
    if path.exists():
        return torch.load(path)
    solver, steps = CONVERGED
    videos = generate(model, conditions, solver=solver, steps=steps, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{id(videos)}")  # a run that is cut off, or another beside this one, leaves no broken file
    torch.save(videos, half)
    half.rename(path)
    return videos


def agreement(bench: Bench, model: nn.Module, conditions: Sequence[Condition]) -> None:
    """Do the solvers go to one and the same video?"""
    videos = euler = generate(model, conditions, solver="euler", steps=1000)
    for solver, steps in [("euler", 1000), ("dpm++2m", 200), ("unipc", 200), ("unipc", 400)]:
        if (solver, steps) != ("euler", 1000):
            videos = generate(model, conditions, solver=solver, steps=steps)
        many, sure = (mean(psnr_of(videos, other)[0]) for other in (euler, converged(model, conditions)))
        bench.row(f"{solver} with {steps} steps against Euler with 1000", many, "dB", "> 45", against_converged=sure)
        print(f"{'':<58} {sure:12.5g} dB against the converged solution")


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--videos", type=int, default=16),
        lambda p: p.add_argument("--seed", type=int, default=0),
        lambda p: p.add_argument("--agreement", action="store_true", help="also compare the solvers at many steps (minutes)"),
    )
    model = load_model()
    conditions = random_conditions(args.videos, torch.Generator().manual_seed(2025))
    bench = Bench("solvers", f"converged: {CONVERGED[1]} steps of {CONVERGED[0]}")
    if args.agreement:
        agreement(bench, model, conditions[:BATCH])
    sure = converged(model, conditions, args.seed)
    table = Table(box=None, title=f"PSNR to the converged video (dB), colour and direction as told (of {args.videos})")
    for column in ("steps", *SOLVERS):
        table.add_column(column, justify="right")
    verdict = judge(sure, conditions)
    bench.row("converged", verdict.colour, "colour", direction=verdict.direction, moving=verdict.moving)
    for steps in FEW:
        cells = []
        for solver in SOLVERS:
            videos = generate(model, conditions, solver=solver, steps=steps, seed=args.seed)
            assert videos.isfinite().all()  # for NaN, `psnr_of` would say 99 dB
            psnr, ssim = psnr_of(videos, sure)
            verdict = judge(videos, conditions)
            bench.row(
                f"{solver}, {steps} steps",
                mean(psnr),
                "dB",
                solver=solver,
                steps=steps,
                ssim=mean(ssim),
                colour=verdict.colour,
                direction=verdict.direction,
                moving=verdict.moving,
                videos=args.videos,
            )
            cells.append(f"{mean(psnr):.2f}  {verdict.colour:.2f} {verdict.direction:.2f}")
        table.add_row(str(steps), *cells)
    Console(width=110).print(table)
    bench.write(args.json)


if __name__ == "__main__":
    main()
