"""A denoiser and a sampling loop of one's own: compile the model, say where a generation, a step and a lane begin.

python examples/own_dit.py --recipe adacache-fast
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vdcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--recipe", default="every-2", help="a name from `vdcache recipes`")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--inner", default="inductor", help="inductor, or eager to compile nothing")
parser.add_argument("--out", default="out.pt")
parser.add_argument("--tiny", action="store_true", help="a small model")
args = parser.parse_args()


class Block(nn.Module):
    """Attention and an MLP behind gates that the timestep sets."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gates = nn.Linear(dim, 2 * dim)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        first, second = self.gates(time)[:, None].chunk(2, -1)
        q, k, v = self.qkv(F.layer_norm(h, h.shape[-1:])).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        h = h + first * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + second * self.mlp(F.layer_norm(h, h.shape[-1:]))


class DiT(nn.Module):
    """The least that is a diffusion transformer."""

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        self.dim = dim
        self.inp, self.text, self.out = nn.Linear(16, dim), nn.Linear(32, dim), nn.Linear(dim, 16)
        self.time = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.exp(-9 * torch.arange(self.dim // 2, device=latent.device) / self.dim * 2)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.text(text).mean(1)
        h = self.inp(latent)
        for block in self.blocks:
            h = block(h, time)
        return self.out(h)


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
model = DiT(*((64, 3) if args.tiny else (768, 12))).eval().to(device)
model = vdcache.compile(model, args.recipe, inner=args.inner)

latent = torch.randn(1, 64 if args.tiny else 1024, 16, device=device)
lanes = {"cond": torch.randn(1, 6, 32, device=device), "uncond": torch.zeros(1, 6, 32, device=device)}
session = model.vdcache
with torch.no_grad():
    session.begin(args.steps)
    for step in range(args.steps):
        time = 1000 * (1 - step / args.steps)
        session.step(time)
        out = {}
        for name, text in lanes.items():
            session.lane(name)
            out[name] = model(latent, torch.tensor([time], device=device), text)
        velocity = out["uncond"] + args.guidance * (out["cond"] - out["uncond"])
        latent = latent - velocity / args.steps
    session.end()

torch.save(latent.cpu(), args.out)
print("computed steps:", *session.history.computed_steps())
