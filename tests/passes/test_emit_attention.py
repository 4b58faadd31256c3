"""emit-attention: what comes out of every form and layout, against the model's own weights."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.utils._pytree import tree_leaves

import vdcache
from tests.support.thorough import some
from tests.zoo import ZOO, build
from vdcache.errors import ConfigError
from vdcache.ir import dump, library
from vdcache.ir.capture import trace
from vdcache.ir.dialect import emissions
from vdcache.methods.recipe import Recipe
from vdcache.passes import Canonicalise, EmitAttention, Pipeline
from vdcache.policies import Always
from vdcache.testing import TinyDiT

B, FRAMES, SIDE, DIM, HEADS = 2, 3, 2, 8, 2
SPACE, TOKENS = SIDE * SIDE, FRAMES * SIDE * SIDE


@torch.library.custom_op("vdcache_tests::attention", mutates_args=())
def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, N, H, D], as flash attention's own kernels take it."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).contiguous()


@kernel.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


class Video(nn.Module):
    """One block with one attention, over everything, over frames or over places, written in different ways."""

    def __init__(self, form: str, layout: str, text: int = 0, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.form, self.layout, self.text_tokens, self.first = form, layout, text, first
        self.patch, self.time, self.words = nn.Conv3d(4, DIM, 1), nn.Linear(8, DIM), nn.Linear(4, DIM)
        self.qkv, self.mlp, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 4)
        self.weights = None  # of the last eager call
        self.eval().requires_grad_(False)

    def attend(self, q, k, v):
        """[S, H, N, D] each."""
        scale = 3 * q.shape[-1] ** -0.5
        if self.form == "linear":
            q, k = q.relu() + 0.01, k.relu() + 0.01
            a = q @ k.mT
            self.weights = a / a.sum(-1, keepdim=True)
            total = q @ k.sum(-2, keepdim=True).mT
            return (q @ (k.mT @ v)) / total
        if self.form == "kernel":  # of another library, with tokens before heads
            self.weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        self.weights = (q @ k.mT * scale).softmax(-1)
        if self.form == "padded":  # the last two of the text's tokens are padding
            keep = torch.arange(q.shape[-2]) < q.shape[-2] - 2
            self.weights = (q @ k.mT * scale).masked_fill(~keep, -torch.inf).softmax(-1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[None, None, None], scale=scale)
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        if self.form == "bmm":
            flat = [t.flatten(0, 1) for t in (q, k, v)]
            return torch.bmm((torch.bmm(flat[0], flat[1].mT) * scale).softmax(-1), flat[2]).view_as(v)
        if self.form == "einsum":
            a = (torch.einsum("bhid,bhjd->bhij", q, k) * scale).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", a, v)
        if self.form == "baddbmm":
            flat = [t.flatten(0, 1) for t in (q, k, v)]
            zero = torch.zeros(1, 1, 1, dtype=q.dtype)
            a = torch.baddbmm(zero, flat[0], flat[1].mT, beta=0, alpha=scale).softmax(-1)
            return torch.bmm(a, flat[2]).view_as(v)
        assert self.form == "columns"  # keys along the rows: the matrix is transposed
        a = (k @ q.mT * scale).softmax(-2)
        return (v.mT @ a).mT

    def forward(self, x, timestep, text):
        t = self.time(TinyDiT.sinusoids(None, timestep, x.dtype))[:, None]
        h = self.patch(x).flatten(2).mT + t
        b, n, _ = h.shape
        if self.text_tokens:
            words = self.words(text)
            h = torch.cat([words, h] if self.first else [h, words], 1)
        parts = h
        if self.layout == "spatial":
            parts = h.reshape(b * FRAMES, SPACE, DIM)
        elif self.layout == "temporal":
            parts = h.reshape(b, FRAMES, SPACE, DIM).transpose(1, 2).reshape(b * SPACE, FRAMES, DIM)
        q, k, v = self.qkv(parts).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        o = self.attend(q, k, v).transpose(1, 2).flatten(2)
        if self.layout == "temporal":
            o = o.reshape(b, SPACE, FRAMES, DIM).transpose(1, 2)
        h = h + o.reshape(h.shape)
        h = h + torch.relu(self.mlp(h))
        h = h[:, -n:] if self.first else h[:, :n]
        return self.out(h).mT.unflatten(-1, (FRAMES, SIDE, SIDE))

    def expected(self):
        """[B, TOKENS] from the last call's weights."""
        w = self.weights.mean(1)  # over heads
        received = w.sum(-2) * (w.shape[-1] - 2 * (self.form == "padded")) / w.shape[-2]
        if self.layout == "spatial":
            return received.reshape(B, TOKENS)
        if self.layout == "temporal":
            return received.reshape(B, SPACE, FRAMES).mT.reshape(B, TOKENS)
        return received[:, -TOKENS:] if self.first else received[:, :TOKENS]


def call(text=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 4, FRAMES, SIDE, SIDE, generator=g), torch.full((B,), 500.0), torch.randn(B, text, 4, generator=g)


