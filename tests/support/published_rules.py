"""Published decision rules of caching methods, restated literally as plain functions of numbers.

No torch, no classes, nothing of vdcache: an oracle that shares no line with what it judges. Every function returns the computed steps in order, counted from 0
over the executed denoising steps, unless it says otherwise. Where a rule looks at tensors, the caller passes functions of step indices that return the
reduced numbers; r(p, t) is always mean|A_t − A_p| / mean|A_p|. Comparisons are as strict as in the source. The restatements of first-block caches, DBCache,
MagCache, SeaCache, Pyramid Attention Broadcast, FasterCache and TaylorSeer were run against diffusers 0.42.1 and cache-dit 1.5.3 themselves, and agreed.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "FASTERCACHE",
    "MAGCACHE",
    "SCM",
    "dbcache",
    "deltadit",
    "easycache",
    "fastercache_attention",
    "fastercache_attention_values",
    "fbcache",
    "fora",
    "l2c",
    "magcache",
    "magcache_wan",
    "nearest",
    "pab",
    "pab_mlp",
    "sea_filter",
    "seacache",
    "smoothcache",
    "taylorseer",
    "taylorseer_orders",
    "teacache",
    "tgate",
]


def fbcache(r: Callable[[int, int], float], threshold: float, num_steps: int) -> list[int]:
    """diffusers hooks/first_block_cache.py: recompute iff the first block's residual changed by more than the threshold since the last computed step."""
    computed: list[int] = []
    for t in range(num_steps):
        if not computed or r(computed[-1], t) > threshold:  # a tie is a hit
            computed.append(t)
    return computed


def dbcache(
    r: Callable[[int, int], float],
    num_steps: int,
    threshold: float = 0.08,
    warmup: int = 8,
    max_cached: int = -1,
    max_continuous: int = -1,
    max_accumulated: float | None = None,
    mask: Sequence[int] | None = None,
) -> list[int]:
    """cache-dit 1.5.3 caching/cache_contexts/{cache_manager,cache_context}.py.

    The tests come in this order; a change is looked at only where all earlier ones pass, and every positive one is added to the accumulator, which is never
    reset in a generation. A mask has 1 for steps that are computed; steps past its end count as 0; the warm-up is cut to its leading ones.
    """
    if mask is not None:
        warmup = min(warmup, next((i for i, m in enumerate(mask) if m != 1), len(mask)))
    computed: list[int] = []
    cached: list[int] = []
    accumulated, run = 0.0, 0
    for t in range(num_steps):
        if not cached or cached[-1] != t - 1:
            run = 0
        hit = False
        forced = t < warmup or (mask is not None and t < len(mask) and mask[t] == 1)
        full = 0 <= max_cached <= len(cached) or 0 <= max_continuous <= run
        spent = max_accumulated is not None and 0 < max_accumulated <= accumulated
        if not (forced or full or spent) and threshold > 0 and computed:
            change = r(computed[-1], t)
            accumulated += max(0.0, change)
            hit = change < threshold
        if hit:
            cached.append(t)
            run += 1
        else:
            computed.append(t)
    return computed


# Printed by cache-dit 1.5.3 steps_mask(total_steps=n, mask_policy=…): 1 is computed, the last step always.
SCM: Mapping[str, Mapping[int, str]] = {
    "slow": {8: "11111011", 16: "1111111101110011", 28: "1111111101110011100110010001"},
    "medium": {8: "11110101", 16: "1111110110001001", 28: "1111110110001100011000110001"},
    "fast": {8: "11101001", 16: "1111100000000001", 28: "1111110100010000100000100001"},
    "ultra": {8: "11001001", 16: "1100000000000001", 28: "1111001000001000000100000001"},
}


