"""Charts: scales and ticks against known points, averages against plain loops, hostile names."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from sslvit.pages.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Bar,
    Level,
    Line,
    Scale,
    bar_chart,
    interval_mark,
    line_chart,
    log_ticks,
    moving_average,
    number,
    percent,
    thinned,
    ticks,
)


def points_of(svg, kind="polyline"):
    """Coordinates of the first line of a drawing."""
    tree = ElementTree.fromstring(str(svg))
    return [tuple(map(float, pair.split(","))) for pair in tree.find(kind).get("points").split()]


def test_scale_known_points():
    scale = Scale(0, 10, 100, 300)
    assert [scale(v) for v in (0, 2.5, 10)] == [100, 150, 300]
    assert [scale(v) for v in (-5, 99)] == [100, 300], "values outside lie on the border"
    down = Scale(0, 1, 200, 20)
    assert down(0) == 200 and down(1) == 20 and down(0.5) == 110
    log = Scale(1, 1000, 0, 300, log=True)
    assert [log(v) for v in (1, 10, 100, 1000)] == [0, 100, 200, 300]
    assert Scale(3, 3, 0, 10)(3) == 5


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 300, [0, 100, 200, 300]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0.23, 0.61, [0.3, 0.4, 0.5, 0.6]),
        (0, 60_000, [0, 20_000, 40_000, 60_000]),
        (5, 5, [5]),
    ],
)
def test_ticks_known(low, high, expected):
    assert ticks(low, high) == expected


@pytest.mark.parametrize("low", [-7.3e5, -0.02, 0.0, 1e-7, 3.1, 8e4])
@pytest.mark.parametrize("span", [0.0041, 0.37, 1.0, 49.0, 2.2e7])
def test_ticks_are_round_and_few(low, span):
    found = ticks(low, low + span, 5)
    assert 2 <= len(found) <= 6 and low - 1e-6 * span <= found[0] and found[-1] <= low + (1 + 1e-6) * span
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert any(math.isclose(mantissa, m, rel_tol=1e-6) for m in (1, 2, 2.5, 5))


def test_log_ticks():
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(2, 40) == [3, 10, 30]
    assert len(log_ticks(1e-9, 1e9)) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12500, "12,500"), (1_500_000, "1.5M"), (0.034, "0.034"), (7.1e-5, "7.1e-05"), (3.14159, "3.142")],
)
def test_number(value, text):
    assert number(value) == text


def test_percent():
    assert [percent(v) for v in (0, 0.025, 0.318, 1)] == ["0%", "2.5%", "31.8%", "100%"]


def test_moving_average_is_the_weighted_mean_around_each_value():
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    half_life = 1.7
    found = moving_average(values, half_life)
    for i, average in enumerate(found):
        weights = [0.5 ** (abs(i - j) / half_life) for j in range(len(values))]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert math.isclose(average, expected, rel_tol=1e-12)
    assert moving_average([2.0] * 5, 3) == pytest.approx([2.0] * 5)


def test_thinned_keeps_every_peak_and_both_ends():
    xs = list(range(10_000))
    ys = [math.sin(x / 700) for x in xs]
    ys[4321], ys[77] = 50.0, -50.0
    kept = thinned(xs, ys, 240)
    assert len(kept) <= 250 and kept == sorted(kept)
    assert (4321, 50.0) in kept and (77, -50.0) in kept and kept[-1][0] == 9999
    assert kept[0][0] < 100
    every_forty_second = {x for x in xs[::42]}
    assert not {4321, 77} <= every_forty_second, "plain decimation would have lost the peaks"


def test_line_chart_puts_points_where_they_belong():
    svg = line_chart([Line("x", [0, 50, 100], [0.0, 1.0, 2.0])], label="line", floor=0.0, ceiling=2.0)
    left, right, bottom, top = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    assert points_of(svg) == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]


def test_line_chart_axis_ends_at_ticks():
    svg = str(line_chart([Line("x", [0, 100], [0.3, 1.7])], label="line"))
    texts = re.findall(r'text-anchor="end">([^<]*)</text>', svg)
    assert texts[:5] == ["0", "0.5", "1", "1.5", "2"]


def test_spikes_make_the_axis_logarithmic_and_the_average_geometric():
    ys = [1e5, *([1.0] * 99)]
    svg = line_chart([Line("norm", list(range(100)), ys)], label="norm")
    assert ">10,000</text>" in str(svg)
    assert ">10,000</text>" not in str(line_chart([Line("n", list(range(100)), [2.0, *ys[1:]])], label="norm"))


def test_many_points_are_smoothed_few_are_dots():
    few = str(line_chart([Line("x", list(range(10)), [float(i) for i in range(10)])], label="few"))
    many = str(line_chart([Line("x", list(range(100)), [float(i % 7) for i in range(100)])], label="many"))
    assert few.count("<polyline") == 1 and few.count("<circle") == 10
    assert many.count("<polyline") == 2 and "pale" in many and "<circle" not in many


def test_readings_say_each_value_once():
    xs = [0.0, 10.0, 20.0]
    svg = line_chart([Line("a", xs, [1.0, 2.0, 3.0]), Line("b", xs[:2], [0.25, 0.5], 1)], label="two")
    said = re.findall(r'<g class="reading">.*?<text[^>]*>([^<]*)</text></g>', str(svg))
    assert said == ["step 0   a 1   b 0.25", "step 10   a 2   b 0.5", "step 20   a 3"]


@pytest.mark.parametrize(
    "ys", [[1.0], [2.0, 2.0], [0.0, 5e-324], [-1e299, 1e299], [1e-300, 1e300], [0.0, 0.0, 0.0], [1.0, 1.0 + 1e-15]]
)
def test_odd_values_draw_something_finite(ys):
    svg = str(line_chart([Line("x", list(range(len(ys))), ys)], label="odd"))
    assert "nan" not in svg and "inf" not in svg
    ElementTree.fromstring(svg)


def test_level_is_drawn_at_its_value():
    lines = [Line("x", [0, 100], [0.0, 2.0])]
    svg = str(line_chart(lines, label="l", levels=[Level(1.0, "half")], floor=0.0, ceiling=2.0))
    at = Scale(0, 2, HEIGHT - BOTTOM, TOP)(1.0)
    assert f'class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"' in svg and ">half</text>" in svg


def test_bars_are_as_long_as_their_values():
    groups = [("one", [Bar(0.5, (0.4, 0.6), "model"), Bar(0.25, None, "blind", 1)])]
    tree = ElementTree.fromstring(str(bar_chart(groups, label="bars")))
    first, second = (float(rect.get("width")) for rect in tree.iter("rect"))
    assert first == pytest.approx(2 * second, abs=0.2)
    titles = [title.text for title in tree.iter("title")]
    assert titles == ["one, model: 50% (95% interval 40% to 60%)", "one, blind: 25%"]
    paths = [path.get("d") for path in tree.iter("path")]
    assert len(paths) == 1, "no interval, no whisker"
    low, middle, high = (float(v) for v in re.match(r"M([\d.]+) .*H([\d.]+)M([\d.]+)", paths[0]).groups())
    rect = next(tree.iter("rect"))
    end = float(rect.get("x")) + float(rect.get("width"))
    assert middle == high and end == pytest.approx((low + high) / 2, abs=0.2)


def test_negative_bars_begin_at_zero():
    tree = ElementTree.fromstring(str(bar_chart([("r2", [Bar(-0.5, None, "a"), Bar(0.5, None, "b")])], label="bars")))
    left, right = list(tree.iter("rect"))
    assert float(left.get("x")) + float(left.get("width")) == pytest.approx(float(right.get("x")), abs=0.2)


def test_hostile_names_are_text():
    name = '</text><script>alert("1")</script>'
    for svg in (
        line_chart([Line(name, [0, 1], [0.0, 1.0])], label=name, levels=[Level(0.5, name)], x_label=name),
        bar_chart([(name, [Bar(0.5, (0.4, 0.6), name)])], label=name),
    ):
        assert "<script" not in str(svg)
        ElementTree.fromstring(str(svg))


def test_interval_mark():
    svg = str(interval_mark(0.5, (0.25, 0.75), 1))
    assert 'x2="50.0"' in svg and "M25.5 " in svg and "M74.5 " in svg
    assert "whisker" not in str(interval_mark(0.5, None))
