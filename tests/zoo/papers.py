"""Architectures of papers in plain PyTorch, written from their mathematics."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo import noise, register, text, when

# ---- what many of them share -------------------------------------------------------------------------------------------


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def feed_forward(dim, ratio=2):
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(ratio * dim, dim))


def layer_norm(dim):
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def sinusoids(t, dim=16):
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def angles_of(positions, dim):
    return positions.float()[:, None] * 100 ** (-torch.arange(dim // 2) / (dim // 2))


def rotate(x, angles):
    """Rotary embedding of x [.., N, D] by angles [N, D / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Embedder(nn.Module):
    """A number to a vector: sinusoids and an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(sinusoids(t))


class SelfAttention(nn.Module):
    """One linear for q, k and v."""

    def __init__(self, dim, heads=2, qk_norm=False, how="sdpa"):
        super().__init__()
        self.heads, self.how, self.scale = heads, how, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x, angles=None, mask=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if self.how == "sdpa":
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(-2, -1)) * self.scale
            x = (scores if mask is None else scores + mask).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class CrossAttention(nn.Module):
    def __init__(self, dim, context_dim=None, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(context_dim or dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """adaLN-Zero: one attention and one MLP contribution."""

    def __init__(self, dim, attn=None, mlp=None):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn, self.mlp = attn or SelfAttention(dim), mlp or feed_forward(dim)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, *more):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), *more)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Final(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm, self.linear = layer_norm(dim), nn.Linear(dim, out)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.ada(c)[:, None].chunk(2, -1)
        return self.linear(modulate(self.norm(x), shift, scale))


class ImageModel(nn.Module):
    """Patches of an image of 8 × 8, sixteen tokens, and back."""

    def __init__(self, dim=16, channels=4, out=4):
        super().__init__()
        self.patch, self.time, self.final = nn.Conv2d(channels, dim, 2, 2), Embedder(dim), Final(dim, 4 * out)
        self.pos = nn.Parameter(torch.zeros(1, 16, dim))

    def tokens(self, x):
        return self.patch(x).flatten(2).transpose(1, 2) + self.pos

    def image(self, x):
        return torch.einsum("bhwpqc->bchpwq", x.unflatten(1, (4, 4)).unflatten(-1, (2, 2, -1))).reshape(len(x), -1, 8, 8)


def image_call(s, n):
    return {"x": noise(1, 4, 8, 8, step=s), "t": when(s)}


def image_text_call(s, n):
    return {**image_call(s, n), "y": text(1, n, 12)}


def video_call(s, n):
    return {"x": noise(1, 4, 3, 8, 8, step=s), "timestep": when(s), "y": text(1, n, 12)}


# ---- Open-Sora 1.2 -----------------------------------------------------------------------------------------------------


class STDiT3Block(nn.Module):
    def __init__(self, dim, temporal):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn, self.cross_attn, self.mlp = SelfAttention(dim, qk_norm=True), CrossAttention(dim), feed_forward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def select(self, x_mask, x, x_zero, frames):
        if x_mask is None:
            return x
        shape = (len(x), frames, -1, x.shape[-1])
        return torch.where(x_mask[:, :, None, None], x.reshape(shape), x_zero.reshape(shape)).reshape(x.shape)

    def forward(self, x, y, t, t0, x_mask, frames, angles):
        b, _, c = x.shape
        now = (self.scale_shift_table[None] + t.reshape(b, 6, -1)).chunk(6, 1)
        clean = (self.scale_shift_table[None] + t0.reshape(b, 6, -1)).chunk(6, 1)
        h = self.norm1(x)
        h = self.select(x_mask, modulate(h, *now[:2]), modulate(h, *clean[:2]), frames)
        if self.temporal:
            h = h.reshape(b, frames, -1, c).transpose(1, 2).reshape(-1, frames, c)
            h = self.attn(h, angles).reshape(b, -1, frames, c).transpose(1, 2).reshape(x.shape)
        else:
            h = self.attn(h.reshape(b * frames, -1, c)).reshape(x.shape)
        x = x + self.select(x_mask, now[2] * h, clean[2] * h, frames)
        x = x + self.cross_attn(x, y)
        h = self.norm2(x)
        h = self.mlp(self.select(x_mask, modulate(h, *now[3:5]), modulate(h, *clean[3:5]), frames))
        return x + self.select(x_mask, now[5] * h, clean[5] * h, frames)


class STDiT3(nn.Module):
    def __init__(self, depth=2, dim=16):
        super().__init__()
        self.patch = nn.Conv3d(4, dim, (1, 2, 2), (1, 2, 2))
        self.time, self.fps, self.size = Embedder(dim), Embedder(dim), Embedder(dim // 2)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_proj = nn.Sequential(nn.Linear(12, dim), nn.GELU(), nn.Linear(dim, dim))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(dim, False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(dim, True) for _ in range(depth))
        self.norm, self.linear, self.table = layer_norm(dim), nn.Linear(dim, 16), nn.Parameter(torch.zeros(2, dim))

    def embed(self, timestep, fps, size):
        return self.time(timestep) + self.fps(fps) + self.size(size.flatten()).reshape(len(fps), -1)

    def forward(self, x, timestep, y, fps, size, x_mask=None):
        b, _, frames, h, w = x.shape
        t, t0 = self.embed(timestep, fps, size), self.embed(torch.zeros_like(timestep), fps, size)
        x, y = self.patch(x), self.y_proj(y)
        grid = sinusoids(torch.arange(h // 2 * (w // 2)), x.shape[1])
        x = (x.flatten(3).permute(0, 2, 3, 1) + grid).flatten(1, 2)
        more = (y, self.t_block(t), self.t_block(t0), x_mask, frames, angles_of(torch.arange(frames), x.shape[-1] // 2))
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = temporal(spatial(x, *more), *more)
        shift, scale = (self.table[None] + t[:, None]).chunk(2, 1)
        x = self.linear(modulate(self.norm(x), shift, scale)).reshape(b, frames, h // 2, w // 2, 2, 2, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, frames, h, w)


def sora_call(s, n):
    return {**video_call(s, n), "fps": torch.tensor([24.0]), "size": torch.tensor([[8.0, 8.0]])}


# two pairs of a spatial and a temporal block, each with attention, cross-attention to the text and MLP
register("open_sora", STDiT3, sora_call, self_attention=4, cross_attention=4, mlp=4)
register(
    "open_sora_masked",
    STDiT3,
    lambda s, n: {**sora_call(s, n), "x_mask": torch.tensor([[False, True, True]])},
    self_attention=4,
    cross_attention=4,
    mlp=4,
)


# ---- Open-Sora-Plan 1.2 and 1.3 ----------------------------------------------------------------------------------------


class PlanBlock(nn.Module):
    """PixArt's block over all tokens of the video; `sparse` as 1.3 attends: every k-th token, or every k-th group of k."""

    def __init__(self, dim, sparse=None, k=2):
        super().__init__()
        self.sparse, self.k = sparse, k
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn1, self.attn2, self.ff = SelfAttention(dim, qk_norm=True), CrossAttention(dim), feed_forward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def attend(self, h):
        b, n, c = h.shape
        if self.sparse == "tokens":  # b (g k) c -> (k b) g c
            out = self.attn1(h.reshape(b, -1, self.k, c).permute(2, 0, 1, 3).reshape(self.k * b, -1, c))
            return out.reshape(self.k, b, -1, c).permute(1, 2, 0, 3).reshape(b, n, c)
        if self.sparse == "groups":  # b (g m k) c -> (m b) (g k) c
            out = h.reshape(b, -1, self.k, self.k, c).permute(2, 0, 1, 3, 4).reshape(self.k * b, -1, c)
            return self.attn1(out).reshape(self.k, b, -1, self.k, c).permute(1, 2, 0, 3, 4).reshape(b, n, c)
        return self.attn1(h)

    def forward(self, x, y, t):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table[None] + t.unflatten(1, (6, -1))).chunk(6, 1)
        x = gate1 * self.attend(modulate(self.norm1(x), shift1, scale1)) + x
        x = self.attn2(x, y) + x
        return gate2 * self.ff(modulate(self.norm2(x), shift2, scale2)) + x


