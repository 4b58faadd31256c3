"""vdcache's demo model, at a small size."""

from __future__ import annotations

from tests.zoo import noise, register, text, when


def _demo():
    from vdcache.demo.model import DemoConfig, DemoDiT

    config = DemoConfig(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3
    )
    return DemoDiT(config)


register(
    "demo",
    _demo,
    lambda s, n: {
        "hidden_states": noise(1, 6, 3, 8, 8, step=s),
        "timestep": when(s),
        "encoder_hidden_states": text(1, n, 16),
    },
    self_attention=3,
    cross_attention=3,
    mlp=3,
)
