"""Plots over a model's layers, drawn as HTML figures with SVG inside. What they show is the caller's affair.

A figure needs `STYLE` in its page and the colours `--paper`, `--ink`, `--soft` and `--line` defined there,
and nothing else. Captions are HTML already: the caller escapes what it did not write itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """The words of a figure.

    Attributes:
        name: unique in the page; letters only.
        title: above it. note: what it shows, below it.
        label: of the vertical axis, with its unit.
    """

    name: str
    title: str
    note: str
    label: str


@dataclass(frozen=True)
class Curve:
    """One layer's spectrum.

    Attributes:
        layer: its number.
        shares: of the layer's energy that each direction has, descending; at least one is above 0.
        rank: how many directions are kept, from 1.
        about: shown where a pointer rests on the curve.
    """

    layer: int
    shares: Sequence[float]
    rank: int
    about: str


# Sizes are in SVG's units, which are a pixel or a little less on a phone.
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 408, 32, 206
"""Where the axes' ends are."""

_DEPTH = ((109, 91, 208), (194, 65, 124), (204, 119, 34))
"""Colours of the first, the middle and the last layer, all readable on white and on black."""

_DECADES = 8
"""How far below the whole energy a spectrum is shown."""


@dataclass(frozen=True)
class _Axis:
    """Values → places along one side of a plot.

    Attributes:
        label: what is shown, with its unit.
        low, high: the values at the ends. start, end: the places of the ends.
        ticks: (value, its text).
    """

    label: str
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """The place of a value."""
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def lines(
    caption: Caption, layers: Sequence[int], series: Mapping[str, Sequence[float | None]], top: float = 0
) -> str:
    """A line over the layers for each series, at most two, in percent.

    Args:
        series: what it is → share of each layer, 0.01 for 1 %. The line has a gap where there is no share or
            none that is finite.
        top: the percentage that the vertical axis reaches at least.
    """
    columns = [[_percentage(share) for share in shares] for shares in series.values()]
    shown = [value for column in columns for value in column if value is not None]
    x, y = _layer_axis(layers), _linear(caption.label, max([top, *shown]))
    marks = []
    for n, (what, column) in enumerate(zip(series, columns, strict=True)):
        places = [None if value is None else (x.at(at), y.at(value)) for at, value in enumerate(column)]
        marks.append(f'<path class="line s{n}" d="{_path(places)}"/>')
        marks += [
            f'<circle class="dot s{n}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3">'
            f"<title>layer {layer}, {what}: {value:.3g} %</title></circle>"
            for layer, place, value in zip(layers, places, column, strict=True)
            if place is not None
        ]
    keys = [f'<span><i class="s{n}"></i>{what}</span>' for n, what in enumerate(series)]
    extent = f"From {min(shown):.3g} to {max(shown):.3g} %." if shown else "No finite number."
    return _figure(caption, x, y, marks, "".join(keys) if len(keys) > 1 else "", extent)


def bars(caption: Caption, layers: Sequence[int], values: Sequence[int]) -> str:
    """A bar for each layer."""
    x, y = _layer_axis(layers), _linear(caption.label, max(values))
    width = min(0.7 * (x.at(1) - x.at(0)), 40)
    marks = [
        f'<rect class="bar" x="{x.at(n) - width / 2:.1f}" y="{y.at(value):.1f}" width="{width:.1f}" '
        f'height="{y.start - y.at(value):.1f}"><title>layer {layer}: {value:,}</title></rect>'
        for n, (layer, value) in enumerate(zip(layers, values, strict=True))
    ]
    return _figure(caption, x, y, marks, extent=f"From {min(values):,} to {max(values):,}.")


def spectra(caption: Caption, curves: Sequence[Curve]) -> str:
    """A thin line for each layer on a logarithmic axis, coloured by depth, with its rank marked."""
    least = min(share for curve in curves for share in curve.shares if share > 0)
    y = _decades(caption.label, min(-1, max(math.floor(math.log10(least)), -_DECADES)))
    longest = max(len(curve.shares) for curve in curves)
    ticks = tuple((float(n), f"{n:,}") for n in _steps(longest, 5))
    x = _Axis("direction (number)", 0.0, float(longest), _LEFT, _RIGHT, ticks)
    depths = [curve.layer for curve in curves]
    paths, rings = [], []
    for curve in curves:
        colour, about = _depth_colour(curve.layer, depths), f"<title>{curve.about}</title>"
        rank = min(curve.rank, len(curve.shares))
        # Below the axis a curve is not drawn: it would look as if it had levelled off.
        places = [
            (x.at(n), y.at(math.log10(curve.shares[n - 1]))) if curve.shares[n - 1] >= 10**y.low else None
            for n in _samples(len(curve.shares), rank)
        ]
        at = max(math.log10(curve.shares[rank - 1]), y.low) if curve.shares[rank - 1] > 0 else y.low
        paths.append(f'<path class="thin" stroke="{colour}" d="{_path(places)}">{about}</path>')
        rings.append(
            f'<circle class="ring" stroke="{colour}" cx="{x.at(rank):.1f}" cy="{y.at(at):.1f}" r="3.5">'
            f"{about}</circle>"
        )
    return _figure(caption, x, y, paths + rings, f'{_depths(depths)}<span><i class="ring"></i>rank</span>')


