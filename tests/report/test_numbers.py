from __future__ import annotations

import math

import pytest

from longspan.report import numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.scaled(25_600_000), "25.6 M"),
        (numbers.scaled(1_320_000, "tok/s"), "1.32 M tok/s"),
        (numbers.scaled(103e9, "FLOP/s"), "103 GFLOP/s"),
        (numbers.scaled(20.1e9, "B/s"), "20.1 GB/s"),
        (numbers.scaled(3.4e15, "FLOP"), "3.40 PFLOP"),
        (numbers.scaled(12, "FLOP/s"), "12 FLOP/s"),
        (numbers.scaled(999_999), "1.00 M"),
        (numbers.scaled(863), "863"),
        (numbers.scaled(None), "–"),
        (numbers.byte_size(3 * 2**20), "3.00 MiB"),
        (numbers.duration(200), "3 min 20 s"),
        (numbers.duration(0.094), "94 ms"),
        (numbers.duration(0.096), "0.1 s"),
        (numbers.estimate(3.4821, 3.471, 3.493), "3.482 ± 0.011"),
        (numbers.estimate(3.482, 3.461, 3.531), "3.48 [3.46, 3.53]"),
        (numbers.estimate(123.4, 120, 127), "123 ± 4"),
        (numbers.estimate(1.2, None, None), "1.200 (no interval)"),
        (numbers.estimate(math.nan, 0, 1), "–"),
        (numbers.percentage(0.312, 0.273, 0.354, 503), "31.2 % [27.3, 35.4] n=503"),
        (numbers.percentage(0.5, None, math.nan), "50 % (no interval)"),
        (numbers.difference(-0.0213, -0.027, -0.0152), "−0.021 [−0.027, −0.015]"),
        (numbers.difference(0.05, 0.01, 0.09, proportion=True), "+5 pp [+1, +9]"),
        (numbers.p_value(0.00004), "< 0.001"),
        (numbers.share(0.2149, 1), "21.5 %"),
        (numbers.share(None), "–"),
        (numbers.relative(-0.0012), "−0.12 %"),
        (numbers.format_signed(-0.0001, 2), "0.00"),
    ],
)
def test_numbers_show_no_more_digits_than_their_interval_allows(shown: str, expected: str) -> None:
    assert shown == expected
