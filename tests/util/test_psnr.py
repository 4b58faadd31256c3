"""The ratio by hand, its cap, and errors that are not numbers."""

import math

import pytest

from vdcache.util.psnr import psnr


def test_by_hand():
    assert psnr(0.01, 1.0) == pytest.approx(20) and psnr(0.01, 10.0) == pytest.approx(40)
    assert psnr(4.0, 1.0) == pytest.approx(-6.0206, abs=1e-4)


def test_equal_tensors_and_tiny_errors_reach_the_cap():
    assert psnr(0.0, 1.0) == math.inf and psnr(0.0, 1.0, cap=150) == psnr(1e-30, 1.0, cap=150) == 150


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_the_worst(error):
    assert psnr(error, 1.0) == psnr(error, 1.0, cap=150) == -math.inf
