"""canonicalise: what goes, what stays."""

import torch
from expecttest import assert_expected_inline

from vdcache.ir import dump, trace
from vdcache.passes import Canonicalise, Pipeline


def canonical(fn, *args):
    graph, _ = Pipeline((Canonicalise(),), verify=True).run(trace(fn, *args).graph)
    _, more = Pipeline((Canonicalise(),), verify=True).run(graph)
    assert more[0].rewrites == 0, "a second run must find nothing to do"
    with torch.no_grad():
        for a, b in zip(graph(*args), trace(fn, *args).graph(*args), strict=True):
            assert torch.equal(a, b)
    return dump(graph)


def test_dropout_outside_training_goes():
    x = torch.randn(2, 4)
    assert_expected_inline(
        canonical(lambda x: torch.dropout(x.relu(), 0.1, False) + x, x),
        """\
%0 = input() : f32[2,4]
%1 = relu(%0) : f32[2,4]
%2 = add(%1, %0) : f32[2,4]
return (%2)""",
    )


def test_casts_to_the_same_type_go_but_a_returned_copy_stays():
    x = torch.randn(2, 4)
    assert_expected_inline(
        canonical(lambda x: (x.relu().to(torch.float32, copy=True).sin(), x.to(torch.float32, copy=True)), x),
        """\
%0 = input() : f32[2,4]
%1 = relu(%0) : f32[2,4]
%2 = sin(%1) : f32[2,4]
%3 = _to_copy(%0, dtype=torch.float32) : f32[2,4]
return (%2, %3)""",
    )


def test_slices_put_together_again_are_the_tensor():
    x = torch.randn(1, 6, 4)
    assert_expected_inline(
        canonical(lambda x: torch.cat([x[:, :2], x[:, 2:]], 1).relu(), x),
        """\
%0 = input() : f32[1,6,4]
%1 = relu(%0) : f32[1,6,4]
return (%1)""",
    )


def test_slices_in_another_order_or_with_a_gap_stay():
    x = torch.randn(1, 6, 4)
    assert_expected_inline(
        canonical(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1).relu(), x),
        """\
%0 = input() : f32[1,6,4]
%1 = slice(%0, 1, 2, 9223372036854775807) : f32[1,4,4]
%2 = slice(%0, 1, 0, 2) : f32[1,2,4]
%3 = cat([%1, %2], 1) : f32[1,6,4]
%4 = relu(%3) : f32[1,6,4]
return (%4)""",
    )
    assert "cat" in canonical(lambda x: torch.cat([x[:, :2], x[:, 3:]], 1).relu(), x)
    assert "cat" in canonical(lambda x: torch.cat([x[:, :2], x[:, 2:5]], 1).relu(), x)


def test_random_numbers_stay_even_where_nothing_reads_them():
    x = torch.randn(2, 4)

    def fn(x):
        torch.rand_like(x)
        return x.relu()

    graph, _ = Pipeline((Canonicalise(),), verify=True).run(trace(fn, x).graph)
    assert "rand_like" in dump(graph)
