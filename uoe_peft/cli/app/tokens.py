"""An answer's tokens as HTML: one box a token, with the experts of an edited layer that it was sent to."""

from __future__ import annotations

from collections.abc import Mapping, Set
from html import escape

from uoe_peft.cli.app.asking import Answer
from uoe_peft.palette import UNLEARNED

# Colours that are not named here are the page's own, so that the boxes can be read in the dark, too.
STYLE = f"""
.uoe-tokens {{ display: flex; flex-wrap: wrap; gap: 4px; margin: 4px 0 12px; }}
.uoe-token {{ border: 1px solid var(--border-color-primary, #c5cad2); border-radius: 4px; padding: 1px 5px;
  font: 13px/1.35 ui-monospace, monospace; color: var(--body-text-color, #1c2330); text-align: center; }}
.uoe-token small {{ display: block; font-size: 11px; color: inherit; }}
.uoe-token.edited {{ border: 2px solid {UNLEARNED}; padding: 0 4px; }}
.uoe-token b {{ background: {UNLEARNED}; color: #fff; border-radius: 3px; padding: 0 3px; }}
.uoe-heading {{ font-size: 14px; color: var(--body-text-color, #1c2330); margin: 8px 0 0; }}
.uoe-heading span {{ opacity: .75; }}
"""

_SHOWN = {"\n": "↵", "\t": "⇥", " ": "␣", "": "∅"}


def routing_html(answer: Answer) -> str:
    """The tokens of prompt and answer, layer by layer; a token that reaches an edited expert is framed.

    Every text of the model or of the user is escaped.
    """
    return "".join(_layer(answer, layer_idx) for layer_idx in answer.experts)


def _layer(answer: Answer, layer_idx: int) -> str:
    edited, reached = answer.edited[layer_idx], answer.reached(layer_idx)
    boxes = [
        _box(text, experts, edited=edited)
        for text, experts in zip(answer.tokens, answer.experts[layer_idx], strict=True)
    ]
    split = answer.num_prompt_tokens
    parts = []
    for name, part in (("prompt", slice(None, split)), ("answer", slice(split, None))):
        count = f"{sum(reached[part])} of {len(reached[part])} tokens reach {_named(edited)}"
        parts.append(
            f'<p class="uoe-heading">Layer {layer_idx}, {name}: <span>{count}</span></p>'
            f'<div class="uoe-tokens">{"".join(boxes[part])}</div>'
        )
    return "".join(parts)


def _box(text: str, experts: Mapping[int, float], *, edited: Set[int]) -> str:
    numbers = " ".join(f"<b>{expert}</b>" if expert in edited else str(expert) for expert in experts)
    weights = ", ".join(f"expert {expert}: {weight:.2f}" for expert, weight in experts.items())
    marked = " edited" if edited & set(experts) else ""
    return f'<span class="uoe-token{marked}" title="{escape(weights)}">{_visible(text)}<small>{numbers}</small></span>'


def _visible(text: str) -> str:
    """A token that can be seen: spaces at its sides are dropped, unless it is nothing else."""
    return escape(text.strip() or "".join(_SHOWN.get(character, character) for character in text) or _SHOWN[""])


def _named(edited: Set[int]) -> str:
    numbers = ", ".join(map(str, sorted(edited)))
    return f"expert {numbers}" if len(edited) == 1 else f"one of the experts {numbers}"
