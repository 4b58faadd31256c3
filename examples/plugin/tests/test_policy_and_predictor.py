"""The policy, the predictor and the recipes, and all of it on small models."""

import pytest
import torch
from vdcache_window import Damped, Doubling
from vdcache_window.recipes import window_residual

import vdcache
from vdcache.testing import assert_policy, assert_predictor
from vdcache.testing.models import value


@pytest.mark.parametrize(
    ("longest", "steps", "computed"),
    [(4, 12, [0, 1, 3, 7, 8, 10, 11]), (1, 4, [0, 1, 2, 3]), (8, 3, [0, 1, 2]), (4, 1, [0])],
)
def test_pauses_double(longest, steps, computed):
    plans = assert_policy(Doubling(longest), steps)
    assert [i for i, plan in enumerate(plans) if not plan] == computed


def test_a_damped_line():
    one, four, nine, sixteen = assert_predictor(Damped(0.5))
    assert one[0, 0] == 1.0  # nothing to draw a line from
    assert [float(x[0, 0]) for x in (four, nine, sixteen)] == [4 + 1.5, 9 + 2.5, 16 + 3.5]
    assert float(assert_predictor(Damped(0.0))[3][0, 0]) == 16.0


def test_options_are_checked():
    with pytest.raises(vdcache.errors.ConfigError, match="at least 1 step"):
        Doubling(0)
    with pytest.raises(vdcache.errors.ConfigError, match="between 0 and 1"):
        Damped(2.0)


def test_files():
    recipe = window_residual(2)
    assert vdcache.Recipe.from_json(recipe.to_json()) == recipe
    assert '"kind": "vdcache_window.doubling:Doubling"' in recipe.to_json()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_on_small_models(small_model, vdcache_clean):
    """Computed steps are the model's own, bit for bit. A model whose attentions all have masks is left alone."""
    model = small_model.build()
    compiled = vdcache.compile(model, window_residual(1), num_steps=6, inner="eager")
    reused = False
    for step in range(6):
        out, want = value(compiled(**small_model.call(step, 6))), value(model(**small_model.call(step, 6)))
        reused = any(g.slots for g in compiled.vdcache.graphs) and step in (2, 4)
        assert torch.equal(out, want) != reused
        assert out.isfinite().all()
    assert reused or small_model.name == "hunyuan_video" or compiled.vdcache.history.computed_steps() == [0, 1, 3, 5]
