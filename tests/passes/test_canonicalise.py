"""canonicalise and dead-code: what goes, what stays."""

import pytest

from vdcache.passes import Canonicalise, DeadCode
from vdcache.testing import assert_bit_identical, assert_pass, parse, run_pass


def test_nodes_that_compute_nothing_go():
    before = """
%0 = input() : f32[2,4]
%1 = dropout(%0, 0.1, False)
%2 = alias(%1)
%3 = _to_copy(%2, dtype=torch.float32)
%4 = relu(%3)
%5 = slice(%4, 1, 0, 2)
%6 = slice(%4, 1, 2, 4)
%7 = concat([%5, %6], 1)
%8 = sin(%7)
return (%8)"""
    assert_pass(Canonicalise(), before, "%0 = input() : f32[2,4]\n%1 = relu(%0)\n%2 = sin(%1)\nreturn (%2)")
    once = run_pass(Canonicalise(), before).graph
    assert run_pass(Canonicalise(), once).rewrites == 0, "a second run must find nothing to do"
    assert_bit_identical(parse(before.strip()), once)


@pytest.mark.parametrize(
    "kept",
    [
        "%1 = dropout(%0, 0.5, True)\nreturn (%1)",  # in training it does something
        "%1 = clone(%0)\nreturn (%1)",  # the caller may write into it
        "%1 = _to_copy(%0, dtype=torch.float32)\nreturn (%1)",  # as well
        "%1 = _to_copy(%0, dtype=torch.float64)\n%2 = sin(%1)\nreturn (%2)",
        "%1 = slice(%0, 1, 2, 4)\n%2 = slice(%0, 1, 0, 2)\n%3 = cat([%1, %2], 1)\nreturn (%3)",  # in another order
        "%1 = slice(%0, 1, 2, 4)\n%2 = slice(%0, 1, 2, 4)\n%3 = cat([%1, %2], 1)\nreturn (%3)",  # one of them twice
        "%1 = slice(%0, 1, 0, 2)\n%2 = slice(%0, 1, 3, 4)\n%3 = cat([%1, %2], 1)\nreturn (%3)",  # with a gap
        "%1 = slice(%0, 1, 0, 1)\n%2 = slice(%0, 1, 1, 3)\n%3 = cat([%1, %2], 1)\nreturn (%3)",  # not to the end
        "%1 = sin(%0)\n%2 = slice(%1, 1, 0, 2)\n%3 = slice(%0, 1, 2, 4)\n%4 = cat([%2, %3], 1)\nreturn (%4)",  # of two tensors
        "%1 = rand([2])\nreturn (%0)",  # it moves the generator
    ],
)
def test_nodes_that_compute_something_stay(kept):
    text = f"%0 = input() : f32[2,4]\n{kept}"
    assert_pass(Canonicalise(), text, text)


def test_what_nothing_reads_goes_but_for_effects_and_marks():
    before = """
%0 = input() : f32[2]
%1 = sin(%0)
%2 = cos(%1)
%3 = rand([2])
%4 = observe(%1, 'all/o', 'l1', (), 0)
return (%0)"""
    after = before.replace("%2 = cos(%1)\n", "").replace("%3", "%2").replace("%4", "%3")
    assert_pass(DeadCode(), before, after)
