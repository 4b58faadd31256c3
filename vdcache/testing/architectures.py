"""Classes of diffusers, at small sizes."""

from __future__ import annotations

from typing import Any

import torch

from vdcache.testing.models import diffusers_class, noise, register, text, when

register(
    "dit",
    diffusers_class(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": when(s, torch.int64),
        "class_labels": torch.tensor([3]),
    },
    self_attention=3,
    mlp=3,
)


register(
    "pixart",
    diffusers_class(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "latte",
    diffusers_class(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=12,
        video_length=3,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 12),
    },
    self_attention=4,
    cross_attention=2,
    mlp=4,
)


def _wan(num_layers: int = 3) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


register(
    "wan",
    _wan,
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "cogvideox",
    diffusers_class(
        "CogVideoXTransformer3DModel",
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
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 3, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
    },
    # image and text in each of three blocks; nothing reads the text after the last MLP, so that one is never computed
    joint_attention=6,
    mlp=5,
)


register(
    "hunyuan_video",
    diffusers_class(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 6, 6, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.long),
        "pooled_projections": text(1, 8),
        "guidance": torch.tensor([6016.0]),
    },
    # two double blocks (image and text each), two single blocks (one fused contribution), one refiner block
    joint_attention=4,
    fused=2,
    self_attention=1,
    mlp=5,
)


register(
    "ltx",
    diffusers_class(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=12,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 3 * 4 * 4, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        "encoder_attention_mask": torch.ones(1, n),
        "num_frames": 3,
        "height": 4,
        "width": 4,
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "sd3",
    diffusers_class(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "pooled_projections": text(1, 8),
        "timestep": when(s),
    },
    # image: 3 joint + 3 MLP, one block with a second, image-only attention; text: 2 + 2 (the last block drops it)
    joint_attention=5,
    self_attention=1,
    mlp=5,
)


register(
    "flux",
    diffusers_class(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "pooled_projections": text(1, 8),
        "timestep": when(s) / 1000,
        "img_ids": text(16, 3),
        "txt_ids": torch.zeros(n, 3),
        "guidance": torch.tensor([3.5]),
    },
    joint_attention=4,
    fused=2,
    mlp=4,
)