def emitted(model, *args, **kwargs):
    torch._dynamo.reset()
    options = {"inner": kwargs.pop("inner", "eager")}
    compiled = vdcache.compile(
        model, Recipe("emit", Always(), (EmitAttention(grid=kwargs.pop("grid", ())),)), num_steps=3, **options
    )
    seen = []
    compiled.vdcache.listeners.append(lambda record, values, result: seen.append((values, result)))
    with torch.no_grad():
        compiled(*args, **kwargs)
    values = [v for _, own in seen[0][0] for v in own.values()] if seen else []
    return values, seen[0][1] if seen else None, compiled.vdcache.graphs


FORMS = ["sdpa", "bmm", "einsum", "baddbmm", "columns", "linear"]


@pytest.mark.parametrize("layout", ["full", "spatial", "temporal"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_layout(form, layout):
    model = Video(form, layout)
    (value,), result, _ = emitted(model, *call())
    with torch.no_grad():
        want = model(*call())
    assert torch.equal(result, want)
    torch.testing.assert_close(value, model.expected(), rtol=1e-4, atol=1e-5)
    assert value.std() > 1e-3  # a constant would pass every comparison of means


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_text_beside_the_video(form, first):
    model = Video(form, "full", text=4, first=first)
    (value,), _, _ = emitted(model, *call())
    model(*call())
    torch.testing.assert_close(value, model.expected(), rtol=1e-4, atol=1e-5)


def test_padding_does_not_lower_the_mean():
    model = Video("padded", "full", text=4)
    (value,), _, _ = emitted(model, *call())
    model(*call())
    torch.testing.assert_close(value, model.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["full", "spatial", "temporal"])
def test_kernels_of_other_libraries(layout):
    model = Video("kernel", layout)
    (value,), _, _ = emitted(model, *call())
    model(*call())
    torch.testing.assert_close(value, model.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", some(["sdpa", "columns", "linear"], {"sdpa", "columns"}.__contains__))
def test_under_inductor(form):
    model = Video(form, "temporal")
    (value,), _, _ = emitted(model, *call(), inner="inductor")
    model(*call())
    torch.testing.assert_close(value, model.expected(), rtol=1e-4, atol=1e-4)


# read off the architectures: how many self- or joint-attentions over video tokens each has; a grid where tokens come in cut
REAL = {
    "wan": (3, ()),
    "cogvideox": (3, ()),
    "hunyuan_video": (4, ()),
    "latte": (4, ()),
    "allegro": (3, ()),
    "sd3": (4, ()),
    "pixart": (3, ()),
    "sana": (3, ()),
    "latte_original": (4, ()),
    "sana_original": (3, ()),
    "flex": (3, ()),
    "flux": (4, (1, 4, 4)),
    "ltx": (3, (3, 4, 4)),
}


@pytest.mark.parametrize("name", some(REAL, {"wan", "flux", "latte"}.__contains__))
@torch.no_grad()
def test_real_models(name):
    sites, grid = REAL[name]
    model, case = build(name), ZOO[name]
    values, result, graphs = emitted(model, **case.call(0, 6), grid=grid)
    assert len(values) == sites, [str(r) for g in graphs for r in g.guarded.refusals]
    want = model(**case.call(0, 6))
    assert torch.equal(tree_leaves(result)[0], tree_leaves(want)[0])
    for value in values:
        assert value.isfinite().all() and (value >= 0).all() and 0.2 < value.mean() < 3


def test_the_graph_says_what_is_emitted():
    graph, steps = Pipeline((Canonicalise(), EmitAttention()), verify=True).run(trace(Video("sdpa", "temporal"), *call()).graph)
    assert steps[-1].rewrites == 1
    (mark,) = emissions(graph.graph)
    text = dump(graph)
    lines = [line for line in text.splitlines() if "received" in line or "emit" in line]
    assert_expected_inline(
        "\n".join(lines),
        """\
%41 = vdcache.attention_received(%37, %38, None, False, 1.5) : f32[8,2,3]
%52 = emit(%51, 'scaled_dot_product_attention') : f32[2,12]""",
    )
    assert library.attention_received is not None and mark.args[0].meta["val"].shape == (B, TOKENS)


def test_what_cannot_be_read_says_why_and_leaves_the_graph():
    def refusals(model, *args, **options):
        graph = trace(model, *args).graph
        before = dump(Pipeline((Canonicalise(),)).run(graph)[0])
        after, steps = Pipeline((Canonicalise(), EmitAttention(**options)), verify=True).run(graph)
        assert dump(after) == before
        return str(steps[-1].refusals[0])

    g = torch.Generator().manual_seed(0)
    tiny = (torch.randn(1, 6, 4, generator=g), torch.tensor([5.0]), torch.randn(1, 3, 4, generator=g))
    assert "give grid=(frames, height, width)" in refusals(TinyDiT(), *tiny)
    assert "6 keys are not the 8 video tokens" in refusals(TinyDiT(), *tiny, grid=(2, 2, 2))
    with pytest.raises(ConfigError, match=r"grid is \(frames, height, width\)"):
        EmitAttention(grid=(2, 3))
