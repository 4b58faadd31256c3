"""What do AdaCache's recipes give on the trained model, and does plain sampling with fewer steps do better in the same time?"""

from __future__ import annotations

from pathlib import Path

from bench.common import Bench, arguments
from vdcache.demo.run import calibrated_recipe, run_demo


def main() -> None:
    args = arguments(__doc__, lambda p: p.add_argument("--out", type=Path, default=Path("out/bench-demo")))
    bench = Bench("demo", str(calibrated_recipe().pipeline))
    for row in run_demo(args.out, rounds=5):
        must = ">= 2" if row.recipe == "adacache-calibrated" else None
        details = {
            k: getattr(row, k)
            for k in (
                "computed",
                "steps",
                "seconds",
                "psnr",
                "ssim",
                "cache_mib",
                "rival_steps",
                "rival_psnr",
                "rival_ssim",
                "rival_wins",
            )
        }
        bench.row(f"{row.recipe}: speed over torch.compile", row.speedup, "x", must, **details)
    bench.write(args.json)


if __name__ == "__main__":
    main()
