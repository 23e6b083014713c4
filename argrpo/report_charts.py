"""Charts of a report as inline SVG: no script, no network, colours from the page's style sheet.

Series take the colours --series-1 to --series-5 of the page in order. A value that is None or not
finite leaves a gap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _NARROW, _HEIGHT = 560.0, 400.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 12.0, 10.0, 28.0
_NUM_COLOURS = 5


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve."""

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]

    def points(self) -> list[tuple[float, float] | None]:
        """(step, value), or None where there is no finite value."""
        return [
            (step, value) if value is not None and math.isfinite(value) else None
            for step, value in zip(self.steps, self.values, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where data lies on the picture."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = _WIDTH

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(series: Sequence[Series], *, smooth: bool = False, from_zero: bool = False) -> str:
    """Curves over steps; empty text if there is nothing to draw.

    Args:
        series: the curves, at most five.
        smooth: draw a running mean, with the values faint behind it.
        from_zero: let the axis begin at 0.
    """
    points = [point for curve in series for point in curve.points() if point is not None]
    if not points:
        return ""
    lowest = min(y for _, y in points)
    frame = _Frame(
        (0.0, max(1.0, *(x for x, _ in points))),
        _padded(min(0.0, lowest) if from_zero else lowest, max(y for _, y in points)),
    )
    marks = []
    for index, curve in enumerate(series):
        colour = _colour(index)
        if smooth:
            marks.append(_path(curve, frame, f'stroke="{colour}" class="faint"'))
            curve = running_mean(curve)
        marks.append(_path(curve, frame, f'stroke="{colour}" class="line"'))
        marks.append(_dots(curve, frame, colour))
    return _figure(frame, "".join(marks), _legend(series))


def stacked_chart(series: Sequence[Series]) -> str:
    """Curves as layers of a sum, the first at the bottom; all share their steps."""
    if not series or not series[0].steps:
        return ""
    steps = list(series[0].steps)
    values = [[value or 0.0 for value in curve.values] for curve in series]
    totals = [sum(column) for column in zip(*values, strict=True)]
    frame = _Frame((0.0, max(1.0, *steps)), (0.0, 1.05 * max(*totals, 1e-9)))
    floor = [0.0] * len(steps)
    layers = []
    for index, layer in enumerate(values):
        ceiling = [low + high for low, high in zip(floor, layer, strict=True)]
        upper = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(steps, ceiling, strict=True)]
        lower = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(steps, floor, strict=True)]
        outline = " ".join([*upper, *reversed(lower)])
        layers.append(f'<polygon points="{outline}" fill="{_colour(index)}" class="layer"/>')
        floor = ceiling
    return _figure(frame, "".join(layers), _legend(series))


def bar_chart(names: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Bars beside each other: for each of `names` one bar of each group, from 0 to 1.

    The first group is what the others are compared with and stays grey.
    """
    frame = _Frame((0.0, float(len(names))), (0.0, 1.0), width=_NARROW)
    width = 0.7 / max(1, len(groups))
    bars = []
    for index, (_, values) in enumerate(groups):
        for place, value in enumerate(values):
            if not math.isfinite(value):
                continue
            left = frame.x(place + 0.15 + index * width)
            right, top = frame.x(place + 0.15 + (index + 1) * width), frame.y(value)
            bars.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left - 1.5:.1f}" '
                f'height="{frame.y(0.0) - top:.1f}" rx="1.5" fill="{_colour(index - 1)}"/>'
            )
    for place, name in enumerate(names):
        bars.append(
            f'<text x="{frame.x(place + 0.5):.1f}" y="{_HEIGHT - 9:.1f}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    legend = _legend([Series(name, [], []) for name, _ in groups], first_colour=-1)
    return _figure(frame, "".join(bars), legend, with_steps=False)


def running_mean(curve: Series) -> Series:
    """The mean over the last tenth of the curve's length, at most, at each of its points."""
    window = max(1, len(curve.steps) // 10)
    kept = [
        (step, point[1]) for step, point in zip(curve.steps, curve.points(), strict=True) if point
    ]
    means = []
    for place in range(len(kept)):
        recent = [value for _, value in kept[max(0, place + 1 - window) : place + 1]]
        means.append(sum(recent) / len(recent))
    return Series(curve.name, [step for step, _ in kept], means)


def number(value: float) -> str:
    """A number as a person reads it: three or four digits that matter."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    if high - low < 1e-12:
        room = abs(high) * 0.5 or 0.5
        return low - room, high + room
    room = (high - low) * 0.06
    return (low if low == 0.0 else low - room), high + room


def _figure(frame: _Frame, marks: str, legend: str, *, with_steps: bool = True) -> str:
    lines = []
    for value in ticks(*frame.y_range):
        y = frame.y(value)
        lines.append(
            f'<line x1="{_LEFT}" x2="{frame.width - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    if with_steps:
        for value in ticks(*frame.x_range, count=6):
            if value == int(value):
                lines.append(
                    f'<text x="{frame.x(value):.1f}" y="{_HEIGHT - 9:.1f}" '
                    f'text-anchor="middle">{value:g}</text>'
                )
    axes = f'<g class="axes">{"".join(lines)}</g>'
    picture = f'<svg viewBox="0 0 {frame.width:g} {_HEIGHT:g}" role="img">{axes}{marks}</svg>'
    return f"{legend}{picture}"


def _path(curve: Series, frame: _Frame, style: str) -> str:
    words = []
    pen = "M"
    for point in curve.points():
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{frame.x(point[0]):.1f},{frame.y(point[1]):.1f}")
        pen = "L"
    return f'<path d="{"".join(words)}" fill="none" {style}/>'


def _dots(curve: Series, frame: _Frame, colour: str) -> str:
    """A dot at the end, and at every point where there are few."""
    points = [point for point in curve.points() if point is not None]
    if len(points) > 30:
        points = points[-1:]
    return "".join(
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{colour}">'
        f"<title>step {x:g}: {number(y)}</title></circle>"
        for x, y in points
    )


def _legend(series: Sequence[Series], first_colour: int = 0) -> str:
    items = []
    for index, curve in enumerate(series, start=first_colour):
        last = next((point for point in reversed(curve.points()) if point is not None), None)
        value = f" <b>{number(last[1])}</b>" if last else ""
        dot = f'<i style="background:{_colour(index)}"></i>'
        items.append(f"<span>{dot}{escape(curve.name)}{value}</span>")
    return f'<div class="legend">{"".join(items)}</div>'


def _colour(index: int) -> str:
    return f"var(--series-{index % _NUM_COLOURS + 1})"
