"""What is a branch, of which kind, and what is not; in every spelling."""

import pytest
import torch
import torch.nn.functional as F

from vdcache.ir import trace
from vdcache.passes import Canonicalise, Pipeline
from vdcache.patterns import analyze
from vdcache.testing import TinyDiT, latent, time_of

X, W, V = torch.randn(1, 6, 8), torch.randn(8, 8), torch.randn(8, 8)
CONTEXT, GATE = torch.randn(1, 3, 8), torch.randn(1, 1, 8)


def look(fn, *args):
    graph, _ = Pipeline((Canonicalise(),)).run(trace(fn, *args).graph)
    return analyze(graph)


def heads(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def attend(q, k, v):
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


def by_hand(q, k, v):
    scores = (heads(q) @ heads(k).transpose(-1, -2) * 0.5).softmax(-1)
    return (scores @ heads(v)).transpose(1, 2).flatten(2)


SPELLINGS = {
    "plain": lambda x, w: x + torch.relu(x @ w) @ w,
    "swapped": lambda x, w: torch.relu(x @ w) @ w + x,
    "gated": lambda x, w: x + torch.relu(x @ w) @ w * 0.5,
    "in place": lambda x, w: x.clone().add_(torch.relu(x @ w) @ w),
    "factor": lambda x, w: torch.add(x, torch.relu(x @ w) @ w, alpha=2),
    "addcmul": lambda x, w: torch.addcmul(x, w[0], torch.relu(x @ w) @ w),
    "lerp": lambda x, w: torch.lerp(x, torch.relu(x @ w) @ w, 0.3),
    "minus": lambda x, w: x - torch.relu(x @ w) @ w,
    "minus minus": lambda x, w: torch.relu(x @ w) @ w - (-x),
    "cast": lambda x, w: (x.double() + (torch.relu(x @ w) @ w).double() * 0.1).float(),
    "scaled skip": lambda x, w: 0.7 * x + torch.relu(x @ w) @ w,
    "stacked": lambda x, w: torch.stack([x, torch.relu(x @ w) @ w]).sum(0),
    "scaled sum": lambda x, w: (x + torch.relu(x @ w) @ w) / 2**0.5,
    "learned scale of the skip": lambda x, w: x * w[0] + torch.relu(x @ w) @ w,
    "one matrix product": lambda x, w: torch.addmm(x[0], torch.relu(x[0] @ w), w),
    "viewed": lambda x, w: x.reshape(6, 8) + (torch.relu(x @ w) @ w).reshape(6, 8),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_mlp_branch(spelling):
    assert look(SPELLINGS[spelling], X, W).count() == {"mlp": 1}


@pytest.mark.parametrize("attention", [attend, by_hand])
def test_kinds_of_attention(attention):
    def self_attention(x, w, c):
        return x + attention(x @ w, x @ w, x @ w) @ w

    def cross_attention(x, w, c):
        return x + attention(x @ w, c @ w, c @ w) @ w

    def joint_attention(x, w, c):
        both = torch.cat([x @ w, c @ w], 1)
        return x + attention(both, both, both)[:, : x.shape[1]] @ w

    for fn, kind in ((self_attention, "self"), (cross_attention, "cross"), (joint_attention, "joint")):
        found = look(fn, X, W, CONTEXT)
        assert found.count() == {f"{kind}-attention": 1}
        assert [a.kind for a in found.branches[0].attentions] == [kind]


def test_attention_beside_an_mlp_is_fused_but_a_gate_on_attention_is_not():
    def fused(x, w, v):
        return x + torch.cat([attend(x @ w, x @ w, x @ w), F.gelu(x @ v)], -1) @ torch.cat([w, v])

    def summed(x, w, v):
        return x + (attend(x @ w, x @ w, x @ w) @ w + F.gelu(x @ v) @ v)

    def gated(x, w, v):
        return x + attend(x @ w, x @ w, x @ w) * torch.sigmoid(x @ v) @ w

    assert look(fused, X, W, V).count() == {"fused": 1}
    assert look(summed, X, W, V).count() == {"fused": 1}
    assert look(gated, X, W, V).count() == {"self-attention": 1}


def test_parallel_branches_summed_one_after_the_other_are_two():
    def net(x, w, v):
        return x + attend(x @ w, x @ w, x @ w) + F.gelu(x @ v) @ v

    assert look(net, X, W, V).count() == {"self-attention": 1, "mlp": 1}


def test_rotary_tables_and_modulation_are_no_branches():
    def net(x, w, scale):
        cos, sin = torch.randn(6, 8).cos(), torch.randn(6, 8).sin()
        h = F.layer_norm(x, (8,)) * (1 + scale) + scale
        q = h @ w
        q = q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin
        return x + attend(q, q, h @ w)

    found = look(net, X, W, GATE)
    assert found.count() == {"self-attention": 1}


def test_a_modulation_of_every_token_that_blocks_share_is_no_stream():
    """Shift and stream have one shape and the stream depends on the shift through earlier blocks."""

    def net(x, w, t):
        shift = torch.relu(t @ w)
        for _ in range(2):
            h = F.layer_norm(x, (8,)) + shift
            x = x + torch.relu(h @ w) @ w
        return x

    assert look(net, X, W, torch.randn(1, 6, 8)).count() == {"mlp": 2}


def test_a_skip_around_everything_is_refused_and_its_branches_are_taken():
    def net(x, w):
        h = x
        for _ in range(3):
            h = h + torch.relu(h @ w) @ w
        return x + h

    found = look(net, X, W)
    assert found.count() == {"mlp": 3}
    assert any("contains 3 branches" in r.reason for r in found.refusals)


def test_a_convolution_added_inside_a_branch_belongs_to_it():
    def net(x, w, v):
        h = x @ w
        h = h + torch.relu(h @ v)
        return x + attend(h, h, h) @ w

    found = look(net, X, W, V)
    assert found.count() == {"self-attention": 1}
    assert any("lies inside the branch" in r.reason for r in found.refusals)


def test_gates_leaks_blocks_and_clock():
    model = TinyDiT(blocks=3)
    found = look(model.forward, latent(0), time_of(0), latent(1, 1, 3, 4))
    assert [b.block for b in found] == [0, 0, 1, 1, 2, 2]
    assert all(b.pre_gate for b in found) and {b.stream for b in found} == {0}
    assert len(found.timestep_inputs) == 1 and found.latent

    def leaky(x, w):
        h = torch.relu(x @ w)
        return x + h @ w, h.sum()

    (branch,) = look(leaky, X, W).branches
    assert len(branch.leaks) == 1


def test_the_clock_is_found_by_structure_alone():
    def net(noise, when, w):
        sinusoids = torch.cat([(when[:, None] * torch.ones(4)).sin(), (when[:, None] * torch.ones(4)).cos()], -1)
        gate = (sinusoids @ w)[:, None]
        return noise + gate * (torch.relu(noise @ w) @ w)

    found = look(net, X, torch.tensor([3.0]), W)
    graph = trace(net, X, torch.tensor([3.0]), W).graph
    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    assert found.timestep_inputs == (names[1],) and found.latent == names[0]


def mlp(x, w):
    return torch.relu(x @ w) @ w


def test_a_hint_from_another_stream_is_a_branch_of_its_own():
    """A control network inside forward: its stream, the model's stream, and what the one adds to the other."""

    def net(x, w, v):
        c = x @ v
        for _ in range(2):
            x = x + mlp(x, w)
            c = c + mlp(c, w)
            x = x + c @ v
        return x

    found = look(net, X, W, V)
    assert found.count() == {"mlp": 4, "other": 2}
    assert [b.stream for b in found if b.kind == "other"] == [found.branches[0].stream] * 2


def test_a_projected_skip_around_everything_is_one_more():
    def net(x, w, v):
        h = x @ v
        for _ in range(2):
            h = h + mlp(h, w)
        return x + h @ v

    assert look(net, X, W, V).count() == {"mlp": 2, "other": 1}


def test_two_streams_that_read_each_other_in_turn():
    def net(a, b, w):
        for _ in range(2):
            b = b + attend(b @ w, a @ w, a @ w) @ w
            a = a + attend(a @ w, b @ w, b @ w) @ w
        return a, b

    found = look(net, X, torch.randn(1, 3, 8), W)
    assert found.count() == {"cross-attention": 4} and [b.stream for b in found] == [0, 1, 0, 1]
    assert [s.role for s in found.streams] == ["latent", "latent"]


def test_what_depends_on_the_timestep_alone_is_no_stream():
    """Neither a residual embedding of it nor a modulation of every token: reusing those would freeze the time."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(W)

        def forward(self, x, t):
            angles = t[:, None] * torch.exp(-torch.arange(4.0))
            e = torch.cat([angles.sin(), angles.cos()], -1) @ self.w
            e = e + mlp(e, self.w)
            shift = (e @ self.w)[:, None].expand(1, 6, 8) * 1.0
            return x + mlp(F.layer_norm(x, (8,)) + shift, self.w)

    found = look(Net(), X, torch.tensor([500.0]))
    assert found.count() == {"mlp": 1} and len(found.timestep_inputs) == 1
    assert any("nothing but the timestep" in r.reason for r in found.refusals)


def test_an_attention_that_was_added_already_does_not_give_the_next_branch_its_kind():
    def net(x, w, c):
        a = attend(x @ w, x @ w, x @ w) @ w
        x = x + a
        return x + attend(a @ w, c @ w, c @ w) @ w

    assert look(net, X, W, CONTEXT).count() == {"self-attention": 1, "cross-attention": 1}


def test_attention_and_mlp_one_after_the_other_in_one_sum_are_fused():
    def net(x, w):
        h = F.layer_norm(x + attend(x @ w, x @ w, x @ w) @ w, (8,))
        return x + mlp(h, w)

    assert look(net, X, W).count() == {"fused": 1}


def test_attention_without_softmax():
    def linear(x, w, v):
        q, k, u = (torch.relu(heads(x @ m)) for m in (w, v, w))
        h = q @ (k.transpose(-1, -2) @ u)
        return x + h.transpose(1, 2).flatten(2) @ w

    found = look(linear, X, W, V)
    assert found.count() == {"self-attention": 1}
    (site,) = found.attentions
    assert site.form == "linear" and site.heads == 2 and site.q_len == site.kv_len == 6


def test_a_scan_over_tokens_is_no_mlp_but_a_norm_is():
    def scan(x, w):
        return x + torch.cumsum(torch.relu(x @ w), 1) @ w

    def norm(x, w):
        h = x @ w
        return x + (h / h.square().mean(-1, keepdim=True).sqrt()) @ w

    assert look(scan, X, W).count() == {"other": 1}
    assert look(norm, X, W).count() == {"mlp": 1}


def test_blocks_are_found_by_shape():
    """An MLP before and after the attention: three branches a block, which no order of kinds tells."""

    def net(x, *ws):
        for w, v in zip(ws[::2], ws[1::2], strict=True):
            x = x + mlp(x, w)
            x = x + attend(x @ w, x @ w, x @ w) @ v
            x = x + mlp(F.layer_norm(x, (8,)), v)
        return x

    found = look(net, X, *(torch.randn(8, 8) for _ in range(6)))
    assert [b.block for b in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {b.shape for b in found.blocks} == {0}


def test_flops_of_branches_and_of_what_they_share_add_up():
    def net(a, b, w):
        q = torch.cat([a @ w, b @ w], 1)
        h = attend(q, q, q)
        return a + h[:, :6] @ w, b + h[:, 6:] @ w

    found = look(net, X, torch.randn(1, 3, 8), W)
    assert sum(b.flops for b in found) == found.flops == found.covered
    assert found.coverage == 1.0


@pytest.mark.parametrize(
    ("form", "normalise"),
    [
        ("matmul-softmax", lambda s: (s - s.amax(-1, keepdim=True)).exp() / s.exp().sum(-1, keepdim=True)),
        ("matmul-softmax", lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()),
        ("matmul", torch.sigmoid),
        ("matmul", lambda s: F.normalize(s, p=1, dim=-1)),
        ("matmul", lambda s: s),
    ],
)
@pytest.mark.parametrize("written", ["matmul", "einsum"])
def test_scores_with_another_normaliser(form, normalise, written):
    def attention(q, k, v):
        q, k, v = heads(q), heads(k), heads(v)
        if written == "matmul":
            out = normalise(q @ k.transpose(-1, -2) * 0.5) @ v
        else:
            out = torch.einsum("bhqk,bhkd->bhqd", normalise(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5), v)
        return out.transpose(1, 2).flatten(2)

    def net(x, w, c):
        x = x + attention(x @ w, x @ w, x @ w) @ w
        return x + attention(x @ w, c @ w, c @ w) @ w

    found = look(net, X, W, CONTEXT)
    assert found.count() == {"self-attention": 1, "cross-attention": 1}
    own, other = found.attentions
    assert own.form == other.form == form
    assert (own.heads, own.q_len, own.kv_len, own.head_dim) == (2, 6, 6, 4)
    assert (other.heads, other.q_len, other.kv_len, other.head_dim) == (2, 6, 3, 4)


@pytest.mark.parametrize("wave", ["polar", "complex exponential", "phase"])
def test_other_spellings_of_a_timestep_embedding(wave):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(W)

        def forward(self, x, t):
            angles = t[:, None] * torch.exp(-torch.arange(4.0))
            if wave == "polar":
                e = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(1)
            elif wave == "phase":
                e = torch.cat([torch.cos(angles), torch.cos(angles - torch.pi / 2)], -1)
            else:
                e = torch.view_as_real(torch.exp(1j * angles)).flatten(1)
            return x + mlp(x * (e @ self.w)[:, None], self.w)

    assert len(look(Net(), X, torch.tensor([500.0])).timestep_inputs) == 1


def test_streams_cut_out_of_one_sequence_keep_their_roles():
    """Text and latent are put together for their positions and cut apart again before the first block."""

    def net(x, c, w):
        both = torch.cat([c @ w, x @ w], 1) + torch.full((1, 9, 8), 0.1)
        text, x = both[:, :3], both[:, 3:]
        q = torch.cat([text @ w, x @ w], 1)
        h = attend(q, q, q)
        return x + h[:, 3:] @ w, (text + h[:, :3] @ w).mean()

    found = look(net, X, CONTEXT, W)
    assert [s.role for s in found.streams] == ["latent", "text"]
    assert all(not s.spans for s in found.streams)
    assert [(s.role, s.start, s.stop) for s in found.attentions[0].spans] == [("text", 0, 3), ("latent", 3, 9)]