def teacache(
    change: Sequence[float],
    coefficients: Sequence[float],
    threshold: float,
    num_steps: int,
    ret_steps: int = 1,
    cutoff: int | None = None,
) -> list[int]:
    """TeaCache4HunyuanVideo, TeaCache4FLUX, TeaCache4Wan2.1: change[t] is that of the indicator since the step before, computed or not.

    Wan with --use_ret_steps: ret_steps=5, cutoff=num_steps. The polynomial is numpy's, and may be negative.
    """
    cutoff = num_steps - 1 if cutoff is None else cutoff
    computed, total = [], 0.0
    for t in range(num_steps):
        if t < ret_steps or t >= cutoff:
            hit, total = False, 0.0
        else:
            value = 0.0
            for c in coefficients:
                value = value * change[t] + c
            total += value
            hit = total < threshold
            if not hit:
                total = 0.0
        if not hit:
            computed.append(t)
    return computed


def seacache(change: Sequence[float], threshold: float, num_steps: int) -> list[int]:
    """jiwoogit/SeaCache HunyuanVideo: TeaCache's rule with no polynomial; change[t] is between indicators that were each filtered with their own noise level."""
    return teacache(change, (1.0, 0.0), threshold, num_steps)


def sea_filter(x: Any, sigma: float, power: float = 3.0) -> Any:
    """SeaCache's filter of x[t][h][w], one channel, by the definition of the Fourier transform.

    The gain of an axis is a S / (a² S + b² + 1e-16) with S = 1 / (|f|^power + 1e-16), f in cycles a sample, a = 1 − σ, b = σ, σ clamped to [1e-6, 1 − 1e-6];
    those of the axes are multiplied and divided by their mean over the whole grid.
    """
    shape = len(x), len(x[0]), len(x[0][0])
    b = max(1e-6, min(1.0 - 1e-6, float(sigma)))
    a = 1.0 - b
    gains = []
    for n in shape:
        frequencies = [(k if k < (n + 1) // 2 else k - n) / n for k in range(n)]
        clean = [1.0 / (abs(f) ** power + 1e-16) for f in frequencies]
        gains.append([a * s / (a * a * s + b * b + 1e-16) for s in clean])
    full = [[[u * v * w for w in gains[2]] for v in gains[1]] for u in gains[0]]
    size = shape[0] * shape[1] * shape[2]
    mean = sum(v for plane in full for row in plane for v in row) / size

    def along(values: list[Any], sign: int) -> list[Any]:
        n = len(values)
        return [sum(values[j] * cmath.exp(sign * 2j * cmath.pi * j * k / n) for j in range(n)) for k in range(n)]

    def transform(values: Any, sign: int) -> Any:
        values = [[along(row, sign) for row in plane] for plane in values]
        for t in range(shape[0]):
            columns = [along([values[t][h][w] for h in range(shape[1])], sign) for w in range(shape[2])]
            values[t] = [[columns[w][h] for w in range(shape[2])] for h in range(shape[1])]
        for h in range(shape[1]):
            for w in range(shape[2]):
                for t, v in enumerate(along([values[t][h][w] for t in range(shape[0])], sign)):
                    values[t][h][w] = v
        return values

    spectrum = transform(x, -1)
    scaled = [
        [[spectrum[t][h][w] * full[t][h][w] / mean for w in range(shape[2])] for h in range(shape[1])] for t in range(shape[0])
    ]
    return [[[v.real / size for v in row] for row in plane] for plane in transform(scaled, 1)]


def easycache(
    dx: Callable[[int, int], float],
    dout: Callable[[int, int], float],
    norm: Callable[[int], float],
    threshold: float,
    num_steps: int,
    ret_steps: int,
    on_step: Callable[[int, bool], None],
) -> list[int]:
    """H-EmbodVis/EasyCache, HunyuanVideo and Wan (the conditional call; the other one follows).

    Args:
        dx: mean|x_t − x_s| of the model's inputs; asked between neighbouring steps, computed or not, and between computed ones.
        dout: mean|o_t − o_p| of the model's outputs at computed steps.
        norm: mean|o_p|.
        on_step: called as soon as a step is decided, so that a simulation can go on.
    """
    computed: list[int] = []
    k, error = None, 0.0
    for t in range(num_steps):
        if t < ret_steps or t >= num_steps - 1:
            compute, error = True, 0.0
        elif not computed or k is None:
            compute = True
        else:
            error += k * dx(t - 1, t) / norm(computed[-1])
            compute = not error < threshold
            if compute:
                error = 0.0
        on_step(t, compute)
        if compute:
            if computed:
                k = dout(computed[-1], t) / dx(computed[-1], t)
            computed.append(t)
    return computed


def nearest(values: Sequence[float], n: int) -> list[float]:
    """MagCache's nearest_interp: halves to even; one step takes the last value."""
    if n == 1:
        return [values[-1]]
    scale = (len(values) - 1) / (n - 1)
    return [values[round(j * scale)] for j in range(n)]


def magcache(
    ratios: Sequence[float], threshold: float, most: int, retention: float, num_steps: int, half_up: bool = True
) -> list[int]:
    """diffusers hooks/mag_cache.py and MagCache4FLUX (half_up, without its eleventh step); MagCache4HunyuanVideo rounds the retained steps down."""
    start = int(num_steps * retention + (0.5 if half_up else 0.0))
    computed, ratio, error, n = [], 1.0, 0.0, 0
    for t in range(num_steps):
        hit = False
        if t >= start:
            ratio *= ratios[t]
            n += 1
            error += abs(1.0 - ratio)
            hit = error <= threshold and n <= most and bool(computed)
            if not hit:
                ratio, error, n = 1.0, 0.0, 0
        if not hit:
            computed.append(t)
    return computed


def magcache_wan(
    ratios: Sequence[float], threshold: float, most: int, retention: float, num_steps: int
) -> tuple[list[int], list[int]]:
    """MagCache4Wan2.1: counts calls, conditional (even) and not (odd) in turn, and so do the ratios. Returns the computed steps of each."""
    calls = 2 * num_steps
    start = int(calls * retention)
    out: tuple[list[int], list[int]] = ([], [])
    ratio, error, n = [1.0, 1.0], [0.0, 0.0], [0, 0]
    for c in range(calls):
        b, hit = c % 2, False
        if c >= start:
            ratio[b] *= ratios[c]
            n[b] += 1
            error[b] += abs(1.0 - ratio[b])
            hit = error[b] < threshold and n[b] <= most
            if not hit:
                ratio[b], error[b], n[b] = 1.0, 0.0, 0
        if not hit:
            out[b].append(c // 2)
    return out


def pab(timesteps: Sequence[float], distance: int, window: tuple[float, float]) -> list[int]:
    """VideoSys core/pab_mgr.py and diffusers hooks/pyramid_attention_broadcast.py: the grid counts every step, in and out of the window, whose ends are outside."""
    return [i for i, t in enumerate(timesteps) if not (i % distance != 0 and window[0] < t < window[1])]


def pab_mlp(timesteps: Sequence[float], keys: Sequence[float], skip: int) -> list[int]:
    """VideoSys if_skip_mlp for a block that every key lists: keys that the schedule does not hold are ignored."""
    there = [k for k in keys if k in timesteps]
    computed = []
    for i, t in enumerate(timesteps):
        after = any(t in timesteps[timesteps.index(k) : timesteps.index(k) + 1 + skip] for k in there)
        if t in keys or not after:
            computed.append(i)
    return computed


# Scripts of Vchitect/FasterCache by their counter c = step + 1: when attention is reused, with which weight, and when the unconditional lane is skipped.
FASTERCACHE: Mapping[str, Mapping[str, Callable[[int], Any]]] = {
    "open-sora": {"reuse": lambda c: c > 7 and c % 2 == 0, "weight": lambda c: (c - 7) / 20.0 * 0.9},
    "latte": {"reuse": lambda c: c >= 16 and c % 2 == 0, "weight": lambda c: 0.5},
    "cogvideox": {"reuse": lambda c: c >= 18 and c % 3 != 0, "weight": lambda c: 0.3},
}


def fastercache_attention(num_steps: int, model: str) -> list[int]:
    """Steps whose self-attention is computed while no lane of guidance is skipped (else Latte and CogVideoX also compute where the kept batch is too small)."""
    return [t for t in range(num_steps) if not FASTERCACHE[model]["reuse"](t + 1)]


def fastercache_attention_values(attention: Sequence[float], num_steps: int, model: str) -> list[float]:
    """The value used at each step: newest + (newest − older) · weight of the last two computed ones; predictions are not kept."""
    done = set(fastercache_attention(num_steps, model))
    out: list[float] = []
    older = newest = None
    for t in range(num_steps):
        if t in done:
            older, newest = (attention[t] if newest is None else newest), attention[t]
            out.append(attention[t])
        else:
            assert newest is not None and older is not None
            out.append(newest + (newest - older) * FASTERCACHE[model]["weight"](t + 1))
    return out


def tgate(num_steps: int, gate: int = 10, interval: int = 5, after: int = 1, warm_up: int = 2) -> dict[str, list[int]]:
    """HaozheLiu-ST/T-GATE tgate/tgate_utils.py, tgate_scheduler: the steps whose cross- and self-attention are computed."""
    cross: list[int] = []
    own: list[int] = []
    kept = False
    for i in range(num_steps):
        if i < gate - 1:
            cross.append(i)
            keeps = i == warm_up or (i > warm_up and i % interval == 0)
            if i < warm_up or keeps or not kept:
                own.append(i)
            kept = kept or keeps
        elif i == gate - 1:
            cross.append(i)
            own.append(i)
            kept = True
        elif i % after == 0:
            own.append(i)
    return {"cross": cross, "self": own}


def deltadit(num_steps: int, interval: int, switch: int) -> list[str]:
    """Δ-DiT (arXiv 2406.01125; no public code): what every step leaves out."""
    return ["" if t % interval == 0 else ("rear" if t < switch else "front") for t in range(num_steps)]


def smoothcache(errors: Sequence[Sequence[float]], alpha: float, num_steps: int) -> list[int]:
    """Roblox/SmoothCache calibration_helper.py: from i, the largest k whose error errors[k − 1][i] is within alpha lets the next k steps be skipped.

    The first and the last step are forced.
    """
    schedule, i = [1] * num_steps, 0
    while i < num_steps:
        jump = 1
        for k in range(len(errors), 0, -1):
            if i < len(errors[k - 1]) and errors[k - 1][i] <= alpha:
                for s in range(i + 1, min(i + k, num_steps - 1) + 1):
                    schedule[s] = 0
                jump = k + 1
                break
        i += jump
    schedule[0] = schedule[-1] = 1
    return [t for t in range(num_steps) if schedule[t]]


def fora(num_steps: int, interval: int) -> list[int]:
    """prathebaselva/FORA: its step index descends, and it computes where that is S − 1 or divisible by N."""
    return [t for t in range(num_steps) if t == 0 or (num_steps - 1 - t) % interval == 0]


def taylorseer(num_steps: int, interval: int, first_enhance: int = 3) -> list[int]:
    """TaylorSeer cal_type (FLUX 3, HunyuanVideo and Wan 1, DiT 2 first steps)."""
    computed, counter = [], 0
    for t in range(num_steps):
        if t < first_enhance or counter == interval - 1:
            computed.append(t)
            counter = 0
        else:
            counter += 1
    return computed


def taylorseer_orders(computed: Sequence[int], max_order: int, first_enhance: int = 3) -> dict[int, int]:
    """The highest order that each computed step leaves: derivatives are formed from step first_enhance − 1 on."""
    out, have = {}, -1
    for t in computed:
        have = min(max_order, have + 1) if (have >= 0 and t > first_enhance - 2) else 0
        out[t] = have
    return out


def l2c(scores: Sequence[Sequence[float]], threshold: float, num_steps: int) -> list[set[int]]:
    """horseee/learning-to-cache DiT/models/dynamic_models.py: the computed modules of every step, 2i the attention and 2i + 1 the MLP of block i.

    Router j counts the timesteps upwards. Even steps compute everything.
    """
    out = []
    for t in range(num_steps):
        row = scores[num_steps - 1 - t]
        out.append(set(range(len(row))) if t % 2 == 0 else {m for m, s in enumerate(row) if s > threshold})
    return out


# fmt: off
# Zehong-Ma/MagCache, as in its scripts with a leading 1: those of Wan hold conditional and unconditional calls in turn.
MAGCACHE: Mapping[str, tuple[float, ...]] = {
    "wan2.1-t2v-14b": (
        1.0, 1.0, 1.02504, 1.03017, 1.00025, 1.00251, 0.9985, 0.99962, 0.99779, 0.99771, 0.9966, 0.99658, 0.99482, 0.99476,
        0.99467, 0.99451, 0.99664, 0.99656, 0.99434, 0.99431, 0.99533, 0.99545, 0.99468, 0.99465, 0.99438, 0.99434, 0.99516,
        0.99517, 0.99384, 0.9938, 0.99404, 0.99401, 0.99517, 0.99516, 0.99409, 0.99408, 0.99428, 0.99426, 0.99347, 0.99343,
        0.99418, 0.99416, 0.99271, 0.99269, 0.99313, 0.99311, 0.99215, 0.99215, 0.99218, 0.99215, 0.99216, 0.99217, 0.99163,
        0.99161, 0.99138, 0.99135, 0.98982, 0.9898, 0.98996, 0.98995, 0.9887, 0.98866, 0.98772, 0.9877, 0.98767, 0.98765,
        0.98573, 0.9857, 0.98501, 0.98498, 0.9838, 0.98376, 0.98177, 0.98173, 0.98037, 0.98035, 0.97678, 0.97677, 0.97546,
        0.97543, 0.97184, 0.97183, 0.96711, 0.96708, 0.96349, 0.96345, 0.95629, 0.95625, 0.94926, 0.94929, 0.93964, 0.93961,
        0.92511, 0.92504, 0.90693, 0.90678, 0.8796, 0.87945, 0.86111, 0.86189,
    ),
    "wan2.1-t2v-1.3b": (
        1.0, 1.0, 1.0124, 1.02213, 1.00166, 1.0041, 0.99791, 1.00061, 0.99682, 0.99762, 0.99634, 0.99685, 0.99567, 0.99586,
        0.99416, 0.99422, 0.99578, 0.99575, 0.9957, 0.99563, 0.99511, 0.99506, 0.99535, 0.99531, 0.99552, 0.99549, 0.99541,
        0.99539, 0.9954, 0.99536, 0.99489, 0.99485, 0.99518, 0.99514, 0.99484, 0.99478, 0.99481, 0.99479, 0.99415, 0.99413,
        0.99419, 0.99416, 0.99396, 0.99393, 0.99388, 0.99386, 0.99349, 0.99349, 0.99309, 0.99304, 0.9927, 0.9927, 0.99228,
        0.99226, 0.99171, 0.9917, 0.99137, 0.99135, 0.99068, 0.99063, 0.99005, 0.99003, 0.98944, 0.98942, 0.98849, 0.98849,
        0.98758, 0.98757, 0.98644, 0.98643, 0.98504, 0.98503, 0.9836, 0.98359, 0.98202, 0.98201, 0.97977, 0.97978, 0.97717,
        0.97718, 0.9741, 0.97411, 0.97003, 0.97002, 0.96538, 0.96541, 0.9593, 0.95933, 0.95086, 0.95089, 0.94013, 0.94019,
        0.92402, 0.92414, 0.90241, 0.9026, 0.86821, 0.86868, 0.81838, 0.81939,
    ),
    "wan2.1-i2v-480p": (
        1.0, 1.0, 0.98783, 0.98993, 0.97559, 0.97593, 0.98311, 0.98319, 0.98202, 0.98225, 0.9888, 0.98878, 0.98762, 0.98759,
        0.98957, 0.98971, 0.99052, 0.99043, 0.99383, 0.99384, 0.98857, 0.9886, 0.99065, 0.99068, 0.98845, 0.98847, 0.99057,
        0.99057, 0.98957, 0.98961, 0.98601, 0.9861, 0.98823, 0.98823, 0.98756, 0.98759, 0.98808, 0.98814, 0.98721, 0.98724,
        0.98571, 0.98572, 0.98543, 0.98544, 0.98157, 0.98165, 0.98411, 0.98413, 0.97952, 0.97953, 0.98149, 0.9815, 0.9774,
        0.97742, 0.97825, 0.97826, 0.97355, 0.97361, 0.97085, 0.97087, 0.97056, 0.97055, 0.96588, 0.96587, 0.96113, 0.96124,
        0.9567, 0.95681, 0.94961, 0.94969, 0.93973, 0.93988, 0.93217, 0.93224, 0.91878, 0.91896, 0.90955, 0.90954, 0.92617,
        0.92616,
    ),
    "wan2.1-i2v-720p": (
        1.0, 1.0, 0.99428, 0.99498, 0.98588, 0.98621, 0.98273, 0.98281, 0.99018, 0.99023, 0.98911, 0.98917, 0.98646, 0.98652,
        0.99454, 0.99456, 0.9891, 0.98909, 0.99124, 0.99127, 0.99102, 0.99103, 0.99215, 0.99212, 0.99515, 0.99515, 0.99576,
        0.99572, 0.99068, 0.99072, 0.99097, 0.99097, 0.99166, 0.99169, 0.99041, 0.99042, 0.99201, 0.99198, 0.99101, 0.99101,
        0.98599, 0.98603, 0.98845, 0.98844, 0.98848, 0.98851, 0.98862, 0.98857, 0.98718, 0.98719, 0.98497, 0.98497, 0.98264,
        0.98263, 0.98389, 0.98393, 0.97938, 0.9794, 0.97535, 0.97536, 0.97498, 0.97499, 0.973, 0.97301, 0.96827, 0.96828,
        0.96261, 0.96263, 0.95335, 0.9534, 0.94649, 0.94655, 0.93397, 0.93414, 0.91636, 0.9165, 0.89088, 0.89109, 0.8679,
        0.86768,
    ),
    "hunyuanvideo-720p": (
        1.0, 1.0754, 1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142, 1.03101, 1.00679, 1.02556, 1.00908,
        1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779, 1.03381, 1.01886, 1.01161, 1.02968, 1.00544, 1.02822, 1.00689,
        1.02119, 1.0105, 1.01044, 1.01572, 1.02972, 1.0094, 1.02368, 1.0226, 0.98965, 1.01588, 1.02146, 1.0018, 1.01687,
        0.99436, 1.00283, 1.01139, 0.97122, 0.98251, 0.94513, 0.97656, 0.90943, 0.85703, 0.75456,
    ),
    "hunyuanvideo-544p": (
        1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632, 1.02974, 1.00984, 1.03028,
        1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726, 1.03727, 1.01502, 1.00992, 1.03371, 0.9976, 1.02742,
        1.0093, 1.01869, 1.00815, 1.01461, 1.01152, 1.03082, 1.0061, 1.02162, 1.01999, 0.99063, 1.01186, 1.0217, 0.99947,
        1.01711, 0.9904, 1.00258, 1.00878, 0.97039, 0.97686, 0.94315, 0.97728, 0.91154, 0.86139, 0.76592,
    ),
    "flux": (
        1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562, 1.00781,
        1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
    ),
}
# fmt: on
