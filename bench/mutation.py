"""Does the suite notice a bug? Bugs are planted one at a time, in a copy of the tree, and the tests of that place are run.

A bug in a pass or a pattern is first shown to the tests that are written with `vdcache.testing` alone (`KIT`), as those of
other packages are, and then, where these are silent, to the project's own. One that no test notices is a missing test.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.common import Bench, arguments

ROOT = Path(__file__).parents[1]
KIT = (
    "tests/passes/test_canonicalise.py",
    "tests/passes/test_mark_branches.py",
    "tests/passes/test_merge_slots.py",
    "tests/passes/test_observe_and_specialise.py",
    "tests/passes/test_whole_model.py",
    "tests/passes/test_rewrite.py",
    "tests/patterns/test_match.py",
)
MACHINE = ("tests/runtime/test_machine.py", "tests/runtime/test_identity.py", "tests/backends/test_backend.py")


@dataclass(frozen=True)
class Bug:
    """One planted bug: in `file`, `old` (which stands there once) becomes `new`.

    Args:
        tests: where the project tests this place.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def in_a_pass(self) -> bool:
        return self.file.startswith(("passes/", "patterns/", "ir/edit"))


def _passes(what: str, file: str, old: str, new: str, *tests: str) -> Bug:
    return Bug(what, f"passes/{file}.py", old, new, tuple(f"tests/passes/test_{t}.py" for t in tests or (file,)))


def _match(what: str, old: str, new: str) -> Bug:
    return Bug(what, "patterns/match.py", old, new, ("tests/patterns/test_match.py",))


def _runtime(what: str, file: str, old: str, new: str, *tests: str) -> Bug:
    return Bug(what, f"runtime/{file}.py", old, new, tests or ("tests/runtime/test_step_tracker.py", *MACHINE))


def _policy(what: str, file: str, old: str, new: str, *tests: str) -> Bug:
    return Bug(what, f"policies/{file}.py", old, new, tests)


