"""Which lowering of attention under a mask is the fastest here: measured once per device, mask and size, kept in memory and on disk."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcache.attention import triton
from vdcache.attention.merged import why_not_merged
from vdcache.attention.tiles import LOWERINGS, TileMask
from vdcache.attention.timing import seconds_of
from vdcache.errors import ConfigError
from vdcache.util.files import cache_folder, write_aside

__all__ = ["TuningResult", "autotune", "measure"]

ENOUGH = 0.9  # of what the mask could save at most: no other lowering can be much faster
LONGEST = 20e12  # FLOPs of one dense call beyond which nothing is measured on a CPU
MOST = 1 << 30  # bytes of queries, keys and values that are made to measure on; of larger ones only some heads are
_known: dict[tuple[Path, str], TuningResult] = {}  # what this process has measured or read, by file and form


@dataclass(frozen=True)
class TuningResult:
    """What was measured.

    Args:
        lowering: the fastest.
        seconds: of each lowering, and of "dense": scaled_dot_product_attention without a mask.
        density: the share of weights that the mask keeps.
    """

    lowering: str
    seconds: dict[str, float]
    density: float

    @property
    def speedup(self) -> float:
        """Over dense attention without a mask; 1 where nothing was measured."""
        return self.seconds["dense"] / self.seconds[self.lowering] if self.seconds else 1.0

    @property
    def of_ideal(self) -> float:
        """The speed-up as a share of what the mask could save at most."""
        return self.speedup * self.density


def autotune(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, on: TileMask, scale: float | None, *, again: bool = False
) -> TuningResult:
    """The fastest lowering for operands of this form; measured now if it is not known yet.

    It is measured on random tensors: no value of the caller's is read, and no random generator but its own is used. Large operands, and those
    for which the memory is not enough, are measured on a part of their heads and then of their batch. Where there is no memory even for one
    head, the answer is a gather, nothing is measured and nothing is kept.

    Args:
        query, key, value, bias: real or fake tensors: only their form counts.
        again: measure even if it is known.
    """
    name = _key(query, key, value, bias, on)
    at = _path(), name
    if not again and (kept := _known.get(at) or _choice(_read().get(name))) is not None:
        _known[at] = kept
        return kept
    found = _measured(query, key, value, bias, on, scale)
    if found.seconds:
        _known[at] = found  # also where the folder cannot be written to
        _write(name, found)
    return found


def _measured(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, on: TileMask, scale: float | None
) -> TuningResult:
    """`measure` on random tensors of this form, as many heads and samples of it as there is memory for."""
    batch, heads = query.shape[0], key.shape[1]
    whole = sum(t.numel() * t.element_size() for t in (query, key, value))
    heads_ = max(1, min(heads, MOST * heads // max(whole, 1)))
    batch_ = batch if heads_ > 1 or heads == 1 else max(1, min(batch, MOST * batch * heads // max(whole, 1)))
    while True:
        share = (batch * heads) / (batch_ * heads_)
        try:
            found = measure(*_operands(query, key, value, bias, batch_, heads_), on, scale)
            return replace(found, seconds={n: s * share for n, s in found.seconds.items()})
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        if heads_ == batch_ == 1:
            return TuningResult("gather", {}, on.density)
        batch_, heads_ = (batch_, heads_ // 2) if heads_ > 1 else (batch_ // 2, 1)


def _operands(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, batch: int, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random tensors of the form of these, of so many samples and heads of the keys."""
    draw = torch.Generator(device=query.device).manual_seed(0)
    group = query.shape[1] // key.shape[1]  # queries that share a head of the keys

    def part(like: Tensor, heads: int) -> Tensor:
        return _random(like, (min(like.shape[0], batch), min(like.shape[1], heads), *like.shape[2:]), draw)

    own = None if bias is None else part(bias, heads * group)
    return part(query, heads * group), part(key, heads), part(value, heads), own


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device, by its type; of the CPU, torch raises a RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def measure(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    on: TileMask,
    scale: float | None,
    *,
    every: bool = False,
) -> TuningResult:
    """Time the lowerings on these tensors; those that cannot win any more are left out unless `every` is asked for."""
    if query.device.type == "cpu" and 4 * query.numel() * query.shape[-2] > LONGEST:
        return TuningResult("gather", {}, on.density)
    gqa = query.shape[1] != key.shape[1]

    def dense(*_: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=gqa)

    def run(name: str) -> Callable[[], Tensor]:
        lowering = LOWERINGS[name]
        return lambda: lowering(query, key, value, on, scale, bias)

    with torch.no_grad():
        first = dict(zip(("dense", "gather"), seconds_of([dense, run("gather")], query.device), strict=True))
        found = TuningResult("gather", first, on.density)
        if found.of_ideal >= ENOUGH and not every:
            return found
        rest = [n for n in LOWERINGS if n != "gather" and _can(n, on, query.device)]
        ready = []
        for name in rest:
            try:
                run(name)()
                ready.append(name)
            except Exception:  # noqa: BLE001 — a kernel that cannot run here is not chosen
                continue
        times = seconds_of([dense, run("gather"), *map(run, ready)], query.device)
    seconds = dict(zip(("dense", "gather", *ready), times, strict=True))
    return TuningResult(min(("gather", *ready), key=seconds.__getitem__), seconds, on.density)


def _can(name: str, on: TileMask, device: torch.device) -> bool:
    if name == "masked":  # a matrix of all queries × all keys
        return on.tokens <= 4096
    if name == "merged":
        return not why_not_merged(on)
    # interpreted, the kernel of our own is for tests
    return name != "triton" or (device.type == "cuda" and triton.available(device))


def _random(like: Tensor, shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """A random tensor in the order in memory, dtype and device of another; nothing wider is made on the way."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda i: (-strides[i], i))
    made = torch.empty([shape[i] for i in order], device=like.device, dtype=like.dtype)
    made = made.bernoulli_(0.8, generator=draw) if like.dtype == torch.bool else made.normal_(generator=draw)
    return made.permute([order.index(i) for i in range(like.ndim)])


def _key(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, on: TileMask) -> str:
    device = query.device
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} of {torch.get_num_threads()} threads"
    )
    form = [[list(t.shape), list(t.stride()), str(t.dtype)] for t in (query, key, value, bias) if t is not None]
    where = [list(on.grid), on.before, on.after]
    return json.dumps([name, torch.__version__, _machine(), str(on.mask), where, form])


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    import platform

    return f"{platform.node()} {platform.processor() or platform.machine()}"


def _choice(data: Any) -> TuningResult | None:
    """What the file holds, if it is a choice that can be made here."""
    try:
        found = TuningResult(
            str(data["lowering"]), {str(k): float(v) for k, v in data["seconds"].items()}, float(data["density"])
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    fits = set(data) == {"lowering", "seconds", "density"} and {"dense", found.lowering} <= found.seconds.keys()
    return found if fits and found.lowering in LOWERINGS else None


def _path() -> Path:
    return cache_folder() / "lowerings.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(name: str, found: TuningResult) -> None:
    """Add to the file, written aside and renamed; what cannot be written is measured again by the next process."""
    path = _path()
    try:
        write_aside(path, json.dumps({**_read(), name: asdict(found)}, indent=1))
    except OSError:
        return


def check_lowering(name: str) -> str:
    """The name of a lowering, or "auto".

    Raises:
        ConfigError: another.
    """
    if name != "auto" and name not in LOWERINGS:
        raise ConfigError(f"no lowering of tile attention is called {name!r}; there are auto, {', '.join(LOWERINGS)}")
    return name
