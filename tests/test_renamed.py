"""Names of the release before are still read, with a warning that says the new one."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys

import pytest

import vdcache
from tests.support.words import findings
from vdcache.passes import Pipeline
from vdcache.util.renamed import CLASSES, FIELDS, MODULES, OPTIONS, POLICIES, PUBLIC


def test_no_word_of_the_table_is_left():
    assert not findings()


@pytest.mark.parametrize("old", PUBLIC)
def test_old_names_import(old):
    home, _, name = PUBLIC[old].rpartition(".")
    vars(vdcache).pop(old, None)  # who asked for it once is not told again
    with pytest.warns(DeprecationWarning, match=re.escape(f"vdcache.{old} is {PUBLIC[old]} now")):
        assert getattr(vdcache, old) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("old", POLICIES)
def test_old_names_of_the_runtime_import(old):
    with pytest.warns(DeprecationWarning, match=re.escape(f"vdcache.runtime.{old} is {POLICIES[old]} now")):
        assert getattr(vdcache.runtime, old) is getattr(vdcache.policies, old)


OPTIONAL = {"vdcache.attention.block_sparse": "triton", "vdcache.pipelines.pipeline_cache": "diffusers"}


def test_old_modules_import_as_what_they_are_now():
    """In a fresh process, in any order: the same module, no second copy of its classes."""
    wanted = {o: n for o, n in MODULES.items() if n not in OPTIONAL or importlib.util.find_spec(OPTIONAL[n])}
    program = """
import importlib, sys, warnings
for old, new in WANTED.items():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", DeprecationWarning)
        found = importlib.import_module(old)
    assert [w for w in said if str(w.message).startswith(f"{old} is {new} now")], (old, [str(w.message) for w in said])
    assert found is importlib.import_module(new) and found.__spec__.name == new == found.__name__, (old, found)
from vdcache.profiling.result import Profile
from vdcache.recipe import Recipe
import vdcache
assert Profile is vdcache.calibration.Profile and Recipe is vdcache.Recipe
"""
    done = subprocess.run([sys.executable, "-c", program.replace("WANTED", repr(wanted))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "recipe",
    [
        vdcache.methods.dbcache(1, 1, 0.1, max_consecutive=3, max_total=5),
        vdcache.methods.tgate(4),
        vdcache.methods.pab(2, 4, 6),
        vdcache.methods.fora(3),
    ],
    ids=lambda r: r.name,
)
def test_recipes_that_were_saved_under_old_names(recipe):
    text = recipe.to_json()
    for names in (
        CLASSES,
        *FIELDS.values(),
        *({o.replace("_", "-"): n.replace("_", "-") for o, n in t.items()} for t in OPTIONS.values()),
    ):
        for old, new in names.items():
            text = text.replace(f'"{new}"', f'"{old}"').replace(f"{{{new}=", f"{{{old}=").replace(f",{new}=", f",{old}=")
    if text == recipe.to_json():
        assert vdcache.Recipe.from_json(text) == recipe
        return
    with pytest.warns(DeprecationWarning, match="is called"):
        assert vdcache.Recipe.from_json(text) == recipe


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mark-branches{of=single,out-of=4,apart=true}", "mark-branches{block-kind=single,expected-blocks=4,per-block=true}"),
        ("observe{within=[0.2,0.5]}", "observe{block-range=[0.2,0.5]}"),
        ("probe{at=input,since=step}", "probe{location=input,reference-step=step}"),
        ("emit{at=residual}", "emit{location=residual}"),
    ],
)
def test_options_of_passes(old, new):
    with pytest.warns(DeprecationWarning, match="the option of pass"):
        found = Pipeline.parse(f"canonicalise,{old}")
    assert str(found) == str(Pipeline.parse(f"canonicalise,{new}"))


def test_the_text_of_a_graph():
    text = "%0 = input() : f32[3]\n%1 = sin(%0)\n%2 = {}(%1, 'all/x')\nreturn (%2)"
    with pytest.warns(DeprecationWarning, match="'guard' is called 'cache_guard'"):
        old = vdcache.parse(text.format("guard"))
    assert vdcache.dump(old) == vdcache.dump(vdcache.parse(text.format("cache_guard")))


def test_a_name_that_never_was():
    with pytest.raises(AttributeError, match="has no attribute 'Clock'"):
        vdcache.Clock  # noqa: B018
    with pytest.raises(vdcache.errors.ConfigError, match="unknown policy 'Never'"):
        vdcache.Recipe.from_json(json.dumps(json.loads(vdcache.methods.fora(3).to_json()) | {"policy": {"kind": "Never"}}))


def test_the_default_recipe_of_the_release_before():
    """Its goal was a policy."""
    made = vdcache.methods.auto(speedup=3.0)
    data = json.loads(made.to_json())
    old = {"kind": "Auto", "speedup": 3.0, "quality_db": None, "floor_db": 0.0, "group": "all"}
    text = json.dumps({k: v for k, v in data.items() if k != "goal"} | {"policy": old})
    with pytest.warns(DeprecationWarning, match="'Auto' is called 'Goal'"):
        assert vdcache.Recipe.from_json(text) == made
