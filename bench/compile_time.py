"""What does vdcache add to compile time? Every variant of `adacache-fast` against plain torch.compile.

diffusers' Wan transformer, 8 blocks. Cold caches and a fresh process a side, in turn; ratio of medians.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from bench.common import Bench, arguments, median

CHILD = """
import json, sys, time, torch, vdcache
from bench.common import wan, wan_call
model, side = wan(), sys.argv[1]
with torch.no_grad():
    began = time.perf_counter()
    if side == "plain":
        torch.compile(model)(**wan_call(0))
    else:
        fast = vdcache.compile(model, "adacache-fast", num_steps=30)
        fast(**wan_call(0))
        first = time.perf_counter() - began
        fast.vdcache.warm_up()
    total = time.perf_counter() - began
print(json.dumps({"total": total, "first": locals().get("first", total)}))
"""


def once(side: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        done = subprocess.run([sys.executable, "-c", CHILD, side], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    args = arguments(__doc__, lambda p: p.add_argument("--rounds", type=int, default=3))
    import vdcache

    bench = Bench("compile time", str(vdcache.methods.adacache("fast").pipeline))
    plain, cached = [], []
    for _ in range(args.rounds):
        plain.append(once("plain"))
        cached.append(once("vdcache"))
    p, c = median(x["total"] for x in plain), median(x["total"] for x in cached)
    first = median(x["first"] for x in cached)
    bench.row("plain torch.compile, first call", p, "s")
    bench.row("adacache-fast, first call", first, "s")
    bench.row("adacache-fast, all variants", c, "s")
    bench.row("all variants / plain torch.compile", c / p, "ratio", "<= 1.25", aim=1.15, rounds=args.rounds)
    bench.write(args.json)


if __name__ == "__main__":
    main()
