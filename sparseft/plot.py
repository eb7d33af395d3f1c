"""Line and point plots as SVG files, without a plotting library."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 440, 70, 210, 40, 55
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
           "#000000", "#393b79")  # fmt: skip
LINE = 14  # from one text to the next below it

Points = Sequence[tuple[float, float]]


def save(path: Path, series: Mapping[str, Points], *, title: str, x: str, y: str, log_x: bool = False,
         lines: bool = True, labels: Mapping[str, Sequence[str]] | None = None) -> None:  # fmt: skip
    """Draw named series of points: joined in their order, with the names in a legend; or without `lines`, each name
    beside its points. What is not finite, such as the loss of a training that diverged, has no place.

    Args:
        labels: with `lines`, by the name of a series, a text beside each of its points.

    Raises:
        ValueError: there is no point, or `log_x` meets an x that is not positive.
    """
    if not any(series.values()):
        raise ValueError(f"series must hold points, got {dict(series)}")
    points = [point for each in series.values() for point in each if _finite(point)]
    if log_x and points and min(px for px, _ in points) <= 0:
        raise ValueError(f"log_x needs positive x, got {min(px for px, _ in points)}")
    xs, ys = (sorted({point[axis] for point in points} or {1.0}) for axis in (0, 1))
    right = RIGHT if lines else 60  # beside the plot: the legend, or what a last point's name needs
    across, down = _scale(xs, log_x, LEFT, WIDTH - right), _scale(ys, False, HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, TOP - 16, title, size=15), _text((LEFT + WIDTH - right) / 2, HEIGHT - 12, x, "middle"),
             f'<g transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{_text(0, 0, y, "middle")}</g>',
             f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - right}" height="{HEIGHT - TOP - BOTTOM}" fill="none" '
             'stroke="#999"/>']  # fmt: skip
    for value in xs if log_x and len(xs) <= 8 else ticks(xs[0], xs[-1]):
        parts.append(_grid(across(value), TOP, across(value), HEIGHT - BOTTOM))
        parts.append(_text(across(value), HEIGHT - BOTTOM + 18, f"{value:.4g}", "middle"))
    for value in ticks(ys[0], ys[-1]):
        parts.append(_grid(LEFT, down(value), WIDTH - right, down(value)))
        parts.append(_text(LEFT - 6, down(value) + 4, f"{value:.4g}", "end"))
    names: list[tuple[float, float, str]] = []
    for number, (name, each) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        beside = [name] * len(each) if not lines else [""] * len(each) if labels is None else labels[name]
        places = [(across(px), down(py), text) for (px, py), text in zip(each, beside, strict=True)
                  if _finite((px, py))]  # fmt: skip
        if lines and len(places) > 1:
            joined = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [_dot(px, py, colour) for px, py, _ in places]
        names += [(px + 8, py + 4, text) for px, py, text in places if text]
        if lines and number < 22:  # what fits beside the plot
            level = TOP + 14 + 16 * number
            parts += [_dot(WIDTH - right + 14, level - 4, colour), _text(WIDTH - right + 24, level, name, size=11)]
    parts += [_text(px, py, name, size=11) for px, py, name in apart(names)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    path.write_text(f'{head}<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def _finite(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], three to seven of them; one number if the two are equal."""
    if low == high:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(size * factor for factor in (5, 2, 1) if (high - low) / (size * factor) >= 3)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def apart(names: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Texts at (x, y), those that would cover one above them moved down."""
    placed: list[tuple[float, float, str]] = []
    for x, y, name in sorted(names, key=lambda one: one[1]):
        for other_x, other_y, other in placed:  # in the order of y
            if other_x - 7 * len(name) < x < other_x + 7 * len(other):
                y = max(y, other_y + LINE)
        placed.append((x, y, name))
    return placed


def _scale(values: Sequence[float], log: bool, start: float, end: float) -> Callable[[float], float]:
    """From a value to its place between `start` and `end`, with a margin."""
    see = math.log if log else float
    low, high = see(min(values)), see(max(values))
    length = end - start
    return lambda value: start + length * (0.5 if high == low else 0.05 + 0.9 * (see(value) - low) / (high - low))


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def _grid(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#e5e5e5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}">'
            f"{escape(text)}</text>")  # fmt: skip
