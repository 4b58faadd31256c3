"""Does it hold in thousands of cases? The full counts of what `make test` samples.

Rows carry the commit that they were made at. `tests/bench/test_thorough.py` checks that they are there.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter

import torch

from bench.common import Bench, arguments
from tests.support.histories import histories


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--histories", type=int, default=3000),
        lambda p: p.add_argument("--first-seed", type=int, default=0),
    )
    torch.set_num_threads(1)
    bench = Bench("thorough", "every-2 and every-3 on one model")
    call_histories(bench, args.histories, args.first_seed)
    bench.write(args.json)


def commit() -> str:
    """The commit that is checked out, with "+" behind it where files differ from it."""
    made = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "vdcache"], capture_output=True, text=True).stdout.strip()
    return made + ("+" if changed else "")


def call_histories(bench: Bench, count: int, first_seed: int) -> None:
    """Random histories of calls: nothing stale, and reuse in at least 95 % of the calls that may reuse, for each kind of move."""
    may: Counter[str] = Counter()
    did: Counter[str] = Counter()
    stale: list[str] = []
    at, began = commit(), time.perf_counter()
    for number, machine in enumerate(histories(count, first_seed), 1):
        may += machine.may
        did += machine.did
        stale += machine.stale
        if number % 100 == 0:
            print(f"{number} of {count} histories, {len(stale)} stale values, {time.perf_counter() - began:.0f} s", flush=True)
    bench.row(
        f"stale values in {count} random histories", len(stale), "values", "== 0", histories=count, commit=at, stale=stale[:20]
    )
    for kind in sorted(may):
        share = did[kind] / may[kind]
        bench.row(f"reuse where it may be: {kind}", share, "of calls", ">= 0.95", may=may[kind], did=did[kind], commit=at)


if __name__ == "__main__":
    main()
