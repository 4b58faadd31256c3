"""`vdcache opt`: before and after, promises, time, the pass that breaks something, and a file that shows a failure again."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from expecttest import assert_expected_inline
from typer.testing import CliRunner

import vdcache
from vdcache.cli.main import app
from vdcache.cli.opt import CHECKS, bisect, checker, run
from vdcache.ir.graph_files import load_graph
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Pipeline

TEXT = """\
%0 = input() : f32[2,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1)
%3 = add(%0, %2)
%4 = matmul(%3, %1)
%5 = relu(%4)
%6 = add(%3, %5)
%7 = sin(%6)
%8 = add(%6, %7)
return (%8)
"""


@dataclass(frozen=True)
class Rewires(vdcache.Pass):
    """Puts the base of the last sum in the place of the sum: it parses, it runs, it is wrong."""

    name: ClassVar[str] = "rewires"

    def run(self, graph):
        add = [n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor][-2]
        add.replace_all_uses_with(add.args[0])
        return vdcache.PassResult(graph, 1)


@dataclass(frozen=True)
class Fails(vdcache.Pass):
    name: ClassVar[str] = "fails"

    def run(self, graph):
        return {}["missing"]


@pytest.fixture
def more_passes(monkeypatch):
    from vdcache.passes import PASSES

    monkeypatch.setitem(PASSES, "rewires", Rewires)
    monkeypatch.setitem(PASSES, "fails", Fails)


@pytest.fixture
def graph_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.txt").write_text(TEXT)
    return tmp_path / "graph.txt"


def opt(*args, code=0):
    result = CliRunner().invoke(app, ["opt", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_before_and_after(graph_file):
    out = opt("--pipeline", "canonicalise,mark-branches{kinds=other},merge-slots", "--verify", graph_file, "--out", "after.txt")
    assert_expected_inline(
        out,
        """\
