"""Small charts as inline SVG, without library or script. Colours come from the page's CSS, for light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 330, 220
_RIGHT, _TOP, _BOTTOM = 8, 12, 40
_CHARACTER = 6.6
"""Width of a character in the page's small type."""
_ROW = 25
"""Height of a row of an interval chart."""

Points = Sequence[tuple[float, float]]
Number = Callable[[float], str]


def general(value: float) -> str:
    """Format with three significant digits."""
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Series:
    """A named curve."""

    name: str
    points: Points
    color: int = 0
    """Index into the page's palette (`.c0`, `.c1`, …)."""
    dashed: bool = False
    marked: bool = False
    """Whether every point gets a visible dot and no running mean is drawn."""
    shift: float = 0.0
    """Added to x, so that curves can follow one another on one axis."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A named value with its interval."""

    name: str
    value: float
    low: float
    high: float
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """A running mean at one point."""

    x: float
    mean: float
    error: float
    """Standard error of the mean."""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high].

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> nice_ticks(3, 38)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal up to rounding
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    raw = (high - low) / max(count - 1, 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    # 0.8: rather a few more ticks than the next larger step, which may be twice as large.
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * 0.8)
    # A quotient such as 2.9999999996 counts as 3.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # `i * step` has rounding errors, such as 0.30000000000000004.
    digits = 10 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, last + 1)]


def running_mean(points: Points, window: int) -> list[Smoothed]:
    """Centred mean over `window` points (fewer at both ends), with its standard error.

    The scatter of a point is estimated from the differences of neighbours, which a slow trend hardly affects.

    >>> [(s.mean, round(s.error, 2)) for s in running_mean([(0, 0.0), (1, 3.0), (2, 6.0), (3, 3.0)], 3)]
    [(1.5, 1.5), (3.0, 1.22), (4.0, 1.22), (4.5, 1.5)]
    """
    ys = [y for _, y in points]
    steps = [after - before for before, after in pairwise(ys)]
    # The difference of two neighbours has twice the variance of one point.
    scatter = math.sqrt(sum(step * step for step in steps) / (2 * len(steps))) if steps else 0.0
    half, smooth = window // 2, []
    for i, (x, _) in enumerate(points):
        near = ys[max(0, i - half) : i + half + 1]
        smooth.append(Smoothed(x=x, mean=sum(near) / len(near), error=scatter / math.sqrt(len(near))))
    return smooth


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    number: Number = general,
) -> str:
    """Curves over a common x axis. A curve of eight or more points is drawn as dots with a running mean and its error.

    Hovering shows values. A thin vertical line marks the start of each shifted curve.

    Returns:
        An `<svg>` element; an empty string when no series has a point.
    """
    series = [item for item in series if item.points]
    if not series:
        return ""
    xs = [x + item.shift for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points]
    y_ticks = nice_ticks(
        min(ys) if y_range[0] is None else min(y_range[0], *ys), max(ys) if y_range[1] is None else max(y_range[1], *ys)
    )
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    # x counts steps, turns or iterations, so only whole numbers are labelled.
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high and tick == int(tick)]

    left = 30 + _CHARACTER * max(len(number(tick)) for tick in y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - left - _RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - _TOP - _BOTTOM)
        return left + across, HEIGHT - _BOTTOM - up

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for shift in sorted({item.shift for item in series if item.shift}):
        x, _ = place(shift, y_ticks[0])
        if x > left:
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" '
                'stroke-dasharray="3 3"/>'
            )
    parts.append(
        f'<text class="axis" x="{(left + WIDTH - _RIGHT) / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="10" y="{(HEIGHT - _BOTTOM + _TOP) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 10 {(HEIGHT - _BOTTOM + _TOP) / 2})">{escape(y_label)}</text>'
    )
    for item in series:
        parts += _curve(item, place, y_ticks, number, x_label)
    return "".join([*parts, "</svg>"])


def _curve(
    item: Series,
    place: Callable[[float, float], tuple[float, float]],
    y_ticks: Sequence[float],
    number: Number,
    x_label: str,
) -> list[str]:
    points = sorted(item.points)
    smooth = len(points) >= 8 and not item.marked
    at = [place(x + item.shift, y) for x, y in points]
    parts = [f'<g class="c{item.color % 6}">']
    if smooth:
        # `| 1`: an odd window is centred on its point.
        means = running_mean(points, max(5, len(points) // 8) | 1)
        line = [place(s.x + item.shift, s.mean) for s in means]
        above = [place(s.x + item.shift, min(s.mean + s.error, y_ticks[-1])) for s in means]
        below = [place(s.x + item.shift, max(s.mean - s.error, y_ticks[0])) for s in reversed(means)]
        parts.append(f'<path class="band" fill="var(--c)" fill-opacity="0.15" d="{_path([*above, *below])}Z"/>')
    else:
        line = at
    dash = ' stroke-dasharray="5 4"' if item.dashed else ""
    parts.append(f'<path class="curve" d="{_path(line)}"{dash}/>')
    big = item.marked or len(points) == 1
    dot = 'class="dot" r="4"' if big else f'fill="var(--c)" fill-opacity="0.45" r="{2.2 if len(points) < 100 else 1.2}"'
    for (x, y), (px, py) in zip(points, at, strict=True):
        label = escape(f"{item.name}, {x_label} {x:g}: {number(y)}")
        parts.append(f'<circle {dot} cx="{px:.1f}" cy="{py:.1f}"><title>{label}</title></circle>')
    return [*parts, "</g>"]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)


def interval_chart(title: str, estimates: Sequence[Estimate], *, x_label: str) -> str:
    """One row per estimate, a dot with its interval, over a common axis.

    Returns:
        An `<svg>` element; an empty string when there is nothing to draw.
    """
    if not estimates:
        return ""
    names = [item.name if len(item.name) <= 24 else item.name[:23] + "…" for item in estimates]
    left = 14 + _CHARACTER * max(map(len, names))
    ticks = nice_ticks(min(item.low for item in estimates), max(item.high for item in estimates), count=4)
    bottom = _TOP + _ROW * len(estimates)

    def place(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - _RIGHT - 4 - left)

    height = bottom + _BOTTOM
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{general(tick)}</text>')
    parts.append(
        f'<text class="axis" x="{(left + WIDTH - _RIGHT) / 2:.1f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for i, (item, name) in enumerate(zip(estimates, names, strict=True)):
        y = _TOP + _ROW * (i + 0.5)
        label = escape(f"{item.name}: {general(item.value)} [{general(item.low)}, {general(item.high)}]")
        parts.append(
            f'<g class="c{item.color % 6}"><title>{label}</title>'
            f'<text class="tick" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line class="curve" x1="{place(item.low):.1f}" x2="{place(item.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{place(item.value):.1f}" cy="{y}" r="4.5"/></g>'
        )
    return "".join([*parts, "</svg>"])
