"""diffusers' image transformers of the MMDiT family and their single-stream successors."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo import diffusers_class, noise, register, text, when


def _grid(axes: int = 3, side: int = 4, first: int = 1) -> Tensor:
    """Position ids of a square latent: row and column on the axes `first` and `first + 1`, zero elsewhere."""
    ids = torch.zeros(side, side, axes)
    ids[..., first] = torch.arange(side)[:, None]
    ids[..., first + 1] = torch.arange(side)[None]
    return ids.reshape(-1, axes)


register(
    "qwenimage",
    diffusers_class(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 8, step=s),
        "encoder_hidden_states": text(1, n, 16),
        "encoder_hidden_states_mask": torch.ones(1, n, dtype=torch.bool),
        "timestep": when(s) / 1000,
        "img_shapes": [[(1, 4, 4)]],
    },
    # image and text in each of three blocks; only the image leaves the last one, so its text attention and MLP are dead
    joint_attention=5,
    mlp=5,
)


register(
    "chroma",
    diffusers_class(
        "ChromaTransformer2DModel",
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s) / 1000,
        "img_ids": _grid(),
        "txt_ids": torch.zeros(n, 3),
    },
    # two double blocks (image and text each), two single blocks; the approximator of the modulation is itself a residual
    # stack, but of the timestep alone: it must be fresh at every step and is no stream
    joint_attention=4,
    fused=2,
    mlp=4,
)


register(
    "flux2",
    diffusers_class(
        "Flux2Transformer2DModel",
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s) / 1000,
        "img_ids": _grid(4),
        "txt_ids": torch.cat([torch.zeros(n, 3), torch.arange(n)[:, None]], dim=1),
        "guidance": torch.tensor([4.0]),
    },
    # two double blocks (image and text each), three parallel single blocks
    joint_attention=4,
    fused=3,
    mlp=4,
)


register(
    "hidream_dense",
    diffusers_class(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[12, 16],
        text_emb_dim=8,
        num_routed_experts=0,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 2, 3],
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "timesteps": when(s),
        "encoder_hidden_states_t5": text(1, n, 12),
        "encoder_hidden_states_llama3": text(4, 1, n, 16),
        "pooled_embeds": text(1, 8),
    },
    # two double blocks (image and text each; the second's text goes on into the single blocks), two single blocks that
    # attend within the one concatenated stream, then MLP
    joint_attention=4,
    self_attention=2,
    mlp=6,
)


register(
    "auraflow",
    diffusers_class(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s) / 1000,
    },
    # a block adds once to a stream, x + mlp(norm(x + attention(x))): the sum with the attention only feeds the MLP;
    # two joint blocks (image and text each), two single blocks
    fused=6,
)


def _sizes() -> dict[str, Tensor]:
    return {
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


register(
    "cogview4",
    diffusers_class(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        **_sizes(),
    },
    # image and text in each of three blocks, the MLP called for each apart; the text is dead after the last attention
    joint_attention=5,
    mlp=5,
)


register(
    "hunyuan_image",
    diffusers_class(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        patch_size=(1, 1),
        text_embed_dim=12,
        rope_axes_dim=(4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 6, 6, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 12),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.long),
    },
    # two double blocks (image and text each), two single blocks (one addition to the concatenated streams), two refiner
    # blocks of the text (attention and MLP)
    joint_attention=4,
    fused=2,
    self_attention=2,
    mlp=6,
)


register(
    "cogview3plus",
    diffusers_class(
        "CogView3PlusTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        **_sizes(),
    },
    # as CogVideoX: image and text in each of three blocks, one MLP over both; nothing reads the last block's text MLP
    joint_attention=6,
    mlp=5,
)


def _bria():
    from diffusers.models.transformers.transformer_bria import BriaTransformer2DModel

    return BriaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=[4, 4, 8],
    )


register(
    "bria",
    _bria,
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s),
        "img_ids": _grid(),
        "txt_ids": torch.zeros(n, 3),
    },
    # two double blocks (image and text each), two single blocks (one addition to the concatenated streams)
    joint_attention=4,
    fused=2,
    mlp=4,
)


register(
    "bria_fibo",
    diffusers_class(
        "BriaFiboTransformer2DModel",
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=[4, 4, 8],
        text_encoder_dim=6,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "text_encoder_layers": [text(1, n, 6, seed=20 + i) for i in range(4)],
        "timestep": when(s),
        "img_ids": _grid(),
        "txt_ids": torch.zeros(n, 3),
    },
    # as bria; before every block half of the text's channels are replaced, which adds nothing
    joint_attention=4,
    fused=2,
    mlp=4,
)


register(
    "longcat_image",
    diffusers_class(
        "LongCatImageTransformer2DModel",
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=[4, 4, 8],
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s) / 1000,
        "img_ids": _grid(),
        "txt_ids": torch.zeros(n, 3),
    },
    # two double blocks (image and text each), two single blocks
    joint_attention=4,
    fused=2,
    mlp=4,
)


register(
    "ovis_image",
    diffusers_class(
        "OvisImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 4, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s) / 1000,
        "img_ids": _grid(),
        "txt_ids": torch.zeros(n, 3),
    },
    # two double blocks (image and text each), two single blocks with a gated MLP
    joint_attention=4,
    fused=2,
    mlp=4,
)


register(
    "glm_image",
    diffusers_class(
        "GlmImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=32,
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 8, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "prior_token_id": torch.arange(16)[None],
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": when(s),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    },
    # as CogView4; the prior tokens are summed into the embedding before the first block, an input rather than a branch;
    # Dynamo breaks at prior_embedding[prior_token_drop] *= 0.0
    graphs=2,
    joint_attention=5,
    mlp=5,
)


register(
    "krea2",
    diffusers_class(
        "Krea2Transformer2DModel",
        in_channels=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=24,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=(4, 2, 2),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 8, step=s),
        "encoder_hidden_states": text(1, n, 3, 16),
        "timestep": when(s) / 1000,
        "position_ids": torch.cat([torch.zeros(n, 3), _grid()]),
        "encoder_attention_mask": torch.ones(1, n, dtype=torch.bool),
    },
    # three blocks on one stream (text and image are concatenated before them); the text fusion has two blocks across the
    # text encoder's layers and two across tokens, each attention and MLP
    self_attention=7,
    mlp=7,
)


register(
    "ernie_image",
    diffusers_class(
        "ErnieImageTransformer2DModel",
        hidden_size=24,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=40,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 4, 4, step=s),
        "timestep": when(s),
        "text_bth": text(1, n, 16),
        "text_lens": torch.tensor([n]),
    },
    # three blocks on one stream, image and text concatenated before them
    self_attention=3,
    mlp=3,
)


register(
    "joyimage",
    diffusers_class(
        "JoyImageEditTransformer3DModel",
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=24,
        num_attention_heads=2,
        text_dim=16,
        num_layers=3,
        rope_dim_list=[4, 4, 4],
    ),
    lambda s, n: {
        "hidden_states": noise(1, 4, 1, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
    },
    # image and text in each of three blocks; only the image leaves the last one
    joint_attention=5,
    mlp=5,
)


register(
    "flux3",
    diffusers_class(
        "Flux3Transformer2DModel",
        in_channels=8,
        cond_in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 8, step=s),
        "encoder_hidden_states": text(1, n, 12),
        "timestep": when(s) / 1000,
        "img_ids": _grid(4),
        "txt_ids": torch.cat([torch.zeros(n, 3), torch.arange(n)[:, None]], dim=1),
    },
    # every block adds attention + MLP at once: two for the text alone, two for the image alone, three joint ones that add
    # to image and text each; only the image leaves the last one
    fused=9,
)


def _packed(n: int, image: int = 16) -> dict[str, Tensor]:
    """Ideogram's packed sequence: text, then image; coordinates of the image start at 65536."""
    words = torch.arange(n)[:, None].expand(n, 3)
    return {
        "position_ids": torch.cat([words, _grid().long() + 65536])[None],
        "segment_ids": torch.ones(1, n + image, dtype=torch.long),
        "indicator": torch.tensor([[3] * n + [2] * image]),
    }


