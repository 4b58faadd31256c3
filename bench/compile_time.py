"""What does compiling cost? Every variant of `adacache-fast` against plain torch.compile, by the number of blocks.

diffusers' Wan transformer. A fresh process for each side, in turn, one compile thread; CPU seconds of the main process are compared, those
of the C++ compilers stand beside them. Cold: every cache is empty. Warm: a second process finds what the first has left on disk. Imports
are counted on neither side, vdcache's own stand beside the warm row; and what was imported is not looked through for garbage, because whether
Python does so once more in these seconds is chance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from typing import Any

from bench.common import Bench, arguments, median

CHILD = """
import gc, json, resource, sys, torch, vdcache
from bench.common import wan, wan_call
torch.set_num_threads(1)

def spent():
    return [u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))]

side, blocks = sys.argv[1], int(sys.argv[2])
model = wan(blocks)
begun = spent()
vdcache.compile  # imports most of vdcache
imports = spent()[0] - begun[0]
gc.collect()
gc.freeze()
with torch.no_grad():
    before = spent()
    if side == "plain":
        torch.compile(model)(**wan_call(0))
    else:
        compiled = vdcache.compile(model, "adacache-fast", num_steps=30, outline="auto" if side == "outlined" else False)
        compiled(**wan_call(0))
        compiled.vdcache.warm_up()
    own, children = (b - a for a, b in zip(before, spent()))
print(json.dumps({"own": own, "children": children, "imports": imports}))
"""


def once(side: str, blocks: int, folder: str) -> dict[str, float]:
    """CPU seconds of one process, which keeps its caches in a folder."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, side, str(blocks)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    args = arguments(__doc__, _more)
    import vdcache

    bench = Bench("compile time", str(vdcache.methods.adacache("fast").pipeline))
    sides = ("plain", "outlined", *(("flat",) if args.flat else ()))
    cold: dict[tuple[str, int], float] = {}
    for blocks in args.blocks:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                with tempfile.TemporaryDirectory() as folder:
                    found[side].append(once(side, blocks, folder))
        for side in sides:
            cold[side, blocks] = seconds = median(x["own"] for x in found[side])
            more: dict[str, Any] = {"children": median(x["children"] for x in found[side]), "rounds": args.rounds}
            bench.row(f"{blocks} blocks, {side}", seconds, "CPU s", **more)
        ratio = cold["outlined", blocks] / cold["plain", blocks]
        bench.row(f"{blocks} blocks, outlined / plain", ratio, "ratio", MUST.get(blocks))
        bench.write(args.json)  # 40 blocks take minutes, and what was measured is not lost with them
    for few, many in pairwise(args.blocks):
        slopes = {side: (cold[side, many] - cold[side, few]) / (many - few) for side in ("plain", "outlined")}
        ratio = slopes["outlined"] / slopes["plain"]
        bench.row(f"a block more, {few} to {many} blocks, outlined / plain", ratio, "ratio", "<= 0.2", **slopes)
    warm: dict[str, list[dict[str, float]]] = {"plain": [], "outlined": []}
    with tempfile.TemporaryDirectory() as folder:
        for side in warm:  # a folder each
            once(side, args.blocks[0], f"{folder}/{side}")
        for _ in range(max(args.rounds, WARM)):
            for side, found_warm in warm.items():
                found_warm.append(once(side, args.blocks[0], f"{folder}/{side}"))
    seconds = {side: median(x["own"] for x in rows) for side, rows in warm.items()}
    ratio = seconds["outlined"] / seconds["plain"]
    more = {"imports": median(x["imports"] for x in warm["outlined"]), "rounds": max(args.rounds, WARM)}
    bench.row(f"{args.blocks[0]} blocks, warm start, outlined / plain", ratio, "ratio", "<= 1.1", **seconds, **more)
    bench.write(args.json)


WARM = 3  # starts of each side, at least
MUST = {8: "<= 0.6", 16: "<= 0.45", 40: "<= 0.3"}


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 40], help="of the model, ascending")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side")
    parser.add_argument("--flat", action="store_true", help="also with every block compiled on its own")


if __name__ == "__main__":
    main()