class OpenSoraPlan(nn.Module):
    def __init__(self, kinds, dim=16):
        super().__init__()
        self.patch, self.time = nn.Conv3d(4, dim, (1, 2, 2), (1, 2, 2)), Embedder(dim)
        self.t_block, self.caption = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)), nn.Linear(12, dim)
        self.blocks = nn.ModuleList(PlanBlock(dim, kind) for kind in kinds)
        self.norm, self.linear, self.table = layer_norm(dim), nn.Linear(dim, 16), nn.Parameter(torch.zeros(2, dim))

    def forward(self, x, timestep, y):
        b, _, frames, h, w = x.shape
        x, y, t = self.patch(x).flatten(2).transpose(1, 2), self.caption(y), self.time(timestep)
        six = self.t_block(t)
        for block in self.blocks:
            x = block(x, y, six)
        shift, scale = (self.table[None] + t[:, None]).chunk(2, 1)
        x = self.linear(modulate(self.norm(x), shift, scale)).reshape(b, frames, h // 2, w // 2, 2, 2, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, frames, h, w)


register("open_sora_plan", lambda: OpenSoraPlan([None] * 3), video_call, self_attention=3, cross_attention=3, mlp=3)
register(
    "open_sora_plan_sparse",
    lambda: OpenSoraPlan([None, "tokens", "groups"]),
    video_call,
    # one dense block and one of each sparse kind
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


# ---- DiT, SiT, Latte as their authors wrote them -----------------------------------------------------------------------


class OriginalDiT(ImageModel):
    """Learned variance: twice the channels come out; SiT writes the attention out and drops the second half."""

    def __init__(self, how="sdpa", depth=3, dim=16, classes=10):
        super().__init__(dim, out=8)
        self.half = how == "math"
        self.labels = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, SelfAttention(dim, how=how)) for _ in range(depth))

    def forward(self, x, t, y):
        x, c = self.tokens(x), self.time(t) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.image(self.final(x, c))
        return x.chunk(2, 1)[0] if self.half else x


