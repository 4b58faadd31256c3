"""The parts of recipes are listed with what they do, and what is none is refused where a recipe is made."""

import json

import pytest

import vdcache
from vdcache.methods.parts import parts
from vdcache.methods.registry import recipe
from vdcache.passes import MarkBranches, MergeSlots


def test_every_part_has_a_name_and_a_sentence():
    found = parts()
    names = {(p.group, p.name) for p in found}
    assert {
        ("policy", "AdaCache"),
        ("policy", "Threshold"),
        ("predictor", "taylor"),
        ("predictor", "last"),
        ("mask", "window"),
    } <= names
    assert len(names) == len(found)
    assert all(p.sentence and not p.sentence.startswith(p.name + "(") for p in found), [p for p in found if not p.sentence]


class Forgotten:
    """A pass that forgets (Pass)."""

    name = "forgotten"

    def run(self, graph):
        return graph


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((vdcache.policies.Always, (MarkBranches(),)), "for a policy, a class; give a value"),
        ((3, (MarkBranches(),)), "has 3 for a policy"),
        ((vdcache.policies.Always(), (MarkBranches(), MergeSlots)), "MergeSlots is a class: give a value of it"),
        (
            (vdcache.policies.Always(), (Forgotten(),)),
            r"Forgotten does not subclass vdcache\.Pass: write class Forgotten\(vdcache\.Pass\)",
        ),
        ((vdcache.policies.Always(), Forgotten), r"Forgotten does not subclass vdcache\.Pass"),
        ((Forgotten(), (MarkBranches(),)), "which has no plans, start, plan, observe; give a value"),
    ],
)
def test_what_is_no_part_is_refused(given, message):
    with pytest.raises(vdcache.errors.ConfigError, match=message):
        vdcache.Recipe("x", *given)
    assert vdcache.Recipe("x", vdcache.policies.Always(), MarkBranches()).passes == (MarkBranches(),)


def test_a_misspelt_option_in_a_file_is_named():
    data = json.loads(vdcache.Recipe("x", vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 1)))).to_json())
    data["policy"]["nope"] = 3
    with pytest.raises(vdcache.errors.ConfigError, match=r"SchedulePolicy cannot be made of .*nope"):
        vdcache.Recipe.from_json(json.dumps(data))


def package(monkeypatch, *points):
    from vdcache.util import plugins

    monkeypatch.setattr(plugins, "_loaded", lambda group, path: points if group == "vdcache.recipes" else ())
    monkeypatch.setattr(plugins, "_said", set())


def test_two_packages_with_one_name(monkeypatch):
    from vdcache.util.plugins import Plugin

    first, second = (
        Plugin("calm-D", f"{p} 1.0", lambda d: vdcache.Recipe("calm", vdcache.policies.Always())) for p in ("one", "two")
    )
    package(monkeypatch, first, second)
    with pytest.warns(
        vdcache.VdcacheWarning, match=r"passes over 'calm-D' of two 1.0 .*: that of one 1.0 has the same name and is taken"
    ):
        assert recipe("calm-0.5").name == "calm"


def test_a_recipe_that_cannot_be_made_names_its_package(monkeypatch):
    from vdcache.util.plugins import Plugin

    package(monkeypatch, Plugin("calm-D", "one 1.0", lambda: vdcache.Recipe("calm", vdcache.policies.Always())))
    with pytest.raises(vdcache.errors.ConfigError, match=r"'calm-D' of one 1.0 could not be made of \[0.5\]: TypeError"):
        recipe("calm-0.5")
