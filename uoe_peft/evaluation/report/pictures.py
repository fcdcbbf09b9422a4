"""Pictures as SVG text: no library, no files, legible at the width of a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from uoe_peft.palette import BASE, CALIBRATED, MARK, RETRAINED, UNLEARNED

COLOURS = {"base": BASE, "unlearned": UNLEARNED, "calibrated": CALIBRATED, "retrained": RETRAINED}
_WIDTH = 360  # of the drawing; a page shows it at this many pixels or more


@dataclass(frozen=True)
class Bar:
    """A bar: its length in [0, 1], its colour and what is written beside it."""

    value: float
    colour: str
    text: str


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str) -> str:
    """Horizontal bars on a scale from 0 to 1, group under group.

    Args:
        groups: A label and its bars.
        title: What the picture shows, for who cannot see it.
    """
    parts, y = [], 4
    longest = max((len(bar.text) for _, own in groups for bar in own), default=0)
    track = _WIDTH - 14 - 7 * longest  # text of this size is at most 7 wide a letter
    for label, own in groups:
        parts.append(f'<text x="0" y="{y + 11}" class="label">{escape(label)}</text>')
        y += 17
        for bar in own:
            length = round(track * min(max(bar.value, 0.0), 1.0), 1)
            parts.append(f'<rect x="0" y="{y}" width="{track}" height="12" fill="#eef0f3"/>')
            parts.append(f'<rect x="0" y="{y}" width="{length}" height="12" fill="{bar.colour}"/>')
            parts.append(f'<text x="{track + 6}" y="{y + 10}">{escape(bar.text)}</text>')
            y += 15
        y += 7
    return _svg("".join(parts), height=y, title=title)


def frontier(
    points: Sequence[tuple[str, str, float, float]], line: Sequence[tuple[float, float]], *, title: str
) -> str:
    """What is kept over what is still known; the lower right corner forgets nothing, the upper left is the goal.

    Args:
        points: Name, colour, forget score and retain score, in [0, 1].
        line: Forget and retain score along the adapter's scale; may be empty.
        title: What the picture shows, for who cannot see it.
    """
    left, top, size = 44, 10, 260

    def place(forget: float, retain: float) -> tuple[float, float]:
        return round(left + size * min(max(forget, 0), 1), 1), round(top + size * (1 - min(max(retain, 0), 1)), 1)

    parts = [f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#c5cad2"/>']
    for tick in (0.0, 0.5, 1.0):
        x, y = place(tick, tick)
        parts.append(f'<text x="{x}" y="{top + size + 15}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    middle = top + size / 2
    parts.append(
        f'<text x="{left + size / 2}" y="{top + size + 31}" text-anchor="middle">forget set: still known</text>'
    )
    parts.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">retain set: kept</text>')
    if len(line) > 1:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{CALIBRATED}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="2.5" fill="{CALIBRATED}"/>' for x, y in (place(*point) for point in line)
        ]
    taken: list[tuple[float, float]] = []
    for name, colour, forget, retain in points:
        x, y = place(forget, retain)
        parts.append(f'<circle cx="{x}" cy="{y}" r="6" fill="{colour}"><title>{escape(name)}</title></circle>')
        on_left = x > left + size / 2
        text_y = y + 4
        while any(abs(text_y - other_y) < 13 and on_left == side for side, other_y in taken):
            text_y += 13
        taken.append((on_left, text_y))
        text_x, anchor = (x - 10, "end") if on_left else (x + 10, "start")
        parts.append(f'<text x="{text_x}" y="{text_y}" text-anchor="{anchor}" class="label">{escape(name)}</text>')
    return _svg("".join(parts), height=top + size + 38, title=title)


def heat_map(
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    marked: Sequence[tuple[int, int]],
    highest: float,
    title: str,
) -> str:
    """A grid of values, darker for higher, each cell with its number as a tooltip.

    Args:
        values: Rows of equal length, at least 0.
        labels: One a row.
        marked: Row and column of cells to frame.
        highest: The value of the darkest colour, so that two pictures can be compared.
        title: What the picture shows, for who cannot see it.
    """
    left, num_columns = 28, len(values[0])
    width, height = (_WIDTH - left - 2) / num_columns, 20
    highest = highest or 1.0
    parts = []
    for place, (label, row) in enumerate(zip(labels, values, strict=True)):
        y = 2 + place * height
        parts.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        for column, value in enumerate(row):
            x = left + column * width
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{_shade(value / highest)}">'
                f"<title>layer {escape(label)}, expert {column}: {value:.4f}</title></rect>"
            )
    for place, column in marked:
        parts.append(
            f'<rect x="{left + column * width:.2f}" y="{2 + place * height}" width="{width:.2f}" height="{height}" '
            f'fill="none" stroke="{MARK}" stroke-width="2.5"/>'
        )
    bottom = 2 + len(values) * height
    step = max(1, num_columns // 8)
    for column in range(0, num_columns, step):
        parts.append(
            f'<text x="{left + (column + 0.5) * width:.2f}" y="{bottom + 15}" text-anchor="middle">{column}</text>'
        )
    return _svg("".join(parts), height=bottom + 22, title=title)


def _shade(share: float) -> str:
    """From near white to dark blue. Args: share: in [0, 1]."""
    light, dark = (240, 244, 250), (20, 61, 115)
    channels = (round(a + (b - a) * min(max(share, 0.0), 1.0)) for a, b in zip(light, dark, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _svg(content: str, *, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{content}</svg>'
    )
