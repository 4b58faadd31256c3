"""Equal seed, schedule and recipe give equal output in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from vdcache import Schedule

ROOT = Path(__file__).parents[2]

PROCESS = """
import hashlib, json, sys
from pathlib import Path

import torch, vdcache
from tests.calibration.samplers import OTHER, TEXT, generate
from vdcache.testing import TinyDiT

pinned = vdcache.Schedule.from_json(Path(sys.argv[1])).recipe()
found = {}
for name, recipe in {"pinned": pinned, "again": vdcache.Recipe.from_json(pinned.to_json()), "adaptive": vdcache.methods.adacache([(1e9, 3)])}.items():
    torch._dynamo.reset()
    fast = vdcache.compile(TinyDiT(blocks=1), recipe, num_steps=8, inner=sys.argv[2])
    latents = [generate(fast, seed, texts=(TEXT, OTHER)) for seed in (1, 2, 1)]
    assert torch.equal(latents[0], latents[2])
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in latents)).hexdigest()
    found[name] = digest, fast.vdcache.history.computed_steps()
print(json.dumps(found))
"""


def test_two_processes_give_the_same_bits(tmp_path, monkeypatch, capsys):
    """This one, and another one with another order of sets: they share nothing but the file of the schedule."""
    Schedule(8, (0, 2, 5)).to_json(tmp_path / "schedule.json")
    arguments = [str(tmp_path / "schedule.json"), "eager"]
    environment = {"PYTHONHASHSEED": "1", "VDCACHE_CACHE_DIR": str(tmp_path / "there"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    exec(PROCESS, {})
    first, second = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert first == second
    assert first["pinned"] == first["again"] and first["pinned"][1] == [0, 2, 5]
    for cache in ("there", "here"):
        assert not (tmp_path / cache / "schedules").exists()  # a pinned schedule neither reads nor writes there
