"""Names of recipes and the functions behind them: they read back, describe themselves, and refuse what cannot be with a message that helps."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import vdcache
from vdcache import Recipe, methods
from vdcache.cli.main import app
from vdcache.errors import ConfigError
from vdcache.methods import MAGCACHE_RATIOS, PAB, PROFILINGDIT_LISTS, TEACACHE_COEFFICIENTS, describe, recipe, recipes
from vdcache.methods.attention import FASTERCACHE
from vdcache.methods.registry import NAMES
from vdcache.passes import Pipeline
from vdcache.policies import Codebook, EveryN, Policy, StepList
from vdcache.predictors import Taylor
from vdcache.testing import TinyDiT

OF_MODELS = {"teacache": TEACACHE_COEFFICIENTS, "magcache": MAGCACHE_RATIOS, "pab": PAB, "fastercache": FASTERCACHE}


def example(named):
    """A name of the family, with its example in the place of the letters."""
    text = named.name
    for value in named.example:
        text = re.sub(r"(?<=-)(MODEL|N|D)(?=-|$)", value, text, count=1)
    return text


EXAMPLES = [example(n) for n in NAMES]
ALL = [
    *EXAMPLES,
    *(f"teacache-{m}-0.2" for m in TEACACHE_COEFFICIENTS),
    *(f"magcache-{m}" for m in MAGCACHE_RATIOS),
    *(f"pab-{m}" for m in PAB),
    *(f"fastercache-{m}" for m in FASTERCACHE),
    *("every-1", "fbcache-1e-2", "fbcache-.5", "dbcache-1-2-0.3", "taylorseer-6-0", "t-gate-1", "seacache-1"),
]


def test_every_family_has_an_example_that_is_a_name():
    assert len(set(EXAMPLES)) == len(NAMES) and not [e for e in EXAMPLES if re.search(r"-(N|D|MODEL)\b", e)]
    assert list(recipes()) == [n.name for n in NAMES]
    for named in NAMES:
        assert named.match(example(named)) == named.make(*named.example)
        assert len([n for n in NAMES if n.match(example(named)) is not None]) == 1, "a name belongs to one family"
        assert named.summary and not named.summary.endswith(".")


@pytest.mark.parametrize("name", dict.fromkeys(ALL))
def test_names_round_trip(name, tmp_path):
    made = recipe(name)
    assert Recipe.from_json(made.to_json()) == made
    made.to_json(tmp_path / "recipe.json")
    assert Recipe.from_json(tmp_path / "recipe.json") == made
    assert recipe(made) is made and isinstance(made.policy, Policy)
    assert Pipeline.parse(str(made.pipeline)) == made.pipeline
    assert len(set(made.plans())) == len(made.plans()) >= 1
    for steps in (10, 25, 30, 50):
        made.for_steps(steps).policy.start(steps)


@pytest.mark.parametrize("name", [n for n in dict.fromkeys(ALL) if n not in ("fbcache-1e-2", "fbcache-.5")])
def test_a_recipe_is_called_what_it_was_asked_for_by(name):
    made = recipe(name)
    assert made.name == name and recipe(made.name) == made
    assert made.source or name.startswith(("always", "every"))


@pytest.mark.parametrize("name", [*dict.fromkeys(ALL), *(n.name for n in NAMES)])
def test_every_name_and_family_is_described(name):
    found = describe(name)
    named = next(n for n in NAMES if n.name == name or n.match(name) is not None)
    assert (found.summary, found.models, found.constants) == (named.summary, named.models, named.constants)
    made = named.make(*named.example) if name == named.name else recipe(name)
    assert found.name == made.name and found.source == made.source
    assert len(found.scope) == max(1, len(made.passes)) and all(": " in s or not made.passes for s in found.scope)
    assert found.policy == str(made.goal or made.policy) and found.predictor == str(made.predictor)
    assert found.plans == tuple(map(str, made.plans()))
    assert found.probes == any(p.name == "probe" for p in made.passes)


@pytest.mark.parametrize("name", [*EXAMPLES, *(n.name for n in NAMES)])
def test_the_command_line_explains_it(name):
    result = CliRunner().invoke(app, ["recipes", name], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    found = describe(name)
    text = " ".join(result.output.split())
    for part in ("scope", "policy", "predictor", "plans", "constants", "source", found.name, found.source or "–"):
        assert part in text
    assert ("and the head, which runs first" in text) == found.probes


def test_the_command_line_lists_them():
    result = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0 and all(n.name in result.output for n in NAMES)
    assert "vdcache recipes NAME explains one" in result.output


def test_the_command_line_says_what_is_wrong():
    result = CliRunner().invoke(app, ["recipes", "fbcache"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2 and "no recipe is called 'fbcache'; did you mean fbcache-D" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["recipes", "pab-sora"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2 and "there are no constants for that model" in " ".join(result.output.split())


# ---- names that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fbcach-0.1", "no recipe is called 'fbcach-0.1'; did you mean fbcache-D"),
        ("fbcache", "did you mean fbcache-D"),
        ("", "no recipe is called ''"),
        ("fbcache-x", "did you mean fbcache-D"),
        ("fbcache--0.1", "threshold is a number of at least 0; got -0.1"),
        ("fbcache-nan", "no recipe is called"),
        ("fora-2.5", "no recipe is called 'fora-2.5'; did you mean fora-N"),
        ("fora-0", "n is a whole number of at least 1; got 0"),
        ("fora--1", "at least 1; got -1"),
        ("every-0", "n is a whole number of at least 1; got 0"),
        ("delta-dit-0", "at least 1; got 0"),
        ("t-gate-0", "gate, the number of steps before cross-attention is frozen, is a whole number of at least 1; got 0"),
        ("taylorseer-0-1", "at least 1; got 0"),
        ("taylorseer-4-5", "order is a whole number between 0 and 4; got 5"),
        ("taylorseer-4", "did you mean taylorseer-N-N"),
        ("dbcache-0-0-0.1", "whole number of at least 1; got 0"),
        ("dbcache-1--1-0.1", "at least 0; got -1"),
        ("dbcache-8-0", "did you mean dbcache-N-N-D"),
        ("easycache--1", "got -1"),
        ("seacache--1", "got -1"),
        ("teacache--1", "got -1"),
        ("teacache-wan-0.1", "'teacache-wan-0.1': there are no constants for that model; teacache-MODEL-D is for flux, "),
        ("teacache-flux", "did you mean teacache-MODEL-D"),
        ("magcache-sora", "there are no constants for that model; magcache-MODEL is for wan2.1-t2v-14b, "),
        ("pab-sora", "there are no constants for that model; pab-MODEL is for open-sora, latte"),
        ("fastercache-flux", "there are no constants for that model; fastercache-MODEL is for open-sora, latte, cogvideox"),
        ("magcache", "'magcache' needs the magnitudes of one model"),
        ("smoothcache", "'smoothcache' needs a schedule from a calibration"),
        ("l2c", "'l2c' needs a trained table of layers"),
        ("profilingdit", "Published ones go by profilingdit-hunyuanvideo and profilingdit-wan2.1"),
    ],
)
def test_names_that_are_none(name, message):
    for ask in (recipe, describe):
        if not (ask is describe and message.startswith("no recipe is called ''")):
            with pytest.raises(ConfigError, match=message):
                ask(name)


@pytest.mark.parametrize("name", [3, 1.5, ["fora-3"], b"fora-3", True])
def test_what_is_no_name(name):
    with pytest.raises(ConfigError, match=r"recipe is a name or a vdcache\.Recipe, got"):
        recipe(name)


@pytest.mark.parametrize("hint", methods.registry._NEEDS.values())
def test_what_a_message_tells_one_to_call_is_there(hint):
    names = re.findall(r"vdcache\.(\w+)", hint)
    assert names
    for name in names:
        assert hasattr(vdcache, name), f"vdcache.{name}"


@given(st.text("abcdeghilmnoprstuvxyz-.0123456789ND", max_size=20))
def test_any_text_is_a_recipe_or_a_helpful_error(name):
    found = None
    try:
        found = recipe(name)
    except ConfigError as error:
        said = str(error)
    assert isinstance(found, Recipe) or len(said) > 20


# ---- every parameter of every function -------------------------------------------------------------------------------

RATIOS = (1.0, 1.1, 0.9, 0.9)
SCORES = [[0.5, 0.2], [0.1, 0.9]]
LIST = {"attn": [1, 0, 1]}
NO_NUMBER = ("1", None, math.nan, [1], True)
NO_COUNT = ("1", None, math.nan, 1.5, True, -1)
NO_SHARE = ("1", None, math.nan, -0.1, 1.1, True)

BAD = [
    *(
        ("adacache", {"codebook": v})
        for v in ("medium", None, 3, [], [(0.2, 1), (0.1, 2)], {0.1: 0}, {math.nan: 1, 0.2: 2}, {0.1: 1.5}, {"a": 2})
    ),
    *(("adacache", {"moreg": v}) for v in ("yes", 3)),
    *(("adacache", {"rule": v}) for v in ("papers", None, 1)),
    *(("adacache", {"distance": v}) for v in ("l3", None)),
    *(("adacache", {"observe": v}) for v in ("ears", 3)),
    *(("adacache", {"blocks": v}) for v in ("01", 3, (1.5,))),
    *(("adacache", {"first": v}) for v in (0, *NO_COUNT)),
    *(("adacache", {"last": v}) for v in NO_COUNT),
    *(("adacache", {"frames": v}) for v in NO_COUNT),
    *(("adacache", {"layers": v}) for v in (0, 5, *NO_COUNT)),
    *(
        (f, {"threshold": v})
        for f in ("fbcache", "dbcache", "teacache", "seacache", "easycache")
        for v in (*NO_NUMBER, -0.1, math.inf)
    ),
    *(("dbcache", {"front": v}) for v in (0, *NO_COUNT)),
    *(("dbcache", {"back": v}) for v in NO_COUNT),
    *(("dbcache", {"warm_up": v}) for v in NO_COUNT),
    *(("dbcache", {"max_consecutive": v}) for v in NO_COUNT),
    *(("dbcache", {"max_total": v}) for v in NO_COUNT),
    *(("dbcache", {"limit": v}) for v in (*NO_NUMBER, -1.0, math.inf)),
    *(("dbcache", {"mask": v}) for v in ((2,), (-1,), ("1",), (0.5,), (math.nan,), 3, "101")),
    *(("dbcache", {"predictor": v}) for v in ("taylor", 1, None)),
    *(("teacache", {"coefficients": v}) for v in ("flus", 3, None, ("1",), (None,), (math.nan,), (math.inf,), (True,))),
    *((f, {"location": v}) for f in ("teacache", "seacache") for v in ("outputs", 3)),
    *((f, {"first": v}) for f in ("teacache", "seacache", "easycache") for v in (0, *NO_COUNT)),
    *((f, {"last": v}) for f in ("teacache", "seacache", "easycache") for v in NO_COUNT),
    *(("fora", {"n": v}) for v in (0, *NO_COUNT)),
    *(("taylorseer", {"n": v, "order": 1}) for v in (0, *NO_COUNT)),
    *(("taylorseer", {"n": 3, "order": v}) for v in (5, *NO_COUNT)),
    *(("taylorseer", {"n": 3, "order": 1, "first": v}) for v in (0, *NO_COUNT)),
    *(("delta_dit", {"n": v}) for v in (0, *NO_COUNT)),
    *(("delta_dit", {"n": 3, "blocks": v}) for v in (0, 0.0, 1.5, -1, "half", None, math.nan, True)),
    *(("delta_dit", {"n": 3, "switch": v}) for v in NO_SHARE),
    *(
        ("smoothcache", {"schedule": v})
        for v in ({}, None, 3, {"attn": []}, {"attn": [0, 1]}, {"attn": [1, 2]}, {"attn": "10"}, {"attn": 3})
    ),
    *(
        ("smoothcache", {"schedule": v})
        for v in ({"ears": [1]}, {"attn": [1], "mlp": [1, 0]}, {"attn": [1, 0], "attn1": [1, 1]}, {"attn": [1, None]})
    ),
    *(
        ("l2c", {"scores": v})
        for v in ([], None, 3, [[1.0]], [[0.5, 0.2]], [[0.5, 0.2], [0.1]], [["a", "b"], ["c", "d"]], [[], []])
    ),
    ("l2c", {"scores": [[math.nan, 0.5], [0.5, 0.5]]}),
    *(("l2c", {"scores": SCORES, "threshold": v}) for v in NO_NUMBER),
    *(("magcache", {"ratios": v}) for v in ((), None, 3, "1.0", ("1",), (0.0,), (-1.0,), (math.nan,), (math.inf,), (True,))),
    *(("magcache", {"ratios": RATIOS, "threshold": v}) for v in (*NO_NUMBER, -0.1)),
    *(("magcache", {"ratios": RATIOS, "max_consecutive": v}) for v in (0, *NO_COUNT)),
    *(("magcache", {"ratios": RATIOS, "retention": v}) for v in NO_SHARE),
    *(("pab", {p: v}) for p in ("spatial", "temporal", "cross") for v in ("3", math.nan, 1.5, -1)),
    ("pab", {"spatial": 1}),
    *(("pab", {"window": v}) for v in (None, 3, (1,), (1, 2, 3), (2, 1), (1, 1), ("a", "b"), (math.nan, 3), [100, 800, 900])),
    *(
        ("pab", {"mlp": v})
        for v in (3, "abc", (), ((), 1, 2), ((2000,), 1, 2), (("a",), 1, 2), ((100,), 1, 0), ((100,), "x", 2), ((100,), 0, 2))
    ),
    *(("tgate", {p: v}) for p in ("gate", "interval", "after") for v in (0, *NO_COUNT)),
    *(("tgate", {"warm_up": v}) for v in NO_COUNT),
    *(("tgate", {"of_steps": v}) for v in NO_COUNT),
    *(("fastercache", {"model": v}) for v in ("flux", None, 3, "")),
    *(("profilingdit", {"background": v}) for v in ((), None, 3, "012", (1.5,), (True,), (1, 1))),
    *(("profilingdit", {"background": (0,), "foreground": v}) for v in (3, None, "1", (0,), (1.5,))),
    *(("profilingdit", {"background": (0,), "when": v}) for v in ("often", 3, (), (3, 2), (-1, 2))),
    *(("profilingdit", {"background": (0,), p: v}) for p in ("reuse", "span", "block_kind") for v in ("all of it", None, 3)),
]


@pytest.mark.parametrize(("function", "options"), BAD, ids=lambda v: v if isinstance(v, str) else repr(v))
def test_bad_numbers(function, options):
    """Refused at once, naming what was got; never by another error, never later."""
    with pytest.raises(ConfigError) as caught:
        getattr(methods, function)(**options)
    assert len(str(caught.value)) > 20


def test_good_numbers():
    """The edges of what is allowed, so that the refusals above are not those of everything."""
    for made in (
        methods.fbcache(0),
        methods.fbcache(5),
        methods.dbcache(1, 0, 0.1, warm_up=0, mask=[1, 0, 1], predictor=Taylor(1)),
        methods.dbcache(1, 0, 0.1, mask=(True, False)),
        methods.teacache(0.1, [1, 0]),
        methods.seacache(location="input"),
        methods.magcache(RATIOS, threshold=0, max_consecutive=1, retention=1),
        methods.l2c(SCORES, 0),
        methods.l2c(torch.tensor(SCORES)),
        methods.smoothcache(LIST),
        methods.delta_dit(1, blocks=1),
        methods.delta_dit(3, blocks=1.0, switch=1.0),
        methods.pab(2, window=(0, 1000)),
        methods.pab(0, 3),
        methods.tgate(1, warm_up=0),
        methods.adacache(Codebook(((0.1, 2), (0.2, 1)))),
        methods.profilingdit(range(3), when=StepList((2, 5))),
    ):
        assert Recipe.from_json(made.to_json()) == made and made.plans()


@pytest.mark.parametrize(("blocks", "covered"), [(2, 2), (0.3, 2), (5, 5), (0.7, 5), (7, 7), (9, 7), (1.0, 7)])
def test_delta_dit_leaves_out_as_many_blocks_as_asked_for(blocks, covered):
    args = torch.randn(1, 5, 4), torch.tensor([900.0]), torch.randn(1, 3, 4)
    report = vdcache.explain(TinyDiT(7), *args, recipe=methods.delta_dit(3, blocks=blocks))
    block_of = {b.name: b.block for b in report.branches}
    plans = [v.reuse for v in report.variants if v.reuse]
    assert len(plans) == (1 if covered == 7 else 2)
    for reuse in plans:
        kept = {block_of[b] for s in report.slots if s.name.partition("/")[0] in reuse for b in s.branches}
        front, rear = set(range(covered)), set(range(7 - covered, 7))
        assert kept == (front if "front" in reuse else rear)


def test_names_of_ones_own():
    assert methods.fora(3, name="mine").name == "mine" and methods.fbcache(0.25).name == "fbcache-0.25"
    assert methods.teacache(0.1, "flux").name == "teacache-flux-0.1" == recipe("teacache-flux-0.1").name


def test_the_codebooks_and_lists_are_data():
    assert set(methods.ADACACHE_CODEBOOKS) == {"slow", "fast"} and "wan2.1" in PROFILINGDIT_LISTS


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_schedule_from_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"attn1": [1, 0, 0, 1], "ff": [1, 1, 0, 1]}')
    made = methods.smoothcache(path)
    assert made == methods.smoothcache(str(path)) == methods.smoothcache({"attn": [1, 0, 0, 1], "mlp": [1, 1, 0, 1]})
    for text in ("[1, 0]", "not json", '{"attn": 3}', '{"attn": ["a"]}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            methods.smoothcache(path)
    with pytest.raises(ConfigError, match="no JSON of a schedule"):
        methods.smoothcache(tmp_path / "none.json")


def test_a_released_router(tmp_path):
    """Parameters before the sigmoid, by the name of their step; nothing but tensors is loaded."""
    torch.manual_seed(0)
    state = {f"{j}.prob": torch.randn(4) for j in range(12)}
    want = methods.l2c([torch.sigmoid(state[f"{j}.prob"]).tolist() for j in range(12)], 0.4)
    for kind, value in (("whole", {"routers": state}), ("bare", state)):
        torch.save(value, tmp_path / f"{kind}.pt")
        assert methods.l2c(tmp_path / f"{kind}.pt", 0.4) == want
    for kind, value in (
        ("list", [1, 2]),
        ("other", {"weight": torch.ones(2)}),
        ("text", {"j.prob": "a"}),
        ("code", {"a": Path}),
    ):
        torch.save(value, tmp_path / f"{kind}.pt")
        with pytest.raises(ConfigError):
            methods.l2c(tmp_path / f"{kind}.pt")
    with pytest.raises(ConfigError, match="no file of a router"):
        methods.l2c(tmp_path / "none.pt")


@pytest.mark.parametrize(("steps", "how"), [(30, "thinned out to 30"), (80, "stretched to 80")])
def test_a_curve_for_other_steps_is_said_once(steps, how):
    for name in ("magcache-wan2.1-t2v-1.3b", "tiles-2+magcache-wan2.1-t2v-1.3b"):
        with pytest.warns(vdcache.VdcacheWarning) as said:
            vdcache.compile(TinyDiT(), name, num_steps=steps, inner="eager")
        (text,) = [str(w.message) for w in said]
        assert f"'{name}': its curve of magnitudes was measured at 50 steps and is {how}" in text
    beside = vdcache.policies.CombinedPolicy((recipe("magcache-flux").policy, EveryN(2, "other")))
    with pytest.warns(vdcache.VdcacheWarning, match="measured at 28 steps and is stretched to 50"):
        vdcache.compile(TinyDiT(), vdcache.Recipe("beside", beside), num_steps=50, inner="eager")


def test_a_curve_for_these_steps_is_taken_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vdcache.compile(TinyDiT(), "magcache-wan2.1-t2v-1.3b", num_steps=50, inner="eager")
        vdcache.compile(TinyDiT(), vdcache.methods.magcache([1.0] * 7), num_steps=7, inner="eager")
