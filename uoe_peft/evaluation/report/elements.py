"""The parts that every page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from uoe_peft.evaluation.report.pictures import Bar, bars
from uoe_peft.evaluation.report.style import STYLE


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML; empty parts are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def figure(caption: str, drawn: str) -> str:
    """A picture with its caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawn}</figure>"


def bar_figures(groups: Sequence[tuple[str, Sequence[Bar]]], *, caption: str, per_figure: int = 5) -> str:
    """Groups of bars in a grid of figures, so that many of them fill a desk's width and not its height."""
    parts = [groups[start : start + per_figure] for start in range(0, len(groups), per_figure)]
    drawn = [figure(caption, bars(part, title=f"{caption}: {', '.join(name for name, _ in part)}")) for part in parts]
    return f'<div class="grid">{"".join(drawn)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def key(colours: Mapping[str, str]) -> str:
    """What each colour stands for."""
    spans = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<p class="key">{"".join(spans)}</p>'