RESIDUAL = ("tests/patterns/test_residual.py", "tests/passes/test_mark_branches.py")
SPECIALISE = ("observe_and_specialise", "merge_slots")
BUGS = (
    # patterns
    Bug(
        "a broadcast operand taken for a stream",
        "patterns/residual.py",
        "if not _same_shape(base, node):",
        "if False:",
        RESIDUAL,
    ),
    Bug(
        "an effect inside a branch ignored",
        "patterns/residual.py",
        "if effect := next((n for n in inside if is_effectful(n)), None):",
        "if effect := next((n for n in inside if False), None):",
        RESIDUAL,
    ),
    Bug(
        "a branch without work taken for one",
        "patterns/residual.py",
        "if not any(is_work(n) for n in inside):",
        "if not inside:",
        RESIDUAL,
    ),
    Bug(
        "a stale match: the analysis kept after attention was rewritten",
        "passes/pipeline.py",
        "            if not before <= read:",
        "            if False:",
        ("tests/passes/test_tile_attention.py",),
    ),
    _match("an order tried that means something else", "_EITHER_ORDER = (", "_EITHER_ORDER = (aten.sub.Tensor, "),
    _match("one name for two values", "        if name in bound.values:", "        if False:"),
    _match(
        "a match that outlives a change",
        "            if was != [node.target, node.args, node.kwargs]:",
        "            if False:",
    ),
    _match("an argument that the pattern does not give", "if not line.open and name not in wanted and", "if False and"),
    # passes
    _passes(
        "a replacement of another type",
        "rewrite",
        "if not isinstance(new, fx.Node) or not same_type(new, root):",
        "if not isinstance(new, fx.Node):",
    ),
    _passes(
        "an effect rewritten away", "rewrite", "for n in match.inside if is_effectful(n) or communicates(n)", "for n in ()"
    ),
    _passes(
        "a leaked value read from the guard",
        "mark_branches",
        "users=None if at_gate else (residual_add,)",
        "users=None",
    ),
    _passes(
        "the stream not rewired to the guard of a fused sum",
        "mark_branches",
        "put_cache_guard(residual_add, slot, self, base)",
        "put_cache_guard(residual_add, slot, self, base, users=())",
    ),
    _passes(
        "a fused sum guarded without its base",
        "mark_branches",
        "put_cache_guard(residual_add, slot, self, base)",
        "put_cache_guard(residual_add, slot, self)",
    ),
    _passes(
        "two branches with one slot",
        "mark_branches",
        'slot = _free(f"{group}/{branch.name}", used)',
        'slot = f"{group}/{branch.kind}"',
    ),
    _passes(
        "pre and post gate confused", "mark_branches", 'at_gate = self.gate == "pre" and', 'at_gate = self.gate == "post" and'
    ),
    _passes(
        "a value that is still read merged away",
        "merge_slots",
        "        runs = _split_where_live(graph.graph, runs, self.group, refusals)\n",
        "",
    ),
    _passes(
        "a term that changes taken for a constant",
        "merge_slots",
        "return lambda node: node not in varying",
        "return lambda node: True",
    ),
    _passes(
        "the base of the last branch taken for that of the run",
        "merge_slots",
        "dialect.with_cache_guard(_before_casts(run[0].base)), run[-1].residual_add",
        "dialect.with_cache_guard(_before_casts(run[-1].base)), run[-1].residual_add",
    ),
    _passes("a sum with a factor merged", "merge_slots", 'or users[0].kwargs.get("alpha", 1) != 1', ""),
    _passes(
        "the base in another type than the sum",
        "merge_slots",
        "            if not same_type(base, end):",
        "            if False:",
    ),
    _passes(
        "the difference saved without subtracting the base",
        "specialise",
        "                new = call(g, aten.sub.Tensor, new, base, provenance=str(self))",
        "                pass",
        *SPECIALISE,
    ),
    _passes(
        "reuse without adding the base",
        "specialise",
        "                value = call(g, aten.add.Tensor, base, value, provenance=str(self))",
        "                pass",
        *SPECIALISE,
    ),
    _passes(
        "what is kept not made dense",
        "specialise",
        "    if _surely_contiguous(fake):",
        "    if True:",
        *SPECIALISE,
    ),
    _passes(
        "a prediction in another type than the value",
        "specialise",
        "            if own != like.dtype and not half:",
        "            if False:",
        *SPECIALISE,
    ),
    _passes(
        "observed in the steps that reuse the group",
        "specialise",
        "group_of(slot) not in self.reuse:",
        "group_of(slot) in self.reuse:",
        *SPECIALISE,
    ),
    _passes(
        "a mutated input not written back",
        "specialise",
        "        for output, position in sig.mutations:",
        "        for output, position in ():",
        *SPECIALISE,
    ),
    _passes(
        "the wrong group reused",
        "specialise",
        "            if group_of(slot) in self.reuse:\n                self._reuse",
        "            if self.reuse:\n                self._reuse",
        *SPECIALISE,
    ),
    _passes(
        "dropout in training dropped",
        "canonicalise",
        "return first if not node.args[2] or node.args[1] == 0 else None",
        "return first",
    ),
    _passes("a copy that the caller gets dropped", "canonicalise", " or _is_returned(node)\n", "\n"),
    _passes("slices in any order taken for the whole", "canonicalise", " or found[2] != at:", ":"),
    _passes(
        "slices of two tensors taken for one", "canonicalise", "if source is not None and found[0] is not source:", "if False:"
    ),
    _passes(
        "random numbers dropped as dead code",
        "dead_code",
        "keep=lambda n: is_effectful(n) or dialect.is_dialect(n)",
        "keep=None",
        "canonicalise",
        "split_at_probe",
    ),
    _passes(
        "an effect moved before the decision",
        "split_at_probe",
        "if wrong := next((n for n in first if is_effectful(n)), None):",
        "if wrong := next((n for n in first if False), None):",
    ),
    _passes("a guard left in the head", "split_at_probe", "            if cache_guard in first:", "            if False:"),
    _passes(
        "observed in the type of the gate, not of the stream",
        "observe",
        'if value.meta["val"].dtype != (dtype := nodes[branch.source].meta["val"].dtype):',
        'if value.meta["val"].dtype == (dtype := None):',
        "observe_and_specialise",
    ),
    _passes(
        "the measure of now and of before exchanged",
        "sums",
        "    then = op(aten._to_copy.default, previous, dtype=torch.float32)",
        "    now, then = op(aten._to_copy.default, previous, dtype=torch.float32), now",
        "observe_and_specialise",
        "probe",
    ),
    _passes(
        "the output guarded without its base",
        "mark_output",
        "                base = latent",
        "                base = None",
    ),
    Bug(
        "the value of new nodes lost",
        "ir/edit.py",
        '    node.meta = {"val": result, "vdcache": provenance}\n    return node',
        '    node.meta = {"vdcache": provenance}\n    return node',
        ("tests/ir/test_facts.py", "tests/passes/test_merge_slots.py"),
    ),
    # predictors and measures
    *(
        Bug(what, "policies/weights.py", old, new, ("tests/policies/test_weights.py", "tests/runtime/test_predictors.py"))
        for what, old, new in (
            ("Taylor without its factorials", "lambda i, x: x**i / math.factorial(i))", "lambda i, x: x**i)"),
            (
                "a difference formed with values that were never computed",
                "for _ in range(min(most, len(steps) - 1)):",
                "for _ in range(min(most, len(steps))):",
            ),
            ("a ring's weights with the wrong sign", "*(-t for t in tails[1:])", "*tails[1:]"),
            ("a ridge that is none", "math.sqrt(self.ridge) * np.eye", "0.0 * np.eye"),
            ("ZEUS before it has two values", "if len(computed) >= len(self.values) else", "if computed else"),
            ("a rule of the step after", "if first <= now.step]", "if first <= now.step + 1]"),
            (
                "steps since the last computed one off by one",
                "now.step - computed[0].step if computed",
                "now.step - computed[0].step + 1 if computed",
            ),
        )
    ),
    Bug(
        "a ring that moves nothing along",
        "passes/predictors.py",
        "return [new, moved, *previous[1 : self.tensors - 1]]",
        "return [new, moved, *previous[2 : self.tensors]]",
        ("tests/policies/test_weights.py",),
    ),
    Bug(
        "computed steps in the wrong order",
        "runtime/computed_steps.py",
        "own.steps.setdefault(group, []).insert(0, at)",
        "own.steps.setdefault(group, []).append(at)",
        ("tests/runtime/test_predictors.py", "tests/runtime/test_computed_steps.py"),
    ),
    _policy(
        "the change relative to now, not to before",
        "metrics",
        "        change = _ratio(root(first), root(second))",
        "        change = _ratio(root(first), root(third))",
        "tests/runtime/test_store_and_history.py",
        "tests/passes/test_observe_and_specialise.py",
        "tests/backends/test_backend.py",
    ),
    # policies and schedules
    _policy(
        "every-N one step late", "base", "step % self.n == 0 or", "step % self.n == 1 or", "tests/policies/test_policies.py"
    ),
    _policy(
        "the last step not computed",
        "base",
        "or step >= state - 1 else",
        "or step >= state else",
        "tests/policies/test_policies.py",
    ),
    _policy(
        "the rate passed by one step",
        "adacache",
        "else passed >= state.rate",
        "else passed > state.rate",
        "tests/policies/test_policies.py",
    ),
    _policy("a change on the threshold", "adacache", "if change < t)", "if change <= t)", "tests/policies/test_policies.py"),
    _policy(
        "one step fewer computed at the end",
        "adacache",
        "step >= state.num_steps - self.last:",
        "step > state.num_steps - self.last:",
        "tests/policies/test_policies.py",
    ),
    _policy(
        "the rate for the steps that really passed",
        "adacache",
        'k = state.rate if self.rule == "code" else elapsed',
        "k = elapsed",
        "tests/policies/test_policies.py",
    ),
    _policy(
        "intervals rounded down", "steps", "math.floor(exact + 0.5)", "math.floor(exact)", "tests/policies/test_scheduled.py"
    ),
    # clock
    _runtime(
        "a jump back is no new generation",
        "step_tracker",
        "if direction and direction == -(self._direction or self._expected):",
        "if False:",
    ),
    _runtime(
        "windows taken for steps of a solver",
        "step_tracker",
        "if reading.coarse or not self._first_repeats:",
        "if True:",
    ),
    _runtime(
        "colliding 16-bit timesteps taken for windows",
        "step_tracker",
        "if reading.coarse or not self._first_repeats:",
        "if not self._first_repeats:",
    ),
    _runtime(
        "another shape of latent is no new generation",
        "step_tracker",
        "if before.form != reading.form and (last or not _same_but_for_batch(before.form, reading.form)):",
        "if False:",
    ),
    _runtime(
        "a sample more or less is a new generation",
        "step_tracker",
        "if before.form != reading.form and (last or not _same_but_for_batch(before.form, reading.form)):",
        "if before.form != reading.form:",
    ),
    _runtime(
        "the direction of the last generation forgotten",
        "step_tracker",
        "direction == -(self._direction or self._expected)",
        "direction == -self._direction",
    ),
    _runtime(
        "a run the other way round not expected where others ended",
        "step_tracker",
        "self._began.get(began) or -self._ended.get(began, -self.usual)",
        "self.usual",
    ),
    _runtime(
        "samples of a batch that go different ways are a step",
        "step_tracker",
        "return signs.pop() if len(signs) == 1 else None if signs else 0",
        "return signs.pop() if signs else 0",
    ),
    # whose values
    _runtime(
        "a prompt that was written into taken for the same",
        "lane_table",
        "return self.object is value and self.version is not None and value._version == self.version",
        "return self.object is value and self.version is not None",
    ),
    _runtime("a prompt of equal value taken for another", "lane_table", "return torch.equal(before, value)", "return False"),
    _runtime(
        "what moved once is never looked at again", "lane_table", "return self._moves - self._still", "return self._moves"
    ),
    _runtime(
        "the oldest of equal lanes",
        "lane_table",
        "return _newest(known)",
        "return known[0] if known else None",
    ),
    _runtime(
        "weights that were written into",
        "weights_token",
        "return self.alive and _versions(weights) == self.versions and",
        "return self.alive and",
    ),
    _runtime("an address that is used again", "weights_token", "        self.alive = False", "        pass"),
    _runtime(
        "a weight that was moved is another",
        "weights_token",
        "number = self._numbers.get((graph, in_order))",
        "number = None",
    ),
    _runtime("lanes told by nothing", "step_lanes", "return (self._name, self._id, own.id) if", "return (self._name, 0, 0) if"),
    _runtime(
        "the caller's name of a lane ignored",
        "step_lanes",
        "return (self._name, self._id, own.id) if",
        "return (None, self._id, own.id) if",
    ),
    _runtime("several latents not noticed", "step_lanes", "if any(a is False for a in answers):", "if False:"),
    _runtime(
        "a step that raises keeps what was there",
        "session",
        "        self._computed.drop_values()\n\n    def forget",
        "        pass\n\n    def forget",
    ),
    _runtime(
        "the length of the last run taken for every one",
        "generation_length",
        "if steps is None or steps == self.steps:",
        "if True:",
    ),
    _runtime("threads share a session", "session", "if own._turn.thread == threading.get_ident():", "if True:"),
    _runtime(
        "sessions of a model regardless of the recipe",
        "registry",
        "session = next((s for o, s in known if o is owner or o == owner), None)",
        "session = next((s for _, s in known), None)",
    ),
    # store and session
    _runtime(
        "what the caller holds kept without a copy",
        "store",
        "if has_own_memory(value, foreign) and value.is_contiguous()",
        "if True",
        "tests/runtime/test_store_and_history.py",
        *MACHINE,
    ),
    _runtime(
        "a value of another shape of latent",
        "session",
        "(graph.content, *_forms(inputs, graph.inputs.activations))",
        "(graph.content,)",
    ),
    _runtime(
        "a value of other weights",
        "session",
        "key = self._computed.key(who, number, lane, weights,",
        "key = self._computed.key(who, number, lane, 0,",
    ),
    _runtime(
        "other numbers in the graph taken for the same",
        "session",
        "(graph.content, *_forms(",
        "(0, *_forms(",
    ),
    _runtime(
        "weights that come back taken for others",
        "weights_token",
        "if known is not None and known.unchanged(weights):",
        "if known is not None and known.unchanged(weights) and known is [*own.values()][-1]:",
    ),
    _runtime(
        "a prompt that comes again taken for what moves",
        "lane_table",
        "if was_there or self._comes_again(i, value):",
        "if was_there:",
    ),
    _runtime(
        "memory of others trusted",
        "lane_table",
        "if counts_versions(value):",
        "if not value.is_inference():",
    ),
    _runtime("a run the other way round not doubted", "step_tracker", "unsure = direction > 0 and", "unsure = False and"),
    _runtime(
        "values of the last generation kept",
        "computed_steps",
        "        self._store.drop()\n        self._computed.clear()",
        "        self._computed.clear()",
    ),
    _runtime(
        "computed steps of the last generation counted",
        "computed_steps",
        "        self._store.drop()\n        self._computed.clear()",
        "        self._store.drop()",
        "tests/runtime/test_computed_steps.py",
    ),
    Bug(
        "a variant for groups that the graph has not",
        "backends/variants.py",
        "found = self._narrowed[plan] = Plan(plan.reuse & self._groups)",
        "found = self._narrowed[plan] = plan",
        ("tests/backends/test_backend.py", "tests/passes/test_block_lists.py"),
    ),
)