def class_call(s, n):
    return {**image_call(s, n), "y": torch.tensor([3])}


register("dit_original", OriginalDiT, class_call, self_attention=3, mlp=3)
register("sit", lambda: OriginalDiT("math"), class_call, self_attention=3, mlp=3)


class LatteOriginal(nn.Module):
    """The stream itself changes its layout: (b f) s c for spatial blocks, (b s) f c for temporal ones."""

    def __init__(self, pairs=2, dim=16, frames=3):
        super().__init__()
        self.patch, self.time, self.final = nn.Conv2d(4, dim, 2, 2), Embedder(dim), Final(dim, 32)
        self.pos, self.temporal_pos = nn.Parameter(torch.zeros(1, 16, dim)), nn.Parameter(torch.zeros(1, frames, dim))
        self.text = nn.Sequential(nn.SiLU(), nn.Linear(12, dim))
        self.blocks = nn.ModuleList(Block(dim, SelfAttention(dim, how="math")) for _ in range(2 * pairs))

    def forward(self, x, timestep, y):
        b, f, _, h, w = x.shape
        x = self.patch(x.reshape(b * f, -1, h, w)).flatten(2).transpose(1, 2) + self.pos
        s = x.shape[1]
        c = self.time(timestep) + self.text(y.mean(1))
        per_frame, per_place = c.repeat_interleave(f, 0), c.repeat_interleave(s, 0)
        for i in range(0, len(self.blocks), 2):
            x = self.blocks[i](x, per_frame)
            x = x.reshape(b, f, s, -1).transpose(1, 2).reshape(b * s, f, -1)
            x = x + self.temporal_pos if i == 0 else x
            x = self.blocks[i + 1](x, per_place)
            x = x.reshape(b, s, f, -1).transpose(1, 2).reshape(b * f, s, -1)
        x = self.final(x, per_frame).reshape(b, f, h // 2, w // 2, 2, 2, -1)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, -1, h, w)


register(
    "latte_original",
    LatteOriginal,
    lambda s, n: {"x": noise(1, 3, 4, 8, 8, step=s), "timestep": when(s), "y": text(1, n, 12)},
    self_attention=4,
    mlp=4,
)


# ---- U-ViT -------------------------------------------------------------------------------------------------------------


class UViTBlock(nn.Module):
    def __init__(self, dim, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = SelfAttention(dim), feed_forward(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    def __init__(self, depth=2, dim=16):
        super().__init__()
        self.patch, self.time, self.context = nn.Conv2d(4, dim, 2, 2), Embedder(dim), nn.Linear(12, dim)
        self.pos = nn.Parameter(torch.zeros(1, 64, dim))
        self.in_blocks = nn.ModuleList(UViTBlock(dim) for _ in range(depth))
        self.mid_block = UViTBlock(dim)
        self.out_blocks = nn.ModuleList(UViTBlock(dim, skip=True) for _ in range(depth))
        self.norm, self.decoder, self.last = nn.LayerNorm(dim), nn.Linear(dim, 16), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, t, y):
        x = torch.cat([self.time(t)[:, None], self.context(y), self.patch(x).flatten(2).transpose(1, 2)], 1)
        x = x + self.pos[:, : x.shape[1]]
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder(self.norm(x))[:, 1 + y.shape[1] :]
        x = x.reshape(len(x), 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(len(x), 4, 8, 8)
        return self.last(x)


# 2 + 1 + 2 blocks over one sequence of time, text and image; the long skips are concatenated, not added
register("u_vit", UViT, image_text_call, self_attention=5, mlp=5)


# ---- DiCo --------------------------------------------------------------------------------------------------------------


class ConvModule(nn.Module):
    """Pointwise and depthwise convolution, then compact channel attention."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv3 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.channels = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1), nn.Sigmoid())

    def forward(self, x):
        x = F.gelu(self.conv2(self.conv1(x)))
        return self.conv3(x * self.channels(x))


class DiCoBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2, self.conv = layer_norm(dim), layer_norm(dim), ConvModule(dim)
        self.ffn = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def norm(self, norm, x, shift, scale):
        return modulate(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), shift, scale)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, :, None, None].chunk(6, 1)
        x = x + gate1 * self.conv(self.norm(self.norm1, x, shift1, scale1))
        return x + gate2 * self.ffn(self.norm(self.norm2, x, shift2, scale2))


class DiCo(nn.Module):
    """A U of convolutional blocks at two resolutions."""

    def __init__(self, dim=16):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, dim, 3, padding=1), nn.Conv2d(dim, 4, 3, padding=1)
        self.time, self.labels = Embedder(dim), nn.Embedding(10, dim)
        self.down, self.up = nn.Conv2d(dim, dim, 2, 2), nn.ConvTranspose2d(dim, dim, 2, 2)
        self.merge = nn.Conv2d(2 * dim, dim, 1)
        self.encoder, self.middle, self.decoder = (nn.ModuleList(DiCoBlock(dim) for _ in range(2)) for _ in range(3))

    def forward(self, x, t, y):
        x, c = self.first(x), self.time(t) + self.labels(y)
        for block in self.encoder:
            x = block(x, c)
        skip, x = x, self.down(x)
        for block in self.middle:
            x = block(x, c)
        x = self.merge(torch.cat([self.up(x), skip], 1))
        for block in self.decoder:
            x = block(x, c)
        return self.last(x)


# three stages of two blocks: a convolutional module and a pointwise feed-forward each
register("dico", DiCo, class_call, other=6, mlp=6)


# ---- selective state spaces --------------------------------------------------------------------------------------------


class SelectiveScan(nn.Module):
    """Mamba's mixer: h' = exp(Δ A) h + Δ B x, y = C h; as a closed form of cumulative sums, or step by step."""

    def __init__(self, dim, states=4, order=None, loop=False):
        super().__init__()
        self.inp, self.out, self.loop, self.states = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim), loop, states
        self.conv = nn.Conv1d(2 * dim, 2 * dim, 3, padding=2, groups=2 * dim)
        self.select, self.step = nn.Linear(2 * dim, 2 * states + 1), nn.Linear(1, 2 * dim)
        self.log_a, self.skip = nn.Parameter(torch.zeros(states)), nn.Parameter(torch.ones(2 * dim))
        order = torch.arange(16) if order is None else order
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def scan(self, rate, u):
        if self.loop:
            h, rows = torch.zeros_like(u[:, 0]), []
            for i in range(u.shape[1]):
                h = rate[:, i].exp() * h + u[:, i]
                rows.append(h)
            return torch.stack(rows, 1)
        total = rate.cumsum(1)
        return total.exp() * (u * (-total).exp()).cumsum(1)

    def forward(self, x):
        x, z = self.inp(x[:, self.order]).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        delta, b, c = self.select(x).split([1, self.states, self.states], -1)
        delta = F.softplus(self.step(delta))
        h = self.scan(-delta[..., None] * self.log_a.exp(), (delta * x)[..., None] * b[:, :, None])
        y = (h * c[:, :, None]).sum(-1) + self.skip * x
        return self.out(y * F.silu(z))[:, self.back]


class ZigmaBlock(nn.Module):
    def __init__(self, dim, cross, **how):
        super().__init__()
        self.norm, self.mixer, self.ada = nn.RMSNorm(dim), SelectiveScan(dim, **how), nn.Linear(dim, 3 * dim)
        self.cross = CrossAttention(dim, 12) if cross else None

    def forward(self, x, c, y):
        shift, scale, gate = self.ada(F.silu(c))[:, None].chunk(3, -1)
        x = x + gate * self.mixer(modulate(self.norm(x), shift, scale))
        return x if self.cross is None else x + self.cross(x, y)


class Zigma(ImageModel):
    """Each block reads the image along another path."""

    def __init__(self, depth=3, dim=16, cross=True, loop=False):
        super().__init__(dim)
        grid = torch.arange(16).reshape(4, 4)
        snake = torch.stack([row.flip(0) if i % 2 else row for i, row in enumerate(grid)])
        paths = [snake.flatten(), snake.T.flatten(), snake.flatten().flip(0)]
        self.blocks = nn.ModuleList(ZigmaBlock(dim, cross, order=paths[i], loop=loop) for i in range(depth))

    def forward(self, x, t, y):
        x, c = self.tokens(x), self.time(t) + y.mean((1, 2), keepdim=True)[..., 0]
        for block in self.blocks:
            x = block(x, c, y)
        return self.image(self.final(x, c))


register("zigma", Zigma, image_text_call, other=3, cross_attention=3)
# the recurrence step by step: what it adds to its state is inside the branch, not on the stream
register("dim_loop", lambda: Zigma(2, cross=False, loop=True), image_text_call, other=2)


# ---- linear attention --------------------------------------------------------------------------------------------------


class LinearAttention(nn.Module):
    """A feature map in place of the softmax."""

    def __init__(self, dim, feature, heads=2):
        super().__init__()
        self.feature, self.heads = feature, heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.feature(q), self.feature(k)
        state = torch.einsum("bnhd,bnhe->bhde", k, v)
        total = torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
        return self.proj((torch.einsum("bnhd,bhde->bnhe", q, state) / (total[..., None] + 1e-6)).flatten(2))


class MixFFN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.inverted, self.point = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.depth = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)

    def forward(self, x):
        x = self.depth(F.silu(self.inverted(x.transpose(1, 2).unflatten(-1, (4, 4)))))
        x, gate = x.chunk(2, 1)
        return self.point(x * F.silu(gate)).flatten(2).transpose(1, 2)


class LinearBlock(nn.Module):
    def __init__(self, dim, feature):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn, self.cross_attn, self.mlp = LinearAttention(dim, feature), CrossAttention(dim, 12), MixFFN(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x, y, six):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + six).chunk(6, 1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attn(x, y)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class LinearDiT(ImageModel):
    def __init__(self, feature, depth=3, dim=16):
        super().__init__(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(LinearBlock(dim, feature) for _ in range(depth))

    def forward(self, x, t, y):
        x, c = self.tokens(x), self.time(t)
        six = self.t_block(c).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, y, six)
        return self.image(self.final(x, c))


register("sana_original", lambda: LinearDiT(F.relu), image_text_call, self_attention=3, cross_attention=3, mlp=3)
register("linear_elu", lambda: LinearDiT(lambda x: F.elu(x) + 1), image_text_call, self_attention=3, cross_attention=3, mlp=3)


# ---- parallel branches -------------------------------------------------------------------------------------------------


class ParallelBlock(nn.Module):
    """Attention and MLP of the same normed input, each normed again, added as one."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.post_attn, self.post_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attn, self.mlp = SelfAttention(dim, qk_norm=True), feed_forward(dim)

    def forward(self, x, shift, scale, gate):
        h = modulate(self.norm(x), shift, scale)
        return x + gate * (self.post_attn(self.attn(h)) + self.post_mlp(self.mlp(h)))


class ParallelDiT(ImageModel):
    """One modulation for every block."""

    def __init__(self, depth=3, dim=16):
        super().__init__(dim)
        self.shared = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.blocks = nn.ModuleList(ParallelBlock(dim) for _ in range(depth))

    def forward(self, x, t):
        x, c = self.tokens(x), self.time(t)
        three = self.shared(c)[:, None].chunk(3, -1)
        for block in self.blocks:
            x = block(x, *three)
        return self.image(self.final(x, c))


register("parallel", ParallelDiT, image_call, fused=3)


# ---- every spelling of a residual addition -----------------------------------------------------------------------------


def in_place(x, gate, h):
    x += gate * h
    return x


SPELLINGS = {
    "addcmul": torch.addcmul,
    "alpha": lambda x, gate, h: torch.add(x, gate * h, alpha=0.5),
    "in_place": in_place,
    "lerp": lambda x, gate, h: torch.lerp(x, gate * h, 0.3),
    "scaled_sum": lambda x, gate, h: (x + gate * h) / math.sqrt(2),
    "scaled_skip": lambda x, gate, h: 0.7 * x + gate * h,
    "minus": lambda x, gate, h: x - (-(gate * h)),
    "stack": lambda x, gate, h: torch.stack([x, gate * h]).sum(0),
    "transposed": lambda x, gate, h: (x.transpose(1, 2) + (gate * h).transpose(1, 2)).transpose(1, 2),
    "flat": lambda x, gate, h: (x.reshape(-1) + (gate * h).reshape(-1)).view(x.shape),
    "half": lambda x, gate, h: x + gate * h.float(),
}


class SpelledBlock(nn.Module):
    def __init__(self, dim, spelling):
        super().__init__()
        self.spelling, self.dtype = spelling, torch.bfloat16 if spelling == "half" else torch.float32
        self.norm1, self.norm2, self.ada = layer_norm(dim), layer_norm(dim), nn.Linear(dim, 6 * dim)
        self.attn, self.mlp = SelfAttention(dim).to(self.dtype), feed_forward(dim).to(self.dtype)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c))[:, None].chunk(6, -1)
        if self.spelling == "at_once":
            attn = self.attn(modulate(self.norm1(x), shift1, scale1))
            return x + gate1 * attn + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        if self.spelling == "branches_first":
            attn = self.attn(modulate(self.norm1(x), shift1, scale1))
            return gate1 * attn + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2)) + x
        add = SPELLINGS[self.spelling]
        x = add(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1).to(self.dtype)))
        return add(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2).to(self.dtype)))


