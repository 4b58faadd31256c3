"""The testing kit notices what it is for: each statement fails where it should, and says why."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import vdcache
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Observe, Pipeline
from vdcache.testing import (
    RecordingBackend,
    TinyDiT,
    assert_bit_identical,
    assert_pass,
    assert_policy,
    assert_predictor,
    assert_reaches,
    assert_refuses,
    assert_skipped,
    dump,
    latent,
    parse,
    residual_nets,
    small_models,
    time_of,
    try_recipe,
)

TEXT = "%0 = input() : f32[2]\n%1 = relu(%0)\nreturn (%1)"


@dataclass(frozen=True)
class ReluToSin(vdcache.Pass):
    name: ClassVar[str] = "relu-to-sin"
    says: str = ""

    def run(self, graph):
        found = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
        if self.says:
            return vdcache.PassResult(graph, 0, tuple(vdcache.passes.Refusal(n.name, self.says) for n in found))
        for node in found:
            node.target = torch.ops.aten.sin.default
        return vdcache.PassResult(graph, len(found))


def test_assert_pass():
    assert_pass(ReluToSin(), TEXT, TEXT.replace("relu", "sin"))
    with pytest.raises(AssertionError, match=r"(?s)'relu-to-sin' gives another graph.*-%1 = cos.*\+%1 = sin"):
        assert_pass(ReluToSin(), TEXT, TEXT.replace("relu", "cos"))
    assert_pass(Pipeline((ReluToSin(), Canonicalise())), parse(TEXT), TEXT.replace("relu", "sin"))


def test_assert_refuses():
    assert_refuses(ReluToSin("no"), TEXT, "no")
    with pytest.raises(AssertionError, match="made 1 rewrites"):
        assert_refuses(ReluToSin(), TEXT, "no")
    with pytest.raises(AssertionError, match=r"no refusal of .* says 'yes'; it says:\nrelu: no"):
        assert_refuses(ReluToSin("no"), TEXT, "yes")


def test_assert_bit_identical():
    sin = parse(TEXT.replace("relu", "sin"))
    assert_bit_identical(sin, torch.sin, torch.tensor([1.0, float("nan")]))
    with pytest.raises(AssertionError, match="result 0 differs: 2 of 2 elements"):
        assert_bit_identical(sin, parse(TEXT.replace("relu", "cos")))
    with pytest.raises(AssertionError, match="2 results instead of 1"):
        assert_bit_identical(torch.sin, lambda x: (x, x), torch.ones(2))
    with pytest.raises(AssertionError, match=r"\(2,\) torch.float64 instead of"):
        assert_bit_identical(torch.sin, lambda x: x.double(), torch.ones(2))
    with pytest.raises(AssertionError, match="differs"):
        assert_bit_identical(torch.zeros_like, lambda x: x * float("nan"), torch.ones(2))


def test_assert_skipped():
    """A value that is drawn at random where it is computed is another one each time: what was kept is not what comes."""
    good = "%0 = input() : f32[2]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'all/a')\n%3 = relu(%2)\nreturn (%3)"
    assert assert_skipped(parse(good)) == {"sin"}
    cached = "%0 = input() : f32[2]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'all/a')\n%3 = relu(%2)\nreturn (%3, %1)"
    assert not assert_skipped(parse(cached)), "what is guarded is returned as well"
    with pytest.raises(AssertionError, match="nothing is guarded in the groups b"):
        assert_skipped(parse(good), groups=["b"])

    two = "%0 = input() : f32[2]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'a/x', %1)\n%3 = cache_guard(%2, 'b/y')\nreturn (%3)"
    for groups in (["a"], ["b"], None):
        assert_skipped(parse(two), groups=groups)
    noisy = parse("%0 = input() : f32[2]\n%1 = rand_like(%0)\n%2 = cache_guard(%1, 'all/a')\nreturn (%2)")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_skipped(noisy)


def test_assert_skipped_sees_a_leak():
    """What the interpreter poisons is what a reused step leaves out; a variant that reads it all the same is caught."""
    from vdcache.ir.oracle import PoisonInterpreter, record_slots, skipped

    graph = parse("%0 = input() : f32[2]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'all/a')\n%3 = relu(%2)\nreturn (%3)")
    cached, dead = record_slots(graph, torch.ones(2)), {n.name for n in skipped(graph.graph)}
    assert dead == {"sin"}
    leaking = parse("%0 = input() : f32[2]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'all/a')\n%3 = add(%2, %1)\nreturn (%3)")
    assert PoisonInterpreter(leaking, cached, dead).run(torch.ones(2))[0].isnan().all()


class Forgetful:
    """Keeps state of its own."""

    def __init__(self):
        self.calls = 0

    def plans(self):
        return (vdcache.Plan(), vdcache.Plan.of(["all"]))

    def start(self, num_steps, previous=None):
        return None

    def plan(self, state, step, times=()):
        self.calls += 1
        return vdcache.Plan() if self.calls % 3 == 1 else vdcache.Plan.of(["all"])

    def observe(self, state, step, plan, measures):
        return state


@dataclass(frozen=True)
class Fixed:
    plan_of: dict = field(default_factory=dict)

    def plans(self):
        return (vdcache.Plan(), vdcache.Plan.of(["all"]))

    def start(self, num_steps, previous=None):
        return None

    def plan(self, state, step, times=()):
        return self.plan_of.get(step, vdcache.Plan())

    def observe(self, state, step, plan, measures):
        return state


def test_assert_policy():
    from vdcache.methods import recipe

    for name in ("every-3", "adacache-fast+moreg", "fbcache-5", "taylorseer-3-1"):
        plans = assert_policy(recipe(name).policy, 12, changes=(0.01, 0.2))
        assert len(plans) == 12 and any(plans) and not plans[0]
    with pytest.raises(AssertionError, match=r"on a replay of .*: it keeps state of its own"):
        assert_policy(Forgetful(), 10)
    with pytest.raises(AssertionError, match="reuses in the first step"):
        assert_policy(Fixed({0: vdcache.Plan.of(["all"])}))
    with pytest.raises(AssertionError, match=r"returns reuse\{some\}, which plans\(\) does not list"):
        assert_policy(Fixed({1: vdcache.Plan.of(["some"])}))
    with pytest.raises(vdcache.errors.ConfigError, match="leaves step 1 to 'decide'"):
        assert_policy(Fixed({1: None}))


@dataclass(frozen=True)
class Divides:
    """Forgets that nothing was kept before the first step."""

    tensors = 2

    def store(self, new, previous, step_info):
        return new, new / previous[0].mean()

    def predict(self, cached, step_info):
        return cached[0] * cached[1]


def test_assert_predictor():
    taylor = assert_predictor(vdcache.predictors.Taylor(1), steps=3)
    assert [float(x[0, 0]) for x in taylor] == [1.0, 4 + 3.0, 9 + 5.0]
    with pytest.raises(AssertionError, match="keeps no number after 1 computed steps"):
        assert_predictor(Divides())


def test_assert_reaches():
    assert assert_reaches(residual_nets(), lambda net: net.works()).works()
    with pytest.raises(AssertionError, match="never reaches this outcome in 20 tries"):
        assert_reaches(residual_nets(), lambda net: False, tries=20)


def test_small_models_are_real():
    cases = small_models()
    assert len(cases) >= 10 and {"tiny", "demo", "wan", "flux", "latte"} <= set(cases)
    with torch.no_grad():
        for name in ("tiny", "demo"):
            case = cases[name]
            report = vdcache.explain(case.build(), **case.call(0, 6))
            assert report.count() == case.branches


def test_the_recording_backend_keeps_every_stage_of_a_real_compilation():
    torch._dynamo.reset()
    backend, model = RecordingBackend("every-2", num_steps=4), TinyDiT()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for step in range(4):
            out = compiled(latent(step), time_of(step), latent(9))
            assert torch.equal(out, model(latent(step), time_of(step), latent(9))) == (step in (0, 2, 3))
    names = [s.a_pass.name for s in backend.stages]
    assert names[:3] == ["canonicalise", "mark-branches", "merge-slots"] and "specialise" in names
    marked = backend.stage("mark-branches")
    assert marked.rewrites == 4 and "cache_guard(" not in dump(marked.before) and dump(marked.after).count("cache_guard(") == 4
    assert dump(backend.stage("merge-slots").before) == dump(marked.after), "what comes after does not change what was kept"
    assert str(marked).startswith("mark-branches: 4 rewrites\n%0 = input() : f32[1,6,4]\n")
    with pytest.raises(KeyError, match="no pass 'nope' ran on graph 0; there ran canonicalise"):
        backend.stage("nope")
    assert backend.programs[0].slots


def test_the_plugin_gives_all_of_it_as_fixtures(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = "vdcache.testing.plugin"\n')
    (tmp_path / "test_mine.py").write_text(
        "from vdcache.passes import Canonicalise\n"
        "def test_a(assert_pass, assert_refuses, assert_round_trip, parse):\n"
        "    text = '%0 = input() : f32[2]\\n%1 = alias(%0)\\n%2 = relu(%1)\\nreturn (%2)'\n"
        "    assert_pass(Canonicalise(), text, '%0 = input() : f32[2]\\n%1 = relu(%0)\\nreturn (%1)')\n"
        "    assert_round_trip(parse(text))\n"
        "def test_b(small_model):\n"
        "    assert small_model.branches\n"
        "def test_c(recording_backend):\n"
        "    assert recording_backend('every-2').stages == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:logging", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert f"{2 + len(small_models())} passed" in done.stdout


def test_marks_of_a_stale_copy_are_not_shared():
    """What a stage keeps is a copy: passes that run later change their own graph."""
    graph = parse("%0 = input() : f32[3,4]\n%1 = parameter() : f32[4,4]\n%2 = matmul(%0, %1)\n%3 = add(%0, %2)\nreturn (%3)")
    previous = dump(graph)
    Pipeline((Canonicalise(), MarkBranches())).run(graph)
    assert dump(graph) == previous


@dataclass(frozen=True)
class Asks:
    """A predictor that asks a tensor for its number."""

    tensors = 2

    def store(self, new, previous, step_info):
        return (new.float(), previous[0] if step_info.computed > 0 else new.float())

    def predict(self, cached, step_info):
        return cached[0]


@dataclass(frozen=True)
class Shrinks:
    tensors = 1

    def store(self, new, previous, step_info):
        return (new.mean(-1, keepdim=True),)

    def predict(self, cached, step_info):
        return cached[0]


def test_a_predictor_must_be_traceable():
    with pytest.raises(
        AssertionError, match=r"'store' of the predictor Asks\(\) cannot be traced: .*choose with torch.where, never"
    ):
        assert_predictor(Asks())
    with pytest.raises(AssertionError, match="keeps a tensor of another shape"):
        assert_predictor(Shrinks())


def test_a_predictor_of_another_shape_breaks_no_model():
    recipe = vdcache.Recipe("shrinks", Listens(), (MarkBranches(), MergeSlots()), predictor=Shrinks())
    (trial,) = try_recipe(recipe, ["tiny"], steps=3)
    assert trial.identical and trial.computed == (0, 1, 2)
    assert (
        "'store' of the predictor Shrinks() gives [(1, 6, 1)] for a value of (1, 6, 8); it gives 1 of that shape" in trial.said
    )


@dataclass(frozen=True)
class Listens:
    """Reuses a step whenever the last measured change is below 0.5."""

    group: str = "all"
    unlisted: bool = False

    def plans(self):
        return (vdcache.Plan(), vdcache.Plan.of(["all"]))

    def start(self, num_steps, previous=None):
        return ()

    def plan(self, state, step, times=()):
        return (
            vdcache.Plan.of([self.group, *(["more"] if self.unlisted else [])]) if state and state[-1] < 0.5 else vdcache.Plan()
        )

    def observe(self, state, step, plan, measures):
        return (*state, measures[0].change) if measures else state


def test_changes_are_given_one_after_the_other():
    seen = []

    class Notes(Listens):
        def observe(self, state, step, plan, measures):
            if measures:
                seen.append(measures[0].change)
            return super().observe(state, step, plan, measures)

    assert_policy(Notes(), 8, changes=(0.9, 0.7, 0.3))
    assert seen[: len(seen) // 2] == [0.9, 0.7, 0.3]


def test_a_plan_that_is_none_is_said():
    class Bool(Listens):
        def plan(self, state, step, times=()):
            return step > 3

    with pytest.raises(AssertionError, match=r"returns False for step 0; a plan is vdcache.Plan\(\)"):
        assert_policy(Bool(), 5)


def test_a_plan_that_is_not_listed_computes_and_is_said():
    scope = (MarkBranches(), MergeSlots(), Observe())
    (trial,) = try_recipe(vdcache.Recipe("unlisted", Scripted(), scope), ["tiny"], steps=5)
    assert trial.computed == (0, 1, 2, 3, 4) and trial.identical
    assert "returned reuse{all,more}, which its plans() does not list (recompute, reuse{all})" in trial.said


class Scripted(Listens):
    def plan(self, state, step, times=()):
        return vdcache.Plan.of(["all", "more"]) if step else vdcache.Plan()


def test_an_observation_that_finds_nothing_is_said():
    """Latte keeps its tokens in two shapes, which cannot be compared."""
    if "latte" not in small_models():
        pytest.skip("diffusers is not installed")
    scope = (MarkBranches(), MergeSlots(), Observe(kind="residual"))
    (trial,) = try_recipe(vdcache.Recipe("listens", Listens(), scope), ["latte"], steps=4)
    assert trial.computed == (0, 1, 2, 3)
    assert (
        "because nothing was measured: observe{kind=residual} found nothing, " in trial.said and "thresholds" not in trial.said
    )


def test_without_hypothesis_it_is_said_what_needs_it():
    """Random nets alone do; the rest of the kit works."""
    program = """
import sys
sys.modules["hypothesis"] = None
import vdcache.testing
vdcache.testing.TinyDiT, vdcache.testing.assert_pass, vdcache.testing.small_models
vdcache.testing.residual_nets
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip().endswith("need hypothesis: pip install 'vdcache[testing]'"), done.stderr
    assert "ModuleNotFoundError: random nets (residual_nets" in done.stderr


def test_taylor_of_squares():
    """Of 1, 4, 9, 16: exact differences once enough steps were computed, and nothing of what never was."""
    assert [float(x[0, 0]) for x in assert_predictor(vdcache.predictors.Taylor(1))] == [1, 7, 14, 23]
    for order in (2, 3):
        assert [float(x[0, 0]) for x in assert_predictor(vdcache.predictors.Taylor(order))] == pytest.approx([1, 7, 15, 24])
