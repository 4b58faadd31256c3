"""What every bench shares: rows with machine, versions and pipeline text, and the model of the questions."""

from __future__ import annotations

import argparse
import json
import operator
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vdcache

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass
class Bench:
    """Rows of one question.

    `must` such as ">= 0.9" speaks of `value`; None where nothing is required.
    """

    question: str
    pipeline: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, case: str, value: float, unit: str, must: str | None = None, **more: Any) -> None:
        holds = None
        if must is not None:
            sign, bound = must.split()
            holds = bool(_COMPARE[sign](value, float(bound)))
        self.rows.append(
            {"question": self.question, "case": case, "value": value, "unit": unit, "must": must, "holds": holds, **more}
        )
        mark = "" if holds is None else ("  ok" if holds else "  FALLS SHORT")
        print(f"{case:<58} {value:>12.5g} {unit:<8} {must or '':<10}{mark}", flush=True)

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        about = {"machine": machine(), "pipeline": self.pipeline, "date": time.strftime("%Y-%m-%d")}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{**row, **about} for row in self.rows], indent=1) + "\n")


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vdcache": vdcache.__version__,
    }


def arguments(description: str | None, *more: Callable[[argparse.ArgumentParser], Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=None, help="where the rows go")
    for add in more:
        add(parser)
    return parser.parse_args()


def wan(num_layers: int = 8) -> torch.nn.Module:
    """diffusers' Wan transformer at the size of the issue's table, random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=256,
        freq_dim=256,
        ffn_dim=1536,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )
    return model.eval().requires_grad_(False)


def wan_call(step: int = 0, total: int = 30) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(1, 16, 5, 32, 32, generator=generator),
        "timestep": torch.tensor([1000 - 1000 * step // total]),
        "encoder_hidden_states": torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(1)),
        "return_dict": False,
    }


def timed(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


__all__ = ["Bench", "arguments", "machine", "median", "timed", "wan", "wan_call"]