class SpelledDiT(ImageModel):
    def __init__(self, *spellings, dim=16):
        super().__init__(dim)
        self.blocks = nn.ModuleList(SpelledBlock(dim, spelling) for spelling in spellings)

    def forward(self, x, t):
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(self.final(x, c))


for spelling in [*SPELLINGS, "at_once"]:  # (x + attention) + MLP is two additions, though of one input
    register(f"spelled_{spelling}", lambda s=spelling: SpelledDiT(s, s), image_call, self_attention=2, mlp=2)
# (attention + MLP) + x is one
register("spelled_branches_first", lambda: SpelledDiT(*["branches_first"] * 2), image_call, fused=2)
register(
    "every_spelling",
    lambda: SpelledDiT(*SPELLINGS, "at_once", "branches_first"),
    image_call,
    # one block a spelling, and the two that add both branches at once
    self_attention=len(SPELLINGS) + 1,
    mlp=len(SPELLINGS) + 1,
    fused=1,
)


# ---- FlexAttention -----------------------------------------------------------------------------------------------------


class FlexAttention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2))


class FlexDiT(ImageModel):
    """Neighbourhood attention: a block mask of tokens at most two rows apart, built once."""

    def __init__(self, depth=3, dim=32):
        from torch.nn.attention.flex_attention import create_block_mask

        super().__init__(dim)
        self.mask = create_block_mask(lambda b, h, q, k: (q // 4 - k // 4).abs() <= 2, None, None, 16, 16, device="cpu")
        self.blocks = nn.ModuleList(Block(dim, FlexAttention(dim)) for _ in range(depth))

    def forward(self, x, t):
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c, self.mask)
        return self.image(self.final(x, c))


register("flex", FlexDiT, image_call, self_attention=3, mlp=3)


# ---- video and audio ---------------------------------------------------------------------------------------------------


class AudioVideoBlock(nn.Module):
    """In each stream: self-attention, the text, the other stream, MLP."""

    def __init__(self, video, audio):
        super().__init__()
        for name, dim, other in (("video", video, audio), ("audio", audio, video)):
            parts = {"attn": SelfAttention(dim, qk_norm=True), "text": CrossAttention(dim, 12), "mlp": feed_forward(dim)}
            parts |= {"ada": nn.Linear(dim, 9 * dim), "other": CrossAttention(dim, other), "norm": nn.RMSNorm(dim)}
            self.add_module(name, nn.ModuleDict(parts))

    def own(self, part, x, y, ada):
        x = x + ada[2] * part["attn"](modulate(part["norm"](x), *ada[:2]))
        return x + part["text"](part["norm"](x), y)

    def forward(self, v, a, y, cv, ca):
        ada_v, ada_a = self.video["ada"](cv)[:, None].chunk(9, -1), self.audio["ada"](ca)[:, None].chunk(9, -1)
        v, a = self.own(self.video, v, y, ada_v), self.own(self.audio, a, y, ada_a)
        normed_v, normed_a = self.video["norm"](v), self.audio["norm"](a)
        v = v + ada_v[5] * self.video["other"](modulate(normed_v, *ada_v[3:5]), normed_a)
        a = a + ada_a[5] * self.audio["other"](modulate(normed_a, *ada_a[3:5]), normed_v)
        v = v + ada_v[8] * self.video["mlp"](modulate(self.video["norm"](v), *ada_v[6:8]))
        a = a + ada_a[8] * self.audio["mlp"](modulate(self.audio["norm"](a), *ada_a[6:8]))
        return v, a


class AudioVideoDiT(nn.Module):
    def __init__(self, depth=2, video=32, audio=16):
        super().__init__()
        self.video_in, self.audio_in = nn.Linear(8, video), nn.Linear(6, audio)
        self.video_time, self.audio_time = Embedder(video), Embedder(audio)
        self.blocks = nn.ModuleList(AudioVideoBlock(video, audio) for _ in range(depth))
        self.video_out, self.audio_out = Final(video, 8), Final(audio, 6)

    def forward(self, video, audio, timestep, y):
        cv, ca = self.video_time(timestep), self.audio_time(timestep)
        v, a = self.video_in(video), self.audio_in(audio)
        for block in self.blocks:
            v, a = block(v, a, y, cv, ca)
        return self.video_out(v, cv), self.audio_out(a, ca)


register(
    "audio_video",
    AudioVideoDiT,
    lambda s, n: {
        "video": noise(1, 12, 8, step=s),
        "audio": noise(1, 5, 6, seed=1, step=s),
        "timestep": when(s),
        "y": text(1, n, 12),
    },
    # two blocks, two streams: self-attention, text, the other stream, MLP
    self_attention=4,
    cross_attention=8,
    mlp=4,
)


# ---- clean tokens of the first frame -----------------------------------------------------------------------------------


class TokenReplaceBlock(Block):
    """HunyuanVideo's: the first frame's tokens take the modulation of t = 0, joined by cat."""

    def forward(self, x, c, c0, first):
        now, clean = self.ada(c)[:, None].chunk(6, -1), self.ada(c0)[:, None].chunk(6, -1)

        def joined(fn, x, i, j):
            return torch.cat([fn(x[:, :first], *clean[i:j]), fn(x[:, first:], *now[i:j])], 1)

        x = x + joined(torch.mul, self.attn(joined(modulate, self.norm1(x), 0, 2)), 2, 3)
        return x + joined(torch.mul, self.mlp(joined(modulate, self.norm2(x), 3, 5)), 5, 6)


class TokenReplaceDiT(nn.Module):
    """`how` the clean frame stays clean: by where or cat before each block, or by its own modulation."""

    def __init__(self, how, depth=3, dim=16):
        super().__init__()
        self.how, self.inp, self.time, self.final = how, nn.Linear(4, dim), Embedder(dim), Final(dim, 4)
        self.blocks = nn.ModuleList((TokenReplaceBlock if how == "modulation" else Block)(dim) for _ in range(depth))

    def forward(self, x, t, image):
        first, clean = image.shape[1], self.inp(image)
        x, c, c0 = self.inp(x), self.time(t), self.time(torch.zeros_like(t))
        mask = (torch.arange(x.shape[1]) < first)[None, :, None]
        padded = F.pad(clean, (0, 0, 0, x.shape[1] - first))
        for block in self.blocks:
            if self.how == "where":
                x = torch.where(mask, padded, x)
            elif self.how == "cat":
                x = torch.cat([clean, x[:, first:]], 1)
            x = block(x, c, c0, first) if self.how == "modulation" else block(x, c)
        return self.final(x, c)


for how in ("where", "cat", "modulation"):
    register(
        f"token_replace_{how}",
        lambda how=how: TokenReplaceDiT(how),
        lambda s, n: {"x": noise(1, 18, 4, step=s), "t": when(s), "image": text(1, 6, 4)},
        self_attention=3,
        mlp=3,
    )


# ---- small changes of a DiT --------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """All experts computed, the best two weighted, and one shared."""

    def __init__(self, dim, experts=4):
        super().__init__()
        self.router, self.shared = nn.Linear(dim, experts, bias=False), feed_forward(dim)
        self.up, self.down = nn.Parameter(torch.zeros(experts, dim, 2 * dim)), nn.Parameter(torch.zeros(experts, 2 * dim, dim))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        best, which = scores.topk(2, -1)
        weights = torch.zeros_like(scores).scatter(-1, which, best / best.sum(-1, keepdim=True))
        each = torch.einsum("bneh,ehd->bned", F.silu(torch.einsum("bnd,edh->bneh", x, self.up)), self.down)
        return (weights[..., None] * each).sum(2) + self.shared(x)


class MoEDiT(ImageModel):
    def __init__(self, depth=3, dim=16):
        super().__init__(dim)
        self.blocks = nn.ModuleList(Block(dim, mlp=Experts(dim)) for _ in range(depth))

    def forward(self, x, t):
        x, c = self.tokens(x), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.image(self.final(x, c))


register("moe", MoEDiT, image_call, self_attention=3, mlp=3)


class PrefixDiT(ImageModel):
    """Text before the image in one sequence; the text leaves before the last block."""

    def __init__(self, depth=3, dim=16):
        super().__init__(dim)
        self.text = nn.Linear(12, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x, t, y):
        x, c = torch.cat([self.text(y), self.tokens(x)], 1), self.time(t)
        for block in self.blocks[:-1]:
            x = block(x, c)
        x = self.blocks[-1](x[:, y.shape[1] :], c)
        return self.image(self.final(x, c))


register("text_prefix", PrefixDiT, image_text_call, self_attention=3, mlp=3)


class ControlDiT(ImageModel):
    """Register tokens in the stream; a side network whose zero-initialised linears add a hint after every block."""

    def __init__(self, depth=3, dim=16, registers=4):
        super().__init__(dim)
        self.registers = nn.Parameter(torch.zeros(1, registers, dim))
        self.control, self.merge = nn.Conv2d(3, dim, 2, 2), nn.Linear(2 * dim, dim)
        self.blocks, self.side = (nn.ModuleList(Block(dim) for _ in range(depth)) for _ in range(2))
        self.zero = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))

    def forward(self, x, t, control):
        x, c = self.tokens(x), self.time(t)
        n = self.registers.shape[1]
        side = self.merge(torch.cat([x, self.control(control).flatten(2).transpose(1, 2)], -1))
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        for block, copy, zero in zip(self.blocks, self.side, self.zero, strict=True):
            side = copy(side, c)
            x = block(x, c) + F.pad(zero(side), (0, 0, n, 0))
        return self.image(self.final(x[:, n:], c))


