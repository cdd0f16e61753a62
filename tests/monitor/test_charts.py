"""Charts show every peak, have round ticks, and can be read without eyes."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.monitor.charts import Chart, Line, svg, thin, ticks


def plain(value: float) -> str:
    return f"{value:g}"


def test_nothing_to_show_is_no_picture() -> None:
    assert svg(Chart("Loss", [Line("loss", [])], plain)) == ""


def test_a_picture_says_its_figures_in_words() -> None:
    figure = svg(Chart("Loss", [Line("loss", [(1, 4.0), (2, 1.0), (3, 2.0)])], plain))
    assert 'aria-label="Loss. loss: from 4 to 2, lowest 1, highest 4"' in figure


def test_what_is_shown_is_escaped() -> None:
    figure = svg(Chart("<b>&", [Line('"<i>', [(1, 1), (2, 2)])], plain, marks=[(1, "<script>")]))
    ElementTree.fromstring(figure)  # well-formed
    assert not re.search("<(b|i|script)>", figure)


def test_points_and_limits_lie_inside_the_picture() -> None:
    chart = Chart("m", [Line("peak", [(1, 5e9), (40, 7e9)]), Line("limit", [(1, 8e9), (40, 8e9)], "limit")], plain)
    for path in re.findall(r'points="([^"]*)"', svg(chart)):
        for x, y in (map(float, point.split(",")) for point in path.split()):
            assert 0 <= x <= 640
            assert 0 <= y <= 240


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0], [-1.0, -1.0]])
def test_flat_lines_are_drawn(values: list[float]) -> None:
    figure = svg(Chart("flat", [Line("x", list(enumerate(values)))], plain))
    assert "nan" not in figure
    assert ("<circle" if len(values) == 1 else "<polyline") in figure


def test_a_stepped_line_holds_each_value_to_the_next() -> None:
    figure = svg(Chart("cut", [Line("tokens", [(0, 1), (1, 2), (2, 1)], steps=True)], plain))
    path = re.search(r'points="([^"]*)"', figure)
    assert path is not None
    assert len(path[1].split()) == 5


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, size: float) -> None:
    high = low + size
    if high - low < 1e-9 * max(abs(low), 1):
        return
    found = ticks(low, high)
    assert len(found) <= 7
    room = 1e-6 * max(abs(low), abs(high), size)
    assert all(low - room <= value <= high + room for value in found)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(4, 600))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, most)
    assert len(kept) <= max(len(points) if len(points) <= most else 0, most + 2)
    assert kept == sorted(kept)
    assert math.isclose(max(y for _, y in kept), max(values))
    assert math.isclose(min(y for _, y in kept), min(values))
