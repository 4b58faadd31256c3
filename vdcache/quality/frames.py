"""Videos, folders of pictures and tensors as frames [T, C, H, W] in float32."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcache.errors import ConfigError

__all__ = ["PICTURES", "TENSORS", "frames_of", "readable"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TENSORS = (".pt", ".npy", ".safetensors")
LAYOUTS = ("TCHW", "CTHW", "THWC", "CHW", "HWC")


def frames_of(source: Any, layout: str = "") -> Tensor:
    """The frames of one video, [T, C, H, W] in float32, values as they are (8-bit ones from 0 to 255).

    Args:
        source: a video or picture file, a folder of pictures in the order of their names, a tensor file (.pt, .npy,
            .safetensors with one tensor), a tensor or array, or a list of pictures as pipelines return them. A batch of one is
            taken as its only video.
        layout: of a tensor: TCHW, CTHW, THWC, CHW or HWC; read off its shape without (channels are 1, 3 or 4).

    Raises:
        ConfigError: nothing that can be read, or a shape that says no layout.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or folder")
        if path.is_dir():
            return _folder(path)
        if path.suffix.lower() in TENSORS:
            return _arranged(_tensor_file(path), layout, str(path))
        return _arranged(_decoded(path), "HWC" if path.suffix.lower() in PICTURES else "THWC", str(path))
    if isinstance(source, Sequence) and source and not isinstance(source[0], (int, float)):
        return _stacked([frames_of(s, layout) for s in source], "the pictures of the list")
    if isinstance(source, Tensor) or hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        name = type(source).__name__
        import numpy

        value = source.detach().cpu() if isinstance(source, Tensor) else torch.from_numpy(numpy.array(source))
        if hasattr(source, "getbands"):  # a picture of PIL
            layout = "HWC"
            value = value[..., None] if value.ndim == 2 else value
        return _arranged(value, layout, name)
    raise ConfigError(f"a video is a file, a folder of pictures, a tensor or a list of pictures; got {type(source).__name__}")


def readable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, float]:
    """Two videos on one scale, and the range of that scale: 0 to 1 for pictures, else the reference's own range (latents).

    Raises:
        ConfigError: one of 8 bits, the other from 0 to 1.
    """
    low, high = float(one.min()), float(one.max())
    eight, unit = [_of_8_bits(v) for v in (one, other)], [_of_unit(v) for v in (one, other)]
    for is_eight, is_unit, names in (
        (eight[0], unit[1], ("reference", "candidate")),
        (eight[1], unit[0], ("candidate", "reference")),
    ):
        if is_eight and is_unit:
            raise ConfigError(
                f"the {names[0]} has values from 0 to 255 and the {names[1]} from 0 to 1 or −1 to 1: bring both to one scale, as by / 255"
            )
    if eight[0] and float(other.max()) > 2.0:
        return one / 255, other / 255, 1.0
    if low >= 0 and high <= 1.0:
        return one, other, 1.0
    if low >= -1.0 and high <= 1.0:
        return (one + 1) / 2, (other + 1) / 2, 1.0
    return one, other, high - low


def _of_8_bits(value: Tensor) -> bool:
    return float(value.max()) > 2.0 and float(value.min()) >= 0 and torch.equal(value, value.round())


def _of_unit(value: Tensor) -> bool:
    return float(value.abs().max()) <= 1.0 and not torch.equal(value, value.round())


def _folder(path: Path) -> Tensor:
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURES)
    if not files:
        raise ConfigError(f"{path}: no pictures in this folder; it looks for {', '.join(PICTURES)}")
    return _stacked([frames_of(f) for f in files], str(path))


def _stacked(frames: list[Tensor], where: str) -> Tensor:
    if len(shapes := {tuple(f.shape[1:]) for f in frames}) > 1:
        raise ConfigError(f"{where}: frames of unequal shape: {', '.join(map(str, sorted(shapes)))}")
    return torch.cat(frames)


def _decoded(path: Path) -> Tensor:
    import imageio.v3 as iio

    plugin: Any = None if path.suffix.lower() in (*PICTURES, ".gif") else "pyav"
    try:
        decoded = iio.imread(path, plugin=plugin)
    except Exception as error:  # imageio's plugins raise their own kinds
        kinds = (
            f"it reads what pyav and imageio decode (mp4, webm, gif, {', '.join(PICTURES)}) and tensors ({', '.join(TENSORS)})"
        )
        raise ConfigError(f"{path}: cannot be read as a video or picture: {str(error).rstrip('.')}; {kinds}") from error
    value = torch.from_numpy(decoded)
    return value[..., None] if path.suffix.lower() in PICTURES and value.ndim == 2 else value


def _tensor_file(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            import numpy

            return torch.from_numpy(numpy.load(path))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held = load_file(path)
            return _only(held, path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: cannot be read as a tensor: {error}") from error
    if isinstance(value, dict):
        return _only(value, path)
    if not isinstance(value, Tensor):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, and a tensor is needed: torch.save(video, {path.name!r})")
    return value


def _only(held: dict[str, Any], path: Path) -> Tensor:
    """The one tensor of a file."""
    found = [v for v in held.values() if isinstance(v, Tensor)]
    if len(found) != 1:
        names = ", ".join(map(str, held)) or "nothing"
        raise ConfigError(
            f"{path}: holds {len(found)} tensors ({names}), and one is needed: save it alone, or call vdcache.compare with the tensors themselves"
        )
    return found[0]


def _arranged(value: Tensor, layout: str, where: str) -> Tensor:
    if value.is_complex():
        raise ConfigError(f"{where}: complex values are no picture; compare their real part or their absolute value")
    value = value.float()
    while value.ndim > 3 + (layout not in ("CHW", "HWC")) and value.shape[0] == 1:
        value = value[0]
    if value.ndim > 4:
        raise ConfigError(
            f"{where}: the shape {tuple(value.shape)} has a batch axis of {value.shape[0]}, and one video is compared at a time: give each by "
            "itself, video[0]"
        )
    layout = layout or _layout(tuple(value.shape), where)
    if layout not in LAYOUTS or value.ndim != len(layout):
        raise ConfigError(
            f"{where}: the layout {layout!r} does not fit the shape {tuple(value.shape)}; there are {', '.join(LAYOUTS)}"
        )
    if "T" not in layout:
        value, layout = value[None], "T" + layout
    return value.permute([layout.index(axis) for axis in "TCHW"]).contiguous()


def _layout(shape: tuple[int, ...], where: str) -> str:
    channels = [i for i, n in enumerate(shape) if n in (3, 4)] or [i for i, n in enumerate(shape) if n == 1]
    ends = {3: {0: "CHW", 2: "HWC"}, 4: {0: "CTHW", 1: "TCHW", 3: "THWC"}}.get(len(shape), {})
    fits = [ends[i] for i in channels if i in ends]
    if len(fits) == 1:
        return fits[0]
    if len(shape) == 4 and not fits:  # latents: channels first as diffusers has them
        return "CTHW"
    if len(shape) < 3:
        raise ConfigError(
            f"{where}: the shape {shape} is no picture (CHW or HWC, channels even where there is one) and no video (TCHW, CTHW, THWC)"
        )
    found = (
        f"fits {' and '.join(fits)}" if fits else f"has no axis of 1, 3 or 4 channels where {', '.join(ends.values())} have it"
    )
    raise ConfigError(
        f"{where}: the shape {shape} {found}; say which with layout= (CLI: --layout), one of {', '.join(LAYOUTS)}"
    )