register(
    "control",
    ControlDiT,
    lambda s, n: {**image_call(s, n), "control": text(1, 3, 8, 8)},
    # three blocks and their three copies; a hint after each
    self_attention=6,
    mlp=6,
    other=3,
)


class RecurrentDiT(ImageModel):
    """One block before, one block three times, one block after."""

    def __init__(self, dim=16, times=3):
        super().__init__(dim)
        self.prelude, self.core, self.coda, self.times = Block(dim), Block(dim), Block(dim), times

    def forward(self, x, t):
        x, c = self.tokens(x), self.time(t)
        x = self.prelude(x, c)
        for _ in range(self.times):
            x = self.core(x, c)
        return self.image(self.final(self.coda(x, c), c))


register("recurrent", RecurrentDiT, image_call, self_attention=5, mlp=5)


# ---- MDT, MaskDiT, FiT -------------------------------------------------------------------------------------------------


class BiasedAttention(SelfAttention):
    """MDT's: a learned bias for every pair of places."""

    def __init__(self, dim):
        super().__init__(dim, how="math")
        self.bias = nn.Parameter(torch.zeros(self.heads, 16, 16))

    def forward(self, x):
        return super().forward(x, mask=self.bias)


class MDTBlock(Block):
    def __init__(self, dim, skip=False):
        super().__init__(dim, BiasedAttention(dim))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, c, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        return super().forward(x, c)


