"""Quality of videos: values by hand, every kind of input, what is refused."""

from __future__ import annotations

import gc
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

import vdcache
from vdcache.cli.main import app

pytest.importorskip("torchmetrics")
iio = pytest.importorskip("imageio.v3")


def video(frames=5, height=24, width=32, seed=0):
    """Smooth moving stripes [T, 3, H, W] in 0 … 1."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(
        [torch.stack([0.5 + 0.4 * torch.sin((x + y * c + 2 * t + seed) / 4) for c in range(3)]) for t in range(frames)]
    )


def test_psnr_by_hand():
    one = video()
    other = one.clone()
    other[2] = (other[2] + 0.1).clamp(0, 1)
    found = vdcache.compare(one, other, layout="TCHW")
    mse = (one - other).square()
    assert found.psnr == pytest.approx(-10 * math.log10(mse.mean()), abs=1e-3)
    assert found.psnr_frames[2] == pytest.approx(-10 * math.log10(mse[2].mean()), abs=1e-3)
    assert [p for i, p in enumerate(found.psnr_frames) if i != 2] == [math.inf] * 4
    assert found.worst == 2 and found.largest == pytest.approx(0.1, abs=1e-6)
    assert found.ssim_frames[0] == pytest.approx(1, abs=1e-5) and found.ssim_frames[2] < 0.999 and not found.identical


def test_ssim_by_hand():
    """The formula of Wang et al. with their Gaussian window of 11, edges mirrored."""
    one = video()
    other = (one + 0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = vdcache.compare(one, other, layout="TCHW")
    bell = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None].repeat(3, 1, 1, 1)

    def mean(x):
        return F.conv2d(F.pad(x, (5,) * 4, mode="reflect"), window, groups=3)

    m1, m2 = mean(one), mean(other)
    v1, v2, both = mean(one * one) - m1**2, mean(other * other) - m2**2, mean(one * other) - m1 * m2
    c1, c2 = 0.01**2, 0.03**2
    want = ((2 * m1 * m2 + c1) * (2 * both + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))).mean((1, 2, 3))
    assert found.ssim_frames == pytest.approx(want.tolist(), abs=1e-4)
    assert found.ssim == pytest.approx(float(want.mean()), abs=1e-4)


@pytest.mark.parametrize("kind", ["mp4", "gif", "folder", "pt", "npy", "safetensors"])
def test_every_kind_of_input(kind, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(
        gc, "collect", lambda *args: 0
    )  # imageio asks for it after each video: half a minute in a long run of tests
    paths = []
    for seed in (0, 3):
        frames = video(seed=seed)
        path = tmp_path / f"{seed}.{kind}" if kind != "folder" else tmp_path / str(seed)
        pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        if kind == "mp4":
            iio.imwrite(path, pixels, plugin="pyav", codec="libx264", fps=8)
        elif kind == "gif":
            iio.imwrite(path, pixels)
        elif kind == "folder":
            path.mkdir()
            for t, p in enumerate(pixels):
                iio.imwrite(path / f"{t:03d}.png", p)
        elif kind == "pt":
            torch.save(frames, path)
        elif kind == "npy":
            np.save(path, frames.permute(1, 0, 2, 3).numpy())
        else:
            save_file({"video": frames[None]}, path)
        paths.append(path)
    same, differs = vdcache.compare(paths[0], paths[0]), vdcache.compare(*paths)
    assert same.identical and same.psnr == math.inf and same.frames == 5 and (same.height, same.width) == (24, 32)
    assert 5 < differs.psnr < 40 and not differs.identical
    if kind not in ("mp4", "gif"):  # those two do not keep every value
        assert differs.psnr == pytest.approx(vdcache.compare(video(), video(seed=3), layout="TCHW").psnr, abs=0.1)


def test_what_pipelines_return():
    pictures = [Image.fromarray((f.permute(1, 2, 0) * 255).byte().numpy()) for f in video()]
    others = [Image.fromarray((f.permute(1, 2, 0) * 255).byte().numpy()) for f in video(seed=3)]
    found = vdcache.compare(pictures, others)
    assert found.frames == 5 and found.data_range == 1
    array = np.stack([np.array(p) for p in pictures])
    assert vdcache.compare(array, pictures).identical
    assert vdcache.compare(pictures[0], pictures[1]).frames == 1


def test_scales():
    """Pictures from −1 to 1 and from 0 to 1 are one; latents are judged on their own range."""
    one, other = video(), video(seed=3)
    plain = vdcache.compare(one, other, layout="TCHW")
    assert vdcache.compare(one * 2 - 1, other * 2 - 1, layout="TCHW").psnr == pytest.approx(plain.psnr, abs=1e-3)
    latents = vdcache.compare(10 * one - 7, 10 * other - 7, layout="TCHW")
    assert latents.data_range == pytest.approx(float((10 * one).max() - (10 * one).min()), rel=1e-5)
    sixteen = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert vdcache.compare(sixteen, sixteen, layout="CTHW").frames == 3


def test_small_frames_have_no_ssim():
    found = vdcache.compare(video(height=8), video(height=8, seed=1), layout="TCHW")
    assert found.ssim is None and "smaller than its window of 11" in found.notes[0]


def test_lpips_is_left_out_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = vdcache.compare(video(), video(seed=1), layout="TCHW")
    assert found.lpips is None and any("needs torchvision and the weights of AlexNet" in n for n in found.notes)


def test_json_pictures_and_the_command(tmp_path):
    torch.save(video(), tmp_path / "a.pt")
    torch.save(video(seed=2), tmp_path / "b.pt")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app,
        [
            "compare",
            str(tmp_path / "a.pt"),
            str(tmp_path / "b.pt"),
            *("--json", str(out / "c.json"), "--picture", str(out / "c.png"), "--curve", str(out / "curve.png")),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.output and "5 frames of 32 × 24" in result.output
    rows = json.loads((out / "c.json").read_text())
    assert len(rows["psnr_frames"]) == 5 and rows["identical"] is False and "reference" not in rows
    assert iio.imread(out / "c.png").shape == (240, 10 * (3 * 32 + 8), 3)
    assert iio.imread(out / "curve.png").ndim == 3
    same = CliRunner().invoke(app, ["compare", str(tmp_path / "a.pt"), str(tmp_path / "a.pt"), "--json", str(out / "s.json")])
    assert "identical" in same.output and json.loads((out / "s.json").read_text())["psnr"] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: (video(), video(frames=6)),
            "reference has 5 frames of 3 channels, 32 × 24, the candidate 6 frames .* Generate both with one number of frames, .* first 5 frames",
        ),
        (lambda p: (video(), video(height=20)), "32 × 24, .* 32 × 20. Generate both at one size: resizing would be measured"),
        (
            lambda p: (video(), video()[:, :1]),
            "5 frames of 3 channels, .* 5 frames of 1 channels, .* Bring both to the same channels",
        ),
        (lambda p: (torch.rand(3, 5, 9, 9), torch.rand(5, 4, 9, 9)), "the reference has 5 frames of 3 channels"),
        (lambda p: (torch.rand(3, 9, 8, 8), torch.rand(9, 8, 8, 3)[..., :1]), "Bring both to the same channels"),
        (lambda p: (p / "nothing.mp4", video()), "no such file or folder: the reference, .*nothing.mp4$"),
        (
            lambda p: (_saved(p / "x.pt", torch.rand(3, 4, 9, 9)), p / "other.pt"),
            "no such file or folder: the candidate, .*other.pt$",
        ),
        (
            lambda p: (video(), torch.stack([video(), video()])),
            r"the candidate: Tensor: the shape \(2, 5, 3, 24, 32\) has a batch axis of 2, .*video\[0\]",
        ),
        (
            lambda p: (_saved(p / "x.pt", torch.rand(3, 4, 9, 9)), video()),
            r"the reference: .*x.pt: the shape .* fits CTHW and TCHW; say which",
        ),
        (
            lambda p: (torch.rand(5, 16, 16), video()),
            "the reference: Tensor: .* has no axis of 1, 3 or 4 channels where CHW, HWC have it",
        ),
        (
            lambda p: (torch.rand(16, 16), video()),
            r"the shape \(16, 16\) is no picture \(CHW or HWC, channels even where there is one\)",
        ),
        (
            lambda p: (video(), _saved(p / "x.pt", {"a": video(), "b": video()})),
            r"the candidate: .*x.pt: holds 2 tensors \(a, b\), .*save it alone",
        ),
        (lambda p: (_saved(p / "x.pt", [1, 2]), video()), r"holds a list, and a tensor is needed: torch.save\(video, 'x.pt'\)"),
        (
            lambda p: (video(), (video() * 255).round()),
            "candidate has values from 0 to 255 and the reference from 0 to 1 .*: bring both to one scale",
        ),
        (
            lambda p: ((video() * 255).round(), 2 * video() - 1),
            "reference has values from 0 to 255 and the candidate from 0 to 1",
        ),
        (lambda p: (video() + 0j, video()), "the reference: Tensor: complex values are no picture"),
        (lambda p: (p, video()), "no pictures in this folder"),
        (lambda p: (video()[:, :, :3, :3], video()), r"fits .* say which with layout="),
        (lambda p: (video() * float("nan"), video()), "the reference: 11520 values are not finite .*the first in frame 0"),
        (lambda p: (object(), video()), "a video is a file, a folder"),
        (lambda p: (_written(p / "x.pt", b"no"), video()), "cannot be read as a tensor"),
        (
            lambda p: (_written(p / "x.mp4", b"no"), video()),
            "cannot be read as a video .* it reads what pyav and imageio decode",
        ),
    ],
    ids=itertools.count(),
)
def test_what_is_refused(make, message, tmp_path):
    one, other = make(tmp_path)
    with pytest.raises(vdcache.errors.ConfigError, match=message):
        vdcache.compare(one, other)


def _saved(path, value):
    torch.save(value, path)
    return path


def _written(path, data):
    path.write_bytes(data)
    return path
