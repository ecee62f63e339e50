"""How many of n answers can be right where all that is known of them went through B bits."""

from __future__ import annotations

import math

BISECTIONS = 60


def most_right(answers: int, values: int, entropy: float, bits: float) -> float:
    """The largest share of right answers that any rule can expect.

    Let V be the n answers, W what is said of them after a message of B bits, and a the expected share of right ones:

        H(V) <= I(V; W) + sum_i H(V_i | W_i) <= B + n (h(a) + (1 - a) log2(M - 1)),

    h being the entropy of a coin: a message of B bits carries at most B bits (data processing inequality), Fano's
    inequality bounds what is left to know of each answer, and by concavity unequal shares leave less. The questions may
    be known to whoever answers, in any order, if they say nothing of V; whoever writes the message need not know them.
    With independent and uniform answers H(V) = n log2 M, and this is the rate-distortion function of a uniform source
    with Hamming distortion, which long codes reach (Cover & Thomas 2006, theorems 2.10.1 and 10.2.1 and problem 10.5).

    Args:
        answers: n, at least 1.
        values: M, how many each answer may be, at least 2.
        entropy: H(V) in bits, at most n log2 M.
        bits: B.

    Returns:
        The largest such a, from 1/M (guessing) to 1.
    """
    low, high = 1.0 / values, 1.0
    if entropy <= bits:
        return 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        doubt = -middle * math.log2(middle) - (1 - middle) * math.log2(1 - middle)
        if entropy <= bits + answers * (doubt + (1 - middle) * math.log2(values - 1)):
            low = middle
        else:
            high = middle
    return high
