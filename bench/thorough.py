"""Does it hold in thousands of cases? The full counts of what `make test` samples.

Rows carry the commit that they were made at. `tests/bench/test_thorough.py` checks that they are there.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections import Counter

import torch

from bench.common import Bench, arguments
from tests.support.exact_histories import exact_histories
from tests.support.histories import histories
from tests.support.rank_programs import ENDS, FAULTS, OTHER_FAULTS
from tests.support.ranks import RankProcesses

SHARD = 40  # histories that one process plays in a row: as many as share their compiled models


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--histories", type=int, default=3000),
        lambda p: p.add_argument("--edges", type=int, default=500, help="runs on two ranks"),
        lambda p: p.add_argument(
            "--exact-histories", type=int, default=2000, help="under exact, and under a cache that holds values"
        ),
        lambda p: p.add_argument("--first-seed", type=int, default=0),
        lambda p: p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes"),
    )
    bench = Bench("thorough", "every-2 and every-3 on one model")
    call_histories(bench, args.histories, args.first_seed, args.workers)
    equal_plans(bench, args.edges)
    planted_faults(bench)
    held_values(bench, args.exact_histories, args.first_seed, args.workers)
    bench.write(args.json)


def commit() -> str:
    """The commit that is checked out, with "+" behind it where files differ from it."""
    made = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "vdcache"], capture_output=True, text=True).stdout.strip()
    return made + ("+" if changed else "")


def call_histories(bench: Bench, count: int, first_seed: int, workers: int) -> None:
    """Random histories of calls: nothing stale, and reuse in at least 95 % of the calls that may reuse, for each kind of move."""
    may: Counter[str] = Counter()
    did: Counter[str] = Counter()
    stale: list[str] = []
    at, began, played = commit(), time.perf_counter(), 0
    shards = [(min(SHARD, count - n), first_seed + n) for n in range(0, count, SHARD)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for number, own_may, own_did, own_stale in pool.imap_unordered(_play, shards):
            may += own_may
            did += own_did
            stale += own_stale
            played += number
            print(f"{played} of {count} histories, {len(stale)} stale values, {time.perf_counter() - began:.0f} s", flush=True)
    bench.row(
        f"stale values in {count} random histories", len(stale), "values", "== 0", histories=count, commit=at, stale=stale[:20]
    )
    for kind in sorted(may):
        share = did[kind] / may[kind]
        bench.row(f"reuse where it may be: {kind}", share, "of calls", ">= 0.95", may=may[kind], did=did[kind], commit=at)


def equal_plans(bench: Bench, count: int) -> None:
    """Two ranks whose thresholds are within 1e-6 of one of their metrics: the plans are equal at every seed."""
    unequal, runs, at = 0, 0, commit()
    with RankProcesses(2) as pair:
        for kind in ("adacache", "teacache"):
            for first in range(0, count // 2, 25):
                seeds = list(range(first, min(first + 25, count // 2)))
                one, other = pair.run("tests.support.rank_programs:at_the_edge", kind, seeds, timeout=600)
                unequal += sum(a != b for a, b in zip(one["plans"], other["plans"], strict=True))
                runs += len(one["plans"])
                print(f"{runs} of {count} runs at the edge of a threshold, {unequal} unequal plans", flush=True)
    bench.row("unequal plans on two ranks at the edge of a threshold", unequal, "runs", "== 0", runs=runs, commit=at)


def planted_faults(bench: Bench) -> None:
    """One rank differs or fails: the plans stay equal, or the ranks end within their timeouts (5 s, and 8 s of gloo's) and say why."""
    wrong, at = [], commit()
    pair = RankProcesses(2, patience=8)
    for name in (*OTHER_FAULTS, *FAULTS):
        one, other = pair.run("tests.support.rank_programs:fault", name, timeout=150)
        ends = name in ENDS
        clear = one is not None and (("rank 1" in one["error"].lower()) if ends else one["error"] == other["error"] == "")
        # A rank that loses its place counts its steps otherwise, or its history is gone: its plans are those that it reused.
        if not clear or one["seconds"] > 15 or (not ends and len(one["reused"]) < len(other["reused"])):
            wrong.append(name)
        print(f"{name}: {'wrong' if name in wrong else 'right'}", flush=True)
        if ends:
            pair.__exit__()
            pair = RankProcesses(2, patience=8)
    pair.__exit__()
    bench.row(
        f"planted faults of {len(FAULTS) + len(OTHER_FAULTS)} that hang, or end unclearly",
        len(wrong),
        "faults",
        "== 0",
        wrong=wrong,
        commit=at,
    )


def held_values(bench: Bench, count: int, first_seed: int, workers: int) -> None:
    """Random histories of models whose values are held across generations: every computed step is the untouched model."""
    stale: list[str] = []
    at = commit()
    calls: Counter[str] = Counter()
    shards = [(min(SHARD, count - n), first_seed + n) for n in range(0, count, SHARD)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for own_calls, own_stale in pool.imap_unordered(_play_exact, shards):
            calls += own_calls
            stale += own_stale
    bench.row(
        f"wrong values in {count} random histories under exact",
        len(stale),
        "values",
        "== 0",
        histories=count,
        calls=dict(calls),
        commit=at,
        stale=stale[:20],
    )


def _play_exact(shard: tuple[int, int]) -> tuple[Counter[str], list[str]]:
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()
    stale: list[str] = []
    for machine in exact_histories(*shard):
        calls += machine.calls
        stale += machine.stale
    return calls, stale


def _play(shard: tuple[int, int]) -> tuple[int, Counter[str], Counter[str], list[str]]:
    """Some histories in a process of their own: how many, in which calls something may be reused and was, what was stale."""
    torch.set_num_threads(1)
    may: Counter[str] = Counter()
    did: Counter[str] = Counter()
    stale: list[str] = []
    for machine in histories(*shard):
        may += machine.may
        did += machine.did
        stale += machine.stale
    return shard[0], may, did, stale


if __name__ == "__main__":
    main()
