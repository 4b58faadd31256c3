"""Samplers written by hand, and generations with them: what schedules are tried on."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tests.support.logs import informed
from vdcache import VdcacheWarning
from vdcache.calibration import Calibration
from vdcache.testing import TinyDiT, latent

TEXT, OTHER = latent(99, 1, 3, 4), latent(98, 1, 3, 4)

Call = Callable[[Tensor, float], Tensor]  # latent and noise level -> velocity


def sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """Noise levels of flow matching, from 1 down to 0."""
    straight = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in straight]


def euler(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    for now, after in itertools.pairwise(levels):
        x = x - (now - after) * call(x, now)
    return x


def multistep(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    """Adams-Bashforth of second order with variable steps."""
    before, wide = None, 0.0
    for now, after in itertools.pairwise(levels):
        v, step = call(x, now), after - now
        slope = torch.zeros_like(v) if before is None else (v - before) / wide
        x = x + step * v + step**2 / 2 * slope
        before, wide = v, step
    return x


def predictor_corrector(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    """As UniPC does: the latent of a step is corrected when its own output is known, from up to three outputs before it."""
    found: list[Tensor] = []
    start = x
    for i, (now, after) in enumerate(itertools.pairwise(levels)):
        v = call(x, now)
        if found:  # Adams-Moulton over the step that was just predicted
            known = [v, *reversed(found)][:4]
            weights = {2: (1 / 2, 1 / 2), 3: (5 / 12, 8 / 12, -1 / 12), 4: (9 / 24, 19 / 24, -5 / 24, 1 / 24)}[len(known)]
            start = start + (now - levels[i - 1]) * sum(w * k for w, k in zip(weights, known, strict=True))
        found.append(v)
        known = [*reversed(found)][:3]
        weights = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}[len(known)]
        x = start + (after - now) * sum(w * k for w, k in zip(weights, known, strict=True))
    return x


def ddim(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    """DDIM with coefficients that change from step to step; the model predicts noise."""
    keep = [(1 - 0.98 * s) ** 1.5 for s in levels]
    for now, after in itertools.pairwise(keep):
        noise = call(x, levels[keep.index(now)])
        clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return x


def heun(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    """Two evaluations a step."""
    for now, after in itertools.pairwise(levels):
        first = call(x, now)
        guess = x + (after - now) * first
        second = call(guess, after + 1e-3)
        x = x + (after - now) / 2 * (first + second)
    return x


def ancestral(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    noise = torch.Generator().manual_seed(7)
    for now, after in itertools.pairwise(levels):
        x = x - (now - after) * call(x, now) + 0.1 * (now - after) * torch.randn(x.shape, generator=noise)
    return x


def clamped(call: Call, x: Tensor, levels: list[float]) -> Tensor:
    for now, after in itertools.pairwise(levels):
        x = (x - (now - after) * call(x, now)).clamp(-1, 1)
    return x


LINEAR = {"euler": euler, "multistep": multistep, "predictor-corrector": predictor_corrector, "ddim": ddim, "heun": heun}


def time(level: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([1000 * level], dtype=dtype)


def generate(model, seed=0, steps=8, shift=1.0, sampler=euler, tokens=6, texts=(TEXT,), dtype=torch.float32, stop=None):
    """One generation; `texts` are calls of one step, of which the first is guided away from the second.

    Args:
        stop: calls of the model after which the user loses patience.
    """
    calls = 0

    def call(x: Tensor, level: float) -> Tensor:
        nonlocal calls
        found = []
        for text in texts:
            if calls == stop:
                raise KeyboardInterrupt
            calls += 1
            found.append(model(x, time(level), text.to(dtype)))
        return found[0] if len(found) == 1 else found[1] + 2 * (found[0] - found[1])

    with torch.no_grad():
        return sampler(call, latent(seed, 1, tokens, 4, dtype=dtype), sigmas(steps, shift))


# --- steps that differ in their calls ------------------------------------------------------------------------------------------

REFERENCE = latent(77, 1, 3, 4)


class Skipping(TinyDiT):
    """Leaves out blocks on request, as skip-layer guidance asks: another graph of the same model."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, skip: tuple[int, ...] = ()) -> Tensor:
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.inp(x) + self.text(text).mean(1, keepdim=True)
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp, strict=True)):
            if i not in skip:
                q, k, v = qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
                h = h + gates[0] * functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                h = h + gates[1] * mlp(h)
        return self.out(h)


def guided_half_way(m, x: Tensor, t: Tensor, half: bool) -> Tensor:
    if not half:
        return m(x, t, TEXT)
    a, b = m(x, t, TEXT), m(x, t, OTHER)
    return b + 2 * (a - b)


def batched_half_way(m, x: Tensor, t: Tensor, half: bool) -> Tensor:
    if not half:
        return m(x, t, TEXT)
    a, b = m(torch.cat([x, x]), t.expand(2), torch.cat([TEXT, OTHER])).chunk(2)
    return b + 2 * (a - b)


def reference_first(m, x: Tensor, t: Tensor, half: bool) -> Tensor:
    if t != 1000:
        return m(x, t, TEXT)
    return m(torch.cat([x, REFERENCE], 1), t, TEXT)[:, : x.shape[1]]


def layers_skipped(m, x: Tensor, t: Tensor, half: bool) -> Tensor:
    guided = batched_half_way(m, x, t, True)
    return guided + (guided - m(x, t, TEXT, skip=(1,))) if half and t != 1000 else guided


UNEVEN = [guided_half_way, batched_half_way, reference_first, layers_skipped]


def explicit(call, steps: int):
    """A generation that says its steps; `call` is given whether it is in its first half."""

    def generation(m, seed: int = 0) -> Tensor:
        x = latent(seed)
        with torch.no_grad():
            for step, (now, after) in enumerate(itertools.pairwise(sigmas(steps))):
                if hasattr(m, "vdcache"):
                    m.vdcache.step()
                x = x - (now - after) * call(m, x, time(now), step < steps // 2)
        return x

    return generation


def small(seed=0, dim=8):
    return TinyDiT(blocks=1, dim=dim, seed=seed)


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VdcacheWarning)
        return call(*args, **options)


def said(call, *args, **options):
    """What it returns, and what vdcache told and warned of."""
    with informed() as told, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = call(*args, **options)
    return result, told + [str(w.message) for w in heard if issubclass(w.category, VdcacheWarning)]


def kept(folder):
    return [Calibration.from_json(p) for p in sorted(folder.glob("*.json"))]


def by_hand(model, found, seed=0, steps=8, shift=1.0, sampler=euler, texts=(TEXT,), tokens=6):
    """The generation under a schedule, told by the model's own arithmetic: a line through the last two computed steps, in the step's number
    or in a power of the timestep.
    """
    known = [[] for _ in texts]  # (where the step stands, what the blocks add)
    step, calls = -1, 0

    def call(x, t, text):
        nonlocal step, calls
        lane = calls % len(texts)
        step += lane == 0
        calls += 1
        own, now = known[lane], float(t.max()) ** found.power if found.power else step
        if step in found.computed:
            own.append((now, model.branches(x, t, text)))
            return model(x, t, text)
        (at, value), before = own[-1], own[-2] if len(own) > 1 else None
        if before is not None:
            value = value + (now - at) * (value - before[1]) / (at - before[0])
        return model.with_branches(x, text, value)

    return generate(call, seed, steps, shift, sampler, tokens, texts)


def psnr(a, b):
    return 10 * math.log10((b.max() - b.min()).item() ** 2 / (a - b).square().mean().item())
