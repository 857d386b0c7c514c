"""Small charts as inline SVG: lines over steps, bars with intervals. No scripts, no fonts, no colours of their own.

Colours are the classes `c0`, `c1`, ... of the page's style, so that one drawing serves light and dark. All text is
escaped. Not a plotting library: what the report and `benchmarks` show fits in two functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360.0, 206.0  # units of the viewBox; about a pixel where three charts make a row, or one fills a phone
BAR_WIDTH = 460.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 10.0, 22.0, 30.0
NUM_POINTS = 240  # of a line that is drawn
NUM_READINGS = 60  # places where a chart can be read with the mouse
NUM_TICKS = 4  # parts of the vertical axis, about
SPIKE = 20.0  # times the median
SMOOTH_FROM = 24  # points from which on a moving average is drawn over the values


@dataclass(frozen=True)
class Line:
    """Values (ys) at steps (xs), both finite, xs ascending. colour: 0..5. smooth: draw a moving average over them."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    smooth: bool = True


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line with its meaning beside it."""

    y: float
    name: str


@dataclass(frozen=True)
class Bar:
    """A value, its 95% interval if it has one, and whose it is."""

    value: float
    interval: tuple[float, float] | None
    name: str
    colour: int = 0


@dataclass(frozen=True)
class Scale:
    """Maps values of [low, high] to units of the drawing [start, end]; logarithmic on request."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, rounded to a tenth of a unit; values outside lie on the border."""
        low, high, value = (self._measure(v) for v in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)

    def _measure(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def tick_step(low: float, high: float, count: int) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that divides [low, high] into at most `count` parts."""
    rough = max((high - low) / count, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of `tick_step` within [low, high]; at most count + 1 of them."""
    if not high > low:
        return [low]
    step = tick_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [_round(i * step) for i in range(first, last + 1)]


def _round(value: float) -> float:
    """0.3 for 3 * 0.1."""
    return float(f"{value:.12g}")


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with fewer than three of them also their 2- and 5-fold."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [float(f"{f}e{p}") for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            break
    every = math.ceil(len(found) / 6)
    return found[::every] if found else [low, high]


def number(value: float) -> str:
    """A number as people write it: 12,500, 1.5M, 0.034, 7.1e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M" if size < 1e9 else f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.2g}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g}%"


def moving_average(values: Sequence[float], half_life: float) -> list[float]:
    """Average around each value with weights that halve every `half_life` values to both sides, so nothing lags."""
    before, after = _sums(values, half_life), _sums(values[::-1], half_life)[::-1]
    return [(a + b - value) / (m + n - 1) for value, (a, m), (b, n) in zip(values, before, after, strict=True)]


def _sums(values: Sequence[float], half_life: float) -> list[tuple[float, float]]:
    """Running sums of values and weights, from the first value on."""
    decay = 0.5 ** (1 / half_life)
    total, weight, sums = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def thinned(xs: Sequence[float], ys: Sequence[float], count: int = NUM_POINTS) -> list[tuple[float, float]]:
    """At most about `count` points that keep every peak: of each run of points its lowest and its highest."""
    points = list(zip(xs, ys, strict=True))
    if len(points) <= count:
        return points
    run = math.ceil(2 * len(points) / count)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), run):
        part = points[start : start + run]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    levels: Sequence[Level] = (),
    shares: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    x_label: str = "step",
) -> Markup:
    """Lines over steps. label: read by screen readers. shares: values are fractions, shown in percent.

    floor, ceiling: values the vertical axis must reach. It is logarithmic where positive values rise far above the
    median, as the first gradients do.
    """
    lines = [line for line in lines if len(line.xs)]
    assert lines, "a chart needs a point"
    values = [y for line in lines for y in line.ys] + [level.y for level in levels]
    values += [v for v in (floor, ceiling) if v is not None]
    log = not shares and min(values) > 0 and max(values) > SPIKE * median(values)
    y, marks = _vertical(min(values), max(values), log)
    first, last = min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines)
    x = Scale(0.0 if 0 < first < 0.1 * last else first, last, LEFT, WIDTH - RIGHT)
    show = percent if shares else number
    body = [
        *_grid(y, marks, show),
        *_steps(x, x_label),
        *(part for level in levels for part in _level(level, y, lines[0])),
        *(part for line in lines for part in _line(line, x, y)),
        *_readings(lines, x, y, show, x_label),
    ]
    return _svg(body, WIDTH, HEIGHT, label)


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]], *, label: str, shares: bool = True) -> Markup:
    """Horizontal bars with 95% intervals from 0, a group for each (name, bars)."""
    thickness, gap, between, left = 9.5, 2.5, 12.0, 100.0
    bars = [bar for _, group in groups for bar in group]
    reach = [edge for bar in bars for edge in (bar.value, *(bar.interval or ()))]
    low, high = min([0.0, *reach]), max([1.0 if shares else 0.0, *reach])
    x = Scale(low, high if high > low else low + 1, left, BAR_WIDTH - 30)
    show = percent if shares else number
    top, body, marks = 8.0, list[str](), list[str]()
    for name, group in groups:
        height = len(group) * (thickness + gap) - gap
        middle = top + height / 2 + 4
        body.append(f'<text class="name" x="{left - 10}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for place, bar in enumerate(group):
            marks += _bar(bar, x, top + place * (thickness + gap), thickness, show, name)
        top += height + between
    bottom = top - between + 8
    for tick in ticks(low, high, 5):
        at = x(tick)
        body.append(f'<line class="grid" x1="{at}" x2="{at}" y1="2" y2="{bottom:.1f}"/>')
        body.append(f'<text x="{at}" y="{bottom + 16:.1f}" text-anchor="middle">{show(tick)}</text>')
    return _svg([*body, *marks], BAR_WIDTH, bottom + 24, label, "chart bars")


def interval_mark(value: float, interval: tuple[float, float] | None, colour: int = 0) -> Markup:
    """A share as a small bar with its interval, for a row of a table."""
    x = Scale(0, 1, 1, 99)
    parts = [
        '<line class="track" x1="1" x2="99" y1="7" y2="7"/>',
        f'<line class="c{colour}" stroke-width="3" x1="1" x2="{x(value)}" y1="7" y2="7"/>',
    ]
    if interval is not None:
        parts.append(_whisker(x(interval[0]), x(interval[1]), 7, 3))
    return Markup(f'<svg class="mark" viewBox="0 0 100 14" aria-hidden="true">{"".join(parts)}</svg>')


def _vertical(low: float, high: float, log: bool) -> tuple[Scale, list[float]]:
    """The vertical axis and its ticks; a linear one begins and ends at a tick."""
    if log:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True), log_ticks(low / 1.1, high * 1.1)
    if high == low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    step = tick_step(low, high, NUM_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [_round(i * step) for i in range(first, last + 1)]
    return Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP), marks


def _grid(y: Scale, marks: Sequence[float], show: Callable[[float], str]) -> Iterable[str]:
    for mark in marks:
        at = y(mark)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
        yield f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{show(mark)}</text>'


def _steps(x: Scale, x_label: str) -> Iterable[str]:
    base = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    found = [tick for tick in ticks(x.low, x.high, 5) if tick == round(tick)] or [x.low]
    for tick in found:
        at = x(tick)
        anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
        yield f'<line class="axis" x1="{at}" x2="{at}" y1="{base}" y2="{base + 4}"/>'
        name = f"{x_label} {number(tick)}" if tick == found[0] else number(tick)
        yield f'<text x="{at}" y="{base + 18}" text-anchor="{anchor}">{escape(name)}</text>'


def _level(level: Level, y: Scale, line: Line) -> Iterable[str]:
    """The line, and its name at that end where the curve keeps farther away."""
    at = y(level.y)
    third = max(1, len(line.ys) // 3)
    left, right = (min(abs(y(value) - at) for value in part) for part in (line.ys[:third], line.ys[-third:]))
    place, anchor = (LEFT + 4, "start") if left > right else (WIDTH - RIGHT, "end")
    yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
    yield (
        f'<text class="level" x="{place}" y="{at + 14 if at < TOP + 14 else at - 5:.1f}" text-anchor="{anchor}">'
        f"{escape(level.name)}</text>"
    )


def _line(line: Line, x: Scale, y: Scale) -> Iterable[str]:
    """The values, pale under their moving average where there are many; a dot for a single value."""
    smooth = line.smooth and len(line.xs) >= SMOOTH_FROM
    points = thinned(line.xs, line.ys)
    if len(points) == 1:
        yield f'<circle class="c{line.colour} dot" cx="{x(points[0][0])}" cy="{y(points[0][1])}" r="3"/>'
        return
    yield _polyline(points, x, y, f"c{line.colour}{' pale' if smooth else ''}")
    if smooth:
        values = [math.log(v) for v in line.ys] if y.log else line.ys
        averages = moving_average(values, max(1.5, len(values) / 60))
        averages = [math.exp(v) for v in averages] if y.log else averages
        yield _polyline(thinned(line.xs, averages), x, y, f"c{line.colour}")
    elif len(points) <= 30:
        for px, py in points:
            yield f'<circle class="c{line.colour} dot" cx="{x(px)}" cy="{y(py)}" r="2.2"/>'


def _polyline(points: Sequence[tuple[float, float]], x: Scale, y: Scale, kind: str) -> str:
    path = " ".join(f"{x(px):g},{y(py):g}" for px, py in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _readings(lines: Sequence[Line], x: Scale, y: Scale, show: Callable[[float], str], x_label: str) -> Iterable[str]:
    """Invisible strips: under the mouse, or a finger, one shows a hairline and the values at its step."""
    every = max(1, math.ceil(len(lines[0].xs) / NUM_READINGS))
    steps = sorted({step for line in lines for step in line.xs[:: max(1, math.ceil(len(line.xs) / NUM_READINGS))]})
    steps = steps if len(steps) <= NUM_READINGS else list(lines[0].xs[::every])
    values = [dict(zip(line.xs, line.ys, strict=True)) for line in lines]
    places = [x(step) for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(places)), WIDTH - RIGHT]
    for i, step in enumerate(steps):
        said = [f"{line.name} {show(found[step])}" for line, found in zip(lines, values, strict=True) if step in found]
        text = escape(f"{x_label} {number(step)}   {'   '.join(said)}")
        yield (
            f'<g class="reading"><rect x="{edges[i]:.1f}" y="0" width="{max(0.5, edges[i + 1] - edges[i]):.1f}"'
            f' height="{HEIGHT - BOTTOM}"/><line x1="{places[i]}" x2="{places[i]}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{WIDTH - RIGHT}" y="12" text-anchor="end">{text}</text></g>'
        )


def _bar(bar: Bar, x: Scale, top: float, thickness: float, show: Callable[[float], str], group: str) -> Iterable[str]:
    start, end, middle = x(max(0.0, x.low)), x(bar.value), top + thickness / 2
    said = f"{group}, {bar.name}: {show(bar.value)}"
    if bar.interval is not None:
        said += f" (95% interval {show(bar.interval[0])} to {show(bar.interval[1])})"
    yield f"<g><title>{escape(said)}</title>"
    yield (
        f'<rect class="c{bar.colour}" x="{min(start, end)}" y="{top:.1f}" width="{max(0.8, abs(end - start)):.1f}"'
        f' height="{thickness}" rx="1.5"/>'
    )
    edge, said_value = end, f"{100 * bar.value:.1f}%" if show is percent else show(bar.value)
    if bar.interval is not None:
        low, high = x(bar.interval[0]), x(bar.interval[1])
        edge = max(end, high)
        yield _whisker(low, high, middle, 3)
    yield f'<text class="value" x="{edge + 5:.1f}" y="{middle + 3.5:.1f}">{said_value}</text></g>'


def _whisker(low: float, high: float, y: float, half: float) -> str:
    return f'<path class="whisker" d="M{low} {y - half}V{y + half}M{low} {y}H{high}M{high} {y - half}V{y + half}"/>'


def _svg(body: Iterable[str], width: float, height: float, label: str, kind: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )
