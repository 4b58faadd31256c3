"""Random histories of calls against models whose values are held across steps and generations: every computed step is the untouched model.

The machine is that of `tests.support.histories`, with moves that change what held values are made of.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vdcache
from tests.support.histories import STEPS, Adapted, Machine, Truth
from vdcache.testing import latent


class Conditioned(Adapted):
    """Its prompt and its timestep each go through layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.refined = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 4))
        self.refined.requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, timestep, text + self.refined(text))

    def branches(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().branches(x, timestep, text + self.refined(text))

    def with_branches(self, x: Tensor, text: Tensor, total: Tensor) -> Tensor:
        return super().with_branches(x, text + self.refined(text), total)


@dataclass
class ExactTruth(Truth):
    """A compiled model that holds values.

    Args:
        exact: it skips nothing else, so every call is the untouched model.
    """

    exact: bool = True

    @property
    def weights(self) -> Any:
        own = (self.model.time.weight, self.model.text.layer.weight, self.model.refined[2].weight)  # type: ignore[attr-defined]
        return super().weights, *(float(w.double().sum()) for w in own)


class ExactMachine(Machine):
    """A model under `exact` and under a cache that holds values too."""

    def __init__(self, seed: int, shared: list[ExactTruth] | None = None) -> None:
        super().__init__(seed, shared if shared is not None else exact_handles())  # type: ignore[arg-type]
        self.calls: Counter[str] = Counter()

    def call(
        self, truth: Truth, kind: str, step: int, lane: Any, x: Tensor, t: Tensor, words: Tensor, *, counts: bool = True
    ) -> None:
        assert isinstance(truth, ExactTruth)
        self.calls[kind] += 1
        if not truth.exact:
            super().call(truth, kind, step, lane, x, t, words, counts=False)
            return
        out, fresh = truth.compiled(x, t, words), truth.model(x, t, words)
        if not torch.equal(out, fresh):
            off = (out - fresh).abs().max()
            self.stale.append(f"{kind}: step {step}, lane {lane}: off by {off:.2g}; history: {' | '.join(self.log[-6:])}")
        out.fill_(7.0)  # what the caller does with a result reaches nothing that is held

    def held_weight(self, truth: Truth) -> nn.Parameter:
        """One that only held values are computed from."""
        model: Any = truth.model
        return self.random.choice([model.time.weight, model.time.bias, model.text.layer.weight, model.refined[2].weight])  # type: ignore[no-any-return]

    # ---- what may happen -------------------------------------------------------------------------------------------

    def move_held_weights_written(self, truth: Truth) -> None:
        at = self.random.randint(1, STEPS - 2)
        weight = self.held_weight(truth)

        def write(step: int) -> None:
            if step == at:
                weight.mul_(1.1 if self.random.random() < 0.5 else 0.9)

        self.run(truth, "held weights written", change=write)
        self.run(truth, "held weights written")

    def move_one_element_written_through_data(self, truth: Truth) -> None:
        """Between two requests, in one element: no sample shows it."""
        self.run(truth, "held weights through .data")
        flat = self.held_weight(truth).data.view(-1)
        flat[self.random.randrange(len(flat))] += 0.125
        self.run(truth, "held weights through .data")

    def move_weights_swapped_and_back(self, truth: Truth) -> None:
        """Averaged weights, for one request."""
        weight = self.held_weight(truth)
        before = weight.detach().clone()
        self.run(truth, "weights swapped and back")
        if self.random.random() < 0.5:
            weight.data.mul_(1.5)
            self.run(truth, "weights swapped and back")
            weight.data.copy_(before)
        else:
            weight.mul_(1.5)
            self.run(truth, "weights swapped and back")
            weight.copy_(before)
        self.run(truth, "weights swapped and back")

    def move_held_weight_replaced(self, truth: Truth) -> None:
        at = self.random.randint(0, STEPS - 2)
        model: Any = truth.model

        def replace(step: int) -> None:
            if step == at:
                model.time.weight = nn.Parameter(model.time.weight.detach() * 1.1, requires_grad=False)

        self.run(truth, "held weight replaced", change=replace)

    def move_prompt_comes_back(self, truth: Truth) -> None:
        """Requests of several users, each with the prompt of an earlier one as a new object."""
        for prompt in self.random.choices((1, 2, 3), k=3):
            self.run(truth, "prompt comes back", prompts=(prompt, 9), cast=True, steps=self.random.randint(2, STEPS))

    def move_prompt_rewritten_through_data(self, truth: Truth) -> None:
        """Between two requests, in the very object."""
        words = self.words(1).clone()
        for number in (1, 2, 1):
            words.data.copy_(self.words(number))
            truth.begin()
            noise = self.new_noise()
            for step in range(STEPS):
                self.call(truth, "prompt through .data", step, number, latent(noise + step), self.time(step), words)

    def move_negative_zero(self, truth: Truth) -> None:
        """A timestep of −0.0 is not one of 0.0."""
        for last in self.random.sample([0.0, -0.0], 2):
            truth.begin()
            noise, words = self.new_noise(), self.words(1)
            for step in range(STEPS):
                t = self.time(step) if step < STEPS - 1 else torch.tensor([last])
                self.call(truth, "negative zero", step, 1, latent(noise + step), t, words)

    def move_other_schedules(self, truth: Truth) -> None:
        for _ in range(2):
            truth.begin()
            noise, words, shift = self.new_noise(), self.words(1), self.random.choice((0.0, 0.5, 7.0))
            for step in range(STEPS):
                self.call(truth, "other schedule", step, 1, latent(noise + step), self.time(step) - shift, words)


def exact_handles() -> list[ExactTruth]:
    """One model that holds values, alone and with a cache."""
    torch._dynamo.reset()
    model = Conditioned()
    made = []
    for every, recipe, dynamic in ((1, "exact", True), (1, "exact", None), (2, "every-2", None)):
        compiled = vdcache.compile(model, recipe, num_steps=STEPS, inner="eager", dynamic=dynamic, hoist=True)
        made.append(ExactTruth(every, model, compiled, exact=recipe == "exact"))
    return made


def exact_histories(count: int, first_seed: int = 0, fresh_every: int = 40) -> Iterator[ExactMachine]:
    """So many histories, one after the other on the same compiled models, which are made anew now and then."""
    shared: list[ExactTruth] | None = None
    for number in range(count):
        if number % fresh_every == 0:
            shared = exact_handles()
        machine = ExactMachine(first_seed + number, shared)
        machine.random = random.Random(f"exact {first_seed + number}")
        machine.play()
        yield machine
