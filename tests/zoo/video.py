"""diffusers' video transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import diffusers_class, noise, register, text, when


def _long(n: int, width: int) -> Tensor:
    """A text padded to 512 tokens, the length at which Wan's image-to-video models cut image from text."""
    return F.pad(text(1, n, width), (0, 0, 0, 512 - n))


register(
    "mochi",
    diffusers_class(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=12,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 2, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 16),
        "timestep": when(s, torch.int64),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.bool),
    },
    # image and text in each of three blocks, no text output in the last one (context_pre_only)
    joint_attention=5,
    mlp=5,
    graphs=11,  # Dynamo stops at the count of valid text tokens in every block and compiles a block once
    # each attention breaks at torch.nonzero(mask), before its sum
    seen={"mlp": 5},
)


register(
    "wan_i2v",
    diffusers_class(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=8,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        image_dim=20,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    ),
    lambda s, n: {
        "hidden_states": torch.cat([noise(1, 4, 3, 8, 8, step=s), noise(1, 4, 3, 8, 8, seed=1)], 1),
        "timestep": when(s),
        "encoder_hidden_states": _long(n, 16),
        "encoder_hidden_states_image": text(1, 5, 20, seed=8),
    },
    # the attention to the image is summed with the attention to the text before one output projection
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "wan_vace",
    diffusers_class(
        "WanVACETransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
        "control_hidden_states": noise(1, 6, 3, 8, 8, seed=2),
    },
    # three blocks of the video and two of the control, of three branches each; a linear of the control goes into the video
    # after layers 0 and 2 (`proj_in(control) + video`, before the first control block, adds up two embeddings)
    self_attention=5,
    cross_attention=5,
    mlp=5,
    other=2,
)


def _rope(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tokens' positions, every frequency twice."""
    angles = torch.outer(torch.arange(tokens), 0.5 ** torch.arange(width // 2)).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def _allegro_rope(frames: int, side: int, width: int):
    """The same frequencies on each axis of the grid, and the grid itself."""
    cos, sin = _rope(max(frames, side), width)
    grid = torch.meshgrid(torch.arange(frames), torch.arange(side), torch.arange(side), indexing="ij")
    return ((cos, sin),) * 3, tuple(g.reshape(1, -1) for g in grid)


register(
    "allegro",
    diffusers_class(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
        caption_channels=16,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 2, 8, 8, step=s),
        "encoder_hidden_states": text(1, 1, n, 16),
        "timestep": when(s),
        "attention_mask": torch.ones(1, 2, 8, 8),
        "encoder_attention_mask": torch.ones(1, n),
        "image_rotary_emb": _allegro_rope(2, 4, 4),
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "easyanimate",
    diffusers_class(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=16,
        add_norm_text_encoder=True,
        text_embed_dim=12,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 2, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 12),
    },
    # image and text in two blocks with weights of their own and two with common weights; nothing reads the last one's text
    joint_attention=7,
    mlp=7,
)


register(
    "cosmos",
    diffusers_class(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=12,
        adaln_lora_dim=8,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 2, 8, 8, step=s),
        "timestep": when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "fps": 24,
    },
    # the learned position that every block adds again is no computation
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "cosmos_transfer25",
    diffusers_class(
        "CosmosTransformer3DModel",
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=32,
        adaln_lora_dim=8,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=12,
        encoder_hidden_states_channels=32,
        controlnet_block_every_n=2,
        img_context_dim_in=10,
        img_context_num_tokens=4,
        img_context_dim_out=32,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 2, 8, 8, step=s),
        "condition_mask": torch.zeros(1, 1, 2, 8, 8),
        "timestep": when(s) / 1000,
        "encoder_hidden_states": (text(1, n, 12), text(1, 4, 10, seed=8)),
        "block_controlnet_hidden_states": [0.1 * text(1, 32, 32, seed=9), 0.1 * text(1, 32, 32, seed=10)],
    },
    # text and image attention are summed before one output projection; the hints of the control network are inputs
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "hunyuan_video15",
    diffusers_class(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=3,
        num_refiner_layers=2,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=14,
        rope_axes_dim=(2, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": torch.cat([noise(1, 4, 2, 4, 4, step=s), noise(1, 5, 2, 4, 4, seed=1)], 1),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.long),
        "encoder_hidden_states_2": text(1, 4, 12),
        "encoder_attention_mask_2": torch.ones(1, 4, dtype=torch.long),
        "image_embeds": text(1, 3, 14, seed=8),
    },
    # image and text in each of three blocks, nothing reads the last one's text; two refiner blocks
    joint_attention=5,
    self_attention=2,
    mlp=7,
    graphs=3,  # Dynamo stops at the question whether there is an image and compiles a block once
    # the blocks share one graph, so the last one computes its text as well
    seen={"self-attention": 2, "joint-attention": 6, "mlp": 8},
)


register(
    "framepack",
    diffusers_class(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=14,
        has_clean_x_embedder=True,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.long),
        "pooled_projections": text(1, 8),
        "image_embeds": text(1, 3, 14, seed=8),
        "indices_latents": torch.arange(8, 11),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": noise(1, 4, 2, 8, 8, seed=1),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": noise(1, 4, 2, 8, 8, seed=2),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": noise(1, 4, 4, 8, 8, seed=3),
        "indices_latents_history_4x": torch.arange(1, 5),
    },
    # two double blocks (image and text each), two single blocks, one refiner block
    joint_attention=4,
    fused=2,
    self_attention=1,
    mlp=5,
    graphs=4,  # Dynamo stops where the text is cut to its valid tokens and compiles a block once for each kind
)


