"""What does a step spend on values that depend on the prompt or the timestep alone, and what is gained where they are held?

Shares of FLOPs, weights and bytes of every architecture of the zoo (tiny sizes), with every step compared with the untouched model bit
for bit; their curve over tokens; models of few steps, 256 latent and 64 text tokens, under Inductor beside plain torch.compile in one run;
the shipped model; host time and compilations that holding adds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import vdcache
from bench.common import Bench, arguments, median, timed, wan
from tests.zoo import ZOO, build
from vdcache.backends.variants import VariantCompiler
from vdcache.demo.weights import load_model
from vdcache.passes import Canonicalise, Pipeline
from vdcache.patterns.invariance import CLASSES, Shares, shares
from vdcache.runtime import registry

STEPS = 4
TOKENS = (64, 256, 1024, 4096)
TEXT = 64
PARTS = ("host", "models", "demo", "curve", "shares")


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--only", choices=PARTS, action="append", help="parts; again for more. Default: all"),
        lambda p: p.add_argument("--models", nargs="*", default=list(ZOO), help="of the zoo. Default: all"),
        lambda p: p.add_argument("--rounds", type=int, default=7, help="how many times each generation is timed"),
        lambda p: p.add_argument("--inner", default="inductor", help="eager finds bugs of this script; its times mean nothing"),
    )
    bench = Bench("exact", str(vdcache.methods.recipe("exact").pipeline))
    parts = args.only or PARTS
    with torch.no_grad():
        if "host" in parts:
            host(bench)
        if "models" in parts:
            for name, make in MODELS.items():
                few_steps(bench, name, *make(256), STEPS, args.rounds, args.inner)
        if "demo" in parts:
            demo(bench, args.rounds, args.inner)
        if "curve" in parts:
            curve(bench)
        if "shares" in parts:
            zoo(bench, args.models)
    bench.write(args.json)


# ---- shares ------------------------------------------------------------------------------------------------------------


def _value(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def zoo(bench: Bench, names: list[str]) -> None:
    """Every architecture: what of it is held, and that each step is the untouched model."""
    differing, looked_at, failed = [], 0, []
    for name in names:
        torch._dynamo.reset()
        model, case = build(name), ZOO[name]
        compiled = vdcache.compile(model, "exact", num_steps=STEPS, inner="eager")
        try:
            same = True
            for step in (*range(STEPS), *range(STEPS)):
                same &= torch.equal(_value(compiled(**case.call(step, 6))), _value(model(**case.call(step, 6))))
        except Exception as error:  # noqa: BLE001 — an architecture that Dynamo or capture does not take is a row too
            failed.append(f"{name}: {type(error).__name__}")
            continue
        looked_at += 1
        if not same:
            differing.append(name)
        graphs = [Pipeline((Canonicalise(),)).run(g.guarded.captured.graph)[0] for g in compiled.vdcache.graphs]
        found = sum(map(shares, graphs), Shares())
        held = sum(len(g.side.groups and [n for x in g.side.groups for n in x.values]) for g in compiled.vdcache.graphs)
        bench.row(
            f"{name}: FLOPs that depend on no latent", _without_latent(found, "flops"), "of all", **_details(found), held=held
        )
    bench.row("architectures of which a step is not the untouched model", len(differing), "models", "== 0", names=differing)
    bench.row("architectures looked at", looked_at, "models", failed=failed)


def _without_latent(found: Shares, what: str) -> float:
    return 1 - dict(found.of(what))["latent"]


def _details(found: Shares) -> dict[str, dict[str, float]]:
    return {what: {k: round(v, 4) for k, v in found.of(what)} for what in ("flops", "weights", "values")}


def curve(bench: Bench) -> None:
    """The same weights, from few tokens to many."""
    for name, make in MODELS.items():
        for tokens in TOKENS:
            model, call = make(tokens)
            torch._dynamo.reset()
            found = vdcache.explain(model, **call(0, 0)).shares
            held = sum(dict(found.of("flops"))[k] for k in CLASSES[:3])
            bench.row(f"{name}, {tokens} + {TEXT} tokens: FLOPs that exact holds", held, "of all", **_details(found))


# ---- models of few steps -----------------------------------------------------------------------------------------------

Call = Callable[[int, int], dict[str, Any]]


@functools.cache
def _words(prompt: int, *shape: int) -> Tensor:
    """The same object at every step, as pipelines pass it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + prompt))


@functools.cache
def _number(value: float) -> Tensor:
    return torch.tensor([value])


@functools.cache
def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def _noise(step: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@functools.cache
def _ids(tokens: int, axes: int) -> Tensor:
    side = int(tokens**0.5)
    return torch.tensor([[0.0] * (axes - 2) + [float(i), float(j)] for i, j in itertools.product(range(side), range(side))])


def _flux2(tokens: int) -> tuple[nn.Module, Call]:
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=1024,
        axes_dims_rope=(16, 16, 16, 16),
    )
    return model.eval().requires_grad_(False), lambda step, prompt: {
        "hidden_states": _noise(step, 1, tokens, 64),
        "encoder_hidden_states": _words(prompt, 1, TEXT, 1024),
        "timestep": torch.tensor([1.0 - step / STEPS]),
        "img_ids": _ids(tokens, 4),
        "txt_ids": _zeros(TEXT, 4),
        "guidance": _number(4.0),
        "return_dict": False,
    }