class MDT(ImageModel):
    """Encoder with long skips, then a decoder that sees the first tokens again."""

    def __init__(self, dim=16):
        super().__init__(dim)
        self.labels, self.decoder_pos = nn.Embedding(10, dim), nn.Parameter(torch.zeros(1, 16, dim))
        self.en_in, self.en_out, self.de = (
            nn.ModuleList(MDTBlock(dim, skip) for _ in range(2)) for skip in (False, True, True)
        )

    def forward(self, x, t, y):
        x, c = self.tokens(x), self.time(t) + self.labels(y)
        start, skips = x, []
        for block in self.en_in:
            x = block(x, c)
            skips.append(x)
        for block in self.en_out:
            x = block(x, c, skips.pop())
        x = x + self.decoder_pos
        for block in self.de:
            x = block(x, c, start)
        return self.image(self.final(x, c))


# 2 + 2 blocks of the encoder, 2 of the decoder
register("mdt", MDT, class_call, self_attention=6, mlp=6)


class MaskDiT(ImageModel):
    """The encoder sees some tokens, a narrower decoder all of them with a mask token in place of the rest."""

    def __init__(self, dim=32, small=16):
        super().__init__(dim)
        self.encoder, self.decoder = (nn.ModuleList(Block(d) for _ in range(2)) for d in (dim, small))
        self.narrow, self.narrow_c, self.final = nn.Linear(dim, small), nn.Linear(dim, small), Final(small, 16)
        self.mask_token, self.decoder_pos = nn.Parameter(torch.zeros(1, 1, small)), nn.Parameter(torch.zeros(1, 16, small))

    def forward(self, x, t, keep, restore):
        x, c = self.tokens(x), self.time(t)
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        for block in self.encoder:
            x = block(x, c)
        x, c = self.narrow(x), self.narrow_c(c)
        x = torch.cat([x, self.mask_token.expand(len(x), restore.shape[1] - x.shape[1], -1)], 1)
        x = x.gather(1, restore[..., None].expand(-1, -1, x.shape[-1])) + self.decoder_pos
        for block in self.decoder:
            x = block(x, c)
        return self.image(self.final(x, c))


