"""Real pipeline classes of diffusers made of tiny random parts: prompt embeddings are given, latents come back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.tiny import drawn as redrawn
from tests.zoo import build

__all__ = ["PIPELINES", "Tiny", "generator", "made", "redrawn", "sample", "short"]


@dataclass(frozen=True)
class Tiny:
    """One pipeline class.

    Args:
        make: builds it.
        call: keyword arguments of a call, without steps and generator.
        lanes: calls of the denoiser a step.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    lanes: int = 1


def text(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BLOCKS = {"blocks": "num_layers", "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def short(case: str, seed: int = 0) -> nn.Module:
    """A model of the zoo with one block of each kind: how long it takes to compile grows with the blocks."""
    model = build(case, seed)
    for name, option in BLOCKS.items():
        blocks = getattr(model, name, None)
        if blocks is not None and len(blocks) > 1:
            setattr(model, name, blocks[:1])
            model.register_to_config(**{option: 1})
    return model


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _wan(second: bool = False, expand: bool = False) -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=scheduler,
            transformer=short("wan"),
            transformer_2=short("wan", seed=1) if second else None,
            boundary_ratio=0.875 if second else None,
            expand_timesteps=expand,
        )
    )


def _wan_i2v() -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return _quiet(
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=redrawn(transformer),
        )
    )


def _image() -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 16), (200, 60, 20))


def _two(width: int = 16) -> dict[str, Any]:
    return {"prompt_embeds": text(1, 6, width), "negative_prompt_embeds": text(1, 6, width, seed=6)}


def _masked(width: int) -> dict[str, Any]:
    mask = torch.ones(1, 6, dtype=torch.long)
    return {**_two(width), "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


def _hunyuan() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    return _quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=short("hunyuan_video"),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )


def _cogvideox() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    return _quiet(
        CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=short("cogvideox"), scheduler=CogVideoXDDIMScheduler()
        )
    )


def _latte() -> Any:
    from diffusers import DDIMScheduler, LattePipeline

    return _quiet(
        LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=short("latte"), scheduler=DDIMScheduler())
    )


def _flow(pipeline: str, case: str, **more: Any) -> Any:
    import diffusers

    parts = {"vae": None, "text_encoder": None, "tokenizer": None, **more}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return _quiet(getattr(diffusers, pipeline)(transformer=short(case), scheduler=scheduler, **parts))


def _solver(pipeline: str, case: str) -> Any:
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler()
    return _quiet(
        getattr(diffusers, pipeline)(tokenizer=None, text_encoder=None, vae=None, transformer=short(case), scheduler=scheduler)
    )


def _allegro() -> Any:
    from diffusers import AllegroPipeline, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

    torch.manual_seed(0)
    vae = AutoencoderKLAllegro(
        in_channels=3,
        out_channels=3,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return _quiet(
        AllegroPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            transformer=short("allegro"),
            scheduler=EulerAncestralDiscreteScheduler(),
        )
    )


SIZE = {"height": 64, "width": 64, "output_type": "latent"}
VIDEO = {**SIZE, "num_frames": 9}

PIPELINES: dict[str, Tiny] = {
    "Wan": Tiny(_wan, lambda: {**_two(), **VIDEO}, lanes=2),
    "Wan image-to-video": Tiny(
        _wan_i2v,
        lambda: {
            **_two(),
            "image": _image(),
            **VIDEO,
            "height": 32,
            "width": 32,
            "num_frames": 5,
        },
        lanes=2,
    ),
    "Wan 2.2": Tiny(functools.partial(_wan, second=True), lambda: {**_two(), **VIDEO}, lanes=2),
    "Wan 2.2 TI2V": Tiny(functools.partial(_wan, expand=True), lambda: {**_two(), **VIDEO}, lanes=2),
    "HunyuanVideo": Tiny(
        _hunyuan,
        lambda: {
            "prompt_embeds": text(1, 6, 16),
            "pooled_prompt_embeds": text(1, 8),
            "prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
            **VIDEO,
        },
    ),
    "CogVideoX": Tiny(_cogvideox, lambda: {**_two(12), **VIDEO}),
    "Latte": Tiny(_latte, lambda: {**_two(12), **SIZE, "video_length": 3, "negative_prompt": None}),
    "LTX": Tiny(
        functools.partial(_flow, "LTXPipeline", "ltx"),
        lambda: {**_masked(12), **SIZE, "num_frames": 9, "height": 128, "width": 128},
    ),
    "Mochi": Tiny(functools.partial(_flow, "MochiPipeline", "mochi"), lambda: {**_masked(16), **SIZE, "num_frames": 7}),
    "Allegro": Tiny(_allegro, lambda: {**_masked(16), **SIZE, "num_frames": 8, "negative_prompt": None}),
    "Flux": Tiny(
        functools.partial(_flow, "FluxPipeline", "flux", text_encoder_2=None, tokenizer_2=None),
        lambda: {"prompt_embeds": text(1, 6, 12), "pooled_prompt_embeds": text(1, 8), **SIZE},
    ),
    "SD3": Tiny(
        functools.partial(
            _flow,
            "StableDiffusion3Pipeline",
            "sd3",
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        ),
        lambda: {
            **_two(12),
            "pooled_prompt_embeds": text(1, 8),
            "negative_pooled_prompt_embeds": text(1, 8, seed=6),
            **SIZE,
        },
    ),
    "PixArt": Tiny(
        functools.partial(_solver, "PixArtAlphaPipeline", "pixart"),
        lambda: {**_masked(12), **SIZE, "negative_prompt": None, "use_resolution_binning": False},
    ),
    "Sana": Tiny(
        functools.partial(_solver, "SanaPipeline", "sana"),
        lambda: {**_masked(12), **SIZE, "negative_prompt": None, "use_resolution_binning": False, "height": 256, "width": 256},
    ),
}


def made(name: str) -> Any:
    return PIPELINES[name].make()


def sample(pipe: Any, name: str, steps: int = 6, seed: int = 0, **changes: Any) -> Tensor:
    """The latents of one call."""
    given = {**PIPELINES[name].call(), "num_inference_steps": steps, "generator": generator(seed), **changes}
    return pipe(**given, return_dict=False)[0]
