"""Random histories of calls, and a machine that knows the truth: which request, step, lane and weights each call really belongs to.

The session under test is told nothing of that. An output is either what the untouched model computes for these inputs, bit for bit, or
it is made of what the branches gave when this very lane was last computed, in the same request and with the same weights; anything
else is stale. The machine also knows when reuse was due, so it counts how often reuse happened where it might have.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vdcache
from vdcache.testing import TinyDiT, latent

STEPS = 6


class Scaled(nn.Module):
    """A layer with a setting that Dynamo takes for constant, or for an input: the scale of an adapter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.strength = layer, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.strength


class Adapted(TinyDiT):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(1, seed=seed)
        self.text = Scaled(self.text)


@dataclass
class Truth:
    """One compiled model, and what it really was asked."""

    every: int
    model: Adapted
    compiled: Any
    kept: dict[Any, tuple[int, Tensor]] = field(default_factory=dict)  # of a call: the step, and what its branches gave
    request: int = -1
    due: int = -1  # the last step that the schedule computes

    def begin(self) -> None:
        self.request += 1
        self.kept.clear()
        self.due = -1

    @property
    def weights(self) -> Any:
        return float(self.model.out.weight.sum()), float(self.model.mlp[0][0].weight.sum()), self.model.text.strength


class Machine:
    """A model under two recipes, and everything that may happen to it.

    Args:
        seed: of the history.
        shared: compiled models, used again by other histories: compiling is what takes the time.
    """

    def __init__(self, seed: int, shared: list[Truth] | None = None) -> None:
        self.random = random.Random(seed)
        self.handles = shared if shared is not None else handles()
        self.noise = 10_000 * seed
        self.may: Counter[str] = Counter()
        self.did: Counter[str] = Counter()
        self.stale: list[str] = []
        self.log: list[str] = []

    # ---- one call --------------------------------------------------------------------------------------------------

    def call(
        self, truth: Truth, kind: str, step: int, lane: Any, x: Tensor, t: Tensor, words: Tensor, *, counts: bool = True
    ) -> None:
        """Args: `counts` is False where nobody could know from the inputs whether something may be reused."""
        key = lane, truth.weights, tuple(x.shape), tuple(words.shape)
        if step % truth.every == 0 or step >= STEPS - 1:
            truth.due = step
        known = truth.kept.get(key)
        may = known is not None and known[0] >= truth.due and truth.due != step
        out = truth.compiled(x, t, words)
        fresh = truth.model(x, t, words)
        if counts and may:
            self.may[kind] += 1
        if torch.equal(out, fresh):
            truth.kept[key] = step, truth.model.branches(x, t, words)
            return
        if counts and may:
            self.did[kind] += 1
        if known is None or not torch.allclose(out, truth.model.with_branches(x, words, known[1]), rtol=1e-4, atol=1e-5):
            record = truth.compiled.vdcache.history[-1]
            off = "" if known is None else f", off by {(out - truth.model.with_branches(x, words, known[1])).abs().max():.2g}"
            where = f"generation {record.generation}, step {record.step}, lane {record.lane}{off}"
            self.stale.append(f"{kind}: step {step}, lane {lane}: seen as {where}; history: {' | '.join(self.log[-6:])}")

    def words(self, prompt: int) -> Tensor:
        return latent(prompt, 1, 3, 4)

    def new_noise(self) -> int:
        self.noise += 50
        return self.noise

    def time(self, step: int, rising: bool = False) -> Tensor:
        return torch.tensor([1000.0 - 50 * (STEPS - 1 - step if rising else step)])

    def run(
        self,
        truth: Truth,
        kind: str,
        *,
        prompts: tuple[int, ...] = (1,),
        steps: int = STEPS,
        noise: int | None = None,
        change: Callable[[int], None] | None = None,
        lanes_at: Callable[[int], tuple[int, ...]] | None = None,
        rising: bool = False,
        cast: bool = False,
        unknown: tuple[int, ...] = (),
    ) -> None:
        """One request.

        Args:
            change: called before each step.
            lanes_at: the prompts of a step, where they are not always the same.
            cast: every call gets new objects of equal value.
            unknown: steps at which nobody could know.
        """
        truth.begin()
        noise = self.new_noise() if noise is None else noise
        held = {p: self.words(p) for p in range(20)}
        for step in range(steps):
            if change is not None:
                change(step)
            x = latent(noise + step)
            for prompt in prompts if lanes_at is None else lanes_at(step):
                words = held[prompt].clone() if cast else held[prompt]
                x_now = x.clone() if cast else x
                self.call(truth, kind, step, prompt, x_now, self.time(step, rising), words, counts=step not in unknown)

    # ---- what may happen -------------------------------------------------------------------------------------------

    def moves(self) -> dict[str, Callable[[Truth], None]]:
        return {name.removeprefix("move_"): getattr(self, name) for name in dir(self) if name.startswith("move_")}

    def play(self, moves: int = 4) -> None:
        """A history of so many moves."""
        names = sorted(self.moves())
        for _ in range(moves):
            name = self.random.choice(names)
            self.log.append(name)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.moves()[name](self.random.choice(self.handles))

    def move_plain(self, truth: Truth) -> None:
        lanes = tuple(self.random.sample(range(1, 6), self.random.randint(1, 3)))
        self.run(truth, "plain", prompts=lanes, cast=self.random.random() < 0.5)

    def move_prompt_exchanged(self, truth: Truth) -> None:
        at, guided = self.random.randint(1, STEPS - 2), self.random.random() < 0.5
        others = (9,) if guided else ()
        self.run(
            truth,
            "prompt exchanged",
            lanes_at=lambda s: (*((1,) if s < at else (2,)), *others),
            cast=self.random.random() < 0.5,
        )

    def move_prompt_rewritten(self, truth: Truth) -> None:
        """In place, in the very object."""
        truth.begin()
        noise, words = self.new_noise(), self.words(1).clone()
        at = self.random.randint(1, STEPS - 2)
        for step in range(STEPS):
            if step == at:
                words.copy_(self.words(2))
            self.call(truth, "prompt rewritten", step, int(step >= at), latent(noise + step), self.time(step), words)

    def move_weights_written(self, truth: Truth) -> None:
        at = self.random.randint(1, STEPS - 2)

        def write(step: int) -> None:
            if step == at:
                truth.model.mlp[0][0].weight.mul_(1.1 if self.random.random() < 0.5 else 0.9)

        self.run(truth, "weights written", change=write)

    def move_weights_written_through_data(self, truth: Truth) -> None:
        """Between two requests: nothing of the first reaches the second."""
        self.run(truth, "weights through .data", steps=self.random.randint(2, STEPS))
        truth.model.mlp[0][0].weight.data.mul_(1.1 if self.random.random() < 0.5 else 0.9)
        self.run(truth, "weights through .data", prompts=(4,))

    def move_adapter_set(self, truth: Truth) -> None:
        at = self.random.randint(1, STEPS - 2)

        def set_scale(step: int) -> None:
            if step == at:
                truth.model.text.strength = 0.5 if truth.model.text.strength == 1.0 else 1.0

        self.run(truth, "adapter set", change=set_scale)

    def move_offloaded(self, truth: Truth) -> None:
        """Every weight becomes another object of equal value."""

        def move(_: int) -> None:
            for module in truth.model.modules():
                for name, p in list(module._parameters.items()):
                    if p is not None:
                        module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)

        self.run(truth, "offloaded", change=move, prompts=(1, 2))

    def move_lane_drops_out(self, truth: Truth) -> None:
        at, first = self.random.randint(1, STEPS - 2), self.random.random() < 0.5
        both = (1, 2) if first else (2, 1)
        self.run(truth, "lane drops out", lanes_at=lambda s: both if s < at else (2,))

    def move_lane_comes_back(self, truth: Truth) -> None:
        at = self.random.randint(1, STEPS - 3)
        self.run(truth, "lane comes back", lanes_at=lambda s: (1, 2) if not at <= s < at + 2 else (2,))

    def move_lanes_in_another_order(self, truth: Truth) -> None:
        order = [self.random.sample([1, 2, 3], 3) for _ in range(STEPS)]
        self.run(truth, "lanes in another order", lanes_at=lambda s: tuple(order[s]))

    def move_cancelled(self, truth: Truth) -> None:
        """Cancelled, and tried again with the same noise and another prompt."""
        noise, after = self.new_noise(), self.random.randint(1, STEPS - 1)
        self.run(truth, "cancelled", steps=after, noise=noise)
        self.run(truth, "cancelled", prompts=(2,), noise=noise)

    def move_cancelled_with_another_seed(self, truth: Truth) -> None:
        after = self.random.randint(1, STEPS - 1)
        self.run(truth, "cancelled, another seed", steps=after)
        # One call and then another latent at its timestep: windows, or begun anew? The next timestep tells.
        self.run(truth, "cancelled, another seed", unknown=(1,) if after == 1 else ())

    def move_from_a_picture(self, truth: Truth) -> None:
        """Cancelled, and then begun at a lower timestep with another prompt: the run before seems to go on."""
        after = self.random.randint(1, 3)
        self.run(truth, "from a picture", steps=after)
        truth.begin()
        noise, words = self.new_noise(), self.words(7)
        for step in range(after, STEPS):
            self.call(truth, "from a picture", step, 7, latent(noise + step), self.time(step), words, counts=False)

    def move_raises(self, truth: Truth) -> None:
        at, noise = self.random.randint(1, STEPS - 2), self.new_noise()
        truth.begin()
        words = self.words(1)
        for step in range(STEPS):
            if step == at:
                try:
                    truth.compiled(latent(noise + step), self.time(step), words[..., :-1])
                except Exception:  # noqa: BLE001 — of Dynamo's
                    truth.kept.clear()
            self.call(truth, "a step that raises", step, 1, latent(noise + step), self.time(step), words)

    def move_windows(self, truth: Truth) -> None:
        truth.begin()
        noise, words = self.new_noise(), self.words(1)
        windows = self.random.randint(2, 3)
        for step in range(STEPS):
            for w in range(windows):
                x = latent(noise + 10 * w + step)
                self.call(truth, "windows", step, w, x, self.time(step), words, counts=False)

    def move_windows_with_prompts(self, truth: Truth) -> None:
        """Regions of a picture, each with its prompt: they are told apart."""
        truth.begin()
        noise = self.new_noise()
        words = [self.words(1), self.words(2)]
        for step in range(STEPS):
            for w in range(2):
                self.call(truth, "regions", step, w, latent(noise + 10 * w + step), self.time(step), words[w])

    def move_rows(self, truth: Truth) -> None:
        """A batch whose first sample is exchanged for a new request while the second one goes on."""
        truth.begin()
        noise, words = self.new_noise(), torch.cat([self.words(1), self.words(2)])
        at = self.random.randint(2, 3)  # after one step the first sample would seem to wait
        first = 0
        for step in range(STEPS):
            if step == at:
                truth.begin()
                first = step
                words = torch.cat([self.words(3), self.words(2)]) if self.random.random() < 0.5 else words
            own = step - first
            t = torch.tensor([1000.0 - 50 * own, 980.0 - 50 * step])
            self.call(truth, "rows of a batch", own, 0, latent(noise + step, 2, 6, 4), t, words)

    def move_two_requests_in_turn(self, truth: Truth) -> None:
        """Two requests at the same timesteps: their prompts tell them apart."""
        truth.begin()
        noise = self.new_noise()
        words = [self.words(1), self.words(2)]
        for step in range(STEPS):
            for r in range(2):
                self.call(truth, "requests in turn", step, r, latent(noise + 20 * r + step), self.time(step), words[r])

    def move_two_recipes(self, _: Truth) -> None:
        """One model under two recipes, in turn."""
        noise = self.new_noise()
        for truth in self.handles:
            truth.begin()
        words = self.words(1)
        for step in range(STEPS):
            for truth in self.handles:
                self.call(truth, "two recipes", step, 1, latent(noise + step), self.time(step), words)

    def move_rising(self, truth: Truth) -> None:
        self.run(truth, "before rising")  # after a run that was cut short, rising from its end seems to go on first
        self.run(truth, "rising", rising=True)
        self.run(truth, "falling after rising")

    def move_second_order(self, truth: Truth) -> None:
        truth.begin()
        noise, words = self.new_noise(), self.words(1)
        for step in range(STEPS):
            at = torch.tensor([1000.0 - 50 * ((step + 1) // 2)])
            self.call(truth, "second order", step, 1, latent(noise + step), at, words)

    def move_other_size(self, truth: Truth) -> None:
        self.run(truth, "other size", steps=self.random.randint(2, STEPS))
        truth.begin()
        noise, words = self.new_noise(), self.words(1)
        for step in range(STEPS):
            self.call(truth, "other size", step, 1, latent(noise + step, 1, 8, 4), self.time(step), words)

    def move_guidance_ends(self, truth: Truth) -> None:
        """Both lanes in one batch, and from a step on one of them alone."""
        truth.begin()
        noise, at = self.new_noise(), self.random.randint(1, STEPS - 2)
        both, one = torch.cat([self.words(1), self.words(2)]), self.words(2)
        for step in range(STEPS):
            x, t = latent(noise + step), self.time(step)
            if step < at:
                self.call(truth, "guidance ends", step, "both", x.repeat(2, 1, 1), t.repeat(2), both)
            else:
                self.call(truth, "guidance ends", step, "one", x, t, one)

    def move_copied(self, truth: Truth) -> None:
        """A copy in the middle of a run begins empty, and the original goes on."""
        truth.begin()
        noise, words, at = self.new_noise(), self.words(1), self.random.randint(1, STEPS - 2)
        for step in range(STEPS):
            if step == at:
                copied = copy.deepcopy(truth.compiled)
                x, t = latent(noise + step), self.time(step)
                if not torch.equal(copied(x, t, words), truth.model(x, t, words)):
                    self.stale.append(f"copied: the copy's first call reused; history: {' | '.join(self.log[-6:])}")
            self.call(truth, "copied", step, 1, latent(noise + step), self.time(step), words)


def handles() -> list[Truth]:
    """One model under two recipes."""
    torch._dynamo.reset()
    model = Adapted()
    return [
        Truth(every, model, vdcache.compile(model, f"every-{every}", num_steps=STEPS, inner="eager", dynamic=dynamic))
        for every, dynamic in ((2, True), (3, None))
    ]


def histories(count: int, first_seed: int = 0, fresh_every: int = 40) -> Iterator[Machine]:
    """So many histories, one after the other on the same compiled models, which are made anew now and then."""
    shared = None
    for number in range(count):
        if number % fresh_every == 0:
            shared = handles()
        machine = Machine(first_seed + number, shared)
        machine.play()
        yield machine
