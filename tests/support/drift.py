"""A model whose values are known in closed form."""

from __future__ import annotations

import torch
from torch import nn

from vdcache.testing import TinyDiT


class Drift(nn.Module):
    """A DiT whose branch is a known function of the step, whatever the latent: predictions can be told exactly."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree, self.eye = degree, nn.Linear(4, 4, bias=False)
        self.time = nn.Linear(8, 4)
        with torch.no_grad():
            self.eye.weight.copy_(torch.eye(4))
        self.eval().requires_grad_(False)

    def forward(self, x, timestep, text):
        sinusoids = 0 * self.time(TinyDiT.sinusoids(None, timestep, x.dtype))[:, None]
        s = (1000 - timestep) / 50  # the step
        h = self.eye(x) + sinusoids
        h = h + self.eye(0 * h + (text * s**self.degree).to(x.dtype))
        return h
