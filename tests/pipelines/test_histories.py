"""Random histories of one pipeline: whatever was before, a call gives what a pipeline that was just made and cached gives.

VDCACHE_HISTORIES=1000 runs as many.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

import vdcache
from tests.pipelines.modes import Stop, cached, computed, due
from tests.pipelines.tiny import generator, made, redrawn, text
from tests.support.thorough import examples
from vdcache.testing.architectures import _wan

pytest.importorskip("diffusers")


def denoiser(seed: int) -> nn.Module:
    return redrawn(_wan(num_layers=1), seed)


@functools.cache
def parts() -> dict[str, Any]:
    """The schedulers and weights that are exchanged, made once."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    return {
        "schedulers": [made("Wan").scheduler, FlowMatchHeunDiscreteScheduler()],
        "weights": [{k: v.clone() for k, v in denoiser(s).state_dict().items()} for s in (0, 9)],
    }


def pipeline(model: int = 0, scheduler: int = 0, weights: int = 0) -> Any:
    """A pipeline that shares nothing that has a state with any other."""
    pipe = made("Wan")
    pipe.transformer = denoiser(4 if model else 0)
    if weights:
        pipe.transformer.load_state_dict(parts()["weights"][1])
    pipe.scheduler = copy.deepcopy(parts()["schedulers"][scheduler])
    return pipe


@functools.cache
def anchor() -> Any:
    """Keeps what is compiled alive."""
    return cached(pipeline())


def arguments(call: tuple) -> dict[str, Any]:
    width, frames, steps, guided, prompts, seed = call
    return {
        "prompt_embeds": text(prompts, 6, 16, seed=seed),
        "negative_prompt_embeds": text(prompts, 4, 16, seed=20) if guided else None,
        "guidance_scale": 5.0 if guided else 1.0,
        "height": 32,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "generator": generator(seed),
        "output_type": "latent",
        "return_dict": False,
    }


@functools.cache
def fresh(call: tuple, toggled: int, model: int, scheduler: int, weights: int) -> Tensor:
    """What a new pipeline gives in its first call."""
    anchor()
    pipe = cached(pipeline(model, scheduler, weights))
    return pipe(**arguments(call), **_toggle(toggled))[0]


def _toggle(at: int) -> dict[str, Any]:
    """Guidance is switched off after a step, and on again two steps later."""
    if at < 0:
        return {}

    def off(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        pipe._guidance_scale = 1.0 if at <= i < at + 2 else 5.0
        return {}

    return {"callback_on_step_end": off}


CALLS = st.tuples(
    st.sampled_from([32, 48]),
    st.sampled_from([5, 9]),
    st.sampled_from([1, 3, 6]),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.integers(0, 1),
)


class Histories(RuleBasedStateMachine):
    """One pipeline, cached, and everything that a caller may do with it."""

    made = 0

    @initialize()
    def make(self) -> None:
        Histories.made += 1
        if Histories.made % 40 == 0:  # Dynamo gives up on a frame after 256 attempts, and a call that fails is one
            torch._dynamo.reset()
            anchor.cache_clear()
        anchor()
        self.state = [0, 0, 0]  # model, scheduler, weights
        self.pipe = cached(pipeline())

    @rule(call=CALLS, toggled=st.sampled_from([-1, -1, 0, 1]))
    def call(self, call: tuple, toggled: int) -> None:
        toggled = toggled if call[3] else -1
        got = self.pipe(**arguments(call), **_toggle(toggled))[0]
        assert torch.equal(got, fresh(call, toggled, *self.state))
        evaluations = 2 * call[2] - 1 if self.state[1] else call[2]
        if toggled < 0:
            assert computed(self.pipe) == [due(evaluations)]

    @rule(call=CALLS, at=st.integers(0, 3), how=st.sampled_from(["error", "interrupt", "model"]))
    def cut_short(self, call: tuple, at: int, how: str) -> None:
        def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
            if i >= at and how == "error":
                raise Stop
            pipe._interrupt = i >= at
            return {}

        given = arguments(call)
        if how == "model":  # the denoiser itself fails
            given["prompt_embeds"] = given["prompt_embeds"][..., :-1]
        try:
            self.pipe(**given, callback_on_step_end=stop)
        except Stop:
            assert how == "error"
        except RuntimeError:
            assert how == "model"

    @rule()
    def other_model(self) -> None:
        self.state[0] = 1 - self.state[0]
        self.state[2] = 0
        self.pipe.transformer = denoiser(4 if self.state[0] else 0)

    @rule()
    def other_weights(self) -> None:
        """In place, as a fused or unfused adapter does."""
        if not self.state[0]:
            self.state[2] = 1 - self.state[2]
            self.pipe.transformer.load_state_dict(parts()["weights"][self.state[2]])

    @rule()
    def other_scheduler(self) -> None:
        self.state[1] = 1 - self.state[1]
        self.pipe.scheduler = copy.deepcopy(parts()["schedulers"][self.state[1]])

    @rule(steps=st.integers(1, 3))
    def model_alone(self, steps: int) -> None:
        """The denoiser is called outside the pipeline."""
        with torch.no_grad():
            for s in range(steps):
                self.pipe.transformer(text(1, 4, 2, 4, 4), torch.tensor([900 - s]), text(1, 6, 16))

    @rule()
    def again(self) -> None:
        vdcache.remove(self.pipe)
        cached(self.pipe)

    @rule()
    def copied(self) -> None:
        self.pipe = copy.deepcopy(self.pipe)


Histories.TestCase.settings = settings(
    max_examples=int(os.environ.get("VDCACHE_HISTORIES", examples(12, 4))),
    stateful_step_count=8,
    deadline=None,
    derandomize="VDCACHE_HISTORIES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
TestHistories = pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")(Histories.TestCase)
