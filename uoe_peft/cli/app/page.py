"""The page itself. Needs gradio: `pip install 'uoe-peft[app]'`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from types import ModuleType
from typing import Any

from uoe_peft.cli.app.asking import Answer
from uoe_peft.cli.app.tokens import STYLE, routing_html

# (question, whether it forgets) -> answer
Asking = Callable[[str, bool], Answer]

_WAITING = "…"
# Letters that are on the machine: a page about private models should load nothing from elsewhere.
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def build_page(asking: Asking, *, about: str, samples: Sequence[str] = ()) -> Any:
    """The page, not yet served.

    Args:
        asking: Answers a question, without or with forgetting. It is never called twice at a time.
        about: What is asked, in Markdown.
        samples: Questions to click.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ImportError: gradio is not installed.
    """
    gradio = import_gradio()
    answer_both = _one_at_a_time(asking, gradio.Error)
    # Analytics would send figures of use to gradio's makers.
    with gradio.Blocks(title="uoe-peft: forgetting off and on", analytics_enabled=False) as page:
        gradio.Markdown(f"# One question, forgetting off and on\n{about}")
        with gradio.Row(equal_height=True):
            question = gradio.Textbox(
                label="Question", placeholder="Type a question, or click one below", scale=5, autofocus=True
            )
            button = gradio.Button("Ask", variant="primary", scale=0, min_width=96)
        clicked = gradio.Dataset(
            components=[gradio.Textbox(visible=False)],
            samples=[[sample] for sample in samples],
            label="Samples",
            visible=bool(samples),
        )
        shown = []
        with gradio.Row():
            for title in ("Forgetting off: the base model", "Forgetting on: with the adapter"):
                with gradio.Column(min_width=300):
                    shown += [gradio.Textbox(label=title, lines=2, interactive=False), gradio.HTML()]
        gradio.on([button.click, question.submit], answer_both, question, shown, api_name="ask")
        clicked.click(lambda row: row[0], clicked, question, api_visibility="private").then(
            answer_both, question, shown, api_visibility="private"
        )
    return page


def launch(page: Any, **options: Any) -> Any:
    """Serve a page of :func:`build_page`; `options` are those of `gradio.Blocks.launch`."""
    theme = import_gradio().themes.Default(primary_hue="slate", **_FONTS)
    return page.launch(theme=theme, css=STYLE, footer_links=[], share=False, **options)


def _one_at_a_time(asking: Asking, page_error: type[Exception]) -> Callable[[str], Iterator[tuple[str, str, str, str]]]:
    lock = Lock()  # forgetting is switched on and off for the whole model

    def answer_both(question: str) -> Iterator[tuple[str, str, str, str]]:
        try:
            with lock:
                off = asking(question, False)
            yield off.text, routing_html(off), _WAITING, ""
            with lock:
                on = asking(question, True)
        except ValueError as error:  # such as an empty question: said on the page, not in a traceback
            raise page_error(str(error)) from error
        yield off.text, routing_html(off), on.text, routing_html(on)

    return answer_both


def import_gradio() -> ModuleType:
    """The module `gradio`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio; install it with: pip install 'uoe-peft[app]'") from error
    module: ModuleType = gradio
    return module
