"""Small charts as inline SVG: no library, no script, colours from the page's CSS so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 350, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 38

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A named curve."""

    name: str
    points: Points
    color: int = 0
    """Index into the page's palette (`.c0`, `.c1`, …)."""
    dashed: bool = False
    marked: bool = False
    """Whether every point gets a visible dot."""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high].

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> nice_ticks(3, 38)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    raw = (high - low) / max(count - 1, 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * 0.8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def moving_average(points: Points, window: int) -> list[tuple[float, float]]:
    """Centred mean over `window` points, of those that are there at both ends.

    >>> moving_average([(0, 0.0), (1, 3.0), (2, 6.0), (3, 3.0)], 3)
    [(0, 1.5), (1, 3.0), (2, 4.0), (3, 4.5)]
    """
    half, smooth = window // 2, []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        smooth.append((x, sum(near) / len(near)))
    return smooth


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    number: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> str:
    """Curves over a common x axis; noisy ones get a faint raw line under their moving average. Hovering shows values.

    Returns:
        An `<svg>` element; empty when no series has a point.
    """
    series = [item for item in series if item.points]
    if not series:
        return ""
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points]
    y_ticks = nice_ticks(
        min(ys) if y_range[0] is None else min(y_range[0], *ys), max(ys) if y_range[1] is None else max(y_range[1], *ys)
    )
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high and tick == int(tick)]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, HEIGHT - _BOTTOM - up

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="10" y="{(HEIGHT - _BOTTOM + _TOP) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 10 {(HEIGHT - _BOTTOM + _TOP) / 2})">{escape(y_label)}</text>'
    )
    for item in series:
        parts += _curve(item, place, number, x_label)
    return "".join([*parts, "</svg>"])


def _curve(
    item: Series, place: Callable[[float, float], tuple[float, float]], number: Callable[[float], str], x_label: str
) -> list[str]:
    points = sorted(item.points)
    window = len(points) // 8 | 1
    noisy = window >= 3 and not item.marked
    dash = ' stroke-dasharray="5 4"' if item.dashed else ""
    parts = [f'<g class="c{item.color % 6}">']
    if noisy:
        parts.append(f'<path class="raw" d="{_path(points, place)}"/>')
    parts.append(f'<path class="curve" d="{_path(moving_average(points, window) if noisy else points, place)}"{dash}/>')
    for x, y in points:
        px, py = place(x, y)
        kind = "dot" if item.marked or len(points) == 1 else "hover"
        label = f"{item.name}, {x_label} {x:g}: {number(y)}"
        parts.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{escape(label)}</title></circle>'
        )
    return [*parts, "</g>"]


def _path(points: Points, place: Callable[[float, float], tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