SHUFFLE = torch.arange(16) * 5 % 16
register(
    "maskdit",
    MaskDiT,
    lambda s, n: {**image_call(s, n), "keep": SHUFFLE[None, :8], "restore": SHUFFLE.argsort()[None]},
    self_attention=4,
    mlp=4,
)


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FiT(nn.Module):
    """Patches of any image in a padded sequence: rotary embedding of two axes, attention masked where padded."""

    def __init__(self, depth=3, dim=16):
        super().__init__()
        self.inp, self.time, self.labels, self.final = nn.Linear(16, dim), Embedder(dim), nn.Embedding(10, dim), Final(dim, 16)
        self.blocks = nn.ModuleList(Block(dim, SelfAttention(dim, qk_norm=True), SwiGLU(dim)) for _ in range(depth))

    def forward(self, x, t, y, grid, valid):
        x, c = self.inp(x), self.time(t) + self.labels(y)
        angles = torch.cat([angles_of(grid[0], 4), angles_of(grid[1], 4)], -1)
        mask = valid[:, None, None]
        for block in self.blocks:
            x = block(x, c, angles, mask)
        return self.final(x, c) * valid[..., None]


register(
    "fit",
    FiT,
    lambda s, n: {
        "x": noise(1, 16, 16, step=s),
        "t": when(s),
        "y": torch.tensor([3]),
        "grid": torch.stack([torch.arange(16) // 4, torch.arange(16) % 4]),
        "valid": torch.arange(16)[None] < 12,
    },
    self_attention=3,
    mlp=3,
)
