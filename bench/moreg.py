"""Does motion regularisation help the videos that move most, at equal mean computed steps?

The trained model, one video a generation, calibrated codebook. With MoReg first; then without it, thresholds scaled until the mean
number of computed steps is the same. PSNR against the uncached video, mean over the half of the videos that moves most, and over
the rest.
"""

from __future__ import annotations

import torch

import vdcache
from bench.common import Bench, arguments
from vdcache.demo.data import random_conditions
from vdcache.demo.judge import motion
from vdcache.demo.run import calibrated_recipe, quality
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model

STEPS = 30


def main() -> None:
    args = arguments(__doc__, lambda p: p.add_argument("--videos", type=int, default=16))
    model = load_model()
    conditions = random_conditions(args.videos, torch.Generator().manual_seed(77))
    base = calibrated_recipe().policy.codebook  # type: ignore[attr-defined]
    plain = [sample(model, [c], steps=STEPS, seed=i) for i, c in enumerate(conditions)]
    moves = torch.cat([motion(v) for v in plain])
    most = set(moves.argsort(descending=True)[: len(conditions) // 2].tolist())

    def run(factor: float, moreg: vdcache.policies.MoReg | bool) -> tuple[float, list[float]]:
        book = [(t * factor, r) for t, r in base.entries]
        torch._dynamo.reset()
        fast = vdcache.compile(model, vdcache.methods.adacache(book, moreg=moreg), num_steps=STEPS, inner="eager")
        computed, psnr = 0, []
        for i, c in enumerate(conditions):
            video = sample(fast, [c], steps=STEPS, seed=i)
            computed += len(fast.vdcache.history.computed_steps())
            psnr.append(quality(video, plain[i])[0])
        return computed / len(conditions), psnr

    bench = Bench("moreg", str(calibrated_recipe().pipeline))
    # The published scale of the motion score belongs to another model: here it is the median score of this one, so that the factor is about 1.
    probe = vdcache.compile(model, vdcache.methods.adacache([(1e-9, 1)], moreg=True), num_steps=STEPS, inner="eager")
    for i, c in enumerate(conditions[:4]):
        sample(probe, [c], steps=STEPS, seed=i)
    scores = sorted(m.motion for r in probe.vdcache.history for m in r.measures if m.motion is not None)
    scale = scores[len(scores) // 2] if scores else 0.385
    bench.row("median motion score of the observed branch", scale, "", None, published=0.385)
    for name, moreg in (("published scale", True), ("scale of this model", vdcache.policies.MoReg(scale=scale))):
        steps, with_motion = run(1.0, moreg)
        low, high = 0.01, 30.0
        for _ in range(7):  # bisection on the thresholds without MoReg
            middle = (low * high) ** 0.5
            found, without = run(middle, False)
            low, high = (low, middle) if found < steps else (middle, high)
            if abs(found - steps) < 0.15:
                break
        for group, members in (("moves most", most), ("the rest", set(range(len(conditions))) - most)):
            a = sum(with_motion[i] for i in members) / len(members)
            b = sum(without[i] for i in members) / len(members)
            bench.row(
                f"PSNR with − without MoReg ({name}), {group}",
                a - b,
                "dB",
                None,
                with_moreg=a,
                without=b,
                steps=steps,
                steps_without=found,
            )
    bench.write(args.json)


if __name__ == "__main__":
    main()
