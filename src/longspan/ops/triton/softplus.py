"""The softplus of step sizes in kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x) in fp32, right to a few units in the last place.

    A chip's logarithm is right to 2^-22 near 1, which is a ten-thousandth of a step size of 0.001: below e^x = 1 it is
    the series of 2 artanh(e^x / (2 + e^x)).
    """
    e = tl.exp(tl.minimum(x, 20.0))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0))
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * series)))
    return tl.where(x > 20.0, x, tl.where(e < 1.0, 2.0 * s * series, tl.log(1.0 + e)))
