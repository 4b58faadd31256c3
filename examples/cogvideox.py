"""CogVideoX, text to video, with AdaCache.

python examples/cogvideox.py --prompt "a cat on a skateboard" --out cat.mp4
"""

from __future__ import annotations

import argparse

import torch

import vdcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a cat on a skateboard")
parser.add_argument("--recipe", default="adacache-fast", help="a name from `vdcache recipes`")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--inner", default="inductor", help="inductor, or eager to compile nothing")
parser.add_argument("--out", default="out.mp4")
parser.add_argument("--tiny", action="store_true", help="tiny random parts instead of the model: it runs anywhere")
args = parser.parse_args()

if args.tiny:
    from tiny import cogvideox

    pipe, call = cogvideox()
else:
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-2b", torch_dtype=torch.bfloat16).to("cuda")
    call = {"prompt": args.prompt, "num_frames": 49}

vdcache.apply(pipe, args.recipe, inner=args.inner)
result = pipe(**call, num_inference_steps=args.steps, generator=torch.Generator("cpu").manual_seed(0))
vdcache.summary(pipe)

if args.tiny:
    torch.save(result.frames, args.out)
else:
    from diffusers.utils import export_to_video

    export_to_video(result.frames[0], args.out, fps=16)
