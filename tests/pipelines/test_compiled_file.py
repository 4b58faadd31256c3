"""What was compiled goes into a file, and another process with empty caches compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

import vdcache
from vdcache.testing import TinyDiT

# What a process runs: the smallest model, for every kernel is a run of the C++ compiler.
RUN = """
import json, sys, torch, vdcache, vdcache.ir.parse
from torch._dynamo.utils import counters
from vdcache.testing import TinyDiT, latent, time_of

captures = []
module = sys.modules["vdcache.ir.capture"]
real = module.whole_composites
module.whole_composites = lambda: captures.append(1) or real()  # where a graph is traced once more

what, path = sys.argv[1:]
if what == "load":
    vdcache.load_compiled(path)
before = dict(counters["aot_autograd"])
compiled = vdcache.compile(TinyDiT(1), "every-2", num_steps=4)
with torch.no_grad():
    out = [compiled(latent(step), time_of(step), latent(9, 1, 3, 4)).sum().item() for step in range(4)]
if what == "save":
    vdcache.save_compiled(compiled, path)
hits, misses = (counters["aot_autograd"][f"autograd_cache_{kind}"] - before.get(f"autograd_cache_{kind}", 0) for kind in ("hit", "miss"))
print(json.dumps({"hits": hits, "misses": misses, "out": out, "captures": len(captures)}))
"""


def child(what, path, caches):
    """What another process finds.

    Where its folder is empty, Inductor compiles a program to see whether vectors can be compiled: what it sees here holds there.
    """
    known = {"TORCHINDUCTOR_VEC_ISA_OK": str(int(bool(pick_vec_isa()))), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    env = {**os.environ, **known, "TORCHINDUCTOR_CACHE_DIR": str(caches), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, what, str(path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_another_process_with_empty_caches_finds_every_graph(tmp_path):
    """Two variants: what is computed, and what is reused. Inductor's own folder is another one, and empty."""
    saved = child("save", tmp_path / "file", tmp_path / "first")
    loaded = child("load", tmp_path / "file", tmp_path / "second")
    assert (saved["hits"], saved["misses"]) == (0, 2)
    assert (loaded["hits"], loaded["misses"]) == (2, 0)
    assert (saved["captures"], loaded["captures"]) == (1, 0)
    assert loaded["out"] == saved["out"]


def test_a_file_that_does_not_fit_is_refused_with_its_reason(tmp_path):
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("vdcache.json", json.dumps({"vdcache": vdcache.__version__, "torch": "1.0", "device": "abacus"}))
        file.writestr("artifacts", b"")
    with pytest.raises(
        vdcache.errors.ConfigError, match=f"torch 1.0 there, {torch.__version__.replace('+', '.')} here.*device abacus"
    ):
        vdcache.load_compiled(path)
    (tmp_path / "text").write_text("no zip")
    for wrong in (tmp_path / "text", tmp_path / "nothing"):
        with pytest.raises(vdcache.errors.ConfigError, match="is no file of save_compiled"):
            vdcache.load_compiled(wrong)


def test_what_was_not_called_or_not_compiled_by_vdcache_is_told(tmp_path):
    compiled = vdcache.compile(TinyDiT(), "every-2", num_steps=4, inner="eager")
    with pytest.raises(vdcache.errors.CacheStateError, match="it was not called yet: call it once"):
        vdcache.save_compiled(compiled, tmp_path / "file")
    with pytest.raises(vdcache.errors.ConfigError, match="vdcache is not applied to this TinyDiT"):
        vdcache.save_compiled(TinyDiT(), tmp_path / "file")
    assert not (tmp_path / "file").exists()
