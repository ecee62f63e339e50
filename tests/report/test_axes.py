from __future__ import annotations

import json
from itertools import pairwise

import vl_convert
from hypothesis import given
from hypothesis import strategies as st

from longspan.report import charts, page
from longspan.report.axes import Axis, log_steps, spread
from longspan.report.findings import crossovers


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_keep_their_order_and_never_overlap(wanted: list[float]) -> None:
    wanted.sort()
    places = spread(wanted, 13.5, 300)
    assert all(b - a >= 13.5 - 1e-6 for a, b in pairwise(places))
    assert places[0] >= -1e-6
    assert places[-1] <= 300 + 1e-6


@given(st.floats(1e-3, 1e9), st.floats(1.5, 1e6))
def test_log_axes_have_few_ticks_inside_their_domain(low: float, factor: float) -> None:
    for base in (2, 10):
        ticks = log_steps((low, low * factor), base)
        assert len(ticks) <= 6
        assert all(low <= tick <= low * factor for tick in ticks)


def test_zero_of_an_axis_in_thousands_is_called_zero() -> None:
    rows = [{"name": "A", "value": 90_000.0, "low": None, "high": None, "c": "#000", "text": "", "hollow": False,
             "detail": "", "zone": 0}]  # fmt: skip
    spec = charts.dots(rows, Axis("samples", form="~s", zero=True))
    svg = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=page.VEGA_LITE)
    assert ">0<" in svg
    assert ">20k<" in svg
    assert ">0k<" not in svg


def test_a_crossing_is_found_between_its_contexts_and_says_its_doubt() -> None:
    exact = {
        "A": [(64.0, 1.0, 1.0, 1.0), (1024.0, 16.0, 16.0, 16.0)],
        "M": [(64.0, 4.0, 4.0, 4.0), (1024.0, 4.0, 4.0, 4.0)],
    }
    (crossing,) = crossovers(exact)
    assert (crossing.a, crossing.b, round(crossing.x)) == ("M", "A", 256)
    assert crossing.low is None
    unsure = {"A": [(64.0, 3.0, 2.0, 5.0), (1024.0, 16.0, 15.0, 17.0)], "M": exact["M"]}
    (crossing,) = crossovers(unsure)
    assert (crossing.low, crossing.high) == (64.0, 1024.0)
    assert crossing.low < crossing.x < crossing.high


def test_two_crossings_in_one_stretch_of_doubt_are_none() -> None:
    steady = [(x, 2.0, 1.8, 2.2) for x in (64.0, 256.0, 1024.0)]
    dips = [(64.0, 1.0, 0.9, 1.1), (256.0, 2.1, 1.7, 2.4), (1024.0, 1.0, 0.9, 1.1)]
    assert crossovers({"A": steady, "M": dips}) == []
    stays = [*dips[:2], (1024.0, 4.0, 3.5, 4.5)]
    (crossing,) = crossovers({"A": steady, "M": stays})
    assert (crossing.a, crossing.b, crossing.low, crossing.high) == ("A", "M", 64.0, 1024.0)
