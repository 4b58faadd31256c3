"""A recipe on many models: what the table says is what happened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import vdcache
from vdcache.cli.main import app
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.testing import Case, TinyDiT, small_models, try_recipe


def test_every_second_step_of_two_models():
    first, second = try_recipe("every-2", ["tiny", "demo"], steps=6)
    assert (first.model, second.model) == ("tiny", "demo")
    for trial in (first, second):
        assert trial.computed == (0, 2, 4, 5) and trial.identical and not trial.said
        assert 4 / 6 < trial.flops < 0.72 and 0 < trial.error < 0.5


def test_what_is_computed_in_full_has_no_error():
    (trial,) = try_recipe("always", ["tiny"], steps=3)
    assert trial.computed == (0, 1, 2) and trial.identical and trial.flops == 1 and math.isnan(trial.error)


@dataclass(frozen=True)
class Halve(vdcache.Rewrite):
    """halve: a pass that changes what a model computes."""

    name: ClassVar[str] = "halve"
    before = "%1 = gelu(%x)"
    after = "%1 = gelu(%x)\n%2 = mul(%1, 0.5)"


def test_a_pass_that_changes_computed_steps_is_seen():
    scope = (Halve(), MarkBranches(), MergeSlots())
    recipe = vdcache.Recipe("halved", vdcache.policies.Always(), scope)
    (trial,) = try_recipe(recipe, ["tiny"], steps=3)
    assert not trial.identical and "NO" in str(try_recipe(recipe, ["tiny"], steps=2))


class Fails(TinyDiT):
    def forward(self, x, timestep, text):
        raise ValueError("not today")


def test_a_model_that_fails_is_a_row():
    tiny = small_models()["tiny"]
    cases = {"fails": Case("fails", lambda: Fails(), tiny.call, {}), "tiny": tiny}
    fails, works = try_recipe("every-2", cases, steps=4)
    assert "not today" in fails.said and not fails.identical and works.identical


def test_a_method_that_is_none_is_a_row_that_says_why():
    scope = (MarkBranches(group="a"),)
    policy = vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 2)), ("b",))
    (trial,) = try_recipe(vdcache.Recipe("wrong", policy, scope), ["tiny"], steps=4)
    assert "never reuses what it guards" in trial.said and not trial.identical


def test_names_that_are_none():
    with pytest.raises(vdcache.errors.ConfigError, match="there is no small model 'tini'; there are tiny, demo"):
        try_recipe("every-2", ["tini"])


def test_the_command():
    done = CliRunner().invoke(app, ["try", "every-3", "--model", "tiny", "--steps", "5"])
    assert done.exit_code == 0 and "tiny   3 of 5" in done.output, done.output
    assert CliRunner().invoke(app, ["try", "nope"]).exit_code == 2
    assert torch.is_grad_enabled()