def _flux(tokens: int) -> tuple[nn.Module, Call]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=1024,
        pooled_projection_dim=256,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    return model.eval().requires_grad_(False), lambda step, prompt: {
        "hidden_states": _noise(step, 1, tokens, 64),
        "encoder_hidden_states": _words(prompt, 1, TEXT, 1024),
        "pooled_projections": _words(prompt, 1, 256),
        "timestep": torch.tensor([1.0 - step / STEPS]),
        "img_ids": _ids(tokens, 3),
        "txt_ids": _zeros(TEXT, 3),
        "guidance": _number(3.5),
        "return_dict": False,
    }


def _wan(tokens: int) -> tuple[nn.Module, Call]:
    side = int(tokens**0.5)
    return wan(4), lambda step, prompt: {
        "hidden_states": _noise(step, 1, 16, 1, 2 * side, 2 * side),
        "encoder_hidden_states": _words(prompt, 1, TEXT, 256),
        "timestep": torch.tensor([1000 - 1000 * step // STEPS]),
        "return_dict": False,
    }


MODELS: dict[str, Callable[[int], tuple[nn.Module, Call]]] = {"FLUX.2-like": _flux2, "Flux.1-like": _flux, "Wan-like": _wan}


def few_steps(bench: Bench, name: str, model: nn.Module, call: Call, steps: int, rounds: int, inner: str) -> None:
    """A generation by plain torch.compile, eager, and with held values, in turn."""
    torch._dynamo.reset()
    plain = torch.compile(model, backend=inner)
    exact = vdcache.compile(model, "exact", num_steps=steps, inner=inner)
    prompts = itertools.count()
    kinds: dict[str, tuple[Callable[..., Any], Callable[[], int]]] = {
        "plain": (plain, lambda: 0),
        "eager": (model, lambda: 0),
        "same prompt": (exact, lambda: 0),
        "another prompt": (exact, lambda: 1 + next(prompts)),
    }

    def generate(kind: str) -> float:
        run, prompt = kinds[kind]
        number = prompt()
        calls = [call(step, number) for step in range(steps)]
        return timed(lambda: [run(**c) for c in calls])

    for kind in kinds:
        generate(kind)
    with compilations() as compiled:
        times = [{kind: generate(kind) for kind in kinds} for _ in range(rounds)]
    found = vdcache.explain(model, **call(0, 0)).shares
    left = {what: sum(v for k, v in found.of(what) if k in ("both", "latent")) for what in ("flops", "weights")}
    apart = max(float((exact(**call(s, 0))[0] - plain(**call(s, 0))[0]).abs().max()) for s in range(steps))
    for kind in ("same prompt", "another prompt"):
        ratio = median([t[kind] / t["plain"] for t in times])
        bench.row(
            f"{name}, {steps} steps, {kind}: time / plain compile",
            ratio,
            "ratio",
            predicted_by_flops=left["flops"],
            predicted_by_weights=left["weights"],
            over_eager=median([t[kind] / t["eager"] for t in times]),
            seconds=median([t[kind] for t in times]),
            plain=median([t["plain"] for t in times]),
            largest_difference=apart,
            held_bytes=exact.vdcache.invariants.bytes(),
            **_details(found),
        )
    bench.row(f"{name}, {steps} steps: graphs compiled after the first generations", len(compiled), "graphs", "== 0")


@contextmanager
def compilations() -> Iterator[list[Any]]:
    """What vdcache compiles inside."""
    found: list[Any] = []
    real = VariantCompiler.compile

    def counting(self: VariantCompiler, graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return real(self, graph, inputs)

    VariantCompiler.compile = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        VariantCompiler.compile = real  # type: ignore[method-assign]


def demo(bench: Bench, rounds: int, inner: str) -> None:
    """The shipped model, one lane."""
    model = load_model()
    for steps in (30, 4):
        few_steps(
            bench,
            "shipped model",
            model,
            lambda step, prompt, steps=steps: {  # type: ignore[misc]
                "hidden_states": _noise(step, 1, 6, 8, 24, 24),
                "timestep": torch.tensor([1000.0 - 1000.0 * step / steps]),
                "encoder_hidden_states": _words(prompt, 1, 5, 32),
            },
            steps,
            rounds,
            inner,
        )


# ---- what holding adds -------------------------------------------------------------------------------------------------


def host(bench: Bench) -> None:
    """Host time of a call around a graph that does nothing, with held values and without, in turn."""
    model, call = _wan(64)
    ready: dict[str, tuple[Any, Any, list[Any]]] = {}
    for recipe in ("always", "exact"):
        torch._dynamo.reset()
        compiled = vdcache.compile(model, recipe, num_steps=STEPS, inner="eager")
        seen: list[Any] = []
        for step in range(STEPS):
            compiled(**call(step, 0))
        session = compiled.vdcache
        session.recorder = lambda graph, inputs, *rest, seen=seen: seen.append(list(inputs))  # type: ignore[misc]
        for step in range(STEPS):
            compiled(**call(step, 0))
        session.recorder = None
        program = session.graphs[0]
        part = program.variants.recompute
        result = [torch.zeros(1)] * part.io.results
        part._compiled[()] = lambda *a, result=result: result  # type: ignore[misc]
        ready[recipe] = session, program, seen

    def step_seconds(recipe: str) -> float:
        session, program, seen = ready[recipe]
        times = []
        with registry.using(session):
            session.begin(STEPS)
            for inputs in seen:
                session.step()
                times.append(timed(lambda: program(*inputs)))
        return median(times[1:])  # a generation's first step compares weights and prompts

    pairs = [(step_seconds("always"), step_seconds("exact")) for _ in range(500)]
    bench.row(
        "host time that held values add to a step",
        1e6 * median([b - a for a, b in pairs]),
        "us",
        "<= 30",
        always=1e6 * median([a for a, _ in pairs]),
        exact=1e6 * median([b for _, b in pairs]),
    )


if __name__ == "__main__":
    main()
