"""The kernel's sizes of blocks: none spills on any architecture, as far as committed rows of the kernel as it is now tell."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import vdcache
from bench import kernels
from vdcache.attention.kernel_configs import CONFIGS, FLOAT, configs_for, float_configs

ROOT = Path(vdcache.__file__).parents[1]
ROWS = ROOT / "bench" / "results" / "kernels.json"
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a block may have


def rows():
    return json.loads(ROWS.read_text())


def test_the_rows_are_of_the_kernel_as_it_is():
    """They are made again by `python -m bench.kernels --json bench/results/kernels.json`."""
    assert {r["source"] for r in rows()} == {kernels.source_hash()}


PINNED = "3.9.0"


def test_no_listed_configuration_spills():
    """By the pinned Triton, all of them; by others, as far as they were compiled: which registers suffice is a matter of the compiler."""
    found = {(r["triton"], r["arch"], r["dtype"], r["head_dim"], r["bias"], tuple(r["config"])): r for r in rows()}
    for arch, config, forms, listed in kernels.wanted():
        for form, triton in itertools.product(forms if listed else (), {r["triton"] for r in rows()}):
            row = found.get((triton, arch, *form, config))
            assert row is not None or triton != PINNED, (arch, form, config)
            if row is not None:
                assert row["stack"] == 0 and 0 < row["registers"] <= 255 and row["shared"] <= SHARED[arch], row["case"]


def test_the_hash_is_of_the_kernel_and_not_of_its_comments(tmp_path, monkeypatch):
    text, copy = kernels.SOURCE.read_text(), tmp_path / "block_sparse.py"
    hashes = []
    for old, new in (
        ("", ""),
        ("# Tokens are 64 bits wide", "# Tokens are wide"),
        ("tl.exp2(scores - ", "tl.exp(scores - "),
        ("CHUNK = 128", "CHUNK = 64"),
    ):
        copy.write_text(text.replace(old, new) if old else text)
        monkeypatch.setattr(kernels, "SOURCE", copy)
        hashes.append(kernels.source_hash())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


@pytest.mark.parametrize(("arch", "wide", "biased"), CONFIGS)
def test_every_length_of_lists_has_a_configuration(arch, wide, biased):
    for longest in (16, 32, 64, 128):
        found = configs_for(arch, 128 if wide else 64, biased, longest)
        assert found and all(c in CONFIGS[arch, wide, biased] and c[0] <= longest for c in found)
    assert max(c[0] for c in found) == max(c[0] for c in CONFIGS[arch, wide, biased])


@pytest.mark.parametrize(("capability", "arch"), [(75, 80), (80, 80), (86, 80), (89, 89), (90, 90), (100, 100), (120, 100)])
def test_an_architecture_without_lists_takes_those_of_the_one_before(capability, arch):
    assert configs_for(capability, 128, False, 128) == configs_for(arch, 128, False, 128)
    assert float_configs(capability) == FLOAT[arch]


def test_sizes_fit_the_tables():
    """Chunks and lists are cut in 128, pieces in 16."""
    for rows_, keys, warps, stages in itertools.chain(*FLOAT.values(), *CONFIGS.values()):
        assert 128 % rows_ == 0 == 128 % keys and min(rows_, keys) >= 16 and warps in (4, 8) and stages in (2, 3)
