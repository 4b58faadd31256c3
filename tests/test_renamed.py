"""Names of the release before are still read, with a warning that says the new one."""

import importlib
import json
import sys

import pytest

import vdcache
from tests.support.words import findings
from vdcache.passes import Pipeline
from vdcache.renamed import CLASSES, FIELDS, OPTIONS, PUBLIC


def test_no_word_of_the_table_is_left():
    assert not findings()


@pytest.mark.parametrize("old", PUBLIC)
def test_old_names_import(old):
    with pytest.warns(DeprecationWarning, match=f"{old!r} is called {PUBLIC[old]!r}"):
        assert getattr(vdcache, old) is getattr(vdcache, PUBLIC[old])


@pytest.mark.parametrize(
    "recipe",
    [vdcache.dbcache(1, 1, 0.1, max_consecutive=3, max_total=5), vdcache.tgate(4), vdcache.pab(2, 4, 6), vdcache.fora(3)],
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
    with pytest.raises(vdcache.ConfigError, match="unknown policy 'Never'"):
        vdcache.Recipe.from_json(json.dumps(json.loads(vdcache.fora(3).to_json()) | {"policy": {"kind": "Never"}}))


def test_the_old_module_of_pipelines():
    pytest.importorskip("diffusers")
    sys.modules.pop("vdcache.pipelines.applied", None)
    with pytest.warns(DeprecationWarning, match=r"vdcache\.pipelines\.applied is vdcache\.pipelines\.pipeline_cache"):
        old = importlib.import_module("vdcache.pipelines.applied")
    assert old.applied_to is importlib.import_module("vdcache.pipelines.pipeline_cache").applied_to