def _figure(
    caption: Caption, x: _Axis, y: _Axis, marks: Iterable[str], legend: str = "", extent: str = ""
) -> str:
    """A titled plot with axes, its legend and its note below; `extent` is for those who cannot see it."""
    rows = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y.at(value):.1f}" y2="{y.at(value):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y.at(value) + 4:.1f}" text-anchor="end">{text}</text>'
        for value, text in y.ticks
    )
    columns = "".join(
        f'<text x="{x.at(value):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{text}</text>'
        for value, text in x.ticks
    )
    middle = (_LEFT + _RIGHT) / 2
    labels = (
        f'<text class="label" x="2" y="14">{y.label}</text>'
        f'<text class="label" x="{middle}" y="{_BOTTOM + 37}" text-anchor="middle">{x.label}</text>'
    )
    return (
        f'<figure>\n<figcaption>{caption.title}</figcaption>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-labelledby="{caption.name}-title {caption.name}-note">\n'
        f'<title id="{caption.name}-title">{caption.title}</title>'
        f'<desc id="{caption.name}-note">{caption.note} {extent}</desc>\n'
        f"{rows}{columns}{labels}\n{''.join(marks)}\n</svg>\n"
        + (f'<p class="legend">{legend}</p>\n' if legend else "")
        + f"<p>{caption.note}</p>\n</figure>\n"
    )


def _layer_axis(layers: Sequence[int]) -> _Axis:
    """Layers in bands of equal width."""
    ticks = tuple((float(at), str(layers[at])) for at in _steps(len(layers) - 1, 9))
    return _Axis("layer", -0.5, len(layers) - 0.5, _LEFT, _RIGHT, ticks)


def _linear(label: str, top: float) -> _Axis:
    """A vertical axis from 0 to a round number that is not below `top`."""
    top = top if top > 0 else 1.0
    step = _round_step(top / 5)
    count = math.ceil(top / step - 1e-9)
    values = [n * step for n in range(count + 1)]
    ticks = tuple((value, f"{value:,.0f}" if step >= 1 else f"{value:.4g}") for value in values)
    return _Axis(label, 0.0, values[-1], _BOTTOM, _TOP, ticks)


def _decades(label: str, low: int) -> _Axis:
    """A vertical axis of logarithms, from 10^low to 1."""
    powers = range(0, low - 1, -1 if low >= -5 else -2)
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    ticks = tuple((float(n), "10" + str(n).translate(digits) if n else "1") for n in powers)
    return _Axis(label, float(low), 0.0, _BOTTOM, _TOP, ticks)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 …, and of 0.5, 0.2 …, that is not below `least` > 0."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _steps(last: int, most: int) -> range:
    """Round whole numbers from 0 to at most `last`, `most` steps apart at the most."""
    return range(0, last + 1, max(1, round(_round_step(max(last, 1) / most))))


def _samples(n: int, rank: int) -> list[int]:
    """Numbers of the directions to draw, from 1: a curve of thousands looks the same with a hundred."""
    return sorted({*range(1, min(n, 16) + 1), *range(1, n + 1, max(1, n // 100)), rank, n})


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """SVG's words for a line that stops where a place is missing."""
    words, pen = [], "M"
    for place in places:
        if place is not None:
            words.append(f"{pen}{place[0]:.1f} {place[1]:.1f}")
        pen = "M" if place is None else "L"
    return "".join(words)


def _percentage(share: float | None) -> float | None:
    return None if share is None or not math.isfinite(share) else 100 * share


def _depth_colour(layer: int, depths: Sequence[int]) -> str:
    """From violet over pink to orange with depth."""
    at = 2 * (layer - min(depths)) / max(1, max(depths) - min(depths))
    half = min(int(at), 1)
    return _hex(round(a + (at - half) * (b - a)) for a, b in zip(*_DEPTH[half : half + 2], strict=True))


def _depths(depths: Sequence[int]) -> str:
    """The legend of the colours."""
    first, last = min(depths), max(depths)
    if first == last:
        return f'<span><i style="background:{_hex(_DEPTH[0])}"></i>layer {first}</span>'
    ramp = f"background:linear-gradient(to right,{','.join(map(_hex, _DEPTH))})"
    return f'<span>layer {first}<i class="ramp" style="{ramp}"></i>{last}</span>'


def _hex(colour: Iterable[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


STYLE = """
:root { --first: #2b6cd4; --second: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --first: #6ba4ff; --second: #f09a5b; } }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figure p { font-size: .9rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .label { fill: var(--ink); }
.grid { stroke: var(--line); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.s0 { stroke: var(--first); }
.line.s1 { stroke: var(--second); stroke-dasharray: 5 3; }
.dot.s0, .bar { fill: var(--first); }
.dot.s1 { fill: var(--second); }
.thin { fill: none; stroke-width: 1.2; }
circle.ring { fill: var(--paper); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.legend i { display: inline-block; width: 18px; height: 4px; margin: 0 6px; vertical-align: middle; }
.legend .s0 { background: var(--first); }
.legend .s1 { background: repeating-linear-gradient(to right, var(--second) 0 5px, transparent 5px 8px); }
.legend .ramp { width: 72px; height: 8px; }
.legend .ring { width: 9px; height: 9px; border: 1.5px solid var(--soft); border-radius: 50%; }
"""