register(
    "ideogram4",
    diffusers_class(
        "Ideogram4Transformer2DModel",
        in_channels=8,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        intermediate_size=40,
        adaln_dim=16,
        llm_features_dim=20,
        mrope_section=(2, 2, 2),
    ),
    lambda s, n: {
        "hidden_states": torch.cat([torch.zeros(1, n, 8), noise(1, 16, 8, step=s)], dim=1),
        "timestep": 1 - when(s) / 1000,
        "encoder_hidden_states": torch.cat([text(1, n, 20), torch.zeros(1, 16, 20)], dim=1),
        **_packed(n),
    },
    # three blocks on one packed stream, attention and MLP; the masked sum of text and image embeddings builds the stream
    self_attention=3,
    mlp=3,
)


register(
    "qwenimage21",
    diffusers_class(
        "QwenImage21Transformer2DModel",
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 4, 4),
    ),
    lambda s, n: {
        "hidden_states": noise(1, 16, 8, step=s),
        "encoder_hidden_states": text(1, n, 16),
        "timestep": when(s) / 1000,
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * n + [True] * 4]),
    },
    # three blocks on one block-causal stream, attention and MLP; Dynamo breaks eight times where tokens are laid out (by
    # masks, tolist() and int()), all of it before the first block
    graphs=9,
    self_attention=3,
    mlp=3,
)