# before
%0 = input() : f32[2,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[2,4]
%3 = add(%0, %2) : f32[2,4]
%4 = matmul(%3, %1) : f32[2,4]
%5 = relu(%4) : f32[2,4]
%6 = add(%3, %5) : f32[2,4]
%7 = sin(%6) : f32[2,4]
%8 = add(%6, %7) : f32[2,4]
return (%8)

# after canonicalise, mark-branches{kinds=[other]}, merge-slots
%0 = input() : f32[2,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[2,4]
%3 = add(%0, %2) : f32[2,4]
%4 = matmul(%3, %1) : f32[2,4]
%5 = relu(%4) : f32[2,4]
%6 = add(%3, %5) : f32[2,4]
%7 = cache_guard(%6, 'all/run.0', %0) : f32[2,4]
%8 = sin(%7) : f32[2,4]
%9 = add(%7, %8) : f32[2,4]
return (%9)

# mark-branches{kinds=[other]} left alone
  %9 (add_2): no matrix product, convolution or attention between 'add_1' and 'sin'
""",
    )
    assert vdcache.dump(load_graph(graph_file.parent / "after.txt").graph) in out
    variant = opt(
        "--pipeline", "specialise{reuse=[all]},dead-code", "after.txt"
    )  # a graph in the middle of the way is one as well
    assert "return (%5)" in variant.partition("# after")[2]


def test_print_changed_and_time(graph_file):
    out = opt("--pipeline", "canonicalise,mark-branches,merge-slots", graph_file, "--print-changed", "--time")
    assert "# canonicalise: 0 rewrites\n(no change)" in out
    assert "+%7 = cache_guard(%6, 'all/run.0', %0) : f32[2,4]" in out
    assert re.search(r"# time\n +[\d.]+ ms +0 rewrites  canonicalise\n", out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pipeline", "nope"], "no pass is called 'nope'"),
        (["--pipeline", "canonicalise;"], "is no list of passes"),
        (["--pipeline", "mark-branches{kinds}"], "given as option=value"),
        ([], "name the passes"),
        (["--pipeline", "canonicalise", "--bisect", "nice"], "there is no check 'nice'"),
        (["--pipeline", "canonicalise", "--bisect", "no.such:check"], "cannot be imported"),
    ],
)
def test_mistakes_are_told(graph_file, args, message):
    assert message in opt(*args, graph_file, code=2)


def test_a_failing_pass_writes_what_shows_it_again(graph_file, more_passes):
    out = opt("--pipeline", "canonicalise,mark-branches,fails,merge-slots", graph_file, "--reproducer", "bug.txt", code=1)
    assert "ContractError: 'fails' failed at test_opt.py:49: KeyError: 'missing'" in out
    assert "vdcache opt --verify bug.txt" in out
    saved = load_graph(graph_file.parent / "bug.txt")
    assert saved.pipeline == "fails,merge-slots" and "cache_guard(" in vdcache.dump(saved.graph)
    assert "KeyError: 'missing'" in opt("--verify", "bug.txt", code=1)


def test_verify_finds_a_promise_that_a_later_pass_breaks(graph_file, monkeypatch):
    from vdcache.passes import PASSES

    @dataclass(frozen=True)
    class Doubles(vdcache.Pass):
        name: ClassVar[str] = "doubles"

        def run(self, graph):
            cache_guard = next(n for n in graph.graph.nodes if n.name == "cache_guard")
            with graph.graph.inserting_after(cache_guard):
                graph.graph.call_function(cache_guard.target, cache_guard.args).meta = dict(cache_guard.meta)
            return vdcache.PassResult(graph, 1)

    monkeypatch.setitem(PASSES, "doubles", Doubles)
    text = "canonicalise,mark-branches,doubles"
    for verify in ([], ["--verify"]):
        assert "after 'doubles' the graph is not guarded" in opt("--pipeline", text, *verify, graph_file, code=1)


@pytest.mark.parametrize("check", ["same", "skips"])
def test_bisect_names_the_pass(graph_file, more_passes, check):
    out = opt(
        "--pipeline",
        "canonicalise,mark-branches,rewires,merge-slots",
        "--bisect",
        check,
        graph_file,
        code=1 - (check == "skips"),
    )
    if check == "same":
        assert "pass 3, 'rewires', breaks it: AssertionError: result 0 is another one" in out
    else:
        assert "no pass breaks 'skips'" in out  # what it computes is wrong, but what reuse leaves out is still left out


def leaks_nothing(came_in, graph):
    assert not any(n.target is torch.ops.aten.relu.default for n in graph.graph.nodes), "relu"


def no_guards(came_in, graph):
    assert not any(n.name.startswith("cache_guard") for n in graph.graph.nodes), "a guard"


def test_bisect_with_a_check_of_ones_own(graph_file):
    out = opt(
        "--pipeline", "canonicalise,mark-branches,merge-slots", "--bisect", "tests.cli.test_opt:no_guards", graph_file, code=1
    )
    assert "pass 2, 'mark-branches', breaks it: AssertionError: a guard" in out
    assert "the check fails before the first pass" in opt(
        "--pipeline", "canonicalise", "--bisect", "tests.cli.test_opt:leaks_nothing", graph_file, code=2
    )


def test_bisect_writes_the_graph_that_the_culprit_is_given(graph_file):
    text = "canonicalise,mark-branches,merge-slots"
    found = opt("--pipeline", text, "--bisect", "tests.cli.test_opt:no_guards", graph_file, "--out", "before.txt", code=1)
    saved = load_graph(graph_file.parent / "before.txt")
    assert saved.pipeline == "mark-branches,merge-slots" and "cache_guard(" not in vdcache.dump(saved.graph)
    assert f"# {found.splitlines()[0]}" in (graph_file.parent / "before.txt").read_text()
    opt("--pipeline", text, "--bisect", "runs", graph_file, "--out", "after.txt")
    saved = load_graph(graph_file.parent / "after.txt")
    assert saved.pipeline == "" and "cache_guard(" in vdcache.dump(saved.graph)


def test_a_graph_from_standard_input(graph_file):
    wanted = opt("--pipeline", "canonicalise,mark-branches", graph_file)
    piped = CliRunner().invoke(app, ["opt", "-"], input=f"# pipeline: canonicalise,mark-branches\n{TEXT}")
    assert piped.exit_code == 0 and piped.output == wanted
    nothing = CliRunner().invoke(app, ["opt", "-", "--pipeline", "canonicalise"], input="")
    assert nothing.exit_code == 2 and nothing.output.strip()


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_holds_on_the_usual_passes(name):
    graph = vdcache.parse(TEXT)
    pipeline = Pipeline((Canonicalise(), MarkBranches(), MergeSlots()))
    broken = bisect(graph, pipeline, checker(name))
    assert (broken is None) == (name != "plain"), broken
    assert run(graph, pipeline, verify=True).steps[-1].rewrites == 1


def test_skips_is_told_where_a_value_leaks():
    """A cache guard that is moved off the value that the rest reads."""
    leaking = vdcache.parse(
        "%0 = input() : f32[2,2]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'all/a')\n%3 = cos(%0)\n%4 = add(%2, %1)\n%5 = mul(%4, %3)\nreturn (%5)"
    )
    assert bisect(leaking, Pipeline((Canonicalise(),)), checker("skips")) is None  # %1 stays live
    assert "pass 1" in str(bisect(leaking, Pipeline((Swaps(),)), checker("same")))


@dataclass(frozen=True)
class Swaps(vdcache.Pass):
    name: ClassVar[str] = "swaps"

    def run(self, graph):
        node = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.sin.default)
        node.target = torch.ops.aten.cos.default
        return vdcache.PassResult(graph, 1)
