"""What a test of a pass, a policy or a predictor states in one line."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from vdcache.errors import ContractError
from vdcache.ir.dialect import cache_guards
from vdcache.ir.dump import dump
from vdcache.ir.oracle import example_inputs, skipped, unskippable
from vdcache.ir.parse import parse
from vdcache.passes import Pass, Pipeline, Specialise
from vdcache.passes.predictors import AnyPredictor, as_told, graph_of, numbers_of
from vdcache.policies.base import Policy
from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import Plan
from vdcache.policies.simulate import simulate
from vdcache.policies.weights import Position
from vdcache.testing.graphs import Graph, graph_from, run_pass
from vdcache.util.slots import group_of

__all__ = [
    "assert_bit_identical",
    "assert_close",
    "assert_pass",
    "assert_policy",
    "assert_predictor",
    "assert_reaches",
    "assert_refuses",
    "assert_round_trip",
    "assert_skipped",
]


def assert_pass(a_pass: Pass | Pipeline, before: Graph, after: Graph) -> None:
    """The pass makes `after` of `before`, and holds what it promises.

    Args:
        before, after: texts as `dump` prints them (types may be left out but for inputs), or graphs.

    Raises:
        AssertionError: the graph is another one; the message shows the lines that differ.
        ContractError: the pass broke a promise: a fact, or "no rewrites" on a changed graph.
    """
    got, want = dump(run_pass(a_pass, before).graph), dump(graph_from(after))
    if got != want:
        lines = difflib.unified_diff(want.splitlines(), got.splitlines(), "expected", "got", lineterm="", n=2)
        raise AssertionError(f"'{a_pass}' gives another graph:\n" + "\n".join(lines) + f"\n\nall of it:\n{got}")


def assert_refuses(a_pass: Pass | Pipeline, graph: Graph, reason: str) -> None:
    """The pass leaves the graph as it is, and one of its refusals gives the reason (in these words, or as a regular
    expression)."""
    given = graph_from(graph)
    result = run_pass(a_pass, given)
    said = [f"{r.node}: {why}" for r in result.refusals for why in r.reasons]
    assert not result.rewrites, f"'{a_pass}' made {result.rewrites} rewrites:\n{dump(result.graph)}"
    assert dump(result.graph) == dump(given), f"'{a_pass}' changed the graph:\n{dump(result.graph)}"
    assert any(reason in s or re.search(reason, s) for s in said), f"no refusal of '{a_pass}' says {reason!r}; it says:\n" + (
        "\n".join(said) or "nothing"
    )


def assert_bit_identical(before: Callable[..., Any], after: Callable[..., Any], *inputs: Any, **named: Any) -> None:
    """Two graphs or models give the same for the same inputs, bit for bit; NaN equals NaN.

    Args:
        inputs: what both are called with; a graph (`fx.GraphModule`) alone gets random inputs of its types.
    """
    for i, (a, b) in enumerate(_results(before, after, inputs, named)):
        if isinstance(a, Tensor):
            same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
            same = same and (not a.is_floating_point() or torch.equal(a.isnan(), b.isnan()))
            assert same, f"result {i} differs: {_difference(a, b)}"
        else:
            assert a == b, f"result {i} is {b!r} instead of {a!r}"


def assert_close(
    before: Callable[..., Any], after: Callable[..., Any], *inputs: Any, rtol: float, atol: float, **named: Any
) -> None:
    """Two graphs or models give the same for the same inputs but for rounding: for passes that compute in another order.

    Args:
        inputs: as for `assert_bit_identical`.
        rtol, atol: as in `torch.testing.assert_close`; how exact a pass is belongs to the pass, so both must be said.
    """
    for i, (a, b) in enumerate(_results(before, after, inputs, named)):
        try:
            torch.testing.assert_close(b, a, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"result {i} differs: {error}") from error


def _results(before: Callable[..., Any], after: Callable[..., Any], inputs: Any, named: Any) -> list[tuple[Any, Any]]:
    """What both give, flattened, side by side."""
    if not inputs and not named and isinstance(before, fx.GraphModule):
        inputs = tuple(example_inputs(before))
    with torch.no_grad():
        want, got = (pytree.tree_leaves(f(*_copied(inputs), **named)) for f in (before, after))
    assert len(want) == len(got), f"{len(got)} results instead of {len(want)}"
    return list(zip(want, got, strict=True))


def _copied(inputs: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]  # a graph may write into them


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
    return f"{int((a != b).sum())} of {a.numel()} elements, by {float((a.double() - b.double()).abs().max()):.3g} at most"


def assert_skipped(graph: fx.GraphModule, *inputs: Any, groups: Iterable[str] | None = None) -> frozenset[str]:
    """Reuse may leave out what is guarded: NaN in everything that only reused values need changes no output, up to rounding.

    Args:
        graph: guarded.
        inputs: random ones of the graph's types without any.
        groups: the groups of slots that are reused; all of them without.

    A graph without a cache guard fails: there is nothing to show.

    Returns the names of the operations that reuse leaves out; none where everything that is guarded is needed for something else too.
    """
    chosen = [n for n in cache_guards(graph.graph) if groups is None or group_of(str(n.args[1])) in set(groups)]
    assert chosen, "nothing is guarded" + ("" if groups is None else f" in the groups {', '.join(sorted(groups))}")
    want, got = unskippable(graph, *(inputs or example_inputs(graph)), groups=groups)
    for i, (a, b) in enumerate(zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True)):
        if isinstance(a, Tensor) and b.is_floating_point() and b.isnan().any() and not a.isnan().any():
            raise AssertionError(f"result {i} needs what reuse leaves out: a value inside a skipped region is read outside it")
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    return frozenset(n.name for n in skipped(graph.graph, None if groups is None else set(groups)))


def assert_round_trip(graph: fx.GraphModule) -> None:
    """The text of the graph is the graph: what it parses to prints as the same text."""
    text = dump(graph)
    again = dump(parse(text))
    if again != text:
        lines = difflib.unified_diff(text.splitlines(), again.splitlines(), "dumped", "parsed and dumped", lineterm="", n=1)
        raise AssertionError("the text of the graph does not parse back:\n" + "\n".join(lines))


def assert_reaches(strategy: Any, outcome: Callable[[Any], Any], tries: int = 200) -> Any:
    """Some value of a hypothesis strategy gives a true outcome: a property says nothing on inputs where a pass has no work.

    Args:
        strategy: such as `residual_nets()`.
        outcome: of one value, for example the number of rewrites or of refusals.

    Returns the first such value.
    """
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis.errors import NoSuchExample

    quick = settings(
        deadline=None, max_examples=tries, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None
    )
    seen: list[Any] = []

    def reached(value: Any) -> bool:
        seen[:] = [value]
        return bool(outcome(value))

    try:
        return find(strategy, reached, settings=quick)
    except NoSuchExample:
        one = next(iter(seen), None)
        raise AssertionError(
            f"the generator never reaches this outcome in {tries} tries; the last of them was {one!r}"
        ) from None


def assert_policy(policy: Policy, num_steps: int = 10, changes: Sequence[float] = (0.1,)) -> list[Plan]:
    """The policy keeps its contract over one generation. Returns the plans of its steps.

    It computes the first step (there is nothing to reuse), never returns a plan that `plans()` does not list, and gives the same
    plans when the same run is replayed.

    Args:
        changes: the relative changes that are measured, one after the other, repeated as needed: one at every computed step but the
            first, or at every step but the first where the policy decides within steps.
    """
    first, again = (_run_policy(policy, num_steps, changes) for _ in range(2))
    listed = policy.plans()
    assert first == again, f"{policy} gives {_texts(again)} on a replay of {_texts(first)}: it keeps state of its own"
    assert not first[0], f"{policy} reuses in the first step, where nothing is stored"
    wrong = [p for p in first if p not in listed]
    assert not wrong, f"{policy} returns {wrong[0]}, which plans() does not list: {_texts(listed)}"
    return first


def _run_policy(policy: Policy, num_steps: int, changes: Sequence[float]) -> list[Plan]:
    given = itertools.cycle(changes)

    @functools.cache  # what the probe of a step saw is what the step observes
    def measured(step: int) -> list[MetricValue] | None:
        if not step:
            return None
        change = next(given)
        return [MetricValue("all/observed", change, change)]

    def observed(step: int, plan: Plan) -> list[MetricValue] | None:
        if not isinstance(plan, Plan):
            raise AssertionError(
                f"{policy} returns {plan!r} for step {step}; a plan is vdcache.Plan() or vdcache.Plan.of([group])"
            )
        return None if plan else measured(step)

    return simulate(policy, num_steps, probed=measured, observed=observed)


def _texts(plans: Iterable[Plan]) -> str:
    return "[" + ", ".join(map(str, plans)) + "]"


def assert_predictor(predictor: AnyPredictor, *, shape: Sequence[int] = (2, 3), steps: int = 4) -> list[Tensor]:
    """The predictor keeps its contract over some computed steps: as many tensors as it says, of the shape of the value; or as many weights
    as there are values, where it is a rule of weights.

    Also where nothing was kept before (`before` holds zeros), and in float32 and bfloat16. Returns what it predicts one
    step after each computed one, in float32: the values are 1, 4, 9, 16 … in every element, one step apart.
    """
    graph, told = graph_of(predictor), numbers_of(predictor)

    def numbers(at: int, computed: int) -> Any:
        """Of a step after `computed` ones."""
        found = told.values(Position(at), [Position(i) for i in reversed(range(computed))])
        assert len(found) == len(told.names), (
            f"{predictor} gives more weights than it keeps values, or than were computed ({computed})"
        )
        return as_told(graph, [torch.tensor(float(n)) for n in found])

    found: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        found.clear()
        kept: Sequence[Tensor] = [torch.zeros(tuple(shape), dtype=dtype)] * graph.tensors
        for i in range(steps):
            fresh = torch.full(tuple(shape), float((i + 1) ** 2), dtype=dtype)
            kept = graph.store(fresh, kept, numbers(i, i))
            assert not isinstance(kept, Tensor), (
                f"'store' of {predictor} gives a tensor; it gives a sequence of them, (fresh,) for one"
            )
            assert len(kept) == graph.tensors, f"{predictor} keeps {len(kept)} tensors and says {graph.tensors}"
            assert all(k.shape == fresh.shape for k in kept), f"{predictor} keeps a tensor of another shape than the value's"
            assert all(k.isfinite().all() for k in kept), f"{predictor} keeps no number after {i + 1} computed steps"
            value = graph.predict(kept, numbers(i + 1, i + 1))
            assert value.shape == fresh.shape, f"{predictor} predicts {tuple(value.shape)} for a value of {tuple(fresh.shape)}"
            assert value.isfinite().all(), f"{predictor} predicts no number after {i + 1} computed steps"
            found.append(value.float())
        if dtype == torch.float32:
            exact = list(found)
    _assert_traceable(predictor, torch.zeros(tuple(shape)))
    return exact


def _assert_traceable(predictor: AnyPredictor, value: Tensor) -> None:
    """Compiled steps hold what a predictor does, not what it did once: it must not ask a tensor for its number."""
    sizes = ",".join(map(str, value.shape))
    text = f"%0 = input() : f32[{sizes}]\n%1 = sin(%0)\n%2 = cache_guard(%1, 'all/x')\nreturn (%2)"
    try:
        for reuse in ((), ("all",)):
            run_pass(Specialise(reuse=frozenset(reuse), predictor=predictor), text)
    except ContractError as error:
        raise AssertionError(str(error)) from error
