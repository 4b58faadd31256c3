"""What a user's generations take while `vdcache-auto` searches, over an uncached one, side by side.

The trained model, 30 steps, one video a generation, compiled before. Each generation that calibrates stands between two uncached ones
(recipe `always`), and its time is over their median.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import vdcache
from bench.common import Bench, arguments, median, timed
from vdcache.demo.data import random_conditions
from vdcache.demo.run import quality
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model

STEPS = 30
MOST = 60  # generations


class _Enough(Exception):
    pass


def main() -> None:
    args = arguments(__doc__, lambda p: p.add_argument("--inner", default="inductor"))
    model, conditions = load_model(), random_conditions(1, torch.Generator().manual_seed(77))
    bench = Bench("calibrating", str(vdcache.methods.auto().pipeline))

    def run(way: Callable[..., Any], seed: int) -> torch.Tensor:
        return sample(way, conditions, steps=STEPS, seed=seed)

    def compiled(way: Any) -> Any:
        """A generation that is cut short: every variant is compiled, and nothing is taught."""
        calls = 0

        def call(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise _Enough
            return way(*given, **named)

        try:
            run(call, 5)
        except _Enough:
            way.vdcache.warm_up()
        return way

    for name, share in (("in pieces", 0.1), ("all at once", math.inf)):
        torch._dynamo.reset()
        plain = compiled(vdcache.compile(model, "always", num_steps=STEPS, inner=args.inner))
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VDCACHE_CACHE_DIR"] = folder  # else it would know the schedule already
            way = compiled(vdcache.compile(model, num_steps=STEPS, inner=args.inner, search_share=share))
            uncached, over, shares, searched, followed = [timed(lambda: run(plain, 0))], [], [], 0.0, []
            for seed in range(MOST):
                over.append(timed(lambda seed=seed: run(way, seed)))
                uncached.append(timed(lambda: run(plain, 0)))
                over[-1] /= median(uncached[-2:])
                found, going = way.vdcache.calibration, sum(s.seconds for s in way.vdcache.recorder._searches.values())
                shares.append(((going or found.seconds) - searched) / median(uncached))
                searched = going or found.seconds
                followed.append(len(way.vdcache.history.computed_steps()))
                if not found.tentative and seed:
                    break
            quality_of = {n: quality(run(way, n), run(model, n))[0] for n in (101, 102)} if share < math.inf else {}
            del os.environ["VDCACHE_CACHE_DIR"]
        must = "<= 1.1" if share < math.inf else None
        bench.row(f"first generation over uncached, search {name}", over[0], "times", must, search_share=str(share))
        if share < math.inf:
            bench.row("what the search adds to a later generation, median", median(shares[1:]), "of one", "<= 0.1", each=shares)
            bench.row("the same, at most", max(shares[1:]), "of one", None)
            bench.row("generations until the search is over", len(over), "", None, over=over, computed=followed)
            bench.row("computed steps of the second generation", followed[1], "steps", None)
            bench.row(
                "PSNR of later videos",
                sum(quality_of.values()) / len(quality_of),
                "dB",
                ">= 30",
                computed=list(found.schedule.computed),
            )
        bench.row(f"second generation over uncached, search {name}", over[1], "times", None)
        bench.write(args.json)


if __name__ == "__main__":
    main()
