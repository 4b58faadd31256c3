"""Pipelines of the examples with tiny random parts, so that each runs anywhere in seconds: (pipeline, arguments of its call)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LATENT = {"height": 64, "width": 64, "output_type": "latent"}
VIDEO = {**LATENT, "num_frames": 9}


def words(width: int, seed: int = 5) -> Tensor:
    """Embeddings of a prompt of six words."""
    return torch.randn(1, 6, width, generator=torch.Generator().manual_seed(seed))


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size at which every branch counts."""
    draw = torch.Generator().manual_seed(seed)
    model.eval().requires_grad_(False)
    for p in model.parameters():
        scale = 0.2 if p.ndim < 2 else 0.5 * p[0].numel() ** -0.5
        around = p.mean().round() if p.ndim < 2 else 0  # 1 for the weights of norms
        p.copy_(around + scale * torch.randn(p.shape, generator=draw))
    return model


def wan() -> tuple[Any, dict[str, Any]]:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=drawn(transformer))
    return pipe, {"prompt_embeds": words(16), "negative_prompt_embeds": words(16, 6), **VIDEO}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    pipe = HunyuanVideoPipeline(transformer=drawn(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **parts)
    mask = torch.ones(1, 6, dtype=torch.long)
    return pipe, {"prompt_embeds": words(16), "pooled_prompt_embeds": words(8)[:, 0], "prompt_attention_mask": mask, **VIDEO}


def cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=6,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipe = CogVideoXPipeline(transformer=drawn(transformer), scheduler=CogVideoXDDIMScheduler(), **parts)
    return pipe, {"prompt_embeds": words(12), "negative_prompt_embeds": words(12, 6), **VIDEO}


def flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    pipe = FluxPipeline(transformer=drawn(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    return pipe, {"prompt_embeds": words(12), "pooled_prompt_embeds": words(8)[:, 0], **LATENT}
