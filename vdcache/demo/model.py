"""A small video DiT: the network that `vdcache demo` runs on.

The mathematics is that of diffusers' `WanTransformer3DModel` (Wan 2.1, text to video): every block adds a
self-attention over all video tokens (3D rotary positions, RMS-normalised queries and keys), a cross-attention
to the condition tokens and an MLP to one residual stream, the first and the last behind adaLN gates. Parameters
carry the same names and shapes, so one file of weights loads into both classes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DemoConfig", "DemoDiT", "example", "with_positions"]


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the network. The defaults are those of the shipped weights."""

    patch_size: tuple[int, int, int] = (1, 4, 4)
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    in_channels: int = 6  # red, green, blue, and where the pixel is: time, down, right
    out_channels: int = 3
    text_dim: int = 32
    freq_dim: int = 64
    ffn_dim: int = 512
    num_layers: int = 8
    eps: float = 1e-6
    rope_max_seq_len: int = 64

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def diffusers_kwargs(self) -> dict[str, Any]:
        """Arguments that make diffusers' `WanTransformer3DModel` the same network."""
        return {**asdict(self), "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}


def with_positions(video: Tensor) -> Tensor:
    """The input of the network: `video` [B, 3, T, H, W] and, as three more channels, the time, row and column of every pixel, each of about unit variance.

    Rotary positions are relative: a small network does not learn from them where a frame begins and ends, and without that
    no sprite ever went the way it was told.
    """
    b, _, t, h, w = video.shape
    axes = [torch.linspace(-(3**0.5), 3**0.5, n, device=video.device, dtype=video.dtype) for n in (t, h, w)]
    return torch.cat([video, torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(b, -1, -1, -1, -1)], 1)


class DemoAttention(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.to_q = nn.Linear(c.dim, c.dim)
        self.to_k = nn.Linear(c.dim, c.dim)
        self.to_v = nn.Linear(c.dim, c.dim)
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim)])
        self.norm_q = nn.RMSNorm(c.dim, eps=c.eps)
        self.norm_k = nn.RMSNorm(c.dim, eps=c.eps)

    def forward(self, x: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of `x` [B, N, heads, head_dim] on interleaved pairs of channels."""
    cos, sin = rotary
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1).flatten(-2).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        # the names under which the same layers stand in diffusers: net.0.proj and net.2
        up = nn.ModuleDict({"proj": nn.Linear(c.dim, c.ffn_dim)})
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(c.ffn_dim, c.dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))  # type: ignore[index]


class DemoBlock(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False)
        self.attn1 = DemoAttention(c)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.eps)
        self.attn2 = DemoAttention(c)
        self.norm3 = nn.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False)
        self.ffn = FeedForward(c)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        table = (self.scale_shift_table + modulation.float()).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table
        h = self.norm1(x) * (1 + scale_a) + shift_a
        x = x + self.attn1(h, h, rotary) * gate_a
        x = x + self.attn2(self.norm2(x), text, None)
        h = self.norm3(x) * (1 + scale_m) + shift_m
        return x + self.ffn(h) * gate_m


class TwoLayers(nn.Module):
    """linear_2(act(linear_1 x)): the shape of the timestep and the text embedders."""

    def __init__(self, in_dim: int, dim: int, act: str) -> None:
        super().__init__()
        self.act = act
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear_1(x)
        return self.linear_2(F.silu(h) if self.act == "silu" else F.gelu(h, approximate="tanh"))


class ConditionEmbedder(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.freq_dim = c.freq_dim
        self.time_embedder = TwoLayers(c.freq_dim, c.dim, "silu")
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embedder = TwoLayers(c.text_dim, c.dim, "gelu")

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = self.freq_dim // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
        angles = timestep[:, None].float() * rates
        sinusoids = torch.cat([angles.cos(), angles.sin()], -1)
        time = self.time_embedder(sinusoids.to(self.time_proj.weight.dtype))
        return time, self.time_proj(F.silu(time)), self.text_embedder(text)


class DemoDiT(nn.Module):
    """Predicts the velocity of a noised video.

    Args of `forward` (B videos, C channels, T frames, H × W pixels, L condition tokens):
        hidden_states: [B, C, T, H, W], the noised video and its positions (`with_positions`).
        timestep: [B], 0 (clean) to 1000 (noise), any real dtype.
        encoder_hidden_states: [B, L, text_dim], from `conditions.encode`.

    Returns the velocity noise − video, [B, out_channels, T, H, W].
    """

    cos_t: Tensor
    sin_t: Tensor
    cos_s: Tensor
    sin_s: Tensor

    def __init__(self, config: DemoConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DemoConfig()
        self.patch_embedding = nn.Conv3d(c.in_channels, c.dim, c.patch_size, stride=c.patch_size)
        self.condition_embedder = ConditionEmbedder(c)
        self.blocks = nn.ModuleList(DemoBlock(c) for _ in range(c.num_layers))
        self.norm_out = nn.LayerNorm(c.dim, eps=c.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)

        # Each axis has its own share of the channels; height and width get the same, time the rest.
        space = 2 * (c.attention_head_dim // 6)
        positions = torch.arange(c.rope_max_seq_len, dtype=torch.float64)
        for axis, width in (("t", c.attention_head_dim - 2 * space), ("s", space)):
            rates = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles = torch.outer(positions, rates)
            self.register_buffer(f"cos_{axis}", angles.cos().float(), persistent=False)
            self.register_buffer(f"sin_{axis}", angles.sin().float(), persistent=False)

    def rotary(self, t: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for a grid of t × h × w tokens, each [1, t·h·w, 1, head_dim / 2]."""

        def table(time: Tensor, space: Tensor) -> Tensor:
            parts = (
                time[:t].view(t, 1, 1, -1).expand(t, h, w, -1),
                space[:h].view(1, h, 1, -1).expand(t, h, w, -1),
                space[:w].view(1, 1, w, -1).expand(t, h, w, -1),
            )
            return torch.cat(parts, -1).reshape(1, t * h * w, 1, -1)

        return table(self.cos_t, self.cos_s), table(self.sin_t, self.sin_s)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        b, _, frames, height, width = hidden_states.shape
        pt, ph, pw = self.config.patch_size
        t, h, w = frames // pt, height // ph, width // pw
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        time, modulation, text = self.condition_embedder(timestep, encoder_hidden_states)
        modulation = modulation.unflatten(1, (6, -1))
        rotary = self.rotary(t, h, w)
        for block in self.blocks:
            x = block(x, text, modulation, rotary)
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.reshape(b, t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def example() -> tuple[DemoDiT, tuple[Tensor, ...], dict[str, Any]]:
    """A model and its arguments, as `vdcache explain vdcache.demo.model:example` takes them. On the meta device: no weights, no memory."""
    with torch.device("meta"):
        model = DemoDiT().eval()
        return model, (with_positions(torch.empty(1, 3, 8, 24, 24)), torch.empty(1), torch.empty(1, 5, 32)), {}
