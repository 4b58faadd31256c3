"""How fast is a reused step, what does observing cost a computed one, and what does vdcache add to a call?

diffusers' Wan transformer, 8 blocks, latents 1×16×5×32×32, text 1×64×256; plain torch.compile and vdcache side by side in one
run, medians.
"""

from __future__ import annotations

from typing import Any

import torch

import vdcache
from bench.common import Bench, arguments, median, timed, wan, wan_call
from vdcache.methods.recipe import Recipe
from vdcache.policies import EveryN

ROUNDS = 15


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--blocks", type=int, default=8, help="of the model; the committed rows are of 8"),
        lambda p: p.add_argument("--rounds", type=int, default=ROUNDS, help="how many times each kind of call is timed"),
        lambda p: p.add_argument("--inner", default="inductor", help="eager finds bugs of this script; its times mean nothing"),
    )
    torch._dynamo.reset()
    model = wan(args.blocks)
    fast = vdcache.methods.adacache("fast")
    # AdaCache's passes under a fixed schedule: computed with observation, then reused, in turn.
    turn = Recipe("adacache-in-turn", EveryN(2), fast.passes)
    plain = torch.compile(model, backend=args.inner)
    cached = vdcache.compile(model, turn, num_steps=10_000, inner=args.inner)
    bench = Bench("steps", str(fast.pipeline))
    with torch.no_grad():
        plain(**wan_call(0))
        cached(**wan_call(0))
        cached(**wan_call(1))
        session = cached.vdcache
        program = session.graphs[0]
        session.begin(10_000)
        times: dict[str, list[float]] = {"plain": [], "computed": [], "reused": []}
        for i in range(args.rounds):
            call = wan_call(i)
            times["plain"].append(timed(lambda: plain(**call)))
            for kind in ("computed", "reused"):
                session.step()
                times[kind].append(timed(lambda: cached(**call)))
                assert session.history[-1].computed == (kind == "computed")
        p, c, r = (median(times[k]) for k in ("plain", "computed", "reused"))
        bench.row("reuse step / computed step", r / c, "ratio", "<= 0.025", seconds=r)
        paired = median([b / a for a, b in zip(times["plain"], times["computed"], strict=True)])
        bench.row("computed step with observation / plain compiled step", paired, "ratio", "<= 1.02", seconds=c, plain=p)

        bench.row(
            "host time added to a reuse call",
            1e6 * added_seconds(program, session, explicit=True),
            "us",
            "<= 100",
            door="explicit control",
        )
        bench.row(
            "host time added to a reuse call, step tracker",
            1e6 * added_seconds(program, session, explicit=False),
            "us",
            "<= 100",
            door="bare",
        )

        # The CPU stands in for a device: every value that the step tracker or the policy reads would be one sync there.
        session.begin(100)
        for step in range(4):
            session.step()
            cached(**wan_call(step))
        explicit = max(r.syncs for r in session.history.records[-4:])
        bench.row("device syncs of a reuse call, explicit control", explicit, "syncs", "== 0")
        bench.row("device syncs of a reuse call, bare door", device_syncs(cached), "syncs", "<= 1")

        adaptive = vdcache.compile(model, fast, num_steps=30, inner="eager")
        adaptive(**wan_call(0))
        kept = adaptive.vdcache.graphs[0].variants.cache_bytes()
        stream = 5 * 16 * 16 * 384 * 4
        bench.row(
            "cached bytes, adacache-fast, one lane",
            kept / stream,
            "streams",
            "<= 2",
            bytes=kept,
            two_a_block=2 * args.blocks * stream,
        )
    bench.write(args.json)


def added_seconds(program: Any, session: Any, explicit: bool) -> float:
    """Host time of a reuse call around a variant that does nothing."""
    from vdcache.ir.edit import inputs as graph_inputs
    from vdcache.policies import Plan
    from vdcache.runtime import registry

    fakes = [n.meta["val"] for n in graph_inputs(program.guarded.captured.graph.graph)]
    inputs = [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in fakes]
    part = program.variants[Plan.of(["all"])]
    result = [torch.zeros(1)] * part.io.results
    kept, policy, prepare = part._compiled[()], session.policy, session.prepare
    session.prepare = None
    part._compiled[()] = lambda *a: result
    timestep = program.inputs.timesteps[0]
    times = []
    try:
        session.policy = EveryN(100_000)  # one computed step, then reuse
        with registry.using(session):
            session.begin(100_000)
            for step in range(1000):
                inputs[timestep] = torch.tensor([100_000 - step])
                if explicit:
                    session.step()
                times.append(timed(lambda: program(*inputs)))
    finally:
        part._compiled[()], session.policy, session.prepare = kept, policy, prepare
    return median(times[1:])


def device_syncs(cached: Any) -> int:
    """Syncs of one reuse call through the bare door, as they would be on an accelerator: reads of device values, batched."""
    counted = []
    reads = cached.vdcache._reads
    real = reads.read

    def counting(values: Any) -> Any:
        # what has been brought over already is float64, and reading it waits for nothing
        counted.append(int(any(v.dtype != torch.float64 for v in values)))
        return real(values)

    reads.read, reads.waits = counting, lambda values: True
    session = cached.vdcache
    try:
        session.begin(100)
        for step in range(4):
            counted.clear()
            cached(**wan_call(step))
        assert not session.history[-1].computed
        return sum(counted)
    finally:
        del reads.read, reads.waits


if __name__ == "__main__":
    main()
