"""diffusers' image models of one stream, and its audio models."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo import diffusers_class, noise, register, text, when


def _angles(tokens: int, dim: int) -> torch.Tensor:
    return torch.arange(tokens)[:, None] / 10.0 ** torch.linspace(0, 2, dim)


register(
    "sana",
    diffusers_class(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        "encoder_attention_mask": torch.ones(1, n),
    },
    # a block: linear attention, attention to the text, GLUMBConv
    self_attention=3,
    cross_attention=3,
    mlp=3,
)


def _z_image():
    from diffusers import ZImageTransformer2DModel

    class Batched(nn.Module):
        """What the pipeline does around it: the batch as a list, the list of results as a batch."""

        def __init__(self):
            super().__init__()
            self.model = ZImageTransformer2DModel(
                in_channels=4,
                dim=24,
                n_layers=3,
                n_refiner_layers=2,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=12,
                axes_dims=[4, 4, 4],
                axes_lens=[80, 16, 16],
            )
            self.model.rope_embedder(torch.zeros(1, 3, dtype=torch.long))  # it makes its tables at the first call

        def forward(self, x, t, cap_feats):
            out = self.model(list(x.unbind(0)), t, list(cap_feats.unbind(0)), return_dict=False)[0]
            return torch.stack(out)

    return Batched()


register(
    "z_image",
    _z_image,
    lambda s, n: {
        "x": noise(1, 4, 1, 8, 8, step=s),
        "t": 1 - when(s) / 1000,
        "cap_feats": text(1, n, 12),
    },
    # two refiner blocks of the image, two of the text, three blocks of the sequence that holds both
    self_attention=7,
    mlp=7,
)


register(
    "hunyuan_dit",
    diffusers_class(
        "HunyuanDiT2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=12,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=8,
        text_len_t5=8,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, 8, 12),
        "text_embedding_mask": (torch.arange(8) < n)[None],
        "encoder_hidden_states_t5": text(1, 8, 8, seed=8),
        "text_embedding_mask_t5": (torch.arange(8) < n)[None],
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": (_angles(16, 8).cos(), _angles(16, 8).sin()),
    },
    # blocks 4 and 5 take the outputs of 1 and 0 in by linear(cat), which is no addition
    self_attention=6,
    cross_attention=6,
    mlp=6,
)


register(
    "lumina",
    diffusers_class(
        "LuminaNextDiT2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=12,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": 1 - when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "encoder_mask": torch.ones(1, n),
        "image_rotary_emb": torch.polar(torch.ones(16, 4), _angles(16, 4)).reshape(4, 4, 4),
        "cross_attention_kwargs": {},
    },
    # a block adds (self-attention + gate · cross-attention), projected and gated, at once, then its MLP
    self_attention=3,
    mlp=3,
)


register(
    "lumina2",
    diffusers_class(
        "Lumina2Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 8, 8),
        cap_feat_dim=12,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": 1 - when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.bool),
    },
    # the rotary table reads the length of the text back: embedding of text and time, the length, the table, all the rest
    graphs=4,
    # two refiner blocks of the text, two of the image, three blocks of the sequence that holds both
    self_attention=7,
    mlp=7,
)


register(
    "omnigen",
    diffusers_class(
        "OmniGenTransformer2DModel",
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=3,
        pad_token_id=0,
        vocab_size=64,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=32,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": 1 - when(s) / 1000,
        "input_ids": 1 + torch.arange(n)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, n + 17, n + 17),
        "position_ids": torch.arange(n + 17)[None],
    },
    # the rotary table branches on the largest position: embeddings, that position, the table, all the rest
    graphs=4,
    # text, a time token and the image are one sequence
    self_attention=3,
    mlp=3,
)


register(
    "prx",
    diffusers_class(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=12,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=3,
        axes_dim=[4, 4],
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "attention_mask": torch.ones(1, n, dtype=torch.bool),
    },
    # keys of text and image side by side in one attention; only the image stream gets its result
    joint_attention=3,
    mlp=3,
)


def _nucleus():
    from diffusers import NucleusMoEImageTransformer2DModel

    model = NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
        use_grouped_mm=True,
    )
    for block in model.transformer_blocks[1:]:  # Dynamo traces a grouped product in this type only
        block.img_mlp.experts.to(torch.bfloat16).register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), args[1]))
    return model


register(
    "nucleus_image",
    _nucleus,
    lambda s, n: {
        "hidden_states": noise(1, 16, 16, step=s),
        "img_shapes": [(1, 4, 4)],
        "encoder_hidden_states": text(1, n, 12),
        "encoder_hidden_states_mask": torch.ones(1, n, dtype=torch.bool),
        "timestep": when(s) / 1000,
    },
    # keys of image and text side by side in one attention of the image; one dense MLP, two MoEs
    joint_attention=3,
    mlp=3,
)


def _fibo2():
    from diffusers import BriaFibo2Transformer2DModel

    model = BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=24,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=12,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=2,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 4, 4),
        axes_lens=(16, 8, 8),
    )
    model.rope_embedder(torch.zeros(1, 3, dtype=torch.long))  # it makes its tables at the first call
    return model


register(
    "fibo2",
    _fibo2,
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timestep": when(s) / 1000,
        "encoder_hidden_states": text(1, 3, n, 12),
    },
    # two refiner blocks, two perceiver layers (text into gist tokens), four blocks of which two also read the text
    self_attention=8,
    cross_attention=4,
    mlp=8,
)


register(
    "unclip_prior",
    diffusers_class(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        embedding_dim=12,
        num_embeddings=8,
        additional_embeddings=4,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 12, step=s),
        "timestep": when(s),
        "proj_embedding": text(1, 12, seed=8),
        "encoder_hidden_states": text(1, 8, 12),
        "attention_mask": (torch.arange(8) < n)[None],
        "return_dict": False,
    },
    self_attention=3,
    mlp=3,
)


register(
    "transformer_2d",
    diffusers_class(
        "Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        norm_num_groups=2,
        cross_attention_dim=12,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s, torch.int64),
        "class_labels": torch.tensor([3]),
    },
    # three blocks, and the skip around all of them: what proj_out gives is added to the latent
    self_attention=3,
    cross_attention=3,
    mlp=3,
    other=1,
)


def _dreamlite():
    from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel

    return DreamLiteTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        norm_num_groups=2,
        cross_attention_dim=12,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
        use_linear_projection=True,
        qk_norm="rms_norm",
        ff_mult=3,
    )


register(
    "dreamlite",
    _dreamlite,
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s, torch.int64),
        "class_labels": torch.tensor([3]),
    },
    # three blocks, and the skip around all of them: what proj_out gives is added to the latent
    self_attention=3,
    cross_attention=3,
    mlp=3,
    other=1,
)


register(
    "stable_audio",
    diffusers_class(
        "StableAudioDiTModel",
        sample_size=16,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=8,
        cross_attention_input_dim=12,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 16, step=s),
        "timestep": when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "global_hidden_states": text(1, 1, 8, seed=8),
        "rotary_embedding": (_angles(17, 4).cos(), _angles(17, 4).sin()),
    },
    # three blocks; a convolution added to the latent before them and one to the result after them
    self_attention=3,
    cross_attention=3,
    mlp=3,
    other=2,
)


register(
    "stable_audio_3",
    diffusers_class(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=8,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=4,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 16, step=s),
        "timestep": when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "global_hidden_states": text(1, 8, seed=8),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.bool),
    },
    # three blocks of differential attentions; a convolution added to the latent before and one to the result after
    self_attention=3,
    cross_attention=3,
    mlp=3,
    other=2,
)


register(
    "ace_step",
    diffusers_class(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=3,
        encoder_hidden_size=12,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "timestep": when(s) / 1000,
        "timestep_r": when(s) / 1000,
        "encoder_hidden_states": text(1, n, 12),
        "context_latents": text(1, 16, 8, seed=8),
    },
    # self-attention in windows and over everything by turns
    self_attention=4,
    cross_attention=4,
    mlp=4,
)


register(
    "longcat_audio",
    diffusers_class(
        "LongCatAudioDiTTransformer", dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=12, latent_dim=4, ff_mult=2.0
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.bool),
        "timestep": when(s) / 1000,
        "latent_cond": text(1, 16, 4, seed=8),
    },
    # three blocks, and four ConvNeXt blocks of the text: feed-forwards with a depthwise convolution; the long skip adds the
    # stream's own start and holds no product
    self_attention=3,
    cross_attention=3,
    mlp=7,
)


register(
    "minimax_music",
    diffusers_class(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=16,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 16, step=s),
        "timestep": 1 - when(s) / 1000,
        "encoder_hidden_states": text(1, 16, 8),
    },
    # three blocks; a convolution added to the latent and its condition before them and one to the result after them
    self_attention=3,
    mlp=3,
    other=2,
)


register(
    "spectrogram_diffusion",
    diffusers_class("T5FilmDecoder", input_dims=4, targets_length=16, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=32),
    lambda s, n: {
        "encodings_and_masks": [(text(1, n, 16), torch.ones(1, n)), (text(1, 4, 16, seed=8), torch.ones(1, 4))],
        "decoder_input_tokens": noise(1, 16, 4, step=s),
        "decoder_noise_time": (when(s) - 1) / 1000,
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)
