"""Line and point plots as SVG files, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 440, 70, 210, 40, 55
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")

Points = Sequence[tuple[float, float]]


def save(path: Path, series: Mapping[str, Points], *, title: str, x: str, y: str, log_x: bool = False,
         lines: bool = True) -> None:  # fmt: skip
    """Draw named series of points, joined in their order if `lines`.

    Raises:
        ValueError: there is no point, one is not finite, or `log_x` meets an x that is not positive.
    """
    points = [point for each in series.values() for point in each]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"series must hold points, all finite, got {points}")
    if log_x and min(px for px, _ in points) <= 0:
        raise ValueError(f"log_x needs positive x, got {min(px for px, _ in points)}")
    across, down = _scale([px for px, _ in points], log_x), _scale([py for _, py in points], False)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (LEFT + across(point[0]) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - down(point[1]) * _tall())

    parts = [_text(LEFT, TOP - 16, title, size=15), _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x, "middle"),
             f'<g transform="translate(16 {TOP + _tall() / 2}) rotate(-90)">{_text(0, 0, y, "middle")}</g>',
             f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{_tall()}" fill="none" '
             'stroke="#999"/>']  # fmt: skip
    for value in sorted({min(px for px, _ in points), max(px for px, _ in points)}):
        parts.append(_text(at((value, points[0][1]))[0], HEIGHT - BOTTOM + 18, f"{value:.4g}", "middle"))
    for value in sorted({min(py for _, py in points), max(py for _, py in points)}):
        parts.append(_text(LEFT - 6, at((points[0][0], value))[1] + 4, f"{value:.4g}", "end"))
    for number, (name, each) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(point) for point in each]
        if lines and len(places) > 1:
            joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}"/>' for px, py in places]
        if number < 22:  # what fits beside the plot
            level = TOP + 14 + 16 * number
            parts.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{level - 4}" r="4" fill="{colour}"/>')
            parts.append(_text(WIDTH - RIGHT + 24, level, name, size=11))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    path.write_text(f'{head}<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def _tall() -> int:
    return HEIGHT - TOP - BOTTOM


def _scale(values: list[float], log: bool):
    """A function from a value to its share of the axis, 0.05 to 0.95."""
    see = math.log if log else float
    low, high = see(min(values)), see(max(values))
    return lambda value: 0.5 if high == low else 0.05 + 0.9 * (see(value) - low) / (high - low)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}">'
            f"{escape(text)}</text>")  # fmt: skip
