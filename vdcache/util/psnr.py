"""Peak signal-to-noise ratio from a mean squared error. Needs neither numpy nor torch."""

from __future__ import annotations

import math

__all__ = ["psnr"]


def psnr(error: float, peak: float, *, cap: float = math.inf) -> float:
    """10 log₁₀(peak² / error), in dB.

    Args:
        error: mean squared error, at least 0; the caller's dtype decides how exact it is.
        peak: what the values of the reference span, above 0, in their unit.
        cap: largest ratio that is returned, in dB; also the ratio of equal tensors. Default: infinity.

    Returns:
        The ratio; −∞ where the error is NaN or infinite, so that such a result is the worst one.
    """
    if not error < math.inf:  # NaN as well
        return -math.inf
    return min(cap, 10 * math.log10(peak * peak / error)) if error > 0 else cap
