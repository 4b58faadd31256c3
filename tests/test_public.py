"""The parts that other packages are written with, as they are called: who changes one of them changes this page, and the changelog."""

from __future__ import annotations

import dataclasses
import inspect

from expecttest import assert_expected_inline

import vdcache
from vdcache import patterns, testing

PARTS = "Pass PassResult Refusal Pipeline Fact Pattern Match Rewrite Plan Recipe Policy Predictor"


def written(name: str, part: object) -> str:
    """`Name(field, option=…)` and the public methods with their arguments."""
    if not inspect.isclass(part):
        return f"{name}{inspect.signature(part)}" if callable(part) else name
    fields = [
        f"{f.name}{'' if f.default is f.default_factory is dataclasses.MISSING else '='}"
        for f in (dataclasses.fields(part) if dataclasses.is_dataclass(part) else ())
        if not f.name.startswith("_")
    ]
    own = {n: m for k in reversed(part.__mro__[:-1]) if k.__module__.startswith("vdcache") for n, m in vars(k).items()}
    members = []
    for member, value in own.items():
        if member.startswith("_") or member in {f.name for f in dataclasses.fields(part)} if fields else member.startswith("_"):
            continue
        call = value.__func__ if isinstance(value, staticmethod) else value
        given = (
            f"({', '.join(p for p in inspect.signature(call).parameters if p != 'self')})" if inspect.isfunction(call) else ""
        )
        members.append(member + given)
    return "\n    ".join([f"{name}({', '.join(fields)})", *members])


def test_the_parts_of_passes_and_recipes():
    assert_expected_inline(
        "\n".join(written(n, getattr(vdcache, n)) for n in PARTS.split()),
        """\
Pass()
    requires
    ensures
    fixed_sizes
    run(graph)
PassResult(graph, rewrites=, refusals=)
Refusal(node, reasons, graph=, depth=)
    reason
    of_graph(number)
Pipeline(passes, verify=, given=, checked=)
    ensured
    run(graph, copied)
    parse(text, known, given)
Fact(name, problem)
    FUNCTIONAL
    TYPED
    CANONICAL
    GUARDED
    OBSERVED
    PROBED
    PLAIN
Pattern(text)
    names
    match(node)
    find(graph, within)
    closest(graph)
Match(root, values, inside)
    leaks
    check()
Rewrite()
    requires
    ensures
    fixed_sizes
    run(graph)
    why_not(match)
Plan(reuse=)
    of(groups)
Recipe(name, policy, passes=, source=, books=, predictor=, derived=, goal=)
    pipeline
    plans()
    masks
    fixed_sizes
    with_passes(passes)
    with_masks(masks, where)
    hoisting(hoist)
    following(history)
    for_steps(num_steps, said)
    to_json(path)
    from_config(config)
    from_json(text)
Policy()
    plans()
    start(num_steps, before)
    plan(state, step, times)
    observe(state, step, plan, measures)
Predictor()
    tensors
    store(new, previous, step_info)
    predict(cached, step_info)""",
    )


def test_the_facts_of_the_patterns():
    assert_expected_inline(
        "\n".join(written(n, getattr(patterns, n)) for n in ("GraphAnalysis", "Branch", "Attention", "Block", "Stream")),
        """\
GraphAnalysis(branches, timestep_inputs, latent, grid, refusals, streams=, blocks=, attentions=, conditioning=, latents=, flops=, covered=)
    coverage
    denoising_blocks(of)
    denoising_attentions()
    count()
Branch(kind, stream, block, layout, residual_add, base, source, contribution, pre_gate, nodes, attentions=, leaks=, flops=, bytes=, module=, line=, graph=)
    gate
    name
Attention(node, kind, layout, heads, q_len, kv_len, head_dim, form=, spans=, grid=)
Block(index, shape, branches, graph=)
Stream(index, role, shape, dtype, inputs, start, residual_adds, spans=, parents=, graph=)""",
    )


def test_the_testing_kit():
    names = [n for n in testing.__all__ if inspect.isfunction(getattr(testing, n)) or inspect.isclass(getattr(testing, n))]
    lines = []
    for name in names:
        part = getattr(testing, name)
        given = inspect.signature(part).parameters
        lines.append(
            f"{name}({', '.join(('*' if p.kind is p.VAR_POSITIONAL else '') + n + ('=' if p.default is not p.empty else '') for n, p in given.items())})"
        )
    assert_expected_inline(
        "\n".join(lines),
        """\
Case(name, make, call, branches, graphs=, seen=)
Net(branches)
PoisonInterpreter(graph, recorded, dead)
RecordedPass(graph, a_pass, before, after, rewrites, refusals)
RecordingBackend(recipe=, options)
Reference(model, every, steps)
TinyDiT(blocks=, dim=, seed=)
Trial(model, steps, computed=, identical=, flops=, error=, said=)
Trials(iterable=)
assert_bit_identical(before, after, *inputs, named)
assert_close(before, after, *inputs, rtol, atol, named)
assert_pass(a_pass, before, after)
assert_policy(policy, num_steps=, changes=)
assert_predictor(predictor, shape=, steps=)
assert_reaches(strategy, outcome, tries=)
assert_refuses(a_pass, graph, reason)
assert_round_trip(graph)
assert_skipped(graph, *inputs, groups=)
build(case, seed=)
captured(model, *args, kwargs)
dump(graph)
example_inputs(graph, seed=)
guarded(fn, *args, more=, verify=)
latent(seed, *shape, dtype=)
parse(text, constants=)
record_slots(graph, *args)
residual_nets(max_branches=)
run_pass(a_pass, graph)
run_variant(graph, *args, extra=)
time_of(step, dtype=)
trace(fn, *args, dynamic=)
try_recipe(recipe, models=, steps=, tokens=, on_progress=)
values_of(graph, given)
variant(graph, reuse=, predictor=)""",
    )
