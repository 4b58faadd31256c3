"""Does a configuration of vdcache's own attention kernel spill registers? Compiled ahead of time, no GPU is needed.

Every configuration that `vdcache.attention.kernel_configs` lists, and those that were considered, for the head dimensions and biases that
differ in code, is compiled for sm_80, sm_89, sm_90 and sm_100 and disassembled. A row holds the registers of a thread, the bytes of its
stack (what is spilled lies there) and the shared memory of a block. Rows carry the hash of the kernel's source: `make test` fails where
the kernel was changed and the rows were not made again.

    python -m bench.kernels --json bench/results/kernels.json        (about 15 minutes on one core)
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import Bench, arguments
from vdcache.attention import kernel_configs
from vdcache.attention.kernel_configs import CONFIGS, FLOAT, Config

SOURCE = Path(kernel_configs.__file__).with_name("block_sparse.py")
# Considered beside what is listed: by architecture, for head dimensions up to 64 and up to 128.
AMPERE = (
    ((128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (16, 64, 4, 3)),
    ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2), (16, 64, 4, 3)),
)  # fmt: skip
HOPPER = (((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 4, 3)),) * 2
CANDIDATES: dict[int, tuple[tuple[Config, ...], tuple[Config, ...]]] = {80: AMPERE, 89: AMPERE, 90: HOPPER, 100: HOPPER}
# Dtype, head dimension and bias of what is compiled, by whether the head dimension is above 64 and whether there is a bias.
FORMS = {
    (False, False): (("bf16", 64, "none"),),
    (False, True): (("bf16", 64, "added"), ("bf16", 64, "bool")),
    (True, False): (("bf16", 96, "none"), ("bf16", 72, "none"), ("bf16", 128, "none")),
    (True, True): (("bf16", 96, "added"), ("bf16", 96, "bool"), ("bf16", 128, "added")),
}
FLOAT_CANDIDATES: tuple[Config, ...] = ((32, 32, 8, 2), (32, 16, 8, 2), (16, 32, 4, 2), (16, 16, 4, 2))
FLOATS = (("fp32", 128, "added"), ("fp32", 128, "none"), ("fp32", 64, "added"))


def source_hash() -> str:
    """Of the kernel's text without comments and of the constants that it is compiled with; configurations are no part of it."""
    tree = ast.parse(SOURCE.read_text())
    kernel = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_attention")
    constants = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in ("CHUNK", "ROWS", "_ANY")]
    return hashlib.sha256("\n".join(map(ast.dump, (*constants, kernel))).encode()).hexdigest()[:16]


def compiled(arch: int, dtype: str, d: int, bias: str, config: Config, piece: int = 16) -> dict[str, int]:
    """Registers, stack and shared memory of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vdcache.attention.block_sparse import CHUNK, ROWS, _attention

    m, n, warps, stages = config
    constants: dict[str, Any] = {
        "D": d, "BLOCK_D": max(16, 1 << (d - 1).bit_length()), "UNIT": 8, "PIECE": piece, "BIAS": bias, "CHUNK": CHUNK, "ROWS": ROWS,
        "EMULATED": False, "BLOCK_M": m, "BLOCK_N": n,
    }  # fmt: skip
    constants |= {f"{t}_stride_d": 1 for t in ("query", "key", "value", "out")} | ({"bias": None} if bias == "none" else {})
    pointers = dict.fromkeys(("query", "key", "value", "out", "bias"), "*" + dtype)
    pointers |= {"bias": "*u8"} if bias == "bool" else {}
    pointers |= dict.fromkeys(("blocks", "rows", "chunks", "pieces"), "*i32")
    names = _attention.arg_names
    types = {"scale": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        _attention,
        {name: types.get(name, "i32") for name in names},
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers and name not in constants},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": int(made.metadata.shared)}


def wanted() -> Iterator[tuple[int, Config, tuple[tuple[str, int, str], ...], bool]]:
    """Architecture, configuration, what it is compiled for, and whether it is listed."""
    for arch, both in CANDIDATES.items():
        for (wide, biased), forms in FORMS.items():
            listed = CONFIGS[arch, wide, biased]
            for config in dict.fromkeys((*listed, *both[wide])):
                yield arch, config, forms, config in listed
        for config in dict.fromkeys((*FLOAT[arch], *FLOAT_CANDIDATES)):
            yield arch, config, FLOATS, config in FLOAT[arch]


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--arch", type=int, nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES)),
        lambda p: p.add_argument("--listed", action="store_true", help="what is listed alone"),
    )
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("bench.kernels needs Triton, and TRITON_INTERPRET must not be set")
    import triton

    bench = Bench("registers of the attention kernel")
    hashed = source_hash()
    known = {}
    if args.json is not None and args.json.exists():  # what another run has made of the same source is kept
        rows = [r for r in json.loads(args.json.read_text()) if r["source"] == hashed]
        known = {(r["arch"], r["case"]): r for r in rows if r["triton"] == triton.__version__}
        bench.rows += [r for r in rows if r["triton"] != triton.__version__]
    for arch, config, forms, listed in wanted():
        if args.listed and not listed:
            continue
        for dtype, d, bias in forms:
            case = f"sm_{arch}, {dtype}, D={d}, bias {bias}: {'×'.join(map(str, config[:2]))}, {config[2]} warps, {config[3]} stages"
            if (old := known.get((arch, case))) is not None:
                found = {k: old[k] for k in ("registers", "stack", "shared")}
            elif arch in args.arch:
                found = compiled(arch, dtype, d, bias, config)
            else:
                continue
            must = "== 0" if listed else None
            bench.row(
                case, found["stack"], "B", must, arch=arch, dtype=dtype, head_dim=d, bias=bias, config=list(config), listed=listed,
                source=hashed, triton=triton.__version__, **found,
            )  # fmt: skip
            bench.write(args.json)
            if found["stack"] and not listed:
                break  # it is out, whatever the rest needs


if __name__ == "__main__":
    main()