def main() -> None:
    args = arguments(__doc__, _more)
    bench = Bench("mutation")
    chosen = [b for b in BUGS if not args.only or any(word in b.what or word in b.file for word in args.only)]
    with tempfile.TemporaryDirectory() as folder:
        trees = [_tree(Path(folder) / str(i)) for i in range(args.jobs)]
        wanted = sorted({t for b in chosen for t in b.tests} | set(KIT))
        free: queue.Queue[Path] = queue.Queue()
        for tree in trees:
            free.put(tree)

        def fine(test: str) -> str:
            tree = free.get()
            try:
                return fails(tree, (test,))
            finally:
                free.put(tree)

        with ThreadPoolExecutor(args.jobs) as pool:
            if failed := next(filter(None, pool.map(fine, wanted)), ""):
                raise SystemExit(f"without any bug these tests fail already:\n{failed}")
        print(f"without a bug all of {len(wanted)} files pass", flush=True)

        def tried(bug: Bug) -> tuple[Bug, bool, bool]:
            tree = free.get()
            try:
                with planted(tree, bug):
                    kit = bool(fails(tree, KIT)) if bug.in_a_pass else False
                    own = not kit and bool(fails(tree, bug.tests))
                    thorough = not kit and not own and bool(fails(tree, bug.tests, thorough=True))
                if thorough and (failed := fails(tree, bug.tests, thorough=True)):
                    raise SystemExit(f"without any bug these tests fail already:\n{failed}")
                return bug, kit, own or thorough
            finally:
                free.put(tree)

        caught = by_kit = in_passes = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for bug, kit, own in pool.map(tried, chosen):
                caught += own or kit
                in_passes += bug.in_a_pass
                by_kit += kit
                bench.row(bug.what, float(own or kit), "caught", None, file=bug.file, by_kit=kit, by_own=own)
    bench.row("bugs planted", len(chosen), "", ">= 30" if not args.only else None)
    bench.row("caught by the suite", caught / len(chosen), "share", ">= 0.95")
    if in_passes:
        bench.row("of those in passes and patterns, caught by vdcache.testing alone", by_kit / in_passes, "share", ">= 0.95")
    bench.write(args.json)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], help="bugs whose words or file hold this; again for more")
    parser.add_argument("--jobs", type=int, default=1, help="bugs that are tried at once, each in a tree of its own")


def _tree(folder: Path) -> Path:
    """A copy of what is tested."""
    folder.mkdir()
    for name in ("vdcache", "tests", "examples", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


class planted:
    """A bug in the tree, gone afterwards."""

    def __init__(self, tree: Path, bug: Bug) -> None:
        self._path, self._bug = tree / "vdcache" / bug.file, bug
        self._text = self._path.read_text()

    def __enter__(self) -> None:
        if (found := self._text.count(self._bug.old)) != 1:
            raise SystemExit(
                f"'{self._bug.what}': its place stands {found} times in {self._bug.file}, not once: {self._bug.old!r}"
            )
        self._path.write_text(self._text.replace(self._bug.old, self._bug.new))

    def __exit__(self, *error: object) -> None:
        self._path.write_text(self._text)


def fails(tree: Path, tests: tuple[str, ...], *, thorough: bool = False) -> str:
    """The end of what pytest says where a test fails, "" where all pass.

    Args:
        thorough: with the tests that `make test` samples, for what the others do not catch.
    """
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "VDCACHE_THOROUGH": str(int(thorough))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:logging",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=0",
        *tests,
    ]
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "it never ends"
    return "" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-500:]


if __name__ == "__main__":
    main()