register(
    "skyreels_v2",
    diffusers_class(
        "SkyReelsV2Transformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        inject_sample_info=True,
        num_frame_per_block=2,
    ),
    # diffusion forcing: a timestep for every frame, attention causal in blocks of two frames
    lambda s, n: {
        "hidden_states": noise(1, 4, 4, 8, 8, step=s),
        "timestep": when(s, torch.int64)[:, None] - torch.tensor([[75, 50, 25, 0]]),
        "encoder_hidden_states": text(1, n, 16),
        "enable_diffusion_forcing": True,
        "fps": [1],
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "consisid",
    diffusers_class(
        "ConsisIDTransformer3DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=10,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=16,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 3, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        "image_rotary_emb": _rope(48, 8),
        "id_cond": text(1, 10),
        "id_vit_hidden": [text(1, 5, 16, seed=8), text(1, 5, 16, seed=9)],
    },
    # CogVideoX with image and text in each of four blocks, up to the concatenation before the last norm; after blocks 0 and 2
    # the image attends to the face; in the extractor two layers in which queries attend to the face's features and themselves
    joint_attention=10,
    cross_attention=2,
    mlp=10,
)


def _sound_and_vision(s: int, n: int) -> dict:
    return {
        "hidden_states": noise(1, 2 * 4 * 4, 8, step=s),
        "audio_hidden_states": noise(1, 5, 6, seed=1, step=s),
        "timestep": when(s),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
        "return_dict": False,
    }


register(
    "ltx2",
    diffusers_class(
        "LTX2VideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
        rope_type="split",
    ),
    lambda s, n: {
        **_sound_and_vision(s, n),
        "encoder_hidden_states": text(1, n, 12),
        "audio_encoder_hidden_states": text(1, n, 12, seed=8),
        "encoder_attention_mask": torch.ones(1, n),
        "audio_encoder_attention_mask": torch.ones(1, n),
    },
    # a block: self-attention, attention to the text, attention to each other and MLP, each for video and audio
    self_attention=4,
    cross_attention=8,
    mlp=4,
)


register(
    "ltx23",
    diffusers_class(
        "LTX2VideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        gated_attn=True,
        cross_attn_mod=True,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        num_layers=2,
        rope_type="split",
        use_prompt_embeddings=False,
        perturbed_attn=True,
    ),
    lambda s, n: {
        **_sound_and_vision(s, n),
        "encoder_hidden_states": text(1, n, 32),
        "audio_encoder_hidden_states": text(1, n, 16, seed=8),
        "sigma": when(s) / 1000,
    },
    # as ltx2, with a gate on every head
    self_attention=4,
    cross_attention=8,
    mlp=4,
)


register(
    "chronoedit",
    diffusers_class(
        "ChronoEditTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=8,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        image_dim=20,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    ),
    lambda s, n: {
        "hidden_states": torch.cat([noise(1, 4, 2, 8, 8, step=s), noise(1, 4, 2, 8, 8, seed=1)], 1),
        "timestep": when(s),
        "encoder_hidden_states": _long(n, 16),
        "encoder_hidden_states_image": text(1, 5, 20, seed=8),
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "sana_video",
    diffusers_class(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        mlp_ratio=2.0,
        rope_max_seq_len=32,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 16),
        "timestep": when(s),
        "encoder_attention_mask": torch.ones(1, n),
    },
    # linear attention; a convolutional MLP, whose addition over time is inside of it
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "kandinsky5",
    diffusers_class(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=10,
        time_dim=16,
        out_visual_dim=4,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 2, 8, 8, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        "pooled_projections": text(1, 10),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(n),
    },
    # two blocks on the text (self-attention, MLP), three on the video (self-attention, attention to the text, MLP)
    self_attention=5,
    cross_attention=3,
    mlp=5,
)


register(
    "motif_video",
    diffusers_class(
        "MotifVideoTransformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        text_embed_dim=16,
        image_embed_dim=14,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ),
    lambda s, n: {
        "hidden_states": torch.cat([noise(1, 4, 2, 8, 8, step=s), noise(1, 5, 2, 8, 8, seed=1)], 1),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
        "encoder_attention_mask": torch.ones(1, n),
        "image_embeds": text(1, 3, 14, seed=8),
    },
    # two double blocks (image and text each, and the image attends to the text once more), two single blocks (their second
    # attention is inside of the one contribution) and two of the decoder, a second stream
    joint_attention=4,
    cross_attention=2,
    fused=4,
    mlp=4,
)


register(
    "wan_animate",
    diffusers_class(
        "WanAnimateTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        image_dim=20,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=12,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
    lambda s, n: {
        "hidden_states": torch.cat([noise(1, 4, 3, 8, 8, step=s), noise(1, 8, 3, 8, 8, seed=1)], 1),
        "timestep": when(s),
        "encoder_hidden_states": _long(n, 16),
        "encoder_hidden_states_image": text(1, 5, 20, seed=8),
        "pose_hidden_states": noise(1, 4, 2, 8, 8, seed=2),
        "face_pixel_values": noise(1, 3, 5, 16, 16, seed=3),
    },
    # four blocks, attention to the face after blocks 0 and 2; the pose is part of the embedding, and the motion encoder adds up
    # two convolutions of its input, which is no residual
    self_attention=4,
    cross_attention=6,
    mlp=4,
)


register(
    "anyflow",
    diffusers_class(
        "AnyFlowTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 3, 4, 8, 8, step=s),
        "timestep": when(s).expand(1, 3),
        "r_timestep": when(s + 1).expand(1, 3),
        "encoder_hidden_states": text(1, n, 16),
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "anyflow_far",
    diffusers_class(
        "AnyFlowFARTransformer3DModel",
        patch_size=(1, 2, 2),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        chunk_partition=(1, 2),
    ),
    # two frames after a first one, whose keys and values are cached
    lambda s, n: {
        "hidden_states": noise(1, 2, 4, 8, 8, step=s),
        "timestep": when(s).expand(1, 2),
        "r_timestep": when(s + 1).expand(1, 2),
        "encoder_hidden_states": text(1, n, 16),
        "chunk_partition": [1, 2],
        "kv_cache": [
            {"full_cache": text(2, 1, 2, 16, 16, seed=20 + i), "compressed_cache": torch.zeros(2, 1, 2, 0, 16)}
            for i in range(3)
        ],
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 1},
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "helios",
    diffusers_class(
        "HeliosTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_dim=(4, 4, 4),
        is_amplify_history=True,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 3, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
        "indices_hidden_states": torch.arange(8, 11)[None],
        "indices_latents_history_short": torch.tensor([[0, 7]]),
        "indices_latents_history_mid": torch.arange(5, 7)[None],
        "indices_latents_history_long": torch.arange(1, 5)[None],
        "latents_history_short": noise(1, 4, 2, 8, 8, seed=1),
        "latents_history_mid": noise(1, 4, 2, 8, 8, seed=2),
        "latents_history_long": noise(1, 4, 4, 8, 8, seed=3),
    },
    # the frames so far stand before the new ones; only the new ones attend to the text
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


register(
    "kandinsky6",
    diffusers_class(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=10,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        in_audio_dim=6,
        out_audio_dim=6,
        ca_rope=False,
    ),
    lambda s, n: {
        "hidden_states": torch.cat([noise(1, 2, 8, 8, 4, step=s), noise(1, 2, 8, 8, 5, seed=2)], -1),
        "encoder_hidden_states": text(1, n, 12),
        "pooled_projections": text(1, 10),
        "timestep": when(s),
        "audio_hidden_states": noise(1, 5, 6, seed=1, step=s),
        "return_dict": False,
    },
    # two blocks on the text for the video and two for the audio (self-attention, MLP); two double blocks: self-attention,
    # attention to the text, attention to each other and MLP, each for video and audio
    self_attention=8,
    cross_attention=8,
    mlp=8,
)


class _FirstOf(nn.Module):
    """The first video of a model that returns lists."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs) -> Tensor:
        return self.model(**inputs, return_dict=False)[0][0]


def _cosmos3():
    from diffusers import Cosmos3OmniTransformer

    return _FirstOf(
        Cosmos3OmniTransformer(
            head_dim=8,
            hidden_size=16,
            intermediate_size=24,
            latent_channel=4,
            latent_patch_size=2,
            num_attention_heads=2,
            num_hidden_layers=3,
            num_key_value_heads=1,
            patch_latent_dim=16,
            rope_axes_dim=(2, 1, 1),
            vocab_size=50,
        )
    )


def _cosmos3_call(s: int, n: int) -> dict:
    tokens = torch.arange(n, n + 32)
    return {
        "input_ids": torch.arange(1, n + 1),
        "text_indexes": torch.arange(n),
        "position_ids": torch.arange(n + 32),
        "und_len": n,
        "sequence_length": n + 32,
        "vision_tokens": [noise(1, 4, 2, 8, 8, step=s)],
        "vision_token_shapes": [(2, 4, 4)],
        "vision_sequence_indexes": tokens,
        "vision_mse_loss_indexes": tokens,
        "vision_timesteps": when(s).expand(32),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


register(
    "cosmos3",
    _cosmos3,
    _cosmos3_call,
    # a mixture of two transformers of three layers: the text attends to itself, the video to text and video
    self_attention=3,
    joint_attention=3,
    mlp=6,
)
