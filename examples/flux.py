"""FLUX.1, text to image, with TaylorSeer.

python examples/flux.py --prompt "a cat on a skateboard" --out cat.png
"""

from __future__ import annotations

import argparse

import torch

import vdcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a cat on a skateboard")
parser.add_argument("--recipe", default="taylorseer-4-1", help="a name from `vdcache recipes`")
parser.add_argument("--steps", type=int, default=28)
parser.add_argument("--inner", default="inductor", help="inductor, or eager to compile nothing")
parser.add_argument("--out", default="out.png")
parser.add_argument("--tiny", action="store_true", help="tiny random parts instead of the model: it runs anywhere")
args = parser.parse_args()

if args.tiny:
    from tiny import flux

    pipe, call = flux()
else:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    call = {"prompt": args.prompt, "height": 1024, "width": 1024}

vdcache.apply(pipe, args.recipe, inner=args.inner)
result = pipe(**call, num_inference_steps=args.steps, generator=torch.Generator("cpu").manual_seed(0))
vdcache.summary(pipe)

if args.tiny:
    torch.save(result.images, args.out)
else:
    result.images[0].save(args.out)
